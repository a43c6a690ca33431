//! A batch that kills its workers: the packet at the cursor is skipped and counted, the others arrive once, in order.
//!
//! No packet is known to do that, so the deaths are made: the worker is stopped in a batch, the journal gets the two attempts that
//! two deaths would have noted, and the worker is killed. (`datapath/crash.rs` has a packet that really kills every worker that
//! comes to it.) Must never count on a certain
//! batch: it is done again until a packet was skipped.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use relay::datapath::journal::{ARMED, Journal};
use relay::lab::process::signal_pid;
use relay::plan::work::WorkLayout;
use relay::shm::{Access, Segment};
use relay_tests::paths::{XSK_FUSED, turn};
use relay_tests::process::{memory_named, wait_replaced};
use relay_tests::{
    Lab, Listener, RelayProcess, assert_frames_conserved, assert_rules_conserved, interface_stats, needs_root, send_args,
    send_in_background,
};
use std::fs::File;
use std::time::Duration;

const RULE: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=stream";
const RATE: u64 = 2_000;
/// Workers killed at most.
const ROUNDS: u32 = 10;
/// Where the cursor stands in a journal.
const CURSOR: usize = 8;

/// Of a worker with the frames and the pipeline of this test.
fn layout() -> WorkLayout {
    WorkLayout::new(1 << 15, 1 << 12)
}

/// The journal of the only worker's ingress thread, as its successors will find it.
fn journal(relay: &RelayProcess) -> Journal {
    let path = memory_named(relay.pid(), "relay-work").unwrap().remove(0);
    let file = File::options().read(true).write(true).open(path).unwrap();
    let (_, mapping) = Segment::join(file.into(), Access::ReadWrite).unwrap().into_parts();
    Journal::attach(&mapping, layout().ingress_journal).unwrap()
}

/// Where the worker has mapped its journal's cursor.
fn cursor(pid: u32) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let line = maps.lines().find(|line| line.contains("relay-work")).unwrap();
    let start = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
    start + (layout().ingress_journal + CURSOR) as u64
}

fn wait(pid: Pid) -> WaitStatus {
    waitpid(pid, Some(WaitPidFlag::__WALL)).unwrap()
}

/// Stops the worker when it comes to a packet, then kills it as if that batch had killed two before it. The reason why not, where
/// the processor has no watchpoints.
fn poison(relay: &RelayProcess, journal: &Journal) -> Result<(), String> {
    let pids = relay.worker_pids().unwrap();
    let (pid, at) = (Pid::from_raw(pids[0].cast_signed()), cursor(pids[0]));
    ptrace::attach(pid).unwrap();
    assert!(matches!(wait(pid), WaitStatus::Stopped(..)));
    let register = |number: usize| (std::mem::offset_of!(libc::user, u_debugreg) + number * 8) as ptrace::AddressType;
    // Register 0 watches four bytes for writes.
    let watched = ptrace::write_user(pid, register(0), at as i64).and_then(|()| ptrace::write_user(pid, register(7), 0xd_0001));
    if let Err(errno) = watched {
        return Err(format!("no watchpoints: {errno}"));
    }
    ptrace::cont(pid, None).unwrap();
    // Another signal than the trap is somebody else's, such as the supervisor's, which takes the worker for hung.
    if matches!(wait(pid), WaitStatus::Stopped(_, Signal::SIGTRAP)) && journal.state() == ARMED {
        journal.attempt();
        journal.attempt();
    }
    let _ = signal_pid(pids[0], Signal::SIGKILL);
    while matches!(waitpid(pid, Some(WaitPidFlag::__WALL)), Ok(WaitStatus::Stopped(..))) {
        let _ = ptrace::cont(pid, None);
    }
    wait_replaced(relay, &pids, Duration::from_secs(10)).unwrap();
    Ok(())
}

fn skipped(relay: &RelayProcess) -> u64 {
    let stats = relay.stats().unwrap();
    let interface = interface_stats(&stats, "r0").unwrap();
    interface["drops"]["poison"].as_u64().unwrap_or(0)
}

#[test]
fn a_batch_that_kills_its_workers_costs_the_packet_at_the_cursor() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = XSK_FUSED.start(&lab, &[RULE]).unwrap();
    let journal = journal(&relay);
    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", None).unwrap();
    let sending = send_in_background(&lab, &send_args("s0", "239.1.1.1:5000", RATE, RATE * 30).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let mut rounds = 0;
    while skipped(&relay) == 0 && rounds < ROUNDS {
        if let Err(reason) = poison(&relay, &journal) {
            return println!("SKIPPED: {reason}");
        }
        rounds += 1;
    }
    std::thread::sleep(Duration::from_millis(200));
    drop(sending);
    std::thread::sleep(Duration::from_millis(200));
    let report = listener.finish().unwrap();
    let skipped = skipped(&relay);
    println!("{skipped} packet skipped after {rounds} workers, {} lost", report.lost);
    assert_eq!(skipped, 1, "{}", relay.stats().unwrap());
    assert_eq!((report.lost, report.duplicated, report.reordered, report.corrupted), (1, 0, 0, 0), "{}", relay.stats().unwrap());
    let stats = relay.stats().unwrap();
    assert_rules_conserved(&stats);
    assert_frames_conserved(&stats);
}
