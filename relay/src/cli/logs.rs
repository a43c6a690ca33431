//! Logs on stderr: levels by -v, directives by RUST_LOG, no colours outside a terminal.

use super::failure::Failure;
use super::output::colours_wanted;
use std::io::{self, IsTerminal};
use tracing_subscriber::EnvFilter;

/// Starts logging. The daemon tells what it does; the other commands speak up only when something is wrong.
pub(super) fn init(verbose: u8, is_daemon: bool) -> Result<(), Failure> {
    let level = match (verbose, is_daemon) {
        (0, false) => "warn",
        (0, true) => "info",
        (1, _) => "debug",
        _ => "trace",
    };
    let directives = std::env::var("RUST_LOG").ok().filter(|directives| !directives.is_empty());
    let filter = EnvFilter::try_new(directives.as_deref().unwrap_or(level))
        .map_err(|error| Failure::bad_input(format!("RUST_LOG: {error}")).field("RUST_LOG").hint("for example RUST_LOG=relay=debug"))?;
    let colours = io::stderr().is_terminal() && colours_wanted();
    // A logger that is there already (a test's) stays.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(colours).try_init();
    Ok(())
}
