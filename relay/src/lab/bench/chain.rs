//! `relay bench chain`: several relays in a row on one CPU, each in a namespace of its own.
//!
//! What every interface has received is read from its driver before and after a paced load, so that a loss is somewhere: in a
//! relay, or in the ring of the link that leads to it (which counts as that relay's). Then a search for the highest loss-free rate of
//! each beginning of the chain. Must never ask a relay how many packets it has carried.

use super::report::{PREEMPTED_PER_SECOND, Report, Row, keeps_pace, machine};
use super::{Place, program};
use crate::lab::arms::{Arm, GROUP, Running};
use crate::lab::error::Result;
use crate::lab::generator::{Generator, received};
use crate::lab::progress::Steps;
use crate::lab::send::parse_duration;
use crate::lab::topology::Lab;
use std::time::Duration;

/// "Loss-free" (ARCHITECTURE.md, Figures).
const LOSS_FREE: f64 = 0.001;
/// The search ends when a rate that was too high is no further than this above one that was not.
const PRECISION: f64 = 1.06;
/// The highest rate tried: beyond it the paced generator is no longer even.
const MAX_RATE: u64 = 5_000_000;
/// Below this no search goes.
const MIN_RATE: u64 = 1_000;
/// What is still under way after a load arrives.
const SETTLE: Duration = Duration::from_millis(300);

/// Arguments of `relay bench chain`.
#[derive(Clone, Debug, clap::Args)]
pub struct ChainArgs {
    /// Paths, in order; `sockets` may be among them
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Arm::Kernel, Arm::Xsk, Arm::Packet])]
    pub rows: Vec<Arm>,
    /// Relays in a row
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    pub hops: u32,
    /// Packets a second of the load whose losses are reported
    #[arg(long, default_value_t = 250_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MAX_RATE))]
    pub rate: u64,
    /// How long that load lasts
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "5s")]
    pub duration: Duration,
    /// Length of each trial of the search for loss-free rates; 0: no search
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "5s")]
    pub search: Duration,
    /// Where it runs.
    #[command(flatten)]
    pub place: Place,
}

impl ChainArgs {
    /// Relays that share a CPU must sleep to let the others run.
    fn wait(&self) -> &str {
        self.place.wait.as_deref().unwrap_or("adaptive")
    }
}

/// One load: how many packets were sent, and how many have passed each interface in packet order (`r0` of each relay, then `k1`).
#[derive(Clone, Debug)]
struct Trial {
    rate: u64,
    sent: u64,
    passed: Vec<u64>,
    seconds: f64,
}

impl Trial {
    /// Packets that went into relay `hop` (from 0), or came out of the last.
    fn at(&self, hop: usize) -> u64 {
        self.passed.get(hop).copied().unwrap_or(0)
    }

    /// Packets that relay `hop` had to carry: the first one all that were sent.
    fn input(&self, hop: usize) -> u64 {
        if hop == 0 { self.sent } else { self.at(hop) }
    }

    /// Share of what was sent that did not come out of relay `hop`.
    fn loss_up_to(&self, hop: usize) -> f64 {
        1.0 - (self.at(hop + 1) as f64 / self.sent.max(1) as f64).min(1.0)
    }

    /// Packets that were sent, a second: what was asked for, or less.
    fn offered_pps(&self) -> f64 {
        self.sent as f64 / self.seconds.max(1e-9)
    }

    /// The generator kept the pace, so a loss is the chain's.
    fn is_offered(&self) -> bool {
        keeps_pace(self.offered_pps(), self.rate as f64)
    }
}

/// A laboratory of a chain and its generator.
struct Bench<'a> {
    lab: Lab,
    generator: Generator,
    args: &'a ChainArgs,
    steps: Steps,
}

/// All paths, one after the other.
pub fn measure(args: &ChainArgs) -> Result<Report> {
    args.place.check()?;
    let lab = Lab::chain(args.hops)?;
    let generator = Generator::new(&lab, GROUP, 64)?;
    let mut report = Report { machine: machine(), is_paced: true, ..Report::default() };
    report.ping_pong_ns.push(args.place.ping_pong_ns()?);
    let mut bench = Bench { lab, generator, args, steps: Steps::new(None) };
    for arm in &args.rows {
        match bench.path(*arm) {
            Ok(rows) => report.rows.extend(rows),
            Err(error) => report.errors.push(format!("row {}: {error}", arm.name())),
        }
    }
    report.ping_pong_ns.push(args.place.ping_pong_ns()?);
    report.preempted = report.rows.iter().any(|row| row.preempted);
    Ok(report)
}

impl Bench<'_> {
    fn path(&mut self, arm: Arm) -> Result<Vec<Row>> {
        let file = program(self.args.place.program.as_ref())?;
        let extra = ["--pipeline", "fused", "--wait", self.args.wait()];
        let start = |hop| Running::start_hop(&self.lab, hop, arm, &file, Some(self.args.place.cpus), &extra);
        let relays = (0..self.args.hops).map(start).collect::<Result<Vec<_>>>()?;
        let switches = || relays.iter().map(|relay| relay.preemptions().unwrap_or(0)).collect::<Vec<_>>();
        let before = switches();
        let load = self.trial(arm, self.args.rate, self.args.duration)?;
        let preemptions: Vec<u64> = switches().iter().zip(before).map(|(after, before)| after.saturating_sub(before)).collect();
        let mut trials = vec![load.clone()];
        if !self.args.search.is_zero() {
            for hop in (0..self.args.hops as usize).rev() {
                while let Some(rate) = next_rate(&trials, hop) {
                    trials.push(self.trial(arm, rate, self.args.search)?);
                }
            }
        }
        let searched = (!self.args.search.is_zero()).then_some(trials.as_slice());
        Ok(rows(arm, self.args, &load, &preemptions, searched))
    }

    fn trial(&mut self, arm: Arm, rate: u64, length: Duration) -> Result<Trial> {
        self.steps.next(&format!("{}, {} relays: {rate} packets a second for {length:?}", arm.name(), self.args.hops));
        let before = self.counters()?;
        let sent = self.generator.paced(&self.lab, self.args.place.generator_cpu, rate, length)?;
        std::thread::sleep(SETTLE);
        let passed = self.counters()?.into_iter().zip(before).map(|(after, before)| after - before).collect();
        Ok(Trial { rate, sent, passed, seconds: length.as_secs_f64() })
    }

    fn counters(&self) -> Result<Vec<u64>> {
        let hops = (0..self.args.hops).map(|hop| received(self.lab.hop(hop), "r0"));
        hops.chain([received(self.lab.sink(1), "k1")]).collect()
    }
}

/// The highest rate at which the chain up to relay `hop` lost nothing, and the lowest at which it did.
fn bounds(trials: &[Trial], hop: usize) -> (Option<u64>, Option<u64>) {
    let lossy = |trial: &&Trial| trial.loss_up_to(hop) > LOSS_FREE || !trial.is_offered();
    let too_high = trials.iter().filter(lossy).map(|trial| trial.rate).min();
    // A loss at a lower rate says that a lucky trial above it proves nothing.
    let free = trials.iter().filter(|trial| !lossy(trial) && too_high.is_none_or(|limit| trial.rate < limit));
    (free.map(|trial| trial.rate).max(), too_high)
}

/// The highest rate that was offered, not asked for, without a loss up to relay `hop`.
fn loss_free_pps(trials: &[Trial], hop: usize) -> Option<f64> {
    let best = bounds(trials, hop).0?;
    trials.iter().filter(|trial| trial.rate == best).map(Trial::offered_pps).reduce(f64::min)
}

/// The generator, and no loss, ended the search: the chain may carry more.
fn is_source_bound(trials: &[Trial], hop: usize) -> bool {
    let limit = bounds(trials, hop).1;
    trials.iter().any(|trial| Some(trial.rate) == limit && trial.loss_up_to(hop) <= LOSS_FREE)
}

/// What to try next for the chain up to relay `hop`; `None`: it is known well enough.
fn next_rate(trials: &[Trial], hop: usize) -> Option<u64> {
    let next = match bounds(trials, hop) {
        (Some(free), None) => free.saturating_mul(2).min(MAX_RATE),
        (None, Some(too_high)) => too_high / 2,
        (Some(free), Some(too_high)) if too_high as f64 > free as f64 * PRECISION => (free as f64 * too_high as f64).sqrt() as u64,
        _ => return None,
    };
    (next >= MIN_RATE && trials.iter().all(|trial| trial.rate != next)).then_some(next)
}

/// A row a relay: what it lost of the load, and the rate that everything up to it carries.
fn rows(arm: Arm, args: &ChainArgs, load: &Trial, preemptions: &[u64], searched: Option<&[Trial]>) -> Vec<Row> {
    let row = |hop: usize| {
        let (input, output) = (load.input(hop), load.at(hop + 1));
        let switches = preemptions.get(hop).copied().unwrap_or(0) as f64 / load.seconds.max(1e-9);
        let delivered = output as f64 / load.seconds.max(1e-9);
        Row {
            path: arm.name().into(),
            engine: arm.engine().into(),
            wait: if arm.is_relay() { args.wait().into() } else { String::new() },
            payload: 64,
            fanout: 1,
            flows: 1,
            rules: 1,
            hops: hop as u32 + 1,
            asked_pps: Some(args.rate as f64),
            offered_pps: input as f64 / load.seconds.max(1e-9),
            delivered_pps: delivered,
            loss: 1.0 - (output as f64 / input.max(1) as f64).min(1.0),
            lost_packets: input.saturating_sub(output),
            sent_packets: input,
            loss_free_pps: searched.and_then(|trials| loss_free_pps(trials, hop)),
            median_of: 1,
            min: delivered,
            max: delivered,
            preemptions_per_second: switches,
            preempted: switches > PREEMPTED_PER_SECOND,
            source_bound: !load.is_offered() || searched.is_some_and(|trials| is_source_bound(trials, hop)),
            ..Row::default()
        }
    };
    (0..args.hops as usize).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    /// A chain whose relays carry so much, whatever the rate.
    fn trial(rate: u64, limits: [u64; 3]) -> Trial {
        let mut passed = vec![rate];
        for limit in limits {
            passed.push(limit.min(*passed.last().unwrap()));
        }
        Trial { rate, sent: rate, passed, seconds: 1.0 }
    }

    #[test]
    fn the_search_finds_the_rate_of_every_beginning() {
        let limits = [900_000, 700_000, 400_000];
        let mut trials = vec![trial(250_000, limits)];
        for hop in (0..3).rev() {
            while let Some(rate) = next_rate(&trials, hop) {
                trials.push(trial(rate, limits));
                assert!(trials.len() < 30, "it does not end");
            }
        }
        for (hop, limit) in limits.into_iter().enumerate() {
            let found = bounds(&trials, hop).0.unwrap();
            assert!(found <= limit && found as f64 * 1.07 > limit as f64, "relay {hop}: {found} of {limit}");
            assert_eq!(loss_free_pps(&trials, hop), Some(found as f64));
        }
    }

    #[test]
    fn a_search_ends_at_both_ends() {
        let all = |limit: u64| {
            let mut trials = vec![trial(250_000, [limit; 3])];
            while let Some(rate) = next_rate(&trials, 2) {
                trials.push(trial(rate, [limit; 3]));
            }
            bounds(&trials, 2).0
        };
        assert_eq!(all(u64::MAX), Some(MAX_RATE));
        assert_eq!(all(0), None);
        let behind = Trial { sent: 100, passed: vec![100; 4], ..trial(1_000_000, [u64::MAX; 3]) };
        let trials = [trial(250_000, [u64::MAX; 3]), behind];
        assert_eq!(bounds(&trials, 2), (Some(250_000), Some(1_000_000)), "a pace that was not kept proves nothing");
        let slow = [Trial { sent: 245_000, ..trial(250_000, [u64::MAX; 3]) }];
        assert_eq!(loss_free_pps(&slow, 2), Some(245_000.0), "what was offered counts");
        assert!(is_source_bound(&trials, 2) && !is_source_bound(&[trial(250_000, [1; 3])], 2));
    }

    #[test]
    fn every_relay_answers_for_its_own_losses() {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            args: ChainArgs,
        }
        let args = Cli::parse_from(["chain"]).args;
        let load = Trial { rate: 1_000, sent: 1_000, passed: vec![990, 980, 980, 490], seconds: 1.0 };
        let rows = rows(Arm::Xsk, &args, &load, &[0, 30, 0], None);
        assert_eq!(rows.iter().map(|row| row.lost_packets).collect::<Vec<_>>(), [20, 0, 490], "the first link's losses are the first's");
        assert_eq!(rows.iter().map(|row| row.hops).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!((rows[2].loss, rows[2].loss_free_pps, rows[1].preempted), (0.5, None, true));
        assert_eq!(rows[0].wait, "adaptive");
    }
}
