//! A supervisor dies, or makes way for another one, and no packet notices (issue 7.3).
//!
//! `RELAY_TEST_LONG=1` has the rates and counts of the acceptance. A run in which a receiver dropped by itself, or the machine left no
//! room, says nothing and is repeated.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::Signal;
use relay::lab::arms::{GROUP, REWRITTEN};
use relay::lab::process::signal_pid;
use relay::lab::recv::Report;
use relay_tests::paths::{self, Outside, Path, long, turn};
use relay_tests::process::{bpf_objects, is_dead, wait_dead, wait_replaced, wait_unloaded};
use relay_tests::{
    Lab, Listener, RelayProcess, assert_frames_conserved, needs_root, send, send_args, send_in_background, start_relay, start_relay_unready,
};
use serde_json::Value;
use std::time::{Duration, Instant};

/// The rule of every relay here.
fn rule() -> String {
    format!("r0 {GROUP} -> r1 {REWRITTEN} ttl=keep; id=a")
}

fn args<'a>(path: &'a Path, rule: &'a str, linger: &'a str) -> Vec<&'a str> {
    [path.args, &["--rule", rule, "--linger", linger]].concat()
}

fn keeper(relay: &RelayProcess) -> u32 {
    let status = relay.status().unwrap();
    u32::try_from(status["supervisor"]["keeper"].as_u64().unwrap()).unwrap()
}

/// Until the keeper has been told of everything: once a turn of the supervisor's loop.
fn settle() {
    std::thread::sleep(Duration::from_millis(200));
}

fn kill(relay: &mut RelayProcess) {
    signal_pid(relay.pid(), Signal::SIGKILL).unwrap();
    relay.wait_exit(Duration::from_secs(5)).unwrap();
}

fn forwards(lab: &Lab) {
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(500)).unwrap();
    send(lab, &send_args("s0", &GROUP.to_string(), 5_000, 500).unwrap()).unwrap();
    let report = listener.wait().unwrap();
    assert_eq!((report.received, report.lost), (500, 0));
}

/// Programs, workers and keeper outlive the supervisor for as long as they were told, forward meanwhile, and leave nothing.
#[test]
fn orphans_forward_on_and_leave_nothing_when_their_time_is_over() {
    needs_root!();
    let _turn = turn();
    let (lab, rule) = (Lab::simple().unwrap(), rule());
    let mut relay = start_relay(&lab, &args(&paths::XSK_FUSED, &rule, "3s")).unwrap();
    settle();
    let orphans = [&relay.worker_pids().unwrap()[..], &[keeper(&relay)]].concat();
    assert!(orphans.iter().all(|pid| !is_dead(*pid)), "{}", relay.log());
    let objects = bpf_objects(relay.pid());
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(500)).unwrap();
    let begin = Instant::now();
    kill(&mut relay);
    send(&lab, &send_args("s0", &GROUP.to_string(), 5_000, 500).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let linger = orphans.iter().all(|pid| !is_dead(*pid));
    let in_time = begin.elapsed() < Duration::from_millis(2_500);
    let report = listener.finish().unwrap();
    if !in_time {
        println!("SKIPPED: the machine is too busy to tell what happens within 3 s");
        return;
    }
    assert!(linger, "they linger");
    assert_eq!((report.received, report.lost), (500, 0));
    wait_dead(&orphans, Duration::from_secs(30)).unwrap();
    let lingered = begin.elapsed();
    println!("gone {lingered:?} after the supervisor");
    assert!(lingered >= Duration::from_secs(3), "{lingered:?}");
    wait_unloaded(&objects).unwrap();
    let _next = start_relay(&lab, &args(&paths::XSK_FUSED, &rule, "0")).unwrap();
    forwards(&lab);
}

/// Without a supervisor, workers that are killed are not replaced: then nothing is worth keeping.
#[test]
fn a_keeper_whose_orphans_are_dead_goes() {
    needs_root!();
    let _turn = turn();
    let (lab, rule) = (Lab::simple().unwrap(), rule());
    let mut relay = start_relay(&lab, &args(&paths::XSK_FUSED, &rule, "60s")).unwrap();
    settle();
    let (workers, keeper) = (relay.worker_pids().unwrap(), keeper(&relay));
    kill(&mut relay);
    workers.iter().for_each(|pid| signal_pid(*pid, Signal::SIGKILL).unwrap());
    wait_dead(&[keeper], Duration::from_secs(10)).unwrap();
}

/// What a stop leaves is what it leaves without a keeper: nothing.
#[test]
fn a_stop_takes_the_keeper_along_and_a_dead_keeper_is_replaced() {
    needs_root!();
    let _turn = turn();
    let (lab, rule) = (Lab::simple().unwrap(), rule());
    let mut relay = start_relay(&lab, &args(&paths::XSK_FUSED, &rule, "60s")).unwrap();
    settle();
    let first = keeper(&relay);
    signal_pid(first, Signal::SIGKILL).unwrap();
    let begin = Instant::now();
    while [0, first].contains(&keeper(&relay)) {
        assert!(begin.elapsed() < Duration::from_secs(10), "no other keeper: {}", relay.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    forwards(&lab);
    let (second, objects) = (keeper(&relay), bpf_objects(relay.pid()));
    assert!(relay.sigterm(Duration::from_secs(5)).unwrap().success());
    wait_dead(&[second], Duration::from_secs(5)).unwrap();
    wait_unloaded(&objects).unwrap();
}

/// What happens to the relay while packets flow.
type Events = fn(&Lab, &mut RelayProcess, &[&str]);

/// One run: traffic of `rate` across `events`; the account, and how many packets were lost by name or by others than the relay.
fn run(path: &Path, rate: u64, millis: u64, events: Events) -> (Report, u64) {
    let (lab, rule) = (Lab::simple().unwrap(), rule());
    let args = args(path, &rule, "60s");
    let mut relay = start_relay(&lab, &args).unwrap();
    path.check(&relay).unwrap();
    relay.command(&["rule", "add", "r0 239.8.8.8:7000 -> r1; id=later"]).unwrap();
    let (rules, before) = (relay.rules().unwrap(), relay.stats().unwrap());
    let outside = Outside::of(&lab, &relay, "a").unwrap();
    let count = rate * millis / 1_000;
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(count)).unwrap();
    let sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), rate, count).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    events(&lab, &mut relay, &args);
    assert_eq!(sending.wait().unwrap().sent, count);
    let report = listener.wait().unwrap();
    path.check(&relay).unwrap();
    assert_eq!(relay.rules().unwrap(), rules, "also those that were added at run time");
    std::thread::sleep(Duration::from_millis(200));
    let after = relay.stats().unwrap();
    assert_frames_conserved(&after);
    println!("{after}");
    println!("{}: {}", path.name, relay::lab::recv::describe(&report).replace('\n', "; "));
    if report.lost == 0 {
        let moved = paths::moved(&before, &after, "a").unwrap();
        assert_eq!(moved, paths::Moved::all(count, 1), "the counters go on where they were: {}", relay.log());
    }
    let by_others = report.socket_drops + outside.lost(&relay).unwrap();
    let named = paths::no_room(&after) + by_others;
    (report, named)
}

fn exactly_once(path: &Path, rate: u64, millis: u64, events: Events) {
    for _ in 0..3 {
        let (report, named) = run(path, rate, millis, events);
        assert_eq!((report.duplicated, report.reordered, report.corrupted), (0, 0, 0), "{}", path.name);
        if report.lost == 0 {
            return;
        }
        assert!(report.lost <= named, "{}: {} lost, {named} of them by name", path.name, report.lost);
        eprintln!("void, once more: the machine had no room for {named}");
    }
    println!("SKIPPED {}: the machine is too busy to judge the relay", path.name);
}

fn take_over(lab: &Lab, relay: &mut RelayProcess, args: &[&str]) {
    let before = relay.worker_pids().unwrap_or_default();
    relay.take_over(&lab.relay, args).unwrap();
    relay.wait_ready().unwrap();
    let begin = Instant::now();
    while !relay.log().lines().rev().take(40).any(|line| line.contains("relay forwards")) {
        assert!(begin.elapsed() < Duration::from_secs(10), "{}", relay.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    wait_replaced(relay, &before, Duration::from_secs(10)).unwrap();
    settle();
}

/// kill -9 of the supervisor, a while without one, a successor, and then its workers die one after the other.
fn death_and_after(lab: &Lab, relay: &mut RelayProcess, args: &[&str]) {
    kill(relay);
    std::thread::sleep(Duration::from_millis(300));
    take_over(lab, relay, args);
    for _ in 0..if long() { 10 } else { 2 } {
        let pids = relay.worker_pids().unwrap();
        pids.iter().for_each(|pid| signal_pid(*pid, Signal::SIGKILL).unwrap());
        std::thread::sleep(Duration::from_millis(40));
        wait_replaced(relay, &pids, Duration::from_secs(10)).unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Successors of living supervisors, one after the other.
fn upgrades(lab: &Lab, relay: &mut RelayProcess, args: &[&str]) {
    for _ in 0..if long() { 10 } else { 1 } {
        take_over(lab, relay, args);
    }
}

/// A death without worker kills after it: what dies with an io_uring is another promise.
fn death_and_upgrades(lab: &Lab, relay: &mut RelayProcess, args: &[&str]) {
    kill(relay);
    std::thread::sleep(Duration::from_millis(200));
    take_over(lab, relay, args);
    upgrades(lab, relay, args);
}

fn rate() -> u64 {
    if long() { 200_000 } else { 10_000 }
}

fn seconds(short: u64, long_form: u64) -> u64 {
    1_000 * if long() { long_form } else { short }
}

#[test]
fn a_dead_supervisor_is_succeeded_and_no_packet_notices() {
    needs_root!();
    let _turn = turn();
    exactly_once(&paths::XSK_FUSED, rate(), seconds(3, 12), death_and_after);
}

#[test]
fn a_living_supervisor_is_succeeded_and_no_packet_notices() {
    needs_root!();
    let _turn = turn();
    exactly_once(&paths::XSK_SPLIT, rate(), seconds(2, 15), upgrades);
    if long() {
        exactly_once(&paths::XSK_FUSED, rate(), 15_000, upgrades);
    }
}

#[test]
fn nor_on_the_packet_path() {
    needs_root!();
    let _turn = turn();
    exactly_once(&paths::PACKET, rate(), seconds(2, 15), death_and_upgrades);
}

#[test]
fn nor_on_the_kernel_path() {
    needs_root!();
    let _turn = turn();
    exactly_once(&paths::KERNEL, rate(), seconds(2, 15), death_and_upgrades);
}

/// `relay run` that is expected to end by itself; one that goes on is stopped.
fn run_briefly(lab: &Lab) -> std::process::Command {
    let mut command = lab.relay.command("timeout").unwrap();
    command.arg("20").arg(relay_tests::relay_bin().unwrap()).arg("run");
    command
}

/// What can't be taken over, or not so, is refused by name, and what runs goes on.
#[test]
fn refusals_name_the_remedy_and_change_nothing() {
    needs_root!();
    let _turn = turn();
    let (lab, rule) = (Lab::simple().unwrap(), rule());
    let mut relay = start_relay(&lab, &args(&paths::XSK_FUSED, &rule, "60s")).unwrap();
    settle();
    let workers = relay.worker_pids().unwrap();
    let socket = relay.socket();
    let refused = |more: &[&str], words: &[&str]| {
        let all = [&args(&paths::XSK_FUSED, &rule, "60s")[..], more].concat();
        let mut other = start_relay_unready(&lab, &all).unwrap();
        assert_eq!(other.wait_exit(Duration::from_secs(10)).unwrap().code(), Some(2), "{}", other.log());
        let log = other.log();
        assert!(words.iter().all(|word| log.contains(word)), "{words:?}: {log}");
    };
    let path = socket.to_str().unwrap();
    let take = |more: &[&str]| {
        let output = run_briefly(&lab).args(more).args(["--takeover", "--socket", path]).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, words) = take(&[paths::XSK_FUSED.args, &["--frames", "1024"]].concat());
    assert!(code == Some(2) && words.contains("--frames 32768"), "{words}");
    let (code, words) = take(&["--rule", "r0 nonsense"]);
    assert_eq!(code, Some(2), "{words}");
    assert_eq!(relay.worker_pids().unwrap(), workers, "nothing has changed");
    kill(&mut relay);
    // Another socket, the same interface: the orphans hold it.
    refused(&[], &["orphans", "--takeover"]);
    forwards(&lab);
    relay.take_over(&lab.relay, &args(&paths::XSK_FUSED, &rule, "0")).unwrap();
    relay.wait_ready().unwrap();
    forwards(&lab);
    assert_eq!(keeper(&relay), 0, "--linger of the successor counts");
}

/// `relay COMMAND --json` of this socket, asked in the relay's namespace: exit code, answer, errors.
fn ask(lab: &Lab, socket: &std::path::Path, command: &str) -> (Option<i32>, Value, String) {
    let mut asking = lab.relay.command(relay_tests::relay_bin().unwrap()).unwrap();
    let output = asking.args([command, "--json", "--socket"]).arg(socket).output().unwrap();
    let answer = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), answer, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// One stream of rule a, and what happens meanwhile. False: others lost of it.
fn kernel_stream_across(lab: &Lab, relay: &mut RelayProcess, events: impl Fn(&mut RelayProcess)) -> bool {
    let count = 12_000;
    let outside = Outside::of(lab, relay, "a").unwrap();
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(count)).unwrap();
    let sending = send_in_background(lab, &send_args("s0", &GROUP.to_string(), 3_000, count).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    events(relay);
    sending.wait().unwrap();
    let report = listener.wait().unwrap();
    println!("kernel path: received {} of {count}, duplicated {}", report.received, report.duplicated);
    let whole = (report.received, report.lost, report.duplicated, report.reordered) == (count, 0, 0, 0);
    assert!(whole || paths::only_lost(&report, outside.lost(relay).unwrap()), "{report:?}; {}", relay.log());
    whole
}

/// `--keep-kernel-path`: when `--linger` is over the workers leave, and rules of the kernel path forward on, until somebody takes over
/// or ends it.
#[test]
fn the_kernel_path_is_kept_until_somebody_ends_it() {
    needs_root!();
    let _turn = turn();
    let (lab, rule) = (Lab::simple().unwrap(), format!("{} path=kernel", rule()));
    let args = ["--rule", &rule, "--rule", "r0 239.8.8.8:7000 -> r1; id=b path=xsk", "--linger", "1s", "--keep-kernel-path"];
    let mut relay = start_relay(&lab, &args).unwrap();
    let die_and_take_over = |relay: &mut RelayProcess| {
        settle();
        let (workers, keeper) = (relay.worker_pids().unwrap(), keeper(relay));
        kill(relay);
        wait_dead(&workers, Duration::from_secs(20)).expect("workers leave when --linger is over");
        assert!(!is_dead(keeper), "kept");
        let (code, _, error) = ask(&lab, &relay.socket(), "status");
        assert!(code == Some(3) && error.contains("relay stop"), "{code:?}: {error}");
        let mut plain = start_relay_unready(&lab, &args).unwrap();
        assert_eq!(plain.wait_exit(Duration::from_secs(10)).unwrap().code(), Some(2), "{}", plain.log());
        relay.take_over(&lab.relay, &args).unwrap();
        relay.wait_ready().unwrap();
    };
    let whole = (0..3).any(|_| kernel_stream_across(&lab, &mut relay, die_and_take_over));
    assert!(whole, "three runs in a row were void: the machine is too busy to judge the relay");
    // What workers carry goes on with new ones.
    let listener = Listener::on(lab.sink(1), "k1", "239.8.8.8:7000", Some(500)).unwrap();
    send(&lab, &send_args("s0", "239.8.8.8:7000", 5_000, 500).unwrap()).unwrap();
    assert_eq!(listener.wait().unwrap().received, 500, "{}", relay.log());
    settle();
    let (last, workers, objects) = (keeper(&relay), relay.worker_pids().unwrap(), bpf_objects(relay.pid()));
    let pid = relay.pid();
    kill(&mut relay);
    wait_dead(&workers, Duration::from_secs(20)).unwrap();
    forwards(&lab);
    let (code, stopped, error) = ask(&lab, &relay.socket(), "stop");
    assert_eq!((code, &stopped["orphaned"], &stopped["pid"]), (Some(0), &true.into(), &pid.into()), "{stopped}; {error}");
    assert_eq!((&stopped["interfaces"][0], &stopped["rules"], &stopped["workers"]), (&"r0".into(), &2.into(), &0.into()), "{stopped}");
    wait_dead(&[last], Duration::from_secs(10)).unwrap();
    wait_unloaded(&objects).unwrap();
    assert_eq!(ask(&lab, &relay.socket(), "stop").0, Some(3), "nothing is left");
    let next = start_relay(&lab, &args).unwrap();
    forwards(&lab);
    assert_eq!(ask(&lab, &next.socket(), "stop").1["orphaned"], false);
    assert!(is_dead(next.pid()));
}

/// A file that somebody broke refuses a successor while there is something to go on without it; orphans it doesn't condemn.
#[test]
fn a_broken_file_ends_no_orphans() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let output = format!("[[rule.output]]\negress = \"r1\"\nto = \"{REWRITTEN}\"\nttl = \"keep\"\n");
    let good = format!("version = 1\n[[rule]]\nid = \"a\"\ningress = \"r0\"\nmatch = \"{GROUP}\"\n{output}");
    std::fs::write(path, &good).unwrap();
    let args = [paths::XSK_FUSED.args, &["--config", path, "--linger", "60s"]].concat();
    let mut relay = start_relay(&lab, &args).unwrap();
    settle();
    std::fs::write(path, "version = 1\n[[rule]]\nid = ").unwrap();
    let socket = relay.socket();
    let refused = run_briefly(&lab).args(&args).args(["--takeover", "--socket"]).arg(&socket).output().unwrap();
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(2) && words.contains(path), "{words}");
    forwards(&lab);
    kill(&mut relay);
    relay.take_over(&lab.relay, &args).unwrap();
    relay.wait_ready().unwrap();
    assert!(relay.log().contains("configuration refused: the rules of the running relay stay"), "{}", relay.log());
    forwards(&lab);
    std::fs::write(path, good).unwrap();
    relay.signal(Signal::SIGHUP).unwrap();
    settle();
    forwards(&lab);
}

/// The rings of an interface that is gone can't be looked into any more: said, ended, started anew.
#[test]
fn what_cannot_be_gone_on_with_is_ended_and_started_clean() {
    needs_root!();
    let _turn = turn();
    let (lab, rule) = (Lab::simple().unwrap(), rule());
    let args = args(&paths::XSK_FUSED, &rule, "60s");
    let mut relay = start_relay(&lab, &args).unwrap();
    settle();
    let orphans = [&relay.worker_pids().unwrap()[..], &[keeper(&relay)]].concat();
    kill(&mut relay);
    lab.relay.ip_batch("link del r1\n").unwrap();
    relay.take_over(&lab.relay, &args).unwrap();
    relay.wait_ready().unwrap();
    assert!(relay.log().contains("interface r1 has gone") && relay.log().contains("starts clean"), "{}", relay.log());
    assert!(orphans.iter().all(|pid| is_dead(*pid)), "nothing of the old one is left");
    assert!(relay.sigterm(Duration::from_secs(5)).unwrap().success());
}

#[test]
fn with_nobody_there_a_takeover_is_an_ordinary_start() {
    needs_root!();
    let _turn = turn();
    let (lab, rule) = (Lab::simple().unwrap(), rule());
    let relay = start_relay(&lab, &[&args(&paths::XSK_FUSED, &rule, "1s")[..], &["--takeover"]].concat()).unwrap();
    assert!(relay.log().contains("ordinary start"), "{}", relay.log());
    forwards(&lab);
}
