//! `engine=coalesce`: what leaves in super-frames arrives as what was sent, at every kind of receiver, whatever happens to the worker.
//!
//! The receivers are ordinary UDP sockets; the kernel between has UDP GRO off unless a test turns it on. Rates that make runs.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use nix::unistd::Pid;
use relay_tests::paths::{Moved, Path, XSK_COALESCE, XSK_COALESCE_SPLIT, await_moved};
use relay_tests::{
    Lab, Listener, RelayProcess, assert_frames_conserved, assert_rules_conserved, coalescing, needs_root, send, send_args,
    send_in_background, start_relay,
};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

coalescing!(
    a_stream_arrives_whole_and_in_order,
    sixteen_outputs_get_their_own,
    mixed_sizes_and_flows_keep_their_order,
    a_killed_worker_sends_nothing_twice,
    a_receiver_with_udp_gro_sees_whole_datagrams,
);

const GROUP: &str = "239.1.1.1:5000";
const TO: &str = "239.9.9.9:6000";
const COUNT: u64 = 10_000;
const RATE: u64 = 100_000;

/// Sends `COUNT` datagrams in bursts that find the worker stopped, so that they wait as batches however slow the machine is.
fn send_in_bursts(lab: &Lab, relay: &RelayProcess, to: &str, count: u64, bursts: u64) {
    let signal = |signal: Signal| {
        for pid in relay.worker_pids().unwrap() {
            kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
        }
    };
    for burst in 0..bursts {
        let mut args = send_args("s0", to, RATE, count / bursts).unwrap();
        args.first = burst * (count / bursts);
        signal(Signal::SIGSTOP);
        let sent = send(lab, &args);
        signal(Signal::SIGCONT);
        assert_eq!(sent.unwrap().sent, count / bursts);
        std::thread::sleep(Duration::from_millis(60));
    }
}

/// What came of the bursts: everything, once, in order.
fn assert_whole(listener: Listener, count: u64) {
    let report = listener.wait().unwrap();
    let got = (report.received, report.lost, report.duplicated, report.reordered, report.corrupted, report.foreign);
    assert_eq!(got, (count, 0, 0, 0, 0, 0), "{report:?}");
}

/// The rule is still on the engine, and super-frames have left r1: fewer skbs than datagrams.
fn skbs_sent(lab: &Lab) -> u64 {
    let text = lab.relay.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap().unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("r1:")).unwrap();
    line.split_whitespace().nth(9).unwrap().parse().unwrap()
}

fn closes(relay: &RelayProcess, path: &Path) {
    path.check(relay).unwrap();
    let stats = relay.stats().unwrap();
    assert_rules_conserved(&stats);
    assert_frames_conserved(&stats);
}

fn a_stream_arrives_whole_and_in_order(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=a"]).unwrap();
    let before = skbs_sent(&lab);
    let listener = Listener::on(lab.sink(1), "k1", TO, Some(COUNT)).unwrap();
    let counted = relay.stats().unwrap();
    send_in_bursts(&lab, &relay, GROUP, COUNT, 20);
    assert_whole(listener, COUNT);
    await_moved(&relay, &counted, "a", &Moved::all(COUNT, 1)).unwrap();
    let skbs = skbs_sent(&lab) - before;
    assert!(skbs < COUNT / 4, "{skbs} skbs for {COUNT} datagrams: nothing was coalesced");
    closes(&relay, path);
}

fn sixteen_outputs_get_their_own(path: &Path) {
    let lab = Lab::simple().unwrap();
    let groups: Vec<String> = (1..=16).map(|n| format!("239.8.0.{n}:{}", 6000 + n)).collect();
    let outputs: Vec<String> = groups.iter().enumerate().map(|(n, to)| format!("r1 {to} ttl={}", n + 3)).collect();
    let relay = path.start(&lab, &[&format!("r0 239.1.1.1:5000 -> {}; id=a", outputs.join(", "))]).unwrap();
    // The burst takes more frames than there are free ones (16,384), so they have to come back as fast as they go. A thread of its own
    // that sends them may be late, so there the burst takes no more than there are.
    let count = if path.name == XSK_COALESCE_SPLIT.name { 1_000 } else { 2_000 };
    let listeners: Vec<Listener> = groups.iter().map(|to| Listener::on(lab.sink(1), "k1", to, Some(count)).unwrap()).collect();
    let (counted, before) = (relay.stats().unwrap(), skbs_sent(&lab));
    send_in_bursts(&lab, &relay, GROUP, count, 1);
    await_moved(&relay, &counted, "a", &Moved::all(count, 16)).unwrap();
    listeners.into_iter().for_each(|listener| assert_whole(listener, count));
    let skbs = skbs_sent(&lab) - before;
    assert!(skbs < count, "{skbs} skbs for 16 times {count} datagrams: hardly any were coalesced");
    closes(&relay, path);
}

/// Four senders of four sizes into one rule: runs of one flow and one size only, each flow in order.
fn mixed_sizes_and_flows_keep_their_order(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.0.0/16 -> r1; id=a"]).unwrap();
    let groups = [("239.1.0.1:5000", 64), ("239.1.0.2:5000", 200), ("239.1.0.3:5000", 1400), ("239.1.0.4:5000", 65)];
    let listeners = groups.map(|(group, _)| Listener::on(lab.sink(1), "k1", group, Some(5_000)).unwrap());
    let before = relay.stats().unwrap();
    let senders = groups.map(|(group, size)| {
        let mut args = send_args("s0", group, 25_000, 5_000).unwrap();
        args.size = size;
        send_in_background(&lab, &args).unwrap()
    });
    senders.into_iter().for_each(|sender| assert_eq!(sender.wait().unwrap().sent, 5_000));
    for listener in listeners {
        let report = listener.wait().unwrap();
        let got = (report.received, report.lost, report.duplicated, report.reordered, report.corrupted);
        assert_eq!(got, (5_000, 0, 0, 0, 0), "{report:?}");
    }
    await_moved(&relay, &before, "a", &Moved::all(20_000, 1)).unwrap();
    closes(&relay, path);
}

/// Twenty kills under traffic: nothing twice, nothing out of order, at most a window (and on the packet path the posted buffers)
/// lost each time.
fn a_killed_worker_sends_nothing_twice(path: &Path) {
    const KILLS: u64 = 20;
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]).unwrap();
    let listener = Listener::on(lab.sink(1), "k1", TO, None).unwrap();
    let mut args = send_args("s0", GROUP, 50_000, 0).unwrap();
    (args.count, args.duration) = (None, Some(Duration::from_secs(30)));
    let sending = send_in_background(&lab, &args).unwrap();
    for _ in 0..KILLS {
        std::thread::sleep(Duration::from_millis(60));
        let pids = relay.worker_pids().unwrap();
        for pid in &pids {
            let _ = kill(Pid::from_raw(i32::try_from(*pid).unwrap()), Signal::SIGKILL);
        }
        let begin = Instant::now();
        while relay.worker_pids().map_or(true, |now| now.is_empty() || now == pids) && begin.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    std::thread::sleep(Duration::from_millis(200));
    drop(sending);
    std::thread::sleep(Duration::from_millis(300));
    let report = listener.finish().unwrap();
    eprintln!("{}: {KILLS} kills, received {}, lost {}", path.name, report.received, report.lost);
    assert_eq!((report.duplicated, report.reordered, report.corrupted), (0, 0, 0), "{report:?}");
    assert!(report.lost <= KILLS * 384, "{report:?}");
    closes(&relay, path);
}

/// UDP_GRO at the receiver: the super-frame comes as it left, with the size of its datagrams in a control message.
fn a_receiver_with_udp_gro_sees_whole_datagrams(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]).unwrap();
    let socket = lab
        .sink(1)
        .run(|| {
            let socket = UdpSocket::bind("239.9.9.9:6000").unwrap();
            let iface = lab_address("k1");
            socket.join_multicast_v4(&Ipv4Addr::new(239, 9, 9, 9), &iface).unwrap();
            setsockopt(&socket, sockopt::UdpGroSegment, &true).unwrap();
            setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).unwrap();
            socket
        })
        .unwrap();
    let before = relay.stats().unwrap();
    send_in_bursts(&lab, &relay, GROUP, COUNT, 20);
    await_moved(&relay, &before, "a", &Moved::all(COUNT, 1)).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let (mut bytes, mut buffers) = (0, 0);
    let mut buffer = vec![0; 1 << 16];
    while let Ok(len) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
        assert_eq!(len % 64, 0, "whole datagrams of 64 bytes");
        bytes += len as u64;
        buffers += 1;
    }
    assert_eq!(bytes, COUNT * 64);
    assert!(buffers < COUNT / 4, "{buffers} buffers: nothing came as a super-frame");
    closes(&relay, path);
}

/// Address of an interface in the present namespace.
fn lab_address(name: &str) -> Ipv4Addr {
    let addresses = nix::ifaddrs::getifaddrs().unwrap();
    addresses.filter(|one| one.interface_name == name).find_map(|one| Some(one.address?.as_sockaddr_in()?.ip())).unwrap()
}

/// A device without UDP segmentation refuses the first super-frames: nothing is lost, and `rule list` says what it is now.
fn a_device_that_refuses_is_sent_single_packets(path: &Path) {
    let lab = Lab::simple().unwrap();
    lab.relay.output("ethtool", &["-K", "r1", "tx-udp-segmentation", "off"]).unwrap();
    let rule = path.rule("r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a");
    let relay = start_relay(&lab, &["--backend", path.path, "--rule", &rule]).unwrap();
    let listener = Listener::on(lab.sink(1), "k1", TO, Some(COUNT)).unwrap();
    let before = relay.stats().unwrap();
    send_in_bursts(&lab, &relay, GROUP, COUNT, 20);
    assert_whole(listener, COUNT);
    let after = await_moved(&relay, &before, "a", &Moved::all(COUNT, 1)).unwrap();
    let rules = relay.rules().unwrap();
    assert!(rules[0]["engine"] != "coalesce" && rules[0]["reason"].as_str().unwrap().contains("r1 takes no UDP super-frames"), "{rules}");
    assert_frames_conserved(&after);
}

mod refusing {
    relay_tests::on_path!(xsk, a_device_that_refuses_is_sent_single_packets, XSK_COALESCE);
    relay_tests::on_path!(packet, a_device_that_refuses_is_sent_single_packets, PACKET_COALESCE);
}

/// At most once and exactly once are not to be had together.
#[test]
fn exactly_once_is_refused() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let rule = XSK_COALESCE.rule("r0 239.1.1.1:5000 -> r1; id=a exact=yes");
    let error = start_relay(&lab, &["--rule", &rule]).unwrap_err().to_string();
    assert!(error.contains("exit status: 2") && error.contains("at most once"), "{error}");
}
