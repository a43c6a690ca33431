//! `relay channels` (issue 3): what it lists is there, its memory is that of the memfds, its counts close.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::arms::{GROUP, REWRITTEN};
use relay_tests::{Lab, Listener, RelayProcess, needs_root, send, send_args, start_relay};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const COUNT: u64 = 5_000;

fn relay(lab: &Lab, args: &[&str]) -> RelayProcess {
    let rule = format!("r0 {GROUP} -> r1 {REWRITTEN} ttl=keep");
    start_relay(lab, &[&["--rule", &rule], args].concat()).unwrap()
}

fn carry(lab: &Lab) {
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(COUNT)).unwrap();
    send(lab, &send_args("s0", &GROUP.to_string(), 20_000, COUNT).unwrap()).unwrap();
    assert_eq!(listener.wait().unwrap().lost, 0);
}

/// The one channel of this kind.
fn one(channels: &Value, kind: &str) -> BTreeMap<String, u64> {
    let rows: Vec<&Value> = channels["channels"].as_array().unwrap().iter().filter(|row| row["kind"] == kind).collect();
    assert_eq!(rows.len(), 1, "{kind}: {channels}");
    rows[0].as_object().unwrap().iter().filter_map(|(key, value)| Some((key.clone(), value.as_u64()?))).collect()
}

/// Once everything that moves has come to rest.
fn at_rest(relay: &RelayProcess) -> Value {
    let begin = Instant::now();
    loop {
        let channels = relay.query(&["channels"]).unwrap();
        if one(&channels, "egress")["depth"] == 0 && one(&channels, "return")["depth"] == 0 {
            return channels;
        }
        assert!(begin.elapsed() < Duration::from_secs(2), "{channels}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Fused and split: packets went through the egress ring, one for one, and their frames came back.
#[test]
fn req_003_8_channels_count_what_moved_through_them() {
    needs_root!();
    for pipeline in ["fused", "split"] {
        let lab = Lab::simple().unwrap();
        let relay = relay(&lab, &["--backend", "xsk", "--pipeline", pipeline]);
        carry(&lab);
        let channels = at_rest(&relay);
        let egress = one(&channels, "egress");
        assert_eq!((egress["sent"], egress["received"], egress["dropped"], egress["overruns"]), (COUNT, COUNT, 0, 0), "{pipeline}");
        assert!(egress["high_water"] <= egress["capacity"], "{pipeline}: {channels}");
        let back = one(&channels, "return");
        assert_eq!(back["sent"], back["received"], "{pipeline}: {channels}");
        let rules = one(&channels, "rules");
        assert!(rules["sent"] >= 1 && rules["depth"] == 0, "{pipeline}: {channels}");
        let text = relay.command(&["channels"]).unwrap();
        assert!(text.contains("egress r1") && text.contains("OVERRUNS") && text.contains("relay-umem"), "{text}");
    }
}

/// Two-way is two channels: orders down, reports up, both listed; the reports go on without any packet.
#[test]
fn req_000_3_control_and_status_are_two_channels() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let relay = relay(&lab, &["--backend", "xsk"]);
    let first = relay.query(&["channels"]).unwrap();
    assert_eq!(one(&first, "control")["dropped"], 0);
    std::thread::sleep(Duration::from_millis(400));
    let (before, after) = (one(&first, "status"), one(&relay.query(&["channels"]).unwrap(), "status"));
    assert!(after["sent"] >= before["sent"] + 3, "a report a beat: {before:?} {after:?}");
    assert!(after["received"] > before["received"] && after["overruns"] == 0, "{after:?}");
}

/// The kernel's own account of a worker's mappings: `Size` of each memfd of ours in /proc/PID/smaps, in bytes.
fn mapped(pid: u32) -> BTreeMap<String, u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut sizes = BTreeMap::new();
    let mut name = None;
    for line in smaps.lines() {
        if let Some((_, rest)) = line.split_once("/memfd:relay-") {
            name = rest.split(' ').next().map(|rest| format!("relay-{rest}"));
        } else if let (Some(size), Some(name)) = (line.strip_prefix("Size:"), name.take()) {
            *sizes.entry(name).or_default() += size.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024;
        }
    }
    sizes
}

#[test]
fn req_000_11_the_memory_listed_is_what_the_kernel_says() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let relay = relay(&lab, &["--backend", "xsk"]);
    let channels = relay.query(&["channels"]).unwrap();
    let rows = channels["segments"].as_array().unwrap().iter();
    let listed: BTreeMap<String, u64> =
        rows.map(|row| (row["name"].as_str().unwrap().to_owned(), row["memory_bytes"].as_u64().unwrap())).collect();
    assert_eq!(listed, mapped(relay.worker_pids().unwrap()[0]), "every memfd that the worker maps, and nothing else");
    assert_eq!(listed.len(), 6);
}
