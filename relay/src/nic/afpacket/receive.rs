//! The receiving half of a packet port: what both engines share, over whichever it is.
//!
//! An engine ([`ReceiveEngine`]) takes frames to receive into and yields packets; the half keeps the socket, the counters and
//! the map of frames that are with the kernel. Must never look at what a packet says.

use super::plain::PlainReceive;
use super::uring_receive::UringReceive;
use super::{Engines, Held, Reason, Rung, socket, uring};
use crate::frame::{Frame, Pool, Umem};
use crate::nic::{BATCH_DESCS, Batch, Receive, ReceiveCounters};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// What an engine has met with since it was made.
#[derive(Debug, Default)]
pub(super) struct Books {
    /// Counters of the half.
    pub(super) counters: ReceiveCounters,
    /// Times the kernel found no frame to receive into.
    pub(super) starved: u64,
    /// Why receiving last failed.
    pub(super) last_error: Option<Errno>,
}

impl Books {
    /// Notes why a receive ended.
    pub(super) fn ended(&mut self, errno: Errno) {
        match errno {
            Errno::EAGAIN | Errno::EINTR | Errno::ECANCELED => {}
            Errno::ENOBUFS => self.starved += 1,
            // packet_rcv_vnet: a kind of super-frame that struct virtio_net_hdr has no word for.
            Errno::EINVAL => self.counters.too_big += 1,
            other => self.last_error = Some(other),
        }
    }
}

/// One way to receive from a packet socket.
pub(super) trait ReceiveEngine {
    /// Takes a frame to receive into; gives it back where no more are wanted.
    fn lend(&mut self, umem: &Umem, frame: Frame) -> Result<(), Frame>;
    /// Shows the lent frames to the kernel.
    fn publish(&mut self);
    /// See [`Receive::receive`].
    fn receive(&mut self, books: &mut Books, umem: &Umem, max: usize, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>);
    /// Frames lent and not come back.
    fn standing(&self) -> u32;
    /// Frames it wants to have.
    fn depth(&self) -> u32;
    /// Ends receiving; what is in the socket stays there.
    fn stop(&mut self) -> Result<(), Errno>;
    /// Whether nothing more will come.
    fn is_stopped(&mut self) -> bool;
    /// One lent frame back, once stopped.
    fn take_back(&mut self) -> Option<Frame>;
    /// Sleeps until there is something to look at (true) or the time is over.
    fn wait(&mut self, socket: &OwnedFd, timeout: Duration) -> Result<bool, Errno>;
}

/// Receiving half of a packet port.
#[derive(Debug)]
pub struct PacketReceive<H> {
    rung: Rung<UringReceive, PlainReceive>,
    books: Books,
    starved_before: u64,
    socket: OwnedFd,
    held: H,
}

impl<H: Held> PacketReceive<H> {
    /// Takes a socket of [`socket::open_receive`]: io_uring with `depth` (a power of two) frames standing, or what is below it.
    /// May be made on any thread; the one that refills it first must go on using it.
    pub fn open(socket: OwnedFd, umem: &Arc<Umem>, depth: u16, held: H, engines: Engines) -> Result<Self, Errno> {
        let own = socket.try_clone().map_err(|error| uring::errno(&error))?;
        let plain = |reason| Ok(Rung::Plain(PlainReceive::new(own), reason));
        let rung = match engines {
            Engines::PlainOnly => plain(Reason::NotWanted),
            Engines::Best => match UringReceive::new(&socket, Arc::clone(umem), depth) {
                Ok(uring) => Ok(Rung::Uring(uring)),
                Err(errno) => plain(Reason::Refused(errno)),
            },
        };
        Ok(Self { rung: rung?, books: Books::default(), starved_before: 0, socket, held })
    }

    fn engine(&mut self) -> &mut dyn ReceiveEngine {
        match &mut self.rung {
            Rung::Uring(uring) => uring,
            Rung::Plain(plain, _) => plain,
        }
    }

    fn engine_ref(&self) -> &dyn ReceiveEngine {
        match &self.rung {
            Rung::Uring(uring) => uring,
            Rung::Plain(plain, _) => plain,
        }
    }

    /// Name of the backend, as `status` shows it.
    pub const fn backend(&self) -> &'static str {
        self.rung.backend()
    }

    /// Why it is not io_uring.
    pub const fn reason(&self) -> Option<Reason> {
        self.rung.reason()
    }

    /// Reads the kernel's drop counter. Outside the turns of packets.
    ///
    /// A full socket queue is our slowness (`ring_full`), unless there were no frames to receive into (`kernel_dropped`).
    pub fn housekeeping(&mut self) {
        let drops = u64::from(socket::take_drops(&self.socket).unwrap_or(0));
        if self.books.starved == self.starved_before {
            self.books.counters.ring_full += drops;
        } else {
            self.books.counters.kernel_dropped += drops;
        }
        self.starved_before = self.books.starved;
    }

    /// Descriptor to poll for packets; see [`AsFd`].
    pub fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Sleeps until there is a packet (or something else to look at: true) or the time is over (false).
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, Errno> {
        match &mut self.rung {
            Rung::Uring(uring) => uring.wait(&self.socket, timeout),
            Rung::Plain(plain, _) => plain.wait(&self.socket, timeout),
        }
    }

    /// Times the kernel found no frame to receive into.
    pub const fn starved(&self) -> u64 {
        self.books.starved
    }

    /// Why receiving last failed (ENETDOWN: the interface went down or away).
    pub const fn last_error(&self) -> Option<Errno> {
        self.books.last_error
    }
}

impl<H> AsFd for PacketReceive<H> {
    /// The socket, not a ring: deferred task work (IORING_SETUP_DEFER_TASKRUN) wakes nobody who polls the ring. The socket is
    /// readable for as long as the ring has not taken its packets.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<H: Held> Receive for PacketReceive<H> {
    fn receive(&mut self, umem: &Umem, max: usize, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        match &mut self.rung {
            Rung::Uring(uring) => uring.receive(&mut self.books, umem, max, batch, spare),
            Rung::Plain(plain, _) => plain.receive(&mut self.books, umem, max, batch, spare),
        }
    }

    fn release(&mut self) {}

    fn taken(&self) -> u32 {
        0
    }

    fn retake(&mut self, _count: u32) {}

    fn position(&self) -> u32 {
        0
    }

    fn survives(&self) -> bool {
        false
    }

    fn standing(&self) -> u32 {
        self.engine_ref().standing()
    }

    fn stage_refill(&mut self, umem: &Umem, pool: &Pool, max: u32) -> u32 {
        let mut count = 0;
        while count < max.min(pool.len()) {
            let Ok(frame) = umem.claim_index(pool.peek(pool.len() - 1 - count)) else { break };
            // Marked before it is lent, so that a kill in between loses nothing: what is in the pool is not reclaimed.
            self.held.set(frame.index(), true);
            if let Err(frame) = self.engine().lend(umem, frame) {
                self.held.set(frame.into_index(), false);
                break;
            }
            count += 1;
        }
        count
    }

    fn refill_position(&self) -> u32 {
        0
    }

    fn publish_refill(&mut self, _count: u32) {
        self.engine().publish();
    }

    fn depth(&self) -> u32 {
        self.engine_ref().depth()
    }

    fn counters(&self) -> ReceiveCounters {
        self.books.counters
    }

    fn stop(&mut self) -> Result<(), Errno> {
        self.engine().stop()
    }

    fn is_stopped(&mut self) -> bool {
        self.engine().is_stopped()
    }

    /// The frames stay marked as held until the pool is published: a successor leaves marked frames alone that it finds in
    /// the pool, and would lose others.
    fn take_back(&mut self, pool: &mut Pool) -> u32 {
        if !self.is_stopped() {
            return 0;
        }
        let first = pool.len();
        while let Some(frame) = self.engine().take_back() {
            pool.put(frame);
        }
        pool.publish();
        (first..pool.len()).for_each(|position| self.held.set(pool.peek(position), false));
        pool.len() - first
    }
}
