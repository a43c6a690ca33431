//! Kills at chosen instructions (issue 7, 1; ADOPTION.md: random kills prove nothing). The worker is stopped under traffic,
//! stepped on by a random number of instructions, so that it dies anywhere in a batch and above all between its stores, and
//! killed there. Ordinary receivers say what arrived: everything, once, in order.
//!
//! Short form: 40 kills a path. `RELAY_TEST_LONG=1`: 400 on fused, 1:1 and 1:4 together, 200 on split. How many found a batch
//! or a move in hand is printed, and asserted in the long form: a run that never hits the journal would prove nothing.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use relay::lab::arms::GROUP;
use relay::lab::process::signal_pid;
use relay::lab::recv::Verdict;
use relay_tests::process::wait_replaced;
use relay_tests::{
    Lab, Listener, RelayProcess, assert_frames_conserved, assert_rules_conserved, needs_root, send_args, send_in_background, start_relay,
};
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

/// Packets a second: slow enough that the first batch after the stop is small (a stepped worker takes 5 µs an instruction, and
/// what gathers meanwhile makes the next one large), fast enough that there is always one.
const RATE: u64 = 2_000;
/// Instructions stepped at most: through the first batch and into the next.
const MAX_STEPS: u64 = 15_000;
/// One kill, with the steps before it and the replacement after it.
const PER_KILL: Duration = Duration::from_millis(250);

struct Plan {
    name: &'static str,
    pipeline: &'static str,
    outputs: &'static [&'static str],
    kills: u64,
}

fn kills(short: u64, long: u64) -> u64 {
    if std::env::var_os("RELAY_TEST_LONG").is_some() { long } else { short }
}

fn random(below: u64) -> u64 {
    std::hash::RandomState::new().build_hasher().finish() % below
}

/// A thread of the process, chosen by chance (fused: there is one).
fn a_thread(pid: u32) -> Pid {
    let threads: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .filter_map(|task| task.ok()?.file_name().to_string_lossy().parse().ok())
        .collect();
    Pid::from_raw(threads[random(threads.len() as u64) as usize])
}

/// Steps a thread on and kills its process there. Returns how many instructions it got.
fn step_and_kill(pid: u32) -> u64 {
    let thread = a_thread(pid);
    let wait = || waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
    // The tracer must see the end before the supervisor can.
    let ended = |steps| {
        while matches!(wait(), WaitStatus::Stopped(..)) {
            let _ = ptrace::cont(thread, None);
        }
        steps
    };
    ptrace::attach(thread).unwrap();
    assert!(matches!(wait(), WaitStatus::Stopped(..)));
    let steps = random(MAX_STEPS);
    for step in 0..steps {
        // On a busy machine the steps may take so long that the supervisor takes the worker for hung, and kills it first.
        if ptrace::step(thread, None).is_err() {
            return ended(step);
        }
        if !matches!(wait(), WaitStatus::Stopped(..)) {
            return step;
        }
    }
    signal_pid(pid, Signal::SIGKILL).unwrap();
    ended(steps)
}

/// States of the journal that successors have found: ingress in the low byte, egress in the next.
fn found(log: &str) -> Vec<u32> {
    log.lines().filter_map(|line| line.split("recovered=").nth(1)?.split_whitespace().next()?.parse().ok()).collect()
}

fn run(plan: &Plan) {
    let lab = Lab::simple().unwrap();
    let outputs: Vec<String> = plan.outputs.iter().map(|output| format!("r1 {output}")).collect();
    let rule = format!("r0 {GROUP} -> {}", outputs.join(", "));
    let relay = start_relay(&lab, &["--rule", &rule, "--backend", "xsk", "--pipeline", plan.pipeline]).unwrap();
    let count = RATE * (plan.kills * PER_KILL.as_millis() as u64 + 2_000) / 1_000;
    let listen = |output: &&str| Listener::on(lab.sink(1), "k1", output.split(' ').next().unwrap(), Some(count)).unwrap();
    let listeners: Vec<Listener> = plan.outputs.iter().map(listen).collect();
    let sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), RATE, count).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let begin = std::time::Instant::now();
    let (mut done, mut steps) = (0, 0);
    while done < plan.kills && begin.elapsed() < PER_KILL * plan.kills as u32 {
        std::thread::sleep(Duration::from_micros(random(20_000)));
        steps += kill_one(&relay);
        done += 1;
    }
    assert_eq!(sending.wait().unwrap().sent, count);
    for (listener, output) in listeners.into_iter().zip(plan.outputs) {
        let report = listener.wait().unwrap();
        if report.verdict == Verdict::Void {
            println!("SKIPPED {} {output}: the receiver dropped {} itself", plan.name, report.socket_drops);
            continue;
        }
        let damage = (report.lost, report.duplicated, report.reordered, report.corrupted);
        assert_eq!(damage, (0, 0, 0, 0), "{} {output}: lost, duplicated, reordered, corrupted", plan.name);
    }
    let stats = relay.stats().unwrap();
    assert_rules_conserved(&stats);
    assert_eq!(stats["frames"]["hand"], 0, "{}", stats["frames"]);
    let found = found(&relay.log());
    let hits = found.iter().filter(|state| **state != 0).count();
    println!("{}: {done} kills after {steps} single steps, {hits} in the middle of a batch or a move", plan.name);
    assert!(done < 100 || hits > 0, "no kill hit the journal: {found:?}");
}

fn kill_one(relay: &RelayProcess) -> u64 {
    let pids = relay.worker_pids().unwrap();
    let steps = step_and_kill(pids[0]);
    wait_replaced(relay, &pids, Duration::from_secs(5)).unwrap();
    assert_frames_conserved(&relay.stats().unwrap());
    steps
}

const ONE: &[&str] = &["239.9.9.9:6000 ttl=keep"];
const FOUR: &[&str] = &["239.9.9.1:6001 ttl=keep", "239.9.9.2:6002 ttl=9", "239.9.9.3:6003 ttl=8", "239.9.9.4:6004 ttl=keep"];

#[test]
fn fused_one_output() {
    needs_root!();
    run(&Plan { name: "fused 1:1", pipeline: "fused", outputs: ONE, kills: kills(40, 200) });
}

#[test]
fn fused_four_outputs() {
    needs_root!();
    run(&Plan { name: "fused 1:4", pipeline: "fused", outputs: FOUR, kills: kills(40, 200) });
}

#[test]
fn split_one_output() {
    needs_root!();
    run(&Plan { name: "split 1:1", pipeline: "split", outputs: ONE, kills: kills(40, 200) });
}
