//! Who notices whose death, and what is left (issue 3, documents 000, 002 and 004).
//!
//! Short forms by default; `RELAY_TEST_LONG=1` has the acceptance counts and their bounds. On a loaded machine times say
//! more of the machine, so the short forms bound them loosely and print them.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use relay::lab::arms::{GROUP, REWRITTEN};
use relay::lab::process::signal_pid;
use relay_tests::paths::{long, turn};
use relay_tests::process::{bpf_objects, is_dead, sockets, wait_dead, wait_replaced, wait_unloaded};
use relay_tests::{
    Lab, Listener, RelayProcess, assert_frames_conserved, needs_root, send, send_args, send_in_background, start_relay, start_relay_unready,
};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// The worker's heartbeat stands still for so long before it is given up.
const TIMEOUT: Duration = Duration::from_millis(250);
/// A stopped worker is found and killed within this time (issue 7).
const FOUND: Duration = Duration::from_millis(300);
/// Period of a heartbeat (DECISIONS §18).
const BEAT: Duration = Duration::from_millis(100);
/// Between two looks at a process: who looks all the time holds the CPU that the supervisor is to wake up on.
const GLANCE: Duration = Duration::from_micros(50);

fn relay_with(lab: &Lab, args: &[&str]) -> RelayProcess {
    let rule = format!("r0 {GROUP} -> r1 {REWRITTEN} ttl=keep");
    start_relay(lab, &[&["--rule", &rule], args].concat()).unwrap()
}

fn relay(lab: &Lab) -> RelayProcess {
    relay_with(lab, &["--backend", "xsk"])
}

fn forwards(lab: &Lab) {
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(500)).unwrap();
    send(lab, &send_args("s0", &GROUP.to_string(), 10_000, 500).unwrap()).unwrap();
    assert_eq!(listener.wait().unwrap().lost, 0);
}

fn at(sorted: &[Duration], part: f64) -> Duration {
    sorted[((sorted.len() - 1) as f64 * part) as usize]
}

/// Until the process is gone for good: reaped by its parent, so that not even a zombie answers.
fn until_reaped(pid: u32) -> Duration {
    let begin = Instant::now();
    while kill(Pid::from_raw(pid.cast_signed()), None) != Err(Errno::ESRCH) {
        assert!(begin.elapsed() < Duration::from_secs(5), "{pid} is never reaped");
        std::thread::sleep(GLANCE);
    }
    begin.elapsed()
}

fn until_dead(pid: u32) -> Duration {
    let begin = Instant::now();
    while !is_dead(pid) {
        assert!(begin.elapsed() < Duration::from_secs(5), "{pid} lives");
        std::thread::sleep(GLANCE);
    }
    begin.elapsed()
}

/// From the moment the process is gone (a zombie) to the moment its supervisor has taken notice of it (reaped).
#[test]
fn req_004_2_a_death_is_noticed_at_once() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = relay(&lab);
    let before = sockets(relay.pid());
    let (mut dying, mut noticed) = (Vec::new(), Vec::new());
    let kills = if long() { 300 } else { 20 };
    // A worker that has never processed a turn is restarted later and later (DECISIONS §9).
    let sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), 5_000, kills * 3_000).unwrap()).unwrap();
    for _ in 0..kills {
        let pids = relay.worker_pids().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        signal_pid(pids[0], Signal::SIGKILL).unwrap();
        dying.push(until_dead(pids[0]));
        noticed.push(until_reaped(pids[0]));
        wait_replaced(&relay, &pids, Duration::from_secs(15)).unwrap();
    }
    dying.sort_unstable();
    noticed.sort_unstable();
    println!("kill to gone: p50 {:?}, p99 {:?}, max {:?}", at(&dying, 0.5), at(&dying, 0.99), at(&dying, 1.0));
    println!("gone to noticed: p50 {:?}, p99 {:?}, max {:?}", at(&noticed, 0.5), at(&noticed, 0.99), at(&noticed, 1.0));
    // The supervisor's next timer is the heartbeats': a death that waited for it would be noticed after half a beat, give or take.
    assert!(at(&noticed, 0.5) < BEAT / 5, "a death waits for a timer: {noticed:?}");
    assert!(!long() || at(&noticed, 0.99) <= Duration::from_millis(1), "{noticed:?}");
    // 004.2: the handlers are the same ones: no socket was made anew but life lines and clients' connections.
    drop(sending);
    std::thread::sleep(Duration::from_millis(100));
    let kept = before.intersection(&sockets(relay.pid())).count();
    assert!(kept + 2 >= before.len(), "{} of {} sockets are left", kept, before.len());
    forwards(&lab);
}

#[test]
fn req_004_5_a_stopped_worker_is_found_within_300_ms() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = relay(&lab);
    let mut found = Vec::new();
    let rounds = if long() { 50 } else { 3 };
    // A worker that has never processed a turn is restarted later and later (DECISIONS §9).
    let sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), 1_000, rounds * 1_000).unwrap()).unwrap();
    for _ in 0..rounds {
        let pids = relay.worker_pids().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        signal_pid(pids[0], Signal::SIGSTOP).unwrap();
        found.push(until_dead(pids[0]));
        wait_replaced(&relay, &pids, Duration::from_secs(5)).unwrap();
    }
    found.sort_unstable();
    drop(sending);
    std::thread::sleep(Duration::from_millis(100));
    println!("stopped worker found and killed: p50 {:?}, max {:?}", at(&found, 0.5), at(&found, 1.0));
    assert!(found[0] >= TIMEOUT - BEAT, "too early: {found:?}");
    let slack = if long() { Duration::ZERO } else { Duration::from_secs(3) };
    assert!(at(&found, 1.0) <= FOUND + slack, "{found:?}");
    forwards(&lab);
}

/// No false alarm: workers on CPUs that others want as well, and more packets than they can carry, for 60 s.
#[test]
#[ignore = "60 s of everything the machine has; cargo test -p relay-tests --test liveness -- --ignored"]
fn a_worker_at_full_load_is_no_hung_worker() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = relay(&lab);
    let pids = relay.worker_pids().unwrap();
    let cpus = std::thread::available_parallelism().unwrap().get();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..cpus {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let mut generator = relay::lab::generator::Generator::new(&lab, GROUP, 64).unwrap();
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(60) {
            generator.send(&lab, 0, 200_000).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(relay.worker_pids().unwrap(), pids, "{}", relay.log());
    println!("{}", relay.status().unwrap()["workers"]);
}

/// The data path does not need its supervisor: stopped, it is only silent, and its workers go on.
#[test]
fn req_004_5_a_stopped_supervisor_stops_no_packet() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = relay(&lab);
    let pids = relay.worker_pids().unwrap();
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(10_000)).unwrap();
    let sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), 5_000, 10_000).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    relay.signal(Signal::SIGSTOP).unwrap();
    std::thread::sleep(Duration::from_millis(1_200));
    relay.signal(Signal::SIGCONT).unwrap();
    sending.wait().unwrap();
    assert_eq!(listener.wait().unwrap().lost, 0);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(relay.worker_pids().unwrap(), pids, "the supervisor took its own pause for theirs: {}", relay.log());
}

/// 004.3: no client survives the server; with `--linger 0` it leaves within 50 ms. 004.4: then the next start works at once.
#[test]
fn req_004_3_no_worker_survives_its_supervisor() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let mut gone = Vec::new();
    for _ in 0..if long() { 30 } else { 3 } {
        let mut relay = relay_with(&lab, &["--backend", "xsk", "--linger", "0"]);
        let workers = relay.worker_pids().unwrap();
        signal_pid(relay.pid(), Signal::SIGKILL).unwrap();
        gone.push(wait_dead(&workers, Duration::from_secs(5)).unwrap());
        relay.wait_exit(Duration::from_secs(5)).unwrap();
    }
    gone.sort_unstable();
    println!("supervisor killed: workers gone after p50 {:?}, max {:?}", at(&gone, 0.5), at(&gone, 1.0));
    assert!(at(&gone, 1.0) <= Duration::from_millis(if long() { 50 } else { 250 }), "{gone:?}");
    let _next = relay(&lab);
    forwards(&lab);
}

/// 004.4: a start is refused while a supervisor lives, and while only an orphan of it does; exit 2 names the holder.
#[test]
fn req_004_4_no_start_beside_a_living_server_or_client() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let rule = format!("r0 {GROUP} -> r1 {REWRITTEN} ttl=keep");
    let mut first = relay_with(&lab, &["--backend", "xsk", "--linger", "3s"]);
    let refused = |holders: &[u32]| {
        let mut second = start_relay_unready(&lab, &["--rule", &rule, "--backend", "xsk"]).unwrap();
        let status = second.wait_exit(Duration::from_secs(5)).unwrap();
        assert_eq!(status.code(), Some(2), "{}", second.log());
        let log = second.log();
        assert!(holders.iter().any(|pid| log.contains(&pid.to_string())), "{holders:?}: {log}");
    };
    let workers = first.worker_pids().unwrap();
    let supervisor = first.pid();
    refused(&[supervisor]);
    signal_pid(supervisor, Signal::SIGKILL).unwrap();
    first.wait_exit(Duration::from_secs(5)).unwrap();
    assert!(!is_dead(workers[0]), "it lingers");
    refused(&[&workers[..], &[supervisor]].concat());
    workers.iter().for_each(|pid| signal_pid(*pid, Signal::SIGKILL).unwrap());
    wait_dead(&workers, Duration::from_secs(5)).unwrap();
    let _third = relay(&lab);
    forwards(&lab);
}

/// 004.1: whatever a worker holds came from its supervisor: each of its sockets is one of the supervisor's, but for its end
/// of the life line; it holds no BPF object that the supervisor does not.
#[test]
fn req_004_1_workers_hold_only_what_the_supervisor_made() {
    needs_root!();
    let _turn = turn();
    for backend in ["xsk", "packet"] {
        let lab = Lab::simple().unwrap();
        let relay = relay_with(&lab, &["--backend", backend]);
        for worker in relay.worker_pids().unwrap() {
            let own: BTreeSet<String> = sockets(worker).difference(&sockets(relay.pid())).cloned().collect();
            assert_eq!(own.len(), 1, "{backend}: the life line alone, not {own:?}");
            assert!(bpf_objects(worker).is_subset(&bpf_objects(relay.pid())), "{backend}");
        }
    }
}

/// What a crash could leave: names in memory file systems, System V objects.
fn names() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for folder in ["/dev/shm", "/dev/mqueue", "/tmp"] {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // The laboratories of other tests come and go.
            if name.contains("relay") && !name.starts_with("relay-lab-") {
                found.insert(format!("{folder}/{name}"));
            }
        }
    }
    for kind in ["shm", "sem", "msg"] {
        let text = std::fs::read_to_string(format!("/proc/sysvipc/{kind}")).unwrap_or_default();
        found.extend(text.lines().skip(1).map(|line| format!("{kind} {}", line.split_whitespace().nth(1).unwrap_or_default())));
    }
    found
}

/// 002.8 and 003.12: kills at random moments under traffic (1,000 in the long form) lose no frame and leave nothing behind.
#[test]
fn req_002_8_random_kills_lose_no_frame_and_leave_nothing() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let before = names();
    let mut relay = relay(&lab);
    let objects = bpf_objects(relay.pid());
    let kills: u64 = if long() { 1_000 } else { 20 };
    let sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), 10_000, kills * 3_000).unwrap()).unwrap();
    let mut random = 88_172_645_463_325_252_u64;
    for number in 0..kills {
        let pids = relay.worker_pids().unwrap();
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_micros(2_000 + random % 30_000));
        // It may have died of something else: that would be a failure, and the pid says so.
        signal_pid(pids[0], Signal::SIGKILL).unwrap();
        wait_replaced(&relay, &pids, Duration::from_secs(20)).unwrap();
        if number % 10 == 9 {
            assert_frames_conserved(&relay.stats().unwrap());
        }
    }
    drop(sending);
    let begin = Instant::now();
    while relay.stats().unwrap()["frames"]["hand"] != 0 {
        assert!(begin.elapsed() < Duration::from_secs(2), "frames lost: {}", relay.stats().unwrap()["frames"]);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_frames_conserved(&relay.stats().unwrap());
    println!("{kills} kills: {}", relay.stats().unwrap()["frames"]);
    forwards(&lab);
    assert!(relay.sigterm(Duration::from_secs(5)).unwrap().success());
    assert_eq!(names(), before, "left behind");
    wait_unloaded(&objects).unwrap();
}

/// 000.4: channels are made before the worker is, so no start can race; 1,000 starts and stops in the long form.
#[test]
fn req_000_4_starts_and_stops_never_hang() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let mut longest = Duration::ZERO;
    for cycle in 0..if long() { 1_000 } else { 5 } {
        let begin = Instant::now();
        let mut relay = relay(&lab);
        // Every other one is stopped while its workers may still be starting.
        if cycle % 2 == 1 {
            drop(relay);
            relay = start_relay_unready(&lab, &["--rule", &format!("r0 {GROUP} -> r1 {REWRITTEN}"), "--backend", "xsk"]).unwrap();
            std::thread::sleep(Duration::from_millis(cycle % 97));
        }
        relay.signal(Signal::SIGTERM).unwrap();
        relay.wait_exit(Duration::from_secs(10)).unwrap();
        longest = longest.max(begin.elapsed());
    }
    println!("longest start and stop: {longest:?}");
}
