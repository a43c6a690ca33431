//! `relay bench channels`: what one writer pays for many readers.
//!
//! The writer has a CPU of its own and no gate, so nothing may hold it up; the readers share the other CPU and are told
//! exactly what they missed. Must never count a reader that stood still as one that was served.

use super::BadInput;
use super::measure::{Place, percentile, ping_pong, preemptions, summary};
use crate::lab::progress::Steps;
use crate::ring::memory::Heap;
use crate::ring::{Memory, Publisher, Received, Subscriber, broadcast};
use anyhow::{Result, anyhow, bail, ensure};
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Instant;

/// Slots of the channel.
const CAPACITY: u32 = 1024;
/// Most readers of one run.
const MAX_READERS: u32 = 64;

type Message = [u64; 2];

/// Arguments of `relay bench channels`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Readers, one run for each number
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8], value_name = "N")]
    pub readers: Vec<u32>,
    /// Messages in each round
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    pub iters: u64,
    /// Rounds of each; the numbers of readers take turns
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub rounds: u32,
    /// Writer and readers on one CPU
    #[arg(long)]
    pub same_core: bool,
}

/// One number of readers.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Readers.
    pub readers: u32,
    /// What a message costs the writer: median over the rounds.
    pub ns_per_message: f64,
    /// Best round.
    pub min_ns: f64,
    /// Worst round.
    pub max_ns: f64,
    /// ns of this row / ns of the first.
    pub ratio: f64,
    /// Messages that the least served reader got in its worst round.
    pub fewest_received: u64,
    /// Messages overwritten before a reader came, all readers and rounds.
    pub overruns: u64,
    /// Involuntary context switches of the writer.
    pub preemptions: i64,
}

/// The bench's result.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// CPUs of writer and readers.
    pub cpus: Vec<usize>,
    /// Median round trip of two cache lines in this run.
    pub ping_pong_ns: u64,
    /// What was measured.
    pub rows: Vec<Row>,
}

/// What one round found.
struct Round {
    ns: f64,
    fewest: u64,
    overruns: u64,
    preemptions: i64,
}

/// Measures everything asked for, rounds interleaved.
pub fn measure(args: &Args) -> Result<Report> {
    super::ring::check(args.iters, &[1], args.rounds)?;
    if let Some(wrong) = args.readers.iter().find(|readers| !(1..=MAX_READERS).contains(*readers)) {
        bail!(BadInput(format!("--readers {wrong}: use 1 to {MAX_READERS}")));
    }
    let place = Place::choose(args.same_core, false)?;
    let lines = ping_pong(place, args.iters.min(100_000))?;
    let mut found: Vec<Vec<Round>> = args.readers.iter().map(|_| Vec::new()).collect();
    let mut steps = Steps::new(Some(args.rounds as usize));
    for _ in 0..args.rounds {
        steps.next("rounds");
        for (readers, rounds) in args.readers.iter().zip(&mut found) {
            rounds.push(round(*readers, args.iters, place)?);
        }
    }
    let mut rows: Vec<Row> = args.readers.iter().zip(&found).map(|(readers, rounds)| row(*readers, rounds)).collect();
    let first = rows.first().map_or(1.0, |row| row.ns_per_message);
    rows.iter_mut().for_each(|row| row.ratio = row.ns_per_message / first);
    Ok(Report { cpus: vec![place.sender, place.receiver], ping_pong_ns: percentile(&lines, 0.5), rows })
}

fn row(readers: u32, rounds: &[Round]) -> Row {
    let (median, min_ns, max_ns) = summary(&mut rounds.iter().map(|round| round.ns).collect::<Vec<_>>());
    Row {
        readers,
        ns_per_message: median,
        min_ns,
        max_ns,
        ratio: 1.0,
        fewest_received: rounds.iter().map(|round| round.fewest).min().unwrap_or(0),
        overruns: rounds.iter().map(|round| round.overruns).sum(),
        preemptions: rounds.iter().map(|round| round.preemptions).sum(),
    }
}

fn round(readers: u32, count: u64, place: Place) -> Result<Round> {
    let memory: Arc<dyn Memory> = Arc::new(Heap::new(broadcast::bytes::<Message>(CAPACITY)));
    broadcast::init::<Message>(memory.clone(), 0, CAPACITY)?;
    let publisher = Publisher::<Message>::attach(memory.clone(), 0, None)?;
    let subscribers = (0..readers).map(|_| Subscriber::<Message>::attach(memory.clone(), 0, None)).collect::<Result<Vec<_>, _>>()?;
    let (start_line, done) = (Barrier::new(1 + readers as usize), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let reading: Vec<_> =
            subscribers.into_iter().map(|subscriber| scope.spawn(|| read(subscriber, place, &start_line, &done, count))).collect();
        let writing = scope.spawn(|| write(publisher, place, &start_line, &done, count));
        let (ns, preemptions) = writing.join().map_err(|_| anyhow!("the writer panicked"))??;
        let mut round = Round { ns, fewest: u64::MAX, overruns: 0, preemptions };
        for reader in reading {
            let (received, lost) = reader.join().map_err(|_| anyhow!("a reader panicked"))??;
            round.fewest = round.fewest.min(received);
            round.overruns += lost;
        }
        Ok(round)
    })
}

fn write(mut publisher: Publisher<Message>, place: Place, start_line: &Barrier, done: &AtomicBool, count: u64) -> Result<(f64, i64)> {
    let entered = place.enter(place.sender);
    start_line.wait();
    let (before, start) = (preemptions(), Instant::now());
    for number in 1..=count {
        // Without a gate a message is always taken.
        let _ = publisher.send(&[number; 2]);
    }
    let elapsed = start.elapsed();
    done.store(true, Ordering::Release);
    entered?;
    Ok((elapsed.as_nanos() as f64 / count as f64, preemptions() - before))
}

/// Reads to the end; messages received and messages missed, which together must be all.
fn read(mut subscriber: Subscriber<Message>, place: Place, start_line: &Barrier, done: &AtomicBool, count: u64) -> Result<(u64, u64)> {
    let entered = place.enter(place.receiver);
    start_line.wait();
    entered?;
    let mut expected = 1;
    loop {
        let last = done.load(Ordering::Acquire);
        match subscriber.receive() {
            Received::Message(message) => {
                ensure!(message == [expected; 2], "message {expected} is torn or out of order: {message:?}");
                expected += 1;
            }
            Received::Overrun(lost) => expected += lost,
            Received::Empty if last => break,
            Received::Empty => std::thread::yield_now(),
        }
    }
    let (received, lost) = (subscriber.received(), subscriber.lost());
    ensure!(received + lost == count, "{received} received and {lost} missed are not the {count} that were sent");
    Ok((received, lost))
}

/// The report as a table for people.
pub fn table(report: &Report) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["readers", "writer ns/msg", "min–max", "÷ first", "fewest received", "overruns", "preempted"]);
    for row in &report.rows {
        table.add_row([
            row.readers.to_string(),
            format!("{:.2}", row.ns_per_message),
            format!("{:.2}–{:.2}", row.min_ns, row.max_ns),
            format!("{:.2}", row.ratio),
            row.fewest_received.to_string(),
            row.overruns.to_string(),
            row.preemptions.to_string(),
        ]);
    }
    format!("CPUs {:?}, two-line ping-pong {} ns p50\n{table}", report.cpus, report.ping_pong_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn req_000_2_eight_readers_get_on_and_count_exactly_what_they_missed() {
        let args = Args { readers: vec![1, 8], iters: 200_000, rounds: 2, same_core: false };
        let args = if Place::choose(false, false).is_ok() { args } else { Args { same_core: true, ..args } };
        let report = measure(&args).unwrap();
        assert!(report.rows.iter().all(|row| row.fewest_received > 0 && row.ns_per_message > 0.0), "{report:?}");
        assert!(measure(&Args { readers: vec![65], ..args }).unwrap_err().to_string().starts_with("--readers 65"));
        assert!(table(&report).contains("overruns"));
    }
}
