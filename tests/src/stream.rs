//! A stream beside a fault: it has to arrive whole while something else goes wrong.
//!
//! Void runs are repeated, as in `paths`. Must never forgive the relay a packet.

use crate::paths::{Outside, Waits, only_lost};
use crate::{Listener, send_args, send_in_background};
use anyhow::{Result, bail, ensure};
use relay::lab::recv::{Verdict, describe};
use relay::lab::{Lab, RelayProcess};
use std::time::Duration;

/// Void runs in a row that end a test.
const ATTEMPTS: u32 = 5;
/// The stream runs for so long before the fault begins.
const HEAD_START: Duration = Duration::from_millis(200);

/// Datagrams from `s0` that one rule sends to `k1`.
#[derive(Clone, Copy, Debug)]
pub struct Stream<'a> {
    /// Id of the rule.
    pub rule: &'a str,
    /// Where they are sent to.
    pub from: &'a str,
    /// Where they come out.
    pub to: &'a str,
    /// A second.
    pub rate: u64,
    /// In all.
    pub count: u64,
    /// A worker carries them: what is lost while it has no CPU says nothing.
    pub worked: bool,
}

impl Stream<'_> {
    /// Every packet arrives once, in order, whole, while `fault` happens.
    pub fn loses_nothing(&self, lab: &Lab, relay: &RelayProcess, mut fault: impl FnMut()) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let outside = Outside::of(lab, relay, self.rule)?;
            let waits = if self.worked { Some(Waits::of(relay)?) } else { None };
            let listener = Listener::on(lab.sink(1), "k1", self.to, Some(self.count))?;
            let sending = send_in_background(lab, &send_args("s0", self.from, self.rate, self.count)?)?;
            std::thread::sleep(HEAD_START);
            fault();
            let sent = sending.wait()?.sent;
            ensure!(sent == self.count, "the sender sent {sent} of {}", self.count);
            let report = listener.wait()?;
            let got = (report.received, report.lost, report.duplicated, report.reordered, report.corrupted, report.foreign);
            println!("received, lost, duplicated, reordered, corrupted, foreign: {got:?}");
            if got == (self.count, 0, 0, 0, 0, 0) {
                return Ok(());
            }
            let starved = waits.map(|waits| waits.starved(relay)).transpose()?.flatten();
            let outside = outside.lost(relay)?;
            let void = report.verdict == Verdict::Void || starved.is_some() || only_lost(&report, outside);
            ensure!(void, "{got:?}: {}; {}; {}", describe(&report), relay.stats()?, relay.log());
            eprintln!(
                "void, once more: the receiver dropped by itself, the relay had no CPU (share {starved:?}), or others lost {outside}"
            );
        }
        bail!("{ATTEMPTS} runs in a row were void: the machine is too busy to judge the relay")
    }
}
