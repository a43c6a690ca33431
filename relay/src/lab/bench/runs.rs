//! One run of one row: start the arm, load it, count what arrives. Flat out in rounds, or at a pace.
//!
//! Must never judge: what a run is worth stands in `report`.

use super::Load;
use crate::lab::arms::{Arm, GROUP, Running, rewritten};
use crate::lab::error::Result;
use crate::lab::generator::{Generator, Sink, Window};
use crate::lab::progress::Steps;
use crate::lab::topology::Lab;
use relay_common::lab::{VARY_GROUP, VARY_SOURCE_PORT};
use std::net::SocketAddr;
use std::time::Duration;

/// After the last packet of a paced run: what is still in rings and queues arrives.
const SETTLE: Duration = Duration::from_millis(300);

/// Who takes what the arm sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Receiver {
    /// A counter at the link, the cheapest end there is.
    #[default]
    Link,
    /// UDP sockets, one for each output.
    Udp,
    /// The same with UDP_GRO.
    #[value(name = "udp_gro")]
    UdpGro,
}

impl Receiver {
    /// In JSON and messages; nothing for the link.
    pub(super) const fn name(self) -> Option<&'static str> {
        match self {
            Self::Link => None,
            Self::Udp => Some("udp"),
            Self::UdpGro => Some("udp_gro"),
        }
    }
}

/// What a row is: an arm under one kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Case {
    /// Path or baseline.
    pub(super) arm: Arm,
    /// Outputs of the rule.
    pub(super) fanout: u16,
    /// Bytes of payload.
    pub(super) payload: u16,
    /// Flows by turns, all of them the one rule's.
    pub(super) flows: u16,
    /// Rules, and packets for all of them by turns.
    pub(super) rules: u16,
    /// Who takes it.
    pub(super) receiver: Receiver,
}

impl Case {
    /// In messages.
    pub(super) fn name(&self) -> String {
        let of = |count: u16, what: &str| if count > 1 { format!(", {count} {what}") } else { String::new() };
        let (flows, rules) = (of(self.flows, "flows"), of(self.rules, "rules"));
        let to = self.receiver.name().map(|name| format!(", to {name}")).unwrap_or_default();
        format!("{} 1:{}, {} bytes{flows}{rules}{to}", self.arm.name(), self.fanout, self.payload)
    }

    fn load(&self, generator: &mut Generator) -> Result<()> {
        let (flows, vary) = if self.rules > 1 { (self.rules, VARY_GROUP) } else { (self.flows, VARY_SOURCE_PORT) };
        generator.set_flows(usize::from(self.payload), flows.into(), vary)
    }
}

/// One run of one row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Of which row.
    pub(super) case: Case,
    /// What passed.
    pub(super) window: Window,
    /// Involuntary switches of what carries the packets.
    pub(super) preemptions: u64,
}

/// A B C, A B C: a change of the machine's state hits all rows alike. A row that fails once is not tried again.
pub(super) fn flat_out(lab: &Lab, generator: &mut Generator, cases: &[Case], load: &Load, errors: &mut Vec<String>) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut broken = Vec::new();
    let mut steps = Steps::new(Some(load.rounds as usize * cases.len()));
    for round in 1..=load.rounds {
        for case in cases {
            steps.next(&format!("{}, round {round}", case.name()));
            if broken.contains(case) {
                continue;
            }
            match flat_out_once(lab, generator, case, load) {
                Ok(run) => runs.push(run),
                Err(error) => {
                    broken.push(*case);
                    errors.push(format!("row {}: {error}", case.name()));
                }
            }
        }
    }
    runs
}

fn flat_out_once(lab: &Lab, generator: &mut Generator, case: &Case, load: &Load) -> Result<Run> {
    prepare(generator, case)?;
    let sink = sink(lab, case)?;
    let running = start(lab, case, load)?;
    let before = running.preemptions().unwrap_or(0);
    let window = generator.window(lab, load.place.generator_cpu, &sink, load.duration)?;
    Ok(Run { case: *case, window, preemptions: running.preemptions().unwrap_or(before) - before })
}

/// One paced run a row: every packet is counted in and out.
pub(super) fn paced(lab: &Lab, generator: &mut Generator, cases: &[Case], load: &Load, rate: u64, errors: &mut Vec<String>) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut steps = Steps::new(Some(cases.len()));
    for case in cases {
        steps.next(&format!("{}, {rate} packets a second for {:?}", case.name(), load.duration));
        match paced_once(lab, generator, case, load, rate) {
            Ok(run) => runs.push(run),
            Err(error) => errors.push(format!("row {}: {error}", case.name())),
        }
    }
    runs
}

fn paced_once(lab: &Lab, generator: &mut Generator, case: &Case, load: &Load, rate: u64) -> Result<Run> {
    prepare(generator, case)?;
    let sink = sink(lab, case)?;
    let running = start(lab, case, load)?;
    let (switches, before) = (running.preemptions().unwrap_or(0), sink.count()?);
    let drops = sink.drops(lab)?;
    let sent = generator.paced(lab, load.place.generator_cpu, rate, load.duration)?;
    std::thread::sleep(SETTLE);
    let window = Window {
        offered: sent,
        delivered: sink.count()? - before,
        seconds: load.duration.as_secs_f64(),
        sink_drops: sink.drops(lab)? - drops,
        covered: true,
    };
    Ok(Run { case: *case, window, preemptions: running.preemptions().unwrap_or(switches) - switches })
}

/// At the link the cheapest end for what the arm sends, so that the arm is what is measured.
fn sink<'a>(lab: &'a Lab, case: &Case) -> Result<Sink<'a>> {
    let payload = usize::from(case.payload);
    if case.receiver != Receiver::Link {
        let groups: Vec<SocketAddr> = (0..case.fanout).map(|n| if case.arm.rewrites() { rewritten(n) } else { GROUP }).collect();
        return Sink::at_sockets(lab, 1, &groups, case.receiver == Receiver::UdpGro, payload);
    }
    if case.arm.sends_frames() { Sink::at_link(lab, 1) } else { Sink::of_stack(lab, 1, payload) }
}

/// What is sent, and how.
fn prepare(generator: &mut Generator, case: &Case) -> Result<()> {
    generator.set_fanout(if case.arm.sends_frames() { case.fanout } else { 1 });
    case.load(generator)
}

fn start(lab: &Lab, case: &Case, load: &Load) -> Result<Running> {
    let program = super::program(load.place.program.as_ref())?;
    let extra = ["--pipeline", "fused", "--wait", load.place.wait()];
    Running::start_many(lab, case.arm, (case.fanout, case.rules), &program, Some(load.place.cpus), &extra)
}
