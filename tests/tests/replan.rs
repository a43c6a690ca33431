//! `path=auto`: the kernel path where nothing stands against it, a worker where something does, and no packet lost in between.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::RelayProcess;
use relay::lab::recv::Report;
use relay_tests::paths::{self, Moved, Outside, await_moved};
use relay_tests::{
    Lab, LabSpec, Listener, assert_frames_conserved, assert_rules_conserved, needs_root, send_args, send_in_background, start_relay,
};
use std::time::{Duration, Instant};

const ATTEMPTS: u32 = 5;
const COUNT: u64 = 60_000;
const ORDERED: u64 = 4_000;
/// Of a worker's receive ring.
const RING_SLOTS: u64 = 4_096;
const RULES: [&str; 4] = [
    "--rule",
    "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep, r2 239.9.9.9:6000; id=a",
    "--rule",
    "r0 239.1.1.2:5000 -> r1 rate=1kpps; id=b",
];

/// Path and reason of a rule.
fn plan(relay: &RelayProcess, id: &str) -> (String, String) {
    let rules = relay.rules().unwrap();
    let rule = rules.as_array().unwrap().iter().find(|rule| rule["id"] == id).unwrap();
    (rule["path"].as_str().unwrap().into(), rule["reason"].as_str().unwrap().into())
}

/// Five more addresses are more than the program compares a source with.
fn addresses(lab: &Lab, verb: &str, path: &str, relay: &RelayProcess) {
    let lines: String = (10..15).map(|host| format!("addr {verb} 10.0.0.{host}/24 dev r0\n")).collect();
    lab.relay.ip_batch(&lines).unwrap();
    let begin = Instant::now();
    while plan(relay, "a").0 != path {
        assert!(begin.elapsed() < Duration::from_secs(3), "not {path}: {:?}; {}", plan(relay, "a"), relay.log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn auto_is_the_kernel_path_and_leaves_it_without_loss() {
    needs_root!();
    let _turn = paths::turn();
    for _ in 0..ATTEMPTS {
        let lab = Lab::new(LabSpec { sinks: 2, separate_sinks: true, ..LabSpec::default() }).unwrap();
        let relay = start_relay(&lab, &RULES).unwrap();
        assert_eq!(plan(&relay, "a").0, "kernel", "{:?}", plan(&relay, "a"));
        let (path, reason) = plan(&relay, "b");
        assert!(path == "xsk" && reason.contains("rate="), "{path}: {reason}");
        let (outside, before) = (Outside::of(&lab, &relay, "a").unwrap(), relay.stats().unwrap());
        let listeners = [1, 2].map(|link| Listener::on(lab.sink(link), &format!("k{link}"), "239.9.9.9:6000", Some(COUNT)).unwrap());
        let sending = send_in_background(&lab, &send_args("s0", "239.1.1.1:5000", 20_000, COUNT).unwrap()).unwrap();
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(200));
            addresses(&lab, "add", "xsk", &relay);
            std::thread::sleep(Duration::from_millis(200));
            addresses(&lab, "del", "kernel", &relay);
        }
        assert_eq!(sending.wait().unwrap().sent, COUNT);
        let reports = listeners.map(|listener| listener.wait().unwrap());
        let lost: u64 = reports.iter().map(|report| report.lost).sum();
        let others = outside.lost(&relay).unwrap();
        if lost > 0 && lost <= 2 * others {
            eprintln!("void, once more: others lost {others}: {reports:?}");
            continue;
        }
        for report in &reports {
            assert_eq!((report.received, report.lost, report.duplicated, report.corrupted), (COUNT, 0, 0, 0), "{report:?}");
        }
        let after = await_moved(&relay, &before, "a", &Moved::all(COUNT, 2)).unwrap();
        assert_rules_conserved(&after);
        assert_frames_conserved(&after);
        return;
    }
    panic!("{ATTEMPTS} runs in a row were void: the machine is too busy to judge the relay");
}

/// A stream during which the rule's path changes, as its receiver saw it; with what others on the machine lost of it.
fn across(lab: &Lab, relay: &RelayProcess, (verb, path): (&str, &str)) -> (Report, u64) {
    let (outside, before) = (Outside::of(lab, relay, "a").unwrap(), relay.stats().unwrap());
    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", Some(ORDERED)).unwrap();
    let sending = send_in_background(lab, &send_args("s0", "239.1.1.1:5000", 10_000, ORDERED).unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(150));
    addresses(lab, verb, path, relay);
    assert_eq!(sending.wait().unwrap().sent, ORDERED);
    let (report, others) = (listener.wait().unwrap(), outside.lost(relay).unwrap());
    if report.lost == 0 {
        let after = await_moved(relay, &before, "a", &Moved::all(ORDERED, 1)).unwrap();
        assert_rules_conserved(&after);
    }
    (report, others)
}

/// Nothing is lost or doubled. What still stands in a worker's rings when the kernel path takes over may be overtaken by what comes
/// after it, and a veth's other end takes frames of both paths from different queues; so the order is asserted of one change of
/// several, and of each that no more came late than a worker holds.
#[test]
fn a_change_of_path_keeps_the_order() {
    needs_root!();
    let _turn = paths::turn();
    let mut in_order = [0, 0];
    for _ in 0..ATTEMPTS {
        let lab = Lab::simple().unwrap();
        let relay = start_relay(&lab, &["--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]).unwrap();
        assert_eq!(plan(&relay, "a").0, "kernel", "{:?}", plan(&relay, "a"));
        for (count, change) in in_order.iter_mut().zip([("add", "xsk"), ("del", "kernel")]) {
            let (report, others) = across(&lab, &relay, change);
            println!("to {}: {} late, by {} at most; lost {}", change.1, report.reordered, report.reorder_depth, report.lost);
            if report.lost > 0 && report.lost <= others {
                eprintln!("void, once more: others lost {others}: {report:?}");
                continue;
            }
            assert_eq!((report.received, report.lost, report.duplicated, report.corrupted), (ORDERED, 0, 0, 0), "{report:?}");
            assert!(report.reordered <= RING_SLOTS, "{report:?}");
            *count += u32::from(report.reordered == 0);
        }
        if in_order.iter().all(|count| *count > 0) {
            return;
        }
    }
    panic!("changes in order, to xsk and to kernel: {in_order:?} of {ATTEMPTS}");
}

/// The programs that count what is sent are attached while they are needed, without the capabilities of the start.
#[test]
fn a_rule_takes_the_kernel_path_long_after_the_start() {
    needs_root!();
    let _turn = paths::turn();
    let lab = Lab::simple().unwrap();
    let relay = start_relay(&lab, &["--backend", "xsk", "--rule", "r0 239.1.1.2:5000 -> r1; id=b"]).unwrap();
    std::thread::sleep(Duration::from_millis(2_700));
    for _ in 0..2 {
        relay.command(&["rule", "add", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a path=kernel"]).unwrap();
        let before = relay.stats().unwrap();
        let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", Some(1_000)).unwrap();
        send_in_background(&lab, &send_args("s0", "239.1.1.1:5000", 10_000, 1_000).unwrap()).unwrap().wait().unwrap();
        assert_eq!(listener.wait().unwrap().received, 1_000);
        await_moved(&relay, &before, "a", &Moved::all(1_000, 1)).unwrap();
        relay.command(&["rule", "del", "a"]).unwrap();
    }
}
