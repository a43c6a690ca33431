//! `cargo xtask demo`: install, build, and hand over to the relay itself.
//!
//! Must never judge: the relay's exit code is ours.

use crate::{packages, workspace};
use anyhow::{Context, Result};
use std::process::{Command, ExitCode, ExitStatus};

/// What is passed on.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Arguments for the relay
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// `relay demo`.
pub(crate) fn demo(args: &Args) -> Result<ExitCode> {
    packages::install_missing()?;
    eprintln!("xtask: building the relay (release)");
    let mut cargo = workspace::cargo();
    cargo.args(["run", "--release", "--package", "relay", "--bin", "relay", "--"]).arg("demo").args(&args.rest);
    Ok(exit_code(run(&mut cargo)?))
}

/// Runs a command with our own input and output.
pub(crate) fn run(command: &mut Command) -> Result<ExitStatus> {
    command.status().with_context(|| format!("start {}", command.get_program().to_string_lossy()))
}

/// A death by signal is a failure.
pub(crate) fn exit_code(status: ExitStatus) -> ExitCode {
    status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}
