//! `relay send`: the paced generator of the lab, or a capture again.

use super::{Context, OK, Outcome};
use crate::lab::{replay, send};
use clap::Args;

/// Arguments of `relay send`.
#[derive(Debug, Args)]
pub(super) struct SendArgs {
    #[command(flatten)]
    send: send::Args,
    #[command(flatten)]
    replay: replay::Args,
}

/// Sends and prints what was sent.
pub(super) fn run(args: &SendArgs, context: &Context) -> Outcome {
    if let Some(file) = &args.replay.replay {
        let report = replay::replay(&args.send, &args.replay, file)?;
        return context.output.facts(&report, |_| replay::describe(&report)).map(|()| OK);
    }
    let report = send::send(&args.send)?;
    context.output.facts(&report, |_| send::describe(&report)).map(|()| OK)
}
