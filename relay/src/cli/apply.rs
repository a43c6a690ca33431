//! `relay apply FILE`: make the running set of rules equal to a file.

use super::failure::Failure;
use super::output::count;
use super::{Context, OK, Outcome, rules, unexpected};
use crate::control::message::{Changes, Request, Response};
use clap::Args;
use std::path::{Path, PathBuf};

/// Arguments of `relay apply`.
#[derive(Debug, Args)]
pub(super) struct ApplyArgs {
    /// The config file
    file: PathBuf,
    /// Only say what would change
    #[arg(long)]
    dry_run: bool,
}

/// Applies the file and prints what changed.
pub(super) fn run(args: &ApplyArgs, context: &Context) -> Outcome {
    let changes = changes(&args.file, args.dry_run, context)?;
    context.output.facts(&changes, |_| text(&changes)).map(|()| OK)
}

/// Validates the file here, so that an error names its line, then hands its rules to the daemon.
pub(super) fn changes(file: &Path, dry_run: bool, context: &Context) -> Result<Changes, Failure> {
    let rules = rules::load(file, "FILE")?.iter().map(ToString::to_string).collect();
    match context.ask(&Request::Apply { rules, dry_run })? {
        Response::Changes(changes) => Ok(changes),
        other => Err(unexpected(&other)),
    }
}

/// `- ` and `+ ` lines, then a summary.
pub(super) fn text(changes: &Changes) -> String {
    let mut text = String::new();
    for (mark, rules) in [("-", &changes.removed), ("+", &changes.added)] {
        for rule in rules {
            text += &format!("{mark} {rule}\n");
        }
    }
    let (added, removed) = (count(changes.added.len() as u64, "rule"), count(changes.removed.len() as u64, "rule"));
    text + &format!("{added} added, {removed} removed, {} unchanged\n", changes.unchanged)
}
