//! Rules come and go while another carries traffic: that one loses nothing, and a command that has returned has taken effect.
//!
//! 100 kpps through the rule that stays; `RELAY_TEST_LONG=1`: 200 kpps; half of it after each void run.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set up its world has failed")]

use anyhow::{Result, ensure};
use relay::lab::recv::{Report, Verdict, describe};
use relay_tests::paths::{self, Moved, Outside, Path, Waits, await_moved, moved};
use relay_tests::{
    Lab, LabSpec, Listener, RelayProcess, assert_frames_conserved, assert_rules_conserved, on_every_path, recv_args, send, send_args,
    send_in_background,
};
use serde_json::Value;
use std::time::{Duration, Instant};

on_every_path!(rules_come_and_go, a_new_egress_interface_loses_nothing_elsewhere, apply_swaps_all_rules_but_one);

const STAYS: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=stays";
/// Rounds of add and delete: 50 in the long form.
fn rounds() -> u64 {
    if paths::long() { 50 } else { 15 }
}

/// Packets to a rule while it is there, and after.
const PROBES: u64 = 10;
/// Runs that the receiver spoils, at most.
const ATTEMPTS: u32 = 5;

fn rate() -> u64 {
    if paths::long() { 200_000 } else { 100_000 }
}

fn two_sinks() -> Lab {
    Lab::new(LabSpec { sinks: 2, separate_sinks: true, ..LabSpec::default() }).unwrap()
}

/// Runs `work` while `rate()` packets a second flow through the rule `stays`, which must get them all. Its receiver's report.
/// After a void run, half the rate: what is promised holds at any rate that the machine can carry.
fn under_load(path: &Path, work: impl Fn(&Lab, &RelayProcess) -> Result<()>) -> Report {
    for attempt in 0..ATTEMPTS {
        let rate = rate() >> attempt;
        let lab = two_sinks();
        let relay = path.start(&lab, &[STAYS]).unwrap();
        let (waits, outside) = (Waits::of(&relay).unwrap(), Outside::of(&lab, &relay, "stays").unwrap());
        let outcome = stream(&lab, &relay, rate, &work);
        let (starved, outside) = (waits.starved(&relay).unwrap(), outside.lost(&relay).unwrap());
        path.check(&relay).unwrap();
        match outcome {
            Ok(report) if report.verdict == Verdict::Pass => return report,
            Ok(report) if report.verdict == Verdict::Void => eprintln!("void, once more: {}", describe(&report)),
            Ok(report) if paths::only_lost(&report, outside) => {
                eprintln!("void, once more: others lost {outside}: {}", describe(&report));
            }
            Ok(report) if starved.is_none() => panic!("{}: {}; {}", path.name, describe(&report), relay.stats().unwrap()),
            Err(error) if starved.is_none() => panic!("{}: {error:#}; {}", path.name, relay.log()),
            lost => eprintln!(
                "void, once more: the relay was denied a CPU for a share {starved:?} of the run: {:?}",
                lost.map(|r| describe(&r))
            ),
        }
    }
    panic!("{ATTEMPTS} runs in a row were void: the machine is too busy to judge the relay");
}

/// The stream that must not suffer, and the work beside it. An error: the work, or the counters.
fn stream(lab: &Lab, relay: &RelayProcess, rate: u64, work: impl Fn(&Lab, &RelayProcess) -> Result<()>) -> Result<Report> {
    let before = relay.stats()?;
    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", None)?;
    let mut args = send_args("s0", "239.1.1.1:5000", rate, 0)?;
    (args.count, args.duration) = (None, Some(Duration::from_secs(60)));
    let sending = send_in_background(lab, &args)?;
    std::thread::sleep(Duration::from_millis(200));
    let begin = Instant::now();
    let worked = work(lab, relay);
    let took = begin.elapsed();
    std::thread::sleep(Duration::from_millis(200));
    // The sender is stopped, not asked: how many it sent is what the relay and the receiver must agree about.
    drop(sending);
    std::thread::sleep(Duration::from_millis(200));
    let report = listener.finish()?;
    worked?;
    eprintln!("{took:?} of changes at {rate} pps; {}; {}", describe(&report), losses(&before, &relay.stats()?));
    if report.verdict == Verdict::Pass {
        ensure!(report.first_sequence == Some(0), "the first packets are missing: {report:?}");
        let after = await_moved(relay, &before, "stays", &Moved::all(report.received, 1))?;
        assert_rules_conserved(&after);
        assert_frames_conserved(&after);
    }
    Ok(report)
}

/// What the ingress interface dropped between two `relay stats`.
fn losses(before: &Value, after: &Value) -> String {
    let drops = |stats: &Value| stats["interfaces"].as_array().and_then(|all| all.iter().find(|one| one["name"] == "r0").cloned());
    format!("r0 before {:?}, after {:?}", drops(before).map(|r0| r0["drops"].clone()), drops(after).map(|r0| r0["drops"].clone()))
}

/// `PROBES` packets numbered from `first` to `to`.
fn probe(lab: &Lab, to: &str, first: u64) -> Result<()> {
    let mut args = send_args("s0", to, 20_000, PROBES)?;
    args.first = first;
    ensure!(send(lab, &args)?.sent == PROBES, "the sender sent less");
    Ok(())
}

/// Exactly the first `PROBES` came.
fn check_probed(report: &Report, what: &str) -> Result<()> {
    let got = (report.received, report.first_sequence, report.last_sequence, report.lost);
    ensure!(got == (PROBES, Some(0), Some(PROBES - 1), 0), "{what}: {report:?}");
    Ok(())
}

fn patient(lab: &Lab, link: u32, group: &str) -> Result<Listener> {
    let mut args = recv_args(&format!("k{link}"), group, None)?;
    args.timeout = Duration::from_secs(60);
    Listener::with(lab.sink(link), &args)
}

/// Added: forwards with the next packet. Deleted: does not forward another one.
fn rules_come_and_go(path: &Path) {
    under_load(path, |lab, relay| {
        for round in 1..=rounds() {
            let (from, to) = (format!("239.2.0.{round}:5000"), format!("239.8.0.{round}:6000"));
            let listener = patient(lab, 1, &to)?;
            relay.command(&["rule", "add", &format!("r0 {from} -> r1 {to}; id=r{round}")])?;
            let before = relay.stats()?;
            probe(lab, &from, 0)?;
            await_moved(relay, &before, &format!("r{round}"), &Moved::all(PROBES, 1))?;
            relay.command(&["rule", "del", &format!("r{round}")])?;
            probe(lab, &from, 1_000)?;
            std::thread::sleep(Duration::from_millis(20));
            check_probed(&listener.finish()?, &format!("round {round}"))?;
        }
        ensure!(relay.rules()?.as_array().map(Vec::len) == Some(1), "rules are left over");
        Ok(())
    });
}

/// An interface that no rule had so far means new ports: workers are replaced, as planned, without a packet lost.
fn a_new_egress_interface_loses_nothing_elsewhere(path: &Path) {
    let report = under_load(path, |lab, relay| {
        let listener = patient(lab, 2, "239.8.8.8:6000")?;
        let begin = Instant::now();
        relay.command(&["rule", "add", "r0 239.2.2.2:5000 -> r2 239.8.8.8:6000; id=new"])?;
        eprintln!("a new egress interface took {:?}", begin.elapsed());
        probe(lab, "239.2.2.2:5000", 0)?;
        std::thread::sleep(Duration::from_millis(300));
        check_probed(&listener.finish()?, "the new interface")
    });
    eprintln!("{}: silence of the rule that stayed {} µs", path.name, report.longest_silence_us);
}

/// Twenty planned replacements on the packet path, whose io_uring dies with each worker: what the kernel has received into it
/// is taken before that.
#[test]
fn twenty_replacements_of_packet_workers_lose_nothing() {
    relay_tests::needs_root!();
    let _turn = paths::turn();
    under_load(&paths::PACKET, |lab, relay| {
        for number in 1..=20 {
            lab.relay
                .ip_batch(&format!("link add d{number} type veth peer name e{number}\nlink set d{number} up\nlink set e{number} up\n"))?;
            let pids = relay.worker_pids()?;
            relay.command(&["rule", "add", &format!("r0 239.4.0.{number}:5000 -> d{number}; id=d{number}")])?;
            ensure!(relay.worker_pids()? != pids, "round {number} replaced no worker");
        }
        Ok(())
    });
}

/// `relay apply` in one step: the rules that go, those that come, and the one that stays.
fn apply_swaps_all_rules_but_one(path: &Path) {
    let file = |text: &str| {
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        std::fs::write(file.path(), format!("version = 1\n{text}")).unwrap();
        file
    };
    let stays = rule("stays", "239.1.1.1:5000", "r1", "239.9.9.9:6000", "ttl = \"keep\"");
    let set = |number: u64| {
        let swapped: String =
            (1..=5).map(|k| rule(&format!("s{k}"), &format!("239.3.{number}.{k}:5000"), "r1", "239.7.7.7:6000", "")).collect();
        file(&format!("{stays}{swapped}"))
    };
    under_load(path, |_, relay| {
        let mut before = relay.stats()?;
        for number in 1..=10 {
            relay.command(&["apply", set(number).path().to_str().unwrap()])?;
            let after = relay.stats()?;
            ensure!(after["rules"].as_array().map(Vec::len) == Some(6), "not the new set: {after}");
            ensure!(moved(&before, &after, "stays")?.rx > 0, "round {number}: the rule that stays does not count on");
            before = after;
        }
        Ok(())
    });
}

fn rule(id: &str, matching: &str, egress: &str, to: &str, key: &str) -> String {
    format!(
        "[[rule]]\nid = \"{id}\"\ningress = \"r0\"\nmatch = \"{matching}\"\n[[rule.output]]\negress = \"{egress}\"\nto = \"{to}\"\n{key}\n"
    )
}
