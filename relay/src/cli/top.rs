//! `relay top`: live rates of rules, interfaces and workers, from the same answers as `status`, `stats` and `rule list`.
//!
//! The supervisor reads the workers' status segments: the data path notices nothing. What is drawn is made by pure functions from two
//! answers, so that tests draw it without a terminal. Must never change anything.

use super::failure::Failure;
use super::output::{duration, span};
use super::{Context, OK, Outcome, unexpected, values};
use crate::control::message::{InterfaceInfo, Request, Response, RuleInfo, Stats, Status, WorkerInfo};
use crate::plan::latency;
use clap::Args;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Text};
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
    text: String,
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
        text: info.rule.clone(),
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
/// From this width on each table has its last column, which says what there is no room for on 80.
const WIDE: u16 = 120;

/// Name, width, and on which side its words stand.
struct Column(&'static str, Constraint, Alignment);

const fn left(name: &'static str, width: u16) -> Column {
    Column(name, Constraint::Length(width), Alignment::Left)
}

const fn right(name: &'static str, width: u16) -> Column {
    Column(name, Constraint::Length(width), Alignment::Right)
}

const fn rest(name: &'static str) -> Column {
    Column(name, Constraint::Min(0), Alignment::Left)
}

/// The words of a row, and whether somebody ought to look at it.
type Words = (Vec<String>, bool);

fn draw_table(frame: &mut Frame<'_>, area: Rect, columns: &[Column], rows: impl Iterator<Item = Words>) {
    let columns = if area.width < WIDE { columns.get(..columns.len() - 1).unwrap_or_default() } else { columns };
    let aligned = |words: Vec<String>| Row::new(words.into_iter().zip(columns).map(|(text, column)| Text::from(text).alignment(column.2)));
    let rows = rows.map(|(words, is_bad)| if is_bad { aligned(words).style(BAD) } else { aligned(words) });
    let header = aligned(columns.iter().map(|column| column.0.to_owned()).collect()).style(HEAD);
    frame.render_widget(Table::new(rows, columns.iter().map(|column| column.1)).header(header), area);
}

/// The first of a list that is too long for its place, and how many there are besides.
fn cut(mut rows: Vec<Words>, room: u16) -> Vec<Words> {
    let room = usize::from(room.max(1));
    if rows.len() > room {
        let more = rows.len() - (room - 1);
        rows.truncate(room - 1);
        rows.push((vec![String::new(), format!("{more} more")], false));
    }
    rows
}

fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let height = frame.area().height;
    let workers = cut(screen.now.status.workers.iter().map(|worker| worker_row(screen, worker)).collect(), height / 6);
    let interfaces = cut(screen.now.status.interfaces.iter().map(|info| interface_row(screen, info)).collect(), height / 4);
    let areas = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1 + workers.len() as u16),
        Constraint::Length(1 + interfaces.len() as u16),
        Constraint::Min(3),
        Constraint::Length(1),
    ])
    .split(frame.area());
    let [head, worker, interface, rule, foot] = areas[..] else { return };
    frame.render_widget(Paragraph::new(title(screen)).style(HEAD), head);
    draw_table(frame, worker, &WORKERS, workers.into_iter());
    draw_table(frame, interface, &INTERFACES, interfaces.into_iter());
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

const WORKERS: [Column; 10] = [
    left("WORKER", 6),
    left("STATE", 8),
    right("PID", 7),
    right("CPU", 3),
    left("LOOP", 14),
    right("BEAT", 8),
    right("P50", 8),
    right("P99", 8),
    right("RESTARTS", 8),
    rest("LAST EXIT"),
];

/// P50 and P99 are of the packets since the look before.
fn worker_row(screen: &Screen, worker: &WorkerInfo) -> Words {
    let find = |look: &Look| look.stats.latency.iter().find(|one| one.worker == worker.id).cloned().unwrap_or_default().buckets;
    let new = latency::since(&find(&screen.now), &find(&screen.before));
    let [p50, p99] = [0.5, 0.99].map(|share| latency::quantile(&new, share).map_or_else(|| "-".to_owned(), span));
    let words = vec![
        worker.id.to_string(),
        worker.state.clone(),
        worker.pid.to_string(),
        if worker.cpu < 0 { "any".into() } else { worker.cpu.to_string() },
        format!("{} {}", worker.pipeline, worker.wait),
        duration(worker.heartbeat_age_ms),
        p50,
        p99,
        worker.restarts.to_string(),
        worker.last_exit.clone(),
    ];
    (words, worker.state != "run")
}

const INTERFACES: [Column; 8] = [
    left("INTERFACE", 15),
    left("BACKEND", 16),
    left("LINK", 10),
    right("IN/s", 7),
    right("OUT/s", 7),
    right("PASS/s", 7),
    right("DROP/s", 7),
    rest("WHY"),
];

fn interface_row(screen: &Screen, info: &InterfaceInfo) -> Words {
    let seconds = (screen.now.at - screen.before.at).as_secs_f64().max(0.001);
    let find = |look: &Look| look.stats.interfaces.iter().find(|one| one.name == info.name).cloned().unwrap_or_default();
    let (now, then) = (find(&screen.now), find(&screen.before));
    let since = |after: u64, before: u64| short(after.saturating_sub(before) as f64 / seconds);
    let words = vec![
        info.name.clone(),
        info.backend.clone(),
        info.link.clone(),
        since(now.rx_packets, then.rx_packets),
        since(now.tx_packets, then.tx_packets),
        since(now.passed, then.passed),
        since(total(&now.drops), total(&then.drops)),
        info.reason.clone(),
    ];
    (words, info.link != "up")
}

const RULES: [Column; 9] = [
    left("RULE", 16),
    left("PATH", 7),
    left("JOINED", 6),
    right("IN/s", 7),
    right("OUT/s", 7),
    right("Mbit/s", 7),
    right("DROP/s", 7),
    left("REASON", 16),
    rest("TEXT"),
];

fn draw_rules(frame: &mut Frame<'_>, area: Rect, screen: &Screen) {
    let all = rates(screen);
    let room = usize::from(area.height).saturating_sub(1);
    let first = screen.first.min(all.len().saturating_sub(room));
    let rows = all.into_iter().skip(first).take(room).map(|rule| {
        let is_bad = rule.dropped > 0.0;
        let joined = if rule.joined { "yes" } else { "no" };
        let [taken, sent, megabits, dropped] = [rule.taken, rule.sent, rule.megabits, rule.dropped].map(short);
        (vec![rule.id, rule.path, joined.into(), taken, sent, megabits, dropped, rule.reason, rule.text], is_bad)
    });
    draw_table(frame, area, &RULES, rows);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::message::{FrameStats, InterfaceStats, OutputStats, RuleStats, SupervisorInfo, WorkerLatency};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    /// Two workers, three interfaces and 30 rules, after so many packets of the busiest rule.
    fn look_at(at: Instant, packets: u64) -> Look {
        let ids: Vec<String> = (0..30).map(|n| format!("{}-{n:02}", ["itch", "video", "ptp"][n % 3])).collect();
        Look {
            at,
            status: Status {
                version: "0.1.0".into(),
                supervisor: SupervisorInfo { uptime_ms: 18_420_000, ..SupervisorInfo::default() },
                rules: 30,
                epoch: 4,
                workers: vec![worker(0, "run", ""), worker(1, "boot", "killed by SIGKILL")],
                interfaces: vec![
                    interface("eth0", "af_xdp_zero_copy", "up", "native XDP and zero copy"),
                    interface("eth1", "af_xdp_copy", "up", "native XDP; zero copy refused: EOPNOTSUPP"),
                    interface("bond0.200", "af_packet", "no_carrier", "no XDP on a VLAN interface"),
                ],
            },
            stats: Stats {
                interfaces: vec![counted("eth0", packets * 9, 0), counted("eth1", 0, packets * 8), counted("bond0.200", 0, packets)],
                rules: ids.iter().enumerate().map(|(n, id)| rule_stats(id, n, packets)).collect(),
                frames: FrameStats { total: 32_768, free: 24_576, ..FrameStats::default() },
                latency: vec![WorkerLatency {
                    buckets: vec![(Some(2_304), packets), (Some(40_960), packets / 20), (None, packets / 2_000)],
                    ..WorkerLatency::default()
                }],
            },
            rules: ids.iter().enumerate().map(|(n, id)| info(id, n)).collect(),
        }
    }

    fn worker(id: u32, state: &str, last_exit: &str) -> WorkerInfo {
        WorkerInfo {
            id,
            state: state.into(),
            pid: 47_110 + id,
            cpu: id as i32 + 2,
            pipeline: "fused".into(),
            wait: "adaptive".into(),
            heartbeat_age_ms: 40,
            restarts: u64::from(!last_exit.is_empty()),
            last_exit: last_exit.into(),
            ..WorkerInfo::default()
        }
    }

    fn interface(name: &str, backend: &str, link: &str, reason: &str) -> InterfaceInfo {
        let [name, backend, link, reason] = [name, backend, link, reason].map(str::to_owned);
        InterfaceInfo { name, backend, link, reason, ..InterfaceInfo::default() }
    }

    fn counted(name: &str, rx_packets: u64, tx_packets: u64) -> InterfaceStats {
        InterfaceStats { name: name.into(), rx_packets, tx_packets, passed: rx_packets / 100_000, ..InterfaceStats::default() }
    }

    /// The n-th rule has an n-th of the packets; the one of number 7 loses a tenth of them.
    fn rule_stats(id: &str, n: usize, packets: u64) -> RuleStats {
        let (taken, lost) = (packets / (n as u64 + 1), if n == 7 { packets / 80 } else { 0 });
        let drops = BTreeMap::from([("ttl_expired".to_owned(), lost), ("no_frame".to_owned(), 0)]);
        let (tx_packets, tx_bytes) = (taken - lost, (taken - lost) * 125);
        RuleStats {
            id: id.into(),
            rx_packets: taken,
            outputs: vec![OutputStats { egress: "eth1".into(), to: "keep".into(), tx_packets, tx_bytes, drops, ..OutputStats::default() }],
            ..RuleStats::default()
        }
    }

    fn info(id: &str, n: usize) -> RuleInfo {
        let path = if n.is_multiple_of(4) { "kernel" } else { "xsk" };
        RuleInfo {
            id: id.into(),
            rule: format!("eth0 239.1.1.{n}:5000 -> eth1 239.9.9.{n}:6000 ttl=keep; id={id}"),
            path: path.into(),
            joined: n != 11,
            ..RuleInfo::default()
        }
    }

    fn screen() -> Screen {
        let at = Instant::now();
        let (before, now) = (look_at(at, 0), look_at(at + Duration::from_secs(1), 2_900_000));
        Screen { before, now, sort: Sort::In, filter: String::new(), typing: false, paused: false, first: 0 }
    }

    fn drawn(screen: &Screen, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, screen)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let cells: Vec<&str> = buffer.content().iter().map(ratatui::buffer::Cell::symbol).collect();
        cells.chunks(usize::from(width)).map(|line| line.concat().trim_end().to_owned()).collect()
    }

    /// The screens of the book are what is drawn. RELAY_GOLDEN_WRITE=1 writes them anew after a deliberate change: look at them.
    #[test]
    fn the_screens_of_the_book_are_what_is_drawn() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/top.md");
        let mut text = std::fs::read_to_string(page).unwrap();
        for (width, height) in [(80, 24), (200, 50)] {
            let begin = format!("```text {width}x{height}\n");
            let (before, rest) = text.split_once(&begin).unwrap();
            let (committed, after) = rest.split_once("```\n").unwrap();
            let now = drawn(&screen(), width, height).join("\n") + "\n";
            if std::env::var_os("RELAY_GOLDEN_WRITE").is_some() {
                text = format!("{before}{begin}{now}```\n{after}");
                std::fs::write(page, &text).unwrap();
            } else {
                assert_eq!(committed, now, "docs/top.md, {width}x{height}");
            }
        }
    }

    #[test]
    fn nothing_is_cut_on_80_by_24() {
        let lines = drawn(&screen(), 80, 24);
        let has = |row: usize, words: &[&str]| assert!(words.iter().all(|word| lines[row].contains(word)), "{words:?}: {}", lines[row]);
        has(0, &["relay 0.1.0  up 5 h 7 min  30 rules  epoch 4  frames 75% free"]);
        has(1, &["WORKER", "STATE", "PID", "CPU", "LOOP", "BEAT", "P50", "P99", "RESTARTS"]);
        has(2, &["run", "47110", "fused adaptive", "40 ms", "2.3 µs", "41.0 µs"]);
        has(3, &["boot", "47111", "-", "1"]);
        has(5, &["eth0", "af_xdp_zero_copy", "up", "26.10M"]);
        has(7, &["bond0.200", "no_carrier", "2.90M"]);
        has(8, &["RULE", "PATH", "JOINED", "IN/s", "OUT/s", "Mbit/s", "DROP/s", "REASON"]);
        has(9, &["itch-00", "kernel", "yes", "2.90M", "2900"]);
        has(16, &["video-07", "xsk", "362.5k", "326.2k", "36.2k", "ttl_expired"]);
        has(23, &["q quit  s sort (in)  / filter  p pause  ↑↓ scroll"]);
        // Numbers end where their header ends.
        let end = |row: usize, word: &str| lines[row].find(word).map(|at| lines[row][..at + word.len()].chars().count());
        assert!(end(8, "IN/s") == end(9, "2.90M") && end(8, "DROP/s") == end(16, "36.2k") && end(1, "P99") == end(2, "41.0 µs"));
    }

    #[test]
    fn a_wide_screen_says_why_and_shows_every_rule() {
        let lines = drawn(&screen(), 200, 50);
        let rules: Vec<&String> = lines.iter().filter(|line| line.contains("; id=")).collect();
        assert!(rules.len() == 30 && rules[0].ends_with("eth0 239.1.1.0:5000 -> eth1 239.9.9.0:6000 ttl=keep; id=itch-00"), "{lines:#?}");
        for words in ["killed by SIGKILL", "native XDP; zero copy refused: EOPNOTSUPP", "ttl_expired"] {
            assert!(lines.iter().any(|line| line.contains(words)), "{words}: {lines:#?}");
        }
    }

    #[test]
    fn a_list_without_room_says_how_much_there_is_besides() {
        let mut screen = screen();
        screen.now.status.workers = (0..9).map(|id| worker(id, "run", "")).collect();
        let lines = drawn(&screen, 80, 24);
        assert!(lines[4].starts_with("2      run") && lines[5].trim() == "6 more" && lines[6].starts_with("INTERFACE"), "{lines:#?}");
    }

    #[test]
    fn keys_sort_filter_scroll_and_quit() {
        let mut screen = screen();
        assert!(!pressed(&mut screen, KeyCode::Char('s')) && !pressed(&mut screen, KeyCode::Char('s')));
        assert_eq!(rates(&screen)[0].id, "video-07", "by drops");
        for key in ['/', '2', '9'] {
            assert!(!pressed(&mut screen, KeyCode::Char(key)));
        }
        assert!(!pressed(&mut screen, KeyCode::Enter));
        assert_eq!(rates(&screen).len(), 1);
        assert!(!pressed(&mut screen, KeyCode::PageDown));
        assert!(drawn(&screen, 80, 24).iter().any(|line| line.starts_with("ptp-29")), "scrolling stops at the end");
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
