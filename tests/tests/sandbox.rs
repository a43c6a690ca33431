//! Workers live in a box (issue 7, 4): no capability, a system call filter, no new privileges; and a worker that makes a call
//! outside its list dies of SIGSYS, is replaced, and is counted.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use relay::lab::arms::{GROUP, REWRITTEN};
use relay_tests::process::wait_replaced;
use relay_tests::{Lab, Listener, needs_root, send_args, send_in_background, start_relay};
use std::time::Duration;

const PATHS: [&[&str]; 3] =
    [&["--backend", "xsk", "--pipeline", "fused"], &["--backend", "xsk", "--pipeline", "split"], &["--backend", "packet"]];
const COUNT: u64 = 5_000;

/// A line of /proc/PID/status, without its name.
fn status(pid: u32, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim_start_matches(':').trim().to_owned()
}

fn rule() -> String {
    format!("r0 {GROUP} -> r1 {REWRITTEN} ttl=keep")
}

fn assert_forwards(lab: &Lab) {
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(COUNT)).unwrap();
    send_in_background(lab, &send_args("s0", &GROUP.to_string(), 20_000, COUNT).unwrap()).unwrap().wait().unwrap();
    assert_eq!(listener.wait().unwrap().received, COUNT);
}

#[test]
fn every_thread_is_confined_and_forwards() {
    needs_root!();
    for path in PATHS {
        let lab = Lab::simple().unwrap();
        let rule = rule();
        let mut args = vec!["--rule", &rule];
        args.extend(path);
        let relay = start_relay(&lab, &args).unwrap();
        for pid in relay.worker_pids().unwrap() {
            assert_eq!(status(pid, "CapEff"), "0000000000000000", "{path:?}");
            assert_eq!(status(pid, "NoNewPrivs"), "1", "{path:?}");
            for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
                let task = task.unwrap().file_name().to_string_lossy().parse().unwrap();
                assert_eq!(status(task, "Seccomp"), "2", "{path:?}");
            }
        }
        assert_forwards(&lab);
        // The worker reads a new rule from its segment, which takes memory and no other call.
        relay.query(&["rule", "add", "r0 239.5.5.5:1 -> r1 239.6.6.6:1"]).unwrap();
        assert_forwards(&lab);
        let status = relay.status().unwrap();
        assert_eq!(status["workers"][0]["restarts"], 0, "{path:?}: {status}");
        assert!(!relay.log().contains("SIGSYS"), "{path:?}: {}", relay.log());
    }
}

/// Makes the process execute `socket(AF_INET, SOCK_DGRAM, 0)` by writing the instruction under its feet.
#[cfg(target_arch = "x86_64")]
fn inject_socket_call(pid: Pid) {
    ptrace::attach(pid).unwrap();
    assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::Stopped(..)));
    let mut registers = ptrace::getregs(pid).unwrap();
    (registers.rax, registers.rdi, registers.rsi, registers.rdx) = (libc::SYS_socket as u64, 2, 2, 0);
    // A thread stopped inside a system call would have that one restarted over ours.
    registers.orig_rax = u64::MAX;
    let at = registers.rip as ptrace::AddressType;
    let word = ptrace::read(pid, at).unwrap();
    // syscall; int3
    ptrace::write(pid, at, word & !0xff_ffff | 0x00cc_050f).unwrap();
    ptrace::setregs(pid, registers).unwrap();
    ptrace::detach(pid, None).unwrap();
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_stray_call_kills_the_worker_which_is_replaced_and_counted() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let rule = rule();
    let relay = start_relay(&lab, &["--rule", &rule, "--backend", "xsk", "--pipeline", "fused"]).unwrap();
    let pids = relay.worker_pids().unwrap();
    inject_socket_call(Pid::from_raw(pids[0] as i32));
    wait_replaced(&relay, &pids, Duration::from_secs(5)).unwrap();
    let status = relay.status().unwrap();
    assert_eq!(status["workers"][0]["restarts"], 1);
    assert!(relay.log().contains(&format!("{}", Signal::SIGSYS)), "{}", relay.log());
    assert_forwards(&lab);
}
