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
    kills: u32,
    flaps: u32,
    removals: u32,
    changes: u32,
    /// Minutes since the begin; KiB of the supervisor, of the workers; descriptors of the supervisor.
    looks: Vec<(f64, u64, u64, usize)>,
}

impl Soak {
    fn fault(&mut self, lab: &Lab, relay: &RelayProcess, number: u32) {
        match number % 4 {
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

/// The end of a soak.
struct Outcome {
    rate: u64,
    sent: u64,
    report: Report,
    before: Value,
    after: Value,
    /// Packets of the stream that others than the relay have lost.
    others: u64,
    soak: Soak,
}

fn run(path: &Path, length: Duration) -> Outcome {
    let lab = Lab::new(LabSpec { sinks: 3, separate_sinks: true, ..LabSpec::default() }).unwrap();
    let relay = path.start(&lab, &RULES).unwrap();
    let rate = loss_free(&lab, &relay) / 2;
    let (before, outside) = (relay.stats().unwrap(), Outside::of(&lab, &relay, "stream").unwrap());
    let mut args = recv_args("k1", TO, None).unwrap();
    (args.timeout, args.duration) = (Duration::from_secs(60), Some(length * 2));
    let listener = Listener::with(lab.sink(1), &args).unwrap();
    let mut args = send_args("s0", FROM, rate, 0).unwrap();
    (args.count, args.duration) = (None, Some(length));
    let (sending, begin) = (send_in_background(&lab, &args).unwrap(), Instant::now());
    let mut soak = Soak::default();
    for number in 0.. {
        std::thread::sleep(PERIOD);
        if begin.elapsed() + PERIOD * 2 > length {
            break;
        }
        soak.look(&relay, begin);
        soak.fault(&lab, &relay, number);
    }
    let sent = sending.wait().unwrap().sent;
    std::thread::sleep(Duration::from_millis(500));
    let report = listener.finish().unwrap();
    Outcome { rate, sent, report, before, after: relay.stats().unwrap(), others: outside.lost(&relay).unwrap(), soak }
}

impl Outcome {
    fn named(&self) -> u64 {
        named(&self.after) - named(&self.before)
    }

    fn slopes(&self) -> [f64; 2] {
        [self.soak.slope(|look| look.1 as f64), self.soak.slope(|look| look.2 as f64)]
    }

    fn print(&self, path: &Path, minutes: f64) {
        let Self { rate, sent, report, soak, .. } = self;
        let (last, slopes, named) = (soak.looks.last().unwrap(), self.slopes(), self.named());
        let (wrong, silence) = (report.duplicated + report.reordered + report.corrupted, report.longest_silence_us as f64 / 1e3);
        let descriptors = soak.looks.iter().map(|look| look.3);
        println!("{}: {minutes} minutes at {rate} pps, sent {sent}, arrived {}", path.name, report.received);
        println!("  lost {} ({named} named), duplicated, reordered or corrupted {wrong}, silent for {silence:.1} ms", report.lost);
        println!("  {} kills, {} flaps, {} removals, {} rule changes", soak.kills, soak.flaps, soak.removals, soak.changes);
        println!("  supervisor {} KiB, {:+.0} KiB/min; workers {} KiB, {:+.0} KiB/min", last.1, slopes[0], last.2, slopes[1]);
        println!("  descriptors {}–{}", descriptors.clone().min().unwrap(), descriptors.max().unwrap());
    }

    fn check(&self) {
        let Self { report, after, .. } = self;
        assert_ne!(report.verdict, Verdict::Void, "the receiver dropped by itself: {report:?}");
        assert!(report.lost <= self.named() + self.others, "{} lost by others: {report:?}; {after}", self.others);
        assert_eq!((report.duplicated, report.reordered, report.corrupted), (0, 0, 0), "{report:?}");
        assert_eq!(report.received, moved(&self.before, after, "stream").unwrap().tx[0], "{after}");
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
