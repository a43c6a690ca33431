//! AF_XDP generator and receiver through xsk-rs: an implementation of AF_XDP that shares no line with the relay's own.
//!
//! Must never be used by the relay. One socket on queue 0 in copy mode; the receiver attaches `lab_xsk` for as long as it lives.
#![expect(unsafe_code, reason = "xsk-rs leaves frame ownership to its caller")]

use super::error::{LabError, Result};
use super::packet::{Flow, group_mac};
use super::progress::Progress;
use super::recv::{Args as RecvArgs, Limits, Report};
use super::send::{Args as SendArgs, Sink};
use super::tally::Tally;
use super::xdp::LabProgram;
use super::{clock, payload, socket};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};
use xsk_rs::config::{BindFlags, LibxdpFlags, QueueSize, SocketConfig, UmemConfig};
use xsk_rs::umem::frame::FrameDesc;
use xsk_rs::{CompQueue, FillQueue, RxQueue, Socket, TxQueue, Umem};

/// Frames of a UMEM, and places in each ring.
pub(super) const FRAMES: u32 = 8_192;
/// Packets the kernel sends per wake-up in copy mode.
const TX_BUDGET: u32 = 32;
/// Bound of the wait for the last completions.
const FINISH: Duration = Duration::from_secs(1);

/// The four rings of a socket.
pub(super) struct Rings {
    pub(super) tx: TxQueue,
    pub(super) rx: RxQueue,
    pub(super) fill: FillQueue,
    pub(super) completion: CompQueue,
}

struct Port {
    umem: Umem,
    frames: Vec<FrameDesc>,
    rings: Rings,
}

fn ring_size() -> Result<QueueSize> {
    QueueSize::new(FRAMES).map_err(|e| LabError::Invalid(format!("ring size: {e}")))
}

/// A new UMEM and all its frames.
pub(super) fn umem() -> Result<(Umem, Vec<FrameDesc>)> {
    let invalid = |e: &dyn std::fmt::Display| LabError::Invalid(format!("UMEM: {e}"));
    let frames = NonZeroU32::new(FRAMES).unwrap_or(NonZeroU32::MIN);
    let ring = ring_size()?;
    let config = UmemConfig::builder().fill_queue_size(ring).comp_queue_size(ring).build().map_err(|e| invalid(&e))?;
    Umem::new(config, frames, false).map_err(|e| invalid(&e))
}

/// A socket on queue 0 of an interface, in copy mode; the second one on a UMEM shares it. Loads no program.
pub(super) fn bind(iface: &str, umem: &Umem) -> Result<Rings> {
    let config = SocketConfig::builder()
        .rx_queue_size(ring_size()?)
        .tx_queue_size(ring_size()?)
        .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
        .bind_flags(BindFlags::XDP_COPY | BindFlags::XDP_USE_NEED_WAKEUP)
        .build();
    let name = iface.parse().map_err(|e| LabError::Invalid(format!("{iface}: {e:?}")))?;
    // SAFETY: no two sockets are made on one interface and queue here, and no program is loaded.
    let queues = unsafe { Socket::new(config, umem, &name, 0) };
    let (tx, rx, rings) = queues.map_err(|e| {
        let source = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
        LabError::Invalid(format!("AF_XDP socket on {iface}: {e}{source}"))
    })?;
    let (fill, completion) = rings.ok_or_else(|| LabError::Invalid(format!("AF_XDP socket on {iface}: no fill ring")))?;
    Ok(Rings { tx, rx, fill, completion })
}

fn open(iface: &str) -> Result<Port> {
    let (umem, frames) = umem()?;
    let rings = bind(iface, &umem)?;
    Ok(Port { umem, frames, rings })
}

/// The generator's AF_XDP socket.
pub struct XskSink {
    port: Port,
    flow: Flow,
    payload: Vec<u8>,
    outstanding: u32,
    scratch: Vec<FrameDesc>,
}

impl XskSink {
    /// Binds to queue 0 of the interface.
    pub fn new(args: &SendArgs) -> Result<Self> {
        let flow = flow(args)?;
        let size = usize::from(args.size);
        let mut port = open(&args.iface)?;
        if flow.payload_offset() + size > port.umem_frame_size() {
            return Err(LabError::Invalid(format!("--size {size}: does not fit a frame")));
        }
        let scratch = std::mem::take(&mut port.frames);
        port.frames.clone_from(&scratch);
        Ok(Self { port, flow, payload: vec![0; size], outstanding: 0, scratch })
    }

    fn reap(&mut self) {
        // SAFETY: frames come back on the completion ring of the UMEM they were taken from.
        let reaped = unsafe { self.port.rings.completion.consume(&mut self.scratch) };
        self.port.frames.extend(self.scratch.iter().take(reaped));
        self.outstanding = self.outstanding.saturating_sub(u32::try_from(reaped).unwrap_or(0));
    }

    fn wake(&mut self) -> Result<()> {
        self.port.rings.tx.wakeup().map_err(LabError::io("AF_XDP wake-up"))
    }
}

impl Port {
    /// Room for a packet in one frame of the default configuration.
    fn umem_frame_size(&self) -> usize {
        UmemConfig::default().mtu() as usize
    }
}

/// Headers from the arguments and the interface's own addresses.
fn flow(args: &SendArgs) -> Result<Flow> {
    let (mac, ip) = interface_addresses(&args.iface, args.to.is_ipv4())?;
    let source = args.source.unwrap_or(SocketAddr::new(ip, 40_000));
    let destination_mac =
        group_mac(args.to.ip()).ok_or_else(|| LabError::Invalid(format!("--to {}: --backend xsk sends to groups only", args.to)))?;
    Ok(Flow { source_mac: mac, destination_mac, source, destination: args.to, ttl: args.ttl, dscp: args.dscp })
}

/// MAC and first address of an interface in the calling thread's namespace.
pub fn interface_addresses(iface: &str, v4: bool) -> Result<([u8; 6], IpAddr)> {
    let (mut mac, mut ip) = (None, None);
    for entry in nix::ifaddrs::getifaddrs().map_err(LabError::io("getifaddrs"))?.filter(|e| e.interface_name == iface) {
        let Some(address) = entry.address else { continue };
        mac = mac.or(address.as_link_addr().and_then(|link| link.addr()));
        let this =
            if v4 { address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip())) } else { address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())) };
        ip = ip.or(this);
    }
    match (mac, ip) {
        (Some(mac), Some(ip)) => Ok((mac, ip)),
        (Some(mac), None) => Ok((mac, socket::unspecified(if v4 { [0, 0, 0, 0].into() } else { [0u8; 16].into() }))),
        (None, _) => Err(LabError::Invalid(format!("interface {iface} has no MAC address"))),
    }
}

impl Sink for XskSink {
    const NAME: &'static str = "xsk";

    fn push(&mut self, sequence: u64, count: u32) -> Result<u32> {
        self.reap();
        let count = (count as usize).min(self.port.frames.len());
        let at = self.port.frames.len() - count;
        let mut batch = self.port.frames.split_off(at);
        let now = clock::monotonic_ns();
        for (index, desc) in batch.iter_mut().enumerate() {
            payload::write(&mut self.payload, sequence + index as u64, now);
            // SAFETY: the descriptor is in our free list, so neither the kernel nor another borrow uses its frame.
            let mut data = unsafe { self.port.umem.data_mut(desc) };
            data.cursor().set_pos(self.flow.payload_offset() + self.payload.len());
            self.flow.write(data.contents_mut(), &self.payload);
        }
        // SAFETY: the frames belong to this UMEM and were just taken out of the free list.
        let taken = unsafe { self.port.rings.tx.produce(&batch) };
        self.port.frames.extend(batch.drain(taken..));
        let taken = u32::try_from(taken).unwrap_or(0);
        self.outstanding += taken;
        for _ in 0..=taken / TX_BUDGET {
            self.wake()?;
        }
        Ok(taken)
    }

    fn finish(&mut self) -> Result<()> {
        let begin = Instant::now();
        while self.outstanding > 0 && begin.elapsed() < FINISH {
            self.wake()?;
            self.reap();
        }
        if self.outstanding == 0 { Ok(()) } else { Err(LabError::Invalid(format!("{} packets never left the TX ring", self.outstanding))) }
    }
}

/// `relay recv --backend xsk`: joined by a kernel socket, received by AF_XDP.
pub fn receive(args: &RecvArgs) -> Result<Report> {
    let mut port = open(&args.iface)?;
    let index = socket::ifindex(&args.iface)?;
    let _join = socket::receiver(&args.iface, args.group.source, args.group.group)?;
    let mut program = LabProgram::load()?;
    program.set_socket(0, port.rings.rx.fd())?;
    program.attach("lab_xsk", index)?;
    // SAFETY: all frames of a new UMEM are ours, and the TX ring is not used.
    let filled = unsafe { port.rings.fill.produce(&port.frames) };
    let mut tally = Tally::new().map_err(|e| LabError::Invalid(e.to_string()))?;
    let mut descs: Vec<FrameDesc> = port.frames.iter().take(filled).copied().collect();
    let mut limits = Limits::new();
    let softnet = clock::softnet_drops();
    eprintln!("listening on {}", args.iface);
    let mut progress = Progress::new("received", args.count);
    loop {
        // SAFETY: the RX ring and the descriptors are of the same UMEM.
        let received = unsafe { port.rings.rx.poll_and_consume(&mut descs, 20) }.map_err(LabError::io("AF_XDP poll"))?;
        let now = clock::monotonic_ns();
        let batch = descs.get(..received).unwrap_or_default();
        for desc in batch {
            // SAFETY: the frame was consumed from the RX ring and goes to the fill ring only below.
            let data = unsafe { port.umem.data(desc) };
            if let Some(bytes) = udp_payload(data.contents(), args.group.group) {
                tally.record(bytes, now);
            }
        }
        progress.at(now, tally.received);
        give_back(&mut port.rings.fill, batch);
        if !limits.go_on(args, &tally, received > 0) {
            break;
        }
    }
    let statistics = port.rings.rx.fd().xdp_statistics().map_err(LabError::io("XDP_STATISTICS"))?;
    Ok(Report::new(&tally, args.count, statistics.rx_dropped() + statistics.rx_ring_full(), clock::softnet_drops() - softnet))
}

/// The fill ring has a place for every frame, so this ends.
fn give_back(fill: &mut FillQueue, mut batch: &[FrameDesc]) {
    while !batch.is_empty() {
        // SAFETY: the frames were consumed from the RX ring of this UMEM and are used no more.
        let taken = unsafe { fill.produce(batch) };
        batch = batch.get(taken..).unwrap_or_default();
    }
}

/// UDP payload of an untagged frame to `to`; `None` for anything else.
fn udp_payload(frame: &[u8], to: SocketAddr) -> Option<&[u8]> {
    let ip = frame.get(14..)?;
    let (destination, udp) = match (frame.get(12..14)?, to.ip()) {
        ([8, 0], IpAddr::V4(group)) => (ip.get(16..20)? == group.octets(), ip.get(usize::from(ip.first()? & 15) * 4..)?),
        ([0x86, 0xdd], IpAddr::V6(group)) => (ip.get(24..40)? == group.octets(), ip.get(40..)?),
        _ => return None,
    };
    let len = usize::from(u16::from_be_bytes(udp.get(4..6)?.try_into().ok()?));
    (destination && udp.get(2..4)? == to.port().to_be_bytes()).then(|| udp.get(8..len))?
}
