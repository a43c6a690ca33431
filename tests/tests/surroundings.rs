//! What happens around the relay: an output that takes nothing, a namespace that goes, other queue counts, no memory.
//!
//! Each test makes its fault itself and sees that it has happened; a stream beside it must not suffer. Must never touch what it
//! has not made.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::{Namespace, enable_gro};
use relay_tests::paths::{KERNEL, Path, Run, XSK_FUSED, turn};
use relay_tests::process::{is_dead, kib, wait_replaced};
use relay_tests::stream::Stream;
use relay_tests::{
    Lab, LabSpec, Listener, RelayProcess, assert_frames_conserved, assert_rules_conserved, needs_root, on_every_path, relay_bin, send,
    send_args,
};
use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

on_every_path!(an_output_that_is_blocked_costs_the_others_nothing);

const FROM: &str = "239.1.1.1:5000";
const TO: &str = "239.9.9.9:6000";
const RULE: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=stream";
const RATE: u64 = 10_000;

fn lab() -> Lab {
    Lab::new(LabSpec { sinks: 2, separate_sinks: true, ..LabSpec::default() }).unwrap()
}

/// A second of the stream from r0 to r1, in full, while `fault` happens.
fn costs_nothing(lab: &Lab, relay: &RelayProcess, worked: bool, fault: impl FnMut()) {
    costs_nothing_at(RATE, lab, relay, worked, fault);
}

fn costs_nothing_at(rate: u64, lab: &Lab, relay: &RelayProcess, worked: bool, fault: impl FnMut()) {
    let stream = Stream { rule: "stream", from: FROM, to: TO, rate, count: rate, worked };
    stream.loses_nothing(lab, relay, fault).unwrap();
}

/// Something arrives at the far end of r2 (its carrier, or the sender's, may still be on its way); then 500 datagrams do, in full.
fn reaches_the_second(lab: &Lab, relay: &RelayProcess, from: &str, to: &str) {
    let begin = Instant::now();
    loop {
        let listener = Listener::on(lab.sink(2), "k2", to, None).unwrap();
        let sent = send(lab, &send_args("s0", from, 1_000, 50).unwrap());
        std::thread::sleep(Duration::from_millis(50));
        if listener.finish().unwrap().received == 50 {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(10), "{sent:?}: {}; {}", relay.stats().unwrap(), relay.log());
    }
    let listens = [(2, to, 500)];
    Run::of(lab, relay, &[send_args("s0", from, 2_000, 500).unwrap()], &listens).unwrap().assert_whole(&listens);
}

/// What arrives at k2 goes into a queue that lets out a byte a second: nothing comes back to who has sent it, as behind a device that
/// has stopped completing. The reason why not, where the kernel has no such queue.
fn block(sink: &Namespace) -> Result<(), String> {
    let tc = |line: &str| sink.output("tc", &line.split(' ').collect::<Vec<_>>()).map(drop).map_err(|error| error.to_string());
    sink.ip_batch("link add dam type ifb\nlink set dam up\n").map_err(|error| error.to_string())?;
    tc("qdisc add dev dam root tbf rate 8bit burst 2kb limit 200mb")?;
    tc("qdisc add dev k2 ingress")?;
    tc("filter add dev k2 parent ffff: protocol all prio 1 u32 match u32 0 0 action mirred egress redirect dev dam")
}

fn unblock(sink: &Namespace) {
    sink.output("tc", &["qdisc", "del", "dev", "k2", "ingress"]).unwrap();
    sink.ip_batch("link del dam\n").unwrap();
}

/// The output's interface is up, and nothing that it is given is ever finished: the other output of the same rule loses nothing, and
/// this one goes on when it is let.
fn an_output_that_is_blocked_costs_the_others_nothing(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000, r2 239.9.9.9:6000; id=stream"]).unwrap();
    if let Err(reason) = block(lab.sink(2)) {
        return println!("SKIPPED: {reason}");
    }
    let blocked = Listener::on(lab.sink(2), "k2", TO, None).unwrap();
    costs_nothing(&lab, &relay, path.path != "kernel", || {});
    let stats = relay.stats().unwrap();
    // What the queue lets out at once is 2 KB.
    assert!(blocked.finish().unwrap().received < 100, "it was not blocked");
    assert!(path.path != "xsk" || standing(&stats) > 1_000, "nothing stands before it: {stats}");
    unblock(lab.sink(2));
    let begin = Instant::now();
    while standing(&relay.stats().unwrap()) > 0 {
        assert!(begin.elapsed() < Duration::from_secs(10), "{}", relay.stats().unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }
    reaches_the_second(&lab, &relay, FROM, TO);
    assert_rules_conserved(&relay.stats().unwrap());
    assert_frames_conserved(&relay.stats().unwrap());
}

/// Frames on their way out.
fn standing(stats: &Value) -> u64 {
    ["egress", "tx", "kernel", "completion"].iter().filter_map(|place| stats["frames"][place].as_u64()).sum()
}

/// The namespace at the far end of r9 is removed, and the interface with it; made again, its rule forwards again.
#[test]
fn a_namespace_that_is_removed_takes_only_its_own_output() {
    needs_root!();
    let _turn = turn();
    for path in [XSK_FUSED, KERNEL] {
        let lab = lab();
        let mut far = Some(far_end(&lab));
        let other = "r0 239.1.1.2:5000 -> r9 239.9.9.8:6000 ttl=keep; id=other";
        let relay = path.start(&lab, &[RULE, other]).unwrap();
        let workers = relay.worker_pids().unwrap();
        costs_nothing(&lab, &relay, path.path != "kernel", || {
            far = None;
            await_pending(&relay, true);
            far = Some(far_end(&lab));
            await_pending(&relay, false);
        });
        assert!(relay.worker_pids().unwrap().len() == workers.len() && !is_dead(relay.pid()), "{}", relay.log());
        assert_frames_conserved(&relay.stats().unwrap());
    }
}

/// A namespace with the far end of r9 in it.
fn far_end(lab: &Lab) -> Namespace {
    let far = Namespace::create("far").unwrap();
    let lines = format!("link add r9 type veth peer name k9 netns {}\naddr add 10.0.9.1/24 dev r9\nlink set r9 up\n", far.name());
    lab.relay.ip_batch(&lines).unwrap();
    far.ip_batch("addr add 10.0.9.2/24 dev k9\nlink set k9 up\n").unwrap();
    enable_gro(&far, "k9").unwrap();
    far
}

fn await_pending(relay: &RelayProcess, expected: bool) {
    let begin = Instant::now();
    loop {
        let rules = relay.rules().unwrap();
        let other = rules.as_array().unwrap().iter().find(|rule| rule["id"] == "other").unwrap();
        if other.to_string().contains("r9 is missing") == expected && (expected || other["path"] != "pending") {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(10), "{rules}; {}", relay.log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The relay's own namespace loses its name: who is inside stays inside, and forwards on.
#[test]
fn the_relays_namespace_may_lose_its_name() {
    needs_root!();
    let _turn = turn();
    let lab = lab();
    let relay = XSK_FUSED.start(&lab, &[RULE]).unwrap();
    costs_nothing(&lab, &relay, true, || {
        // Not `ip netns del` of the guard, which would end what runs inside.
        assert!(Command::new("ip").args(["netns", "del", lab.relay.name()]).status().unwrap().success());
    });
    relay.command(&["rule", "add", "r0 239.1.1.2:5000 -> r2 239.9.9.8:6000; id=late"]).unwrap();
    reaches_the_second(&lab, &relay, "239.1.1.2:5000", "239.9.9.8:6000");
}

/// Queues of an egress interface come and go (its carrier with them), then those of the ingress interface: another output loses
/// nothing, no worker is restarted, and both forward afterwards.
#[test]
fn the_number_of_queues_may_change() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::new(LabSpec { sinks: 2, separate_sinks: true, queues: 2, ..LabSpec::default() }).unwrap();
    let queues = |namespace: &Namespace, iface: &str, rx: &str, tx: &str| {
        namespace.output("ethtool", &["-L", iface, "rx", rx, "tx", tx]).map(drop).map_err(|error| error.to_string())
    };
    // One worker serves one queue, so there shall be one.
    queues(&lab.src, "s0", "2", "1").unwrap();
    queues(&lab.relay, "r0", "1", "2").unwrap();
    let other = "r0 239.1.1.2:5000 -> r2 239.9.9.8:6000 ttl=keep; id=other";
    let relay = XSK_FUSED.start(&lab, &[RULE, other]).unwrap();
    let workers = relay.worker_pids().unwrap();
    costs_nothing(&lab, &relay, true, || {
        for count in ["1", "2", "1", "2"] {
            queues(&lab.relay, "r2", "2", count).unwrap();
        }
    });
    reaches_the_second(&lab, &relay, "239.1.1.2:5000", "239.9.9.8:6000");
    for rx in ["2", "1"] {
        queues(&lab.relay, "r0", rx, "2").unwrap();
        reaches_the_second(&lab, &relay, "239.1.1.2:5000", "239.9.9.8:6000");
    }
    assert_eq!(relay.worker_pids().unwrap(), workers, "{}", relay.log());
    costs_nothing(&lab, &relay, true, || {});
}

/// A queue that a worker serves can't be taken away: the kernel says so, and nothing has happened.
#[test]
fn a_queue_in_use_stays() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::new(LabSpec { sinks: 2, separate_sinks: true, queues: 2, ..LabSpec::default() }).unwrap();
    lab.src.output("ethtool", &["-L", "s0", "tx", "1"]).unwrap();
    let path = Path { args: &["--backend", "xsk", "--pipeline", "fused", "--workers", "2"], ..XSK_FUSED };
    let relay = path.start(&lab, &[RULE]).unwrap();
    costs_nothing(&lab, &relay, true, || {
        for iface in ["r0", "r1"] {
            let refused = lab.relay.output("ethtool", &["-L", iface, "rx", "1", "tx", "1"]).unwrap_err();
            println!("{refused}");
        }
    });
}

/// Address space a process has, in bytes.
fn address_space(pid: u32) -> String {
    (kib(pid, "VmSize").unwrap() << 10).to_string()
}

/// A worker may have no more memory, and gets rules that need it: whatever becomes of it, the stream loses nothing.
#[test]
fn a_worker_without_memory_is_replaced_and_nothing_is_lost() {
    needs_root!();
    let _turn = turn();
    let lab = lab();
    // Only a worker of our own user may we limit.
    let path = Path { args: &["--backend", "xsk", "--pipeline", "fused", "--worker-user", "root"], ..XSK_FUSED };
    let relay = path.start(&lab, &[RULE]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("many.toml");
    let rule = |id: &str, group: &str, to: &str| {
        format!(
            "[[rule]]\nid = \"{id}\"\ningress = \"r0\"\nmatch = \"{group}\"\n[[rule.output]]\negress = \"r1\"\nto = \"{to}\"\nttl = \"keep\"\n"
        )
    };
    let many: String =
        (0..3_000).map(|n| rule(&format!("n{n}"), &format!("239.3.{}.{}:5000", n / 250, n % 250), "239.9.9.7:6000")).collect();
    std::fs::write(&file, format!("version = 1\n{}{many}", rule("stream", FROM, TO))).unwrap();
    let workers = relay.worker_pids().unwrap();
    // Slow enough for the fill ring to last until the successor forwards, also on a busy machine.
    costs_nothing_at(RATE / 5, &lab, &relay, true, || {
        let limit = format!("--as={}", address_space(workers[0]));
        let limited = Command::new("prlimit").args(["--pid", &workers[0].to_string(), &limit]).status().unwrap();
        assert!(limited.success());
        relay.command(&["apply", file.to_str().unwrap()]).unwrap();
        wait_replaced(&relay, &workers, Duration::from_secs(10)).unwrap();
    });
    let status = relay.status().unwrap();
    let exit = status["workers"][0]["last_exit"].as_str().unwrap();
    println!("the worker ended: {exit}");
    assert!(exit.contains("out of memory"), "{status}; {}", relay.log());
    assert_rules_conserved(&relay.stats().unwrap());
    assert_frames_conserved(&relay.stats().unwrap());
}

/// A start without memory for its packets says so and leaves nothing; the next one works.
#[test]
fn a_start_without_memory_is_said() {
    needs_root!();
    let _turn = turn();
    let lab = lab();
    let mut command = lab.relay.command("prlimit").unwrap();
    command.args(["--as=60000000"]).arg(relay_bin().unwrap()).args(["run", "--backend", "xsk", "--rule", RULE]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    println!("{}: {text}", output.status);
    assert!(matches!(output.status.code(), Some(1 | 2)) && text.contains("memory"), "{text}");
    XSK_FUSED.start(&lab, &[RULE]).unwrap();
}
