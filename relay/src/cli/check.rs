//! `relay check FILE`: validates a config file. Asks no daemon, looks at no interface, needs no privilege.

use super::output::count;
use super::{Context, OK, Outcome, rules};
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;

/// Arguments of `relay check`.
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The config file
    file: PathBuf,
}

#[derive(Serialize)]
struct Verdict {
    file: PathBuf,
    rules: u64,
}

/// Prints how many rules a valid file has; an invalid one is exit code 2 with its line.
pub(super) fn run(args: &CheckArgs, context: &Context) -> Outcome {
    let rules = rules::load(&args.file, "FILE")?.len() as u64;
    let verdict = Verdict { file: args.file.clone(), rules };
    context.output.facts(&verdict, |_| format!("{}: valid, {}", args.file.display(), count(rules, "rule"))).map(|()| OK)
}
