//! `relay bench latency`: how long a packet is inside the relay at a steady rate, measured outside of it.
//!
//! The generator's program stamps every datagram as it makes it, at even distances, one by one, never in bursts. The kernel stamps it
//! again (SO_TIMESTAMPNS) when the stack of the receiving interface gets it: `k1` behind the relay, and, for row `wire`, `r0` with no relay at all. Every 2^n-th datagram is kept, in a socket that is read only
//! after the run. What is reported of a path is each percentile of sender → `k1` minus the median of sender → `r0`: the time from
//! the arrival at the relay's interface to the arrival at the sink's, its veth pair included. The jitter of sender and wire is not
//! taken off, so p99 and p99.9 are upper bounds; row `wire` says how much of it there is, and is not corrected itself. While that row
//! is measured, a thread on the relay's CPU looks at the clock and does nothing else: how long the machine lets it stand still is
//! said below the table, for no relay can be faster there.
//!
//! Must never take a stamp inside the relay, and never read a sample while packets flow.

use super::report::{CpuStops, PREEMPTED_PER_SECOND, Report, Row, keeps_pace, machine, median, sorted};
use super::{Place, program};
use crate::lab::arms::{Arm, GROUP, Running};
use crate::lab::clock::Stops;
use crate::lab::error::{LabError, Result};
use crate::lab::generator::{Generator, SEQUENCE_AT, STAMP_AT, received, sink_drops};
use crate::lab::payload::STAMPED_LEN;
use crate::lab::progress::Steps;
use crate::lab::send::parse_duration;
use crate::lab::socket::{RecvBatch, sampler};
use crate::lab::topology::Lab;
use hdrhistogram::Histogram;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Samples of a run at most: what a receive buffer of 64 MiB holds twice.
const MAX_SAMPLES: u64 = 32_768;
/// Before and after the packets: time stamping is switched on, queues run empty.
const SETTLE: Duration = Duration::from_millis(150);
/// A frame of any payload.
const FRAME: usize = 2_048;
/// The curve's points.
const SHARES: [f64; 25] = [
    0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.993, 0.995, 0.997, 0.998,
    0.999, 0.9995,
];

/// Arguments of `relay bench latency`.
#[derive(Clone, Debug, clap::Args)]
pub struct LatencyArgs {
    /// Paths, in order; `wire`, the same without a relay, is measured in any case
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Arm::Xsk, Arm::Kernel, Arm::Packet, Arm::Redirect])]
    pub rows: Vec<Arm>,
    /// Packets a second
    #[arg(long, default_value_t = 500_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub rate: u64,
    /// Rounds; each runs every row once
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Length of a run
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "2s")]
    pub duration: Duration,
    /// Bytes of payload
    #[arg(long, default_value_t = 64, value_name = "B", value_parser = clap::value_parser!(u16).range(STAMPED_LEN as i64..=1472))]
    pub payload: u16,
    /// Where it runs.
    #[command(flatten)]
    pub place: Place,
}

/// One run: `arm` is `None` for the wire.
#[derive(Debug)]
struct Run {
    arm: Option<Arm>,
    sent: u64,
    delivered: u64,
    preemptions: u64,
    sink_drops: u64,
    /// Sender → stack, ns.
    times: Histogram<u64>,
    /// The relay's CPU, where it was free.
    stops: Option<Stops>,
}

/// All rounds of all rows.
pub fn measure(args: &LatencyArgs) -> Result<Report> {
    args.place.check()?;
    if let Some(arm) = args.rows.iter().find(|arm| **arm == Arm::Coalesce) {
        return Err(LabError::Invalid(format!(
            "{}: a super-frame has one stamp for many packets; its latency is not measured",
            arm.name()
        )));
    }
    let lab = Lab::simple()?;
    let mut generator = Generator::new(&lab, GROUP, usize::from(args.payload))?;
    generator.set_stamped(usize::from(args.payload))?;
    let mut report = Report { machine: machine(), ..Report::default() };
    report.ping_pong_ns.push(args.place.ping_pong_ns()?);
    let arms: Vec<Option<Arm>> = std::iter::once(None).chain(args.rows.iter().copied().map(Some)).collect();
    let runs = rounds(&lab, &mut generator, args, &arms, &mut report.errors);
    report.ping_pong_ns.push(args.place.ping_pong_ns()?);
    let wire = row(args, None, &runs, 0.0).ok_or_else(|| LabError::Invalid(report.errors.join("; ")))?;
    let wire_p50 = wire.p50_us.unwrap_or(0.0);
    report.cpu = Some(cpu_stops(args.place.cpus, &runs));
    report.rows = arms.into_iter().filter_map(|arm| row(args, arm, &runs, if arm.is_some() { wire_p50 } else { 0.0 })).collect();
    report.preempted = report.rows.iter().any(|row| row.preempted);
    Ok(report)
}

fn cpu_stops(cpu: usize, runs: &[Run]) -> CpuStops {
    let mut all = Stops::default();
    runs.iter().filter_map(|run| run.stops.as_ref()).for_each(|stops| all.add(stops));
    CpuStops { cpu, share: all.share(), p99_us: all.wait_ns(0.99) / 1e3, p999_us: all.wait_ns(0.999) / 1e3 }
}

fn name(arm: Option<Arm>) -> &'static str {
    arm.map_or("wire", Arm::name)
}

/// Wire, A, B, wire, A, B: a row that fails once is not tried again.
fn rounds(lab: &Lab, generator: &mut Generator, args: &LatencyArgs, arms: &[Option<Arm>], errors: &mut Vec<String>) -> Vec<Run> {
    let (mut runs, mut broken) = (Vec::new(), Vec::new());
    let mut steps = Steps::new(Some(args.rounds as usize * arms.len()));
    for round in 1..=args.rounds {
        for arm in arms {
            steps.next(&format!("{} at {} packets a second, round {round}", name(*arm), args.rate));
            if broken.contains(arm) {
                continue;
            }
            match run(lab, generator, args, *arm) {
                Ok(run) => runs.push(run),
                Err(error) => {
                    broken.push(*arm);
                    errors.push(format!("row {}: {error}", name(*arm)));
                }
            }
        }
    }
    runs
}

fn run(lab: &Lab, generator: &mut Generator, args: &LatencyArgs, arm: Option<Arm>) -> Result<Run> {
    let (namespace, iface) = if arm.is_some() { (lab.sink(1), "k1") } else { (&lab.relay, "r0") };
    let sampler = namespace.run(|| sampler(iface, SEQUENCE_AT + 4, mask(args)))??;
    let file = program(args.place.program.as_ref())?;
    let extra = ["--pipeline", "fused", "--wait", args.place.wait()];
    let running = arm.map(|arm| Running::start(lab, arm, &file, Some(args.place.cpus), &extra)).transpose()?;
    let switches = || running.as_ref().and_then(Running::preemptions).unwrap_or(0);
    std::thread::sleep(SETTLE);
    let (before, drops, preemptions) = (received(namespace, iface)?, sink_drops(lab)?, switches());
    let (sent, stops) = std::thread::scope(|scope| {
        let watch = arm.is_none().then(|| scope.spawn(|| Stops::watch(args.place.cpus, args.duration)));
        let sent = generator.paced(lab, args.place.generator_cpu, args.rate, args.duration);
        (sent, watch.map(|watch| watch.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))))
    });
    let (sent, stops) = (sent?, stops.transpose()?);
    std::thread::sleep(SETTLE);
    Ok(Run {
        arm,
        sent,
        delivered: received(namespace, iface)? - before,
        preemptions: switches().saturating_sub(preemptions),
        sink_drops: sink_drops(lab)? - drops,
        times: read(&sampler)?,
        stops,
    })
}

/// Keeps every 2^n-th datagram, so that a run's samples fit the buffer.
fn mask(args: &LatencyArgs) -> u32 {
    let packets = (args.rate as f64 * args.duration.as_secs_f64()) as u64;
    let every = packets.div_ceil(MAX_SAMPLES).next_power_of_two().min(1 << 31);
    (every - 1) as u32
}

/// What the sampler has kept.
fn read(sampler: &OwnedFd) -> Result<Histogram<u64>> {
    let mut times = Histogram::new_with_bounds(1, 60_000_000_000, 3).map_err(|e| LabError::Invalid(e.to_string()))?;
    let mut batch = RecvBatch::new(FRAME, 256);
    while batch.receive(sampler.as_fd()).is_ok() {
        for (frame, meta) in batch.datagrams() {
            let at = STAMP_AT as usize;
            if let (Some(stamp), Some(arrived)) = (frame.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()), meta.stamp_ns) {
                times.saturating_record(arrived.saturating_sub(u64::from_be_bytes(stamp)).max(1));
            }
        }
    }
    Ok(times)
}

/// Medians over the rounds, `wire_us` taken off; `None` where no run succeeded.
fn row(args: &LatencyArgs, arm: Option<Arm>, runs: &[Run], wire_us: f64) -> Option<Row> {
    let runs: Vec<&Run> = runs.iter().filter(|run| run.arm == arm && !run.times.is_empty()).collect();
    let seconds = args.duration.as_secs_f64().max(1e-9);
    let corrected = |ns: u64| (ns as f64 / 1e3 - wire_us).max(0.0);
    let at = |share: f64| median(&sorted(runs.iter().map(|run| corrected(run.times.value_at_quantile(share)))));
    let delivered = sorted(runs.iter().map(|run| run.delivered as f64 / seconds));
    let (sent, received): (u64, u64) = (runs.iter().map(|run| run.sent).sum(), runs.iter().map(|run| run.delivered).sum());
    let mut all = runs.first()?.times.clone();
    for run in runs.iter().skip(1) {
        // Same bounds, so it cannot fail.
        let _ = all.add(&run.times);
    }
    let offered_pps = median(&sorted(runs.iter().map(|run| run.sent as f64 / seconds)))?;
    let switches = runs.iter().map(|run| run.preemptions as f64 / seconds).fold(0.0, f64::max);
    Some(Row {
        path: name(arm).into(),
        engine: arm.map_or("", Arm::engine).into(),
        wait: arm.filter(|arm| arm.is_relay()).map_or("", |_| args.place.wait()).into(),
        payload: args.payload,
        fanout: 1,
        flows: 1,
        rules: 1,
        hops: u32::from(arm.is_some()),
        offered_pps,
        delivered_pps: median(&delivered)?,
        loss: 1.0 - (received as f64 / sent.max(1) as f64).min(1.0),
        lost_packets: sent.saturating_sub(received),
        sent_packets: sent,
        p50_us: at(0.5),
        p99_us: at(0.99),
        p999_us: at(0.999),
        latency_samples: all.len(),
        latency_curve: SHARES.iter().map(|share| (corrected(all.value_at_quantile(*share)), *share)).collect(),
        median_of: u32::try_from(runs.len()).unwrap_or(0),
        min: delivered.first().copied()?,
        max: delivered.last().copied()?,
        preemptions_per_second: switches,
        preempted: switches > PREEMPTED_PER_SECOND,
        sink_drops: runs.iter().map(|run| run.sink_drops).sum(),
        asked_pps: Some(args.rate as f64),
        source_bound: !keeps_pace(offered_pps, args.rate as f64),
        ..Row::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: LatencyArgs,
    }

    fn run(arm: Option<Arm>, times: impl IntoIterator<Item = u64>) -> Run {
        let mut histogram = Histogram::new_with_bounds(1, 60_000_000_000, 3).unwrap();
        times.into_iter().for_each(|ns| histogram.saturating_record(ns));
        Run { arm, sent: 1_000_000, delivered: 999_000, preemptions: 0, sink_drops: 0, times: histogram, stops: None }
    }

    #[test]
    fn the_median_of_the_wire_is_taken_off_every_percentile() {
        let args = Cli::parse_from(["latency"]).args;
        let steps = |base: u64| (0..1_000).map(move |n| base + if n == 999 { 50_000 } else { 0 });
        let runs =
            [run(None, [700; 10]), run(Some(Arm::Xsk), steps(1_700)), run(Some(Arm::Xsk), steps(1_900)), run(Some(Arm::Xsk), [9_700])];
        let xsk = row(&args, Some(Arm::Xsk), &runs, 0.7).unwrap();
        let near = |value: Option<f64>, wanted: f64| assert!((value.unwrap() - wanted).abs() < 0.02, "{value:?} is not {wanted}");
        near(xsk.p50_us, 1.2);
        near(xsk.p99_us, 1.2);
        near(xsk.p999_us, 1.2);
        near(xsk.latency_curve.last().map(|(us, _)| *us), 51.0);
        assert_eq!((xsk.latency_samples, xsk.median_of, xsk.lost_packets, xsk.wait.as_str()), (2_001, 3, 3_000, "spin"));
        assert!(xsk.latency_curve.windows(2).all(|pair| pair[0].0 <= pair[1].0 && pair[0].1 < pair[1].1));
        let wire = row(&args, None, &runs, 0.0).unwrap();
        near(wire.p50_us, 0.7);
        assert_eq!((wire.path.as_str(), wire.hops), ("wire", 0));
        assert!(row(&args, Some(Arm::Packet), &runs, 0.7).is_none());
    }

    #[test]
    fn so_many_are_kept_as_the_buffer_holds() {
        let mask_of = |text: &str| mask(&Cli::parse_from(text.split(' ')).args);
        assert_eq!(mask_of("latency --rate 1000 --duration 1s"), 0, "all of them");
        assert_eq!(mask_of("latency --rate 500000 --duration 2s"), 31, "one in 32");
        assert_eq!(mask_of("latency --rate 500000 --duration 60s"), 1023);
        assert!(Cli::try_parse_from(["latency", "--payload", "23"]).is_err(), "no room for a stamp");
    }
}
