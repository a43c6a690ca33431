//! The NIC through AF_PACKET: where AF_XDP can't be had, the same contract over packet sockets.
//!
//! Two engines: io_uring (`uring_*`), and recvmmsg/sendmmsg (`plain`) where the kernel refuses io_uring. [`PacketReceive`] and
//! [`PacketTransmit`] are whichever it is; [`Reason`] says why it is the lower one. Sockets come from the supervisor
//! ([`socket`]), the ring is the worker's own, made before its seccomp filter closes.
//! System calls after that: io_uring_enter, io_uring_register (once a half, ENABLE_RINGS), getsockopt; plain: recvmmsg,
//! sendmmsg, ppoll, getsockopt. The packet path has no journal position: the rings die with the worker, so
//! [`Held`] marks the frames that were with them. Must never know a rule or the data path.

mod filter;
mod layout;
mod outbox;
pub mod plain;
pub mod socket;
mod uring;
pub mod uring_receive;
pub mod uring_transmit;
mod wakeup;

pub use plain::{PlainReceive, PlainTransmit};
pub use uring_receive::UringReceive;
pub use uring_transmit::UringTransmit;

use super::{BATCH_DESCS, BATCH_LEN, Batch, Kick, Receive, ReceiveCounters, Transmit};
use crate::frame::{Frame, Pool, RawDesc, Umem};
use crate::sys::SharedArray;
use arrayvec::ArrayVec;
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// Frames that stand with the kernel by default, and descriptors in flight by default.
pub const DEFAULT_DEPTH: u16 = 256;

/// Where it is written down which frames are with a kernel object that dies with this process. A successor finds there what
/// stands in no ring. Set before a frame is given to the kernel, cleared before it is given to anyone else.
pub trait Held {
    /// One plain store.
    fn set(&self, frame: u32, held: bool);
}

impl Held for SharedArray<u8> {
    fn set(&self, frame: u32, held: bool) {
        SharedArray::set(self, frame as usize, u8::from(held));
    }
}

impl<H: Held + ?Sized> Held for &H {
    fn set(&self, frame: u32, held: bool) {
        H::set(self, frame, held);
    }
}

/// Why a half is on the plain engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("io_uring refused ({0}): see sysctl kernel.io_uring_disabled")]
pub struct Reason(pub Errno);

/// What the kernel dropped before a packet reached us, read now and then.
#[derive(Debug, Default)]
struct Drops {
    starved: u64,
    starved_before: u64,
}

impl Drops {
    /// A full socket queue is our slowness (`ring_full`), unless there were no frames to receive into (`kernel_dropped`).
    fn read(&mut self, socket: &impl AsFd, counters: &mut ReceiveCounters) {
        let drops = u64::from(socket::take_drops(socket).unwrap_or(0));
        if self.starved == self.starved_before {
            counters.ring_full += drops;
        } else {
            counters.kernel_dropped += drops;
        }
        self.starved_before = self.starved;
    }
}

/// Receiving half of a packet port.
#[derive(Debug)]
pub enum PacketReceive<H> {
    /// Over io_uring.
    Uring(Box<UringReceive<H>>),
    /// Over recvmmsg.
    Plain(Box<PlainReceive<H>>, Reason),
}

/// Sending half of a packet port.
#[derive(Debug)]
pub enum PacketTransmit<H> {
    /// Over io_uring.
    Uring(Box<UringTransmit<H>>),
    /// Over sendmmsg.
    Plain(Box<PlainTransmit<H>>, Reason),
}

/// Calls the same on either engine.
macro_rules! either {
    ($half:expr, $engine:ident => $call:expr) => {
        match $half {
            Self::Uring($engine) => $call,
            Self::Plain($engine, _) => $call,
        }
    };
}

impl<H: Held + Clone> PacketReceive<H> {
    /// io_uring, or what is below it. `depth` is a power of two; the plain engine has its own.
    pub fn open(socket: OwnedFd, umem: &Arc<Umem>, depth: u16, held: H) -> Result<Self, Errno> {
        match UringReceive::new(socket.try_clone().map_err(|error| uring::errno(&error))?, Arc::clone(umem), depth, held.clone()) {
            Ok(half) => Ok(Self::Uring(Box::new(half))),
            Err(errno) => Ok(Self::Plain(Box::new(PlainReceive::new(socket, held)), Reason(errno))),
        }
    }
}

impl<H: Held> PacketReceive<H> {
    /// Name of the backend, as `status` shows it.
    pub const fn backend(&self) -> &'static str {
        match self {
            Self::Uring(_) => "af_packet",
            Self::Plain(..) => "af_packet_plain",
        }
    }

    /// Why it is not io_uring.
    pub const fn reason(&self) -> Option<Reason> {
        match self {
            Self::Uring(_) => None,
            Self::Plain(_, reason) => Some(*reason),
        }
    }

    /// Reads the kernel's drop counter. Outside the turns of packets.
    pub fn housekeeping(&mut self) {
        either!(self, half => half.housekeeping());
    }

    /// Number of frames standing with the kernel.
    pub fn held_count(&self) -> u32 {
        either!(self, half => half.held().count() as u32)
    }

    /// Ends receiving for a planned replacement; go on with [`Receive::receive`] until [`PacketReceive::is_stopped`].
    pub fn stop(&mut self) -> Result<(), Errno> {
        match self {
            Self::Uring(half) => half.stop(),
            Self::Plain(half, _) => {
                half.stop();
                Ok(())
            }
        }
    }

    /// Whether nothing more will come.
    pub fn is_stopped(&mut self) -> bool {
        either!(self, half => half.is_stopped())
    }

    /// Puts the frames standing with the kernel back into the pool, once stopped. Returns how many.
    pub fn take_back(&mut self, pool: &mut Pool) -> u32 {
        either!(self, half => half.take_back(pool))
    }

    /// Descriptor to poll for packets.
    pub fn as_raw_fd(&self) -> RawFd {
        either!(self, half => half.as_raw_fd())
    }

    /// Sleeps until there is a packet (or something else to look at: true) or the time is over (false).
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, Errno> {
        either!(self, half => half.wait(timeout))
    }

    /// Times the kernel found no frame to receive into.
    pub fn starved(&self) -> u64 {
        either!(self, half => half.starved())
    }

    /// Why receiving last ended by itself.
    pub fn last_error(&self) -> Option<Errno> {
        either!(self, half => half.last_error())
    }
}

impl<H> AsFd for PacketReceive<H> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, half => half.as_fd())
    }
}

impl<H: Held> Receive for PacketReceive<H> {
    fn receive(&mut self, umem: &Umem, max: usize, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        either!(self, half => half.receive(umem, max, batch, spare));
    }

    fn release(&mut self) {}

    fn position(&self) -> u32 {
        0
    }

    fn survives(&self) -> bool {
        false
    }

    fn standing(&self) -> u32 {
        either!(self, half => half.standing())
    }

    fn stage_refill(&mut self, umem: &Umem, pool: &Pool, max: u32) -> u32 {
        either!(self, half => half.stage_refill(umem, pool, max))
    }

    fn refill_position(&self) -> u32 {
        0
    }

    fn publish_refill(&mut self, count: u32) {
        either!(self, half => half.publish_refill(count));
    }

    fn depth(&self) -> u32 {
        either!(self, half => half.depth())
    }

    fn counters(&self) -> ReceiveCounters {
        either!(self, half => half.counters())
    }
}

impl<H: Held + Clone> PacketTransmit<H> {
    /// io_uring, or what is below it. `depth` (a power of two) descriptors may be in flight.
    pub fn open(socket: OwnedFd, umem: &Arc<Umem>, depth: u16, held: H) -> Self {
        match UringTransmit::new(&socket, Arc::clone(umem), depth, held.clone()) {
            Ok(half) => Self::Uring(Box::new(half)),
            Err(errno) => Self::Plain(Box::new(PlainTransmit::new(socket, Arc::clone(umem), depth, held)), Reason(errno)),
        }
    }
}

impl<H: Held> PacketTransmit<H> {
    /// Name of the backend, as `status` shows it.
    pub const fn backend(&self) -> &'static str {
        match self {
            Self::Uring(_) => "af_packet",
            Self::Plain(..) => "af_packet_plain",
        }
    }

    /// Why it is not io_uring.
    pub const fn reason(&self) -> Option<Reason> {
        match self {
            Self::Uring(_) => None,
            Self::Plain(_, reason) => Some(*reason),
        }
    }
}

impl<H: Held> Transmit for PacketTransmit<H> {
    fn free(&mut self) -> u32 {
        either!(self, half => half.free())
    }

    fn put(&mut self, desc: RawDesc) {
        either!(self, half => half.put(desc));
    }

    fn publish(&mut self) {
        either!(self, half => half.publish());
    }

    fn kick(&mut self) -> Result<Kick, Errno> {
        either!(self, half => half.kick())
    }

    fn reap(&mut self, out: &mut ArrayVec<u64, BATCH_LEN>) {
        either!(self, half => half.reap(out));
    }

    fn survives(&self) -> bool {
        false
    }

    fn reaped(&mut self, count: u32) {
        either!(self, half => half.reaped(count));
    }

    fn position(&self) -> u32 {
        either!(self, half => half.position())
    }

    fn reap_position(&self) -> u32 {
        either!(self, half => half.reap_position())
    }

    fn outstanding(&self) -> u32 {
        either!(self, half => half.outstanding())
    }

    fn failed(&self) -> u64 {
        either!(self, half => half.failed())
    }
}
