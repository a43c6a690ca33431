//! `apply` and SIGHUP: all or nothing, at once, and the rules that stay lose nothing.
//!
//! 60 random edits beside 100 kpps; `RELAY_TEST_LONG=1`: 1,000 beside 200 kpps; half the rate after each void run.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set up its world has failed")]

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use relay::lab::recv::{Report, Verdict, describe};
use relay_tests::paths::{self, Moved, Outside, Path, Waits, await_moved};
use relay_tests::{
    Lab, LabSpec, Listener, RelayProcess, assert_frames_conserved, assert_rules_conserved, needs_root, on_every_path, recv_args, send_args,
    send_in_background,
};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

on_every_path!(random_edits_by_apply);

/// Flows that rules come and go for, and where their rules may send.
const FLOWS: usize = 8;
const DESTINATIONS: usize = 4;
const STAYS: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=stays";
const ATTEMPTS: u32 = 5;
const MISSING: &str = "probes came for";

/// Where each flow goes, if anywhere.
type Set = [Option<usize>; FLOWS];

fn edits() -> u32 {
    if paths::long() { 1_000 } else { 60 }
}

/// Small numbers from a fixed seed (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

fn text(set: &Set) -> String {
    let rule = |id: &str, matching: &str, to: &str, key: &str| {
        format!(
            "[[rule]]\nid = \"{id}\"\ningress = \"r0\"\nmatch = \"{matching}\"\n[[rule.output]]\negress = \"r1\"\nto = \"{to}\"\n{key}\n"
        )
    };
    let stays = rule("stays", "239.1.1.1:5000", "239.9.9.9:6000", "ttl = \"keep\"");
    let others = set.iter().enumerate().filter_map(|(flow, to)| {
        to.map(|to| rule(&format!("f{flow}"), &format!("239.2.0.{flow}:5000"), &format!("239.8.0.{to}:{}", 7_000 + to), ""))
    });
    format!("version = 1\n{stays}{}", others.collect::<String>())
}

/// The probes' world: one sender, one socket for each destination.
struct Probe {
    sender: UdpSocket,
    receivers: Vec<UdpSocket>,
}

impl Probe {
    fn new(lab: &Lab) -> Self {
        let sender = lab.src.run(|| UdpSocket::bind("10.0.0.1:0").unwrap()).unwrap();
        sender.set_multicast_ttl_v4(8).unwrap();
        let receiver = |to: usize| {
            let group = Ipv4Addr::new(239, 8, 0, to as u8);
            let socket = UdpSocket::bind((group, 7_000 + to as u16)).unwrap();
            socket.join_multicast_v4(&group, &Ipv4Addr::new(10, 0, 1, 2)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            socket
        };
        let receivers = lab.sink(1).run(|| (0..DESTINATIONS).map(receiver).collect()).unwrap();
        Self { sender, receivers }
    }

    /// One packet of each flow; each must go where the set says, those without a rule nowhere. What comes belongs to this edit.
    fn check(&self, edit: u32, set: &Set) -> Result<()> {
        for flow in 0..FLOWS {
            self.sender.send_to(&[edit.to_be_bytes(), (flow as u32).to_be_bytes()].concat(), format!("239.2.0.{flow}:5000"))?;
        }
        let wanted = set.iter().flatten().count();
        let (begin, mut got) = (Instant::now(), 0);
        while got < wanted {
            ensure!(begin.elapsed() < Duration::from_secs(2), "edit {edit}: {got} of {wanted} {MISSING} {set:?}");
            got += self.take(edit, set)?;
        }
        ensure!(got == wanted, "edit {edit}: {got} probes instead of {wanted} for {set:?}");
        Ok(())
    }

    /// Takes what has come; anything that this edit's rules would not have sent is an error.
    fn take(&self, edit: u32, set: &Set) -> Result<usize> {
        let mut count = 0;
        for (to, socket) in self.receivers.iter().enumerate() {
            let mut buffer = [0; 64];
            loop {
                match socket.recv(&mut buffer) {
                    Ok(8) => {}
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
                    other => anyhow::bail!("edit {edit}: {other:?}"),
                }
                let word = |at: usize| u32::from_be_bytes([buffer[at], buffer[at + 1], buffer[at + 2], buffer[at + 3]]);
                let (of, flow) = (word(0), word(4) as usize);
                ensure!(
                    of == edit && set.get(flow) == Some(&Some(to)),
                    "a stale rule: flow {flow} of edit {of} came to {to} in edit {edit}: {set:?}"
                );
                count += 1;
            }
        }
        Ok(count)
    }
}

fn random_edits_by_apply(path: &Path) {
    for attempt in 0..ATTEMPTS {
        let rate = (if paths::long() { 200_000 } else { 100_000 }) >> attempt;
        let lab = Lab::new(LabSpec::default()).unwrap();
        let relay = path.start(&lab, &[STAYS]).unwrap();
        let (waits, outside) = (Waits::of(&relay).unwrap(), Outside::of(&lab, &relay, "stays").unwrap());
        let outcome = edit_under_load(&lab, &relay, rate);
        let (starved, outside) = (waits.starved(&relay).unwrap(), outside.lost(&relay).unwrap());
        match outcome {
            Ok(report) if report.verdict == Verdict::Pass => return,
            Ok(report) if report.verdict == Verdict::Void => eprintln!("void, once more: {}", describe(&report)),
            Ok(report) if paths::only_lost(&report, outside) => {
                eprintln!("void, once more: others lost {outside}: {}", describe(&report));
            }
            Ok(report) if starved.is_none() => panic!("{}: {}; {}", path.name, describe(&report), relay.stats().unwrap()),
            Ok(report) => eprintln!("void, once more: denied a CPU for a share {starved:?}: {}", describe(&report)),
            Err(error) if outside > 0 && error.to_string().contains(MISSING) => {
                eprintln!("void, once more: others lost {outside}: {error:#}")
            }
            Err(error) => panic!("{}: {error:#}; {}", path.name, relay.log()),
        }
    }
    panic!("{ATTEMPTS} runs in a row were void: the machine is too busy to judge the relay");
}

fn edit_under_load(lab: &Lab, relay: &RelayProcess, rate: u64) -> Result<Report> {
    let before = relay.stats()?;
    let mut args = recv_args("k1", "239.9.9.9:6000", None)?;
    (args.timeout, args.duration) = (Duration::from_secs(60), Some(Duration::from_secs(600)));
    let listener = Listener::with(lab.sink(1), &args)?;
    let mut args = send_args("s0", "239.1.1.1:5000", rate, 0)?;
    (args.count, args.duration) = (None, Some(Duration::from_secs(600)));
    let sending = send_in_background(lab, &args)?;
    let begin = Instant::now();
    let edited = edit_at_random(lab, relay);
    let took = begin.elapsed();
    drop(sending);
    std::thread::sleep(Duration::from_millis(300));
    let report = listener.finish()?;
    edited?;
    eprintln!("{} edits in {took:?} beside {rate} pps: {}", edits(), describe(&report));
    if report.verdict == Verdict::Pass {
        ensure!(report.first_sequence == Some(0), "the first packets are missing: {report:?}");
        let after = await_moved(relay, &before, "stays", &Moved::all(report.received, 1))?;
        assert_rules_conserved(&after);
        assert_frames_conserved(&after);
    }
    Ok(report)
}

fn edit_at_random(lab: &Lab, relay: &RelayProcess) -> Result<()> {
    let probe = Probe::new(lab);
    let directory = tempfile::tempdir()?;
    let (good, bad) = (directory.path().join("good.toml"), directory.path().join("bad.toml"));
    let mut random = Random(0x5eed_0000_0000_0001);
    let mut set: Set = [None; FLOWS];
    for edit in 1..=edits() {
        for _ in 0..=random.below(3) {
            let to = random.below(DESTINATIONS + 1);
            set[random.below(FLOWS)] = (to < DESTINATIONS).then_some(to);
        }
        std::fs::write(&good, text(&set))?;
        relay.command(&["apply", good.to_str().unwrap()])?;
        probe.check(edit, &set)?;
        if edit % 10 == 0 {
            // A file that is right but for its end.
            std::fs::write(&bad, format!("{}[[rule]]\ningress = \"r0\"\nmatch = \"239.1.1.1:5000\"\n", text(&[Some(0); FLOWS])))?;
            let rules = relay.rules()?;
            ensure!(relay.client(&["apply", bad.to_str().unwrap()], false)?.status.code() == Some(2), "a bad file is not refused");
            ensure!(relay.rules()? == rules, "a bad file has changed something");
            probe.check(edit, &set)?;
        }
    }
    std::thread::sleep(Duration::from_millis(100));
    ensure!(probe.take(edits(), &set)? == 0, "probes came late");
    Ok(())
}

fn ids(relay: &RelayProcess) -> Vec<String> {
    let rules = relay.rules().unwrap();
    rules.as_array().unwrap().iter().map(|rule| rule["id"].as_str().unwrap().to_owned()).collect()
}

fn await_ids(relay: &RelayProcess, wanted: &[&str]) {
    let begin = Instant::now();
    while ids(relay) != wanted {
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?} instead of {wanted:?}; {}", ids(relay), relay.log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn write(file: &PathBuf, rules: &[(&str, &str)]) {
    let rule = |(id, group): &(&str, &str)| {
        format!("[[rule]]\nid = \"{id}\"\ningress = \"r0\"\nmatch = \"{group}:5000\"\n[[rule.output]]\negress = \"r1\"\n")
    };
    std::fs::write(file, format!("version = 1\n{}", rules.iter().map(rule).collect::<String>())).unwrap();
}

/// SIGHUP is `apply` of the config file and `--rule`; rules that were added at run time go, and are named in the log.
#[test]
fn sighup_reads_the_file_again_or_changes_nothing() {
    needs_root!();
    let _turn = paths::turn();
    let lab = Lab::simple().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("relay.toml");
    write(&file, &[("one", "239.1.0.1"), ("two", "239.1.0.2")]);
    let name = file.to_str().unwrap();
    let relay = relay_tests::start_relay(&lab, &["--config", name, "--rule", "r0 239.1.0.9:5000 -> r1; id=given"]).unwrap();
    await_ids(&relay, &["one", "two", "given"]);
    relay.command(&["rule", "add", "r0 239.1.0.8:5000 -> r1; id=guest"]).unwrap();
    write(&file, &[("two", "239.1.0.2"), ("three", "239.1.0.3")]);
    assert_eq!(relay.client(&["diff", name], false).unwrap().status.code(), Some(5), "a difference");
    assert_eq!(ids(&relay), ["one", "two", "given", "guest"], "diff and --dry-run change nothing");
    relay.command(&["apply", "--dry-run", name]).unwrap();
    relay.signal(Signal::SIGHUP).unwrap();
    await_ids(&relay, &["two", "three", "given"]);
    assert!(relay.log().contains("guest"), "{}", relay.log());
    std::fs::write(&file, "version = 1\n[[rule]]\nid = \"x\"\n").unwrap();
    relay.signal(Signal::SIGHUP).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(ids(&relay), ["two", "three", "given"]);
    assert!(relay.log().contains("nothing changed") && relay.log().contains("relay.toml:2"), "{}", relay.log());
}

/// A file cut off in the middle of a rule, as by a copy that has not finished: the rules that run stay as they are. (What is cut off
/// between two rules is a file with fewer rules.)
#[test]
fn sighup_with_a_file_cut_off_changes_nothing() {
    needs_root!();
    let _turn = paths::turn();
    let lab = Lab::simple().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("relay.toml");
    write(&file, &[("one", "239.1.0.1"), ("two", "239.1.0.2")]);
    let whole = std::fs::read_to_string(&file).unwrap();
    let relay = relay_tests::start_relay(&lab, &["--config", file.to_str().unwrap()]).unwrap();
    let rules = relay.rules().unwrap();
    let refused = || relay.log().matches("nothing changed").count();
    // In the version, a key, a string, a table's name, an address, before an output, at the last byte but two.
    let at = |text: &str, into: usize| whole.rfind(text).unwrap() + into;
    let cuts =
        [5, at("match", 3), at("239.1.0.2", 5), at("[[rule]]", 6), at("[[rule.output]]", 0), at("[[rule.output]]", 16), whole.len() - 2];
    for (number, cut) in cuts.into_iter().enumerate() {
        std::fs::write(&file, &whole[..cut]).unwrap();
        relay.signal(Signal::SIGHUP).unwrap();
        let begin = Instant::now();
        while refused() <= number {
            assert!(begin.elapsed() < Duration::from_secs(5), "taken for whole: {:?}; {}", &whole[..cut], relay.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(relay.rules().unwrap(), rules, "{:?}", &whole[..cut]);
    }
}
