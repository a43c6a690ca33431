//! `relay demo`: three namespaces, a relay, real traffic. Exit code 5 unless it passes.

use super::{Context, OK, Outcome, VERDICT_FAILED};
use crate::lab::demo::{Args, demonstrate, table};

/// Runs the demonstration and prints its table.
pub(super) fn run(args: &Args, context: &Context) -> Outcome {
    let report = demonstrate(args)?;
    context.output.facts(&report, |_| table(&report))?;
    Ok(if report.verdict == "PASS" { OK } else { VERDICT_FAILED })
}
