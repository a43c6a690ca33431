//! `relay bench ring` and `relay bench ipc`: what a message costs through our ring, and through what one could use instead.
//!
//! The slow ways (mutex, naive, mpmc, pipe …) live here, never in the data path's rooms. A figure names its conditions: pinned
//! threads, interleaved rounds, medians, preemptions, and the cache-line ping-pong of the same run.

pub mod channels;
pub mod demo;
mod fifo;
pub mod measure;
pub mod peer;
pub mod processes;
pub mod queues;
pub mod ring;
pub mod workers;

use serde::Serialize;

/// An argument that cannot be meant; exit code 2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadInput(pub String);

/// Exit code of an error of this room: 2 for [`BadInput`], else 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<BadInput>() { 2 } else { 1 }
}

/// One row of the report. INTERFACE.md: `mode batch size same_core ns_per_message p50_ns p99_ns`.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What carried the messages.
    pub mode: String,
    /// Messages handed over at once.
    pub batch: u32,
    /// Bytes of a message.
    pub size: usize,
    /// Both sides on one CPU.
    pub same_core: bool,
    /// Median over the rounds.
    pub ns_per_message: f64,
    /// Best and worst round.
    pub min_ns: f64,
    /// Worst round.
    pub max_ns: f64,
    /// Millions of messages a second.
    pub mmsg_per_s: f64,
    /// Round trip there and back, one message at a time.
    pub p50_ns: u64,
    /// Same.
    pub p99_ns: u64,
    /// Same.
    pub p999_ns: u64,
    /// ns of the first mode with the same batch and size / ns of this one: how many times faster this one is.
    pub ratio: f64,
    /// Involuntary context switches during the row's rounds: such a row is worth little.
    pub preemptions: i64,
}

/// A bench's result.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// CPUs the two sides were pinned to.
    pub cpus: Vec<usize>,
    /// True if the threads ran SCHED_FIFO.
    pub fifo: bool,
    /// Median round trip of two cache lines in this run (about 105 ns on a fast machine in its fast state).
    pub ping_pong_ns: u64,
    /// 99th percentile of the same.
    pub ping_pong_p99_ns: u64,
    /// Whether any measured thread was preempted.
    pub preempted: bool,
    /// What was measured.
    pub rows: Vec<Row>,
}

impl Report {
    /// Fills in the ratios to the slowest row of equal batch and size, and the flag.
    fn finish(mut self) -> Self {
        self.preempted = self.rows.iter().any(|row| row.preemptions > 0);
        let all = self.rows.clone();
        for row in &mut self.rows {
            let peers = all.iter().filter(|peer| (peer.batch, peer.size) == (row.batch, row.size));
            let slowest = peers.map(|peer| peer.ns_per_message).fold(0.0, f64::max);
            row.ratio = slowest / row.ns_per_message;
        }
        self
    }
}

/// The report as a table for people.
pub fn table(report: &Report) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["mode", "batch", "size", "ns/msg", "min–max", "Mmsg/s", "× slowest", "rtt p50", "p99", "p99.9 ns", "preempted"]);
    for row in &report.rows {
        table.add_row([
            row.mode.clone(),
            row.batch.to_string(),
            row.size.to_string(),
            format!("{:.2}", row.ns_per_message),
            format!("{:.2}–{:.2}", row.min_ns, row.max_ns),
            format!("{:.2}", row.mmsg_per_s),
            format!("{:.1}", row.ratio),
            row.p50_ns.to_string(),
            row.p99_ns.to_string(),
            row.p999_ns.to_string(),
            row.preemptions.to_string(),
        ]);
    }
    let warning =
        if report.preempted { "\nsome threads were preempted: repeat on a quiet machine before believing the figures" } else { "" };
    format!(
        "CPUs {:?}{}, two-line ping-pong {} ns p50, {} ns p99\n{table}{warning}",
        report.cpus,
        if report.fifo { ", SCHED_FIFO" } else { "" },
        report.ping_pong_ns,
        report.ping_pong_p99_ns
    )
}
