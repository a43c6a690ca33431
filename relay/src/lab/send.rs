//! `relay send`: a paced generator of numbered, stamped, verifiable datagrams.
//!
//! Every run is bounded, by a count or by a duration. What it reports is what the kernel took, not what was asked for.

use super::error::{LabError, Result};
use super::pace::{Pacer, Step};
use super::progress::Progress;
use super::socket::{self, SendBatch};
use super::{clock, payload};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Datagrams per system call at most.
const BATCH: u32 = 64;
/// Largest UDP payload over IPv4.
const MAX_SIZE: u16 = 65_507;
/// Sleeps shorter than this are spun: a wake-up costs tens of µs.
const SPIN_NS: u64 = 200_000;

/// How the packets leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// Ordinary UDP sockets.
    #[default]
    Sockets,
    /// AF_XDP through xsk-rs (feature `peers`).
    Xsk,
}

/// Arguments of `relay send`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Interface to send from
    #[arg(long, value_name = "IFACE")]
    pub iface: String,
    /// Destination, IPv6 in brackets
    // A replay has its destinations in the file; the value is not used then.
    #[arg(
        long,
        value_name = "ADDR:PORT",
        required = false,
        required_unless_present = "replay",
        default_value_if("replay", clap::builder::ArgPredicate::IsPresent, "0.0.0.0:0")
    )]
    pub to: SocketAddr,
    /// Datagrams a second; 0: as fast as possible
    #[arg(long, default_value_t = 1_000, value_name = "N")]
    pub rate: u64,
    /// Datagrams to send [default: 1000, or until --duration]
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// Bytes of payload; from 24 on every one is verified
    #[arg(long, default_value_t = 64, value_name = "B", value_parser = clap::value_parser!(u16).range(0..=i64::from(MAX_SIZE)))]
    pub size: u16,
    /// TTL or hop limit
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    pub ttl: u8,
    /// DSCP
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=63))]
    pub dscp: u8,
    /// Source address and port [default: the kernel's choice]
    #[arg(long, value_name = "ADDR:PORT")]
    pub source: Option<SocketAddr>,
    /// Seconds to send for at most (`500ms`, `10s`)
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub duration: Option<Duration>,
    /// Sequence of the first datagram
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub first: u64,
    /// How the packets leave
    #[arg(long, value_enum, default_value_t)]
    pub backend: Backend,
    /// CPU to pin the sender to
    #[arg(long, value_name = "CPU")]
    pub cpu: Option<usize>,
}

/// What was sent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// `sockets` or `xsk`.
    pub backend: String,
    /// Datagrams the kernel took.
    pub sent: u64,
    /// Sequence of the first.
    pub first_sequence: u64,
    /// Times the kernel refused for want of buffers and was asked again.
    pub retries: u64,
    /// From the first to after the last.
    pub duration_ms: f64,
    /// What was asked for.
    pub rate: u64,
    /// What was reached.
    pub pps: f64,
    /// Behind the schedule, median.
    pub late_p50_us: f64,
    /// Behind the schedule, 99 %.
    pub late_p99_us: f64,
    /// Behind the schedule, worst.
    pub late_max_us: f64,
}

/// `500ms`, `10s`, `2m`, or plain seconds.
pub fn parse_duration(text: &str) -> std::result::Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| format!("`{text}`: a duration such as 500ms or 10s"))?;
    let seconds = match unit {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "" | "s" => number,
        "m" => number * 60.0,
        _ => return Err(format!("`{unit}`: a unit among us, ms, s, m")),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("`{text}`: out of range"))
}

/// The report in words.
pub fn describe(report: &Report) -> String {
    format!(
        "sent {} in {:.1} ms: {:.0} pps (asked {}), late p50 {:.1} µs, p99 {:.1} µs, max {:.1} µs, {} retries",
        report.sent,
        report.duration_ms,
        report.pps,
        if report.rate == 0 { "all it can".into() } else { report.rate.to_string() },
        report.late_p50_us,
        report.late_p99_us,
        report.late_max_us,
        report.retries
    )
}

/// Sends from the calling thread's namespace.
pub fn send(args: &Args) -> Result<Report> {
    if let Some(cpu) = args.cpu {
        clock::pin_thread(cpu)?;
    }
    match args.backend {
        Backend::Sockets => transmit(args, &mut SocketSink::new(args)?),
        Backend::Xsk => send_xsk(args),
    }
}

#[cfg(feature = "peers")]
fn send_xsk(args: &Args) -> Result<Report> {
    transmit(args, &mut super::xsk::XskSink::new(args)?)
}

#[cfg(not(feature = "peers"))]
fn send_xsk(_args: &Args) -> Result<Report> {
    Err(LabError::Missing { tool: "--backend xsk", remedy: "build with `--features peers`" })
}

/// Where a generator's datagrams go: one implementation for each backend.
pub trait Sink {
    /// Name in the report.
    const NAME: &'static str;
    /// Sends up to `count` datagrams numbered from `sequence`; how many were taken. 0: try again.
    fn push(&mut self, sequence: u64, count: u32) -> Result<u32>;
    /// Waits, bounded, until what was pushed has left.
    fn finish(&mut self) -> Result<()>;
}

/// The schedule, whatever carries the packets.
pub fn transmit<S: Sink>(args: &Args, sink: &mut S) -> Result<Report> {
    let total = args.count.unwrap_or(if args.duration.is_some() { u64::MAX } else { 1_000 });
    let start_ns = clock::monotonic_ns();
    let limit_ns = args.duration.map_or(u64::MAX, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
    let mut pacer = Pacer::new(start_ns, args.rate, total, start_ns.saturating_add(limit_ns), BATCH);
    let mut late = Late::new()?;
    let mut report = Report { backend: S::NAME.into(), first_sequence: args.first, rate: args.rate, ..Report::default() };
    let mut progress = Progress::new("sent", (total < u64::MAX).then_some(total));
    loop {
        let now_ns = clock::monotonic_ns();
        progress.at(now_ns, report.sent);
        match pacer.step(now_ns) {
            Step::Done => break,
            Step::Wait(ns) => pause(ns),
            Step::Send { count, late_ns } => {
                let taken = sink.push(args.first + report.sent, count)?;
                report.retries += u64::from(taken < count);
                report.sent += u64::from(taken);
                pacer.sent(taken);
                late.note(late_ns);
            }
        }
    }
    sink.finish()?;
    report.duration_ms = (clock::monotonic_ns() - start_ns) as f64 / 1e6;
    report.pps = report.sent as f64 / (report.duration_ms / 1e3).max(1e-9);
    [report.late_p50_us, report.late_p99_us, report.late_max_us] = late.figures();
    Ok(report)
}

/// How far behind its schedule a sender was.
pub(super) struct Late(Histogram<u64>);

impl Late {
    pub(super) fn new() -> Result<Self> {
        Histogram::new_with_bounds(1, 60_000_000_000, 3).map(Self).map_err(|e| LabError::Invalid(e.to_string()))
    }

    pub(super) fn note(&mut self, late_ns: u64) {
        self.0.saturating_record(late_ns.max(1));
    }

    /// Median, 99 % and worst, in µs.
    pub(super) fn figures(&self) -> [f64; 3] {
        [self.0.value_at_quantile(0.5), self.0.value_at_quantile(0.99), self.0.max()].map(|ns| ns as f64 / 1e3)
    }
}

/// Returns at this time of the monotonic clock, or as soon after it as may be; how late that was.
pub(super) fn wait_until(due_ns: u64) -> u64 {
    loop {
        let now = clock::monotonic_ns();
        match due_ns.checked_sub(now) {
            None | Some(0) => return now - due_ns,
            Some(ns) => pause(ns),
        }
    }
}

/// Sleeps through long waits and spins through short ones.
fn pause(ns: u64) {
    if ns > SPIN_NS {
        std::thread::sleep(Duration::from_nanos(ns - SPIN_NS / 2));
    } else {
        std::hint::spin_loop();
    }
}

/// Ordinary UDP.
struct SocketSink {
    fd: OwnedFd,
    batch: SendBatch,
}

impl SocketSink {
    fn new(args: &Args) -> Result<Self> {
        let fd = socket::sender(&args.iface, args.to, args.source, args.ttl, args.dscp)?;
        Ok(Self { fd, batch: SendBatch::new(args.to, usize::from(args.size), BATCH as usize) })
    }
}

impl Sink for SocketSink {
    const NAME: &'static str = "sockets";

    fn push(&mut self, sequence: u64, count: u32) -> Result<u32> {
        let now = clock::monotonic_ns();
        for index in 0..count {
            payload::write(self.batch.payload(index as usize), sequence + u64::from(index), now);
        }
        match self.batch.send(self.fd.as_fd(), count as usize) {
            Ok(taken) => Ok(u32::try_from(taken).unwrap_or(count)),
            Err(error) => retry(error),
        }
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// ECONNREFUSED is an ICMP answer to an earlier datagram; the rest of these pass.
fn retry(error: std::io::Error) -> Result<u32> {
    match error.raw_os_error() {
        Some(libc::ENOBUFS | libc::EAGAIN | libc::EINTR | libc::ECONNREFUSED) => Ok(0),
        _ => Err(LabError::io("sendmmsg")(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_or_refused() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1_500)));
        assert_eq!(parse_duration("2"), Ok(Duration::from_secs(2)));
        for bad in ["", "s", "5x", "1e9", "-1s", "99999999999999999999999m"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
