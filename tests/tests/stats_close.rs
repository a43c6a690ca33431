//! `relay stats` closes: for every rule and interface, what came in went out or into a drop with a name, as the receiver saw it.
//!
//! The identities are those that `control/message.rs` documents. Packets that no socket would send are injected whole.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::socket::{MsgFlags, send as send_bytes};
use relay::lab::packet::{Flow, group_mac};
use relay::nic::afpacket::socket::open_send;
use relay_tests::paths::{Listen, Moved, Path, Run, await_moved, moved};
use relay_tests::{
    Lab, LabSpec, RelayProcess, assert_frames_conserved, assert_rules_conserved, interface_stats, on_every_path, send, send_args,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

on_every_path!(
    expired_ttl_is_one_outputs_drop,
    hostile_packets_are_dropped_by_name,
    other_traffic_is_nobodys_packet,
    malformed_packets_reach_no_rule,
    an_interface_that_is_down_takes_only_its_own_output,
    too_large_packets_and_unknown_neighbours_are_counted,
    deleted_rules_stay_in_the_sum,
);

const COUNT: u64 = 500;
const GROUP: &str = "239.1.1.1:5000";

fn two_sinks() -> Lab {
    Lab::new(LabSpec { sinks: 2, separate_sinks: true, ..LabSpec::default() }).unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn sum(counters: &Value) -> u64 {
    counters.as_object().into_iter().flatten().map(|(_, count)| number(count)).sum()
}

fn interface<'a>(stats: &'a Value, name: &str) -> &'a Value {
    interface_stats(stats, name).unwrap()
}

/// `interface.rx_packets == Σ rules' rx_packets + retired + Σ drops`, all rules being of `r0`; each egress is the sum of its outputs.
fn assert_interfaces_close(stats: &Value) {
    let rules = stats["rules"].as_array().unwrap();
    let taken: u64 = rules.iter().map(|rule| number(&rule["rx_packets"])).sum();
    let ingress = interface(stats, "r0");
    assert_eq!(number(&ingress["rx_packets"]), taken + number(&ingress["retired"]) + sum(&ingress["drops"]), "{stats}");
    if number(&ingress["retired"]) + sum(&ingress["drops"]) == 0 {
        let bytes: u64 = rules.iter().map(|rule| number(&rule["rx_bytes"])).sum();
        assert_eq!(number(&ingress["rx_bytes"]), bytes, "{stats}");
    }
}

/// All identities, once what is under way has arrived.
fn assert_closes(stats: &Value) {
    assert_rules_conserved(stats);
    assert_interfaces_close(stats);
    assert_frames_conserved(stats);
}

/// Waits for what rule `a` must have counted; everything closes then. The counters.
fn closes(relay: &RelayProcess, before: &Value, expected: &Moved) -> Value {
    let after = await_moved(relay, before, "a", expected).unwrap();
    assert_closes(&after);
    assert!(relay.worker_pids().unwrap().is_empty() || number(&after["frames"]["total"]) > 0, "{after}");
    after
}

/// Whole datagrams to every listener, and `a` has relayed them to all its outputs.
fn carries(lab: &Lab, relay: &RelayProcess, listens: &[Listen<'_>]) {
    let run = Run::of(lab, relay, &[send_args("s0", GROUP, 10_000, COUNT).unwrap()], listens).unwrap();
    run.assert_whole(listens);
    closes(relay, &run.before, &Moved::all(COUNT, listens.len()));
}

fn named(reason: &str) -> BTreeMap<String, u64> {
    BTreeMap::from([(reason.to_owned(), COUNT)])
}

fn expired_ttl_is_one_outputs_drop(path: &Path) {
    let lab = two_sinks();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 :6001 ttl=dec, r2 :6002 ttl=9; id=a"]).unwrap();
    let mut args = send_args("s0", GROUP, 10_000, COUNT).unwrap();
    args.ttl = 1;
    let listens = [(1, "239.1.1.1:6001", 0), (2, "239.1.1.1:6002", COUNT)];
    let run = Run::of(&lab, &relay, &[args], &listens).unwrap();
    run.assert_whole(&listens);
    let expected = Moved { tx: vec![0, COUNT], output_drops: vec![named("ttl_expired"), BTreeMap::new()], ..Moved::all(COUNT, 2) };
    closes(&relay, &run.before, &expected);
}

/// A whole packet to the rule's group, as a sender with this source would make it.
fn packet(source: &str) -> Vec<u8> {
    let destination = GROUP.parse::<std::net::SocketAddr>().unwrap();
    let destination_mac = group_mac(destination.ip()).unwrap();
    let source = format!("{source}:7000").parse().unwrap();
    Flow { source_mac: [2, 0, 0, 0, 0, 1], destination_mac, source, destination, ttl: 16, dscp: 0 }.frame(&[0x5a; 64])
}

/// Puts `COUNT` copies of a frame on the wire at a gentle rate.
fn inject(lab: &Lab, frame: &[u8]) {
    lab.src
        .run(|| {
            let socket = open_send(relay::lab::socket::ifindex("s0").unwrap()).unwrap();
            for number in 0..COUNT {
                assert_eq!(send_bytes(socket.as_raw_fd(), frame, MsgFlags::empty()).unwrap(), frame.len());
                if number % 32 == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        })
        .unwrap();
}

fn with(mut frame: Vec<u8>, at: usize, flip: u8) -> Vec<u8> {
    frame[at] ^= flip;
    frame
}

/// Offset of the UDP header in an untagged packet without options.
const UDP: usize = 34;

fn hostile_packets_are_dropped_by_name(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000, r1 239.9.9.8:6000; id=a"]).unwrap();
    let hostile = [
        ("multicast_source", packet("239.7.7.7")),
        ("multicast_source", packet("255.255.255.255")),
        ("own_source", packet("10.0.0.2")),
        ("bad_udp_checksum", with(packet("10.0.0.1"), UDP + 6, 0x40)),
        ("bad_udp_checksum", with(packet("10.0.0.1"), UDP + 8 + 63, 1)),
        ("bad_ip_checksum", with(packet("10.0.0.1"), 24, 0x40)),
    ];
    let listener = relay_tests::Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", None).unwrap();
    for (reason, frame) in hostile {
        let before = relay.stats().unwrap();
        inject(&lab, &frame);
        closes(&relay, &before, &Moved::dropped(COUNT, reason, 2));
    }
    // What was injected is what a sender sends: untouched, it passes. And a checksum of zero is none (RFC 768).
    let mut without_checksum = packet("10.0.0.1");
    without_checksum[UDP + 6..UDP + 8].fill(0);
    for frame in [packet("10.0.0.1"), without_checksum] {
        let before = relay.stats().unwrap();
        inject(&lab, &frame);
        closes(&relay, &before, &Moved::all(COUNT, 2));
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(listener.finish().unwrap().received, 2 * COUNT);
}

/// Groups without a rule are the kernel's: an ordinary socket on the relay's host gets them, and no counter of a rule moves.
fn other_traffic_is_nobodys_packet(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]).unwrap();
    let before = relay.stats().unwrap();
    for to in ["239.1.1.1:5001", "239.3.3.3:5000", "10.0.0.2:5000"] {
        let host = relay_tests::Listener::on(&lab.relay, "r0", to, Some(COUNT)).unwrap();
        send(&lab, &send_args("s0", to, 10_000, COUNT).unwrap()).unwrap();
        assert_eq!(host.wait().unwrap().received, COUNT, "{to}: the host's own traffic");
    }
    let after = closes(&relay, &before, &Moved::all(0, 1));
    assert_eq!(interface(&after, "r0")["rx_packets"], interface(&before, "r0")["rx_packets"], "{after}");
    if path.path != "packet" {
        let passed = number(&interface(&after, "r0")["passed"]) - number(&interface(&before, "r0")["passed"]);
        assert!(passed >= 3 * COUNT, "{after}");
        assert_eq!(sum(&interface(&after, "r0")["passed_by"]), number(&interface(&after, "r0")["passed"]), "{after}");
    }
    carries(&lab, &relay, &[(1, "239.9.9.9:6000", COUNT)]);
}

/// Lengths that contradict each other: XDP passes such a packet by name, the packet path drops it at the interface by name.
fn malformed_packets_reach_no_rule(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]).unwrap();
    let long_udp = with(packet("10.0.0.1"), UDP + 4, 0x10);
    let cut = packet("10.0.0.1")[..UDP + 4].to_vec();
    for frame in [long_udp, cut] {
        let before = relay.stats().unwrap();
        inject(&lab, &frame);
        await_growth(&relay, &before, |stats| match path.path {
            "xsk" | "kernel" => number(&interface(stats, "r0")["passed"]) + sum(&interface(stats, "r0")["drops"]),
            _ => sum(&interface(stats, "r0")["drops"]),
        });
        let after = relay.stats().unwrap();
        assert_eq!(moved(&before, &after, "a").unwrap(), Moved::all(0, 1));
        assert_closes(&after);
    }
    carries(&lab, &relay, &[(1, "239.9.9.9:6000", COUNT)]);
}

/// Waits until something has grown by `COUNT`.
fn await_growth(relay: &RelayProcess, before: &Value, what: impl Fn(&Value) -> u64) {
    let begin = Instant::now();
    loop {
        let stats = relay.stats().unwrap();
        if what(&stats) >= what(before) + COUNT {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(2), "{stats}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn an_interface_that_is_down_takes_only_its_own_output(path: &Path) {
    let lab = two_sinks();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000, r2 239.9.9.9:6000; id=a"]).unwrap();
    let both = [(1, "239.9.9.9:6000", COUNT), (2, "239.9.9.9:6000", COUNT)];
    carries(&lab, &relay, &both);
    lab.relay.ip_batch("link set r2 down\n").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let args = [send_args("s0", GROUP, 10_000, COUNT).unwrap()];
    let run = Run::of(&lab, &relay, &args, &both[..1]).unwrap();
    run.assert_whole(&both[..1]);
    let expected = Moved { tx: vec![COUNT, 0], output_drops: vec![BTreeMap::new(), named("output_down")], ..Moved::all(COUNT, 2) };
    closes(&relay, &run.before, &expected);
    lab.relay.ip_batch("link set r2 up\n").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    carries(&lab, &relay, &both);
}

fn too_large_packets_and_unknown_neighbours_are_counted(path: &Path) {
    let lab = two_sinks();
    lab.relay.ip_batch("link set r2 mtu 600\n").unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 10.0.1.99:6000, r2 239.9.9.9:6000, r1 239.9.9.9:6000; id=a"]).unwrap();
    let mut args = send_args("s0", GROUP, 10_000, COUNT).unwrap();
    args.size = 600;
    let listens = [(1, "239.9.9.9:6000", COUNT)];
    let run = Run::of(&lab, &relay, &[args], &listens).unwrap();
    run.assert_whole(&listens);
    let output_drops = vec![named("no_neighbor"), named("mtu_exceeded"), BTreeMap::new()];
    closes(&relay, &run.before, &Moved { tx: vec![0, 0, COUNT], output_drops, ..Moved::all(COUNT, 3) });
}

fn deleted_rules_stay_in_the_sum(path: &Path) {
    let lab = Lab::simple().unwrap();
    let rules = ["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a", "r0 239.1.1.2:5000 -> r1 239.9.9.8:6000; id=b"];
    let relay = path.start(&lab, &rules).unwrap();
    let listens = [(1, "239.9.9.9:6000", COUNT), (1, "239.9.9.8:6000", COUNT)];
    let args = ["239.1.1.1:5000", "239.1.1.2:5000"].map(|to| send_args("s0", to, 10_000, COUNT).unwrap());
    let run = Run::of(&lab, &relay, &args, &listens).unwrap();
    run.assert_whole(&listens);
    await_moved(&relay, &run.before, "b", &Moved::all(COUNT, 1)).unwrap();
    let before = relay.stats().unwrap();
    relay.command(&["rule", "del", "b"]).unwrap();
    let after = closes(&relay, &before, &Moved::all(0, 1));
    for (interface_name, key) in [("r0", "rx_packets"), ("r1", "tx_packets"), ("r1", "tx_bytes")] {
        assert_eq!(interface(&after, interface_name)[key], interface(&before, interface_name)[key], "{interface_name} {key}: {after}");
    }
    assert_eq!(number(&interface(&after, "r0")["retired"]), number(&run.reports[1].received.into()), "{after}");
    // The same name again counts from zero, in whatever slot it gets.
    relay.command(&["rule", "add", "r0 239.1.1.2:5000 -> r1 239.9.9.8:6000; id=b"]).unwrap();
    assert_eq!(number(&relay_tests::rule_stats(&relay.stats().unwrap(), "b").unwrap()["rx_packets"]), 0);
    assert_closes(&relay.stats().unwrap());
}
