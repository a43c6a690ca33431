//! Interfaces come and go while the relay runs: its rules wait for them, nobody types anything, other interfaces lose nothing.
//!
//! Forwarding resumes within 500 ms after a re-created interface is up again; a flap restarts nobody and memberships stand
//! within 1 s.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set up its world has failed")]

use relay::lab::{Namespace, enable_gro};
use relay_tests::paths::{Path, moved};
use relay_tests::{
    Lab, LabSpec, Listener, RelayProcess, Sending, assert_frames_conserved, assert_rules_conserved, on_every_path, send_args,
    send_in_background_from,
};
use serde_json::Value;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

on_every_path!(
    an_egress_interface_is_deleted_and_made_again,
    an_ingress_interface_is_deleted_and_made_again,
    all_interfaces_are_deleted_and_made_again,
    a_flap_restarts_nobody,
    a_renamed_interface_is_another_one,
    a_rule_waits_for_an_interface_that_never_was,
    mtu_and_address_are_followed,
);

const RATE: u64 = 20_000;
/// Forwarding resumes within this time after the interface is up.
const RESUME: Duration = Duration::from_millis(500);

fn lab() -> Lab {
    Lab::new(LabSpec { sinks: 3, separate_sinks: true, ..LabSpec::default() }).unwrap()
}

/// Makes the link `rN`–`kN` again, as the lab had made it.
fn make_link(lab: &Lab, link: u32) {
    let lines = format!(
        "link add r{link} type veth peer name k{link} netns {}\naddr add 10.0.{link}.1/24 dev r{link}\nlink set r{link} up\n",
        lab.sink(link).name()
    );
    lab.relay.ip_batch(&lines).unwrap();
    lab.sink(link)
        .ip_batch(&format!("addr add 10.0.{link}.2/24 dev k{link}\nlink set k{link} up\nroute add 224.0.0.0/4 dev k{link}\n"))
        .unwrap();
    enable_gro(lab.sink(link), &format!("k{link}")).unwrap();
}

/// Makes the link `r0`–`s0` again.
fn make_source(lab: &Lab) {
    let lines = format!("link add r0 type veth peer name s0 netns {}\naddr add 10.0.0.2/24 dev r0\nlink set r0 up\n", lab.src.name());
    lab.relay.ip_batch(&lines).unwrap();
    lab.src.ip_batch("addr add 10.0.0.1/24 dev s0\nlink set s0 up\nroute add 224.0.0.0/4 dev s0\n").unwrap();
}

fn receiver(namespace: &Namespace, group: [u8; 4], port: u16, own: [u8; 4]) -> UdpSocket {
    let socket = namespace
        .run(|| {
            let socket = UdpSocket::bind((Ipv4Addr::from(group), port)).unwrap();
            socket.join_multicast_v4(&group.into(), &own.into()).unwrap();
            socket
        })
        .unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
    socket
}

fn sender(namespace: &Namespace, own: [u8; 4]) -> UdpSocket {
    let sender = namespace.run(|| UdpSocket::bind((Ipv4Addr::from(own), 0)).unwrap()).unwrap();
    sender.set_multicast_ttl_v4(8).unwrap();
    sender
}

/// Time from `since` until a datagram arrives; one is sent every 2 ms meanwhile, if there is a sender.
fn first_datagram(relay: &RelayProcess, since: Instant, receiver: &UdpSocket, from: Option<(&UdpSocket, &str)>) -> Duration {
    let mut buffer = [0; 2048];
    while since.elapsed() < Duration::from_secs(5) {
        // The interface may still be without a carrier.
        let _ = from.map(|(sender, to)| sender.send_to(b"probe", to));
        if receiver.recv(&mut buffer).is_ok() {
            return since.elapsed();
        }
    }
    panic!("nothing comes; rules {}; status {}; log {}", relay.rules().unwrap(), relay.status().unwrap(), relay.log());
}

/// 20 kpps through an interface that nothing happens to.
fn steady(lab: &Lab, relay: &RelayProcess) -> (Value, Listener, Sending) {
    let before = relay.stats().unwrap();
    let mut args = relay_tests::recv_args("k2", "239.9.9.2:6000", None).unwrap();
    args.timeout = Duration::from_secs(60);
    let listener = Listener::with(lab.sink(2), &args).unwrap();
    let mut args = send_args("k3", "239.1.1.3:5000", RATE, 0).unwrap();
    (args.count, args.duration) = (None, Some(Duration::from_secs(60)));
    let sending = send_in_background_from(lab.sink(3), &args).unwrap();
    (before, listener, sending)
}

/// It lost nothing, and every frame is somewhere.
fn check_steady(path: &Path, relay: &RelayProcess, (before, listener, sending): (Value, Listener, Sending)) {
    drop(sending);
    std::thread::sleep(Duration::from_millis(200));
    let report = listener.finish().unwrap();
    let after = relay.stats().unwrap();
    let moved = moved(&before, &after, "stays").unwrap();
    eprintln!("{}: steady stream {} received, silent for {} µs at most", path.name, report.received, report.longest_silence_us);
    assert_eq!((report.lost, report.duplicated, report.reordered, report.corrupted), (0, 0, 0, 0), "{report:?}; {after}");
    assert_eq!((report.received, report.first_sequence), (moved.tx[0], Some(0)), "{report:?}; {after}");
    assert_rules_conserved(&after);
    assert_frames_conserved(&after);
    assert_eq!(after["frames"]["hand"], 0, "frames are nobody's: {after}");
}

const STAYS: &str = "r3 239.1.1.3:5000 -> r2 239.9.9.2:6000 ttl=keep; id=stays";
const RULE: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.1:6000; id=a";

fn rule(relay: &RelayProcess, id: &str) -> Value {
    let rules = relay.rules().unwrap();
    rules.as_array().unwrap().iter().find(|rule| rule["id"] == id).cloned().unwrap()
}

/// Waits until `rule list` says so of rule `a`.
fn await_rule(relay: &RelayProcess, what: &str, holds: impl Fn(&Value) -> bool) {
    let begin = Instant::now();
    while !holds(&rule(relay, "a")) {
        assert!(begin.elapsed() < Duration::from_secs(3), "{what}: {}; {}", rule(relay, "a"), relay.log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn pending(rule: &Value) -> String {
    rule["pending"].to_string()
}

fn an_egress_interface_is_deleted_and_made_again(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &[RULE, STAYS]).unwrap();
    let steady = steady(&lab, &relay);
    let sender = sender(&lab.src, [10, 0, 0, 1]);
    let first = receiver(lab.sink(1), [239, 9, 9, 1], 6000, [10, 0, 1, 2]);
    first_datagram(&relay, Instant::now(), &first, Some((&sender, "239.1.1.1:5000")));
    drop(first);
    for round in 0..3 {
        lab.relay.ip_batch("link del r1\n").unwrap();
        // Traffic for it goes on.
        for _ in 0..50 {
            sender.send_to(b"lost", "239.1.1.1:5000").unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        await_rule(&relay, "the output waits", |rule| rule["path"] == path.path && pending(rule).contains("r1 is missing"));
        make_link(&lab, 1);
        let up = Instant::now();
        let again = receiver(lab.sink(1), [239, 9, 9, 1], 6000, [10, 0, 1, 2]);
        let took = first_datagram(&relay, up, &again, Some((&sender, "239.1.1.1:5000")));
        eprintln!("{}: round {round}: egress forwards again {took:?} after it was up", path.name);
        assert!(took <= RESUME, "{took:?}; {}", relay.log());
    }
    let counted = relay.stats().unwrap();
    let drops = &relay_tests::rule_stats(&counted, "a").unwrap()["outputs"][0]["drops"];
    assert!(drops["output_down"].as_u64() > Some(0), "{counted}");
    check_steady(path, &relay, steady);
}

fn an_ingress_interface_is_deleted_and_made_again(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &[RULE, STAYS]).unwrap();
    let steady = steady(&lab, &relay);
    let receiver = receiver(lab.sink(1), [239, 9, 9, 1], 6000, [10, 0, 1, 2]);
    for round in 0..3 {
        first_datagram(&relay, Instant::now(), &receiver, Some((&sender(&lab.src, [10, 0, 0, 1]), "239.1.1.1:5000")));
        lab.relay.ip_batch("link del r0\n").unwrap();
        await_rule(&relay, "the rule waits", |rule| rule["path"] == "pending" && rule["reason"] == "interface r0 is missing");
        assert_eq!(rule(&relay, "a")["joined"], false);
        make_source(&lab);
        let up = Instant::now();
        let took = first_datagram(&relay, up, &receiver, Some((&sender(&lab.src, [10, 0, 0, 1]), "239.1.1.1:5000")));
        eprintln!("{}: round {round}: ingress forwards again {took:?} after it was up", path.name);
        assert!(took <= RESUME, "{took:?}; {}", relay.log());
        await_rule(&relay, "the membership stands", |rule| rule["joined"] == true);
    }
    path.check(&relay).unwrap();
    check_steady(path, &relay, steady);
}

/// Not one socket is left that the UMEM is registered with.
fn all_interfaces_are_deleted_and_made_again(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &[RULE]).unwrap();
    let before = relay.stats().unwrap();
    lab.relay.ip_batch("link del r0\nlink del r1\n").unwrap();
    await_rule(&relay, "the rule waits", |rule| rule["path"] == "pending");
    std::thread::sleep(Duration::from_millis(100));
    make_link(&lab, 1);
    make_source(&lab);
    let up = Instant::now();
    let receiver = receiver(lab.sink(1), [239, 9, 9, 1], 6000, [10, 0, 1, 2]);
    let took = first_datagram(&relay, up, &receiver, Some((&sender(&lab.src, [10, 0, 0, 1]), "239.1.1.1:5000")));
    eprintln!("{}: forwards again {took:?} after all was up", path.name);
    assert!(took <= RESUME, "{took:?}; {}", relay.log());
    path.check(&relay).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let after = relay.stats().unwrap();
    assert_frames_conserved(&after);
    assert_eq!((&after["frames"]["hand"], &after["frames"]["total"]), (&Value::from(0), &before["frames"]["total"]), "{after}");
}

fn joined(lab: &Lab) -> bool {
    lab.relay.output("ip", &["maddr", "show", "dev", "r0"]).unwrap().contains("239.1.1.1")
}

fn a_flap_restarts_nobody(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &[RULE, STAYS]).unwrap();
    let workers = relay.worker_pids().unwrap();
    let steady = steady(&lab, &relay);
    let receiver = receiver(lab.sink(1), [239, 9, 9, 1], 6000, [10, 0, 1, 2]);
    for link in ["r0", "r1", "r0"] {
        first_datagram(&relay, Instant::now(), &receiver, Some((&sender(&lab.src, [10, 0, 0, 1]), "239.1.1.1:5000")));
        lab.relay.ip_batch(&format!("link set {link} down\n")).unwrap();
        let status = relay.wait_status("the link is shown down", Duration::from_secs(2), |status| {
            status["interfaces"].as_array().unwrap().iter().any(|one| one["name"] == link && one["link"] == "down")
        });
        status.unwrap();
        lab.relay.ip_batch(&format!("link set {link} up\n")).unwrap();
        let up = Instant::now();
        while !joined(&lab) || rule(&relay, "a")["joined"] != true {
            assert!(up.elapsed() < Duration::from_secs(1), "{link}: not joined");
        }
        let took = first_datagram(&relay, up, &receiver, Some((&sender(&lab.src, [10, 0, 0, 1]), "239.1.1.1:5000")));
        eprintln!("{}: {link} forwards again {took:?} after it was up", path.name);
        assert!(took <= RESUME, "{took:?}; {}", relay.log());
    }
    assert_eq!(relay.worker_pids().unwrap(), workers, "{}", relay.log());
    check_steady(path, &relay, steady);
}

fn a_renamed_interface_is_another_one(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &[RULE, STAYS]).unwrap();
    let steady = steady(&lab, &relay);
    let receiver = receiver(lab.sink(1), [239, 9, 9, 1], 6000, [10, 0, 1, 2]);
    let sender = sender(&lab.src, [10, 0, 0, 1]);
    first_datagram(&relay, Instant::now(), &receiver, Some((&sender, "239.1.1.1:5000")));
    lab.relay.ip_batch("link set r0 down\nlink set r0 name other\nlink set other up\n").unwrap();
    await_rule(&relay, "the rule waits", |rule| rule["reason"] == "interface r0 is missing");
    std::thread::sleep(Duration::from_millis(100));
    let links = lab.relay.output("ip", &["-d", "link", "show", "dev", "other"]).unwrap();
    assert!(!links.contains("prog/xdp"), "the program is still there: {links}");
    let mut buffer = [0; 64];
    while receiver.recv(&mut buffer).is_ok() {}
    sender.send_to(b"stray", "239.1.1.1:5000").unwrap();
    assert!(receiver.recv(&mut buffer).is_err(), "forwarded from an interface of another name");
    lab.relay.ip_batch("link set other down\nlink set other name r0\nlink set r0 up\n").unwrap();
    let took = first_datagram(&relay, Instant::now(), &receiver, Some((&sender, "239.1.1.1:5000")));
    assert!(took <= RESUME, "{took:?}; {}", relay.log());
    check_steady(path, &relay, steady);
}

/// A typo is visible: in the log with the nearest name, and in the list.
fn a_rule_waits_for_an_interface_that_never_was(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &[STAYS]).unwrap();
    let steady = steady(&lab, &relay);
    let answer = relay.query(&["rule", "add", "r9 239.1.1.1:5000 -> r1 239.9.9.1:6000, r8; id=a"]).unwrap();
    assert_eq!(answer["done"], "a");
    let waiting = rule(&relay, "a");
    assert_eq!((waiting["path"].as_str(), waiting["reason"].as_str()), (Some("pending"), Some("interface r9 is missing")));
    assert!(relay.log().contains("did you mean"), "{}", relay.log());
    lab.relay.ip_batch("link add r9 type veth peer name s9\n").unwrap();
    await_rule(&relay, "it is there", |rule| rule["reason"] == "interface r9 is down");
    lab.relay.ip_batch("link set s9 up\naddr add 10.9.9.1/24 dev s9\nlink set r9 up\n").unwrap();
    let up = Instant::now();
    let receiver = receiver(lab.sink(1), [239, 9, 9, 1], 6000, [10, 0, 1, 2]);
    let sender = lab.relay.run(|| UdpSocket::bind("10.9.9.1:0").unwrap()).unwrap();
    lab.relay.ip_batch("route add 239.1.1.1/32 dev s9\n").unwrap();
    sender.set_multicast_ttl_v4(8).unwrap();
    let took = first_datagram(&relay, up, &receiver, Some((&sender, "239.1.1.1:5000")));
    assert!(took <= RESUME, "{took:?}; {}", relay.log());
    let there = rule(&relay, "a");
    assert!(there["path"] == path.path && pending(&there).contains("r8 is missing"), "{there}");
    check_steady(path, &relay, steady);
}

fn mtu_and_address_are_followed(path: &Path) {
    let lab = lab();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.1:6000 src=egress; id=a"]).unwrap();
    let receiver = receiver(lab.sink(1), [239, 9, 9, 1], 6000, [10, 0, 1, 2]);
    let sender = sender(&lab.src, [10, 0, 0, 1]);
    first_datagram(&relay, Instant::now(), &receiver, Some((&sender, "239.1.1.1:5000")));
    let mut buffer = [0; 2048];
    let drain = |buffer: &mut [u8]| while receiver.recv(buffer).is_ok() {};
    lab.relay.ip_batch("link set r1 mtu 1000\naddr del 10.0.1.1/24 dev r1\naddr add 10.0.1.77/24 dev r1\n").unwrap();
    std::thread::sleep(Duration::from_millis(150));
    drain(&mut buffer);
    let before = relay.stats().unwrap();
    sender.send_to(&[7; 1200], "239.1.1.1:5000").unwrap();
    sender.send_to(&[7; 900], "239.1.1.1:5000").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let (len, from) = receiver.recv_from(&mut buffer).unwrap();
    assert_eq!((len, from.ip().to_string().as_str()), (900, "10.0.1.77"));
    let counted = moved(&before, &relay.stats().unwrap(), "a").unwrap();
    assert_eq!(counted.output_drops[0].get("mtu_exceeded"), Some(&1), "{counted:?}");
    lab.relay.ip_batch("link set r1 mtu 1500\n").unwrap();
    std::thread::sleep(Duration::from_millis(150));
    sender.send_to(&[7; 1200], "239.1.1.1:5000").unwrap();
    assert_eq!(receiver.recv(&mut buffer).unwrap(), 1200);
}
