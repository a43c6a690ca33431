//! The sending half of a packet port: an [`Outbox`] and the engine that empties it.
//!
//! Must never look into a packet.

use super::coalesce::{CoalesceTransmit, WINDOW};
use super::outbox::Outbox;
use super::plain::PlainTransmit;
use super::uring_transmit::UringTransmit;
use super::{Engines, Held, Reason};
use crate::frame::{FRAME_SIZE, RawDesc, Umem};
use crate::nic::{Admission, BATCH_LEN, Kick, Refusal, Transmit};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// One way to send through a packet socket.
pub(super) trait SendEngine {
    /// Hands what waits in the outbox to the kernel, and settles what it says. Bounded.
    fn flush<H: Held>(&mut self, outbox: &mut Outbox<H>) -> Result<Kick, Errno>;
}

#[derive(Debug)]
enum Rung {
    Uring(UringTransmit),
    Plain(PlainTransmit, Reason),
    Coalesce(CoalesceTransmit),
}

/// Descriptors a coalescing half takes: a window, and what waits to be tried again.
const COALESCE_DEPTH: u16 = 2 * WINDOW as u16;

/// Sending half of a packet port. Fields drop in order: the ring before nothing it points to is left.
#[derive(Debug)]
pub struct PacketTransmit<H> {
    rung: Rung,
    outbox: Outbox<H>,
}

impl<H: Held> PacketTransmit<H> {
    /// Takes a socket of [`super::socket::open_send`]: io_uring, or what is below it. `depth` (a power of two) descriptors may
    /// be put before they are reaped. May be made on any thread; the one that kicks it first must go on using it.
    pub fn open(socket: OwnedFd, umem: &Arc<Umem>, depth: u16, held: H, engines: Engines) -> Self {
        let outbox = Outbox::new(depth, umem.len() as u64, held);
        let uring = match engines {
            Engines::PlainOnly => Err(Reason::NotWanted),
            Engines::Best => UringTransmit::new(&socket, Arc::clone(umem), depth).map_err(Reason::Refused),
        };
        let rung = match uring {
            Ok(uring) => Rung::Uring(uring),
            Err(reason) => Rung::Plain(PlainTransmit::new(socket, Arc::clone(umem)), reason),
        };
        Self { rung, outbox }
    }

    /// Takes a socket of [`super::socket::open_coalesce`]: the engine that sends runs of packets as super-frames.
    /// `pays`: where it says whether super-frames pay, and bundles with them.
    pub fn coalesce(socket: OwnedFd, umem: &Arc<Umem>, held: H, pays: Arc<AtomicBool>) -> Self {
        let outbox = Outbox::new(COALESCE_DEPTH, umem.len() as u64, held);
        Self { rung: Rung::Coalesce(CoalesceTransmit::new(socket, Arc::clone(umem), pays)), outbox }
    }

    /// Name of the backend, as `status` shows it.
    pub const fn backend(&self) -> &'static str {
        if matches!(self.rung, Rung::Plain(..)) { "af_packet_plain" } else { "af_packet" }
    }

    /// Why it is not io_uring, where that was possible.
    pub const fn reason(&self) -> Option<Reason> {
        if let Rung::Plain(_, reason) = self.rung { Some(reason) } else { None }
    }
}

impl<H: Held> Transmit for PacketTransmit<H> {
    fn free(&mut self) -> u32 {
        self.outbox.free()
    }

    fn put(&mut self, desc: RawDesc) {
        self.outbox.put(desc);
    }

    fn publish(&mut self) {}

    fn kick(&mut self) -> Result<Kick, Errno> {
        if self.outbox.waiting() == 0 {
            return Ok(self.outbox.verdict());
        }
        match &mut self.rung {
            Rung::Uring(uring) => uring.flush(&mut self.outbox),
            Rung::Plain(plain, _) => plain.flush(&mut self.outbox),
            Rung::Coalesce(coalesce) => coalesce.flush(&mut self.outbox),
        }
    }

    fn reap(&mut self, out: &mut ArrayVec<u64, BATCH_LEN>) {
        self.outbox.reap(out);
    }

    fn reaped(&mut self, count: u32) {
        self.outbox.give_back(count);
    }

    fn survives(&self) -> bool {
        false
    }

    fn position(&self) -> u32 {
        self.outbox.produced()
    }

    fn reap_position(&self) -> u32 {
        self.outbox.reaped()
    }

    fn outstanding(&self) -> u32 {
        self.outbox.outstanding()
    }

    fn refused(&mut self) -> Option<Refusal> {
        self.outbox.refused()
    }

    fn is_flushed(&mut self) -> bool {
        self.outbox.is_flushed()
    }

    fn begin_window(&mut self) {
        if let Rung::Coalesce(coalesce) = &mut self.rung {
            coalesce.begin_window();
        }
    }

    fn admit(&mut self, desc: RawDesc) -> Admission {
        if let Rung::Coalesce(coalesce) = &mut self.rung { coalesce.admit(desc) } else { Admission::Take }
    }

    fn disappoint(&self, headers: RawDesc, len: u32, each: &mut dyn FnMut(Refusal)) {
        if let Rung::Coalesce(coalesce) = &self.rung {
            coalesce.disappoint(headers, len, each);
        }
    }

    fn is_off(&self) -> bool {
        if let Rung::Coalesce(coalesce) = &self.rung { coalesce.is_off() } else { false }
    }

    fn forget(&mut self, address: u64) {
        self.outbox.forget((address / u64::from(FRAME_SIZE)) as u32);
    }
}
