//! `relay man DIR`: manual pages, generated from the definitions of the commands.

use super::failure::Failure;
use super::{Cli, Context, OK, Outcome};
use clap::{Args, CommandFactory};
use serde::Serialize;
use std::path::PathBuf;

/// Arguments of `relay man`.
#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// The directory; made if it is missing
    directory: PathBuf,
}

#[derive(Serialize)]
struct Written {
    directory: PathBuf,
}

/// Writes `relay.1` and one page for each command.
pub(super) fn run(args: &ManArgs, context: &Context) -> Outcome {
    std::fs::create_dir_all(&args.directory).and_then(|()| clap_mangen::generate_to(Cli::command(), &args.directory)).map_err(|error| {
        Failure::bad_input(format!("{}: {error}", args.directory.display())).field("DIR").hint("name a directory you may write to")
    })?;
    let written = Written { directory: args.directory.clone() };
    context.output.facts(&written, |_| format!("manual pages are in {}", args.directory.display())).map(|()| OK)
}
