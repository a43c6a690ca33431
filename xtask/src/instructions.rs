//! `cargo xtask instructions`: how many instructions the steps of a packet's way in user space take, held against a committed list.
//!
//! callgrind counts a row of `benches/packet_path` twice, with so many calls and with twice as many: the difference is the calls'
//! own, whatever the process does before and after. It is the same from run to run, and nearly from machine to machine (another
//! compiler, or a C library that picks another memcpy, moves it). Must never be a part of CI, and never time anything.

use crate::workspace;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// What to do with the figures.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write them into the list, instead of holding them against it
    #[arg(long)]
    update: bool,
}

/// The committed figures: instructions a call, and the row's name.
const LIST: &str = "relay/benches/packet_path/instructions.txt";
/// A figure this much larger or smaller is another one.
const TOLERANCE: f64 = 0.02;
const CALLS: u64 = 5_000;

/// Counts and compares.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if Command::new("valgrind").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("SKIPPED: valgrind is not installed (apt-get install valgrind)");
        return Ok(ExitCode::SUCCESS);
    }
    let bench = build()?;
    let names = text(Command::new(&bench).env("RELAY_BENCH_ROW", "").env("RELAY_BENCH_CALLS", "0"))?;
    let mut counted = Vec::new();
    for name in names.lines() {
        let more = instructions(&bench, name, 2 * CALLS)? - instructions(&bench, name, CALLS)?;
        counted.push((name.to_owned(), more as f64 / CALLS as f64));
    }
    let list = workspace::root().join(LIST);
    if args.update {
        let lines: String = counted.iter().map(|(name, count)| format!("{count:.1} {name}\n")).collect();
        std::fs::write(&list, lines).with_context(|| format!("write {LIST}"))?;
    }
    let before = parse(&std::fs::read_to_string(&list).with_context(|| format!("read {LIST} (--update makes it)"))?)?;
    let mut is_fine = before.len() == counted.len();
    for (name, count) in &counted {
        let verdict = judge(before.get(name).copied(), *count);
        is_fine &= verdict.is_none();
        println!("{name:44} {count:10.1}  {}", verdict.unwrap_or_default());
    }
    if !is_fine {
        eprintln!("xtask: not as {LIST} says; where that is meant: cargo xtask instructions --update");
    }
    Ok(if is_fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is wrong with a figure, if anything is.
fn judge(before: Option<f64>, count: f64) -> Option<String> {
    let Some(before) = before else { return Some("not in the list".into()) };
    let share = count / before - 1.0;
    (share.abs() > TOLERANCE).then(|| format!("{:+.1} % of {before:.1}", share * 100.0))
}

fn parse(list: &str) -> Result<BTreeMap<String, f64>> {
    let line = |line: &str| {
        let (count, name) = line.split_once(' ').with_context(|| format!("{LIST}: `{line}` is no figure and name"))?;
        Ok((name.to_owned(), count.parse().with_context(|| format!("{LIST}: `{count}` is no number"))?))
    };
    list.lines().map(line).collect()
}

/// The bench's executable, as cargo names it.
fn build() -> Result<PathBuf> {
    let mut cargo = workspace::cargo();
    cargo.args(["bench", "--package", "relay", "--bench", "packet_path", "--no-run", "--message-format", "json"]);
    let messages = text(cargo.stderr(Stdio::inherit()))?;
    let benches = messages.lines().filter(|line| line.contains("\"kind\":[\"bench\"]"));
    let mut named = benches.filter_map(|line| line.split_once("\"executable\":\"")?.1.split_once('"')).map(|(path, _)| path);
    named.next_back().map(PathBuf::from).context("cargo named no executable")
}

/// Instructions of the whole process.
fn instructions(bench: &Path, row: &str, calls: u64) -> Result<u64> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(bench);
    let output = valgrind.env("RELAY_BENCH_ROW", row).env("RELAY_BENCH_CALLS", calls.to_string()).output().context("start valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "valgrind: {said}");
    let count =
        said.lines().find_map(|line| line.split_once("Collected :")).with_context(|| format!("valgrind counted nothing: {said}"))?;
    count.1.trim().parse().with_context(|| format!("`{}` is no count", count.1))
}

/// A command's standard output.
fn text(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {}", command.get_program().to_string_lossy()))?;
    ensure!(output.status.success(), "{}: {}", command.get_program().to_string_lossy(), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_another_one_beyond_the_tolerance() {
        let list = parse("100.0 parse\n2.5 match, 100 rules\n").unwrap();
        assert_eq!((list["parse"], list["match, 100 rules"]), (100.0, 2.5));
        assert!(judge(Some(100.0), 101.9).is_none() && judge(Some(100.0), 98.1).is_none());
        assert_eq!(judge(Some(100.0), 103.0).as_deref(), Some("+3.0 % of 100.0"));
        assert!(judge(Some(100.0), 97.0).is_some() && judge(None, 1.0).is_some());
        assert!(parse("parse").is_err() && parse("x parse").is_err());
    }
}
