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
const RATIOS: [(&str, &str, u32, f64); 6] = [
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

/// All bars that the report has rows for. `is_paced`: its rows ran at a rate that both lossless paths must carry.
pub fn bars(report: &Report, is_paced: bool) -> Vec<Bar> {
    let rows = &report.rows;
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
    }
    bars.extend(LATENCIES.iter().filter_map(|(path, percentile, wanted)| {
        let row = rows.iter().find(|row| row.path == *path)?;
        let got = match *percentile {
            "p50" => row.p50_us,
            "p99" => row.p99_us,
            _ => row.p999_us,
        }?;
        Some(Bar { what: format!("{path}, {percentile}, µs"), wanted: *wanted, got, met: got <= *wanted })
    }));
    if is_paced {
        bars.extend(rows.iter().filter(|row| LOSSLESS.contains(&row.path.as_str())).map(|row| {
            let what = format!("{} after {} relays, packets lost of {}", row.path, row.hops, row.sent_packets);
            Bar { what, wanted: 0.0, got: row.lost_packets as f64, met: row.lost_packets == 0 }
        }));
    }
    bars
}

fn find<'a>(rows: &'a [Row], path: &str, fanout: u32, payload: u16) -> Option<&'a Row> {
    rows.iter().find(|row| row.path == path && row.fanout == fanout && row.payload == payload && row.p50_us.is_none())
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
    use super::*;

    fn row(path: &str, fanout: u32, payload: u16, delivered_pps: f64) -> Row {
        Row { path: path.into(), fanout, payload, delivered_pps, hops: 1, ..Row::default() }
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
        let bars = bars(&Report { rows, ..Report::default() }, false);
        let met: Vec<_> = bars.iter().map(|bar| (bar.what.as_str(), bar.met)).collect();
        assert_eq!(
            met,
            [
                ("xsk ÷ xsk_loop, 1:1", false),
                ("xsk ÷ packet, 1:1", true),
                ("coalesce ÷ packet, 1:16", false),
                ("xsk, 1400 ÷ 64 bytes", true)
            ]
        );
        let said = describe(&bars);
        assert!(said.contains("MISSED xsk ÷ xsk_loop, 1:1: 0.95 (bar 0.97)") && said.contains("met    xsk ÷ packet"), "{said}");
    }

    #[test]
    fn a_paced_run_is_judged_by_its_losses_and_a_latency_by_its_tail() {
        let lossy = Row { lost_packets: 1, sent_packets: 9, ..row("xsk", 1, 64, 8.0) };
        let paced = Report { rows: vec![lossy, row("kernel", 1, 64, 9.0), row("packet", 1, 64, 9.0)], ..Report::default() };
        assert_eq!(bars(&paced, true).iter().map(|bar| bar.met).collect::<Vec<_>>(), [false, true], "and the baseline is not judged");
        let slow = Row { p50_us: Some(1.4), p99_us: Some(2.6), p999_us: Some(9.0), ..row("xsk", 1, 64, 9.0) };
        let latency = Report { rows: vec![slow], ..Report::default() };
        assert_eq!(bars(&latency, false).iter().map(|bar| bar.met).collect::<Vec<_>>(), [true, false]);
    }
}
