//! `relay bench`: figures as tables, JSON and plots. Exit code 5 if a row could not be measured, or with --gate a bar was missed.

use super::failure::Failure;
use super::{Context, OK, Outcome, VERDICT_FAILED};
use crate::lab::LabError;
use crate::lab::bench::{self as paths, Report, chain, gate, latency};
use crate::lab::ringbench::{self, channels, processes, ring, workers};
use clap::Subcommand;
use std::path::{Path, PathBuf};

/// What is measured.
#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// Packets a second through the relay's paths and the baselines
    Path {
        /// What to measure.
        #[command(flatten)]
        args: paths::Args,
        /// What to do with it.
        #[command(flatten)]
        files: Files,
    },
    /// The same for rules of several outputs
    Fanout {
        /// What to measure.
        #[command(flatten)]
        args: paths::FanoutArgs,
        /// What to do with it.
        #[command(flatten)]
        files: Files,
    },
    /// How long a packet is inside the relay, at a steady rate
    Latency {
        /// What to measure.
        #[command(flatten)]
        args: latency::LatencyArgs,
        /// What to do with it.
        #[command(flatten)]
        files: Files,
    },
    /// What several relays in a row lose, and what they carry without loss
    Chain {
        /// What to measure.
        #[command(flatten)]
        args: chain::ChainArgs,
        /// What to do with it.
        #[command(flatten)]
        files: Files,
    },
    /// What a message costs from thread to thread
    Ring(ring::Args),
    /// What a message costs from process to process
    Ipc(processes::Args),
    /// What a writer pays for many readers
    Channels(channels::Args),
    /// Whether workers that share nothing scale with the CPUs
    Workers(workers::Args),
}

/// Where the figures go besides standard output, and what they are held against.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Files {
    /// Draw them into an SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Write table, JSON and plot as NAME.txt, NAME.json and NAME.svg (`target/bench/path`)
    #[arg(long, value_name = "NAME")]
    save: Option<PathBuf>,
    /// Hold them against the bars the project has set itself: exit code 5 if one is missed
    #[arg(long)]
    gate: bool,
}

/// Measures and prints.
pub(super) fn run(command: &BenchCommand, context: &Context) -> Outcome {
    match command {
        BenchCommand::Path { args, files } => figures(files, context, || paths::measure(args)),
        BenchCommand::Fanout { args, files } => figures(files, context, || paths::measure_fanout(args)),
        BenchCommand::Latency { args, files } => figures(files, context, || latency::measure(args)),
        BenchCommand::Chain { args, files } => figures(files, context, || chain::measure(args)),
        BenchCommand::Ring(args) => print(&ring::measure(args).map_err(failed)?, context),
        BenchCommand::Channels(args) => {
            let report = channels::measure(args).map_err(failed)?;
            context.output.facts(&report, |_| channels::table(&report)).map(|()| OK)
        }
        BenchCommand::Workers(args) => {
            let report = workers::measure(args).map_err(failed)?;
            context.output.facts(&report, |_| workers::table(&report)).map(|()| OK)
        }
        BenchCommand::Ipc(args) => print(&processes::measure(args).map_err(failed)?, context),
    }
}

/// An error of the ring bench as a failure with its exit code.
pub(super) fn failed(error: anyhow::Error) -> Failure {
    Failure::new(ringbench::exit_code(&error), format!("{error:#}"))
}

fn print(report: &ringbench::Report, context: &Context) -> Outcome {
    context.output.facts(report, |_| ringbench::table(report))?;
    Ok(OK)
}

/// Measures, prints, writes and judges. A row that could not run is a failure, whatever the others say.
fn figures(files: &Files, context: &Context, measure: impl FnOnce() -> Result<Report, LabError>) -> Outcome {
    files.check()?;
    let mut report = measure()?;
    if files.gate {
        report.bars = gate::bars(&report);
    }
    context.output.facts(&report, |_| paths::table(&report))?;
    for (file, text) in files.contents(&report) {
        std::fs::write(&file, text).map_err(|error| unwritable(&file, &error, FIELD))?;
    }
    for error in &report.errors {
        tracing::error!("{error}");
    }
    if !report.bars.is_empty() {
        eprintln!("{}", gate::describe(&report.bars));
    }
    let is_fine = report.errors.is_empty() && report.bars.iter().all(|bar| bar.met);
    Ok(if is_fine { OK } else { VERDICT_FAILED })
}

impl Files {
    /// Every file and what shall stand in it.
    fn contents(&self, report: &Report) -> Vec<(PathBuf, String)> {
        let mut contents: Vec<_> = self.plot.iter().map(|file| (file.clone(), paths::svg(report))).collect();
        if let Some(name) = &self.save {
            let json = serde_json::to_string_pretty(report).unwrap_or_default();
            contents.push((name.with_extension("json"), json + "\n"));
            contents.push((name.with_extension("txt"), paths::table(report) + "\n"));
            contents.push((name.with_extension("svg"), paths::svg(report)));
        }
        contents
    }

    /// A file that can't be written is said before minutes are spent on its figures.
    fn check(&self) -> Result<(), Failure> {
        self.contents(&Report::default()).iter().try_for_each(|(file, _)| check_writable(file, FIELD))
    }
}

const FIELD: &str = "--plot, --save";

/// Makes the file if there is none.
pub(super) fn check_writable(file: &Path, field: &str) -> Result<(), Failure> {
    let opened = std::fs::OpenOptions::new().create(true).append(true).open(file);
    opened.map(drop).map_err(|error| unwritable(file, &error, field))
}

fn unwritable(file: &Path, error: &std::io::Error, field: &str) -> Failure {
    Failure::bad_input(format!("{}: {error}", file.display())).field(field)
}
