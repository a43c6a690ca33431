//! `cargo xtask requirements`: each promise of the design documents, and the tests that prove it.
//!
//! The promises are `xtask/requirements.txt`; a test claims one by `req_000_1` in its name or a comment, or by `000.1` in its
//! doc line. Must never invent a proof: a row without a test is shown as such.

use crate::source::{self, Source};
use crate::workspace;
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

/// Options of the command.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Fail when a row has no test
    #[arg(long)]
    check: bool,
    /// Only rows without a test
    #[arg(long)]
    missing: bool,
}

/// Document and row, as in 000.10.
type Id = (u16, u16);

/// Prints the table.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let rows = rows(include_str!("../requirements.txt"));
    let tests = tests(&source::scan(&workspace::files()?));
    let mut uncovered = 0;
    for (id, promise) in &rows {
        let found = tests.get(id);
        uncovered += usize::from(found.is_none());
        if found.is_none() || !args.missing {
            print_row(*id, promise, found);
        }
    }
    for id in tests.keys().filter(|id| rows.iter().all(|(row, _)| row != *id)) {
        println!("{}  not a row of xtask/requirements.txt, but named by a test", text(*id));
    }
    println!("\n{} rows, {} with a test, {uncovered} without", rows.len(), rows.len() - uncovered);
    Ok(if args.check && uncovered > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print_row(id: Id, promise: &str, found: Option<&BTreeSet<String>>) {
    println!("{:<8}{promise}", text(id));
    match found {
        Some(tests) => tests.iter().for_each(|test| println!("        {test}")),
        None => println!("        NO TEST"),
    }
}

fn text((document, row): Id) -> String {
    format!("{document:03}.{row}")
}

/// `000.1 promise`, one a line; `#` begins a comment.
fn rows(text: &str) -> Vec<(Id, String)> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(id, promise)| Some((dotted(id)?, promise.trim().to_owned())))
        .collect()
}

/// `000.1`.
fn dotted(word: &str) -> Option<Id> {
    let (document, row) = word.split_once('.')?;
    let plain = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (document.len() == 3 && document.starts_with("00") && plain(document) && plain(row))
        .then(|| Some((document.parse().ok()?, row.parse().ok()?)))?
}

/// Every `req_000_1` in the text, and every `000.1` in a doc line, with the place it stands at.
fn tests(sources: &[Source]) -> BTreeMap<Id, BTreeSet<String>> {
    let mut found: BTreeMap<Id, BTreeSet<String>> = BTreeMap::new();
    for source in sources.iter().filter(|source| !source.path.starts_with("xtask/")) {
        for (line, test) in source.text.lines().zip(&source.test) {
            let name = function_name(line);
            for id in claims(line, *test) {
                found.entry(id).or_default().insert(name.map_or_else(|| source.path.clone(), |name| format!("{}: {name}", source.path)));
            }
        }
    }
    found
}

fn claims(line: &str, test: bool) -> Vec<Id> {
    let mut ids: Vec<Id> = line.match_indices("req_").filter_map(|(at, _)| underscored(line.get(at + 4..)?)).collect();
    if test && line.trim_start().starts_with("//") {
        ids.extend(line.split(|c: char| !c.is_ascii_digit() && c != '.').filter_map(|word| dotted(word.trim_end_matches('.'))));
    }
    ids
}

/// `000_1…`.
fn underscored(text: &str) -> Option<Id> {
    let (document, rest) = text.split_once('_')?;
    let row: String = rest.chars().take_while(char::is_ascii_digit).collect();
    dotted(&format!("{document}.{row}"))
}

fn function_name(line: &str) -> Option<&str> {
    line.trim_start().strip_prefix("fn ")?.split('(').next()
}

#[cfg(test)]
mod tests_of_this_file {
    use super::*;

    #[test]
    fn claims_are_found_in_names_and_doc_lines() {
        assert_eq!(claims("fn req_000_1_second_writer_is_refused() {", true), [(0, 1)]);
        assert_eq!(claims("/// 002.17 and 003.10: never hangs.", true), [(2, 17), (3, 10)]);
        assert_eq!(claims("// since version 0.11", true), []);
        assert_eq!(claims("/// 002.17", false), []);
        assert_eq!(claims("fn required_001() {", true), []);
    }

    #[test]
    fn row_1_is_not_row_10() {
        assert_eq!(underscored("000_10_typed"), Some((0, 10)));
        assert_eq!(underscored("000_1_typed"), Some((0, 1)));
    }

    #[test]
    fn the_committed_list_has_every_document() {
        let rows = rows(include_str!("../requirements.txt"));
        let count = |document: u16| rows.iter().filter(|((of, _), _)| *of == document).count();
        assert_eq!([count(0), count(1), count(2), count(3), count(4)], [11, 13, 19, 13, 6]);
    }
}
