//! Where native XDP is refused: the rung below by itself, with the reason in status and log; generic XDP only when asked for.
//!
//! The interfaces are a bridge and a VLAN, neither of which has native XDP.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

use relay_tests::{Lab, Listener, RelayProcess, needs_root, send, send_args, start_relay};
use serde_json::Value;
use std::time::Duration;

/// Sends 5,000 packets from `iface` of the source and counts them at the sink.
fn forwards(lab: &Lab, iface: &str) {
    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", Some(5_000)).unwrap();
    let mut args = send_args(iface, "239.1.1.1:5000", 20_000, 5_000).unwrap();
    if iface != "s0" {
        args.source = Some("10.5.0.1:7000".parse().unwrap());
    }
    send(lab, &args).unwrap();
    let report = listener.wait().unwrap();
    assert_eq!((report.distinct, report.lost, report.duplicated, report.reordered), (5_000, 0, 0, 0), "{report:?}");
}

/// What `status` says of an interface.
fn interface(relay: &RelayProcess, name: &str) -> Value {
    let status = relay.status().unwrap();
    let all = status["interfaces"].as_array().unwrap().clone();
    all.into_iter().find(|interface| interface["name"] == name).unwrap_or_else(|| panic!("{name} in {status}"))
}

/// The packets of rule `only` that went out, by its own counter.
fn assert_counted(relay: &RelayProcess) {
    let stats = relay.stats().unwrap();
    let rule = relay_tests::rule_stats(&stats, "only").unwrap();
    assert_eq!((&rule["rx_packets"], &rule["outputs"][0]["tx_packets"]), (&5_000.into(), &5_000.into()), "{stats}");
    relay_tests::assert_rules_conserved(&stats);
    relay_tests::assert_frames_conserved(&stats);
}

/// Falls back on `ingress`, says so, and forwards.
fn falls_back(lab: &Lab, ingress: &str, from: &str) {
    let rule = format!("{ingress} 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=only");
    let mut relay = start_relay(lab, &["--rule", &rule]).unwrap();
    let seen = interface(&relay, ingress);
    assert_eq!(seen["backend"], "af_packet", "{seen}");
    assert!(seen["reason"].as_str().unwrap().contains("no native XDP"), "{seen}");
    assert!(relay.log().contains("falling back") && relay.log().contains("no native XDP"), "{}", relay.log());
    let rules = relay.rules().unwrap();
    assert_eq!((&rules[0]["path"], &rules[0]["engine"]), (&"packet".into(), &"uring".into()), "{rules}");
    forwards(lab, from);
    assert_counted(&relay);
    assert!(relay.sigterm(Duration::from_secs(2)).unwrap().success());
}

/// A bridge over r0, with the relay's rule on the bridge.
#[test]
fn a_bridge_falls_back_to_af_packet() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    lab.relay.ip_batch("link add br0 type bridge\nlink set r0 master br0\nlink set br0 up\n").unwrap();
    falls_back(&lab, "br0", "s0");
}

/// A VLAN on r0: the tag is the kernel's business, the rule sees untagged packets.
#[test]
fn a_vlan_falls_back_to_af_packet() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    if let Err(error) = lab.src.ip_batch("link add link s0 name s0.5 type vlan id 5\n") {
        eprintln!("SKIPPED: this kernel has no VLAN interfaces: {error}");
        return;
    }
    lab.src.ip_batch("addr add 10.5.0.1/24 dev s0.5\nlink set s0.5 up\n").unwrap();
    lab.relay.ip_batch("link add link r0 name r0.5 type vlan id 5\naddr add 10.5.0.2/24 dev r0.5\nlink set r0.5 up\n").unwrap();
    falls_back(&lab, "r0.5", "s0.5");
}

/// Without io_uring the rung below carries the same, and everything says so.
#[test]
fn plain_sockets_say_that_they_are_it() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let rule = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=only";
    let mut relay = start_relay(&lab, &["--backend", "packet", "--io-uring", "off", "--rule", rule]).unwrap();
    for name in ["r0", "r1"] {
        let seen = interface(&relay, name);
        assert_eq!(seen["backend"], "af_packet_plain", "{seen}");
        assert!(seen["reason"].as_str().unwrap().contains("--io-uring off"), "{seen}");
        assert!(relay.log().contains(&format!("port {name}: af_packet_plain: --io-uring off")), "{}", relay.log());
    }
    let rules = relay.rules().unwrap();
    assert_eq!((&rules[0]["path"], &rules[0]["engine"]), (&"packet".into(), &"plain".into()), "{rules}");
    forwards(&lab, "s0");
    assert_counted(&relay);
    assert!(relay.sigterm(Duration::from_secs(2)).unwrap().success());
}

/// Generic XDP comes only when asked for, and then it is AF_XDP.
#[test]
fn generic_xdp_forwards_when_asked_for() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let rule = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=only path=xsk engine=tx";
    let mut relay = start_relay(&lab, &["--xdp-mode", "generic", "--rule", rule]).unwrap();
    assert_eq!(interface(&relay, "r0")["backend"], "af_xdp_generic");
    forwards(&lab, "s0");
    assert_counted(&relay);
    assert!(relay.sigterm(Duration::from_secs(2)).unwrap().success());
}
