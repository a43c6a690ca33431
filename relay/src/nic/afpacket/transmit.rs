//! The sending half of a packet port: an [`Outbox`] and the engine that empties it.
//!
//! Must never look into a packet.

use super::outbox::Outbox;
use super::plain::PlainTransmit;
use super::uring_transmit::UringTransmit;
use super::{Engines, Held, Reason, Rung};
use crate::frame::{RawDesc, Umem};
use crate::nic::{BATCH_LEN, Kick, Refusal, Transmit};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// One way to send through a packet socket.
pub(super) trait SendEngine {
    /// Hands what waits in the outbox to the kernel, and settles what it says. Bounded.
    fn flush<H: Held>(&mut self, outbox: &mut Outbox<H>) -> Result<Kick, Errno>;
}

/// Sending half of a packet port. Fields drop in order: the ring before nothing it points to is left.
#[derive(Debug)]
pub struct PacketTransmit<H> {
    rung: Rung<UringTransmit, PlainTransmit>,
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

    /// Name of the backend, as `status` shows it.
    pub const fn backend(&self) -> &'static str {
        self.rung.backend()
    }

    /// Why it is not io_uring.
    pub const fn reason(&self) -> Option<Reason> {
        self.rung.reason()
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
}
