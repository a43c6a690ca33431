//! The other process of `relay bench ipc`: `relay bench-peer`, hidden, started by the bench alone.
//!
//! Receives the messages of a round, says so on stdout, then echoes. Must never outlive its parent: every wait is bounded.

use super::BadInput;
use super::measure::{echo_all, preemptions};
use super::processes::{Kind, Side};
use crate::worker::team::pin;
use anyhow::{Context, Result, bail};
use std::io::Write;

/// Environment variable with the inherited descriptors, `N,N,…`.
pub const DESCRIPTORS: &str = "RELAY_BENCH_FDS";

/// Arguments of the hidden `relay bench-peer`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What carries the messages
    #[arg(long, value_enum)]
    pub kind: Kind,
    /// Bytes of a message
    #[arg(long)]
    pub size: usize,
    /// Messages taken at once
    #[arg(long)]
    pub batch: u32,
    /// Messages to receive
    #[arg(long)]
    pub iters: u64,
    /// Messages to echo after that
    #[arg(long)]
    pub samples: u64,
    /// CPU to run on
    #[arg(long)]
    pub cpu: usize,
    /// The other side runs on the same CPU
    #[arg(long)]
    pub same_core: bool,
}

/// Plays the receiving side.
pub fn run(args: &Args) -> Result<()> {
    pin(args.cpu)?;
    let side = match args.size {
        8 => Side::inherited::<[u64; 1]>(args.kind),
        16 => Side::inherited::<[u64; 2]>(args.kind),
        64 => Side::inherited::<[u64; 8]>(args.kind),
        other => bail!(BadInput(format!("--size {other}: use 8, 16 or 64"))),
    };
    let mut side = side.with_context(|| format!("{DESCRIPTORS}: not the descriptors of the bench"))?;
    say("ready")?;
    let before = preemptions();
    side.receive.receive_all(args.iters, args.batch, args.same_core)?;
    say(&format!("done {}", preemptions() - before))?;
    echo_all(&mut *side.receive, &mut *side.send, args.samples, args.same_core)
}

fn say(word: &str) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{word}").and_then(|()| out.flush()).context("stdout")
}
