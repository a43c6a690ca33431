//! `--spare`: a process for each worker that stands in for it by itself (issue 7.2). What it is for is a shorter silence; what it may
//! never cost is a packet, a second worker at work, or a hotter crash loop.
//!
//! `RELAY_TEST_LONG=1`: 100 kills each with and without a spare at 200 kpps, in turn; the receiver's silence with one has its bar.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::Signal;
use relay::lab::arms::{GROUP, REWRITTEN};
use relay::lab::clock;
use relay::lab::generator::{Generator, listening};
use relay::lab::process::signal_pid;
use relay_common::lab::Silence;
use relay_tests::paths::{self, Path, long, renice, turn};
use relay_tests::process::{bpf_objects, is_dead, status_field, wait_dead, wait_replaced, wait_unloaded};
use relay_tests::stream::Stream;
use relay_tests::{
    Lab, LabSpec, Listener, RelayProcess, assert_frames_conserved, needs_root, send, send_args, send_in_background, start_relay,
};
use serde_json::Value;
use std::time::Duration;

/// What comes so soon after a kill is its doing, ns. From 60 ms on this test asks who stands in, by a process of its own on the same CPU.
const AFTER_NS: u64 = 50_000_000;
/// For what takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// Packets that show that it forwards.
const FEW: u64 = 500;

fn rule() -> String {
    format!("r0 {GROUP} -> r1 {REWRITTEN} ttl=keep; id=a")
}

fn start(lab: &Lab, path: &Path, more: &[&str]) -> RelayProcess {
    let rule = rule();
    renice("-15");
    let relay = start_relay(lab, &[path.args, &["--rule", &rule, "--spare"], more].concat());
    renice("0");
    let relay = relay.unwrap();
    path.check(&relay).unwrap();
    relay
}

fn spare(status: &Value) -> &Value {
    &status["workers"][0]["spare"]
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// Waits until the worker has a spare that has everything; its process.
fn ready(relay: &RelayProcess) -> u32 {
    let status = relay.wait_status("no spare", PATIENCE, |status| spare(status)["state"] == "ready").unwrap();
    u32::try_from(number(&spare(&status)["pid"])).unwrap()
}

/// Some packets, which all arrive: a worker that has moved none has no spare.
fn forwards(lab: &Lab) {
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(FEW)).unwrap();
    send(lab, &send_args("s0", &GROUP.to_string(), 5_000, FEW).unwrap()).unwrap();
    let report = listener.wait().unwrap();
    assert_eq!((report.received, report.lost, report.duplicated), (FEW, 0, 0));
}

/// Kills the worker; the spare has to be it.
fn kill_worker(relay: &RelayProcess) {
    let (stands_in, before) = (ready(relay), relay.worker_pids().unwrap());
    signal_pid(before[0], Signal::SIGKILL).unwrap();
    let after = wait_replaced(relay, &before, PATIENCE).unwrap();
    assert_eq!(after, [stands_in], "{}", relay.log());
}

/// A stream of `rate` for three seconds.
fn stream<'a>(from: &'a str, to: &'a str, rate: u64) -> Stream<'a> {
    Stream { rule: "a", from, to, rate, count: rate * 3, worked: true }
}

fn a_spare_stands_in_and_nothing_is_lost(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = start(&lab, path, &[]);
    assert_eq!(spare(&relay.status().unwrap())["state"], "none", "nothing has been moved yet");
    forwards(&lab);
    let (from, to) = (GROUP.to_string(), REWRITTEN.to_string());
    let mut kills = 0;
    let fault = || {
        (0..4).for_each(|_| kill_worker(&relay));
        kills += 4;
    };
    stream(&from, &to, 10_000).loses_nothing(&lab, &relay, fault).unwrap();
    let status = relay.status().unwrap();
    let worker = &status["workers"][0];
    assert_eq!((number(&worker["restarts"]), number(&worker["spare"]["promotions"])), (kills, kills), "{status}; {}", relay.log());
    assert_frames_conserved(&relay.stats().unwrap());
}

#[test]
fn xsk_fused() {
    needs_root!();
    let _turn = turn();
    a_spare_stands_in_and_nothing_is_lost(&paths::XSK_FUSED);
}

#[test]
fn xsk_split() {
    needs_root!();
    let _turn = turn();
    a_spare_stands_in_and_nothing_is_lost(&paths::XSK_SPLIT);
}

/// The packet path may lose what its dead worker had posted; nothing else, and nothing twice.
#[test]
fn packet() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = start(&lab, &paths::PACKET, &[]);
    forwards(&lab);
    let count = 10_000;
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(count)).unwrap();
    let sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), 5_000, count).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    (0..2).for_each(|_| kill_worker(&relay));
    sending.wait().unwrap();
    let report = listener.wait().unwrap();
    println!("packet: lost {} of {count}", report.lost);
    assert_eq!((report.duplicated, report.reordered, report.corrupted), (0, 0, 0));
    forwards(&lab);
    assert_frames_conserved(&relay.stats().unwrap());
}

/// It is confined as the worker is that it stands in for; one that dies costs nothing and is replaced; one that is stopped is killed,
/// and a worker started in its place.
#[test]
fn a_spare_has_no_privilege_and_may_die_or_hang() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = start(&lab, &paths::XSK_SPLIT, &[]);
    forwards(&lab);
    let first = ready(&relay);
    assert_eq!(status_field(first, "CapEff").unwrap(), "0000000000000000");
    assert_eq!(status_field(first, "NoNewPrivs").unwrap(), "1");
    let tasks = std::fs::read_dir(format!("/proc/{first}/task")).unwrap().flatten();
    let confined = tasks.map(|task| status_field(task.file_name().to_string_lossy().parse().unwrap(), "Seccomp").unwrap());
    assert_eq!(confined.collect::<Vec<_>>(), ["2", "2"]);
    signal_pid(first, Signal::SIGKILL).unwrap();
    let replaced = |status: &Value| spare(status)["state"] == "ready" && number(&spare(status)["deaths"]) == 1;
    let status = relay.wait_status("no other spare", PATIENCE, replaced).unwrap();
    assert_eq!(number(&status["workers"][0]["restarts"]), 0);
    let (stopped, before) = (ready(&relay), relay.worker_pids().unwrap());
    signal_pid(stopped, Signal::SIGSTOP).unwrap();
    signal_pid(before[0], Signal::SIGKILL).unwrap();
    wait_replaced(&relay, &[before[0], stopped], PATIENCE).unwrap();
    assert!(is_dead(stopped), "{}", relay.log());
    forwards(&lab);
    assert_frames_conserved(&relay.stats().unwrap());
}

/// Nobody has to tell it: it stands in while the supervisor is stopped, and the supervisor finds it at work.
#[test]
fn it_needs_no_supervisor() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = start(&lab, &paths::XSK_FUSED, &[]);
    forwards(&lab);
    let (stands_in, worker) = (ready(&relay), relay.worker_pids().unwrap()[0]);
    relay.signal(Signal::SIGSTOP).unwrap();
    signal_pid(worker, Signal::SIGKILL).unwrap();
    wait_dead(&[worker], PATIENCE).unwrap();
    forwards(&lab);
    relay.signal(Signal::SIGCONT).unwrap();
    assert_eq!(wait_replaced(&relay, &[worker], PATIENCE).unwrap(), [stands_in]);
    // Its own spare follows, and neither survives the supervisor.
    forwards(&lab);
    let next = ready(&relay);
    assert_ne!(next, stands_in);
    signal_pid(relay.pid(), Signal::SIGKILL).unwrap();
    wait_dead(&[stands_in, next], PATIENCE).unwrap();
}

/// Ports change under a spare: it is dismissed, the worker drained, and both have successors.
#[test]
fn a_planned_replacement_dismisses_it() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::new(LabSpec { sinks: 2, ..LabSpec::default() }).unwrap();
    let relay = start(&lab, &paths::XSK_FUSED, &[]);
    forwards(&lab);
    let (from, to) = (GROUP.to_string(), REWRITTEN.to_string());
    let mut times = 0;
    let fault = || {
        let before = [ready(&relay), relay.worker_pids().unwrap()[0]];
        // Outputs by another interface: only the first time is one that nobody has a port for.
        times += 1;
        relay.command(&["rule", "add", &format!("r0 239.9.0.{times}:7000 -> r2; id=b{times}")]).unwrap();
        if times == 1 {
            assert!(before.iter().all(|pid| is_dead(*pid)), "{}", relay.log());
        }
        kill_worker(&relay);
    };
    stream(&from, &to, 5_000).loses_nothing(&lab, &relay, fault).unwrap();
    assert_frames_conserved(&relay.stats().unwrap());
}

/// The supervisor is dead, then the worker: the spare is it, the keeper keeps on, and a successor takes it all over. Then a stop, with
/// a spare there, leaves nothing.
#[test]
fn an_orphan_stands_in_and_is_taken_over() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let mut relay = start(&lab, &paths::XSK_FUSED, &["--linger", "60s"]);
    forwards(&lab);
    let (stands_in, worker) = (ready(&relay), relay.worker_pids().unwrap()[0]);
    // The keeper is told once a turn of the supervisor's loop.
    std::thread::sleep(Duration::from_millis(200));
    signal_pid(relay.pid(), Signal::SIGKILL).unwrap();
    relay.wait_exit(PATIENCE).unwrap();
    signal_pid(worker, Signal::SIGKILL).unwrap();
    wait_dead(&[worker], PATIENCE).unwrap();
    forwards(&lab);
    let rule = rule();
    let again = [paths::XSK_FUSED.args, &["--rule", &rule, "--spare", "--linger", "60s"]].concat();
    relay.take_over(&lab.relay, &again).unwrap();
    relay.wait_ready().unwrap();
    forwards(&lab);
    wait_dead(&[stands_in], PATIENCE).unwrap();
    let status = relay.status().unwrap();
    assert_eq!(number(&spare(&status)["promotions"]), 1, "{status}; {}", relay.log());
    kill_worker(&relay);
    forwards(&lab);
    let left = [ready(&relay), relay.worker_pids().unwrap()[0]];
    let objects = bpf_objects(relay.pid());
    assert!(relay.sigterm(PATIENCE).unwrap().success());
    assert!(left.iter().all(|pid| is_dead(*pid)));
    wait_unloaded(&objects).unwrap();
}

/// The silence at the far end that each kill brings at 200 kpps, µs (0: none that is noted). The generator has a CPU for itself, the relay and this
/// test another: what the scheduler does to a sender or a receiver on the same CPUs is longer than what is looked for.
fn silences([generator_cpu, relay_cpu]: [usize; 2], path: &Path, spares: bool, kills: usize) -> Vec<u64> {
    clock::pin_thread(relay_cpu).unwrap();
    let lab = Lab::simple().unwrap();
    let rule = rule();
    let more: &[&str] = if spares { &["--spare"] } else { &[] };
    let relay = start_relay(&lab, &[path.args, &["--rule", &rule], more].concat()).unwrap();
    let sink = listening(&lab, 1).unwrap();
    let mut generator = Generator::new(&lab, GROUP, 64).unwrap();
    let length = Duration::from_millis(kills as u64 * 200 + 1_500);
    let mut killed = Vec::new();
    let sent = std::thread::scope(|scope| {
        let sending = scope.spawn(|| generator.paced(&lab, generator_cpu, 200_000, length).unwrap());
        std::thread::sleep(Duration::from_millis(500));
        for _ in 0..kills {
            let before = relay.worker_pids().unwrap();
            if spares {
                ready(&relay);
            }
            std::thread::sleep(Duration::from_millis(20));
            killed.push(clock::monotonic_ns());
            signal_pid(before[0], Signal::SIGKILL).unwrap();
            // Whoever asks has a process of its own, on the CPU that the successor needs.
            std::thread::sleep(Duration::from_millis(60));
            wait_replaced(&relay, &before, PATIENCE).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
        sending.join().unwrap()
    });
    std::thread::sleep(Duration::from_millis(100));
    let (arrived, all) = (sink.count().unwrap(), sink.silences().unwrap());
    let end = |silence: &Silence| silence.begin_ns + silence.len_ns;
    let of = |kill: u64| all.iter().filter(move |silence| end(silence) > kill && silence.begin_ns < kill + AFTER_NS);
    // Before the stream others are heard, after it nobody.
    let begin = all.iter().map(end).min().unwrap_or(0);
    let is_others = |silence: &&Silence| silence.begin_ns >= begin && !killed.iter().any(|kill| of(*kill).any(|other| other == *silence));
    let others = all.iter().filter(is_others).map(|silence| silence.len_ns / 1_000).max();
    println!("spares {spares}, {kills} kills: sent {sent}, arrived {arrived}; without a kill the longest silence was {others:?} µs");
    killed.iter().map(|kill| of(*kill).map(|silence| silence.len_ns / 1_000).max().unwrap_or(0)).collect()
}

/// The bar of issue 7, in rounds of twenty kills with a spare and twenty without.
#[test]
fn the_silence_is_shorter() {
    needs_root!();
    if !long() {
        println!("SKIPPED: figures of a quiet machine: RELAY_TEST_LONG=1");
        return;
    }
    let _turn = turn();
    // Asked for once: a pinned thread may use one CPU.
    let allowed = clock::allowed_cpus();
    let [Some(generator_cpu), Some(relay_cpu)] = [allowed.first(), allowed.get(1)].map(Option::<&usize>::copied) else {
        println!("SKIPPED: one CPU: generator and relay need one each");
        return;
    };
    let cpus = [generator_cpu, relay_cpu];
    for path in [paths::XSK_FUSED, paths::XSK_SPLIT] {
        silences(cpus, &path, true, 0);
        let mut all = [vec![], vec![]];
        for _ in 0..5 {
            for (arm, silence) in all.iter_mut().enumerate() {
                silence.extend(silences(cpus, &path, arm == 0, 20));
            }
        }
        let [with, without] = all.map(|mut silences| {
            silences.sort_unstable();
            let at = |share: f64| silences.get(((share * silences.len() as f64).ceil() as usize).max(1) - 1).copied().unwrap_or(0);
            (silences.len(), at(0.5), at(0.99), silences.last().copied().unwrap_or(0))
        });
        println!("{}: kills, p50, p99, max of their silences in µs: with spares {with:?}, without {without:?}", path.name);
        // The bar is 5 ms at p99, on a machine that nobody else uses (docs/reliability.md): here it is said, not asserted.
        println!("{}: bar of 5 ms {}", path.name, if with.2 <= 5_000 { "met" } else { "missed" });
        assert!(with.1 < without.1, "the median with spares");
    }
}
