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

/// Every thread of the supervisor has a list of its own, and its workers forward behind theirs.
#[test]
fn the_supervisor_is_confined_with_all_its_threads() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let rule = rule();
    let relay = start_relay(&lab, &["--rule", &rule, "--metrics", "127.0.0.1:0"]).unwrap();
    let tasks: Vec<_> = std::fs::read_dir(format!("/proc/{}/task", relay.pid())).unwrap().map(|task| task.unwrap().file_name()).collect();
    assert!(tasks.len() > 1, "no thread for metrics: {tasks:?}");
    for task in tasks {
        let task = task.to_string_lossy().parse().unwrap();
        assert_eq!((status(task, "Seccomp").as_str(), status(task, "NoNewPrivs").as_str()), ("2", "1"));
    }
    assert_forwards(&lab);
    relay.query(&["rule", "add", "r0 239.5.5.5:1 -> r1 239.6.6.6:1"]).unwrap();
    assert_forwards(&lab);
    assert!(!relay.log().contains("ENOSYS") && !relay.log().contains("not implemented"), "{}", relay.log());
}

/// Stops a process and writes the instruction of a system call under its feet; its registers, and the word that stood there.
#[cfg(target_arch = "x86_64")]
fn stop_at_a_call(pid: Pid) -> (libc::user_regs_struct, i64) {
    ptrace::attach(pid).unwrap();
    assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::Stopped(..)));
    let registers = ptrace::getregs(pid).unwrap();
    let at = registers.rip as ptrace::AddressType;
    let word = ptrace::read(pid, at).unwrap();
    // syscall; int3
    ptrace::write(pid, at, word & !0xff_ffff | 0x00cc_050f).unwrap();
    (registers, word)
}

/// Number and arguments of the call for a process that is stopped so.
#[cfg(target_arch = "x86_64")]
fn set_call(pid: Pid, mut registers: libc::user_regs_struct, call: [u64; 4]) {
    [registers.rax, registers.rdi, registers.rsi, registers.rdx] = call;
    // A thread stopped inside a system call would have that one restarted over ours.
    registers.orig_rax = u64::MAX;
    ptrace::setregs(pid, registers).unwrap();
}

/// Has a process make system calls; what each returned. It goes on as if nothing had been.
#[cfg(target_arch = "x86_64")]
fn calls_of(pid: Pid, calls: &[[u64; 4]]) -> Vec<i64> {
    let (saved, word) = stop_at_a_call(pid);
    let returned = calls.iter().map(|call| {
        set_call(pid, saved, *call);
        ptrace::cont(pid, None).unwrap();
        assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::Stopped(_, Signal::SIGTRAP)));
        ptrace::getregs(pid).unwrap().rax.cast_signed()
    });
    let returned = returned.collect();
    ptrace::write(pid, saved.rip as ptrace::AddressType, word).unwrap();
    ptrace::setregs(pid, saved).unwrap();
    ptrace::detach(pid, None).unwrap();
    returned
}

/// What a supervisor never needs is refused as if the kernel did not have it; it forwards on, and nobody is replaced.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_stray_call_of_the_supervisor_is_refused() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let rule = rule();
    let relay = start_relay(&lab, &["--rule", &rule, "--backend", "xsk", "--pipeline", "fused"]).unwrap();
    let number = |call: i64| call.cast_unsigned();
    let stray = [
        [number(libc::SYS_ptrace), 16, 1, 0],
        [number(libc::SYS_mount), 0, 0, 0],
        [number(libc::SYS_init_module), 0, 0, 0],
        [number(libc::SYS_kexec_load), 0, 0, 0],
        [number(libc::SYS_execve), 0, 0, 0],
        [number(libc::SYS_unshare), libc::CLONE_NEWNET as u64, 0, 0],
        [number(libc::SYS_setns), u64::MAX, 0, 0],
        [number(libc::SYS_perf_event_open), 0, 0, 0],
        // Arguments: AF_VSOCK; PR_SET_PDEATHSIG; TIOCSTI; BPF_PROG_LOAD; a namespace for a child; anonymous memory to execute.
        [number(libc::SYS_socket), libc::AF_VSOCK as u64, libc::SOCK_STREAM as u64, 0],
        [number(libc::SYS_prctl), libc::PR_SET_PDEATHSIG as u64, 0, 0],
        [number(libc::SYS_ioctl), 0, libc::TIOCSTI, 0],
        [number(libc::SYS_bpf), 5, 0, 0],
        [number(libc::SYS_clone), libc::CLONE_NEWUSER as u64, 0, 0],
        [number(libc::SYS_mprotect), 0, 4096, libc::PROT_EXEC as u64],
    ];
    let allowed = [[number(libc::SYS_getpid), 0, 0, 0], [number(libc::SYS_socket), libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0]];
    let returned = calls_of(Pid::from_raw(relay.pid().cast_signed()), &[&stray[..], &allowed[..]].concat());
    let refused = i64::from(-libc::ENOSYS);
    assert_eq!(returned[..stray.len()], vec![refused; stray.len()], "{returned:?}");
    assert_eq!(returned[stray.len()], i64::from(relay.pid()), "{returned:?}");
    assert!(returned[stray.len() + 1] > 0, "{returned:?}");
    assert_forwards(&lab);
    assert_eq!(relay.status().unwrap()["workers"][0]["restarts"], 0);
}

/// Makes the process execute `socket(AF_INET, SOCK_DGRAM, 0)`.
#[cfg(target_arch = "x86_64")]
fn inject_socket_call(pid: Pid) {
    let (registers, _) = stop_at_a_call(pid);
    set_call(pid, registers, [libc::SYS_socket as u64, 2, 2, 0]);
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
