//! Who may do what while the relay relays (DECISIONS §6), who may ask it for anything, and what becomes of a worker that hangs
//! (DECISIONS §5).
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::Signal;
use relay::lab::arms::{GROUP, REWRITTEN};
use relay::lab::process::signal_pid;
use relay::lab::recv::Verdict;
use relay_tests::process::{is_dead, status_field, wait_replaced};
use relay_tests::{
    Lab, Listener, RelayProcess, assert_frames_conserved, needs_root, relay_bin, send_args, send_in_background, start_relay,
};
use std::fs::{Permissions, copy, set_permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// CAP_KILL, SETGID, SETUID, NET_ADMIN, NET_RAW, IPC_LOCK, BPF (linux/capability.h).
const SUPERVISOR: u64 = 1 << 5 | 1 << 6 | 1 << 7 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 39;

fn relay(lab: &Lab, args: &[&str]) -> RelayProcess {
    let rule = format!("r0 {GROUP} -> r1 {REWRITTEN} ttl=keep");
    let mut all = vec!["--rule", &rule];
    all.extend(args);
    start_relay(lab, &all).unwrap()
}

fn hex(pid: u32, key: &str) -> u64 {
    u64::from_str_radix(&status_field(pid, key).unwrap(), 16).unwrap()
}

#[test]
fn workers_have_no_privilege_while_they_relay() {
    needs_root!();
    for backend in [["--backend", "xsk"], ["--backend", "packet"]] {
        let lab = Lab::simple().unwrap();
        let relay = relay(&lab, &backend);
        let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(10_000)).unwrap();
        let _sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), 20_000, 10_000).unwrap()).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let workers = relay.worker_pids().unwrap();
        assert!(!workers.is_empty());
        for pid in workers {
            for set in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
                assert_eq!(hex(pid, set), 0, "{set} of a worker, {backend:?}");
            }
            assert_eq!(status_field(pid, "NoNewPrivs").unwrap(), "1");
            let ids = [status_field(pid, "Uid").unwrap(), status_field(pid, "Gid").unwrap()];
            assert!(ids.iter().all(|ids| ids.split_whitespace().all(|id| id != "0")), "{ids:?}");
            assert_eq!(status_field(pid, "Groups").unwrap(), "", "supplementary groups");
        }
        let extra = hex(relay.pid(), "CapEff") & !SUPERVISOR;
        assert_eq!(extra, 0, "the supervisor keeps {extra:#x} beyond DECISIONS §6");
        assert_eq!(hex(relay.pid(), "CapPrm") & !SUPERVISOR, 0);
        assert_eq!(listener.wait().unwrap().verdict, Verdict::Pass, "it relays meanwhile, {backend:?}");
    }
}

#[test]
fn a_worker_that_hangs_is_replaced_and_nothing_is_lost() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let relay = relay(&lab, &["--backend", "xsk"]);
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(4_000)).unwrap();
    // Slow enough for the fill ring to last until the worker is declared hung.
    let sending = send_in_background(&lab, &send_args("s0", &GROUP.to_string(), 1_000, 4_000).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let workers = relay.worker_pids().unwrap();
    let begin = Instant::now();
    signal_pid(workers[0], Signal::SIGSTOP).unwrap();
    wait_replaced(&relay, &workers, Duration::from_secs(5)).unwrap();
    println!("stopped worker replaced after {:?}", begin.elapsed());
    assert!(relay.log().contains("worker hangs"), "{}", relay.log());
    sending.wait().unwrap();
    let report = listener.wait().unwrap();
    println!("lost {}, duplicated {}, silent for {} µs", report.lost, report.duplicated, report.longest_silence_us);
    assert_eq!((report.lost, report.duplicated, report.verdict), (0, 0, Verdict::Pass), "{report:?}");
    assert_frames_conserved(&relay.stats().unwrap());
}

/// `PROGRAM ARGS --socket …` in the relay's namespace, of a user who has no business there if `stranger`: exit code (124: it still ran
/// after 20 s) and words.
fn ask(lab: &Lab, program: &Path, relay: &RelayProcess, stranger: bool, args: &[&str]) -> (Option<i32>, String) {
    let mut command = lab.relay.command("timeout").unwrap();
    command.arg("20");
    if stranger {
        command.args(["setpriv", "--reuid", "65533", "--regid", "65533", "--clear-groups"]);
    }
    let output = command.arg(program).args(args).arg("--socket").arg(relay.socket()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

/// The mode of a file is the first wall. Here it stands open, and the keeper's socket is no file at all: the second wall has to hold,
/// which is who asks. A stranger may neither ask, nor take over, nor end what a dead supervisor has left.
#[test]
fn another_user_is_refused_whatever_the_modes_of_files() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let mut relay = relay(&lab, &["--backend", "xsk", "--linger", "60s"]);
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("relay");
    copy(relay_bin().unwrap(), &program).unwrap();
    let socket = relay.socket();
    for (path, mode) in [(directory.path(), 0o755), (socket.parent().unwrap(), 0o755), (socket.as_path(), 0o666)] {
        set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    let (code, text) = ask(&lab, &program, &relay, true, &["--version"]);
    if code != Some(0) {
        return println!("SKIPPED: no program as another user: {text}");
    }
    let (code, text) = ask(&lab, &program, &relay, true, &["status"]);
    assert!(code == Some(2) && text.contains("permission denied") && text.contains("user of the daemon"), "{code:?}: {text}");
    let (code, text) = ask(&lab, &program, &relay, true, &["run", "--takeover", "--backend", "xsk"]);
    assert!(code == Some(2) && text.contains("only root and the user of the relay may take over"), "{code:?}: {text}");
    // The keeper is told of everything once a turn of the supervisor's loop.
    std::thread::sleep(Duration::from_millis(200));
    let workers = relay.worker_pids().unwrap();
    relay.kill().unwrap();
    let (code, text) = ask(&lab, &program, &relay, true, &["stop"]);
    assert!(code == Some(3) && !workers.iter().any(|pid| is_dead(*pid)), "a stranger has ended it: {code:?}: {text}");
    let (code, text) = ask(&lab, &program, &relay, false, &["stop"]);
    assert!(code == Some(0) && workers.iter().all(|pid| is_dead(*pid)), "{code:?}: {text}");
}
