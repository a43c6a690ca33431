//! `cargo xtask requirements`: each promise of the design documents, the tests that prove it, and what became of them.
//!
//! The promises are `xtask/requirements.txt`; a test claims one by `req_000_1` in its name, or by `000.1` in the comment
//! above it. What became of a test is what the last whole `cargo xtask test` recorded; nothing is run here. Figures are not
//! tests: `xtask/measured.txt` says when they were taken, by which command, of which sources. Must never invent a proof: a
//! row without one is shown as such, and a figure of other sources says so.

use crate::source::{self, Source};
use crate::workspace;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of the command.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Fail when a row of documents 000, 002, 003 or 004 has no proof, or a test of any row failed
    #[arg(long)]
    check: bool,
    /// Only rows without a proof
    #[arg(long)]
    missing: bool,
}

/// Document and row, as in 000.10.
type Id = (u16, u16);

/// Documents whose every row must have a proof (001 is another issue's).
const COMPLETE: [u16; 4] = [0, 2, 3, 4];
/// What a figure of `measured.txt` is about.
const MEASURED: [&str; 3] = ["relay/src/ring/", "relay/src/shm/", "relay/src/lab/ringbench/"];

/// A test that claims a row.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Test {
    path: String,
    name: String,
    ignored: bool,
}

/// Prints the table.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let rows = rows(include_str!("../requirements.txt"));
    let sources = source::scan(&workspace::files()?);
    let (tests, hash) = (tests(&sources), source_hash(&sources));
    let measured = measured(include_str!("../measured.txt"), &hash);
    let outcomes = outcomes(&std::fs::read_to_string(recorded()).unwrap_or_default());
    let (mut bare, mut failed) = (Vec::new(), Vec::new());
    for (id, promise) in &rows {
        let lines: Vec<String> = tests.get(id).into_iter().flatten().map(|test| line(test, &outcomes)).collect();
        let lines: Vec<String> = lines.into_iter().chain(measured.get(id).into_iter().flatten().cloned()).collect();
        let proofs = lines.iter().filter(|line| !line.starts_with("ignored")).count();
        if proofs == 0 {
            bare.push(*id);
        }
        failed.extend(lines.iter().any(|line| line.starts_with("FAILED")).then_some(*id));
        if proofs == 0 || !args.missing {
            println!("{:<8}{promise}", text(*id));
            lines.iter().for_each(|line| println!("        {line}"));
            if proofs == 0 {
                println!("        NO PROOF");
            }
        }
    }
    for id in tests.keys().chain(measured.keys()).filter(|id| rows.iter().all(|(row, _)| row != *id)) {
        println!("{}  not a row of xtask/requirements.txt, but claimed", text(*id));
    }
    let later = |id: &Id| rows.iter().any(|(row, promise)| row == id && promise.starts_with("later:"));
    let required = bare.iter().filter(|id| COMPLETE.contains(&id.0) && !later(id));
    let required: Vec<String> = required.map(|id| text(*id)).collect();
    println!(
        "\n{} rows, {} with a proof, {} failed; of 000, 002, 003, 004 without: {required:?}",
        rows.len(),
        rows.len() - bare.len(),
        failed.len()
    );
    println!("sources of the figures (ring, shm, lab/ringbench): {hash}");
    Ok(if args.check && !(required.is_empty() && failed.is_empty()) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Keeps what a whole run of the tests found.
pub(crate) fn record(outcomes: &str) -> Result<()> {
    let path = recorded();
    path.parent().map_or(Ok(()), std::fs::create_dir_all).context("the folder of the results")?;
    std::fs::write(&path, outcomes).with_context(|| format!("write {}", path.display()))
}

/// Where: beside whatever cargo builds.
fn recorded() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace::root().join("target"), PathBuf::from);
    target.join("xtask-test-results.tsv")
}

/// Test name (without its crate) → what became of it.
fn outcomes(text: &str) -> BTreeMap<String, String> {
    let pairs = text.lines().filter_map(|line| line.split_once('\t'));
    pairs.map(|(name, outcome)| (name.rsplit("::").next().unwrap_or(name).to_owned(), outcome.to_owned())).collect()
}

fn line(test: &Test, outcomes: &BTreeMap<String, String>) -> String {
    let word = match outcomes.get(&test.name).map(String::as_str) {
        _ if test.ignored => "ignored",
        Some("passed") => "pass",
        Some("failed") => "FAILED",
        Some(skipped) => {
            let reason = skipped.strip_prefix("skipped: ").unwrap_or(skipped);
            return format!("skipped  {}: {} ({reason})", test.path, test.name);
        }
        None => "not run",
    };
    format!("{word:<9}{}: {}", test.path, test.name)
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

/// `000.7 DATE SOURCES what was run and seen`, one a line.
fn measured(text: &str, hash: &str) -> BTreeMap<Id, Vec<String>> {
    let mut found: BTreeMap<Id, Vec<String>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.splitn(4, ' ');
        let (Some(id), Some(date), Some(sources), Some(what)) = (words.next().and_then(dotted), words.next(), words.next(), words.next())
        else {
            continue;
        };
        let since = if sources == hash { "" } else { " (the sources have changed since)" };
        found.entry(id).or_default().push(format!("measured on {date}{since}: {what}"));
    }
    found
}

/// FNV-1a over path and product code of every file that a figure is about.
fn source_hash(sources: &[Source]) -> String {
    let of = |source: &&Source| MEASURED.iter().any(|room| source.path.starts_with(room));
    let lines = sources.iter().filter(of).flat_map(|source| source.product().map(|(_, line)| line.trim()));
    let hash =
        lines.flat_map(str::bytes).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

/// `000.1`.
fn dotted(word: &str) -> Option<Id> {
    let (document, row) = word.split_once('.')?;
    let plain = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (document.len() == 3 && document.starts_with("00") && plain(document) && plain(row))
        .then(|| Some((document.parse().ok()?, row.parse().ok()?)))?
}

/// Every function of a test whose name, or the comment above it, claims a row.
fn tests(sources: &[Source]) -> BTreeMap<Id, Vec<Test>> {
    let mut found: BTreeMap<Id, Vec<Test>> = BTreeMap::new();
    for source in sources.iter().filter(|source| !source.path.starts_with("xtask/")) {
        let mut above = Above::default();
        for (line, _) in source.text.lines().zip(&source.test).filter(|(_, test)| **test) {
            let Some(name) = function_name(line) else {
                above.see(line);
                continue;
            };
            let Above { ids, is_test, ignored } = std::mem::take(&mut above);
            if is_test || name.starts_with("req_") {
                for id in ids.into_iter().chain(named(name)) {
                    let test = Test { path: source.path.clone(), name: name.to_owned(), ignored };
                    found.entry(id).or_default().push(test);
                }
            }
        }
    }
    found
}

/// What stands above a function.
#[derive(Default)]
struct Above {
    ids: Vec<Id>,
    is_test: bool,
    ignored: bool,
}

impl Above {
    fn see(&mut self, line: &str) {
        let line = line.trim_start();
        if line.starts_with("///") {
            let words = line.split(|c: char| !c.is_ascii_digit() && c != '.');
            self.ids.extend(words.filter_map(|word| dotted(word.trim_end_matches('.'))));
        } else if line.starts_with("#[") {
            self.is_test |= line.starts_with("#[test]");
            self.ignored |= line.starts_with("#[ignore");
        } else if !line.starts_with("//") {
            *self = Self::default();
        }
    }
}

/// Rows in a name: `req_000_1_…`, or several, `req_000_1_req_002_8_…`.
fn named(name: &str) -> Vec<Id> {
    name.match_indices("req_").filter_map(|(at, _)| underscored(name.get(at + 4..)?)).collect()
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

    fn claims(text: &str) -> Vec<(Id, String, bool)> {
        let source = Source {
            path: "relay/src/a.rs".into(),
            text: text.into(),
            code: text.lines().map(str::to_owned).collect(),
            test: vec![true; text.lines().count()],
        };
        let tests = tests(&[source]).into_iter();
        tests.flat_map(|(id, tests)| tests.into_iter().map(move |test| (id, test.name, test.ignored))).collect()
    }

    #[test]
    fn claims_are_found_in_names_and_in_the_comment_above() {
        assert_eq!(claims("#[test]\nfn req_000_1_second() {"), [((0, 1), "req_000_1_second".into(), false)]);
        let text = "/// 002.17 and 003.10: never hangs.\n#[test]\n#[ignore = \"long\"]\nfn bounded() {\n}\n#[test]\nfn other() {";
        assert_eq!(claims(text), [((2, 17), "bounded".into(), true), ((3, 10), "bounded".into(), true)]);
        assert_eq!(claims("// since version 0.11\n#[test]\nfn required_001() {"), []);
        assert_eq!(claims("/// 002.17: a helper\nfn helper() {"), [], "no test");
        assert_eq!(claims("/// 002.17\nstruct A;\n#[test]\nfn other() {"), [], "said of something else");
    }

    #[test]
    fn row_1_is_not_row_10() {
        assert_eq!(underscored("000_10_typed"), Some((0, 10)));
        assert_eq!(underscored("000_1_typed"), Some((0, 1)));
    }

    #[test]
    fn a_test_says_what_became_of_it() {
        let outcomes = outcomes("a::tests::one\tpassed\nb::two\tfailed\nthree\tskipped: no NIC\n");
        let word = |name: &str, ignored| line(&Test { path: "p".into(), name: name.into(), ignored }, &outcomes);
        assert_eq!(word("one", false), "pass     p: one");
        assert_eq!(word("two", false), "FAILED   p: two");
        assert_eq!(word("three", false), "skipped  p: three (no NIC)");
        assert_eq!(word("four", false), "not run  p: four");
        assert_eq!(word("one", true), "ignored  p: one");
    }

    #[test]
    fn a_figure_of_other_sources_says_so() {
        let found = measured("# date sources\n000.7 2026-11-21 abc relay bench ipc: 52 ns\n", "abd");
        assert_eq!(found[&(0, 7)], ["measured on 2026-11-21 (the sources have changed since): relay bench ipc: 52 ns"]);
        let found = measured("000.7 2026-11-21 abc 52 ns\n", "abc");
        assert_eq!(found[&(0, 7)], ["measured on 2026-11-21: 52 ns"]);
    }

    #[test]
    fn the_committed_list_has_every_document() {
        let rows = rows(include_str!("../requirements.txt"));
        let count = |document: u16| rows.iter().filter(|((of, _), _)| *of == document).count();
        assert_eq!([count(0), count(1), count(2), count(3), count(4)], [11, 13, 19, 13, 6]);
    }
}
