//! `relay bench path|fanout|latency|chain`: each path and each baseline, interleaved, counted at the receiver.
//!
//! `path` and `fanout` stand here: packets a second, flat out or at a pace.
//!
//! ARCHITECTURE.md, "Figures", is the law here: the generator's ceiling is named, arms alternate, medians come with minimum
//! and maximum, and what disturbed a run is said with it. Must never report what the relay says about itself as delivered.

pub mod chain;
pub mod gate;
pub mod latency;
mod plot;
mod report;
mod runs;

pub use plot::svg;
pub(super) use report::CEILING_MARGIN;
pub use report::{Machine, Report, Row, machine, table};
pub use runs::Receiver;

use super::arms::{Arm, GROUP};
use super::clock;
use super::error::{LabError, Result};
use super::generator::{Generator, Sink};
use super::send::parse_duration;
use super::topology::Lab;
use runs::Case;
use std::path::PathBuf;
use std::time::Duration;

/// How to load a path, and where: the same for every bench.
#[derive(Clone, Debug, clap::Args)]
pub struct Load {
    /// Rounds; each runs every row once
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Length of a run
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "3s")]
    pub duration: Duration,
    /// Bytes of payload, one or several sizes
    #[arg(long, default_value = "64", value_delimiter = ',', value_name = "B", value_parser = clap::value_parser!(u16).range(1..=1472))]
    pub payload: Vec<u16>,
    /// Who takes what is sent, one or several: a counter at the link, or UDP sockets
    #[arg(long, value_enum, value_delimiter = ',', default_value = "link", value_name = "RECEIVER")]
    pub receiver: Vec<Receiver>,
    /// Where it runs.
    #[command(flatten)]
    pub place: Place,
}

/// Which relay, on which CPUs.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    /// CPU of the generator
    #[arg(long, default_value_t = 0, value_name = "CPU")]
    pub generator_cpu: usize,
    /// CPU of the relay and the sink
    #[arg(long, default_value_t = 1, value_name = "CPU")]
    pub cpus: usize,
    /// The relay's wait strategy [default: spin, of a chain adaptive]
    #[arg(long, value_name = "STRATEGY")]
    pub wait: Option<String>,
    /// The relay under test [default: this program]
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

impl Place {
    /// Both CPUs may be used here.
    fn check(&self) -> Result<()> {
        let allowed = clock::allowed_cpus();
        match [self.generator_cpu, self.cpus].into_iter().find(|cpu| !allowed.contains(cpu)) {
            Some(cpu) => Err(LabError::Invalid(format!("CPU {cpu} is not allowed here (--generator-cpu, --cpus): {allowed:?}"))),
            None => Ok(()),
        }
    }

    /// The wait strategy of relays that have a CPU for themselves.
    fn wait(&self) -> &str {
        self.wait.as_deref().unwrap_or("spin")
    }

    /// Round trip of a cache line between the two CPUs.
    fn ping_pong_ns(&self) -> Result<f64> {
        clock::ping_pong_ns(self.generator_cpu, self.cpus)
    }
}

/// Arguments of `relay bench path`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Rows, in order [default: all that can run here]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub rows: Vec<Arm>,
    /// Instead of flat out: packets a second from a paced source, one run a row, loss reported
    #[arg(long, value_name = "N")]
    pub rate: Option<u64>,
    /// Outputs of the rule, each rewritten differently, all out of one interface; what is delivered is the sum
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub fanout: u16,
    /// Flows by turns, which differ in their source ports, one or several numbers
    #[arg(long, default_value = "1", value_delimiter = ',', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub flows: Vec<u16>,
    /// Rules, and packets for all of them by turns, one or several numbers
    #[arg(long, default_value = "1", value_delimiter = ',', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub rules: Vec<u16>,
    /// How it is loaded.
    #[command(flatten)]
    pub load: Load,
}

/// Arguments of `relay bench fanout`.
#[derive(Clone, Debug, clap::Args)]
pub struct FanoutArgs {
    /// Paths, in order
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Arm::Xsk, Arm::Coalesce, Arm::Kernel, Arm::Packet])]
    pub rows: Vec<Arm>,
    /// Outputs of the rule, each rewritten differently, all out of one interface; what is delivered is the sum
    #[arg(long, default_value = "1,4,16", value_delimiter = ',', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub fanout: Vec<u16>,
    /// How it is loaded.
    #[command(flatten)]
    pub load: Load,
}

/// `relay bench path`: all rounds of all rows.
pub fn measure(args: &Args) -> Result<Report> {
    let rows = if args.rows.is_empty() { all_rows(args.fanout > 1) } else { args.rows.clone() };
    let load = |case: Case| {
        args.flows.iter().flat_map(move |flows| args.rules.iter().map(move |rules| Case { flows: *flows, rules: *rules, ..case }))
    };
    let mut cases: Vec<Case> = cases(&rows, &[args.fanout], &args.load).into_iter().flat_map(load).collect();
    // Rows of one load stand, and run, side by side.
    cases.sort_by_key(|case| (case.payload, case.flows, case.rules, case.receiver));
    measure_cases(&cases, &args.load, args.rate)
}

/// What can run here; on stderr, what can't.
fn all_rows(several_outputs: bool) -> Vec<Arm> {
    let wanted = Arm::ALL.into_iter().filter(|arm| arm.takes_any_rule() || !several_outputs);
    let (missing, rows): (Vec<Arm>, Vec<Arm>) = wanted.partition(|arm| arm.missing().is_some());
    if !missing.is_empty() {
        let missing: Vec<String> = missing.iter().map(|arm| format!("{} ({})", arm.name(), arm.missing().unwrap_or_default())).collect();
        eprintln!("rows left out for want of what they need: {}", missing.join(", "));
    }
    rows
}

/// `relay bench fanout`: the same at several fan-outs.
pub fn measure_fanout(args: &FanoutArgs) -> Result<Report> {
    measure_cases(&cases(&args.rows, &args.fanout, &args.load), &args.load, None)
}

/// Rows that are compared with one another stand, and run, side by side.
fn cases(arms: &[Arm], fanouts: &[u16], load: &Load) -> Vec<Case> {
    let sizes = load.payload.iter().flat_map(|payload| fanouts.iter().map(|fanout| (*payload, *fanout)));
    let ends = sizes.flat_map(|size| load.receiver.iter().map(move |receiver| (size, *receiver)));
    let case = |((payload, fanout), receiver), arm: &Arm| Case { arm: *arm, fanout, payload, flows: 1, rules: 1, receiver };
    ends.flat_map(|end| arms.iter().map(move |arm| case(end, arm))).collect()
}

fn measure_cases(cases: &[Case], load: &Load, rate: Option<u64>) -> Result<Report> {
    load.place.check()?;
    let lab = Lab::simple()?;
    let mut generator = Generator::new(&lab, GROUP, 64)?;
    let mut report = Report { machine: machine(), is_paced: rate.is_some(), ..Report::default() };
    report.ping_pong_ns.push(load.place.ping_pong_ns()?);
    let ceilings = ceilings(&lab, &mut generator, load)?;
    report.generator_ceiling_pps = ceilings.first().map_or(0.0, |(_, pps)| *pps);
    let runs = match rate {
        None => runs::flat_out(&lab, &mut generator, cases, load, &mut report.errors),
        Some(rate) => runs::paced(&lab, &mut generator, cases, load, rate, &mut report.errors),
    };
    report.ping_pong_ns.push(load.place.ping_pong_ns()?);
    let ceiling = |case: &Case| ceilings.iter().find(|(payload, _)| *payload == case.payload).map_or(f64::INFINITY, |(_, pps)| *pps);
    let load_of = |case: &Case| rate.map_or_else(|| report::Offer::FlatOut(ceiling(case)), report::Offer::Paced);
    report.rows = cases.iter().filter_map(|case| report::row(case, load.place.wait(), &runs, load_of(case))).collect();
    report::set_ratios(&mut report.rows);
    report.preempted = report.rows.iter().any(|row| row.preempted);
    Ok(report)
}

/// The generator alone, by payload.
fn ceilings(lab: &Lab, generator: &mut Generator, load: &Load) -> Result<Vec<(u16, f64)>> {
    let sink = Sink::at_relay(lab)?;
    let length = load.duration.min(Duration::from_secs(1));
    let mut ceiling = |payload: u16| {
        generator.set_payload(usize::from(payload))?;
        Ok((payload, generator.window(lab, load.place.generator_cpu, &sink, length)?.delivered_pps()))
    };
    load.payload.iter().map(|payload| ceiling(*payload)).collect()
}

/// The relay under test: this executable unless told otherwise.
pub fn program(given: Option<&PathBuf>) -> Result<PathBuf> {
    given.map_or_else(|| std::env::current_exe().map_err(LabError::io("own executable")), |path| Ok(path.clone()))
}
