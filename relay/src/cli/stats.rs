//! `relay stats`: counters of interfaces, rules, outputs and frames.

use super::output::{self, lines, number, span, text};
use super::{Context, OK, Outcome, unexpected};
use crate::control::message::{FrameStats, InterfaceStats, Request, Response, RuleStats, Stats, WorkerLatency};
use std::collections::BTreeMap;

/// Asks and prints.
pub(super) fn run(context: &Context) -> Outcome {
    match context.ask(&Request::Stats)? {
        Response::Stats(stats) => context.output.facts(&stats, |_| page(&stats)).map(|()| OK),
        other => Err(unexpected(&other)),
    }
}

fn page(stats: &Stats) -> String {
    [interfaces(&stats.interfaces), rules(&stats.rules), frames(&stats.frames) + &latency(&stats.latency)].join("\n")
}

fn interfaces(interfaces: &[InterfaceStats]) -> String {
    let mut table = output::table(&["INTERFACE", "RX PACKETS", "RX BYTES", "PASSED", "TX PACKETS", "TX BYTES", "DROPS"]);
    for interface in interfaces {
        table.add_row([
            text(&interface.name),
            number(interface.rx_packets),
            number(interface.rx_bytes),
            number(interface.passed),
            number(interface.tx_packets),
            number(interface.tx_bytes),
            text(&reasons(&interface.drops)),
        ]);
    }
    lines(&mut table)
}

/// One line for what a rule took, one for each of its outputs.
fn rules(rules: &[RuleStats]) -> String {
    let mut table = output::table(&["RULE", "OUTPUT", "PACKETS", "BYTES", "DROPS"]);
    for rule in rules {
        let taken = [number(rule.rx_packets), number(rule.rx_bytes), text(&reasons(&rule.drops))];
        table.add_row([text(&rule.id), text("in")].into_iter().chain(taken));
        for output in &rule.outputs {
            let name = format!("{} {} {}", output.index, output.egress, output.to);
            let sent = [number(output.tx_packets), number(output.tx_bytes), text(&reasons(&output.drops))];
            table.add_row([text(" "), text(&name)].into_iter().chain(sent));
        }
    }
    lines(&mut table)
}

/// `no_frame 3, ttl_expired 2`; reasons that never struck are left out.
fn reasons(drops: &BTreeMap<String, u64>) -> String {
    let struck = drops.iter().filter(|(_, count)| **count > 0);
    struck.map(|(reason, count)| format!("{reason} {count}")).collect::<Vec<_>>().join(", ")
}

/// Where the frames are; empty places are left out.
fn frames(frames: &FrameStats) -> String {
    let places = frames.places();
    let taken: Vec<String> = places.iter().filter(|(_, count)| *count > 0).map(|(place, count)| format!("{place} {count}")).collect();
    format!("frames: {} = {}\n", frames.total, if taken.is_empty() { "none".into() } else { taken.join(" + ") })
}

/// A line a worker that has sent something.
fn latency(workers: &[WorkerLatency]) -> String {
    let line = |one: &WorkerLatency| {
        let [p50, p99, p999] = [one.p50_ns, one.p99_ns, one.p999_ns].map(span);
        format!("in worker {}: {} packets, p50 {p50}, p99 {p99}, p99.9 {p999}\n", one.worker, one.packets)
    };
    workers.iter().filter(|one| one.packets > 0).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::message::OutputStats;

    #[test]
    fn counters_as_tables() {
        let drops = BTreeMap::from([("no_frame".to_owned(), 3), ("ttl_expired".to_owned(), 0)]);
        let output = OutputStats { index: 0, egress: "eth1".into(), to: "keep".into(), tx_packets: 7, tx_bytes: 700, drops };
        let stats = Stats {
            interfaces: vec![InterfaceStats { name: "eth0".into(), rx_packets: 10, rx_bytes: 1000, ..InterfaceStats::default() }],
            rules: vec![RuleStats { id: "a".into(), rx_packets: 10, rx_bytes: 1000, drops: BTreeMap::new(), outputs: vec![output] }],
            frames: FrameStats { total: 16_384, free: 16_000, fill: 384, ..FrameStats::default() },
            latency: vec![
                WorkerLatency { packets: 7, p50_ns: 1_920, p99_ns: 40_960, p999_ns: 5_242_880, ..WorkerLatency::default() },
                WorkerLatency { worker: 1, ..WorkerLatency::default() },
            ],
        };
        assert_eq!(
            page(&stats),
            "INTERFACE  RX PACKETS  RX BYTES  PASSED  TX PACKETS  TX BYTES  DROPS\n\
             eth0               10      1000       0           0         0  -\n\
             \n\
             RULE  OUTPUT       PACKETS  BYTES  DROPS\n\
             a     in                10   1000  -\n\
             \u{20}     0 eth1 keep        7    700  no_frame 3\n\
             \n\
             frames: 16384 = free 16000 + fill 384\n\
             in worker 0: 7 packets, p50 1.9 µs, p99 41.0 µs, p99.9 5.2 ms\n"
        );
    }
}
