//! What a relay leaves behind: nothing, however it ends, and the next start just works (issue 2).
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::Signal;
use relay::lab::arms::{GROUP, REWRITTEN};
use relay::lab::process::signal_pid;
use relay::lab::recv::Verdict;
use relay_tests::process::{bpf_objects, is_dead, shared_memory, wait_dead, wait_unloaded};
use relay_tests::{Lab, Listener, RelayProcess, needs_root, send, send_args, send_in_background, start_relay};
use std::time::{Duration, Instant};

fn rule() -> String {
    format!("r0 {GROUP} -> r1 {REWRITTEN} ttl=keep")
}

fn relay(lab: &Lab) -> RelayProcess {
    start_relay(lab, &["--rule", &rule(), "--backend", "xsk"]).unwrap()
}

/// The relay carries a short stream whole.
fn assert_forwards(lab: &Lab) {
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(2_000)).unwrap();
    send(lab, &send_args("s0", &GROUP.to_string(), 20_000, 2_000).unwrap()).unwrap();
    let report = listener.wait().unwrap();
    assert_eq!((report.lost, report.duplicated, report.verdict), (0, 0, Verdict::Pass), "{report:?}");
}

/// The kernel frees programs and maps a little after the last descriptor.
fn assert_unloaded(objects: &std::collections::BTreeSet<(String, u64)>) {
    assert!(!objects.is_empty(), "the relay held no BPF object: nothing is tested");
    if !wait_unloaded(objects).unwrap() {
        println!("SKIPPED: bpftool is missing, so nobody says what is loaded");
    }
}

fn assert_no_program_attached(lab: &Lab) {
    for interface in ["r0", "r1"] {
        let text = lab.relay.output("ip", &["-d", "link", "show", interface]).unwrap();
        assert!(!text.contains("xdp"), "{text}");
    }
}

#[test]
fn sigterm_under_load_ends_within_a_second_and_leaves_nothing() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let shared = shared_memory();
    let mut relay = relay(&lab);
    let _sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), 100_000, 300_000).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let (objects, workers, socket) = (bpf_objects(relay.pid()), relay.worker_pids().unwrap(), relay.socket());
    assert!(!workers.is_empty());
    let begin = Instant::now();
    let status = relay.sigterm(Duration::from_secs(5)).unwrap();
    let took = begin.elapsed();
    println!("SIGTERM under 100 kpps: ended after {took:?}");
    assert_eq!(status.code(), Some(0), "{}", relay.log());
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(workers.iter().all(|pid| is_dead(*pid)), "a worker is left");
    assert!(!socket.exists(), "the control socket is left");
    assert_eq!(shared_memory(), shared);
    assert_no_program_attached(&lab);
    assert_unloaded(&objects);
}

/// At the same socket, whose file is left, on the same interfaces.
#[test]
fn after_kill_of_everything_the_next_start_works() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let mut relay = relay(&lab);
    let sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), 50_000, 50_000).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let (objects, workers) = (bpf_objects(relay.pid()), relay.worker_pids().unwrap());
    signal_pid(relay.pid(), Signal::SIGKILL).unwrap();
    workers.iter().for_each(|pid| drop(signal_pid(*pid, Signal::SIGKILL)));
    relay.wait_exit(Duration::from_secs(5)).unwrap();
    assert!(wait_dead(&workers, Duration::from_secs(1)).is_some());
    assert!(relay.socket().exists(), "nobody was there to remove it");
    relay.start_again(&lab.relay, &["--rule", &rule(), "--backend", "xsk"]).unwrap();
    relay.wait_ready().unwrap();
    drop(sending);
    std::thread::sleep(Duration::from_millis(50));
    assert_forwards(&lab);
    assert_unloaded(&objects);
}

#[test]
fn workers_follow_their_supervisor_at_once() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let mut first = relay(&lab);
    let sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), 50_000, 25_000).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let workers = first.worker_pids().unwrap();
    signal_pid(first.pid(), Signal::SIGKILL).unwrap();
    let took = wait_dead(&workers, Duration::from_secs(5)).expect("workers live on without a supervisor");
    println!("supervisor killed: workers gone after {took:?}");
    // 50 ms is the promise; the rest is for a machine that does other things as well.
    assert!(took < Duration::from_millis(if std::env::var_os("RELAY_TEST_LONG").is_some() { 50 } else { 250 }), "{took:?}");
    first.wait_exit(Duration::from_secs(5)).unwrap();
    drop(sending);
    let _second = relay(&lab);
    assert_forwards(&lab);
}
