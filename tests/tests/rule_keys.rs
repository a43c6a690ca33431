//! Each key of a rule and each conversion: an ordinary UDP socket receives what the rule promises, over IPv4 and IPv6.
//!
//! The receiving kernel verifies every checksum. TTL, DSCP and sources are read from the receiver's report.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::recv::{Report, describe};
use relay::lab::send::{self, send};
use relay::lab::{Namespace, RelayProcess};
use relay_tests::paths::{Moved, Path, await_moved, moved};
use relay_tests::raw::{self, Capture, Checksum, Datagram, Injector};
use relay_tests::{
    Lab, LabSpec, Listener, assert_frames_conserved, assert_rules_conserved, interface_stats, on_every_path, rule_stats, send_args,
};
use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

on_every_path!(
    ipv6_sources_ports_ttl_and_dscp,
    ipv6_multicast_becomes_unicast,
    ipv6_unicast_becomes_multicast,
    unicast_behind_a_gateway,
    unicast_stays_unicast,
    tags_are_pushed_kept_and_popped,
    two_tags_are_matched,
    a_rate_is_kept,
    ip_options_are_carried,
    no_checksum_stays_no_checksum,
    a_partial_checksum_is_finished,
    a_ttl_that_expires_is_counted,
    jumbo_frames,
    fragments_are_left_to_the_kernel_and_counted,
);

const COUNT: u64 = 300;

fn lab() -> Lab {
    Lab::new(LabSpec { sinks: 2, separate_sinks: true, ..LabSpec::default() }).unwrap()
}

fn args(iface: &str, to: &str) -> send::Args {
    let mut args = send_args(iface, to, 3_000, COUNT).unwrap();
    args.dscp = 10;
    args
}

/// Sends and listens; all of it must come, whole and in order.
fn carry(lab: &Lab, relay: &RelayProcess, args: &send::Args, listens: &[(&Namespace, &str, &str)]) -> Vec<Report> {
    let before = relay.stats().unwrap();
    let open = |(namespace, iface, group): &(&Namespace, &str, &str)| Listener::on(namespace, iface, group, args.count).unwrap();
    let listeners: Vec<Listener> = listens.iter().map(open).collect();
    lab.src.run(|| send(args)).unwrap().unwrap();
    let reports: Vec<Report> = listeners.into_iter().map(|listener| listener.wait().unwrap()).collect();
    for (report, listen) in reports.iter().zip(listens) {
        let got = (report.received, report.lost, report.duplicated, report.reordered, report.corrupted, report.foreign);
        let told = describe(report);
        assert_eq!(got, (COUNT, 0, 0, 0, 0, 0), "{} {}: {told}; {}; {}", listen.1, listen.2, relay.stats().unwrap(), relay.log());
    }
    let after = await_moved(relay, &before, "a", &Moved::all(COUNT, listens.len())).unwrap();
    assert_rules_conserved(&after);
    assert_frames_conserved(&after);
    reports
}

fn only<T: Ord + Clone>(set: &BTreeSet<T>) -> T {
    assert_eq!(set.len(), 1);
    set.first().unwrap().clone()
}

fn ipv6_sources_ports_ttl_and_dscp(path: &Path) {
    let lab = lab();
    let rule = "r0 [ff3e::1234]:5000 -> r1 [ff3e::1]:6001 src=egress sport=4444 dscp=46 ttl=9, r2 [ff3e::2]:6002 src=[fd00::7] ttl=keep, \
                r2 :6003; id=a";
    let relay = path.start(&lab, &[rule]).unwrap();
    let mut args = args("s0", "[ff3e::1234]:5000");
    args.source = Some("[fd00::1]:7100".parse().unwrap());
    let listens = [(lab.sink(1), "k1", "[ff3e::1]:6001"), (lab.sink(2), "k2", "[ff3e::2]:6002"), (lab.sink(2), "k2", "[ff3e::1234]:6003")];
    let reports = carry(&lab, &relay, &args, &listens);
    let told: Vec<_> = reports.iter().map(|r| (only(&r.sources), only(&r.ttls), only(&r.dscps))).collect();
    let wanted = [("[fd00:0:0:1::1]:4444".into(), 9, 46), ("[fd00::7]:7100".into(), 16, 10), ("[fd00::1]:7100".into(), 15, 10)];
    assert_eq!(told, wanted);
}

/// Until the neighbour answers, packets are counted under `no_neighbor`.
fn await_output(lab: &Lab, relay: &RelayProcess, to: &str) {
    let begin = Instant::now();
    loop {
        lab.src.run(|| send(&send_args("s0", to, 1_000, 1).unwrap())).unwrap().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let stats = relay.stats().unwrap();
        assert_rules_conserved(&stats);
        if rule_stats(&stats, "a").unwrap()["outputs"][0]["tx_packets"].as_u64() > Some(0) {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(5), "the neighbour is not resolved: {stats}; {}", relay.log());
    }
}

fn ipv6_multicast_becomes_unicast(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &["r0 [ff3e::1234]:5000 -> r1 [fd00:0:0:1::2]:6000; id=a"]).unwrap();
    await_output(&lab, &relay, "[ff3e::1234]:5000");
    let reports = carry(&lab, &relay, &args("s0", "[ff3e::1234]:5000"), &[(lab.sink(1), "k1", "[fd00:0:0:1::2]:6000")]);
    assert_eq!((only(&reports[0].ttls), only(&reports[0].dscps)), (15, 10));
}

fn ipv6_unicast_becomes_multicast(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &["r0 [fd00::2]:7000 -> r1 [ff3e::7]:7001 src=egress; id=a"]).unwrap();
    let reports = carry(&lab, &relay, &args("s0", "[fd00::2]:7000"), &[(lab.sink(1), "k1", "[ff3e::7]:7001")]);
    assert!(only(&reports[0].sources).starts_with("[fd00:0:0:1::1]:"), "{:?}", reports[0].sources);
}

/// The next hop is the gateway's, the packet's destination is not.
fn unicast_behind_a_gateway(path: &Path) {
    for (to, group, host, route) in [
        ("10.77.0.1:6000", "239.1.1.1:5000", "10.77.0.1/32", "10.77.0.0/24 via 10.0.1.2"),
        ("[fd77::1]:6000", "[ff3e::1234]:5000", "fd77::1/128", "fd77::/64 via fd00:0:0:1::2"),
    ] {
        let lab = lab();
        lab.sink(1).ip_batch(&format!("addr add {host} dev k1\n")).unwrap();
        lab.relay.ip_batch(&format!("route add {route}\n")).unwrap();
        let relay = path.start(&lab, &[&format!("r0 {group} -> r1 {to}; id=a")]).unwrap();
        await_output(&lab, &relay, group);
        carry(&lab, &relay, &args("s0", group), &[(lab.sink(1), "k1", to)]);
    }
}

fn unicast_stays_unicast(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &["r0 10.0.0.2:7000 -> r1 10.0.1.2:7001 src=egress; id=a"]).unwrap();
    await_output(&lab, &relay, "10.0.0.2:7000");
    let reports = carry(&lab, &relay, &args("s0", "10.0.0.2:7000"), &[(lab.sink(1), "k1", "10.0.1.2:7001")]);
    assert!(only(&reports[0].sources).starts_with("10.0.1.1:"), "{:?}", reports[0].sources);
}

/// An interface for a tag on `parent`. The tag travels in the frame, as on a wire: a veth would else hand it over beside it.
fn tagged(namespace: &Namespace, parent: &str, name: &str, id: u16, address: &str) {
    let _ = namespace.output("ethtool", &["-K", parent, "txvlan", "off", "rxvlan", "off"]);
    let lines = format!("link add link {parent} name {name} type vlan id {id}\naddr add {address}/24 dev {name}\nlink set {name} up\n");
    namespace.ip_batch(&lines).unwrap();
}

/// Whether the kernel has VLAN interfaces; else says that the test is skipped.
fn has_vlans(namespace: &Namespace) -> bool {
    let made = namespace.ip_batch("link add link s0 name probe type vlan id 4000\nlink del probe\n");
    made.inspect_err(|error| eprintln!("SKIPPED: no VLAN interfaces in this kernel: {error}")).is_ok()
}

fn tags_are_pushed_kept_and_popped(path: &Path) {
    let lab = lab();
    if !has_vlans(&lab.src) {
        return;
    }
    for (namespace, parent) in [(&lab.src, "s0"), (&lab.relay, "r0"), (&lab.relay, "r1"), (lab.sink(1), "k1")] {
        let _ = namespace.output("ethtool", &["-K", parent, "txvlan", "off", "rxvlan", "off"]);
    }
    tagged(&lab.src, "s0", "s0.100", 100, "10.1.0.1");
    tagged(lab.sink(1), "k1", "k1.100", 100, "10.1.1.2");
    tagged(lab.sink(1), "k1", "k1.7", 7, "10.1.2.2");
    let rule = "r0 239.1.1.1:5000 -> r1 239.9.9.1:6001, r1 239.9.9.2:6002 vlan=none, r1 239.9.9.3:6003 vlan=7 ttl=keep; id=a tag=100";
    let untagged = "r0 239.1.1.1:5000 -> r1 239.9.9.4:6004 vlan=100; id=b";
    let relay = path.start(&lab, &[rule, untagged]).unwrap();
    let listens =
        [(lab.sink(1), "k1.100", "239.9.9.1:6001"), (lab.sink(1), "k1", "239.9.9.2:6002"), (lab.sink(1), "k1.7", "239.9.9.3:6003")];
    let reports = carry(&lab, &relay, &args("s0.100", "239.1.1.1:5000"), &listens);
    assert_eq!(reports.iter().map(|report| only(&report.ttls)).collect::<Vec<_>>(), [15, 15, 16]);
    let listener = Listener::on(lab.sink(1), "k1.100", "239.9.9.4:6004", Some(COUNT)).unwrap();
    let before = relay.stats().unwrap();
    lab.src.run(|| send(&args("s0", "239.1.1.1:5000"))).unwrap().unwrap();
    let report = listener.wait().unwrap();
    assert_eq!((report.received, report.lost), (COUNT, 0), "{report:?}");
    let after = await_moved(&relay, &before, "b", &Moved::all(COUNT, 1)).unwrap();
    assert_eq!(moved(&before, &after, "a").unwrap().rx, 0);
}

fn two_tags_are_matched(path: &Path) {
    let lab = lab();
    if !has_vlans(&lab.src) {
        return;
    }
    for (namespace, parent) in [(&lab.src, "s0"), (&lab.relay, "r0")] {
        let _ = namespace.output("ethtool", &["-K", parent, "txvlan", "off", "rxvlan", "off"]);
    }
    tagged(&lab.src, "s0", "s0.100", 100, "10.1.0.1");
    let _ = lab.src.output("ethtool", &["-K", "s0.100", "txvlan", "off"]);
    tagged(&lab.src, "s0.100", "s0.100.200", 200, "10.1.3.1");
    let rule = "r0 239.1.1.1:5000 -> r1 239.9.9.1:6001 vlan=none, r2 239.9.9.1:6001 vlan=none; id=a tag=100.200";
    let other = "r0 239.1.1.1:5000 -> r2 239.9.9.2:6002 vlan=none; id=b tag=any";
    let relay = path.start(&lab, &[rule, other]).unwrap();
    let listens = [(lab.sink(1), "k1", "239.9.9.1:6001"), (lab.sink(2), "k2", "239.9.9.1:6001")];
    carry(&lab, &relay, &args("s0.100.200", "239.1.1.1:5000"), &listens);
    let before = relay.stats().unwrap();
    lab.src.run(|| send(&args("s0.100", "239.1.1.1:5000"))).unwrap().unwrap();
    await_moved(&relay, &before, "b", &Moved::all(COUNT, 1)).unwrap();
}

/// On the kernel path, which can't carry such a rule, it is refused and the reason named; true there.
fn is_refused_in_kernel(path: &Path, lab: &Lab, rule: &str, why: &str) -> bool {
    if path.path == "kernel" {
        let refused = path.start(lab, &[rule]).err().unwrap().to_string();
        assert!(refused.contains("exit status: 2") && refused.contains("rule a") && refused.contains(why), "{refused}");
    }
    path.path == "kernel"
}

/// 5,000 packets in a second, of which one output may send a thousand; the other gets all.
fn a_rate_is_kept(path: &Path) {
    let lab = lab();
    let rule = "r0 239.1.1.1:5000 -> r1 239.9.9.1:6001 rate=1kpps, r2 239.9.9.2:6002; id=a";
    if is_refused_in_kernel(path, &lab, rule, "output 0 has rate=") {
        return;
    }
    let relay = path.start(&lab, &[rule]).unwrap();
    let before = relay.stats().unwrap();
    let limited = Listener::on(lab.sink(1), "k1", "239.9.9.1:6001", None).unwrap();
    let free = Listener::on(lab.sink(2), "k2", "239.9.9.2:6002", Some(5_000)).unwrap();
    let begin = Instant::now();
    lab.src.run(|| send(&send_args("s0", "239.1.1.1:5000", 5_000, 5_000).unwrap())).unwrap().unwrap();
    let took = begin.elapsed().as_secs_f64();
    let all = free.wait().unwrap();
    let some = limited.finish().unwrap();
    let after = relay.stats().unwrap();
    let counted = moved(&before, &after, "a").unwrap();
    let dropped = counted.output_drops[0].get("rate_limited").copied().unwrap_or(0);
    eprintln!("{}: {} of 5000 in {took:.2} s, {dropped} dropped", path.name, some.received);
    assert_eq!((all.received, all.lost, counted.tx[1]), (5_000, 0, 5_000), "{all:?}");
    assert_eq!((some.received, some.received + dropped, counted.tx[0]), (counted.tx[0], 5_000, some.received), "{counted:?}");
    // A thousand a second and 10 ms of burst; 5 % for the sender's own pace.
    let wanted = 1_000.0 * took + 11.0;
    assert!((some.received as f64) <= wanted * 1.05 && some.received as f64 >= wanted * 0.85 - 11.0, "{} in {took} s", some.received);
    assert_rules_conserved(&after);
}

/// One datagram through rule `a`: received by an ordinary socket, and as it was on the wire.
fn one_datagram(path: &Path, datagram: &Datagram) -> Vec<u8> {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 dscp=46; id=a"]).unwrap();
    let before = relay.stats().unwrap();
    let capture = Capture::on(lab.sink(1), "k1", &[]).unwrap();
    let receiver = lab.sink(1).run(|| {
        let socket = UdpSocket::bind("239.9.9.9:6000").unwrap();
        socket.join_multicast_v4(&"239.9.9.9".parse().unwrap(), &"10.0.1.2".parse().unwrap()).unwrap();
        socket
    });
    let receiver = receiver.unwrap();
    receiver.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    Injector::on(&lab.src, "s0").unwrap().send(&datagram.bytes()).unwrap();
    let mut buffer = [0; 64];
    let len = receiver.recv(&mut buffer).unwrap();
    assert_eq!(buffer[..len], datagram.payload);
    await_moved(&relay, &before, "a", &Moved::all(1, 1)).unwrap();
    capture.frames().into_iter().find(|frame| frame.ends_with(&datagram.payload)).unwrap()
}

fn datagram() -> Datagram {
    Datagram::to("239.1.1.1", 5_000, b"as it is on the wire").unwrap()
}

/// A router alert (RFC 2113): the options are where they were, the UDP header behind them.
fn ip_options_are_carried(path: &Path) {
    let frame = one_datagram(path, &Datagram { options: vec![0x94, 0x04, 0, 0], tos: 1, ..datagram() });
    assert_eq!((frame[14], &frame[34..38]), (0x46, &[0x94, 4, 0, 0][..]));
    assert_eq!(frame[15], 46 << 2 | 1, "DSCP set, ECN kept");
    assert_eq!((&frame[18..22], raw::sum(&frame[14..38], 0)), (&[0x12, 0x34, 0x40, 0][..], 0xffff), "id and DF as they were");
}

/// A UDP checksum of zero over IPv4 says that there is none, and goes on saying so.
fn no_checksum_stays_no_checksum(path: &Path) {
    let frame = one_datagram(path, &Datagram { checksum: Checksum::Zero, ..datagram() });
    assert_eq!(frame[40..42], [0, 0]);
}

/// What a local sender left to the hardware is finished.
fn a_partial_checksum_is_finished(path: &Path) {
    let frame = one_datagram(path, &Datagram { checksum: Checksum::Partial, ..datagram() });
    let right = Datagram { dst: "239.9.9.9".parse().unwrap(), dport: 6_000, ..datagram() }.bytes();
    assert_eq!(frame[34..], right[34..]);
}

fn a_ttl_that_expires_is_counted(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1, r2 ttl=keep, r2 239.9.9.9:6000 ttl=33; id=a"]).unwrap();
    let before = relay.stats().unwrap();
    let mut args = args("s0", "239.1.1.1:5000");
    args.ttl = 1;
    let listens = [(lab.sink(2), "k2", "239.1.1.1:5000"), (lab.sink(2), "k2", "239.9.9.9:6000")];
    let listeners: Vec<Listener> = listens.iter().map(|(ns, iface, group)| Listener::on(ns, iface, group, Some(COUNT)).unwrap()).collect();
    lab.src.run(|| send(&args)).unwrap().unwrap();
    let ttls: Vec<u8> = listeners.into_iter().map(|listener| only(&listener.wait().unwrap().ttls)).collect();
    assert_eq!(ttls, [1, 33]);
    let expired = [("ttl_expired".to_owned(), COUNT)].into();
    let wanted = Moved { tx: vec![0, COUNT, COUNT], output_drops: vec![expired, [].into(), [].into()], ..Moved::all(COUNT, 3) };
    await_moved(&relay, &before, "a", &wanted).unwrap();
}

/// 9000-byte frames stand in several buffers. The packet path takes them, or counts every one it can't hold.
fn jumbo_frames(path: &Path) {
    let lab = Lab::new(LabSpec { sinks: 2, separate_sinks: true, mtu: 9_000, ..LabSpec::default() }).unwrap();
    let rule = "r0 239.1.1.1:5000 -> r1 239.9.9.1:6001 vlan=none, r2 239.9.9.2:6002; id=a";
    if is_refused_in_kernel(path, &lab, rule, "MTU 9000") {
        return;
    }
    let relay = path.start(&lab, &[rule]).unwrap();
    for size in [1_700, 2_100, 4_000, 8_972] {
        let mut args = args("s0", "239.1.1.1:5000");
        args.size = size;
        let before = relay.stats().unwrap();
        if path.path == "packet" && size > 1_700 {
            lab.src.run(|| send(&args)).unwrap().unwrap();
            std::thread::sleep(Duration::from_millis(300));
            let after = relay.stats().unwrap();
            let too_big = |stats: &serde_json::Value| {
                stats["interfaces"].as_array().unwrap().iter().map(|one| one["drops"]["too_big"].as_u64().unwrap_or(0)).sum::<u64>()
            };
            let carried = moved(&before, &after, "a").unwrap().rx;
            assert_eq!(carried + too_big(&after) - too_big(&before), COUNT, "{size} bytes: {after}");
            continue;
        }
        carry(&lab, &relay, &args, &[(lab.sink(1), "k1", "239.9.9.1:6001"), (lab.sink(2), "k2", "239.9.9.2:6002")]);
    }
}

/// A fragment has no port (but the first): the relay takes none, whatever the rule says, and where XDP runs counts them.
fn fragments_are_left_to_the_kernel_and_counted(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1 -> r1 239.9.9.9; id=a"]).unwrap();
    let before = relay.stats().unwrap();
    let mut args = args("s0", "239.1.1.1:5000");
    args.size = 4_000;
    lab.src.run(|| send(&args)).unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let after = relay.stats().unwrap();
    assert_eq!(moved(&before, &after, "a").unwrap(), Moved::all(0, 1));
    let r0 = interface_stats(&after, "r0").unwrap();
    if path.path == "xsk" {
        assert_eq!(r0["passed_by"]["fragment"], 3 * COUNT, "{r0}");
    }
}
