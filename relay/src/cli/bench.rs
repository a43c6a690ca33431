//! `relay bench`: figures as tables or JSON. Exit code 5 if a row could not be measured.

use super::{Context, OK, Outcome, VERDICT_FAILED};
use crate::lab::bench as path;
use clap::Subcommand;

/// What is measured.
#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// Packets a second through the relay's paths and the baselines
    Path(path::Args),
}

/// Measures and prints.
pub(super) fn run(command: &BenchCommand, context: &Context) -> Outcome {
    match command {
        BenchCommand::Path(args) => run_path(args, context),
    }
}

fn run_path(args: &path::Args, context: &Context) -> Outcome {
    let report = path::measure(args)?;
    context.output.facts(&report, |_| path::table(&report))?;
    for error in &report.errors {
        tracing::error!("{error}");
    }
    Ok(if report.errors.is_empty() { OK } else { VERDICT_FAILED })
}
