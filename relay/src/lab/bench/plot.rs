//! A report as an SVG: bars of one load, lines over fan-outs, payloads or relays of a chain, the distribution of latencies.
//!
//! A writer of our own, since two shapes are all that is drawn. Pure: text out of rows. Must never leave out a row that has a figure.

use super::report::{Report, Row};
use std::fmt::Write;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
/// The area of the marks.
const LEFT: f64 = 90.0;
const RIGHT: f64 = 580.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 380.0;
/// One a row; told apart also by those who see few colours (Okabe, Ito), and grey.
const COLOURS: [&str; 9] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999", "#8c6d1f"];

/// How numbers become places.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scale {
    Logarithmic,
    /// Shares below 1: every nine more is as far as the last.
    Nines,
}

impl Scale {
    fn of(self, value: f64) -> f64 {
        match self {
            Self::Logarithmic => value.max(1e-3).log10(),
            Self::Nines => -(1.0 - value.clamp(0.0, 0.9999)).log10(),
        }
    }
}

#[derive(Clone, Debug)]
struct Axis {
    label: &'static str,
    scale: Scale,
    /// Where a line and a label stand; the first and the last are the ends.
    ticks: Vec<f64>,
}

impl Axis {
    /// Where `value` lies between the ends, 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let at = |value: Option<&f64>| self.scale.of(value.copied().unwrap_or(1.0));
        let (first, last) = (at(self.ticks.first()), at(self.ticks.last()));
        ((self.scale.of(value) - first) / (last - first).max(1e-9)).clamp(0.0, 1.0)
    }

    fn text(&self, tick: f64) -> String {
        match self.scale {
            Scale::Nines => format!("{} %", (tick * 1e4).round() / 100.0),
            Scale::Logarithmic => short(tick),
        }
    }
}

/// 1400, 250 k, 4.18 M.
fn short(value: f64) -> String {
    let (number, unit) = match value {
        _ if value >= 1e6 => (value / 1e6, " M"),
        _ if value >= 1e4 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let digits = if number >= 100.0 || number.fract() == 0.0 { 0 } else { 2 };
    format!("{number:.digits$}{unit}")
}

struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// The picture that fits the report's rows.
pub fn svg(report: &Report) -> String {
    let rows = &report.rows;
    if rows.iter().any(|row| !row.latency_curve.is_empty()) {
        let points = |row: &Row| row.latency_curve.clone();
        let x = Axis { label: "µs, no longer than", scale: Scale::Logarithmic, ticks: decades(each(rows, points, 0)) };
        let y = Axis { label: "share of packets", scale: Scale::Nines, ticks: vec![0.0, 0.5, 0.9, 0.99, 0.999, 0.9999] };
        return lines("latency", &x, &y, &series(rows, points));
    }
    if rows.iter().any(|row| row.hops > 1) {
        let points = |row: &Row| row.loss_free_pps.map(|pps| (f64::from(row.hops), pps)).into_iter().collect();
        return over("relays in a row", "highest loss-free rate, packets/s", rows, points);
    }
    if differ(rows, |row| row.fanout) {
        return over("outputs of the rule", "delivered packets/s, all outputs", rows, |row| {
            vec![(f64::from(row.fanout), row.delivered_pps)]
        });
    }
    if differ(rows, |row| u32::from(row.payload)) {
        return over("bytes of payload", "delivered packets/s", rows, |row| vec![(f64::from(row.payload), row.delivered_pps)]);
    }
    bars(rows)
}

fn differ(rows: &[Row], key: impl Fn(&Row) -> u32) -> bool {
    rows.iter().any(|row| rows.first().is_some_and(|first| key(first) != key(row)))
}

/// Lines over what the rows differ in, whose values are the ticks.
fn over(x: &'static str, y: &'static str, rows: &[Row], points: impl Fn(&Row) -> Vec<(f64, f64)>) -> String {
    let mut ticks: Vec<f64> = each(rows, &points, 0).collect();
    ticks.sort_by(f64::total_cmp);
    ticks.dedup();
    let x = Axis { label: x, scale: Scale::Logarithmic, ticks };
    let y = Axis { label: y, scale: Scale::Logarithmic, ticks: decades(each(rows, &points, 1)) };
    lines(y.label, &x, &y, &series(rows, points))
}

/// All first or second numbers.
fn each(rows: &[Row], points: impl Fn(&Row) -> Vec<(f64, f64)>, which: usize) -> impl Iterator<Item = f64> {
    rows.iter().flat_map(points).map(move |(x, y)| if which == 0 { x } else { y })
}

/// One, two and five of every power of ten around the values.
fn decades(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let (least, most) = values.filter(|value| *value > 0.0).fold((f64::MAX, 0.0f64), |(least, most), v| (least.min(v), most.max(v)));
    let all: Vec<f64> = (-2..10).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power))).collect();
    let first = all.iter().rposition(|tick| *tick <= least).unwrap_or(0);
    let last = all.iter().position(|tick| *tick >= most).unwrap_or(all.len() - 1).max(first + 1);
    all.get(first..=last).unwrap_or_default().to_vec()
}

/// A row's path, and who took what it sent, if that was no counter at the link.
fn name(row: &Row) -> String {
    row.receiver.as_ref().map_or_else(|| row.path.clone(), |receiver| format!("{} to {receiver}", row.path))
}

/// Rows of one path are one line.
fn series(rows: &[Row], points: impl Fn(&Row) -> Vec<(f64, f64)>) -> Vec<Series> {
    let mut all: Vec<Series> = Vec::new();
    for row in rows {
        match all.iter_mut().find(|series| series.name == name(row)) {
            Some(series) => series.points.extend(points(row)),
            None => all.push(Series { name: name(row), points: points(row) }),
        }
    }
    all
}

fn open(title: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n{}",
        text(WIDTH / 2.0, 28.0, "middle", title)
    )
}

fn text(x: f64, y: f64, anchor: &str, words: &str) -> String {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#222222\">{words}</text>\n")
}

fn line(from: (f64, f64), to: (f64, f64)) -> String {
    format!("<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"#dddddd\"/>\n", from.0, from.1, to.0, to.1)
}

fn colour(index: usize) -> &'static str {
    COLOURS.get(index % COLOURS.len()).copied().unwrap_or("#000000")
}

fn lines(title: &str, x: &Axis, y: &Axis, all: &[Series]) -> String {
    let place = |(a, b): (f64, f64)| (LEFT + x.place(a) * (RIGHT - LEFT), BOTTOM - y.place(b) * (BOTTOM - TOP));
    let mut out = open(title);
    for tick in &x.ticks {
        let at = LEFT + x.place(*tick) * (RIGHT - LEFT);
        out += &line((at, TOP), (at, BOTTOM));
        out += &text(at, BOTTOM + 18.0, "middle", &x.text(*tick));
    }
    for tick in &y.ticks {
        let at = BOTTOM - y.place(*tick) * (BOTTOM - TOP);
        out += &line((LEFT, at), (RIGHT, at));
        out += &text(LEFT - 8.0, at + 4.0, "end", &y.text(*tick));
    }
    out += &text(f64::midpoint(LEFT, RIGHT), BOTTOM + 42.0, "middle", x.label);
    if y.label != title {
        out += &text(LEFT, TOP - 10.0, "middle", y.label);
    }
    for (index, series) in all.iter().enumerate() {
        let colour = colour(index);
        let path: Vec<String> = series.points.iter().map(|point| place(*point)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(out, "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>", path.join(" "));
        for (x, y) in series.points.iter().map(|point| place(*point)) {
            let _ = writeln!(out, "<circle class=\"mark\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
        }
        let at = TOP + 10.0 + 22.0 * index as f64;
        let _ = writeln!(out, "<rect x=\"{}\" y=\"{}\" width=\"14\" height=\"4\" fill=\"{colour}\"/>", RIGHT + 24.0, at - 6.0);
        out += &text(RIGHT + 46.0, at, "start", &series.name);
    }
    out + "</svg>\n"
}

/// Delivered packets, a bar a row, and a thin line from the least to the greatest.
fn bars(rows: &[Row]) -> String {
    let most = rows.iter().map(|row| row.max.max(row.delivered_pps)).fold(1.0, f64::max);
    let reach = |pps: f64| 110.0 + pps / most * (RIGHT - 110.0);
    let step = ((BOTTOM - TOP) / rows.len().max(1) as f64).min(44.0);
    let mut out = open("delivered packets/s");
    for (index, row) in rows.iter().enumerate() {
        let (top, colour) = (TOP + step * index as f64, colour(index));
        let (middle, height, width) = (top + step * 0.4, step * 0.7, reach(row.delivered_pps) - 110.0);
        out += &text(102.0, middle + 4.0, "end", &name(row));
        let _ = writeln!(
            out,
            "<rect class=\"mark\" x=\"110\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>",
            middle - height / 2.0
        );
        let (min, max) = (reach(row.min), reach(row.max));
        let _ = writeln!(
            out,
            "<line x1=\"{min:.1}\" y1=\"{middle:.1}\" x2=\"{max:.1}\" y2=\"{middle:.1}\" stroke=\"#222222\" stroke-width=\"2\"/>"
        );
        let bound = if row.source_bound { " (source-bound)" } else { "" };
        out += &text(reach(row.max.max(row.delivered_pps)) + 8.0, middle + 4.0, "start", &format!("{}{bound}", short(row.delivered_pps)));
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(path: &str, fanout: u32, delivered_pps: f64) -> Row {
        Row { path: path.into(), fanout, payload: 64, hops: 1, delivered_pps, min: delivered_pps, max: delivered_pps, ..Row::default() }
    }

    /// Every element is closed in order, attributes are quoted, and no bare `&` or `<` stands in a text.
    fn assert_well_formed(svg: &str) {
        let mut open = Vec::new();
        let mut rest = svg;
        while let Some(at) = rest.find('<') {
            let (before, tag) = rest.split_at(at);
            assert!(before.split('&').skip(1).all(|entity| ["amp;", "lt;", "gt;"].iter().any(|name| entity.starts_with(name))), "{before}");
            let (tag, after) = tag[1..].split_once('>').unwrap();
            assert!(!tag.contains('<') && tag.matches('"').count() % 2 == 0, "{tag}");
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name)),
                None if tag.ends_with('/') => {}
                None => open.push(tag.split(' ').next().unwrap()),
            }
            rest = after;
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    fn marks(rows: Vec<Row>) -> usize {
        let svg = svg(&Report { rows, ..Report::default() });
        assert_well_formed(&svg);
        svg.matches("class=\"mark\"").count()
    }

    #[test]
    fn every_row_has_its_mark() {
        assert_eq!(marks(vec![row("xsk", 1, 1e6), row("packet", 1, 4e5), row("<&>", 1, 0.0)]), 3, "bars");
        assert_eq!(marks(vec![row("xsk", 1, 1e6), row("packet", 1, 4e5), row("xsk", 16, 2e6), row("packet", 16, 5e5)]), 4, "fan-out");
        assert_eq!(marks(vec![row("xsk", 1, 1e6), Row { payload: 1400, ..row("xsk", 1, 9e5) }]), 2, "payload");
        let hop = |hops, pps| Row { hops, loss_free_pps: Some(pps), ..row("xsk", 1, 250e3) };
        assert_eq!(marks(vec![hop(1, 9e5), hop(2, 5e5), hop(3, 3e5)]), 3, "chain");
        let curve = Row { latency_curve: vec![(0.9, 0.0), (1.1, 0.5), (2.0, 0.99), (8.0, 0.999)], ..row("xsk", 1, 5e5) };
        assert_eq!(marks(vec![curve]), 4, "latency");
        assert_eq!(marks(Vec::new()), 0);
    }

    #[test]
    fn more_is_higher_and_further_right() {
        let x = Axis { label: "", scale: Scale::Logarithmic, ticks: decades([3.0, 47.0].into_iter()) };
        assert_eq!(x.ticks, [2.0, 5.0, 10.0, 20.0, 50.0]);
        assert!(x.place(3.0) < x.place(30.0) && x.place(1.0) == 0.0 && x.place(99.0) == 1.0);
        let nines = Axis { label: "", scale: Scale::Nines, ticks: vec![0.0, 0.9, 0.99, 0.999] };
        assert!((nines.place(0.9) - 1.0 / 3.0).abs() < 1e-9 && (nines.place(0.99) - 2.0 / 3.0).abs() < 1e-9);
        assert_eq!(["50 %", "99.9 %", "99.99 %"], [0.5, 0.999, 0.9999].map(|share| nines.text(share)).each_ref().map(String::as_str));
        assert_eq!(["64", "1400", "250 k", "4.18 M"], [64.0, 1_400.0, 250e3, 4.176e6].map(short).each_ref().map(String::as_str));
    }
}
