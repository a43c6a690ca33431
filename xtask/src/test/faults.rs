//! `cargo xtask test --faults`: the rows of docs/reliability.md, each with what its tests printed last, and whether they pass.
//!
//! Reads the tables themselves, so that a row cannot be without a test. Must never pass a row of which nothing has run.

use super::Report;
use crate::{packages, tidy, workspace};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::process::ExitCode;

/// Longest figure shown.
const FIGURE_LEN: usize = 140;
/// Seconds for the tests of one file.
const LIMIT: u32 = 600;

/// The last word of `cargo xtask tidy`.
const TIDY: &str = "tidy`";

/// Where tests stand, as the table names it, and which of them by the beginning of their names; none: all.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reference {
    source: String,
    names: Vec<String>,
}

/// A row.
#[derive(Debug)]
struct Row {
    fault: String,
    tests: Vec<Reference>,
}

/// What became of a test.
#[derive(Clone, Debug)]
struct Outcome {
    test: String,
    word: String,
    figure: String,
}

fn rows(text: &str, is_source: impl Fn(&str) -> bool) -> Vec<Row> {
    let row = |line: &str| {
        let cells: Vec<&str> = line.strip_prefix("| ")?.split(" | ").collect();
        let (fault, cell) = (cells.first()?, cells.get(2)?.trim_end_matches(" |"));
        let tests = references(cell, &is_source);
        (!tests.is_empty()).then(|| Row { fault: (*fault).to_owned(), tests })
    };
    text.lines().filter_map(row).collect()
}

fn references(cell: &str, is_source: impl Fn(&str) -> bool) -> Vec<Reference> {
    let mut found: Vec<Reference> = Vec::new();
    for word in cell.split_whitespace() {
        let word = word.trim_end_matches([',', ';', ':']);
        let name = word.strip_prefix('`').and_then(|word| word.strip_suffix('`')).map(|name| name.trim_end_matches('…'));
        match (name, found.last_mut()) {
            (Some(name), Some(last)) if name.chars().all(|c| c.is_alphanumeric() || c == '_') => last.names.push(name.to_owned()),
            _ if is_source(word) => found.push(Reference { source: word.to_owned(), names: Vec::new() }),
            _ => {}
        }
    }
    found
}

impl Reference {
    fn means(&self, test: &str) -> bool {
        self.names.is_empty() || test.split("::").any(|part| self.names.iter().any(|name| part.starts_with(name.as_str())))
    }

    /// For cargo: whose tests, and which of them.
    fn arguments(&self) -> (Vec<String>, Vec<String>) {
        if self.source == TIDY {
            return Default::default();
        }
        let Some(module) = self.source.strip_prefix("relay/src/") else {
            return (vec!["--package".into(), "relay-tests".into(), "--test".into(), self.source.clone()], self.names.clone());
        };
        let module = module.trim_end_matches(".rs").trim_end_matches("_tests").replace('/', "::");
        (vec!["--package".into(), "relay".into(), "--lib".into()], if self.names.is_empty() { vec![module] } else { self.names.clone() })
    }
}

/// Runs the tests of every row and prints the table.
pub(super) fn run() -> Result<ExitCode> {
    packages::install_missing()?;
    ensure!(super::build()?, "the relay could not be built");
    let text = std::fs::read_to_string(workspace::root().join("docs/reliability.md")).context("docs/reliability.md")?;
    let is_source = |word: &str| word == TIDY || word.starts_with("relay/src/") || is_test_file(word);
    let rows = rows(&text, is_source);
    ensure!(!rows.is_empty(), "docs/reliability.md has no rows");
    let mut wanted: BTreeMap<String, Reference> = BTreeMap::new();
    for reference in rows.iter().flat_map(|row| &row.tests) {
        let entry = wanted.entry(reference.source.clone()).or_insert_with(|| reference.clone());
        let all = entry.names.is_empty() || reference.names.is_empty();
        entry.names = if all { Vec::new() } else { [entry.names.clone(), reference.names.clone()].concat() };
    }
    let outcomes: BTreeMap<String, Vec<Outcome>> =
        wanted.iter().map(|(source, reference)| Ok((source.clone(), outcomes(reference)?))).collect::<Result<_>>()?;
    let passed = rows.iter().map(|row| show(row, &outcomes)).filter(|passed| *passed).count();
    println!("{passed} of {} rows pass", rows.len());
    Ok(if passed == rows.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn is_test_file(word: &str) -> bool {
    !word.is_empty()
        && word.chars().all(|c| c.is_alphanumeric() || c == '_')
        && workspace::root().join("tests/tests").join(word).with_extension("rs").exists()
}

/// One line: fault, figure, verdict. A skip is shown, and no failure; a row of which nothing has passed is one.
fn show(row: &Row, outcomes: &BTreeMap<String, Vec<Outcome>>) -> bool {
    let of = |reference: &Reference| {
        let all = outcomes.get(&reference.source).map(Vec::as_slice).unwrap_or_default();
        all.iter().filter(|outcome| reference.means(&outcome.test)).cloned().collect::<Vec<_>>()
    };
    let complete = row.tests.iter().all(|reference| !of(reference).is_empty());
    let all: Vec<Outcome> = row.tests.iter().flat_map(of).collect();
    let passed = all.iter().filter(|outcome| outcome.word == "passed").count();
    let failed: Vec<&str> = all.iter().filter(|outcome| outcome.word == "failed").map(|outcome| outcome.test.as_str()).collect();
    let skipped = all.len() - passed - failed.len();
    let verdict = match (failed.is_empty(), complete && passed > 0) {
        (true, true) if skipped == 0 => "pass".to_owned(),
        (true, true) => format!("pass, {skipped} skipped"),
        (true, false) => "NOT RUN".to_owned(),
        (false, _) => format!("FAIL: {}", failed.join(", ")),
    };
    let figure = all.iter().map(|outcome| outcome.figure.as_str()).find(|figure| !figure.is_empty()).unwrap_or("nothing lost or left");
    println!("{} | {figure} | {verdict}", row.fault);
    failed.is_empty() && complete && passed > 0
}

fn outcomes(reference: &Reference) -> Result<Vec<Outcome>> {
    let (whose, which) = reference.arguments();
    if whose.is_empty() {
        let word = if tidy::passes()? { "passed" } else { "failed" };
        return Ok(vec![Outcome { test: "tidy".into(), word: word.into(), figure: String::new() }]);
    }
    eprintln!("xtask: {}", reference.source);
    let mut command = super::cargo_test(LIMIT)?;
    command.arg("--quiet").args(whose).args(["--", "--test-threads=1", "--show-output", "--format=pretty"]).args(which);
    let mut child = command.spawn().context("start cargo test")?;
    let (mut report, mut figures) = (Report::default(), Figures::default());
    super::each_line(&mut child, |line| {
        report.read(line);
        figures.read(line);
    })?;
    child.wait().context("wait for cargo test")?;
    report.end_of_step();
    let outcome = |line: &str| {
        let (test, word) = line.split_once('\t')?;
        Some(Outcome { test: test.into(), word: word.into(), figure: figures.of.get(test).cloned().unwrap_or_default() })
    };
    Ok(report.outcomes().lines().filter_map(outcome).collect())
}

/// The last line that each test has printed.
#[derive(Debug, Default)]
struct Figures {
    current: Option<String>,
    of: BTreeMap<String, String>,
}

impl Figures {
    fn read(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.current = Some(name.to_owned());
        } else if line == "successes:" || line == "failures:" {
            self.current = None;
        } else if let Some(name) = self.current.as_ref().filter(|_| !line.trim().is_empty()) {
            self.of.insert(name.clone(), line.trim().chars().take(FIGURE_LEN).collect());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_source(word: &str) -> bool {
        word.starts_with("relay/src/") || ["liveness", "poison", "fuzz", "tidy`"].contains(&word)
    }

    #[test]
    fn a_row_names_files_and_the_beginnings_of_tests() {
        let text = "| Fault | What happens, and the bar | Test |\n|---|---|---|\n\
                    | It hangs | found | liveness: `a_stopped_…`, `b`; relay/src/shm/beat.rs (in memory); poison: `c` (`RELAY_X=1`) |\n\
                    | Bytes | no panic | fuzz |\n";
        let rows = rows(text, is_source);
        let faults: Vec<&str> = rows.iter().map(|row| row.fault.as_str()).collect();
        assert_eq!(faults, ["It hangs", "Bytes"]);
        let of = |source: &str, names: &[&str]| Reference {
            source: source.into(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        assert_eq!(rows[0].tests, [of("liveness", &["a_stopped_", "b"]), of("relay/src/shm/beat.rs", &[]), of("poison", &["c"])]);
        assert!(rows[0].tests[0].means("a_stopped_worker::kernel") && !rows[0].tests[0].means("another"));
        assert_eq!(rows[0].tests[1].arguments().1, ["shm::beat"]);
    }

    #[test]
    fn a_figure_is_the_last_line_and_a_row_without_an_outcome_does_not_pass() {
        let mut figures = Figures::default();
        for line in ["successes:", "---- a stdout ----", "5 ms", "6 ms", "", "successes:", "    a"] {
            figures.read(line);
        }
        assert_eq!(figures.of.get("a").map(String::as_str), Some("6 ms"));
        let row = Row { fault: "It hangs".into(), tests: references("liveness: `a`", is_source) };
        let outcome =
            |word: &str| [("liveness".to_owned(), vec![Outcome { test: "a".into(), word: word.into(), figure: String::new() }])].into();
        assert!(show(&row, &outcome("passed")));
        assert!(!show(&row, &outcome("failed")) && !show(&row, &outcome("skipped: no")) && !show(&row, &BTreeMap::new()));
    }
}
