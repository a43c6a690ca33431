//! `cargo xtask test`: every test there is, and one line that counts them.
//!
//! Plain `cargo test` underneath, in steps: tidy, the crates' own tests, the ring under the model checker, and the namespace
//! tests one by one. Must never hide a test that did not run: a skip is counted and its reason listed.
//!
//! Tests measure time on a machine that may be anybody's. One that fails is run once more, with the others that failed and nothing
//! else; if it passes then, it is counted as passed, and listed as unsteady above the counts, for somebody to look at.

mod faults;
mod report;

use crate::{packages, requirements, tidy, workspace};
use anyhow::{Context, Result};
use report::Report;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Instant;

/// Options of the command.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The acceptance forms: full counts, soak and everything marked as ignored (more than an hour)
    #[arg(long)]
    long: bool,
    /// The fault table of docs/reliability.md alone: each row with its figure
    #[arg(long, conflicts_with_all = ["long", "filter"])]
    faults: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// A part of the test run: what is tested by which cargo arguments.
struct Step {
    name: &'static str,
    /// For cargo.
    arguments: &'static [&'static str],
    /// The arguments name tests already, so ours can't.
    has_filter: bool,
    /// For the test program.
    test_arguments: &'static [&'static str],
    environment: &'static [(&'static str, &'static str)],
    /// What fails is run once more.
    twice: bool,
}

const STEPS: [Step; 3] = [
    Step {
        name: "crates",
        arguments: &["--package", "relay", "--package", "relay-common", "--package", "xtask"],
        has_filter: false,
        test_arguments: &[],
        environment: &[],
        twice: true,
    },
    Step {
        name: "model checker",
        arguments: &["--package", "relay-loom", "--release", "--target-dir", "target/loom"],
        has_filter: true,
        test_arguments: &[],
        environment: &[("RUSTFLAGS", "--cfg loom"), ("LOOM_MAX_PREEMPTIONS", "3")],
        twice: false,
    },
    Step {
        name: "namespaces",
        arguments: &["--package", "relay-tests"],
        has_filter: false,
        // They share two cores and measure time: one at a time.
        test_arguments: &["--test-threads=1"],
        environment: &[],
        twice: true,
    },
];

/// Seconds after which a step is killed: a hang is a failure, not a wait.
const SHORT_LIMIT: u32 = 900;
const LONG_LIMIT: u32 = 4 * 3600;

/// Runs everything and prints the closing lines.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if args.faults {
        return faults::run();
    }
    let start = Instant::now();
    packages::install_missing()?;
    let mut report = Report::default();
    report.note("tidy", tidy::passes()?);
    let built = build()?;
    report.note("build of the relay", built);
    for step in STEPS.iter().filter(|_| built).filter(|step| args.filter.is_none() || !step.has_filter) {
        println!("xtask: {}", step.name);
        let failed_before = report.failed_count();
        run_step(step, args, &[], &mut report)?;
        let failed = report.failed_since(failed_before);
        if step.twice && !failed.is_empty() {
            println!("xtask: {}: once more what has failed: {}", step.name, failed.join(", "));
            let mut again = Report::default();
            run_step(step, args, &failed, &mut again)?;
            report.forgive(failed_before, &again);
        }
    }
    println!("\nxtask: all of it took {} s", start.elapsed().as_secs());
    print!("{report}");
    if args.filter.is_none() {
        requirements::record(&report.outcomes())?;
    }
    Ok(if report.passes() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The tests, and with them the relay that the namespace tests start. (`cargo build` alone would build it with fewer features of two
/// crates far below it, and everything above those twice.)
fn build() -> Result<bool> {
    for step in STEPS.iter().filter(|step| step.environment.is_empty()) {
        let mut command = workspace::cargo();
        if !command.args(["test", "--no-run"]).args(step.arguments).status().context("start cargo test")?.success() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Runs a step's tests: all that the arguments name, or those of these names alone.
fn run_step(step: &Step, args: &Args, names: &[String], report: &mut Report) -> Result<()> {
    let mut child = command(step, args, names)?.spawn().context("start cargo test")?;
    let failed_before = report.failed_count();
    each_line(&mut child, |line| {
        if report.read(line) {
            println!("{line}");
        }
    })?;
    let status = child.wait().context("wait for cargo test")?;
    report.end_of_step();
    if !status.success() && report.failed_count() == failed_before {
        report.note(&format!("{}: {status}", step.name), false);
    }
    Ok(())
}

/// What the tests print, as it comes.
fn each_line(child: &mut Child, mut look: impl FnMut(&str)) -> Result<()> {
    for line in BufReader::new(child.stdout.take().context("no output")?).split(b'\n') {
        look(&String::from_utf8_lossy(&line.context("read the tests' output")?));
    }
    Ok(())
}

/// `cargo test` with the relay beside us, for `limit` seconds. `timeout` puts it in a process group of its own and kills all of it.
fn cargo_test(limit: u32) -> Result<Command> {
    let mut command = Command::new("timeout");
    command.current_dir(workspace::root()).stdout(Stdio::piped());
    command.args(["--kill-after=10", &limit.to_string()]).arg(workspace::cargo().get_program()).arg("test");
    let beside = std::env::current_exe().context("our own path")?;
    command.env("RELAY_BIN", beside.with_file_name("relay"));
    Ok(command)
}

fn command(step: &Step, args: &Args, names: &[String]) -> Result<Command> {
    let mut command = cargo_test(if args.long { LONG_LIMIT } else { SHORT_LIMIT })?;
    command.arg("--no-fail-fast").args(step.arguments);
    command.args(args.filter.iter().filter(|_| names.is_empty()));
    command.args(["--", "--show-output"]).args(step.test_arguments);
    if !names.is_empty() {
        command.arg("--exact").args(names);
    }
    if args.long {
        command.arg("--include-ignored").env("RELAY_TEST_LONG", "1");
    }
    command.envs(step.environment.iter().copied());
    Ok(command)
}
