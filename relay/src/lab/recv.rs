//! `relay recv`: a receiver that verifies every datagram of `relay send` and gives a verdict.
//!
//! A run in which its own socket dropped is void: neither passed nor failed (DECISIONS, tests and figures). Arrival times are the
//! kernel's, so that a receiver that was descheduled is not taken for a silent relay.

use super::clock;
use super::error::{LabError, Result};
use super::progress::Progress;
use super::send::{Backend, parse_duration};
use super::socket::{self, RecvBatch};
use super::tally::{Silence, Tally};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Datagrams per system call.
const BATCH: usize = 128;
/// Bytes kept of a datagram: jumbo frames. Not a power of two, so that the buffers do not share their cache sets.
const SIZE: usize = 9_280;
/// How often a waiting receiver looks at its limits.
const TICK_MS: i64 = 20;
/// Different sources, TTLs and TOS values listed at most.
const MAX_LISTED: usize = 16;

/// `[SRC@]GROUP:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// Source of a source-specific join.
    pub source: Option<IpAddr>,
    /// Group or own address, and port.
    pub group: SocketAddr,
}

impl FromStr for Subscription {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (source, group) = match text.split_once('@') {
            Some((source, group)) => (Some(source.trim_matches(['[', ']'])), group),
            None => (None, text),
        };
        let source: Option<IpAddr> = source.map(str::parse).transpose().map_err(|_| format!("`{text}`: the source is no address"))?;
        let group: SocketAddr = group.parse().map_err(|_| format!("`{text}`: expected [SRC@]GROUP:PORT, IPv6 in brackets"))?;
        match source {
            Some(source) if source.is_ipv4() != group.is_ipv4() => Err(format!("`{text}`: source and group of different families")),
            Some(_) if !group.ip().is_multicast() => Err(format!("`{text}`: a source needs a multicast group")),
            _ => Ok(Self { source, group }),
        }
    }
}

/// Arguments of `relay recv`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Interface to receive on
    #[arg(long, value_name = "IFACE")]
    pub iface: String,
    /// What to join (or, for a unicast address, to bind)
    #[arg(long, value_name = "[SRC@]GROUP:PORT")]
    pub group: Subscription,
    /// Datagrams expected; ends when they are there
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// Ends after so long without a datagram
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Duration,
    /// Ends after so long in any case
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub duration: Option<Duration>,
    /// How long to look for duplicates once --count is reached
    #[arg(long, default_value = "100ms", value_name = "DURATION", value_parser = parse_duration)]
    pub linger: Duration,
    /// How the packets come in
    #[arg(long, value_enum, default_value_t)]
    pub backend: Backend,
    /// CPU to pin the receiver to
    #[arg(long, value_name = "CPU")]
    pub cpu: Option<usize>,
}

/// What became of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Everything came, once, in order, whole.
    Pass,
    /// Something did not.
    #[default]
    Fail,
    /// The receiver itself dropped: says nothing about the sender or the relay.
    Void,
}

/// What was received.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Verdict.
    pub verdict: Verdict,
    /// Datagrams of any kind.
    pub received: u64,
    /// Different sequences.
    pub distinct: u64,
    /// Sequences that did not come: of `--count`, or between lowest and highest.
    pub lost: u64,
    /// Runs of sequences missing one after the other, between lowest and highest.
    pub loss_runs: u64,
    /// Sequences of the longest such run.
    pub longest_loss_run: u64,
    /// Sequences that came again.
    pub duplicated: u64,
    /// Sequences that came after a higher one.
    pub reordered: u64,
    /// How many sequences below the highest so far the latest of them was.
    pub reorder_depth: u64,
    /// Damaged payloads.
    pub corrupted: u64,
    /// Too short to be numbered.
    pub unnumbered: u64,
    /// Not from `relay send`.
    pub foreign: u64,
    /// Lowest sequence.
    pub first_sequence: Option<u64>,
    /// Highest sequence.
    pub last_sequence: Option<u64>,
    /// First to last arrival.
    pub duration_ms: f64,
    /// Datagrams a second in between.
    pub pps: f64,
    /// One-way latency, sender's stamp to the kernel's receive stamp.
    pub p50_us: Option<f64>,
    /// The same, 99 %.
    pub p99_us: Option<f64>,
    /// The same, 99.9 %.
    pub p999_us: Option<f64>,
    /// The same, worst.
    pub max_us: Option<f64>,
    /// Longest gap between two arrivals.
    pub longest_silence_us: u64,
    /// Gaps over 1 ms.
    pub silences: Vec<Silence>,
    /// Dropped by the kernel at our socket for want of buffer.
    pub socket_drops: u64,
    /// Dropped by the kernel before the socket, anywhere on the machine, meanwhile.
    pub softnet_drops: u64,
    /// Senders seen (16 at most).
    pub sources: BTreeSet<String>,
    /// TTLs seen (16 at most).
    pub ttls: BTreeSet<u8>,
    /// DSCPs seen (16 at most).
    pub dscps: BTreeSet<u8>,
}

impl Report {
    /// Closes the account.
    pub fn new(tally: &Tally, expected: Option<u64>, socket_drops: u64, softnet_drops: u64) -> Self {
        let runs = tally.loss_runs();
        let mut report = Self {
            received: tally.received,
            distinct: tally.distinct,
            lost: tally.lost(expected),
            loss_runs: runs.count,
            longest_loss_run: runs.longest,
            duplicated: tally.duplicated,
            reordered: tally.reordered,
            reorder_depth: tally.reorder_depth,
            corrupted: tally.corrupted,
            unnumbered: tally.unnumbered,
            foreign: tally.foreign,
            first_sequence: tally.lowest(),
            last_sequence: tally.highest(),
            duration_ms: tally.duration_ns() as f64 / 1e6,
            pps: tally.received.saturating_sub(1) as f64 * 1e9 / tally.duration_ns().max(1) as f64,
            p50_us: tally.latency_us(0.5),
            p99_us: tally.latency_us(0.99),
            p999_us: tally.latency_us(0.999),
            max_us: tally.latency_us(1.0),
            longest_silence_us: tally.longest_silence_us(),
            silences: tally.silences.clone(),
            socket_drops,
            softnet_drops,
            ..Self::default()
        };
        report.verdict = report.judge(expected);
        report
    }

    fn judge(&self, expected: Option<u64>) -> Verdict {
        let numbered = self.lost + self.duplicated + self.reordered == 0;
        let whole = self.corrupted + self.foreign == 0;
        let complete = expected.map_or(self.received > 0, |n| self.distinct + self.unnumbered >= n);
        // Drops elsewhere on the machine cannot have hurt a stream that is whole.
        match (self.socket_drops > 0, numbered && whole && complete) {
            (true, _) => Verdict::Void,
            (false, true) => Verdict::Pass,
            (false, false) if self.softnet_drops > 0 && self.lost > 0 => Verdict::Void,
            (false, false) => Verdict::Fail,
        }
    }
}

/// Receives in the calling thread's namespace.
pub fn receive(args: &Args) -> Result<Report> {
    match args.backend {
        Backend::Sockets => {
            let receiver = Receiver::open(args)?;
            eprintln!("listening on {}", args.iface);
            receiver.run(&AtomicBool::new(false))
        }
        Backend::Xsk => receive_xsk(args),
    }
}

#[cfg(feature = "peers")]
fn receive_xsk(args: &Args) -> Result<Report> {
    super::xsk::receive(args)
}

#[cfg(not(feature = "peers"))]
fn receive_xsk(_args: &Args) -> Result<Report> {
    Err(LabError::Missing { tool: "--backend xsk", remedy: "build with `--features peers`" })
}

/// The report in words.
pub fn describe(r: &Report) -> String {
    let us = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.1} µs"));
    format!(
        "{:?}: received {}, lost {}{}, duplicated {}, reordered {}{}, corrupted {}, foreign {}, dropped at the socket {}\n\
         {:.0} pps over {:.1} ms; latency p50 {}, p99 {}, p99.9 {}, max {}; longest silence {} µs ({} over 1 ms)",
        r.verdict,
        r.received,
        r.lost,
        if r.loss_runs == 0 { String::new() } else { format!(" (gaps {}, longest {})", r.loss_runs, r.longest_loss_run) },
        r.duplicated,
        r.reordered,
        if r.reordered == 0 { String::new() } else { format!(" (by {} at most)", r.reorder_depth) },
        r.corrupted,
        r.foreign,
        r.socket_drops,
        r.pps,
        r.duration_ms,
        us(r.p50_us),
        us(r.p99_us),
        us(r.p999_us),
        us(r.max_us),
        r.longest_silence_us,
        r.silences.len()
    )
}

/// When a receiver ends. Shared by both backends.
#[derive(Debug)]
pub struct Limits {
    begin: Instant,
    last: Instant,
    complete_at: Option<Instant>,
}

impl Limits {
    /// Starts now.
    pub fn new() -> Self {
        let now = Instant::now();
        Self { begin: now, last: now, complete_at: None }
    }

    /// Takes note of progress (`news`: something came in) and says whether to go on.
    pub fn go_on(&mut self, args: &Args, tally: &Tally, news: bool) -> bool {
        let now = Instant::now();
        if news {
            self.last = now;
        }
        if args.count.is_some_and(|n| tally.distinct + tally.unnumbered >= n) {
            self.complete_at.get_or_insert(now);
        }
        let lingered = self.complete_at.is_some_and(|at| now - at >= args.linger);
        let idle = now - self.last >= args.timeout;
        let over = args.duration.is_some_and(|limit| now - self.begin >= limit);
        !(lingered || idle || over)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::new()
    }
}

/// A joined socket: packets sent after `open` returned are not missed for want of a join.
#[derive(Debug)]
pub struct Receiver {
    args: Args,
    fd: OwnedFd,
}

impl Receiver {
    /// Joins or binds in the calling thread's namespace.
    pub fn open(args: &Args) -> Result<Self> {
        let fd = socket::receiver(&args.iface, args.group.source, args.group.group)?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(TICK_MS)).map_err(LabError::io("SO_RCVTIMEO"))?;
        Ok(Self { args: args.clone(), fd })
    }

    /// Receives until a limit is reached or `stop` is set, then gives the verdict.
    pub fn run(self, stop: &AtomicBool) -> Result<Report> {
        if let Some(cpu) = self.args.cpu {
            clock::pin_thread(cpu)?;
        }
        let mut tally = Tally::new().map_err(|e| LabError::Invalid(e.to_string()))?;
        let mut batch = RecvBatch::new(SIZE, BATCH);
        let mut company = Company::default();
        let mut limits = Limits::new();
        let softnet = clock::softnet_drops();
        let mut progress = Progress::new("received", self.args.count);
        loop {
            let received = self.receive(&mut batch)?;
            take(&batch, &mut tally, &mut company);
            progress.at(clock::monotonic_ns(), tally.received);
            let go_on = limits.go_on(&self.args, &tally, received > 0);
            if !go_on || (received == 0 && stop.load(Ordering::Relaxed)) {
                break;
            }
        }
        let drops = u64::from(socket::drops(self.fd.as_fd()));
        Ok(company.into_report(Report::new(&tally, self.args.count, drops, clock::softnet_drops() - softnet)))
    }

    fn receive(&self, batch: &mut RecvBatch) -> Result<usize> {
        match batch.receive(self.fd.as_fd()) {
            Ok(received) => Ok(received),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::TimedOut) => Ok(0),
            Err(error) => Err(LabError::io("recvmmsg")(error)),
        }
    }
}

/// Everything of one batch into the account.
fn take(batch: &RecvBatch, tally: &mut Tally, company: &mut Company) {
    let (now, real) = (clock::monotonic_ns(), clock::realtime_ns());
    for (index, (bytes, meta)) in batch.datagrams().enumerate() {
        // The kernel stamps in CLOCK_REALTIME: its age then is its age now in any clock.
        let age = meta.stamp_ns.map_or(0, |stamp| real.saturating_sub(stamp));
        tally.record(bytes, now.saturating_sub(age));
        company.note(batch, index, meta);
    }
}

/// Headers seen, as sets; looks closely only when something changed, since this runs for every datagram.
#[derive(Debug, Default)]
struct Company {
    last: Option<(Option<SocketAddr>, Option<u8>, Option<u8>)>,
    sources: BTreeSet<String>,
    ttls: BTreeSet<u8>,
    dscps: BTreeSet<u8>,
}

impl Company {
    fn note(&mut self, batch: &RecvBatch, index: usize, meta: socket::Meta) {
        let now = (batch.source(index), meta.ttl, meta.tos);
        if self.last == Some(now) {
            return;
        }
        self.last = Some(now);
        if let Some(source) = now.0.filter(|_| self.sources.len() < MAX_LISTED) {
            self.sources.insert(source.to_string());
        }
        self.ttls.extend(meta.ttl.filter(|_| self.ttls.len() < MAX_LISTED));
        self.dscps.extend(meta.tos.filter(|_| self.dscps.len() < MAX_LISTED).map(|tos| tos >> 2));
    }

    fn into_report(self, report: Report) -> Report {
        Report { sources: self.sources, ttls: self.ttls, dscps: self.dscps, ..report }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::payload;

    #[test]
    fn subscriptions_are_read_or_refused() {
        let s: Subscription = "10.0.0.1@232.1.1.1:5000".parse().unwrap();
        assert_eq!((s.source, s.group), (Some("10.0.0.1".parse().unwrap()), "232.1.1.1:5000".parse().unwrap()));
        assert!("[2001:db8::1]@[ff3e::1]:5000".parse::<Subscription>().is_ok());
        for bad in ["239.1.1.1", "::1@239.1.1.1:5", "10.0.0.1@10.0.0.2:5", "x@239.1.1.1:5", "@239.1.1.1:5"] {
            assert!(bad.parse::<Subscription>().is_err(), "{bad}");
        }
    }

    fn tally(sequences: &[u64]) -> Tally {
        let mut tally = Tally::new().unwrap();
        for sequence in sequences {
            let mut buf = [0; 40];
            payload::write(&mut buf, *sequence, 1);
            tally.record(&buf, 2);
        }
        tally
    }

    #[test]
    fn the_words_tell_gaps_and_depth_only_where_there_are_some() {
        let words = describe(&Report::new(&tally(&[0, 3, 2, 9]), None, 0, 0));
        assert!(words.contains("lost 6 (gaps 2, longest 5), duplicated 0, reordered 1 (by 1 at most), corrupted 0"), "{words}");
        let words = describe(&Report::new(&tally(&[0, 1, 2]), None, 0, 0));
        assert!(words.contains("lost 0, duplicated 0, reordered 0, corrupted 0"), "{words}");
    }

    #[test]
    fn the_verdict_is_void_fail_or_pass() {
        assert_eq!(Report::new(&tally(&[0, 1, 2]), Some(3), 0, 0).verdict, Verdict::Pass);
        assert_eq!(Report::new(&tally(&[0, 1, 2]), None, 0, 0).verdict, Verdict::Pass);
        assert_eq!(Report::new(&tally(&[0, 1, 2]), Some(4), 0, 0).verdict, Verdict::Fail);
        assert_eq!(Report::new(&tally(&[0, 1, 1]), Some(2), 0, 0).verdict, Verdict::Fail);
        assert_eq!(Report::new(&tally(&[1, 0]), Some(2), 0, 0).verdict, Verdict::Fail);
        assert_eq!(Report::new(&tally(&[]), None, 0, 0).verdict, Verdict::Fail);
        assert_eq!(Report::new(&tally(&[0, 1, 2]), Some(4), 0, 5).verdict, Verdict::Void);
        assert_eq!(Report::new(&tally(&[0, 1, 2]), Some(3), 0, 5).verdict, Verdict::Pass);
        assert_eq!(Report::new(&tally(&[0, 1, 2]), Some(3), 1, 0).verdict, Verdict::Void);
    }
}
