//! The bare AF_XDP forwarding loop that engine tx is compared with: two sockets on one UMEM, one thread, one rewrite in place.
//!
//! No journal, no rules, no counters, no fan-out, no frame that is checked; through xsk-rs, so that it shares no line with the
//! relay's own AF_XDP. What it has in common with the relay on purpose: batches of 64, the send budget, spinning, copy mode. It
//! rewrites every IPv4 datagram it gets, whatever its group. Must never be used by the relay.
#![expect(unsafe_code, reason = "xsk-rs leaves frame ownership to its caller")]

use super::clock;
use super::error::{LabError, Result};
use super::netns::Namespace;
use super::packet::group_mac;
use super::xdp::LabProgram;
use super::xsk::{self, FRAMES, Rings};
use super::{socket, xsk::interface_addresses};
use crate::sys::xdp::set_tx_budget;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use xsk_rs::Umem;
use xsk_rs::umem::frame::FrameDesc;

/// Packets a turn, as the relay's.
const BATCH: usize = 64;
/// How long a busy queue is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// A running loop; stops when dropped.
#[derive(Debug)]
pub struct XskLoop {
    stop: Arc<AtomicBool>,
    relayed: Arc<AtomicU64>,
    task: Arc<AtomicI32>,
    thread: Option<JoinHandle<()>>,
    /// Attached as long as it lives.
    _program: LabProgram,
}

impl XskLoop {
    /// From queue 0 of `from` to queue 0 of `to` in `namespace`, every datagram readdressed to `destination`. Forwards when this
    /// returns.
    pub fn start(namespace: &Namespace, from: &str, to: &str, destination: SocketAddr, cpu: Option<usize>) -> Result<Self> {
        let (mut forwarder, program) = namespace.run(|| open_patiently(from, to, destination))??;
        let (stop, relayed, task) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default(), Arc::<AtomicI32>::default());
        let shared = (Arc::clone(&stop), Arc::clone(&relayed), Arc::clone(&task));
        let thread = std::thread::spawn(move || {
            // An unpinned baseline is still a baseline; the bench checks the CPUs before.
            let _ = cpu.map(clock::pin_thread);
            shared.2.store(nix::unistd::gettid().as_raw(), Ordering::Relaxed);
            while !shared.0.load(Ordering::Relaxed) {
                let sent = forwarder.turn();
                if sent > 0 {
                    shared.1.store(shared.1.load(Ordering::Relaxed) + sent, Ordering::Relaxed);
                }
            }
        });
        Ok(Self { stop, relayed, task, thread: Some(thread), _program: program })
    }

    /// Packets put on the TX ring so far.
    pub fn relayed(&self) -> u64 {
        self.relayed.load(Ordering::Relaxed)
    }

    /// Involuntary context switches of its thread so far.
    pub fn preemptions(&self) -> u64 {
        clock::thread_switches(self.task.load(Ordering::Relaxed))
    }
}

impl Drop for XskLoop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A queue stays busy until the last mapping of a socket that was bound to it is gone: the worker of the row before may be dying.
fn open_patiently(from: &str, to: &str, destination: SocketAddr) -> Result<(Forwarder, LabProgram)> {
    let begin = Instant::now();
    loop {
        match open(from, to, destination) {
            Err(_) if begin.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(20)),
            result => return result,
        }
    }
}

fn open(from: &str, to: &str, destination: SocketAddr) -> Result<(Forwarder, LabProgram)> {
    let (umem, frames) = xsk::umem()?;
    let mut ingress = xsk::bind(from, &umem)?;
    let egress = xsk::bind(to, &umem)?;
    // SAFETY: the socket is open for as long as `egress` lives, which is longer than this borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(egress.tx.fd().as_raw_fd()) };
    // Since Linux 6.18, as the relay does; an older kernel sends 32 a call.
    let _ = set_tx_budget(&fd, FRAMES);
    // SAFETY: all frames of a new UMEM are ours; each goes to one ring only.
    unsafe { ingress.fill.produce(&frames) };
    let (mac, _) = interface_addresses(to, true)?;
    let mut program = LabProgram::load()?;
    program.set_socket(0, ingress.rx.fd())?;
    program.attach("lab_xsk", socket::ifindex(from)?)?;
    let rewrite = Rewrite::new(mac, destination)?;
    Ok((Forwarder { umem, ingress, egress, rewrite, batch: frames.get(..BATCH).unwrap_or_default().into(), outstanding: 0 }, program))
}

struct Forwarder {
    umem: Umem,
    ingress: Rings,
    egress: Rings,
    rewrite: Rewrite,
    batch: Vec<FrameDesc>,
    outstanding: usize,
}

impl Forwarder {
    /// Receive, rewrite, send, wake up, reap, refill. How many were sent.
    fn turn(&mut self) -> u64 {
        // SAFETY: RX ring and descriptors are of the same UMEM.
        let received = unsafe { self.ingress.rx.consume(&mut self.batch) };
        for desc in self.batch.iter_mut().take(received) {
            // SAFETY: the frame was consumed from the RX ring and goes to the TX ring only below.
            let mut data = unsafe { self.umem.data_mut(desc) };
            self.rewrite.apply(data.contents_mut());
        }
        // The TX ring has a place for every frame, so all are taken.
        // SAFETY: the frames were just consumed from the RX ring of this UMEM and are touched no more.
        let sent = unsafe { self.egress.tx.produce(self.batch.get(..received).unwrap_or_default()) };
        self.outstanding += sent;
        if self.outstanding > 0 && self.egress.tx.needs_wakeup() {
            // What it may say (full, busy) is benign; a loop that stands still shows in its row.
            let _ = self.egress.tx.wakeup();
        }
        // SAFETY: frames come back on the completion ring of the UMEM they were taken from.
        let reaped = unsafe { self.egress.completion.consume(&mut self.batch) };
        self.outstanding -= reaped;
        // SAFETY: the frames were just reaped; the fill ring has a place for every one.
        unsafe { self.ingress.fill.produce(self.batch.get(..reaped).unwrap_or_default()) };
        sent as u64
    }
}

/// MAC addresses, destination and port of an IPv4 datagram without options; checksums by what changes (RFC 1624).
#[derive(Clone, Copy, Debug)]
struct Rewrite {
    macs: [u8; 12],
    address: [u8; 4],
    port: [u8; 2],
}

impl Rewrite {
    fn new(source_mac: [u8; 6], to: SocketAddr) -> Result<Self> {
        let (IpAddr::V4(address), Some(destination_mac)) = (to.ip(), group_mac(to.ip())) else {
            return Err(LabError::Invalid(format!("{to}: the bare loop sends to an IPv4 group")));
        };
        let mut macs = [0; 12];
        for (to, from) in macs.iter_mut().zip(destination_mac.into_iter().chain(source_mac)) {
            *to = from;
        }
        Ok(Self { macs, address: address.octets(), port: to.port().to_be_bytes() })
    }

    #[inline]
    fn apply(&self, frame: &mut [u8]) {
        let Some(frame) = frame.first_chunk_mut::<42>() else { return };
        let old = [[frame[30], frame[31]], [frame[32], frame[33]], [frame[36], frame[37]]].map(u16::from_be_bytes);
        let new = [[self.address[0], self.address[1]], [self.address[2], self.address[3]], self.port].map(u16::from_be_bytes);
        let change = |words: usize| old.iter().zip(&new).take(words).map(|(old, new)| u32::from(!old) + u32::from(*new)).sum();
        frame[..12].copy_from_slice(&self.macs);
        frame[30..34].copy_from_slice(&self.address);
        frame[36..38].copy_from_slice(&self.port);
        adjust(frame, 24, change(2));
        if frame[40..42] != [0, 0] {
            adjust(frame, 40, change(3));
        }
    }
}

/// Adds a change to the checksum at an offset.
#[inline]
fn adjust(frame: &mut [u8; 42], at: usize, change: u32) {
    let sum = u32::from(!u16::from_be_bytes([frame[at], frame[at + 1]])) + change;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    frame[at..at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::packet::Flow;

    #[test]
    fn the_rewrite_is_what_a_sender_would_have_made() {
        let to: SocketAddr = "239.9.9.9:6000".parse().unwrap();
        let flow = Flow {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: group_mac("239.1.1.1".parse().unwrap()).unwrap(),
            source: "10.0.0.1:40000".parse().unwrap(),
            destination: "239.1.1.1:5000".parse().unwrap(),
            ttl: 16,
            dscp: 0,
        };
        let wanted = Flow { source_mac: [6; 6], destination_mac: group_mac(to.ip()).unwrap(), destination: to, ..flow };
        let rewrite = Rewrite::new([6; 6], to).unwrap();
        for fill in 0..=255 {
            let mut frame = flow.frame(&[fill; 33]);
            rewrite.apply(&mut frame);
            assert_eq!(frame, wanted.frame(&[fill; 33]));
        }
        rewrite.apply(&mut [0; 20]);
        assert!(Rewrite::new([6; 6], "10.0.0.1:1".parse().unwrap()).is_err());
    }
}
