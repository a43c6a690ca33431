//! `relay recv`: the verifying receiver of the lab. Exit code 5 unless everything came, once, in order, whole.

use super::{Context, OK, Outcome, VERDICT_FAILED};
use crate::lab::recv::{Args, Verdict, describe, receive};

/// Receives and prints the verdict.
pub(super) fn run(args: &Args, context: &Context) -> Outcome {
    let report = receive(args)?;
    context.output.facts(&report, |_| describe(&report))?;
    Ok(if report.verdict == Verdict::Pass { OK } else { VERDICT_FAILED })
}
