//! `relay top`: live rates of rules, interfaces and workers, from the same answers as `status`, `stats` and `rule list`.
//!
//! The supervisor reads the workers' status segments: the data path notices nothing. What is drawn is made by pure functions from two
//! answers, so that tests draw it without a terminal. Must never change anything.

use super::failure::Failure;
use super::output::duration;
use super::{Context, OK, Outcome, unexpected, values};
use crate::control::message::{Request, Response, RuleInfo, Stats, Status};
use clap::Args;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Row, Table};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Arguments of `relay top`.
#[derive(Debug, Args)]
pub(super) struct TopArgs {
    /// Between two looks
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = values::period)]
    interval: Duration,
    /// Show only rules whose id or text contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
}

/// What a look saw.
#[derive(Clone, Debug)]
struct Look {
    at: Instant,
    status: Status,
    stats: Stats,
    rules: Vec<RuleInfo>,
}

/// What rules are sorted by, largest first (the name: smallest first).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sort {
    #[default]
    In,
    Out,
    Drops,
    Name,
}

impl Sort {
    const fn next(self) -> Self {
        match self {
            Self::In => Self::Out,
            Self::Out => Self::Drops,
            Self::Drops => Self::Name,
            Self::Name => Self::In,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
            Self::Drops => "drops",
            Self::Name => "name",
        }
    }
}

/// Everything on the screen.
#[derive(Clone, Debug)]
struct Screen {
    before: Look,
    now: Look,
    sort: Sort,
    filter: String,
    typing: bool,
    paused: bool,
    first: usize,
}

/// Rates of one rule.
#[derive(Clone, Debug, Default, PartialEq)]
struct Rates {
    id: String,
    path: String,
    joined: bool,
    taken: f64,
    sent: f64,
    megabits: f64,
    dropped: f64,
    reason: String,
}

/// Draws until `q`.
pub(super) fn run(args: &TopArgs, context: &Context) -> Outcome {
    if context.global.json || !std::io::stdout().is_terminal() {
        return Err(Failure::bad_input("top draws on a terminal")
            .field("--json")
            .hint("use `relay stats --json` or `relay run --metrics ADDR`"));
    }
    let first = look(context)?;
    let screen = Screen {
        before: first.clone(),
        now: first,
        sort: Sort::default(),
        filter: args.filter.clone(),
        typing: false,
        paused: false,
        first: 0,
    };
    let mut terminal = ratatui::init();
    let ended = interact(&mut terminal, screen, args.interval, context);
    ratatui::restore();
    ended.map(|()| OK)
}

fn interact(terminal: &mut ratatui::DefaultTerminal, mut screen: Screen, interval: Duration, context: &Context) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::new(1, format!("terminal: {error}"));
    loop {
        terminal.draw(|frame| draw(frame, &screen)).map_err(failed)?;
        let next = screen.now.at + interval;
        while event::poll(next.saturating_duration_since(Instant::now())).map_err(failed)? {
            if let Event::Key(key) = event::read().map_err(failed)?
                && key.kind == KeyEventKind::Press
            {
                let interrupted = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                if interrupted || pressed(&mut screen, key.code) {
                    return Ok(());
                }
            }
            terminal.draw(|frame| draw(frame, &screen)).map_err(failed)?;
        }
        let seen = look(context)?;
        if screen.paused {
            screen.now.at = seen.at;
        } else {
            screen.before = std::mem::replace(&mut screen.now, seen);
        }
    }
}

/// Whether to end.
fn pressed(screen: &mut Screen, key: KeyCode) -> bool {
    if screen.typing {
        match key {
            KeyCode::Enter => screen.typing = false,
            KeyCode::Esc => (screen.typing, screen.filter) = (false, String::new()),
            KeyCode::Backspace => drop(screen.filter.pop()),
            KeyCode::Char(letter) => screen.filter.push(letter),
            _ => {}
        }
        return false;
    }
    match key {
        KeyCode::Char('q') | KeyCode::Esc => return true,
        KeyCode::Char('s') => screen.sort = screen.sort.next(),
        KeyCode::Char('/') => screen.typing = true,
        KeyCode::Char('p') => screen.paused = !screen.paused,
        KeyCode::Down => screen.first = screen.first.saturating_add(1),
        KeyCode::Up => screen.first = screen.first.saturating_sub(1),
        KeyCode::PageDown => screen.first = screen.first.saturating_add(20),
        KeyCode::PageUp => screen.first = screen.first.saturating_sub(20),
        _ => {}
    }
    false
}

fn look(context: &Context) -> Result<Look, Failure> {
    let status = match context.ask(&Request::Status)? {
        Response::Status(status) => *status,
        other => return Err(unexpected(&other)),
    };
    let stats = match context.ask(&Request::Stats)? {
        Response::Stats(stats) => *stats,
        other => return Err(unexpected(&other)),
    };
    match context.ask(&Request::RuleList)? {
        Response::Rules(rules) => Ok(Look { at: Instant::now(), status, stats, rules }),
        other => Err(unexpected(&other)),
    }
}

fn total(counters: &BTreeMap<String, u64>) -> u64 {
    counters.values().copied().fold(0, u64::saturating_add)
}

/// Rates of all rules that the filter lets through, sorted.
fn rates(screen: &Screen) -> Vec<Rates> {
    let seconds = (screen.now.at - screen.before.at).as_secs_f64().max(0.001);
    let mut all: Vec<Rates> = screen
        .now
        .stats
        .rules
        .iter()
        .filter_map(|rule| {
            let info = screen.now.rules.iter().find(|info| info.id == rule.id)?;
            let shown = rule.id.contains(&screen.filter) || info.rule.contains(&screen.filter);
            shown.then(|| rates_of(screen, rule, info, seconds))
        })
        .collect();
    match screen.sort {
        Sort::In => all.sort_by(|a, b| b.taken.total_cmp(&a.taken)),
        Sort::Out => all.sort_by(|a, b| b.sent.total_cmp(&a.sent)),
        Sort::Drops => all.sort_by(|a, b| b.dropped.total_cmp(&a.dropped)),
        Sort::Name => all.sort_by(|a, b| a.id.cmp(&b.id)),
    }
    all
}

fn rates_of(screen: &Screen, rule: &crate::control::message::RuleStats, info: &RuleInfo, seconds: f64) -> Rates {
    let before = screen.before.stats.rules.iter().find(|before| before.id == rule.id).cloned().unwrap_or_default();
    let sent = |rule: &crate::control::message::RuleStats| rule.outputs.iter().map(|output| output.tx_packets).sum::<u64>();
    let bytes = |rule: &crate::control::message::RuleStats| rule.outputs.iter().map(|output| output.tx_bytes).sum::<u64>();
    let (now, then) = (dropped(rule), dropped(&before));
    let since = |after: u64, before: u64| after.saturating_sub(before) as f64 / seconds;
    let worst = now.iter().map(|(reason, count)| (count.saturating_sub(then.get(reason).copied().unwrap_or(0)), reason)).max();
    Rates {
        id: rule.id.clone(),
        path: info.path.clone(),
        joined: info.joined,
        taken: since(rule.rx_packets, before.rx_packets),
        sent: since(sent(rule), sent(&before)),
        megabits: since(bytes(rule), bytes(&before)) * 8.0 / 1e6,
        dropped: since(total(&now), total(&then)),
        reason: worst.filter(|(count, _)| *count > 0).map(|(_, reason)| reason.clone()).unwrap_or_default(),
    }
}

/// Drops of a rule and of all its outputs together, by reason.
fn dropped(rule: &crate::control::message::RuleStats) -> BTreeMap<String, u64> {
    let mut sum = rule.drops.clone();
    for (reason, count) in rule.outputs.iter().flat_map(|output| &output.drops) {
        let total = sum.entry(reason.clone()).or_default();
        *total = total.saturating_add(*count);
    }
    sum
}

/// `0`, `950`, `12.3k`, `3.46M`: at most six characters.
fn short(rate: f64) -> String {
    match rate {
        rate if rate < 0.05 => "0".into(),
        rate if rate < 10.0 => format!("{rate:.1}"),
        rate if rate < 1e4 => format!("{rate:.0}"),
        rate if rate < 1e6 => format!("{:.1}k", rate / 1e3),
        rate => format!("{:.2}M", rate / 1e6),
    }
}

const HEAD: Style = Style::new().add_modifier(Modifier::BOLD);
const BAD: Style = Style::new().fg(Color::Red);

fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let (interfaces, workers) = (screen.now.status.interfaces.len() as u16, screen.now.status.workers.len() as u16);
    let areas = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1 + workers.min(4)),
        Constraint::Length(1 + interfaces.min(6)),
        Constraint::Min(3),
        Constraint::Length(1),
    ])
    .split(frame.area());
    let [head, worker, interface, rule, foot] = areas[..] else { return };
    frame.render_widget(Paragraph::new(title(screen)).style(HEAD), head);
    draw_workers(frame, worker, screen);
    draw_interfaces(frame, interface, screen);
    draw_rules(frame, rule, screen);
    frame.render_widget(Paragraph::new(keys(screen)), foot);
}

fn title(screen: &Screen) -> Line<'static> {
    let status = &screen.now.status;
    let frames = &screen.now.stats.frames;
    let free = (frames.free * 100).checked_div(frames.total).unwrap_or(0);
    Line::from(format!(
        "relay {}  up {}  {} rules  epoch {}  frames {free}% free{}",
        status.version,
        duration(status.supervisor.uptime_ms),
        status.rules,
        status.epoch,
        if screen.paused { "  PAUSED" } else { "" }
    ))
}

fn keys(screen: &Screen) -> String {
    if screen.typing {
        return format!("filter: {}_   Enter keeps, Esc clears", screen.filter);
    }
    let filter = if screen.filter.is_empty() { String::new() } else { format!(" ({})", screen.filter) };
    format!("q quit  s sort ({})  / filter{filter}  p pause  ↑↓ scroll", screen.sort.name())
}

fn draw_workers(frame: &mut Frame<'_>, area: Rect, screen: &Screen) {
    let rows = screen.now.status.workers.iter().map(|worker| {
        let row = Row::new([
            worker.id.to_string(),
            worker.state.clone(),
            worker.pid.to_string(),
            if worker.cpu < 0 { "any".into() } else { worker.cpu.to_string() },
            format!("{} {}", worker.pipeline, worker.wait),
            duration(worker.heartbeat_age_ms),
            worker.restarts.to_string(),
        ]);
        if worker.state == "run" { row } else { row.style(BAD) }
    });
    let widths = [6, 9, 8, 4, 16, 10, 8].map(Constraint::Length);
    let header = Row::new(["WORKER", "STATE", "PID", "CPU", "LOOP", "BEAT", "RESTARTS"]).style(HEAD);
    frame.render_widget(Table::new(rows, widths).header(header), area);
}

fn draw_interfaces(frame: &mut Frame<'_>, area: Rect, screen: &Screen) {
    let seconds = (screen.now.at - screen.before.at).as_secs_f64().max(0.001);
    let rows = screen.now.status.interfaces.iter().map(|info| {
        let find = |look: &Look| look.stats.interfaces.iter().find(|one| one.name == info.name).cloned().unwrap_or_default();
        let (now, then) = (find(&screen.now), find(&screen.before));
        let since = |after: u64, before: u64| short(after.saturating_sub(before) as f64 / seconds);
        Row::new([
            info.name.clone(),
            info.backend.clone(),
            since(now.rx_packets, then.rx_packets),
            since(now.tx_packets, then.tx_packets),
            since(now.passed, then.passed),
            since(total(&now.drops), total(&then.drops)),
        ])
    });
    let widths = [
        Constraint::Length(15),
        Constraint::Length(17),
        Constraint::Length(8),
        Constraint::Length(8),
        Constraint::Length(8),
        Constraint::Length(8),
    ];
    let header = Row::new(["INTERFACE", "BACKEND", "IN/s", "OUT/s", "PASS/s", "DROP/s"]).style(HEAD);
    frame.render_widget(Table::new(rows, widths).header(header), area);
}

fn draw_rules(frame: &mut Frame<'_>, area: Rect, screen: &Screen) {
    let all = rates(screen);
    let room = usize::from(area.height).saturating_sub(1);
    let first = screen.first.min(all.len().saturating_sub(room));
    let rows = all.iter().skip(first).take(room).map(|rule| {
        let row = Row::new([
            rule.id.clone(),
            rule.path.clone(),
            if rule.joined { "yes" } else { "no" }.into(),
            short(rule.taken),
            short(rule.sent),
            short(rule.megabits),
            short(rule.dropped),
            rule.reason.clone(),
        ]);
        if rule.dropped > 0.0 { row.style(BAD) } else { row }
    });
    let widths = [
        Constraint::Min(14),
        Constraint::Length(7),
        Constraint::Length(6),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(16),
    ];
    let header = Row::new(["RULE", "PATH", "JOINED", "IN/s", "OUT/s", "Mbit/s", "DROP/s", "REASON"]).style(HEAD);
    frame.render_widget(Table::new(rows, widths).header(header), area);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::message::{InterfaceInfo, InterfaceStats, OutputStats, RuleStats, WorkerInfo};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn look_at(at: Instant, packets: u64) -> Look {
        let rule = |id: &str, packets: u64, lost: u64| {
            let drops = BTreeMap::from([("ttl_expired".to_owned(), lost), ("no_frame".to_owned(), 0)]);
            let output = OutputStats {
                egress: "eth1".into(),
                to: "keep".into(),
                tx_packets: packets - lost,
                tx_bytes: packets * 125,
                drops,
                ..OutputStats::default()
            };
            RuleStats { id: id.into(), rx_packets: packets, outputs: vec![output], ..RuleStats::default() }
        };
        let info = |id: &str| RuleInfo {
            id: id.into(),
            rule: format!("eth0 239.1.1.1:5000 -> eth1; id={id}"),
            path: "xsk".into(),
            engine: "tx".into(),
            joined: true,
            ..RuleInfo::default()
        };
        let ids: Vec<String> = (0..30).map(|n| format!("rule-{n:02}")).collect();
        let rules = ids.iter().enumerate().map(|(n, id)| rule(id, packets * n as u64, if n == 7 { packets } else { 0 })).collect();
        let worker = WorkerInfo {
            state: "run".into(),
            pid: 4711,
            cpu: 1,
            pipeline: "fused".into(),
            wait: "adaptive".into(),
            heartbeat_age_ms: 40,
            ..WorkerInfo::default()
        };
        let interface = InterfaceInfo { name: "eth0".into(), backend: "af_xdp_copy".into(), ..InterfaceInfo::default() };
        Look {
            at,
            status: Status {
                version: "0.1.0".into(),
                rules: 30,
                epoch: 4,
                workers: vec![worker],
                interfaces: vec![interface],
                ..Status::default()
            },
            stats: Stats {
                interfaces: vec![InterfaceStats { name: "eth0".into(), rx_packets: packets, ..InterfaceStats::default() }],
                rules,
                ..Stats::default()
            },
            rules: ids.iter().map(|id| info(id)).collect(),
        }
    }

    fn screen() -> Screen {
        let at = Instant::now();
        let (before, now) = (look_at(at, 0), look_at(at + Duration::from_secs(1), 100_000));
        Screen { before, now, sort: Sort::In, filter: String::new(), typing: false, paused: false, first: 0 }
    }

    fn drawn(screen: &Screen, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, screen)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let cells: Vec<&str> = buffer.content().iter().map(ratatui::buffer::Cell::symbol).collect();
        cells.chunks(usize::from(width)).map(|line| line.concat().trim_end().to_owned()).collect()
    }

    #[test]
    fn a_screen_of_80_by_24() {
        let lines = drawn(&screen(), 80, 24);
        assert_eq!(lines[0], "relay 0.1.0  up 0 ms  30 rules  epoch 4  frames 0% free");
        assert_eq!(lines[1], "WORKER STATE     PID      CPU  LOOP             BEAT       RESTARTS");
        assert_eq!(lines[2], "0      run       4711     1    fused adaptive   40 ms      0");
        assert_eq!(lines[4], "eth0            af_xdp_copy       100.0k   0        0        0");
        assert_eq!(lines[5], "RULE             PATH    JOINED IN/s    OUT/s   Mbit/s  DROP/s  REASON");
        assert_eq!(lines[6], "rule-29          xsk     yes    2.90M   2.90M   2900    0");
        assert_eq!(lines[23], "q quit  s sort (in)  / filter  p pause  ↑↓ scroll");
        assert!(lines.iter().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn a_screen_of_200_by_50_shows_every_rule() {
        let lines = drawn(&screen(), 200, 50);
        assert!((0..30).all(|n| lines.iter().any(|line| line.starts_with(&format!("rule-{n:02}")))), "{lines:#?}");
        assert!(lines.iter().any(|line| line.starts_with("rule-07") && line.ends_with("ttl_expired")), "{lines:#?}");
    }

    #[test]
    fn keys_sort_filter_scroll_and_quit() {
        let mut screen = screen();
        assert!(!pressed(&mut screen, KeyCode::Char('s')) && !pressed(&mut screen, KeyCode::Char('s')));
        assert_eq!(rates(&screen)[0].id, "rule-07", "by drops");
        for key in ['/', '2', '9'] {
            assert!(!pressed(&mut screen, KeyCode::Char(key)));
        }
        assert!(!pressed(&mut screen, KeyCode::Enter));
        assert_eq!(rates(&screen).len(), 1);
        assert!(!pressed(&mut screen, KeyCode::PageDown));
        assert!(drawn(&screen, 80, 24).iter().any(|line| line.starts_with("rule-29")), "scrolling stops at the end");
        assert!(drawn(&screen, 10, 3).len() == 3, "a tiny terminal is no error");
        assert!(pressed(&mut screen, KeyCode::Char('q')));
    }

    #[test]
    fn rates_are_short() {
        let right = [(0.0, "0"), (0.5, "0.5"), (950.0, "950"), (12_345.0, "12.3k"), (3_456_789.0, "3.46M")];
        for (rate, text) in right {
            assert_eq!(short(rate), text);
        }
    }
}
