//! `relay diff FILE`: what `apply` would change. Exit code 5 if anything would.

use super::{Context, OK, Outcome, VERDICT_FAILED, apply};
use clap::Args;
use std::path::PathBuf;

/// Arguments of `relay diff`.
#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// The config file
    file: PathBuf,
}

/// Prints the difference.
pub(super) fn run(args: &DiffArgs, context: &Context) -> Outcome {
    let changes = apply::changes(&args.file, true, context)?;
    context.output.facts(&changes, |_| apply::text(&changes))?;
    Ok(if changes.added.is_empty() && changes.removed.is_empty() { OK } else { VERDICT_FAILED })
}
