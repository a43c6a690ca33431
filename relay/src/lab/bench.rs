//! `relay bench path`: flat-out packets per second through each path and each baseline, interleaved, counted at the receiver.
//!
//! LIMITS.md, "Rules for a figure", is the law here: the generator's ceiling is named, arms alternate, medians come with minimum
//! and maximum, and what disturbed a run is said with it. Must never report what the relay says about itself as delivered.

use super::arms::{Arm, GROUP, REWRITTEN, Running};
use super::clock;
use super::error::{LabError, Result};
use super::generator::{Generator, Sink, Window, sink_drops};
use super::send::parse_duration;
use super::topology::Lab;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// A ping-pong slower than this says that the machine is in its slow state.
const SLOW_PING_PONG_NS: f64 = 200.0;
/// A relay within this of the ceiling may be the generator's figure.
const CEILING_MARGIN: f64 = 0.9;
/// At flat out, a relay that delivers this share of the offer was not the bottleneck.
const KEPT_UP: f64 = 0.98;
/// A run that loses more than this share after the relay is void.
const SINK_SHARE: f64 = 0.001;
/// Involuntary switches a second that make a figure doubtful.
const PREEMPTED_PER_SECOND: f64 = 20.0;

/// Arguments of `relay bench path`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Rows, in order
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Arm::Xsk, Arm::Coalesce, Arm::Packet, Arm::Sockets, Arm::Redirect])]
    pub rows: Vec<Arm>,
    /// Rounds; each runs every row once
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Length of a run; with --rate, of the paced run [default: 3s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "3s")]
    pub duration: Duration,
    /// Bytes of payload
    #[arg(long, default_value_t = 64, value_name = "B", value_parser = clap::value_parser!(u16).range(1..=1472))]
    pub payload: u16,
    /// Instead of flat out: packets a second from a paced source, one run a row, loss reported
    #[arg(long, value_name = "N")]
    pub rate: Option<u64>,
    /// CPU of the generator
    #[arg(long, default_value_t = 0, value_name = "CPU")]
    pub generator_cpu: usize,
    /// CPU of the relay and the sink
    #[arg(long, default_value_t = 1, value_name = "CPU")]
    pub cpus: usize,
    /// Outputs of the rule, each rewritten differently, all out of one interface; what is delivered is the sum
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub fanout: u16,
    /// The relay's wait strategy
    #[arg(long, default_value = "spin", value_name = "STRATEGY")]
    pub wait: String,
    /// The relay under test [default: this program]
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

/// `relay bench path --json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What it ran on.
    pub machine: Machine,
    /// Packets a second that reach an XDP_DROP in the relay's place.
    pub generator_ceiling_pps: f64,
    /// Any row was.
    pub preempted: bool,
    /// Round trip of a cache line between the two CPUs, before and after.
    pub ping_pong_ns: Vec<f64>,
    /// One a path.
    pub rows: Vec<Row>,
    /// Rows that could not run: what and why.
    pub errors: Vec<String>,
}

/// Where the figures come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// `uname -r`.
    pub kernel: String,
    /// Model name of the first CPU.
    pub cpu: String,
    /// CPUs allowed.
    pub cpus: usize,
    /// Devices of the path.
    pub device: String,
}

/// One path's figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Path or baseline.
    pub path: String,
    /// Engine.
    pub engine: String,
    /// Wait strategy, for the relay's own rows.
    pub wait: String,
    /// Bytes of payload.
    pub payload: u16,
    /// Outputs.
    pub fanout: u32,
    /// Relays in a row.
    pub hops: u32,
    /// Median of the offered rates.
    pub offered_pps: f64,
    /// Median of the delivered rates.
    pub delivered_pps: f64,
    /// Share of the offer that was not delivered, median.
    pub loss: f64,
    /// Packets lost; for a paced run exact.
    pub lost_packets: u64,
    /// Packets sent; for a paced run exact.
    pub sent_packets: u64,
    /// Latency: not measured by this command yet.
    pub p50_us: Option<f64>,
    /// The same.
    pub p99_us: Option<f64>,
    /// The same.
    pub p999_us: Option<f64>,
    /// Runs behind the median.
    pub median_of: u32,
    /// Least delivered rate.
    pub min: f64,
    /// Greatest delivered rate.
    pub max: f64,
    /// Delivered, against row `packet`; `None` without it.
    pub ratio_to_packet: Option<f64>,
    /// Involuntary switches of the relay's worker, a second, worst run.
    pub preemptions_per_second: f64,
    /// That is too many for the figure to be trusted.
    pub preempted: bool,
    /// The generator may have been the limit: the ratio is a lower bound.
    pub source_bound: bool,
    /// Packets dropped between the relay and the sink.
    pub sink_drops: u64,
    /// A run's window was not covered by the generator, or the sink lost packets: no figure at all.
    pub void: bool,
}

/// All rounds of all rows.
pub fn measure(args: &Args) -> Result<Report> {
    let allowed = clock::allowed_cpus();
    if let Some(cpu) = [args.generator_cpu, args.cpus].into_iter().find(|cpu| !allowed.contains(cpu)) {
        return Err(LabError::Invalid(format!("CPU {cpu} is not allowed here (--generator-cpu, --cpus): {allowed:?}")));
    }
    let lab = Lab::simple()?;
    let mut generator = Generator::new(&lab, GROUP, usize::from(args.payload))?;
    let mut report = Report { machine: machine(), ..Report::default() };
    report.ping_pong_ns.push(clock::ping_pong_ns(args.generator_cpu, args.cpus)?);
    report.generator_ceiling_pps = ceiling(&lab, &mut generator, args)?;
    let runs = match args.rate {
        None => flat_out(&lab, &mut generator, args, &mut report.errors),
        Some(rate) => paced(&lab, &mut generator, args, rate, &mut report.errors),
    };
    report.ping_pong_ns.push(clock::ping_pong_ns(args.generator_cpu, args.cpus)?);
    report.rows = args.rows.iter().filter_map(|arm| row(args, *arm, &runs, report.generator_ceiling_pps)).collect();
    set_ratios(&mut report.rows);
    report.preempted = report.rows.iter().any(|row| row.preempted);
    Ok(report)
}

/// The generator alone.
fn ceiling(lab: &Lab, generator: &mut Generator, args: &Args) -> Result<f64> {
    let sink = Sink::at_relay(lab)?;
    Ok(generator.window(lab, args.generator_cpu, &sink, args.duration.min(Duration::from_secs(1)))?.delivered_pps())
}

/// One run of one row.
#[derive(Clone, Copy, Debug)]
struct Run {
    arm: Arm,
    window: Window,
    preemptions: u64,
}

/// A B C, A B C: a change of the machine's state hits all rows alike.
fn flat_out(lab: &Lab, generator: &mut Generator, args: &Args, errors: &mut Vec<String>) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut broken = Vec::new();
    for round in 1..=args.rounds {
        for arm in &args.rows {
            if broken.contains(arm) {
                continue;
            }
            eprintln!("round {round}/{}: {}", args.rounds, arm.name());
            match flat_out_once(lab, generator, args, *arm) {
                Ok(run) => runs.push(run),
                Err(error) => {
                    broken.push(*arm);
                    errors.push(format!("row {}: {error}", arm.name()));
                }
            }
        }
    }
    runs
}

fn flat_out_once(lab: &Lab, generator: &mut Generator, args: &Args, arm: Arm) -> Result<Run> {
    let sink = sink(lab, arm, args)?;
    let running = start(lab, args, arm)?;
    let before = running.preemptions().unwrap_or(0);
    let window = generator.window(lab, args.generator_cpu, &sink, args.duration)?;
    Ok(Run { arm, window, preemptions: running.preemptions().unwrap_or(before) - before })
}

/// The cheapest end for what the arm sends, so that the arm is what is measured.
fn sink<'a>(lab: &'a Lab, arm: Arm, args: &Args) -> Result<Sink<'a>> {
    match arm {
        Arm::Redirect | Arm::Kernel => Sink::at_link(lab, 1),
        Arm::Xsk | Arm::Coalesce | Arm::Packet | Arm::Sockets => Sink::of_stack(lab, 1, usize::from(args.payload)),
    }
}

fn start(lab: &Lab, args: &Args, arm: Arm) -> Result<Running> {
    let program = program(args.program.as_ref())?;
    let extra = ["--pipeline", "fused", "--wait", &args.wait];
    Running::start_fanout(lab, arm, args.fanout, &program, Some(args.cpus), &extra)
}

/// The relay under test: this executable unless told otherwise.
pub fn program(given: Option<&PathBuf>) -> Result<PathBuf> {
    given.map_or_else(|| std::env::current_exe().map_err(LabError::io("own executable")), |path| Ok(path.clone()))
}

/// One paced run a row: every packet is counted in and out.
fn paced(lab: &Lab, generator: &mut Generator, args: &Args, rate: u64, errors: &mut Vec<String>) -> Vec<Run> {
    let mut runs = Vec::new();
    for arm in &args.rows {
        eprintln!("{}: {rate} packets a second for {:?}", arm.name(), args.duration);
        match paced_once(lab, generator, args, *arm, rate) {
            Ok(run) => runs.push(run),
            Err(error) => errors.push(format!("row {}: {error}", arm.name())),
        }
    }
    runs
}

fn paced_once(lab: &Lab, generator: &mut Generator, args: &Args, arm: Arm, rate: u64) -> Result<Run> {
    let sink = sink(lab, arm, args)?;
    let running = start(lab, args, arm)?;
    let (switches, before) = (running.preemptions().unwrap_or(0), sink.count()?);
    let drops = sink_drops(lab)?;
    let sent = generator.paced(lab, args.generator_cpu, rate, args.duration)?;
    std::thread::sleep(Duration::from_millis(300));
    let window = Window {
        offered: sent,
        delivered: sink.count()? - before,
        seconds: args.duration.as_secs_f64(),
        sink_drops: sink_drops(lab)? - drops,
        covered: true,
    };
    Ok(Run { arm, window, preemptions: running.preemptions().unwrap_or(switches) - switches })
}

/// Medians of one row; `None` where no run succeeded.
fn row(args: &Args, arm: Arm, runs: &[Run], ceiling: f64) -> Option<Row> {
    let runs: Vec<&Run> = runs.iter().filter(|run| run.arm == arm).collect();
    let delivered = sorted(runs.iter().map(|run| run.window.delivered_pps()));
    let offered = median(&sorted(runs.iter().map(|run| run.window.offered_pps())))?;
    let middle = median(&delivered)?;
    let fanout = u64::from(args.fanout);
    let wanted = |run: &Run| (run.window.offered * fanout).max(1);
    let loss = median(&sorted(runs.iter().map(|run| 1.0 - run.window.delivered as f64 / wanted(run) as f64)))?.max(0.0);
    let inputs = middle / fanout as f64;
    let switches = runs.iter().map(|run| run.preemptions as f64 / run.window.seconds.max(1e-9)).fold(0.0, f64::max);
    let own = matches!(arm, Arm::Xsk | Arm::Coalesce | Arm::Packet | Arm::Kernel);
    Some(Row {
        path: arm.name().into(),
        engine: arm.engine().into(),
        wait: if own { args.wait.clone() } else { String::new() },
        payload: args.payload,
        fanout: u32::from(args.fanout),
        hops: 1,
        offered_pps: offered,
        delivered_pps: middle,
        loss,
        lost_packets: runs.iter().map(|run| (run.window.offered * fanout).saturating_sub(run.window.delivered)).sum(),
        sent_packets: runs.iter().map(|run| run.window.offered).sum(),
        median_of: u32::try_from(runs.len()).unwrap_or(0),
        min: delivered.first().copied()?,
        max: delivered.last().copied()?,
        preemptions_per_second: switches,
        preempted: switches > PREEMPTED_PER_SECOND,
        source_bound: args.rate.is_none() && (inputs > CEILING_MARGIN * ceiling || inputs > KEPT_UP * offered),
        sink_drops: runs.iter().map(|run| run.window.sink_drops).sum(),
        void: runs.iter().any(|run| !run.window.covered || run.window.sink_drops as f64 > SINK_SHARE * run.window.delivered as f64),
        ..Row::default()
    })
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> Option<f64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get(sorted.len().saturating_sub(1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

fn set_ratios(rows: &mut [Row]) {
    let packet = rows.iter().find(|row| row.path == Arm::Packet.name()).map(|row| row.delivered_pps);
    for row in rows {
        row.ratio_to_packet = packet.filter(|pps| *pps > 0.0).map(|pps| row.delivered_pps / pps);
    }
}

/// Kernel and CPU, read from the running system.
pub fn machine() -> Machine {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    Machine {
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().into(),
        cpu: model.trim_start_matches(['\t', ' ', ':']).into(),
        cpus: clock::allowed_cpus().len(),
        device: "veth".into(),
    }
}

/// The report as a table.
pub fn table(report: &Report) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["path", "engine", "delivered pps", "min", "max", "× packet", "offered pps", "loss", "notes"]);
    for row in &report.rows {
        table.add_row([
            row.path.clone(),
            row.engine.clone(),
            format!("{:.0}", row.delivered_pps),
            format!("{:.0}", row.min),
            format!("{:.0}", row.max),
            row.ratio_to_packet.map_or("-".into(), |ratio| format!("{ratio:.2}")),
            format!("{:.0}", row.offered_pps),
            format!("{:.3} %", row.loss * 100.0),
            notes(row),
        ]);
    }
    let [first, .., last] = report.ping_pong_ns.as_slice() else { return table.to_string() };
    let slow = if first.max(*last) > SLOW_PING_PONG_NS { " (slow state: absolute figures are not comparable)" } else { "" };
    format!(
        "{table}\ngenerator's ceiling {:.0} pps (XDP_DROP); {} → {}; ping-pong {first:.0}/{last:.0} ns{slow}\n{} · {} · {} CPUs · {}",
        report.generator_ceiling_pps,
        GROUP,
        REWRITTEN,
        report.machine.cpu,
        report.machine.kernel,
        report.machine.cpus,
        report.machine.device,
    )
}

fn notes(row: &Row) -> String {
    let mut notes = Vec::new();
    if row.void {
        notes.push("void".to_owned());
    }
    if row.sink_drops > 0 {
        notes.push(format!("sink dropped {}", row.sink_drops));
    }
    if row.source_bound {
        notes.push("source_bound".into());
    }
    if row.preempted {
        notes.push(format!("preempted {:.0}/s", row.preemptions_per_second));
    }
    notes.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arm: Arm, offered: u64, delivered: u64) -> Run {
        Run { arm, window: Window { offered, delivered, seconds: 1.0, sink_drops: 0, covered: true }, preemptions: 0 }
    }

    #[test]
    fn rows_are_medians_and_ratios() {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            args: Args,
        }
        let args = <Cli as clap::Parser>::parse_from(["bench"]).args;
        let runs = [
            run(Arm::Xsk, 4_000, 1_000),
            run(Arm::Packet, 4_000, 400),
            run(Arm::Xsk, 4_000, 1_200),
            run(Arm::Packet, 4_000, 500),
            run(Arm::Xsk, 4_000, 900),
            run(Arm::Packet, 4_000, 600),
            run(Arm::Redirect, 3_000, 3_000),
        ];
        let mut rows: Vec<Row> = args.rows.iter().filter_map(|arm| row(&args, *arm, &runs, 5_000.0)).collect();
        set_ratios(&mut rows);
        assert_eq!(
            rows.iter().map(|r| r.path.as_str()).collect::<Vec<_>>(),
            ["xsk", "packet", "redirect"],
            "a row without a run is left out"
        );
        assert_eq!((rows[0].delivered_pps, rows[0].min, rows[0].max, rows[0].median_of), (1_000.0, 900.0, 1_200.0, 3));
        assert_eq!(rows[0].ratio_to_packet, Some(2.0));
        assert!(!rows[0].source_bound && rows[2].source_bound);
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
        assert_eq!(median(&[]), None);
    }
}
