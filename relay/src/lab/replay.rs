//! `relay send --replay FILE`: the frames of a capture, as they are, at the times they were captured.
//!
//! The whole file is read and judged before the first frame is sent. Frames go out of a packet socket with the addresses they
//! have; only a UDP checksum that a local sender had left unfinished is finished. Every run is bounded by its file and `--loop`.

use super::capture_file::{self, Frame};
use super::error::{LabError, Result};
use super::progress::Progress;
use super::send::{self, Late};
use super::{clock, socket};
use crate::nic::afpacket::socket::open_send;
use crate::wire::checksum::{Sum, fold, pseudo_header, udp_sent};
use crate::wire::parse::{ETHERNET_LEN, TAG_LEN, parse};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send as send_frame};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Larger captures are cut by their owner, not by our memory.
const MAX_FILE: u64 = 1 << 30;
/// How long a full device is left alone, and how often.
const RETRY: Duration = Duration::from_micros(50);
const MAX_RETRIES: u64 = 100_000;
/// Bytes of a UDP header up to its checksum, and of the checksum.
const CHECKSUM_AT: usize = 6;

/// What `relay send` takes for a replay.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Replay")]
#[group(id = "replaying")]
pub struct Args {
    /// Send the frames of a capture (pcap or pcapng, Ethernet) as they are, at the times they were captured
    #[arg(long, value_name = "FILE", conflicts_with_all = ["to", "rate", "size", "ttl", "dscp", "source", "first", "backend"])]
    pub replay: Option<PathBuf>,
    /// Times as fast as captured; 0: as fast as possible
    #[arg(long, default_value_t = 1.0, value_name = "X", requires = "replay", value_parser = parse_speed)]
    pub speed: f64,
    /// How often the capture is sent
    #[arg(long = "loop", default_value_t = 1, value_name = "N", requires = "replay", value_parser = clap::value_parser!(u64).range(1..))]
    pub passes: u64,
}

/// What was sent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The capture.
    pub file: PathBuf,
    /// Frames in it.
    pub frames: u64,
    /// From its first frame to its last.
    pub captured_ms: f64,
    /// UDP checksums that were finished.
    pub completed: u64,
    /// Frames the kernel took.
    pub sent: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Times the kernel refused for want of buffers and was asked again.
    pub retries: u64,
    /// From the first to after the last.
    pub duration_ms: f64,
    /// Frames a second.
    pub pps: f64,
    /// Behind the schedule, median.
    pub late_p50_us: f64,
    /// Behind the schedule, 99 %.
    pub late_p99_us: f64,
    /// Behind the schedule, worst.
    pub late_max_us: f64,
}

fn parse_speed(text: &str) -> std::result::Result<f64, String> {
    let speed: f64 = text.parse().map_err(|_| format!("`{text}`: a factor such as 0.5, 1 or 10"))?;
    if speed == 0.0 || (1e-6..=1e6).contains(&speed) { Ok(speed) } else { Err(format!("`{text}`: 0, or from 0.000001 to 1000000")) }
}

/// The report in words.
pub fn describe(report: &Report) -> String {
    let finished = if report.completed == 0 { String::new() } else { format!(" ({} UDP checksums finished)", report.completed) };
    format!(
        "sent {} frames, {} bytes in {:.1} ms{finished}: {:.0} a second; {} in {:.1} ms as captured; \
         late p50 {:.1} µs, p99 {:.1} µs, max {:.1} µs, {} retries",
        report.sent,
        report.bytes,
        report.duration_ms,
        report.pps,
        report.frames,
        report.captured_ms,
        report.late_p50_us,
        report.late_p99_us,
        report.late_max_us,
        report.retries
    )
}

/// Replays from the calling thread's namespace, out of `args.iface`; `--count` and `--duration` end it early.
pub fn replay(args: &send::Args, replay: &Args, file: &Path) -> Result<Report> {
    if let Some(cpu) = args.cpu {
        clock::pin_thread(cpu)?;
    }
    let mut frames = load(file)?;
    let mtu = socket::mtu(&args.iface)?;
    fit(&frames, mtu, &args.iface).map_err(|error| about(file, &error))?;
    let completed = frames.iter_mut().map(|frame| u64::from(complete(&mut frame.bytes))).sum();
    let schedule = Schedule::new(&frames, replay.speed);
    let socket = open_send(socket::ifindex(&args.iface)?).map_err(|error| LabError::Invalid(format!("{}: {error}", args.iface)))?;
    let captured_ms = schedule.offsets.last().map_or(0.0, |last| *last as f64 / 1e6);
    let report = Report { file: file.into(), frames: frames.len() as u64, captured_ms, completed, ..Report::default() };
    play(&frames, &schedule, (args, replay), &socket, report)
}

fn about(file: &Path, error: &str) -> LabError {
    LabError::Invalid(format!("--replay {}: {error}", file.display()))
}

fn load(file: &Path) -> Result<Vec<Frame>> {
    let len = std::fs::metadata(file).map_err(|error| about(file, &error.to_string()))?.len();
    if len > MAX_FILE {
        return Err(about(file, "it is larger than 1 GiB: cut it, for example with editcap -c"));
    }
    let bytes = std::fs::read(file).map_err(|error| about(file, &error.to_string()))?;
    capture_file::read(&bytes).map_err(|error| about(file, &error))
}

/// The kernel takes the MTU behind the Ethernet header, and a tag more if there is one.
fn fit(frames: &[Frame], mtu: u32, iface: &str) -> std::result::Result<(), String> {
    let room = |frame: &Frame| {
        let tag = if matches!(frame.bytes.get(12..14), Some([0x81, 0x00] | [0x88, 0xa8])) { TAG_LEN } else { 0 };
        mtu as usize + ETHERNET_LEN + tag
    };
    let large = frames.iter().enumerate().find(|(_, frame)| frame.bytes.len() > room(frame));
    large.map_or(Ok(()), |(index, frame)| {
        let len = frame.bytes.len();
        Err(format!(
            "packet {} of {len} bytes does not fit the MTU of {iface} ({mtu}); ip link set {iface} mtu {}",
            index + 1,
            len - ETHERNET_LEN
        ))
    })
}

/// A capture on a host's own sending side has checksums that the card was to finish: the folded sum of the pseudo header.
fn complete(frame: &mut [u8]) -> bool {
    let Ok(headers) = parse(frame, frame.len()) else { return false };
    let pseudo = pseudo_header(&headers.src, &headers.dst, headers.udp_len);
    let begin = usize::from(headers.l4_offset);
    let Some(datagram) = frame.get_mut(begin..begin + usize::from(headers.udp_len)) else { return false };
    if headers.udp_checksum == 0 || headers.udp_checksum != fold(pseudo) {
        return false;
    }
    let mut sum = Sum::starting_with(pseudo);
    if let Some(place) = datagram.get_mut(CHECKSUM_AT..CHECKSUM_AT + 2) {
        place.copy_from_slice(&[0, 0]);
    }
    sum.add(datagram);
    if let Some(place) = datagram.get_mut(CHECKSUM_AT..CHECKSUM_AT + 2) {
        place.copy_from_slice(&udp_sent(!sum.folded()).to_be_bytes());
    }
    true
}

/// When each frame is due. Pure.
struct Schedule {
    /// Since the first frame; a frame captured before its predecessor goes right behind it.
    offsets: Vec<u64>,
    /// From one pass to the next: the length of the capture and a gap as long as its mean.
    period: u64,
    speed: f64,
}

impl Schedule {
    fn new(frames: &[Frame], speed: f64) -> Self {
        let first = frames.first().map(|frame| frame.at).unwrap_or_default();
        let mut latest = 0;
        let offset = |frame: &Frame| {
            latest = u64::try_from(frame.at.saturating_sub(first).as_nanos()).unwrap_or(u64::MAX).max(latest);
            latest
        };
        let offsets: Vec<u64> = frames.iter().map(offset).collect();
        let gap = latest / (offsets.len() as u64).saturating_sub(1).max(1);
        Self { offsets, period: latest.saturating_add(gap), speed }
    }

    fn due_ns(&self, pass: u64, index: usize) -> u64 {
        if self.speed == 0.0 {
            return 0;
        }
        let offset = self.offsets.get(index).copied().unwrap_or(0);
        ((self.period as f64 * pass as f64 + offset as f64) / self.speed) as u64
    }
}

fn play(
    frames: &[Frame],
    schedule: &Schedule,
    (args, replay): (&send::Args, &Args),
    socket: &OwnedFd,
    mut report: Report,
) -> Result<Report> {
    let start_ns = clock::monotonic_ns();
    let limit_ns = args.duration.map_or(u64::MAX, |limit| u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX));
    let (count, mut late) = (args.count.unwrap_or(u64::MAX), Late::new()?);
    let all = (0..replay.passes).flat_map(|pass| (0..frames.len()).map(move |index| (pass, index)));
    let mut progress = Progress::new("sent", Some(count.min(replay.passes.saturating_mul(frames.len() as u64))));
    for (pass, index) in all {
        let (due_ns, now_ns) = (schedule.due_ns(pass, index), clock::monotonic_ns());
        if report.sent >= count || due_ns >= limit_ns || now_ns - start_ns >= limit_ns {
            break;
        }
        progress.at(now_ns, report.sent);
        let late_ns = send::wait_until(start_ns.saturating_add(due_ns));
        let bytes = frames.get(index).map(|frame| frame.bytes.as_slice()).unwrap_or_default();
        report.retries += push(socket, bytes, &args.iface)?;
        (report.sent, report.bytes) = (report.sent + 1, report.bytes + bytes.len() as u64);
        if schedule.speed > 0.0 {
            late.note(late_ns);
        }
    }
    report.duration_ms = (clock::monotonic_ns() - start_ns) as f64 / 1e6;
    report.pps = report.sent as f64 / (report.duration_ms / 1e3).max(1e-9);
    [report.late_p50_us, report.late_p99_us, report.late_max_us] = late.figures();
    Ok(report)
}

/// Hands the kernel one frame; how often its buffers were full before it took it.
fn push(socket: &OwnedFd, bytes: &[u8], iface: &str) -> Result<u64> {
    for refused in 0..MAX_RETRIES {
        match send_frame(socket.as_raw_fd(), bytes, MsgFlags::empty()) {
            Ok(_) => return Ok(refused),
            Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR) => std::thread::sleep(RETRY),
            Err(errno) => return Err(LabError::io(format!("sending out of {iface}"))(errno)),
        }
    }
    Err(LabError::Timeout { what: format!("{iface} took no packet"), ms: (RETRY * MAX_RETRIES as u32).as_millis(), detail: String::new() })
}

#[cfg(test)]
mod tests {
    use super::super::packet::Flow;
    use super::*;

    fn frame(at_us: u64, len: usize) -> Frame {
        Frame { at: Duration::from_micros(1_000_000 + at_us), bytes: vec![0; len] }
    }

    #[test]
    fn the_schedule_scales_repeats_and_never_goes_back() {
        let frames = [frame(0, 60), frame(100, 60), frame(50, 60), frame(200, 60)];
        let plain = Schedule::new(&frames, 1.0);
        assert_eq!((0..4).map(|index| plain.due_ns(0, index)).collect::<Vec<_>>(), [0, 100_000, 100_000, 200_000]);
        assert_eq!(plain.due_ns(1, 0), 266_666, "a mean gap between two passes");
        assert_eq!(Schedule::new(&frames, 2.0).due_ns(0, 3), 100_000);
        assert_eq!(Schedule::new(&frames, 0.0).due_ns(7, 3), 0);
        assert_eq!(Schedule::new(&frames[..1], 1.0).due_ns(3, 0), 0, "one frame has no gap");
    }

    #[test]
    fn an_unfinished_checksum_is_finished_and_no_other_touched() {
        for (source, destination) in [("10.0.0.1:4000", "239.1.1.1:5000"), ("[fd00::1]:4000", "[ff3e::1]:5000")] {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            let flow =
                Flow { source_mac: [2, 0, 0, 0, 0, 1], destination_mac: [1, 0, 0x5e, 1, 1, 1], source, destination, ttl: 9, dscp: 0 };
            let whole = flow.frame(b"some payload of odd len");
            let headers = parse(&whole, whole.len()).unwrap();
            let at = usize::from(headers.l4_offset) + CHECKSUM_AT;
            let mut bytes = whole.clone();
            assert!(!complete(&mut bytes) && bytes == whole);
            bytes[at..at + 2].copy_from_slice(&fold(pseudo_header(&headers.src, &headers.dst, headers.udp_len)).to_be_bytes());
            assert!(complete(&mut bytes) && bytes == whole, "{destination}");
            bytes[at] ^= 1;
            let wrong = bytes.clone();
            assert!(!complete(&mut bytes) && bytes == wrong, "a wrong one is part of what was captured");
        }
        assert!(!complete(&mut [0; 30]));
    }

    #[test]
    fn a_frame_beyond_the_mtu_is_named() {
        assert!(fit(&[frame(0, 1_514)], 1_500, "eth0").is_ok());
        let mut tagged = frame(0, 1_518);
        assert_eq!(
            fit(&[frame(0, 60), tagged.clone()], 1_500, "eth0").unwrap_err().split(';').next(),
            Some("packet 2 of 1518 bytes does not fit the MTU of eth0 (1500)")
        );
        tagged.bytes[12] = 0x81;
        assert!(fit(&[tagged], 1_500, "eth0").is_ok());
    }

    #[test]
    fn speeds_are_read_or_refused() {
        assert_eq!((parse_speed("0"), parse_speed("2.5")), (Ok(0.0), Ok(2.5)));
        for bad in ["", "x", "-1", "nan", "inf", "1e9"] {
            assert!(parse_speed(bad).is_err(), "{bad}");
        }
    }
}
