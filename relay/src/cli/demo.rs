//! `relay demo`: three namespaces, a relay, real traffic. Exit code 5 unless it passes.

use super::bench::check_writable;
use super::failure::Failure;
use super::{Context, OK, Outcome, VERDICT_FAILED};
use crate::lab::demo::{Args, demonstrate, picture, table};
use std::path::Path;

/// Runs the demonstration and prints its table; writes the picture, if one is wanted.
pub(super) fn run(args: &Args, context: &Context) -> Outcome {
    args.compare.as_deref().map_or(Ok(()), can_compare)?;
    let report = demonstrate(args)?;
    context.output.facts(&report, |_| table(&report))?;
    if let Some(file) = &args.compare {
        std::fs::write(file, picture(&report)).map_err(|error| Failure::new(1, format!("{}: {error}", file.display())).field(FIELD))?;
    }
    Ok(if report.verdict == "PASS" { OK } else { VERDICT_FAILED })
}

const FIELD: &str = "--compare";

/// What can't be done is said before any traffic flows.
fn can_compare(file: &Path) -> Result<(), Failure> {
    if nix::unistd::geteuid().is_root() {
        return check_writable(file, FIELD);
    }
    let message = "--compare needs root: generator, path xsk and path kernel are BPF programs, which an ordinary user may not load, \
                   and without that generator packet and sockets have no packets/s to compare";
    Err(Failure::bad_input(message).field(FIELD).hint("sudo relay demo --compare; without --compare the demo runs here"))
}
