//! Rules for scripts/mutants.sh, and for the fault table that names its mutations: each finds its place in the source, and each row of
//! the table names one, or says why there is none.
//!
//! Must never run one.

use super::{Finding, error};
use crate::workspace::File;
use std::collections::BTreeSet;

const LIST: &str = "scripts/mutants.sh";
const TABLE: &str = "docs/reliability.md";
/// What the column of the mutations is called.
const COLUMN: &str = "| Taken out |";

/// Both files, where they are.
pub(super) fn check(files: &[File]) -> Vec<Finding> {
    let text = |path: &str| files.iter().find(|file| file.path == path).map_or("", |file| file.text.as_str());
    let mut findings = Vec::new();
    let mut names = BTreeSet::new();
    for (at, line) in text(LIST).lines().enumerate().filter(|(_, line)| !line.starts_with('#')) {
        let fields: Vec<&str> = line.split('~').collect();
        let &[name, file, old, _, _, _] = fields.as_slice() else { continue };
        names.insert(name);
        let place = format!("relay/src/{file}");
        // As `printf %b` reads it.
        let old = old.replace("\\n", "\n").replace("\\\"", "\"");
        let count = text(&place).matches(&old).count();
        if count != 1 {
            findings.push(error(
                LIST,
                at + 1,
                format!("{name}: what it mutates stands {count} times in {place}, and has to stand there once"),
            ));
        }
    }
    findings.extend(rows(text(TABLE)).filter_map(|(at, row)| Some(error(TABLE, at, unproved(row, &names)?))));
    findings
}

/// The rows of the tables with that column, by line.
fn rows(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_within = false;
    text.lines().enumerate().filter_map(move |(at, line)| {
        let is_head = line.ends_with(COLUMN);
        is_within = line.starts_with('|') && (is_within || is_head);
        (is_within && !is_head && !line.starts_with("|-")).then_some((at + 1, line))
    })
}

/// What is wrong with the last cell of a row.
fn unproved(row: &str, names: &BTreeSet<&str>) -> Option<String> {
    let cell = row.trim_end_matches('|').trim().rsplit(" | ").next().unwrap_or_default();
    if cell.starts_with("none: ") {
        return None;
    }
    let named: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
    match named.iter().find(|name| !names.contains(*name)) {
        Some(unknown) => Some(format!("{LIST} has no mutation {unknown}")),
        None if named.is_empty() => Some(format!("neither a mutation of {LIST} nor `none: REASON`")),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(list: &str, table: &str) -> Vec<String> {
        let file = |path: &str, text: &str| File { path: path.into(), text: text.into() };
        let source = file("relay/src/a.rs", "one\ntwo \"x\"\nthree\nthree\n");
        check(&[file(LIST, list), file(TABLE, table), source]).into_iter().map(|finding| finding.what).collect()
    }

    #[test]
    fn a_mutation_has_one_place() {
        assert!(found("# a ~ b ~ c ~ d ~ e ~ f\nm~a.rs~one\\ntwo \\\"x\\\"~z~unit~t\n", "").is_empty());
        for old in ["three", "four"] {
            assert_eq!(found(&format!("m~a.rs~{old}~z~unit~t\n"), "").len(), 1, "{old}");
        }
        assert_eq!(found("m~b.rs~one~z~unit~t\n", "").len(), 1, "no such file");
    }

    #[test]
    fn a_row_names_a_mutation_or_says_why_none() {
        let head = "| Fault | Test | Taken out |\n|---|---|---|\n";
        let wrong =
            |cell: &str| found("m~a.rs~one~z~unit~t\n", &format!("| a | b | c |\n\n{head}| It dies | `x` | {cell} |\n\n| a | b | c |\n"));
        assert!(wrong("`m`").is_empty() && wrong("`m`; more words").is_empty() && wrong("none: the kernel's").is_empty());
        assert_eq!(wrong("`n`"), ["scripts/mutants.sh has no mutation n"]);
        assert_eq!((wrong("none").len(), wrong("").len()), (1, 1));
    }
}
