//! One packet in, several out: every receiver gets its own stream intact, with the headers its output was told to write.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::recv::Report;
use relay::lab::send;
use relay_tests::paths::{Listen, Moved, Path, Run, await_moved};
use relay_tests::{Lab, LabSpec, RelayProcess, assert_frames_conserved, assert_rules_conserved, on_every_path, rule_stats, send_args};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

on_every_path!(
    four_outputs_on_two_interfaces,
    two_outputs_over_ipv6,
    sources_ports_and_dscp_are_as_told,
    multicast_becomes_unicast,
    unicast_becomes_multicast,
);

fn two_sinks() -> Lab {
    Lab::new(LabSpec { sinks: 2, separate_sinks: true, ..LabSpec::default() }).unwrap()
}

/// Rule `a` in, every listener its own; the receivers' reports.
fn carry(lab: &Lab, relay: &RelayProcess, args: send::Args, listens: &[Listen<'_>]) -> Vec<Report> {
    let count = args.count.unwrap();
    let run = Run::of(lab, relay, &[args], listens).unwrap();
    run.assert_whole(listens);
    let after = await_moved(relay, &run.before, "a", &Moved::all(count, listens.len())).unwrap();
    assert_rules_conserved(&after);
    assert_frames_conserved(&after);
    run.reports
}

fn only<T: Ord + Clone>(set: &BTreeSet<T>) -> T {
    assert_eq!(set.len(), 1);
    set.first().unwrap().clone()
}

fn four_outputs_on_two_interfaces(path: &Path) {
    let lab = two_sinks();
    let outputs = "r1 239.9.9.1:6001 ttl=keep, r1 239.9.9.2:6002, r2 239.9.9.3:6003 ttl=7, r2 239.9.9.1:6004 ttl=dec";
    let relay = path.start(&lab, &[&format!("r0 239.1.1.1:5000 -> {outputs}; id=a")]).unwrap();
    let count = 10_000;
    let listens = [(1, "239.9.9.1:6001", count), (1, "239.9.9.2:6002", count), (2, "239.9.9.3:6003", count), (2, "239.9.9.1:6004", count)];
    let reports = carry(&lab, &relay, send_args("s0", "239.1.1.1:5000", 20_000, count).unwrap(), &listens);
    assert_eq!(reports.iter().map(|report| only(&report.ttls)).collect::<Vec<_>>(), [16, 15, 7, 15]);
}

fn two_outputs_over_ipv6(path: &Path) {
    let lab = two_sinks();
    let rule = "r0 [ff3e::1234]:5000 -> r1 [ff3e::1]:6001 ttl=keep dscp=46, r2 [ff3e::2]:6002; id=a";
    let relay = path.start(&lab, &[rule]).unwrap();
    let listens = [(1, "[ff3e::1]:6001", 5_000), (2, "[ff3e::2]:6002", 5_000)];
    let mut args = send_args("s0", "[ff3e::1234]:5000", 20_000, 5_000).unwrap();
    args.dscp = 10;
    let reports = carry(&lab, &relay, args, &listens);
    assert_eq!(reports.iter().map(|report| only(&report.ttls)).collect::<Vec<_>>(), [16, 15]);
    assert_eq!(reports.iter().map(|report| only(&report.dscps)).collect::<Vec<_>>(), [46, 10]);
}

fn sources_ports_and_dscp_are_as_told(path: &Path) {
    let lab = two_sinks();
    let outputs =
        "r1 :6001 src=egress dscp=46, r1 239.9.9.2:6002 src=10.9.8.7 sport=4444, r2 239.9.9.3:6003 dscp=keep, r2 :6004 sport=1 src=egress";
    let relay = path.start(&lab, &[&format!("r0 239.1.1.1:5000 -> {outputs}; id=a")]).unwrap();
    let count = 2_000;
    let listens = [(1, "239.1.1.1:6001", count), (1, "239.9.9.2:6002", count), (2, "239.9.9.3:6003", count), (2, "239.1.1.1:6004", count)];
    let mut args = send_args("s0", "239.1.1.1:5000", 10_000, count).unwrap();
    (args.source, args.dscp) = (Some("10.0.0.1:7100".parse().unwrap()), 10);
    let reports = carry(&lab, &relay, args, &listens);
    let sources: Vec<String> = reports.iter().map(|report| only(&report.sources)).collect();
    assert_eq!(sources, ["10.0.1.1:7100", "10.9.8.7:4444", "10.0.0.1:7100", "10.0.2.1:1"]);
    assert_eq!(reports.iter().map(|report| only(&report.dscps)).collect::<Vec<_>>(), [46, 10, 10, 10]);
}

/// The supervisor resolves the next hop by itself; until then packets are counted under `no_neighbor`.
fn multicast_becomes_unicast(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 10.0.1.2:6000; id=a"]).unwrap();
    await_neighbor(&lab, &relay);
    let listens = [(1, "10.0.1.2:6000", 3_000)];
    let reports = carry(&lab, &relay, send_args("s0", "239.1.1.1:5000", 10_000, 3_000).unwrap(), &listens);
    assert_eq!(only(&reports[0].ttls), 15);
}

/// Sends one packet at a time until one comes through. No traffic but the relay's own asks for the neighbour.
fn await_neighbor(lab: &Lab, relay: &RelayProcess) {
    let begin = Instant::now();
    loop {
        relay_tests::send(lab, &send_args("s0", "239.1.1.1:5000", 1_000, 1).unwrap()).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let stats = relay.stats().unwrap();
        assert_rules_conserved(&stats);
        if rule_stats(&stats, "a").unwrap()["outputs"][0]["tx_packets"].as_u64() > Some(0) {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(5), "the neighbour is not resolved: {stats}; {}", relay.log());
    }
}

fn unicast_becomes_multicast(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 10.0.0.2:7000 -> r1 239.1.2.3:7000; id=a"]).unwrap();
    let reports = carry(&lab, &relay, send_args("s0", "10.0.0.2:7000", 10_000, 3_000).unwrap(), &[(1, "239.1.2.3:7000", 3_000)]);
    assert_eq!(only(&reports[0].ttls), 15);
}
