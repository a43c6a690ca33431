//! `relay bench ring`: one process, two threads.

use super::measure::{Place, percentile, ping_pong, round_trips, summary, throughput};
use super::queues::{self, Ends, Message};
use super::{BadInput, Report, Row};
use crate::lab::progress::Steps;
use anyhow::{Result, bail};
use clap::ValueEnum;

/// What carries the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Our ring, elements copied in and out
    Lockfree,
    /// Our ring, elements filled and read in place
    InPlace,
    /// Our single-writer broadcast, gated, one reader
    Broadcast,
    /// Mutex and VecDeque
    Mutex,
    /// A ring without care: shared line, no cached indices, sequential consistency
    Naive,
    /// A queue that many could write (Vyukov)
    Mpmc,
    /// A kernel pipe
    Pipe,
}

/// Arguments of `relay bench ring`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Messages in each round
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    pub iters: u64,
    /// What to measure (repeat, or separate by commas)
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["lockfree", "mutex"])]
    pub mode: Vec<Mode>,
    /// Messages handed over at once, 1 to 64
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32], value_name = "N")]
    pub batch: Vec<u32>,
    /// Bytes of a message: 8, 16 or 64
    #[arg(long, value_delimiter = ',', default_values_t = [16], value_name = "BYTES")]
    pub size: Vec<usize>,
    /// Rounds of each; the modes take turns
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub rounds: u32,
    /// Both sides on one CPU
    #[arg(long)]
    pub same_core: bool,
    /// Run the two threads SCHED_FIFO (starves everything else on those CPUs; needs CAP_SYS_NICE)
    #[arg(long)]
    pub fifo: bool,
}

fn ends<T: Message>(mode: Mode) -> Result<Ends> {
    match mode {
        Mode::Lockfree => queues::lockfree::<T>(),
        Mode::InPlace => queues::in_place::<T>(),
        Mode::Broadcast => queues::broadcasting::<T>(),
        Mode::Mutex => queues::mutex::<T>(),
        Mode::Naive => queues::naive::<T>(),
        Mode::Mpmc => queues::mpmc::<T>(),
        Mode::Pipe => queues::pipe::<T>(),
    }
}

fn sized(mode: Mode, size: usize) -> Result<Ends> {
    match size {
        8 => ends::<[u64; 1]>(mode),
        16 => ends::<[u64; 2]>(mode),
        64 => ends::<[u64; 8]>(mode),
        other => bail!(BadInput(format!("--size {other}: use 8, 16 or 64"))),
    }
}

/// Refuses what cannot be measured, naming the option.
pub(super) fn check(iters: u64, batches: &[u32], rounds: u32) -> Result<()> {
    let wrong = batches.iter().find(|batch| !(1..=queues::MAX_BATCH).contains(batch));
    let problem = match (iters, rounds, wrong) {
        (0, ..) => "--iters 0: at least one message is needed".to_owned(),
        (_, 0, _) => "--rounds 0: at least one round is needed".to_owned(),
        (.., Some(batch)) => format!("--batch {batch}: use 1 to {}", queues::MAX_BATCH),
        _ => return Ok(()),
    };
    bail!(BadInput(problem))
}

/// Measures everything asked for, rounds interleaved.
pub fn measure(args: &Args) -> Result<Report> {
    check(args.iters, &args.batch, args.rounds)?;
    let place = Place::choose(args.same_core, args.fifo)?;
    let samples = args.iters.min(200_000);
    let lines = ping_pong(place, samples)?;
    let mut report = Report { cpus: vec![place.sender, place.receiver], fifo: args.fifo, ..Report::default() };
    (report.ping_pong_ns, report.ping_pong_p99_ns) = (percentile(&lines, 0.5), percentile(&lines, 0.99));
    let mut steps = Steps::new(Some(args.size.len() * args.batch.len() * args.rounds as usize));
    for (size, batch) in args.size.iter().flat_map(|size| args.batch.iter().map(|batch| (*size, *batch))) {
        let mut found = vec![(Vec::new(), 0); args.mode.len()];
        for round in 1..=args.rounds {
            steps.next(&format!("{batch} x {size} bytes, round {round}"));
            for (mode, (rounds, preempted)) in args.mode.iter().zip(&mut found) {
                let (ns, preemptions) = throughput(sized(*mode, size)?, place, args.iters, batch)?;
                rounds.push(ns);
                *preempted += preemptions;
            }
        }
        for (mode, (mut rounds, preemptions)) in args.mode.iter().zip(found) {
            let trips = round_trips(sized(*mode, size)?, sized(*mode, size)?, place, samples)?;
            let conditions = Conditions { batch, size, same_core: args.same_core };
            report.rows.push(row(name(*mode), conditions, &mut rounds, &trips, preemptions));
        }
    }
    Ok(report.finish())
}

fn name(mode: Mode) -> String {
    mode.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// What a row was measured under.
pub(super) struct Conditions {
    pub(super) batch: u32,
    pub(super) size: usize,
    pub(super) same_core: bool,
}

/// A row of the report.
pub(super) fn row(mode: String, conditions: Conditions, rounds: &mut [f64], trips: &[u64], preemptions: i64) -> Row {
    let Conditions { batch, size, same_core } = conditions;
    let (median, min_ns, max_ns) = summary(rounds);
    Row {
        mode,
        batch,
        size,
        same_core,
        ns_per_message: median,
        min_ns,
        max_ns,
        mmsg_per_s: 1000.0 / median,
        p50_ns: percentile(trips, 0.5),
        p99_ns: percentile(trips, 0.99),
        p999_ns: percentile(trips, 0.999),
        ratio: 1.0,
        preemptions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn req_002_3_every_mode_carries_every_message_whole() {
        let all = Mode::value_variants().to_vec();
        let args =
            Args { iters: 5000, mode: all.clone(), batch: vec![1, 32], size: vec![8, 16, 64], rounds: 2, same_core: true, fifo: false };
        let report = measure(&args).unwrap();
        assert_eq!(report.rows.len(), all.len() * 6);
        assert!(report.rows.iter().all(|row| row.ns_per_message > 0.0 && row.p50_ns > 0 && row.p50_ns <= row.p99_ns && row.ratio >= 1.0));
        let text = super::super::table(&report);
        assert!(["lockfree", "in-place", "broadcast", "mutex", "naive", "mpmc", "pipe"].iter().all(|mode| text.contains(mode)));
    }

    #[test]
    fn wrong_arguments_are_named() {
        let args = Args { iters: 1, mode: vec![Mode::Lockfree], batch: vec![65], size: vec![16], rounds: 1, same_core: true, fifo: false };
        assert!(measure(&args).unwrap_err().to_string().starts_with("--batch 65"));
        assert!(measure(&Args { size: vec![5], batch: vec![1], ..args }).unwrap_err().to_string().starts_with("--size 5"));
    }
}
