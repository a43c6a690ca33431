//! `relay completions SHELL`: generated from the definitions of the commands.

use super::{Cli, Context, OK, Outcome};
use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Arguments of `relay completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Prints them.
pub(super) fn run(args: &CompletionsArgs, context: &Context) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "relay", &mut script);
    context.output.bytes(&script).map(|()| OK)
}
