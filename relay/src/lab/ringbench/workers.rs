//! `relay bench workers`: whether workers that share nothing scale with the CPUs.
//!
//! Each worker has a CPU, a ring and packets of its own in memory (no kernel, no NIC), and does to them what the data path
//! does: parse, rewrite the destination, mend both checksums. Must never let two workers touch one line.

use super::BadInput;
use super::measure::summary;
use crate::lab::progress::Steps;
use crate::wire::checksum::{Delta, fold};
use crate::wire::parse::parse;
use crate::worker::team::{Hooks, Team};
use anyhow::{Result, bail, ensure};
use serde::Serialize;
use std::time::{Duration, Instant};

/// Packets of each worker: one batch.
const PACKETS: usize = 64;
/// Ethernet, IPv4, UDP and 64 bytes.
const LEN: usize = 14 + 20 + 8 + 64;
const LIMIT: Duration = Duration::from_secs(60);

/// Arguments of `relay bench workers`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Workers, one run for each number; each is pinned to a CPU of its own
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2], value_name = "N")]
    pub workers: Vec<u32>,
    /// Packets of each worker in each round
    #[arg(long, default_value_t = 10_000_000, value_name = "N")]
    pub iters: u64,
    /// Rounds of each; the numbers of workers take turns
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub rounds: u32,
}

/// One number of workers.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Workers.
    pub workers: u32,
    /// Millions of packets a second, all workers together: median over the rounds.
    pub mpps: f64,
    /// Worst round.
    pub min_mpps: f64,
    /// Best round.
    pub max_mpps: f64,
    /// Times the first row.
    pub ratio: f64,
}

/// The bench's result.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// CPUs used, in the order of the workers.
    pub cpus: Vec<usize>,
    /// What was measured.
    pub rows: Vec<Row>,
}

/// The worker: its packets, and a sum that depends on all it did.
struct Rewriter {
    packets: Vec<[u8; LEN]>,
    sum: u64,
}

impl Rewriter {
    fn new() -> Self {
        Self { packets: (0..PACKETS).map(|number| packet(number as u8)).collect(), sum: 0 }
    }
}

/// A valid IPv4 multicast packet, UDP checksum absent.
fn packet(number: u8) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    let head: [u8; 42] = [
        0x01,
        0,
        0x5e,
        1,
        1,
        number,
        2,
        0,
        0,
        0,
        0,
        1,
        8,
        0, // Ethernet
        0x45,
        0,
        0,
        (LEN - 14) as u8,
        0,
        0,
        0x40,
        0,
        64,
        17,
        0,
        0,
        10,
        0,
        0,
        1,
        239,
        1,
        1,
        number, // IPv4
        0x0f,
        0xa0,
        0x13,
        0x88,
        0,
        (LEN - 34) as u8,
        0,
        0, // UDP
    ];
    bytes.iter_mut().zip(head).for_each(|(to, from)| *to = from);
    let sum = head[14..34].chunks_exact(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let check = (!fold(sum)).to_be_bytes();
    bytes[24] = check[0];
    bytes[25] = check[1];
    bytes
}

/// Swaps the last byte of the group, and mends the header's checksum. False: no packet of ours.
fn rewrite(packet: &mut [u8; LEN], to: u8) -> bool {
    let Ok(headers) = parse(packet, LEN) else { return false };
    let old = u16::from_be_bytes([packet[32], packet[33]]);
    packet[33] = to;
    packet[5] = to;
    let mut delta = Delta::default();
    delta.word(old, u16::from_be_bytes([packet[32], to]));
    let check = delta.apply(u16::from_be_bytes([packet[24], packet[25]])).to_be_bytes();
    packet[24] = check[0];
    packet[25] = check[1];
    headers.dport == 5000
}

impl Hooks<u64> for Rewriter {
    /// Does `count` packets.
    fn handle(&mut self, count: u64) {
        let mut left = count;
        while left > 0 {
            for packet in &mut self.packets {
                self.sum += u64::from(rewrite(packet, left as u8));
            }
            left = left.saturating_sub(PACKETS as u64);
        }
    }

    fn shutdown(self) -> u64 {
        self.sum
    }
}

/// Millions of packets a second of `workers` workers together.
fn round(workers: u32, iters: u64, cpus: &[usize]) -> Result<f64> {
    let mut team = Team::new(workers, 8)?;
    for cpu in cpus.iter().take(workers as usize) {
        team.add(Some(*cpu), Rewriter::new)?;
    }
    // Everybody is up and has its memory.
    (0..workers).try_for_each(|worker| team.send(worker, PACKETS as u64))?;
    std::thread::sleep(Duration::from_millis(5));
    let start = Instant::now();
    (0..workers).try_for_each(|worker| team.send(worker, iters))?;
    let rounded = iters.div_ceil(PACKETS as u64) * PACKETS as u64;
    for worker in 0..workers {
        let done = team.stop(worker, LIMIT)?.result;
        ensure!(done == rounded + PACKETS as u64, "worker {worker} did {done} packets of {rounded}");
    }
    Ok(u64::from(workers) as f64 * rounded as f64 / start.elapsed().as_secs_f64() / 1e6)
}

/// Measures everything asked for, rounds interleaved.
pub fn measure(args: &Args) -> Result<Report> {
    super::ring::check(args.iters, &[1], args.rounds)?;
    let set = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0))?;
    let cpus: Vec<usize> = (0..nix::sched::CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect();
    if let Some(wrong) = args.workers.iter().find(|workers| **workers == 0 || **workers as usize > cpus.len()) {
        bail!(BadInput(format!("--workers {wrong}: use 1 to {}, one for each CPU this process may use", cpus.len())));
    }
    let mut found = vec![Vec::new(); args.workers.len()];
    let mut steps = Steps::new(Some(args.rounds as usize));
    for _ in 0..args.rounds {
        steps.next("rounds");
        for (workers, rounds) in args.workers.iter().zip(&mut found) {
            rounds.push(round(*workers, args.iters, &cpus)?);
        }
    }
    let rows = args.workers.iter().zip(&mut found).map(|(workers, rounds)| {
        let (mpps, min_mpps, max_mpps) = summary(rounds);
        Row { workers: *workers, mpps, min_mpps, max_mpps, ratio: 1.0 }
    });
    let mut rows: Vec<Row> = rows.collect();
    let first = rows.first().map_or(1.0, |row| row.mpps);
    rows.iter_mut().for_each(|row| row.ratio = row.mpps / first);
    Ok(Report { cpus, rows })
}

/// The report as a table for people.
pub fn table(report: &Report) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["workers", "Mpps", "min–max", "× first"]);
    for row in &report.rows {
        let range = format!("{:.1}–{:.1}", row.min_mpps, row.max_mpps);
        table.add_row([row.workers.to_string(), format!("{:.1}", row.mpps), range, format!("{:.2}", row.ratio)]);
    }
    format!("CPUs {:?}\n{table}", report.cpus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::checksum::verifies;

    /// The figure itself (≥ 1.8 on two idle CPUs) is measured, not asserted: the machine of a test is not idle.
    #[test]
    fn req_003_11_workers_that_share_nothing_all_do_their_packets() {
        let report = measure(&Args { workers: vec![1], iters: 100_000, rounds: 2 }).unwrap();
        assert!(report.rows.iter().all(|row| row.mpps > 0.0), "{report:?}");
        assert!(measure(&Args { workers: vec![4096], iters: 1, rounds: 1 }).unwrap_err().to_string().starts_with("--workers 4096"));
        let mut bytes = packet(7);
        assert!(rewrite(&mut bytes, 9) && verifies(&bytes[14..34]) && bytes[33] == 9, "{bytes:02x?}");
    }
}
