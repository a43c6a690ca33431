//! `relay bench`: figures as tables or JSON. Exit code 5 if a row could not be measured.

use super::failure::Failure;
use super::{Context, OK, Outcome, VERDICT_FAILED};
use crate::lab::bench as path;
use crate::lab::ringbench::{self, channels, processes, ring, workers};
use clap::Subcommand;

/// What is measured.
#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// Packets a second through the relay's paths and the baselines
    Path(path::Args),
    /// The same for rules of several outputs
    Fanout(path::FanoutArgs),
    /// What a message costs from thread to thread
    Ring(ring::Args),
    /// What a message costs from process to process
    Ipc(processes::Args),
    /// What a writer pays for many readers
    Channels(channels::Args),
    /// Whether workers that share nothing scale with the CPUs
    Workers(workers::Args),
}

/// Measures and prints.
pub(super) fn run(command: &BenchCommand, context: &Context) -> Outcome {
    match command {
        BenchCommand::Path(args) => print_rows(&path::measure(args)?, context),
        BenchCommand::Fanout(args) => print_rows(&path::measure_fanout(args)?, context),
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

/// A row that could not run is a failure, whatever the others say.
fn print_rows(report: &path::Report, context: &Context) -> Outcome {
    context.output.facts(report, |_| path::table(report))?;
    for error in &report.errors {
        tracing::error!("{error}");
    }
    Ok(if report.errors.is_empty() { OK } else { VERDICT_FAILED })
}
