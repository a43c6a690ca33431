//! `relay send`: the paced generator of the lab.

use super::{Context, OK, Outcome};
use crate::lab::send::{Args, describe, send};

/// Sends and prints what was sent.
pub(super) fn run(args: &Args, context: &Context) -> Outcome {
    let report = send(args)?;
    context.output.facts(&report, |_| describe(&report)).map(|()| OK)
}
