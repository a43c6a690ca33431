//! Thousands of groups with the kernel's default limits: added at once, listed, joined, forwarded, removed, nothing left.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay_tests::paths::{Listen, Path, Run, long};
use relay_tests::{Lab, RelayProcess, on_every_path, send_args};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

on_every_path!(six_thousand_groups_come_and_go);

const GROUPS: u32 = 6_000;
const LIMIT: Duration = Duration::from_secs(5);

/// Once the connections of clients that have gone are closed, and whatever a start needed for a moment.
fn descriptors(relay: &RelayProcess) -> usize {
    let count = || std::fs::read_dir(format!("/proc/{}/fd", relay.pid())).unwrap().count();
    let mut before = count();
    loop {
        std::thread::sleep(Duration::from_millis(300));
        let now = count();
        if now == before {
            return now;
        }
        before = now;
    }
}

/// Groups 239.16.0.0 to 239.16.23.111, each to one of its own.
fn file(groups: u32) -> tempfile::NamedTempFile {
    let mut text =
        "version = 1\n[[rule]]\nid = \"stays\"\ningress = \"r0\"\nmatch = \"239.1.1.1:5000\"\n[[rule.output]]\negress = \"r1\"\n"
            .to_owned();
    for group in 0..groups {
        let (high, low) = (group >> 8, group & 255);
        writeln!(
            text,
            "[[rule]]\nid = \"g{group}\"\ningress = \"r0\"\nmatch = \"239.16.{high}.{low}:5000\"\n[[rule.output]]\negress = \"r1\"\nto = \"239.17.{high}.{low}:6000\""
        )
        .unwrap();
    }
    let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn apply(relay: &RelayProcess, groups: u32) -> Duration {
    let file = file(groups);
    let begin = Instant::now();
    relay.command(&["apply", file.path().to_str().unwrap()]).unwrap();
    begin.elapsed()
}

fn joined(lab: &Lab) -> usize {
    lab.relay.output("ip", &["maddr", "show", "dev", "r0"]).unwrap().matches("inet  239.16.").count()
}

fn six_thousand_groups_come_and_go(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1; id=stays"]).unwrap();
    let before = descriptors(&relay);
    for round in 0..if long() { 3 } else { 1 } {
        let took = apply(&relay, GROUPS);
        let begin = Instant::now();
        let rules = relay.rules().unwrap();
        let listed = begin.elapsed();
        let rules = rules.as_array().unwrap();
        assert_eq!(rules.len(), GROUPS as usize + 1);
        assert!(rules.iter().all(|rule| rule["joined"] == true && rule["path"] == path.path));
        assert_eq!(joined(&lab), GROUPS as usize);
        let sockets = descriptors(&relay) - before;
        for group in ["16.0.0", "16.11.200", "16.23.111"] {
            let out = format!("239.{}:6000", group.replacen("16", "17", 1));
            let listens: [Listen<'_>; 1] = [(1, &out, 100)];
            let run = Run::of(&lab, &relay, &[send_args("s0", &format!("239.{group}:5000"), 5_000, 100).unwrap()], &listens).unwrap();
            run.assert_whole(&listens);
        }
        let gone = apply(&relay, 0);
        eprintln!(
            "{}: round {round}: {GROUPS} groups in {took:?} on {sockets} sockets, listed in {listed:?}, removed in {gone:?}",
            path.name
        );
        assert!(took <= LIMIT && gone <= LIMIT && listed <= LIMIT);
        assert_eq!(relay.rules().unwrap().as_array().unwrap().len(), 1);
        assert_eq!((joined(&lab), descriptors(&relay)), (0, before), "{}", relay.log());
    }
}
