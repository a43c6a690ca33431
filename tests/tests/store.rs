//! Every process of the relay is killed at once, and a successor goes on with what the service manager has kept (issue 7.3).
//!
//! The test is the manager: it keeps descriptors as systemd does (`relay::lab::manager`) and passes them on; scripts/try_service.sh has
//! the real one. A run in which a receiver dropped by itself, or the machine left no room, says nothing and is repeated.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;
use relay::lab::arms::{GROUP, REWRITTEN};
use relay::lab::manager::Manager;
use relay::lab::process::signal_pid;
use relay::lab::recv::{Report, describe};
use relay_tests::paths::{self, Outside, Path, long, turn};
use relay_tests::process::{bpf_objects, is_dead, wait_dead, wait_unloaded};
use relay_tests::{Lab, Listener, RelayProcess, assert_frames_conserved, needs_root, relay_bin, send, send_args, send_in_background};
use std::os::fd::RawFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Numbers from which descriptors wait to be passed on.
const WAITING: RawFd = 400;

/// A service manager in a thread.
struct Service {
    manager: Arc<Mutex<Manager>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    folder: TempDir,
}

impl Service {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let manager = Arc::new(Mutex::new(Manager::listen(&folder.path().join("notify")).unwrap()));
        let over = Arc::<AtomicBool>::default();
        let (ears, end) = (Arc::clone(&manager), Arc::clone(&over));
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                ears.lock().unwrap().hear(64);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self { manager, over, thread: Some(thread), folder }
    }

    fn manager(&self) -> MutexGuard<'_, Manager> {
        self.manager.lock().unwrap()
    }

    fn count(&self) -> usize {
        self.manager().stored().count()
    }

    /// Starts the service: `relay run` with all that is stored, under a shell that moves it to where it belongs.
    fn start(&self, lab: &Lab, args: &[&str]) -> RelayProcess {
        let stored: Vec<(String, RawFd)> =
            self.manager().stored().map(|(name, fd)| (name.clone(), fcntl(fd, FcntlArg::F_DUPFD(WAITING)).unwrap())).collect();
        let moves: Vec<String> = stored.iter().zip(3..).map(|((_, from), to)| format!("{to}<&{from}")).collect();
        let ends: Vec<String> = stored.iter().map(|(_, from)| format!("{from}<&-")).collect();
        let names: Vec<&str> = stored.iter().map(|(name, _)| name.as_str()).collect();
        let script = self.folder.path().join("relay");
        let lines = [
            "#!/bin/bash".into(),
            "if [ \"$1\" = run ]; then".into(),
            format!("exec {} {}", moves.join(" "), ends.join(" ")),
            format!("export NOTIFY_SOCKET={} FDSTORE=1000", self.folder.path().join("notify").display()),
            format!("export LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES='{}'", names.len(), names.join(":")),
            "fi".into(),
            format!("exec {} \"$@\"", relay_bin().unwrap().display()),
        ];
        std::fs::write(&script, lines.join("\n")).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut relay = RelayProcess::start(&lab.relay, &script, args).unwrap();
        stored.iter().for_each(|(_, fd)| nix::unistd::close(*fd).unwrap());
        relay.wait_ready().unwrap();
        relay
    }

    /// Until the manager has all that the supervisor wants to be kept.
    fn settle(&self, relay: &RelayProcess) {
        let limit = Instant::now() + Duration::from_secs(20);
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let wanted = relay.status().unwrap()["supervisor"]["stored"].as_u64().unwrap();
            if wanted > 0 && wanted == self.count() as u64 {
                return;
            }
            assert!(Instant::now() < limit, "{wanted} to be kept, {} are: {}", self.count(), relay.log());
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn keeper(relay: &RelayProcess) -> u32 {
    u32::try_from(relay.status().unwrap()["supervisor"]["keeper"].as_u64().unwrap()).unwrap()
}

/// Supervisor, keeper, workers: nobody is left who could give anything to anybody.
fn kill_everything(relay: &mut RelayProcess) {
    let others = [&relay.worker_pids().unwrap()[..], &[keeper(relay)]].concat();
    let everybody = std::iter::once(relay.pid()).chain(others.iter().copied());
    everybody.for_each(|pid| signal_pid(pid, Signal::SIGKILL).unwrap());
    relay.wait_exit(Duration::from_secs(10)).unwrap();
    wait_dead(&others, Duration::from_secs(10)).unwrap();
}

fn has_bash() -> bool {
    let found = std::process::Command::new("bash").args(["-c", ":"]).status().is_ok();
    if !found {
        println!("SKIPPED: needs bash, which can move descriptors with two digits");
    }
    found
}

fn args(path: &Path) -> Vec<&'static str> {
    let rule = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=a";
    assert!(rule.contains(&GROUP.to_string()) && rule.contains(&REWRITTEN.to_string()));
    [path.args, &["--rule", rule, "--linger", "60s", "--takeover"]].concat()
}

fn forwards(lab: &Lab) {
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(500)).unwrap();
    send(lab, &send_args("s0", &GROUP.to_string(), 5_000, 500).unwrap()).unwrap();
    let report = listener.wait().unwrap();
    assert_eq!((report.received, report.lost), (500, 0));
}

/// One stream across the death of everybody; how many of it were lost by name or by others than the relay.
fn run(path: &Path, lab: &Lab, service: &Service) -> (RelayProcess, Report, u64) {
    let mut relay = service.start(lab, &args(path));
    path.check(&relay).unwrap();
    relay.command(&["rule", "add", "r0 239.8.8.8:7000 -> r1; id=later"]).unwrap();
    let (rules, before) = (relay.rules().unwrap(), relay.stats().unwrap());
    service.settle(&relay);
    let outside = Outside::of(lab, &relay, "a").unwrap();
    let (rate, count) = if long() { (10_000, 40_000) } else { (5_000, 7_500) };
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(count)).unwrap();
    let sending = send_in_background(lab, &send_args("s0", &GROUP.to_string(), rate, count).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let begin = Instant::now();
    kill_everything(&mut relay);
    let heir = service.start(lab, &args(path));
    println!("{}: a successor forwards {:?} after everybody's death", path.name, begin.elapsed());
    assert_eq!(sending.wait().unwrap().sent, count);
    let report = listener.wait().unwrap();
    assert!(heir.log().contains("relay taken over") && heir.log().contains("service manager"), "{}", heir.log());
    path.check(&heir).unwrap();
    assert_eq!(heir.rules().unwrap(), rules, "also those that were added at run time");
    std::thread::sleep(Duration::from_millis(200));
    let after = heir.stats().unwrap();
    assert_frames_conserved(&after);
    println!("{}: {}", path.name, describe(&report));
    if report.lost == 0 {
        let moved = paths::moved(&before, &after, "a").unwrap();
        assert_eq!(moved, paths::Moved::all(count, 1), "the counters go on where they were: {}", heir.log());
    }
    let named = paths::no_room(&after) + report.socket_drops + outside.lost(&heir).unwrap();
    (heir, report, named)
}

/// Loses only what has a name; the relay that came out of it, with its world.
fn across_the_death_of_everybody(path: &Path) -> Option<(Lab, Service, RelayProcess)> {
    for _ in 0..3 {
        let (lab, service) = (Lab::simple().unwrap(), Service::new());
        let (heir, report, named) = run(path, &lab, &service);
        assert_eq!((report.duplicated, report.reordered, report.corrupted), (0, 0, 0), "{}", path.name);
        if report.lost == 0 {
            return Some((lab, service, heir));
        }
        assert!(report.lost <= named, "{}: {} lost, {named} of them by name: {}", path.name, report.lost, heir.log());
        eprintln!("void, once more: the machine had no room for {named}");
    }
    println!("SKIPPED {}: the machine is too busy to judge the relay", path.name);
    None
}

/// Nothing is lost; what can't be gone on with is closed, and the next start is a clean one; a stop leaves nothing there.
#[test]
fn everybody_is_killed_and_no_packet_is_lost() {
    needs_root!();
    let _turn = turn();
    if !has_bash() {
        return;
    }
    let Some((lab, service, mut relay)) = across_the_death_of_everybody(&paths::XSK_FUSED) else { return };
    service.settle(&relay);
    let objects = bpf_objects(relay.pid());
    kill_everything(&mut relay);
    let mut relay = service.start(&lab, &[&args(&paths::XSK_FUSED)[..], &["--frames", "1024"]].concat());
    assert!(relay.log().contains("it had --frames 32768") && relay.log().contains("starts clean"), "{}", relay.log());
    wait_unloaded(&objects).unwrap();
    forwards(&lab);
    service.settle(&relay);
    assert!(relay.sigterm(Duration::from_secs(5)).unwrap().success());
    let limit = Instant::now() + Duration::from_secs(10);
    while service.count() > 0 {
        assert!(Instant::now() < limit, "{:?}", service.manager().stored().collect::<Vec<_>>());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Also where other paths carry the rule, but for what dies with an io_uring. A start that takes nothing over leaves nothing there.
#[test]
#[ignore = "ten seconds; cargo test -p relay-tests --test store -- --ignored"]
fn nor_on_other_paths() {
    needs_root!();
    let _turn = turn();
    if !has_bash() {
        return;
    }
    across_the_death_of_everybody(&paths::XSK_SPLIT);
    let Some((lab, service, mut relay)) = across_the_death_of_everybody(&paths::KERNEL) else { return };
    service.settle(&relay);
    kill_everything(&mut relay);
    let plain: Vec<&str> = args(&paths::KERNEL).into_iter().filter(|argument| *argument != "--takeover").collect();
    let relay = service.start(&lab, &plain);
    forwards(&lab);
    assert_eq!((service.count(), relay.status().unwrap()["supervisor"]["stored"].as_u64()), (0, Some(0)));
}

/// A worker that is left and does not leave is killed before its successor starts, or before the clean start of another relay.
#[test]
#[ignore = "ten seconds; cargo test -p relay-tests --test store -- --ignored"]
fn a_worker_that_hangs_is_ended_first() {
    needs_root!();
    let _turn = turn();
    if !has_bash() {
        return;
    }
    let (lab, service) = (Lab::simple().unwrap(), Service::new());
    let with_frames = |frames| [&args(&paths::XSK_FUSED)[..], &["--frames", frames]].concat();
    let mut relay = service.start(&lab, &with_frames("2048"));
    for (frames, words) in [("2048", "relay taken over"), ("1024", "starts clean")] {
        service.settle(&relay);
        let (workers, keeper) = (relay.worker_pids().unwrap(), keeper(&relay));
        workers.iter().for_each(|pid| signal_pid(*pid, Signal::SIGSTOP).unwrap());
        [keeper, relay.pid()].into_iter().for_each(|pid| signal_pid(pid, Signal::SIGKILL).unwrap());
        relay.wait_exit(Duration::from_secs(10)).unwrap();
        relay = service.start(&lab, &with_frames(frames));
        assert!(workers.iter().all(|pid| is_dead(*pid)), "{}", relay.log());
        assert!(relay.log().contains(words), "{words}: {}", relay.log());
        forwards(&lab);
    }
}
