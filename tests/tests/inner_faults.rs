//! Faults inside the relay: a worker that dies at each start, a status segment that somebody scribbles over, no memory to lock.
//!
//! Each test makes its fault itself, sees that it has happened, and has another stream or an answer that must not suffer from it.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::Signal;
use relay::lab::process::signal_pid;
use relay_tests::paths::{XSK_FUSED, turn};
use relay_tests::process::{is_dead, memory_named};
use relay_tests::stream::Stream;
use relay_tests::{Lab, Listener, RelayProcess, needs_root, relay_bin, send_args, send_in_background, start_relay};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// What no worker carries.
const KERNEL_RULE: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=stream path=kernel";
/// What the worker carries.
const WORKER_RULE: &str = "r0 239.1.1.2:5000 -> r1 239.9.9.8:6000 ttl=keep; id=worked path=xsk";
const RATE: u64 = 5_000;

/// Two seconds of the kernel path's stream, in full, while `fault` happens.
fn costs_the_others_nothing(lab: &Lab, relay: &RelayProcess, fault: impl FnMut()) {
    let stream = Stream { rule: "stream", from: "239.1.1.1:5000", to: "239.9.9.9:6000", rate: RATE, count: RATE * 2, worked: false };
    stream.loses_nothing(lab, relay, fault).unwrap();
}

/// Kills each worker that appears until the supervisor says that it is degraded; how many that took.
fn kill_until_degraded(relay: &RelayProcess) -> usize {
    let mut killed = BTreeSet::new();
    let begin = Instant::now();
    loop {
        let status = relay.status().unwrap();
        let worker = &status["workers"][0];
        if worker["state"] == "degraded" {
            return killed.len();
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "after {} deaths: {status}", killed.len());
        let pid = worker["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0 && !is_dead(*pid));
        if let Some(pid) = pid.filter(|pid| killed.insert(*pid)) {
            signal_pid(pid, Signal::SIGKILL).unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// `relay why` of the rule that has no worker names it, unless the next attempt has come meanwhile.
fn assert_why_says_so(lab: &Lab, relay: &RelayProcess) {
    let mut command = lab.relay.command(relay_bin().unwrap()).unwrap();
    let output = command.args(["why", "worked", "--listen", "100ms", "--socket"]).arg(relay.socket()).output().unwrap();
    let answer = String::from_utf8_lossy(&output.stdout);
    let is_named = answer.contains("worker 0 does not run: degraded (the last one ended: ") && answer.contains("see the daemon's log");
    assert!(is_named || relay.status().unwrap()["workers"][0]["state"] != "degraded", "{answer}");
}

/// A worker that dies before it has forwarded anything is started later and later, then the relay says that it is degraded; the
/// rules that need no worker lose nothing meanwhile, and the first worker that is let alone runs.
#[test]
fn a_crash_loop_is_named_and_costs_other_rules_nothing() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = start_relay(&lab, &["--rule", KERNEL_RULE, "--rule", WORKER_RULE]).unwrap();
    let mut deaths = 0;
    costs_the_others_nothing(&lab, &relay, || {
        deaths = deaths.max(kill_until_degraded(&relay));
        assert_why_says_so(&lab, &relay);
    });
    println!("degraded after {deaths} deaths");
    assert!(deaths >= 5, "given up too early: {deaths}");
    // It is tried again every 10 s.
    relay.wait_status("no worker after the crash loop", Duration::from_secs(30), |status| status["workers"][0]["state"] == "run").unwrap();
    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.8:6000", Some(500)).unwrap();
    send_in_background(&lab, &send_args("s0", "239.1.1.2:5000", 1_000, 500).unwrap()).unwrap().wait().unwrap();
    assert_eq!(listener.wait().unwrap().lost, 0);
}

/// A worker's status segment is hostile to the supervisor: whatever stands in it, the supervisor answers, its other rules lose
/// nothing, and a worker that cannot go on is replaced by one that forwards.
#[test]
fn a_scribbled_status_segment_harms_neither_supervisor_nor_other_rules() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = start_relay(&lab, &["--rule", KERNEL_RULE, "--rule", WORKER_RULE]).unwrap();
    let segments = memory_named(relay.pid(), "status").unwrap();
    assert!(!segments.is_empty(), "no status segment among the supervisor's descriptors");
    costs_the_others_nothing(&lab, &relay, || {
        let mut random = 88_172_645_463_325_252_u64;
        for _ in 0..5 {
            for path in &segments {
                let segment = File::options().write(true).open(path).unwrap();
                let words = (0..segment.metadata().unwrap().len() / 8).flat_map(|_| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    random.to_ne_bytes()
                });
                segment.write_all_at(&words.collect::<Vec<_>>(), 0).unwrap();
            }
            for question in ["status", "stats", "channels"] {
                relay.query(&[question]).unwrap_or_else(|error| panic!("{question}: {error}: {}", relay.log()));
            }
        }
    });
    relay
        .wait_status("no worker after the damage", Duration::from_secs(30), |status| {
            status["workers"][0]["state"] == "run" && status["workers"][0]["pid"] != 0
        })
        .unwrap();
    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.8:6000", Some(500)).unwrap();
    send_in_background(&lab, &send_args("s0", "239.1.1.2:5000", 1_000, 500).unwrap()).unwrap().wait().unwrap();
    assert_eq!(listener.wait().unwrap().lost, 0, "{}", relay.log());
}

/// Without CAP_IPC_LOCK, and with too small a RLIMIT_MEMLOCK, the start says which of them is missing, and leaves nothing.
#[test]
fn no_memory_to_lock_is_said_at_the_start() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let rule = XSK_FUSED.rule(WORKER_RULE);
    let mut command = lab.relay.command("setpriv").unwrap();
    command.args(["--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock", "prlimit", "--memlock=65536:65536"]);
    command.arg(relay_bin().unwrap()).args(["run", "--backend", "xsk", "--rule", &rule]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("setpriv:") || text.contains("prlimit:") {
        return println!("SKIPPED: {}", text.trim());
    }
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("RLIMIT_MEMLOCK"), "{text}");
    start_relay(&lab, &["--rule", WORKER_RULE]).unwrap();
}
