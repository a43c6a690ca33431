//! The packet paths that every acceptance test runs on, and one verified run of traffic through a relay.
//!
//! A run that a receiver spoiled by its own drops, that lost while the relay was denied a CPU, or whose losses all happened before
//! or behind the relay, is void and repeated (DECISIONS, tests and figures). Must never forgive the relay a packet.

use crate::{Listener, rule_stats, start_relay};
use anyhow::{Context, Result, ensure};
use relay::lab::recv::{self, Verdict};
use relay::lab::{Lab, RelayProcess, send};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Void runs in a row that end a test.
const ATTEMPTS: u32 = 5;
/// Counters are published a moment after the packets.
const SETTLE: Duration = Duration::from_secs(2);

static TURN: Mutex<()> = Mutex::new(());

/// Share of a run that a thread of the relay may stand ready without a CPU before a loss says nothing (LIMITS: a preempted run).
const STARVED: f64 = 0.05;

/// How long each thread of the relay's workers has stood ready without a CPU, ns (/proc/PID/task/TID/schedstat, second number).
#[derive(Clone, Debug)]
pub struct Waits {
    at: Instant,
    threads: BTreeMap<PathBuf, u64>,
}

impl Waits {
    /// Until now.
    pub fn of(relay: &RelayProcess) -> Result<Self> {
        let mut threads = BTreeMap::new();
        for pid in relay.worker_pids()? {
            for entry in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let text = std::fs::read_to_string(entry.path().join("schedstat")).unwrap_or_default();
                let waited = text.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(0);
                threads.insert(entry.path(), waited);
            }
        }
        Ok(Self { at: Instant::now(), threads })
    }

    /// The largest share of the time since then that a thread has waited, where it is too large.
    pub fn starved(&self, relay: &RelayProcess) -> Result<Option<f64>> {
        let now = Self::of(relay)?;
        let since = |(path, waited): (&PathBuf, &u64)| waited - self.threads.get(path).copied().unwrap_or(0).min(*waited);
        let longest = now.threads.iter().map(since).max().unwrap_or(0);
        let share = longest as f64 / (now.at - self.at).as_nanos() as f64;
        Ok((share > STARVED).then_some(share))
    }
}

/// Packets that others than the relay have lost: the sender's interface, where the ring that the kernel empties for the relay was
/// full (another task had its CPU: on the kernel path no thread of the relay's waits then, but the kernel's `ksoftirqd`), and the
/// far ends of a rule's outputs, where theirs was (`send_failed`).
#[derive(Clone, Debug)]
pub struct Outside<'a> {
    lab: &'a Lab,
    rule: &'a str,
    before: u64,
}

impl<'a> Outside<'a> {
    /// Until now.
    pub fn of(lab: &'a Lab, relay: &RelayProcess, rule: &'a str) -> Result<Self> {
        let mut outside = Self { lab, rule, before: 0 };
        outside.before = outside.lost(relay)?;
        Ok(outside)
    }

    /// Since then.
    pub fn lost(&self, relay: &RelayProcess) -> Result<u64> {
        let link: Value = serde_json::from_str(&self.lab.src.output("ip", &["-j", "-s", "link", "show", "dev", "s0"])?)?;
        let dropped = link[0]["stats64"]["tx"]["dropped"].as_u64().context("ip shows no drops of s0")?;
        let outputs = rule_stats(&relay.stats()?, self.rule)?["outputs"].clone();
        let refused = outputs.as_array().into_iter().flatten().filter_map(|output| output["drops"]["send_failed"].as_u64());
        Ok(dropped + refused.sum::<u64>() - self.before)
    }
}

/// Drops for want of room: rings that nobody emptied in time.
const NO_ROOM: [&str; 3] = ["fill_empty", "rx_ring_full", "egress_full"];

/// Packets that a relay has dropped so, since it began.
pub fn no_room(stats: &Value) -> u64 {
    let rules = stats["rules"].as_array().into_iter().flatten();
    let outputs = rules.clone().flat_map(|rule| rule["outputs"].as_array().into_iter().flatten());
    let places = rules.chain(outputs).chain(stats["interfaces"].as_array().into_iter().flatten());
    places.flat_map(|place| NO_ROOM.map(|name| place["drops"][name].as_u64().unwrap_or(0))).sum()
}

/// Whether nothing is wrong with a stream but packets missing, no more than others have lost.
pub fn only_lost(report: &recv::Report, outside: u64) -> bool {
    let wrong = report.duplicated + report.reordered + report.corrupted + report.foreign;
    report.lost > 0 && report.lost <= outside && wrong == 0
}

/// Sets the niceness of this thread and of what it starts: the relay goes before what else runs on the machine (a busy machine is
/// not a lossy relay), a thread that only watches goes behind it.
pub fn renice(nice: &str) {
    let thread = nix::unistd::gettid().to_string();
    // Where that fails, the test is as strict as with it, only less patient.
    let _ = Command::new("renice").args(["-n", nice, "-p", &thread]).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// Tests of one file take turns: two relays under load on two CPUs would measure each other.
pub fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the long forms were asked for.
pub fn long() -> bool {
    std::env::var_os("RELAY_TEST_LONG").is_some_and(|value| value != "0")
}

/// A way through the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Name in messages.
    pub name: &'static str,
    /// Arguments of `relay run`.
    pub args: &'static [&'static str],
    /// `path` of its rules.
    pub path: &'static str,
    /// `engine` of its rules.
    pub engine: &'static str,
}

/// AF_XDP, one thread.
pub const XSK_FUSED: Path = Path { name: "xsk fused", args: &["--backend", "xsk", "--pipeline", "fused"], path: "xsk", engine: "tx" };
/// AF_XDP, two threads.
pub const XSK_SPLIT: Path = Path { name: "xsk split", args: &["--backend", "xsk", "--pipeline", "split"], path: "xsk", engine: "tx" };
/// AF_PACKET with io_uring.
pub const PACKET: Path = Path { name: "packet", args: &["--backend", "packet"], path: "packet", engine: "uring" };
/// The XDP program alone.
pub const KERNEL: Path = Path { name: "kernel", args: &["--backend", "kernel"], path: "kernel", engine: "xdp" };
/// AF_XDP in, super-frames through AF_PACKET out, one thread.
pub const XSK_COALESCE: Path = Path { name: "xsk coalesce", engine: "coalesce", ..XSK_FUSED };
/// The same with two threads.
pub const XSK_COALESCE_SPLIT: Path = Path { name: "xsk coalesce split", engine: "coalesce", ..XSK_SPLIT };
/// AF_PACKET with io_uring in, super-frames out.
pub const PACKET_COALESCE: Path = Path { name: "packet coalesce", engine: "coalesce", ..PACKET };
/// All of them.
pub const PATHS: [Path; 4] = [XSK_FUSED, XSK_SPLIT, PACKET, KERNEL];

/// Makes a module of three tests with the coalescing engine, one a path, from each `fn(&Path)`.
#[macro_export]
macro_rules! coalescing {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            $crate::on_path!(xsk_fused, $name, XSK_COALESCE);
            $crate::on_path!(xsk_split, $name, XSK_COALESCE_SPLIT);
            $crate::on_path!(packet, $name, PACKET_COALESCE);
        }
    )+};
}

/// Makes a module of four tests, one a path, from each `fn(&Path)`.
#[macro_export]
macro_rules! on_every_path {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            $crate::on_path!(xsk_fused, $name, XSK_FUSED);
            $crate::on_path!(xsk_split, $name, XSK_SPLIT);
            $crate::on_path!(packet, $name, PACKET);
            $crate::on_path!(kernel, $name, KERNEL);
        }
    )+};
}

/// One test of [`on_every_path`].
#[macro_export]
macro_rules! on_path {
    ($test:ident, $body:ident, $path:ident) => {
        #[test]
        fn $test() {
            $crate::needs_root!();
            let _turn = $crate::paths::turn();
            super::$body(&$crate::paths::$path);
        }
    };
}

impl Path {
    /// Starts a relay on this path with these rules; it forwards when this returns, and every rule goes this way.
    pub fn start(&self, lab: &Lab, rules: &[&str]) -> Result<RelayProcess> {
        let rules: Vec<String> = rules.iter().map(|rule| self.rule(rule)).collect();
        let mut args = self.args.to_vec();
        args.extend(rules.iter().flat_map(|rule| ["--rule", rule]));
        renice("-15");
        let relay = start_relay(lab, &args);
        renice("0");
        let relay = relay?;
        self.check(&relay)?;
        Ok(relay)
    }

    /// A rule, with the engine named where it is not chosen by itself.
    pub fn rule(&self, rule: &str) -> String {
        match (self.engine, rule.contains(';')) {
            ("coalesce", true) => format!("{rule} engine=coalesce"),
            ("coalesce", false) => format!("{rule}; engine=coalesce"),
            _ => rule.into(),
        }
    }

    /// Fails unless every rule says this path and this engine.
    pub fn check(&self, relay: &RelayProcess) -> Result<()> {
        let rules = relay.rules()?;
        let rules = rules.as_array().context("no list of rules")?;
        for rule in rules {
            ensure!(rule["path"] == self.path && rule["engine"] == self.engine, "not {}: {rule}", self.name);
        }
        let status = relay.status()?;
        let pipeline = if self.name.ends_with("split") { "split" } else { "fused" };
        let workers = status["workers"].as_array().context("no workers")?;
        ensure!(self.path == "packet" || workers.iter().all(|worker| worker["pipeline"] == pipeline), "not {}: {status}", self.name);
        Ok(())
    }
}

/// What is listened for: sink link, group, datagrams expected (0: none may come).
pub type Listen<'a> = (u32, &'a str, u64);

/// A run that is not void.
#[derive(Debug)]
pub struct Run {
    /// One for each [`Listen`].
    pub reports: Vec<recv::Report>,
    /// `relay stats` before.
    pub before: Value,
    /// `relay stats` after.
    pub after: Value,
}

/// What one rule counted during a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Packets taken.
    pub rx: u64,
    /// Drops for all outputs.
    pub drops: BTreeMap<String, u64>,
    /// Packets sent, by output.
    pub tx: Vec<u64>,
    /// Drops, by output.
    pub output_drops: Vec<BTreeMap<String, u64>>,
}

impl Moved {
    /// Everything received went to all of `outputs`.
    pub fn all(packets: u64, outputs: usize) -> Self {
        Self { rx: packets, drops: BTreeMap::new(), tx: vec![packets; outputs], output_drops: vec![BTreeMap::new(); outputs] }
    }

    /// The rule's drops and what is left of them are as said.
    pub fn dropped(packets: u64, reason: &str, outputs: usize) -> Self {
        Self { drops: BTreeMap::from([(reason.into(), packets)]), tx: vec![0; outputs], ..Self::all(packets, outputs) }
    }
}

fn growth(before: &Value, after: &Value) -> BTreeMap<String, u64> {
    let old = |name: &str| before[name].as_u64().unwrap_or(0);
    let named = after.as_object().into_iter().flatten().map(|(name, count)| (name.clone(), count.as_u64().unwrap_or(0) - old(name)));
    named.filter(|(_, count)| *count > 0).collect()
}

/// What rule `id` counted between two `relay stats`.
pub fn moved(before: &Value, after: &Value, id: &str) -> Result<Moved> {
    let (before, after) = (rule_stats(before, id)?, rule_stats(after, id)?);
    let grown = |old: &Value, new: &Value| new.as_u64().unwrap_or(0) - old.as_u64().unwrap_or(0);
    let outputs = after["outputs"].as_array().context("no outputs")?;
    let olds = before["outputs"].as_array().context("no outputs")?;
    Ok(Moved {
        rx: grown(&before["rx_packets"], &after["rx_packets"]),
        drops: growth(&before["drops"], &after["drops"]),
        tx: outputs.iter().zip(olds).map(|(new, old)| grown(&old["tx_packets"], &new["tx_packets"])).collect(),
        output_drops: outputs.iter().zip(olds).map(|(new, old)| growth(&old["drops"], &new["drops"])).collect(),
    })
}

/// Waits until rule `id` has counted exactly `expected` since `before`; `relay stats` of then.
pub fn await_moved(relay: &RelayProcess, before: &Value, id: &str, expected: &Moved) -> Result<Value> {
    let begin = Instant::now();
    loop {
        let after = relay.stats()?;
        let now = moved(before, &after, id)?;
        if now == *expected {
            return Ok(after);
        }
        ensure!(begin.elapsed() < SETTLE, "rule {id} counted {now:?}, expected {expected:?}: {after}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Run {
    /// Sends each of `sends` in turn and listens; repeats while a receiver spoils it.
    pub fn of(lab: &Lab, relay: &RelayProcess, sends: &[send::Args], listens: &[Listen<'_>]) -> Result<Self> {
        for _ in 0..ATTEMPTS {
            let (run, starved) = Self::once(lab, relay, sends, listens)?;
            let starved = starved.filter(|_| run.reports.iter().any(|report| report.lost > 0));
            if starved.is_none() && run.reports.iter().all(|report| report.verdict != Verdict::Void) {
                return Ok(run);
            }
            eprintln!("void, once more: a receiver dropped by itself, or the relay lost for want of a CPU (share {starved:?})");
        }
        anyhow::bail!("{ATTEMPTS} runs in a row were void: the machine is too busy to judge the relay")
    }

    fn once(lab: &Lab, relay: &RelayProcess, sends: &[send::Args], listens: &[Listen<'_>]) -> Result<(Self, Option<f64>)> {
        let before = relay.stats()?;
        let open = |(link, group, expected): &Listen<'_>| {
            Listener::on(lab.sink(*link), &format!("k{link}"), group, (*expected > 0).then_some(*expected))
        };
        let listeners = listens.iter().map(open).collect::<Result<Vec<_>>>()?;
        let waits = Waits::of(relay)?;
        for args in sends {
            let sent = crate::send(lab, args)?;
            ensure!(Some(sent.sent) == args.count, "the sender sent {} of {:?}", sent.sent, args.count);
        }
        let starved = waits.starved(relay)?;
        if listens.iter().all(|(_, _, expected)| *expected == 0) {
            std::thread::sleep(Duration::from_millis(150));
        }
        // Those that expect something first: by then, what must not come has had its time.
        let expects = |at: usize| listens.get(at).is_some_and(|(_, _, expected)| *expected > 0);
        let (some, none): (Vec<_>, Vec<_>) = listeners.into_iter().enumerate().partition(|(at, _)| expects(*at));
        let mut reports = BTreeMap::new();
        for (at, listener) in some {
            reports.insert(at, listener.wait()?);
        }
        for (at, listener) in none {
            reports.insert(at, listener.finish()?);
        }
        Ok((Self { reports: reports.into_values().collect(), before, after: relay.stats()? }, starved))
    }

    /// Every listener got exactly what it expects, once, in order, whole.
    pub fn assert_whole(&self, listens: &[Listen<'_>]) {
        assert_eq!(self.reports.len(), listens.len());
        for (report, (_, group, expected)) in self.reports.iter().zip(listens) {
            let got = (report.received, report.lost, report.duplicated, report.reordered, report.corrupted, report.foreign);
            let wanted = (*expected, 0, 0, 0, 0, 0);
            assert_eq!(
                got,
                wanted,
                "{group}: (received, lost, duplicated, reordered, corrupted, foreign): {}; {}",
                recv::describe(report),
                self.after
            );
        }
    }
}
