//! The relay for minutes under all that comes and goes at once: rules, workers, interfaces. A stream beside it loses nothing that no
//! counter names, and neither memory nor descriptors grow.
//!
//! `RELAY_SOAK=MINUTES cargo test -p relay-tests --test soak -- --ignored --nocapture`; prints what docs/reliability.md
//! shows.
//! Must never run by itself.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::Signal;
use relay::lab::enable_gro;
use relay::lab::process::signal_pid;
use relay::lab::recv::{Report, Verdict};
use relay_tests::paths::{Outside, Path, Run, XSK_FUSED, XSK_SPLIT, moved, turn};
use relay_tests::process::{kib, wait_replaced};
use relay_tests::{
    Lab, LabSpec, Listener, RelayProcess, assert_frames_conserved, assert_rules_conserved, interface_stats, needs_root, recv_args,
    rule_stats, send_args, send_in_background,
};
use serde_json::Value;
use std::time::{Duration, Instant};

const RULES: [&str; 2] =
    ["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=stream", "r0 239.1.1.2:5000 -> r3 239.9.9.8:6000 ttl=keep; id=flaps"];
const FROM: &str = "239.1.1.1:5000";
const TO: &str = "239.9.9.9:6000";
/// Between two faults.
const PERIOD: Duration = Duration::from_millis(1_500);
/// Of a stream.
const SLICE: Duration = Duration::from_secs(60);
/// One stream of so many, and one more, may be void.
const VOID_SHARE: usize = 10;

/// The highest of these rates, doubled step by step, at which two seconds lose nothing.
fn loss_free(lab: &Lab, relay: &RelayProcess) -> u64 {
    let mut best = 10_000;
    for rate in [20_000, 40_000, 80_000, 160_000, 320_000] {
        let listens = [(1, TO, rate * 2)];
        let run = Run::of(lab, relay, &[send_args("s0", FROM, rate, rate * 2).unwrap()], &listens);
        if run.is_ok_and(|run| run.reports[0].lost == 0) { best = rate } else { break }
    }
    best
}

/// What was done, and what was seen.
#[derive(Debug, Default)]
struct Soak {
    faults: u32,
    kills: u32,
    flaps: u32,
    removals: u32,
    changes: u32,
    /// Minutes since the begin; KiB of the supervisor, of the workers; descriptors of the supervisor.
    looks: Vec<(f64, u64, u64, usize)>,
}

impl Soak {
    fn fault(&mut self, lab: &Lab, relay: &RelayProcess) {
        self.faults += 1;
        match self.faults % 4 {
            0 => {
                let pids = relay.worker_pids().unwrap();
                signal_pid(pids[0], Signal::SIGKILL).unwrap();
                wait_replaced(relay, &pids, Duration::from_secs(10)).unwrap();
                self.kills += 1;
            }
            1 => {
                lab.relay.ip_batch("link set r3 down\nlink set r3 up\n").unwrap();
                self.flaps += 1;
            }
            2 => {
                for change in 0..5 {
                    let rule = format!("r0 239.2.0.{change}:5000 -> r2 239.8.0.{change}:7000; id=c{change}");
                    relay.command(&["rule", "add", &rule]).unwrap();
                    relay.command(&["rule", "del", &format!("c{change}")]).unwrap();
                    self.changes += 2;
                }
            }
            _ => {
                lab.relay.ip_batch("link del r3\n").unwrap();
                let home = lab.sink(3);
                let lines =
                    format!("link add r3 type veth peer name k3 netns {}\naddr add 10.0.3.1/24 dev r3\nlink set r3 up\n", home.name());
                lab.relay.ip_batch(&lines).unwrap();
                home.ip_batch("addr add 10.0.3.2/24 dev k3\nlink set k3 up\n").unwrap();
                enable_gro(home, "k3").unwrap();
                self.removals += 1;
            }
        }
    }

    fn look(&mut self, relay: &RelayProcess, begin: Instant) {
        let workers = relay.worker_pids().unwrap().into_iter().map(|pid| kib(pid, "RssAnon").unwrap_or(0)).sum();
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", relay.pid())).unwrap().count();
        let minutes = begin.elapsed().as_secs_f64() / 60.0;
        self.looks.push((minutes, kib(relay.pid(), "RssAnon").unwrap(), workers, descriptors));
    }

    /// Least-squares slope of a column over the second half, KiB a minute.
    fn slope(&self, column: impl Fn(&(f64, u64, u64, usize)) -> f64) -> f64 {
        let half = &self.looks[self.looks.len() / 2..];
        let count = half.len() as f64;
        let (x, y) = (half.iter().map(|look| look.0).sum::<f64>() / count, half.iter().map(&column).sum::<f64>() / count);
        let covariance: f64 = half.iter().map(|look| (look.0 - x) * (column(look) - y)).sum();
        covariance / half.iter().map(|look| (look.0 - x).powi(2)).sum::<f64>()
    }
}

/// Drops that a counter names, of the stream.
fn named(stats: &Value) -> u64 {
    let sum = |drops: &Value| drops.as_object().unwrap().values().filter_map(Value::as_u64).sum::<u64>();
    let ingress = interface_stats(stats, "r0").unwrap();
    let rule = rule_stats(stats, "stream").unwrap();
    sum(&ingress["drops"]) + sum(&rule["drops"]) + sum(&rule["outputs"][0]["drops"])
}

/// A minute's stream.
struct Slice {
    sent: u64,
    report: Report,
    /// Of the stream, by the relay.
    relayed: u64,
    /// Of the stream, by a counter of the relay's.
    named: u64,
    /// Packets of the stream that others than the relay have lost.
    others: u64,
}

impl Slice {
    /// The receiver had no CPU for so long that its own buffer was full: says nothing about the relay.
    fn is_void(&self) -> bool {
        self.report.verdict == Verdict::Void
    }

    fn check(&self) {
        let Self { report, named, others, .. } = self;
        assert!(report.lost <= named + others, "{named} named, {others} lost by others: {report:?}");
        assert_eq!((report.duplicated, report.reordered, report.corrupted), (0, 0, 0), "{report:?}");
        assert_eq!(report.received, self.relayed, "{report:?}");
    }
}

/// The end of a soak.
struct Outcome {
    rate: u64,
    slices: Vec<Slice>,
    after: Value,
    soak: Soak,
}

fn slice(lab: &Lab, relay: &RelayProcess, rate: u64, length: Duration, (soak, begin): (&mut Soak, Instant)) -> Slice {
    let (before, outside) = (relay.stats().unwrap(), Outside::of(lab, relay, "stream").unwrap());
    let mut args = recv_args("k1", TO, None).unwrap();
    (args.timeout, args.duration) = (Duration::from_secs(60), Some(length * 2));
    let listener = Listener::with(lab.sink(1), &args).unwrap();
    let mut args = send_args("s0", FROM, rate, 0).unwrap();
    (args.count, args.duration) = (None, Some(length));
    let (sending, start) = (send_in_background(lab, &args).unwrap(), Instant::now());
    loop {
        std::thread::sleep(PERIOD);
        if start.elapsed() + PERIOD * 2 > length {
            break;
        }
        soak.look(relay, begin);
        soak.fault(lab, relay);
    }
    let sent = sending.wait().unwrap().sent;
    std::thread::sleep(Duration::from_millis(500));
    let report = listener.finish().unwrap();
    let after = relay.stats().unwrap();
    let relayed = moved(&before, &after, "stream").unwrap().tx[0];
    Slice { sent, report, relayed, named: named(&after) - named(&before), others: outside.lost(relay).unwrap() }
}

/// Minute after minute, in streams of their own: one that the machine has spoiled is made once more.
fn run(path: &Path, length: Duration) -> Outcome {
    let lab = Lab::new(LabSpec { sinks: 3, separate_sinks: true, ..LabSpec::default() }).unwrap();
    let relay = path.start(&lab, &RULES).unwrap();
    let rate = loss_free(&lab, &relay) / 2;
    let (mut soak, begin) = (Soak::default(), Instant::now());
    let each = length.min(SLICE);
    let wanted = length.as_secs_f64() / each.as_secs_f64();
    let mut slices: Vec<Slice> = Vec::new();
    while (valid(&slices).count() as f64) < wanted {
        slices.push(slice(&lab, &relay, rate, each, (&mut soak, begin)));
        let void = slices.len() - valid(&slices).count();
        assert!(void <= slices.len() / VOID_SHARE + 1, "{void} streams of {} were void: the machine is too busy", slices.len());
    }
    Outcome { rate, slices, after: relay.stats().unwrap(), soak }
}

fn valid(slices: &[Slice]) -> impl Iterator<Item = &Slice> {
    slices.iter().filter(|slice| !slice.is_void())
}

impl Outcome {
    fn sum(&self, of: impl Fn(&Slice) -> u64) -> u64 {
        valid(&self.slices).map(of).sum()
    }

    fn slopes(&self) -> [f64; 2] {
        [self.soak.slope(|look| look.1 as f64), self.soak.slope(|look| look.2 as f64)]
    }

    fn print(&self, path: &Path, minutes: f64) {
        let Self { rate, slices, soak, .. } = self;
        let (last, slopes) = (soak.looks.last().unwrap(), self.slopes());
        let wrong = self.sum(|slice| slice.report.duplicated + slice.report.reordered + slice.report.corrupted);
        let silence = valid(slices).map(|slice| slice.report.longest_silence_us).max().unwrap();
        let void = slices.len() - valid(slices).count();
        let (sent, arrived) = (self.sum(|slice| slice.sent), self.sum(|slice| slice.report.received));
        println!("{}: {minutes} minutes at {rate} pps, sent {sent}, arrived {arrived}; {void} void streams beside them", path.name);
        let (lost, named) = (self.sum(|slice| slice.report.lost), self.sum(|slice| slice.named));
        let silence = silence as f64 / 1e3;
        println!("  lost {lost} ({named} named), duplicated, reordered or corrupted {wrong}, silent for {silence:.1} ms at most");
        println!("  {} kills, {} flaps, {} removals, {} rule changes", soak.kills, soak.flaps, soak.removals, soak.changes);
        println!("  supervisor {} KiB, {:+.0} KiB/min; workers {} KiB, {:+.0} KiB/min", last.1, slopes[0], last.2, slopes[1]);
        let descriptors = soak.looks.iter().map(|look| look.3);
        println!("  descriptors {}–{}", descriptors.clone().min().unwrap(), descriptors.max().unwrap());
    }

    fn check(&self) {
        let Self { slices, after, .. } = self;
        valid(slices).for_each(Slice::check);
        assert_rules_conserved(after);
        assert_frames_conserved(after);
        assert_eq!(after["frames"]["hand"], 0, "{after}");
        let looks = &self.soak.looks;
        assert!(self.slopes().iter().all(|slope| *slope < 256.0), "memory grows: {looks:?}");
        // Some are made when they are first needed, and a client that is being let go has one.
        let quarter = looks.len() / 4;
        let least = |from: usize| looks.iter().skip(from * quarter).take(quarter).map(|look| look.3).min();
        assert_eq!(least(1), least(3), "{looks:?}");
    }
}

#[test]
#[ignore = "minutes: RELAY_SOAK=3 cargo test -p relay-tests --test soak -- --ignored --nocapture"]
fn under_faults_for_minutes_nothing_is_lost_and_nothing_grows() {
    needs_root!();
    let _turn = turn();
    let minutes = std::env::var("RELAY_SOAK").ok().and_then(|minutes| minutes.parse().ok()).unwrap_or(1.0);
    let mut paths = vec![XSK_FUSED];
    // Sender, receiver and two threads of the worker are busy all the time.
    if std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() >= 4) {
        paths.push(XSK_SPLIT);
    } else {
        println!("SKIPPED: two threads beside a sender and a receiver need four CPUs");
    }
    let each = minutes / paths.len() as f64;
    for path in paths {
        let outcome = run(&path, Duration::from_secs_f64(each * 60.0));
        outcome.print(&path, each);
        outcome.check();
    }
}
