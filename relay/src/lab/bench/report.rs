//! What the benches say: rows from runs, ratios, and the table. Pure but for the machine's name.
//!
//! Must never leave out what makes a figure doubtful: it stands beside the figure.

use super::gate::Bar;
use super::runs::{Case, Receiver, Run};
use crate::lab::arms::{Arm, GROUP, REWRITTEN};
use crate::lab::clock;
use crate::lab::generator::Window;
use serde::{Deserialize, Serialize};

/// A ping-pong slower than this says that the machine is in its slow state.
const SLOW_PING_PONG_NS: f64 = 200.0;
/// A relay within this of the ceiling may be the generator's figure.
pub(in crate::lab) const CEILING_MARGIN: f64 = 0.9;
/// At flat out, a relay that delivers this share of the offer was not the bottleneck.
const KEPT_UP: f64 = 0.98;
/// At a pace, a source that sent this share of what was asked for has kept it.
const KEPT_PACE: f64 = 0.95;
/// A run that loses more than this share after the relay is void.
const SINK_SHARE: f64 = 0.001;
/// Involuntary switches a second that make a figure doubtful.
pub(super) const PREEMPTED_PER_SECOND: f64 = 20.0;

const fn one() -> u32 {
    1
}

/// `relay bench path|fanout|latency|chain --json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What it ran on.
    pub machine: Machine,
    /// Packets a second that reach an XDP_DROP in the relay's place, at the first payload.
    pub generator_ceiling_pps: f64,
    /// Its rows ran at a rate that the lossless paths must carry, and not flat out.
    #[serde(default)]
    pub is_paced: bool,
    /// Any row was.
    pub preempted: bool,
    /// Round trip of a cache line between the two CPUs, before and after.
    pub ping_pong_ns: Vec<f64>,
    /// What the relay's CPU alone adds to every latency, if that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuStops>,
    /// One a path and load.
    pub rows: Vec<Row>,
    /// Rows that could not run: what and why.
    pub errors: Vec<String>,
    /// What `--gate` asks for, and what was measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bars: Vec<Bar>,
}

/// How much of its time a CPU stood still with nothing but a look at the clock to do, and what a packet waits for that, µs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CpuStops {
    /// Its number.
    pub cpu: usize,
    /// Share of the time.
    pub share: f64,
    /// 99 % of the packets wait no longer.
    pub p99_us: f64,
    /// 99.9 %.
    pub p999_us: f64,
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
    /// Flows by turns.
    #[serde(default = "one")]
    pub flows: u32,
    /// Rules.
    #[serde(default = "one")]
    pub rules: u32,
    /// The sockets that took what was sent (`udp`, `udp_gro`); `None`: counted at the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receiver: Option<String>,
    /// Relays in a row; of a chain, which of them the row is about.
    pub hops: u32,
    /// The rate asked for, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked_pps: Option<f64>,
    /// Median of the offered rates.
    pub offered_pps: f64,
    /// Median of the delivered rates, all outputs together.
    pub delivered_pps: f64,
    /// Share of what should have been delivered that was not, median.
    pub loss: f64,
    /// Packets lost; for a paced run exact.
    pub lost_packets: u64,
    /// Packets sent; for a paced run exact.
    pub sent_packets: u64,
    /// Latency of half of the packets at most, µs; `None` where it was not measured.
    pub p50_us: Option<f64>,
    /// Of 99 %.
    pub p99_us: Option<f64>,
    /// Of 99.9 %.
    pub p999_us: Option<f64>,
    /// Packets behind these percentiles.
    #[serde(default)]
    pub latency_samples: u64,
    /// The distribution: (µs, share of the packets that took no longer).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latency_curve: Vec<(f64, f64)>,
    /// In a chain: the highest rate tried at which the chain up to this relay lost no more than 0.1 %.
    #[serde(default)]
    pub loss_free_pps: Option<f64>,
    /// Runs behind the median.
    pub median_of: u32,
    /// Least delivered rate.
    pub min: f64,
    /// Greatest delivered rate.
    pub max: f64,
    /// Delivered, against row `packet` of the same fan-out and payload; `None` without it.
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

impl Row {
    /// The source kept the pace that was asked for, if one was: what it was slower proves nothing.
    pub(super) fn kept_pace(&self) -> bool {
        self.asked_pps.is_none_or(|asked| keeps_pace(self.offered_pps, asked))
    }
}

/// Whether a source that offered so much has kept the pace it was asked for.
pub(super) fn keeps_pace(offered_pps: f64, asked_pps: f64) -> bool {
    offered_pps >= KEPT_PACE * asked_pps
}

/// What a run was loaded with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Offer {
    /// As fast as the generator can, whose ceiling this is.
    FlatOut(f64),
    /// At this pace.
    Paced(u64),
}

/// Medians of one row; `None` where no run succeeded.
pub(super) fn row(case: &Case, wait: &str, runs: &[Run], offer: Offer) -> Option<Row> {
    let runs: Vec<&Run> = runs.iter().filter(|run| run.case == *case).collect();
    let delivered = sorted(runs.iter().map(|run| run.window.delivered_pps()));
    let offered = median(&sorted(runs.iter().map(|run| run.window.offered_pps())))?;
    let middle = median(&delivered)?;
    let fanout = u64::from(case.fanout);
    let wanted = |run: &Run| (run.window.offered * fanout).max(1);
    let loss = median(&sorted(runs.iter().map(|run| 1.0 - run.window.delivered as f64 / wanted(run) as f64)))?.max(0.0);
    let inputs = middle / fanout as f64;
    let switches = runs.iter().map(|run| run.preemptions as f64 / run.window.seconds.max(1e-9)).fold(0.0, f64::max);
    Some(Row {
        path: case.arm.name().into(),
        engine: case.arm.engine().into(),
        wait: if case.arm.is_relay() { wait.into() } else { String::new() },
        payload: case.payload,
        fanout: u32::from(case.fanout),
        flows: u32::from(case.flows),
        rules: u32::from(case.rules),
        receiver: case.receiver.name().map(str::to_owned),
        hops: 1,
        asked_pps: if let Offer::Paced(rate) = offer { Some(rate as f64) } else { None },
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
        source_bound: match offer {
            Offer::FlatOut(ceiling) => inputs > CEILING_MARGIN * ceiling || inputs > KEPT_UP * offered,
            Offer::Paced(rate) => !keeps_pace(offered, rate as f64),
        },
        sink_drops: runs.iter().map(|run| run.window.sink_drops).sum(),
        // What a socket can't take is what its row is about.
        void: runs.iter().any(|run| !run.window.covered || case.receiver == Receiver::Link && loses_at_sink(&run.window)),
        ..Row::default()
    })
}

fn loses_at_sink(window: &Window) -> bool {
    window.sink_drops as f64 > SINK_SHARE * window.delivered as f64
}

pub(super) fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

pub(super) fn median(sorted: &[f64]) -> Option<f64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get(sorted.len().saturating_sub(1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

/// Against the baseline under the same load.
pub(super) fn set_ratios(rows: &mut [Row]) {
    let load = |row: &Row| (row.fanout, row.payload, row.flows, row.rules, row.receiver.clone());
    let baselines: Vec<_> = rows.iter().filter(|row| row.path == Arm::Packet.name()).map(|row| (load(row), row.delivered_pps)).collect();
    for row in rows {
        let baseline = baselines.iter().find(|(of, pps)| *of == load(row) && *pps > 0.0);
        row.ratio_to_packet = baseline.map(|(_, pps)| row.delivered_pps / pps);
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
    let columns = columns(&report.rows);
    table.set_header(columns.iter().map(|(name, _)| *name));
    for row in &report.rows {
        table.add_row(columns.iter().map(|(_, cell)| cell(row)));
    }
    let ceiling = match report.generator_ceiling_pps {
        0.0 => String::new(),
        pps => format!("generator's ceiling {pps:.0} pps (XDP_DROP); {GROUP} → {REWRITTEN}; "),
    };
    format!("{table}\n{ceiling}{}", conditions(report))
}

type Column = (&'static str, fn(&Row) -> String);

/// What there is to say about these rows.
fn columns(rows: &[Row]) -> Vec<Column> {
    let mut columns: Vec<Column> = vec![("path", |row| row.path.clone()), ("engine", |row| row.engine.clone())];
    let latency = rows.iter().any(|row| row.p50_us.is_some());
    let chain = rows.iter().any(|row| row.hops > 1);
    if latency || chain {
        columns.push(("wait", |row| row.wait.clone()));
    }
    if chain {
        columns.push(("hop", |row| row.hops.to_string()));
    }
    if latency {
        columns.push(("p50 µs", |row| micros(row.p50_us)));
        columns.push(("p99 µs", |row| micros(row.p99_us)));
        columns.push(("p99.9 µs", |row| micros(row.p999_us)));
        columns.push(("samples", |row| row.latency_samples.to_string()));
    }
    if !latency && !chain {
        columns.push(("payload", |row| row.payload.to_string()));
        columns.push(("fan-out", |row| format!("1:{}", row.fanout)));
        if rows.iter().any(|row| row.flows > 1) {
            columns.push(("flows", |row| row.flows.to_string()));
        }
        if rows.iter().any(|row| row.rules > 1) {
            columns.push(("rules", |row| row.rules.to_string()));
        }
        if rows.iter().any(|row| row.receiver.is_some()) {
            columns.push(("receiver", |row| row.receiver.clone().unwrap_or_else(|| "link".into())));
        }
    }
    columns.push(("delivered pps", |row| format!("{:.0}", row.delivered_pps)));
    if !latency && !chain {
        columns.push(("min", |row| format!("{:.0}", row.min)));
        columns.push(("max", |row| format!("{:.0}", row.max)));
        columns.push(("× packet", |row| row.ratio_to_packet.map_or("-".into(), |ratio| format!("{ratio:.2}"))));
    }
    columns.push(("offered pps", |row| format!("{:.0}", row.offered_pps)));
    columns.push(("lost", |row| row.lost_packets.to_string()));
    columns.push(("loss", |row| format!("{:.3} %", row.loss * 100.0)));
    if rows.iter().any(|row| row.loss_free_pps.is_some()) {
        columns.push(("loss-free pps", |row| row.loss_free_pps.map_or("-".into(), |pps| format!("{pps:.0}"))));
    }
    columns.push(("notes", notes));
    columns
}

fn micros(value: Option<f64>) -> String {
    value.map_or("-".into(), |us| format!("{us:.2}"))
}

/// The relay's CPU, ping-pong and machine.
fn conditions(report: &Report) -> String {
    let stops = report.cpu.map_or_else(String::new, |CpuStops { cpu, share, p99_us, p999_us }| {
        let share = share * 100.0;
        format!("CPU {cpu} alone stood still for {share:.2} % of the time: p99 {p99_us:.2}, p99.9 {p999_us:.2} µs of any latency there\n")
    });
    let worst = report.ping_pong_ns.iter().copied().fold(0.0, f64::max);
    let slow = if worst > SLOW_PING_PONG_NS { " (slow state: absolute figures are not comparable)" } else { "" };
    let ping_pong: Vec<String> = report.ping_pong_ns.iter().map(|ns| format!("{ns:.0}")).collect();
    let Machine { kernel, cpu, cpus, device } = &report.machine;
    format!("{stops}ping-pong {} ns{slow}\n{cpu} · {kernel} · {cpus} CPUs · {device}", ping_pong.join("/"))
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

    const fn case(arm: Arm, fanout: u16) -> Case {
        Case { arm, fanout, payload: 64, flows: 1, rules: 1, receiver: Receiver::Link }
    }

    fn run(case: Case, offered: u64, delivered: u64) -> Run {
        Run { case, window: Window { offered, delivered, seconds: 1.0, sink_drops: 0, covered: true }, preemptions: 0 }
    }

    fn rows(cases: &[Case], runs: &[Run]) -> Vec<Row> {
        let mut rows: Vec<Row> = cases.iter().filter_map(|case| row(case, "spin", runs, Offer::FlatOut(5_000.0))).collect();
        set_ratios(&mut rows);
        rows
    }

    #[test]
    fn rows_are_medians_and_ratios() {
        let [xsk, packet, sockets, redirect] = [Arm::Xsk, Arm::Packet, Arm::Sockets, Arm::Redirect].map(|arm| case(arm, 1));
        let runs = [
            run(xsk, 4_000, 1_000),
            run(packet, 4_000, 400),
            run(xsk, 4_000, 1_200),
            run(packet, 4_000, 500),
            run(xsk, 4_000, 900),
            run(packet, 4_000, 600),
            run(redirect, 3_000, 3_000),
        ];
        let rows = rows(&[xsk, packet, sockets, redirect], &runs);
        assert_eq!(
            rows.iter().map(|r| r.path.as_str()).collect::<Vec<_>>(),
            ["xsk", "packet", "redirect"],
            "a row without a run is left out"
        );
        assert_eq!((rows[0].delivered_pps, rows[0].min, rows[0].max, rows[0].median_of), (1_000.0, 900.0, 1_200.0, 3));
        assert_eq!(rows[0].ratio_to_packet, Some(2.0));
        assert!(!rows[0].source_bound && rows[2].source_bound);
        assert_eq!((rows[0].wait.as_str(), rows[2].wait.as_str()), ("spin", ""));
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_ratio_compares_the_same_load() {
        let cases = [case(Arm::Xsk, 1), case(Arm::Packet, 1), case(Arm::Xsk, 16), case(Arm::Packet, 16), case(Arm::Xsk, 4)];
        let big = Case { payload: 1400, ..case(Arm::Xsk, 1) };
        let runs = [
            run(cases[0], 900, 800),
            run(cases[1], 900, 400),
            run(cases[2], 100, 1_200),
            run(cases[3], 100, 400),
            run(cases[4], 100, 400),
            run(big, 900, 500),
        ];
        let rows = rows(&[&cases[..], &[big]].concat(), &runs);
        let ratios: Vec<_> = rows.iter().map(|row| row.ratio_to_packet).collect();
        assert_eq!(ratios, [Some(2.0), Some(1.0), Some(3.0), Some(1.0), None, None], "no baseline, no ratio");
        assert_eq!((rows[2].loss, rows[2].lost_packets), (0.25, 400), "1,200 of 1,600 came");
        assert!(rows[4].source_bound, "every packet that was offered came out of every output");
        let text = table(&Report { rows, ping_pong_ns: vec![70.0, 300.0], ..Report::default() });
        for part in ["1:16", "1400", "fan-out", "3.00", "ping-pong 70/300 ns (slow state"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_source_that_fell_short_of_its_pace_is_said() {
        let case = case(Arm::Xsk, 1);
        let at = |sent| row(&case, "spin", &[run(case, sent, sent)], Offer::Paced(1_000)).unwrap();
        assert!(!at(960).source_bound && at(960).kept_pace());
        assert!(at(940).source_bound && !at(940).kept_pace());
    }

    #[test]
    fn what_the_sink_lost_voids_a_row() {
        let of = case(Arm::Kernel, 1);
        let mut lossy = run(of, 4_000, 2_000);
        lossy.window.sink_drops = 3;
        assert!(rows(&[of], &[run(of, 4_000, 2_000), lossy])[0].void);
        let sockets = Case { receiver: Receiver::Udp, ..of };
        let row = &rows(&[sockets], &[Run { case: sockets, ..lossy }])[0];
        assert_eq!((row.void, row.receiver.as_deref(), row.sink_drops), (false, Some("udp"), 3));
        lossy.window.sink_drops = 1;
        assert!(!rows(&[of], &[lossy])[0].void);
    }
}
