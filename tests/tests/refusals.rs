//! A packet that the kernel will not send is a drop with a name: what the receiver got and the named drops make what came in.
//!
//! The relay is not told of what makes the kernel refuse (the far end's MTU), or learns of it late (an interface removed).
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay_tests::paths::{Path, moved};
use relay_tests::{
    Lab, LabSpec, Listener, RelayProcess, assert_frames_conserved, assert_rules_conserved, on_every_path, send, send_args,
    send_in_background,
};
use serde_json::Value;
use std::time::{Duration, Instant};

on_every_path!(what_the_far_end_cannot_take_is_send_failed, a_removed_interface_costs_named_drops_only);

const COUNT: u64 = 500;
const GROUP: &str = "239.1.1.1:5000";

fn two_sinks() -> Lab {
    Lab::new(LabSpec { sinks: 2, separate_sinks: true, ..LabSpec::default() }).unwrap()
}

fn interface(relay: &RelayProcess, name: &str) -> Value {
    let status = relay.status().unwrap();
    status["interfaces"].as_array().unwrap().iter().find(|interface| interface["name"] == name).unwrap().clone()
}

/// `relay stats` once the rule has taken `rx` packets since `before` and nothing moves any more.
fn settled(relay: &RelayProcess, before: &Value, rx: u64) -> Value {
    let begin = Instant::now();
    loop {
        let stats = relay.stats().unwrap();
        std::thread::sleep(Duration::from_millis(120));
        let later = relay.stats().unwrap();
        if moved(before, &later, "a").unwrap().rx >= rx && stats["rules"] == later["rules"] {
            return later;
        }
        assert!(begin.elapsed() < Duration::from_secs(5), "{later}");
    }
}

/// The far end of r2 takes packets of 600 bytes at most, and r2 does not know: the driver drops what is larger.
fn what_the_far_end_cannot_take_is_send_failed(path: &Path) {
    let lab = two_sinks();
    lab.sink(2).ip_batch("link set k2 mtu 600\n").unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000, r2 239.9.9.9:6000; id=a"]).unwrap();
    let listeners = [1, 2].map(|link| Listener::on(lab.sink(link), &format!("k{link}"), "239.9.9.9:6000", None).unwrap());
    let before = relay.stats().unwrap();
    let mut args = send_args("s0", GROUP, 10_000, COUNT).unwrap();
    for size in [1000, 100, 1000] {
        args.size = size;
        assert_eq!(send(&lab, &args).unwrap().sent, COUNT);
    }
    let after = settled(&relay, &before, 3 * COUNT);
    let got = listeners.map(|listener| listener.finish().unwrap().received);
    let counted = moved(&before, &after, "a").unwrap();
    assert_eq!(counted.tx, got, "sent is what the receivers got: {after}");
    assert_eq!(counted.output_drops[1].get("send_failed"), Some(&(3 * COUNT - got[1])), "{after}");
    assert_eq!(got, [3 * COUNT, COUNT], "{after}");
    assert_rules_conserved(&after);
    assert_frames_conserved(&after);
    let seen = interface(&relay, "r2");
    assert_eq!((&seen["refused"], &seen["sending"], &seen["kick_errors"]), (&(2 * COUNT).into(), &"up".into(), &0.into()), "{seen}");
    assert_eq!(interface(&relay, "r1")["refused"], 0);
    // A rule in the same slots counts from zero, though what was refused before is still in the workers' pages.
    relay.command(&["rule", "del", "a"]).unwrap();
    relay.command(&["rule", "add", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000, r2 239.9.9.9:6000; id=a"]).unwrap();
    let fresh = relay.stats().unwrap();
    let outputs = relay_tests::rule_stats(&fresh, "a").unwrap()["outputs"].clone();
    for output in outputs.as_array().unwrap() {
        assert_eq!((&output["tx_packets"], output["drops"].as_object().map(serde_json::Map::len)), (&0.into(), Some(0)), "{fresh}");
    }
}

/// r2 is removed under traffic: every packet that did not reach its far end has a name, and the other output has lost none.
fn a_removed_interface_costs_named_drops_only(path: &Path) {
    let lab = two_sinks();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000, r2 239.9.9.9:6000; id=a"]).unwrap();
    let listeners = [1, 2].map(|link| Listener::on(lab.sink(link), &format!("k{link}"), "239.9.9.9:6000", None).unwrap());
    let before = relay.stats().unwrap();
    let args = send_args("s0", GROUP, 20_000, 20_000).unwrap();
    let sending = send_in_background(&lab, &args).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    lab.relay.ip_batch("link del r2\n").unwrap();
    assert_eq!(sending.wait().unwrap().sent, 20_000);
    let after = settled(&relay, &before, 20_000);
    let got = listeners.map(|listener| listener.finish().unwrap().received);
    let counted = moved(&before, &after, "a").unwrap();
    assert_eq!((counted.rx, got[0]), (20_000, 20_000), "{after}");
    let dropped: u64 = counted.output_drops[1].values().sum();
    assert_eq!(got[1] + dropped, 20_000, "delivered and named drops make what came in: {after}");
    assert!(got[1] > 0 && dropped > 0, "{after}");
    assert_rules_conserved(&after);
    assert_frames_conserved(&after);
}

/// With one output the kernel path redirects to the device alone, and the kernel says at once that it is down.
#[test]
fn a_device_taken_down_refuses_by_name_on_the_kernel_path() {
    relay_tests::needs_root!();
    let _turn = relay_tests::paths::turn();
    let lab = Lab::simple().unwrap();
    let relay = relay_tests::paths::KERNEL.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]).unwrap();
    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", None).unwrap();
    let before = relay.stats().unwrap();
    let sending = send_in_background(&lab, &send_args("s0", GROUP, 20_000, 10_000).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    lab.relay.ip_batch("link set r1 down\n").unwrap();
    assert_eq!(sending.wait().unwrap().sent, 10_000);
    let after = settled(&relay, &before, 10_000);
    let got = listener.finish().unwrap().received;
    let counted = moved(&before, &after, "a").unwrap();
    assert_eq!((counted.rx, &counted.tx), (10_000, &vec![got]), "{after}");
    let drops = &counted.output_drops[0];
    assert!(drops.get("output_down").is_some_and(|down| *down > 0), "{after}");
    assert_eq!(interface(&relay, "r1")["refused"].as_u64(), Some(drops.get("send_failed").copied().unwrap_or(0)), "{after}");
    assert_rules_conserved(&after);
}
