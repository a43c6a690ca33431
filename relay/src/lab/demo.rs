//! `relay demo`: namespaces, a relay, real traffic, a table and PASS or FAIL, in less than a minute.
//!
//! Sender and receiver of the correctness rows are ordinary UDP sockets; every datagram is verified. The flat-out figures at the
//! end are for the eye, one short burst each: `relay bench path` measures.

use super::arms::{Arm, GROUP, REWRITTEN, Running, TTL};
use super::bench::{self, program};
use super::error::Result;
use super::generator::{Generator, Sink};
use super::progress::Steps;
use super::recv::{self, Receiver, Verdict};
use super::topology::Lab;
use super::{clock, send, userns};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A rate that all rows carry.
const RATE: u64 = 50_000;
/// The same where buffers cannot be forced beyond the host's limit (net.core.rmem_max), so that they hold 20 ms.
const RATE_WITHOUT_ROOT: u64 = 5_000;
/// Seconds of a row.
const SECONDS: u64 = 2;
/// A void row (the receiver itself dropped) is tried so often.
const ATTEMPTS: u32 = 3;
/// Length of a flat-out burst.
const BURST: Duration = Duration::from_millis(1_000);
/// Rows, in order.
const ARMS: [Arm; 4] = [Arm::Kernel, Arm::Xsk, Arm::Packet, Arm::Sockets];
/// Rows of a user who is not root.
const ARMS_WITHOUT_BPF: [Arm; 2] = [Arm::Packet, Arm::Sockets];
/// What is said there.
const WITHOUT_BPF: &str =
    "not root: in a user namespace of its own, where BPF is not permitted, so the packet path alone; with root, all paths";

/// Arguments of `relay demo`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Args {
    /// The relay to show [default: this program]
    #[arg(long, value_name = "FILE", hide = true)]
    pub program: Option<PathBuf>,
    /// Leave out the flat-out figures
    #[arg(long)]
    pub no_flat_out: bool,
    /// Draw the flat-out figures side by side, as an SVG; needs root
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "relay-demo.svg", conflicts_with = "no_flat_out")]
    pub compare: Option<PathBuf>,
}

/// `relay demo --json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// One a backend.
    pub rows: Vec<Row>,
    /// `PASS` or `FAIL`.
    pub verdict: String,
    /// Packets a second of the generator alone.
    pub generator_ceiling_pps: Option<f64>,
    /// What was left out, and why; empty otherwise.
    pub note: String,
}

/// One backend's figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `xsk`, `packet` or `sockets`.
    pub backend: String,
    /// Datagrams sent.
    pub sent: u64,
    /// Different datagrams that reached the receiver.
    pub relayed: u64,
    /// Those that did not.
    pub lost: u64,
    /// Came more than once.
    pub duplicated: u64,
    /// Came late.
    pub reordered: u64,
    /// Came damaged.
    pub corrupted: u64,
    /// Rate at the receiver.
    pub pps: f64,
    /// Latency from the sender to the receiver's kernel.
    pub p50_us: Option<f64>,
    /// The same.
    pub p99_us: Option<f64>,
    /// Flat out, a short burst.
    pub flat_out_pps: Option<f64>,
    /// Why there is no result; empty otherwise.
    pub error: String,
}

impl Row {
    fn passes(&self) -> bool {
        let spotless = self.lost + self.duplicated + self.reordered + self.corrupted == 0;
        self.error.is_empty() && self.sent > 0 && self.relayed == self.sent && spotless
    }
}

/// Builds the laboratory and runs every row.
pub fn demonstrate(args: &Args) -> Result<Report> {
    let program = program(args.program.as_ref())?;
    let root = nix::unistd::geteuid().is_root();
    if !root {
        userns::enter()?;
    }
    let lab = Lab::simple()?;
    let wanted: &[Arm] = if root { &ARMS } else { &ARMS_WITHOUT_BPF };
    let (missing, arms): (Vec<Arm>, Vec<Arm>) = wanted.iter().partition(|arm| arm.missing().is_some());
    let rate = if root { RATE } else { RATE_WITHOUT_ROOT };
    let flat_out_too = root && !args.no_flat_out;
    let mut steps = Steps::new(Some(if flat_out_too { 2 * arms.len() + 1 } else { arms.len() }));
    let mut report = Report { note: if root { left_out(&missing) } else { WITHOUT_BPF.into() }, ..Report::default() };
    for &arm in &arms {
        steps.next(&format!("{}, {} datagrams at {rate} a second", arm.name(), rate * SECONDS));
        report.rows.push(correctness(&lab, arm, &program, rate));
    }
    if flat_out_too {
        flat_out(&lab, &program, &arms, &mut report, &mut steps)?;
    }
    let pass = report.rows.iter().all(Row::passes);
    report.verdict = if pass { "PASS" } else { "FAIL" }.into();
    Ok(report)
}

/// What can't run here, and what it lacks.
fn left_out(missing: &[Arm]) -> String {
    let words = missing.iter().map(|arm| format!("no row {}: {} is missing", arm.name(), arm.missing().unwrap_or_default()));
    words.collect::<Vec<_>>().join("; ")
}

/// The flat-out figures as an SVG. A row that has none is no bar.
pub fn picture(report: &Report) -> String {
    let bar = |row: &Row| {
        let pps = row.flat_out_pps?;
        let source_bound = report.generator_ceiling_pps.is_some_and(|ceiling| pps > bench::CEILING_MARGIN * ceiling);
        Some(bench::Row { path: row.backend.clone(), delivered_pps: pps, min: pps, max: pps, source_bound, ..bench::Row::default() })
    };
    bench::svg(&bench::Report { rows: report.rows.iter().filter_map(bar).collect(), ..bench::Report::default() })
}

/// One row with verified traffic; an error becomes the row.
fn correctness(lab: &Lab, arm: Arm, program: &Path, rate: u64) -> Row {
    let mut last = Row::default();
    for _ in 0..ATTEMPTS {
        match verified(lab, arm, program, rate) {
            Ok((row, Verdict::Void)) => last = Row { error: "void: the receiver's own socket dropped".into(), ..row },
            Ok((row, _)) => return row,
            Err(error) => return Row { backend: arm.name().into(), error: error.to_string(), ..Row::default() },
        }
    }
    last
}

fn verified(lab: &Lab, arm: Arm, program: &Path, rate: u64) -> Result<(Row, Verdict)> {
    let _running = Running::start(lab, arm, program, relay_cpu(), &[])?;
    let receiver = lab.sink(1).run(|| Receiver::open(&expectation(rate)))??;
    let stop = AtomicBool::new(false);
    let (sent, received) = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.run(&stop));
        let sent = lab.src.run(|| send::send(&load(rate)));
        stop.store(!matches!(sent, Ok(Ok(_))), Ordering::Relaxed);
        (sent, receiving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let (sent, received) = (sent??, received?);
    let row = Row {
        backend: arm.name().into(),
        sent: sent.sent,
        relayed: received.distinct,
        lost: received.lost,
        duplicated: received.duplicated,
        reordered: received.reordered,
        corrupted: received.corrupted + received.foreign,
        pps: received.pps,
        p50_us: received.p50_us,
        p99_us: received.p99_us,
        ..Row::default()
    };
    Ok((row, received.verdict))
}

/// The relay's CPU: the second one where there is one, so that the sender does not share it.
fn relay_cpu() -> Option<usize> {
    clock::allowed_cpus().get(1).copied()
}

fn load(rate: u64) -> send::Args {
    send::Args {
        iface: "s0".into(),
        to: GROUP,
        rate,
        count: Some(rate * SECONDS),
        size: 64,
        ttl: TTL,
        dscp: 0,
        source: None,
        duration: Some(Duration::from_secs(8)),
        first: 0,
        backend: send::Backend::Sockets,
        cpu: clock::allowed_cpus().first().copied(),
    }
}

fn expectation(rate: u64) -> recv::Args {
    recv::Args {
        iface: "k1".into(),
        group: recv::Subscription { source: None, group: REWRITTEN },
        count: Some(rate * SECONDS),
        timeout: Duration::from_secs(1),
        duration: Some(Duration::from_secs(10)),
        linger: Duration::from_millis(100),
        backend: send::Backend::Sockets,
        cpu: None,
    }
}

/// A burst a row; a row that failed is not asked again.
fn flat_out(lab: &Lab, program: &Path, arms: &[Arm], report: &mut Report, steps: &mut Steps) -> Result<()> {
    let cpus = clock::allowed_cpus();
    let cpu = cpus.first().copied().unwrap_or(0);
    let mut generator = Generator::new(lab, GROUP, 64)?;
    steps.next("the generator alone");
    report.generator_ceiling_pps = Some(generator.window(lab, cpu, &Sink::at_relay(lab)?, BURST)?.delivered_pps());
    for (arm, row) in arms.iter().zip(&mut report.rows) {
        steps.next(&format!("{}, flat out", arm.name()));
        if row.error.is_empty() {
            let sink = if arm.sends_frames() { Sink::at_link(lab, 1)? } else { Sink::of_stack(lab, 1, 64)? };
            let _running = Running::start(lab, *arm, program, relay_cpu(), &[])?;
            row.flat_out_pps = Some(generator.window(lab, cpu, &sink, BURST)?.delivered_pps());
        }
    }
    Ok(())
}

/// The report as a table.
pub fn table(report: &Report) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["backend", "sent", "relayed", "lost", "dup", "reord", "pps", "p50 µs", "p99 µs", "flat out pps"]);
    for row in &report.rows {
        table.add_row(cells(row));
    }
    let ceiling = report.generator_ceiling_pps.map(|pps| format!("generator alone: {pps:.0} pps\n")).unwrap_or_default();
    let errors: String =
        report.rows.iter().filter(|row| !row.error.is_empty()).map(|row| format!("{}: {}\n", row.backend, row.error)).collect();
    let note = if report.note.is_empty() { String::new() } else { format!("{}\n", report.note) };
    format!("{GROUP} on r0 → {REWRITTEN} on r1, each datagram verified\n{table}\n{ceiling}{errors}{note}{}", report.verdict)
}

fn cells(row: &Row) -> Vec<String> {
    let one = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
    vec![
        row.backend.clone(),
        row.sent.to_string(),
        row.relayed.to_string(),
        row.lost.to_string(),
        row.duplicated.to_string(),
        row.reordered.to_string(),
        format!("{:.0}", row.pps),
        one(row.p50_us, 1),
        one(row.p99_us, 1),
        one(row.flat_out_pps, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_has_a_bar_for_each_row_with_a_figure() {
        let row = |backend: &str, flat_out_pps| Row { backend: backend.into(), flat_out_pps, ..Row::default() };
        let rows = vec![row("kernel", Some(5e6)), row("xsk", Some(1.25e6)), row("packet", None)];
        let svg = picture(&Report { rows, generator_ceiling_pps: Some(5.1e6), ..Report::default() });
        assert_eq!(svg.matches("class=\"mark\"").count(), 2, "{svg}");
        assert!(svg.contains(">5 M (source-bound)<") && svg.contains(">1.25 M<") && !svg.contains("packet<"), "{svg}");
    }
}
