//! Faults beside a stream: it loses nothing (docs/reliability.md has the table, and where the other faults are tested).
//!
//! Every fault here is certain to happen: the test makes it itself and sees it before it judges. Rates that a busy machine carries.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use relay::control::message::PROTOCOL_VERSION;
use relay::lab::process::signal_pid;
use relay_tests::paths::{XSK_FUSED, renice, turn};
use relay_tests::process::{kib, wait_replaced};
use relay_tests::stream::Stream;
use relay_tests::{Lab, RelayProcess, interface_stats, needs_root, relay_bin, send_args, send_in_background};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, IoSlice, Read, Write, pipe};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

const RULE: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=stream";
const FROM: &str = "239.1.1.1:5000";
const TO: &str = "239.9.9.9:6000";
const RATE: u64 = 10_000;
/// Slow enough for the fill ring to last until a killed worker's successor forwards, also on a busy machine.
const RATE_OF_KILLS: u64 = 2_000;

/// A relay on AF_XDP whose standard error is this.
fn relay_with_stderr(lab: &Lab, stderr: Stdio) -> RelayProcess {
    renice("-15");
    let args = ["--backend", "xsk", "--rule", RULE];
    let relay = RelayProcess::start_with_stderr(&lab.relay, &relay_bin().unwrap(), &args, stderr);
    renice("0");
    let mut relay = relay.unwrap();
    relay.wait_ready().unwrap();
    relay
}

/// 1.5 s of the stream: every packet arrives once, in order, whole, while `fault` happens.
fn costs_nothing(lab: &Lab, relay: &RelayProcess, rate: u64, fault: impl FnMut()) {
    let stream = Stream { rule: "stream", from: FROM, to: TO, rate, count: rate * 3 / 2, worked: true };
    stream.loses_nothing(lab, relay, fault).unwrap();
}

/// Fills the pipe that is `fd` of this process to the last byte; how much went in. The relay's end stays blocking: this is another
/// open of the same pipe.
fn fill(fd: &impl AsRawFd) -> usize {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mut pipe = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap();
    let mut filled = 0;
    for piece in [&[b'x'; 4096][..], b"x"] {
        loop {
            match pipe.write(piece) {
                Ok(written) => filled += written,
                Err(error) => break assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
    }
    filled
}

/// A worker dies, which is told in the log, and its successor runs.
fn kill_a_worker(relay: &RelayProcess) {
    let pids = relay.worker_pids().unwrap();
    signal_pid(pids[0], Signal::SIGKILL).unwrap();
    wait_replaced(relay, &pids, Duration::from_secs(5)).unwrap();
}

/// The log's reader is stopped and its pipe full: the stream goes on across a worker's death, which is told there; the supervisor
/// answers; and the lines that were lost are counted once somebody reads again.
#[test]
fn a_stopped_log_reader_costs_lines_and_no_packet() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let (mut reader, writer) = pipe().unwrap();
    let mut relay = relay_with_stderr(&lab, writer.try_clone().unwrap().into());
    let filled = fill(&writer);
    costs_nothing(&lab, &relay, RATE_OF_KILLS, || kill_a_worker(&relay));
    reader.read_exact(&mut vec![0; filled]).unwrap();
    assert!(relay.sigterm(Duration::from_secs(2)).unwrap().success());
    drop((relay, writer));
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    let told = log.lines().find(|line| line.contains("log lines lost")).unwrap_or_else(|| panic!("no loss of lines is told: {log}"));
    // Behind what filled the pipe.
    println!("{}", told.trim_start_matches('x'));
}

/// A log on a full disk: every line fails from the first on, and nothing else does.
#[test]
fn a_log_on_a_full_disk_costs_no_packet() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let mut relay = relay_with_stderr(&lab, File::options().write(true).open("/dev/full").unwrap().into());
    costs_nothing(&lab, &relay, RATE_OF_KILLS, || kill_a_worker(&relay));
    assert!(relay.sigterm(Duration::from_secs(2)).unwrap().success());
}

fn message(len: u32, document: &[u8]) -> Vec<u8> {
    [&len.to_le_bytes(), &[PROTOCOL_VERSION as u8][..], document].concat()
}

/// One bad client in the manner of its number. What it writes may be refused: the connection is then closed under it.
fn misbehave(client: &mut UnixStream, manner: usize) {
    client.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
    let stats = br#"{"Stats":{}}"#;
    let _ = match manner % 6 {
        0 => client.write_all(&message(1 << 30, b"{}")),
        1 => client.write_all(&[0xa5; 65_536]),
        2 => client.write_all(&message(65_000, &[b' '; 60_000])),
        3 => client.write_all(&message(stats.len() as u32, stats).repeat(50)),
        4 => {
            let null = File::open("/dev/null").unwrap();
            let descriptors = [null.as_raw_fd(); 16];
            let bytes = [IoSlice::new(&[9, 0])];
            sendmsg::<()>(client.as_raw_fd(), &bytes, &[ControlMessage::ScmRights(&descriptors)], MsgFlags::MSG_NOSIGNAL, None)
                .map_or(Ok(()), |_| Ok(()))
        }
        _ => Ok(()),
    };
}

/// 64 clients at a time: a length of 1 GiB, garbage, messages that never end, answers nobody reads, descriptors, silence.
#[test]
fn a_flood_of_clients_costs_no_packet_and_little_memory() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = XSK_FUSED.start(&lab, &[RULE]).unwrap();
    let before = kib(relay.pid(), "VmRSS").unwrap();
    // The peak begins anew.
    std::fs::write(format!("/proc/{}/clear_refs", relay.pid()), "5").unwrap();
    costs_nothing(&lab, &relay, RATE, || {
        let begin = Instant::now();
        let mut clients = 0;
        while begin.elapsed() < Duration::from_secs(1) {
            let mut round: Vec<_> = (0..64).map(|_| UnixStream::connect(relay.socket()).unwrap()).collect();
            round.iter_mut().enumerate().for_each(|(manner, client)| misbehave(client, manner));
            clients += round.len();
            std::thread::sleep(Duration::from_millis(50));
        }
        relay.wait_status("no answer after the flood", Duration::from_secs(5), |_| true).unwrap();
        println!("{clients} clients");
    });
    let grown = kib(relay.pid(), "VmHWM").unwrap().saturating_sub(before);
    println!("the supervisor's memory grew by {grown} KiB at most");
    assert!(grown <= 8 << 10, "{grown} KiB");
}

/// As much traffic again that no rule wants, on the stream's port: the stream loses nothing.
#[test]
fn a_flood_of_other_traffic_costs_no_packet() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = XSK_FUSED.start(&lab, &[RULE]).unwrap();
    let flood = send_in_background(&lab, &send_args("s0", "239.1.1.2:5000", RATE, u64::MAX).unwrap()).unwrap();
    let passed = || passed(&relay);
    let before = passed();
    costs_nothing(&lab, &relay, RATE, || std::thread::sleep(Duration::from_secs(1)));
    let others = passed() - before;
    drop(flood);
    println!("{others} packets of others");
    assert!(others >= RATE, "there was no flood: {others}");
}

/// Packets that no rule wanted.
fn passed(relay: &RelayProcess) -> u64 {
    let stats = relay.stats().unwrap();
    interface_stats(&stats, "r0").unwrap()["passed"].as_u64().unwrap_or(0)
}
