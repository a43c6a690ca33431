//! The flat-out generator and the counting sink: faster than any relay here, one instance each per laboratory.
//!
//! Every call is bounded in packets. Each stalls for 20 ms at its end, so a paced load is one call, in which the program
//! itself looks at the clock: it costs the sending CPU a third of what paced AF_XDP sends do. Numbered datagrams for an
//! ordinary receiver are the work of `relay send`.

use super::error::{LabError, Result};
use super::packet::{Flow, group_mac};
use super::receivers::Receivers;
use super::topology::Lab;
use super::xdp::{LIVE_BATCH, LabProgram, Marks};
use super::{clock, payload, socket};
use relay_common::lab::Pace;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Packets of the call that finds out how fast the path takes them.
const PROBE: u32 = 300_000;
/// Tries at a window that the generator covers.
const ATTEMPTS: u32 = 3;
/// Before the window: rings fill, clocks rise.
const WARM_UP: Duration = Duration::from_millis(200);
/// What a call costs beside its packets (LIMITS).
const STALL: Duration = Duration::from_millis(20);
/// Packets of one call at most, whatever was asked for: 40 s at 5 Mpps.
const MAX_REPEAT: f64 = 200e6;
/// Frames that wait at a veth's other end at most (drivers/net/veth.c).
const VETH_RING: u32 = 256;
/// Ethernet, IPv4, UDP.
const IPV4_HEADERS: u64 = 42;
/// Source of generated packets, `s0`.
const SOURCE: &str = "10.0.0.1:40000";

/// Packets from `s0` to one group, as fast as one core can.
#[derive(Debug)]
pub struct Generator {
    program: LabProgram,
    flow: Flow,
    frame: Vec<u8>,
    ifindex: u32,
    /// Packets sent at a time.
    batch: u32,
}

/// Where the sequence number of a stamped datagram stands in its frame (`payload`'s places, big-endian).
pub const SEQUENCE_AT: u32 = IPV4_HEADERS as u32 + payload::MAGIC.len() as u32;
/// See [`SEQUENCE_AT`].
pub const STAMP_AT: u32 = IPV4_HEADERS as u32 + payload::NUMBERED_LEN as u32;
const CHECKSUM_AT: u32 = IPV4_HEADERS as u32 - 2;

/// What passed in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Window {
    /// Packets the generator sent.
    pub offered: u64,
    /// Packets the sink counted.
    pub delivered: u64,
    /// Length, s.
    pub seconds: f64,
    /// Packets that did not fit the queue between `r1` and the sink.
    pub sink_drops: u64,
    /// The generator was still sending when the window closed; if not, the figures are too low.
    pub covered: bool,
}

impl Window {
    /// Offered rate.
    pub fn offered_pps(&self) -> f64 {
        self.offered as f64 / self.seconds.max(1e-9)
    }

    /// Delivered rate.
    pub fn delivered_pps(&self) -> f64 {
        self.delivered as f64 / self.seconds.max(1e-9)
    }
}

impl Generator {
    /// Datagrams of `size` bytes to `to`, TTL 16.
    pub fn new(lab: &Lab, to: SocketAddr, size: usize) -> Result<Self> {
        let destination_mac = group_mac(to.ip()).ok_or_else(|| LabError::Invalid(format!("{to} is no group")))?;
        let source = SOURCE.parse().map_err(|_| LabError::Invalid(SOURCE.into()))?;
        let flow = Flow { source_mac: [2, 0, 0, 0, 0, 1], destination_mac, source, destination: to, ttl: 16, dscp: 0 };
        let ifindex = lab.src.run(|| socket::ifindex("s0"))??;
        let mut generator = Self { program: LabProgram::load()?, flow, frame: Vec::new(), ifindex, batch: LIVE_BATCH };
        generator.set_payload(size)?;
        Ok(generator)
    }

    /// From now on datagrams of `size` bytes.
    pub fn set_payload(&mut self, size: usize) -> Result<()> {
        self.set(size, Marks::default())
    }

    fn set(&mut self, size: usize, marks: Marks) -> Result<()> {
        let mut bytes = vec![0; size];
        payload::write(&mut bytes, 0, 0);
        self.frame = self.flow.frame(&bytes);
        self.program.set_template(&self.frame, marks)
    }

    /// The same, of so many flows by turns: they differ in the source port, or (`VARY_GROUP`) in the group.
    pub fn set_flows(&mut self, size: usize, flows: u32, vary: u32) -> Result<()> {
        if flows < 2 {
            return self.set_payload(size);
        }
        self.set(size, Marks { checksum_offset: CHECKSUM_AT, flows, vary, ..Marks::default() })
    }

    /// From now on datagrams of `size` bytes that have a sequence number and the time (CLOCK_REALTIME) when each was made, sent one
    /// by one.
    pub fn set_stamped(&mut self, size: usize) -> Result<()> {
        self.batch = 1;
        self.set(size, Marks { sequence_offset: SEQUENCE_AT, stamp_offset: STAMP_AT, checksum_offset: CHECKSUM_AT, ..Marks::default() })
    }

    /// From now on packets are sent so many at a time that each may go out of `r1` `fanout` times: what the receive work sends on
    /// is taken at the other end when that work ends, and a veth has room for 256 frames.
    pub fn set_fanout(&mut self, fanout: u16) {
        self.batch = (VETH_RING / 2 / u32::from(fanout.max(1))).clamp(1, LIVE_BATCH);
    }

    /// Sends `count` packets from `cpu`; how long it took.
    pub fn send(&mut self, lab: &Lab, cpu: usize, count: u32) -> Result<Duration> {
        let Self { program, frame, ifindex, batch, .. } = self;
        lab.src.run(|| {
            clock::pin_thread(cpu)?;
            let begin = Instant::now();
            program.generate(frame, *ifindex, count, *batch)?;
            Ok(begin.elapsed())
        })?
    }

    /// Sends flat out for a little longer than `length` and looks at `sink` from outside. One call covers the window, so that
    /// no stall falls into it; where the path turned out faster than the probe said, it is done again with more packets.
    pub fn window(&mut self, lab: &Lab, cpu: usize, sink: &Sink<'_>, length: Duration) -> Result<Window> {
        let probe = self.send(lab, cpu, PROBE)?.saturating_sub(STALL);
        let mut rate = f64::from(PROBE) / probe.as_secs_f64().max(1e-3);
        let mut window = Window::default();
        for _ in 0..ATTEMPTS {
            window = self.window_once(lab, cpu, sink, length, rate)?;
            if window.covered {
                break;
            }
            rate = rate.max(window.offered_pps()) * 1.5;
        }
        Ok(window)
    }

    /// As [`Generator::send`], in a thread of its own: the caller keeps its CPUs.
    fn send_aside(&mut self, lab: &Lab, cpu: usize, count: u32) -> Result<Duration> {
        let sent = std::thread::scope(|scope| scope.spawn(|| self.send(lab, cpu, count)).join());
        sent.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Sends `rate` packets a second for `length` from `cpu`; returns how many were sent.
    pub fn paced(&mut self, lab: &Lab, cpu: usize, rate: u64, length: Duration) -> Result<u64> {
        let interval_ns = 1_000_000_000 / rate.clamp(1, 1_000_000_000);
        self.program.set_pace(Pace { interval_ns, ..Pace::default() })?;
        // How fast the program runs when nothing is due; sending makes it slower, so the call covers the length.
        let idle = self.send_aside(lab, cpu, PROBE)?.saturating_sub(STALL);
        let repeat = f64::from(PROBE) / idle.as_secs_f64().max(1e-3) * (length + WARM_UP).as_secs_f64();
        let now = clock::monotonic_ns();
        let clock_ns = clock::realtime_ns().wrapping_sub(clock::monotonic_ns());
        self.program.set_pace(Pace { interval_ns, next_ns: now, until_ns: now + length.as_nanos() as u64, clock_ns })?;
        let before = self.program.count()?;
        self.send_aside(lab, cpu, repeat.min(f64::from(u32::MAX / 2)) as u32)?;
        let sent = self.program.count()? - before;
        self.program.set_pace(Pace::default())?;
        Ok(sent)
    }

    fn window_once(&mut self, lab: &Lab, cpu: usize, sink: &Sink<'_>, length: Duration, rate: f64) -> Result<Window> {
        let repeat = (rate * (length + WARM_UP * 2).as_secs_f64()).min(MAX_REPEAT) as u32;
        let (before, drops) = (self.program.count()?, sink.drops(lab)?);
        let (seconds, delivered, duration) = std::thread::scope(|scope| {
            let sending = scope.spawn(|| self.send(lab, cpu, repeat));
            let seen = observe(sink, length);
            let duration = sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            seen.and_then(|(seconds, delivered)| Ok((seconds, delivered, duration?)))
        })?;
        // The generator's own pace is even over the call, its stall set apart.
        let sent = self.program.count()? - before;
        let pace = sent as f64 / duration.saturating_sub(STALL).as_secs_f64().max(1e-9);
        let covered = duration.as_secs_f64() >= WARM_UP.as_secs_f64() + seconds;
        let sink_drops = sink.drops(lab)? - drops;
        Ok(Window { offered: (pace * seconds) as u64, delivered, seconds, sink_drops, covered })
    }
}

/// Packets dropped between `r1` and its peer so far (transmit drops of `r1`).
pub fn sink_drops(lab: &Lab) -> Result<u64> {
    device_counter(&lab.relay, "r1", 11)
}

/// Packets that an interface has received so far: what its driver took from the wire, whatever became of it.
pub fn received(namespace: &super::Namespace, iface: &str) -> Result<u64> {
    device_counter(namespace, iface, 1)
}

/// Warms up, then counts for `length`.
fn observe(sink: &Sink<'_>, length: Duration) -> Result<(f64, u64)> {
    std::thread::sleep(WARM_UP);
    let (begin, before) = (Instant::now(), sink.count()?);
    std::thread::sleep(length);
    let (after, seconds) = (sink.count()?, begin.elapsed().as_secs_f64());
    Ok((seconds, after - before))
}

/// What counts the packets that arrive.
#[derive(Debug)]
pub enum Sink<'a> {
    /// A counting, dropping program: the cheapest end of packets that come as XDP frames (it copies every skb).
    Program(LabProgram),
    /// The interface's own counters, without NAPI; nobody has joined the group, so the stack drops at once. The cheapest end
    /// of packets that come as skbs. A super-frame is one skb with one header: IPv4 datagrams of this payload are counted by
    /// what bytes are left without headers.
    Interface(&'a super::Namespace, String, u64),
    /// Ordinary sockets, and bytes of payload: what a host makes of it. Unlike the others it may well be the bottleneck.
    Sockets(Receivers, u64),
}

impl<'a> Sink<'a> {
    /// Counts XDP frames on `kN`.
    pub fn at_link(lab: &Lab, link: u32) -> Result<Self> {
        counting(lab.sink(link), &format!("k{link}")).map(Self::Program)
    }

    /// Counts datagrams of `payload` bytes that come in skbs on `kN`.
    pub fn of_stack(lab: &'a Lab, link: u32, payload: usize) -> Result<Self> {
        let (namespace, iface) = (lab.sink(link), format!("k{link}"));
        namespace.output("ethtool", &["-K", &iface, "gro", "off"])?;
        Ok(Self::Interface(namespace, iface, payload.max(1) as u64))
    }

    /// Counts datagrams of `payload` bytes that sockets of these groups on `kN` have read. `merges`: they have UDP_GRO.
    pub fn at_sockets(lab: &Lab, link: u32, groups: &[SocketAddr], merges: bool, payload: usize) -> Result<Self> {
        Ok(Self::Sockets(Receivers::start(lab.sink(link), &format!("k{link}"), groups, merges)?, payload.max(1) as u64))
    }

    /// Counts on `r0`, where the relay would be: the generator's ceiling.
    pub fn at_relay(lab: &Lab) -> Result<Self> {
        counting(&lab.relay, "r0").map(Self::Program)
    }

    /// Packets so far.
    pub fn count(&self) -> Result<u64> {
        match self {
            Self::Program(program) => program.count(),
            Self::Interface(namespace, iface, payload) => {
                let (bytes, skbs) = (device_counter(namespace, iface, 0)?, device_counter(namespace, iface, 1)?);
                Ok(bytes.saturating_sub(skbs * IPV4_HEADERS) / payload)
            }
            Self::Sockets(receivers, payload) => Ok(receivers.bytes() / payload),
        }
    }

    /// Packets so far that were lost between `r1` and what counts here.
    pub fn drops(&self, lab: &Lab) -> Result<u64> {
        let own = if let Self::Sockets(receivers, _) = self { receivers.drops() } else { 0 };
        Ok(sink_drops(lab)? + own)
    }
}

impl Drop for Sink<'_> {
    fn drop(&mut self) {
        if let Self::Interface(namespace, iface, _) = self {
            // The next sink may need NAPI; if this fails, its row shows nothing and says so.
            let _ = namespace.output("ethtool", &["-K", iface, "gro", "on"]);
        }
    }
}

/// The counting, dropping program on an interface.
fn counting(namespace: &super::Namespace, iface: &str) -> Result<LabProgram> {
    attached(namespace, iface, "lab_drop")
}

/// What notes the times without a packet on `kN`.
pub fn listening(lab: &Lab, link: u32) -> Result<LabProgram> {
    attached(lab.sink(link), &format!("k{link}"), "lab_silence")
}

fn attached(namespace: &super::Namespace, iface: &str, name: &str) -> Result<LabProgram> {
    let mut program = LabProgram::load()?;
    namespace.run(|| program.attach(name, socket::ifindex(iface)?))??;
    Ok(program)
}

/// A column of an interface's line in /proc/net/dev.
fn device_counter(namespace: &super::Namespace, iface: &str, column: usize) -> Result<u64> {
    let text = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))?.map_err(LabError::io("/proc/net/dev"))?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix(&format!("{iface}:")).map(str::to_owned)).unwrap_or_default();
    Ok(line.split_whitespace().nth(column).and_then(|n| n.parse().ok()).unwrap_or(0))
}
