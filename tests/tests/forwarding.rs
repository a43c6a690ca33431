//! An ordinary UDP sender, a relay, an ordinary joined UDP socket: every datagram arrives once, in order, whole, and is counted.
//!
//! Short form 20,000 at 50 kpps; `RELAY_TEST_LONG=1`: 100,000 at 100 kpps.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set up its world has failed")]

use relay_tests::paths::{self, Moved, Path, Run, await_moved};
use relay_tests::{Lab, assert_frames_conserved, assert_rules_conserved, on_every_path, send_args};
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

on_every_path!(
    every_datagram_arrives_once_in_order_and_whole,
    every_size_arrives_byte_for_byte,
    ipv6_arrives_whole,
    a_quiet_stream_is_not_kept_waiting,
);

const RULE: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=a";

fn every_datagram_arrives_once_in_order_and_whole(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &[RULE]).unwrap();
    let (count, rate) = if paths::long() { (100_000, 100_000) } else { (20_000, 50_000) };
    let listens = [(1, "239.9.9.9:6000", count)];
    let run = Run::of(&lab, &relay, &[send_args("s0", "239.1.1.1:5000", rate, count).unwrap()], &listens).unwrap();
    run.assert_whole(&listens);
    assert_eq!(run.reports[0].ttls.iter().collect::<Vec<_>>(), [&16]);
    assert!(run.reports[0].sources.iter().all(|source| source.starts_with("10.0.0.1:")), "{:?}", run.reports[0].sources);
    let after = await_moved(&relay, &run.before, "a", &Moved::all(count, 1)).unwrap();
    assert_rules_conserved(&after);
    assert_frames_conserved(&after);
    eprintln!("{}: {}", path.name, relay::lab::recv::describe(&run.reports[0]));
}

fn every_size_arrives_byte_for_byte(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &[RULE]).unwrap();
    let before = relay.stats().unwrap();
    let (sender, receiver) = sockets(&lab);
    let sizes = [0, 1, 2, 3, 17, 18, 19, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1471, 1472];
    for size in sizes {
        let sent: Vec<u8> = (0..size).map(|at: usize| (at * 7 + size) as u8).collect();
        assert_eq!(sender.send_to(&sent, "239.1.1.1:5000").unwrap(), size);
        let mut buf = [0; 2048];
        let (len, _) = receiver.recv_from(&mut buf).unwrap_or_else(|error| panic!("{size} bytes: {error}"));
        assert_eq!(&buf[..len], sent, "{size} bytes");
    }
    await_moved(&relay, &before, "a", &Moved::all(sizes.len() as u64, 1)).unwrap();
}

fn sockets(lab: &Lab) -> (UdpSocket, UdpSocket) {
    let sender = lab.src.run(|| UdpSocket::bind("10.0.0.1:0").unwrap()).unwrap();
    sender.set_multicast_ttl_v4(4).unwrap();
    let receiver = lab
        .sink(1)
        .run(|| {
            let socket = UdpSocket::bind("239.9.9.9:6000").unwrap();
            socket.join_multicast_v4(&Ipv4Addr::new(239, 9, 9, 9), &Ipv4Addr::new(10, 0, 1, 2)).unwrap();
            socket
        })
        .unwrap();
    receiver.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    (sender, receiver)
}

fn ipv6_arrives_whole(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 [ff3e::1234]:5000 -> r1 [ff3e::9999]:6000 ttl=keep; id=a"]).unwrap();
    let listens = [(1, "[ff3e::9999]:6000", 5_000)];
    let run = Run::of(&lab, &relay, &[send_args("s0", "[ff3e::1234]:5000", 20_000, 5_000).unwrap()], &listens).unwrap();
    run.assert_whole(&listens);
    assert_eq!(run.reports[0].ttls.iter().collect::<Vec<_>>(), [&16]);
    await_moved(&relay, &run.before, "a", &Moved::all(5_000, 1)).unwrap();
}

/// A worker that sleeps is woken by the packet, not by the end of its sleep (50 ms). Generous, since the machine may be busy.
fn a_quiet_stream_is_not_kept_waiting(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &[RULE]).unwrap();
    let listens = [(1, "239.9.9.9:6000", 100)];
    let run = Run::of(&lab, &relay, &[send_args("s0", "239.1.1.1:5000", 100, 100).unwrap()], &listens).unwrap();
    run.assert_whole(&listens);
    assert!(run.reports[0].p50_us.unwrap() < 10_000.0, "{}", relay::lab::recv::describe(&run.reports[0]));
}
