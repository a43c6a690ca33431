//! `--gate`: the bars that the relay has set itself, judged from a report. Pure.
//!
//! Ratios of medians of one run, so that they say something on any machine; latencies and losses as they are. A bar whose rows were
//! not measured is left out. Must never be a part of CI: a shared machine would judge its neighbours.

use super::report::{Report, Row};
use serde::{Deserialize, Serialize};

/// One bar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bar {
    /// What is compared.
    pub what: String,
    /// At least, or for latencies and losses at most, so much.
    pub wanted: f64,
    /// What was measured.
    pub got: f64,
    /// It is met.
    pub met: bool,
}

/// Payload of the bars that name none.
const SMALL: u16 = 64;
/// Payload of a full frame.
const LARGE: u16 = 1400;
/// One path against another: same fan-out, 64 bytes.
const RATIOS: [(&str, &str, u32, f64); 7] = [
    ("kernel_macs", "redirect", 1, 0.9),
    ("kernel", "redirect", 1, 0.8),
    ("coalesce", "xsk", 1, 2.8),
    ("xsk", "xsk_loop", 1, 0.97),
    ("xsk", "packet", 1, 1.9),
    ("coalesce", "packet", 16, 10.0),
    ("kernel", "packet", 16, 3.5),
];
/// Latency at most: path, percentile, µs.
const LATENCIES: [(&str, &str, f64); 3] = [("xsk", "p50", 1.5), ("xsk", "p99", 2.5), ("kernel", "p99.9", 2.0)];
/// Paths that lose nothing at a pace they carry.
const LOSSLESS: [&str; 2] = ["kernel", "xsk"];
/// A large payload may cost so much of the packet rate, and an output more nothing but this.
const LARGE_SHARE: f64 = 0.85;
const FLAT: f64 = 0.95;
/// So many flows by turns never make engine coalesce slower than engine tx, but for this.
const MANY_FLOWS: u32 = 16;
const NOT_SLOWER: f64 = 0.95;
/// So many rules cost no more than 1.15 times one.
const MANY_RULES: u32 = 10_000;
const RULES_SHARE: f64 = 1.0 / 1.15;

/// All bars that the report has rows for.
pub fn bars(report: &Report) -> Vec<Bar> {
    let (rows, is_paced) = (&report.rows, report.is_paced);
    let mut bars: Vec<Bar> = Vec::new();
    if !is_paced {
        bars.extend(RATIOS.iter().filter_map(|(path, against, fanout, wanted)| {
            let (row, base) = (find(rows, path, *fanout, SMALL)?, find(rows, against, *fanout, SMALL)?);
            ratio(format!("{path} ÷ {against}, 1:{fanout}"), row, base, *wanted)
        }));
        bars.extend(LOSSLESS.iter().filter_map(|path| {
            let (large, small) = (find(rows, path, 1, LARGE)?, find(rows, path, 1, SMALL)?);
            ratio(format!("{path}, {LARGE} ÷ {SMALL} bytes"), large, small, LARGE_SHARE)
        }));
        bars.extend(["xsk", "kernel", "coalesce"].iter().filter_map(|path| {
            let (many, few) = (find(rows, path, 16, SMALL)?, find(rows, path, 4, SMALL)?);
            ratio(format!("{path}, 1:16 ÷ 1:4"), many, few, FLAT)
        }));
        bars.extend(["xsk", "kernel"].iter().filter_map(|path| {
            let (many, one) = (find_of(rows, path, 1, SMALL, [1, MANY_RULES])?, find(rows, path, 1, SMALL)?);
            ratio(format!("{path}, {MANY_RULES} rules ÷ 1"), many, one, RULES_SHARE)
        }));
        let flows = |path| find_of(rows, path, 1, SMALL, [MANY_FLOWS, 1]);
        bars.extend(
            flows("coalesce")
                .zip(flows("xsk"))
                .and_then(|(row, base)| ratio(format!("coalesce ÷ xsk, {MANY_FLOWS} flows"), row, base, NOT_SLOWER)),
        );
    }
    bars.extend(LATENCIES.iter().filter_map(|(path, percentile, wanted)| {
        let row = rows.iter().find(|row| row.path == *path)?;
        let got = match *percentile {
            "p50" => row.p50_us,
            "p99" => row.p99_us,
            _ => row.p999_us,
        }?;
        // The kernel path runs on the generator's CPU, which nobody has watched.
        let alone = report.cpu.filter(|cpu| (*path, *percentile) == ("xsk", "p99") && cpu.p99_us > *wanted);
        let alone = alone.map_or_else(String::new, |cpu| format!(" (its CPU alone {:.2})", cpu.p99_us));
        Some(Bar { what: format!("{path}, {percentile}, µs{alone}"), wanted: *wanted, got, met: got <= *wanted })
    }));
    if is_paced {
        bars.extend(rows.iter().filter(|row| LOSSLESS.contains(&row.path.as_str())).map(|row| {
            let what = format!("{} after {} relays, packets lost of {}", row.path, row.hops, row.sent_packets);
            let what = if row.kept_pace() { what } else { format!("{what}, at {:.0}/s instead of the rate asked for", row.offered_pps) };
            Bar { what, wanted: 0.0, got: row.lost_packets as f64, met: row.lost_packets == 0 && row.kept_pace() && !row.void }
        }));
    }
    bars
}

fn find<'a>(rows: &'a [Row], path: &str, fanout: u32, payload: u16) -> Option<&'a Row> {
    find_of(rows, path, fanout, payload, [1, 1])
}

/// The row under this load: outputs, payload, flows and rules.
fn find_of<'a>(rows: &'a [Row], path: &str, fanout: u32, payload: u16, of: [u32; 2]) -> Option<&'a Row> {
    let is_it = |row: &&Row| row.path == path && row.fanout == fanout && row.payload == payload && [row.flows, row.rules] == of;
    rows.iter().find(|row| is_it(row) && row.p50_us.is_none() && row.receiver.is_none())
}

fn ratio(what: String, row: &Row, against: &Row, wanted: f64) -> Option<Bar> {
    let got = (against.delivered_pps > 0.0).then(|| row.delivered_pps / against.delivered_pps)?;
    Some(Bar { what, wanted, got, met: got >= wanted && !row.void && !against.void })
}

/// The bars, one a line.
pub fn describe(bars: &[Bar]) -> String {
    let line = |bar: &Bar| format!("{} {}: {:.2} (bar {})", if bar.met { "met   " } else { "MISSED" }, bar.what, bar.got, bar.wanted);
    bars.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::super::report::CpuStops;
    use super::*;

    fn row(path: &str, fanout: u32, payload: u16, delivered_pps: f64) -> Row {
        Row { path: path.into(), fanout, payload, delivered_pps, hops: 1, flows: 1, rules: 1, ..Row::default() }
    }

    #[test]
    fn ratios_are_of_the_same_load() {
        let rows = vec![
            row("xsk", 1, 64, 200.0),
            row("packet", 1, 64, 100.0),
            row("xsk_loop", 1, 64, 210.0),
            row("xsk", 1, 1400, 180.0),
            row("coalesce", 16, 64, 999.0),
            row("packet", 16, 64, 100.0),
        ];
        let flows = |path| Row { flows: 16, ..row(path, 1, 64, if path == "xsk" { 100.0 } else { 94.0 }) };
        let rows = [rows, vec![flows("xsk"), flows("coalesce"), Row { rules: 10_000, ..row("xsk", 1, 64, 190.0) }]].concat();
        let bars = bars(&Report { rows, ..Report::default() });
        let met: Vec<_> = bars.iter().map(|bar| (bar.what.as_str(), bar.met)).collect();
        assert_eq!(
            met,
            [
                ("xsk ÷ xsk_loop, 1:1", false),
                ("xsk ÷ packet, 1:1", true),
                ("coalesce ÷ packet, 1:16", false),
                ("xsk, 1400 ÷ 64 bytes", true),
                ("xsk, 10000 rules ÷ 1", true),
                ("coalesce ÷ xsk, 16 flows", false),
            ]
        );
        let said = describe(&bars);
        assert!(said.contains("MISSED xsk ÷ xsk_loop, 1:1: 0.95 (bar 0.97)") && said.contains("met    xsk ÷ packet"), "{said}");
    }

    #[test]
    fn a_paced_run_is_judged_by_its_losses_and_a_latency_by_its_tail() {
        let lossy = Row { lost_packets: 1, sent_packets: 9, ..row("xsk", 1, 64, 8.0) };
        let rows = vec![lossy, row("kernel", 1, 64, 9.0), row("packet", 1, 64, 9.0)];
        let mut paced = Report { rows, is_paced: true, ..Report::default() };
        assert_eq!(bars(&paced).iter().map(|bar| bar.met).collect::<Vec<_>>(), [false, true], "and the baseline is not judged");
        (paced.rows[1].asked_pps, paced.rows[1].offered_pps) = (Some(10.0), 9.0);
        assert!(!bars(&paced)[1].met, "a source that fell short proves nothing");
        let slow = Row { p50_us: Some(1.4), p99_us: Some(2.6), p999_us: Some(9.0), ..row("xsk", 1, 64, 9.0) };
        let mut latency = Report { rows: vec![slow], ..Report::default() };
        assert_eq!(bars(&latency).iter().map(|bar| bar.met).collect::<Vec<_>>(), [true, false]);
        let cpu = CpuStops { cpu: 1, share: 0.02, p99_us: 52.0, p999_us: 900.0 };
        latency.cpu = Some(cpu);
        assert!(describe(&bars(&latency)).contains("xsk, p99, µs (its CPU alone 52.00): 2.60"), "and says what no relay can help");
        latency.cpu = Some(CpuStops { p99_us: 2.0, ..cpu });
        assert!(!describe(&bars(&latency)).contains("alone"));
    }
}
