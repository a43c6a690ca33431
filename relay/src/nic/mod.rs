//! The port contract: what a NIC queue can do for the data path, whichever kernel interface is behind it.
//!
//! A port is (interface, queue). Its receiving half is a [`Receive`], its sending half a [`Transmit`]. Must never know a
//! rule, the data path's logic or the control path. Rooms: `afxdp/` and `afpacket/` implement the contract, `memory`
//! is the NIC of the tests.

pub mod afpacket;
pub mod afxdp;
#[cfg(test)]
pub mod memory;

use crate::frame::{Frame, MAX_FRAGMENTS, MAX_LABEL, Pool, RawDesc, Umem};
use arrayvec::ArrayVec;

/// Packets of one batch at most.
pub const BATCH_LEN: usize = 64;
/// Descriptors of one batch at most (a batch ends on a packet boundary).
pub const BATCH_DESCS: usize = BATCH_LEN + MAX_FRAGMENTS;
/// Frames one [`Receive::receive`] hands out at most: those of packets, and those without one.
pub const TAKEN_DESCS: usize = 2 * BATCH_DESCS;

/// One piece of a packet: the frame, where the data starts in it, and how long it is.
#[derive(Debug)]
pub struct Fragment {
    /// The frame's token.
    pub frame: Frame,
    /// First byte of data in the frame.
    pub offset: u32,
    /// Bytes of data.
    pub len: u32,
}

/// What the receiving side already knows of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hint {
    /// Rule slot and serial that XDP chose; `None` where user space has to match itself.
    pub rule: Option<(u32, u32)>,
    /// The kernel said (PACKET_AUXDATA, TP_STATUS_CSUMNOTREADY) that the UDP checksum is not final.
    pub partial: bool,
}

/// A received packet: 1 to [`MAX_FRAGMENTS`] pieces in order; headers are in the first.
#[derive(Debug)]
pub struct Packet {
    /// The pieces.
    pub fragments: ArrayVec<Fragment, MAX_FRAGMENTS>,
    /// What the receiving side knows.
    pub hint: Hint,
}

/// Packets of one turn, in order of arrival.
pub type Batch = ArrayVec<Packet, BATCH_LEN>;

/// Receiving half of a port.
pub trait Receive {
    /// Whether the kernel's rings outlive the worker (AF_XDP), so that a successor finds the same packets and frames.
    fn survives(&self) -> bool;
    /// Takes up to `max` (≤ [`BATCH_LEN`]) packets into `batch` (empty on entry), whole packets only. The entries stay
    /// in the kernel's ring until [`Receive::release`], so that a successor finds them again after a kill.
    /// Packets that can't be taken (more than [`MAX_FRAGMENTS`] pieces, an invalid descriptor) are counted in
    /// [`ReceiveCounters`], their frames go to `spare`.
    fn receive(&mut self, umem: &Umem, max: usize, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>);
    /// Gives the ring entries of the last [`Receive::receive`] back to the kernel. The last store of a turn.
    fn release(&mut self);
    /// Entries of the receive ring that the last [`Receive::receive`] took; 0 where the ring dies with the worker.
    fn taken(&self) -> u32;
    /// Says that a predecessor had taken `count` entries, so that [`Receive::release`] gives those back.
    fn retake(&mut self, count: u32);
    /// Free-running consumer index of the receive ring (for the journal); 0 where the ring dies with the worker.
    fn position(&self) -> u32;
    /// Frames the port wants to have standing with the kernel.
    fn depth(&self) -> u32;
    /// Frames standing with the kernel for receiving: free ones and those holding packets not yet released.
    fn standing(&self) -> u32;
    /// Writes up to `max` frames from the top of the pool (without taking them) to where the kernel finds free frames,
    /// as far as the port wants more of them, and says how many. Nothing is visible before [`Receive::publish_refill`].
    fn stage_refill(&mut self, umem: &Umem, pool: &Pool, max: u32) -> u32;
    /// Free-running index of published free frames.
    fn refill_position(&self) -> u32;
    /// Makes the staged frames visible to the kernel.
    fn publish_refill(&mut self, count: u32);
    /// Counters of this half.
    fn counters(&self) -> ReceiveCounters;
    /// Ends receiving where what is taken would die with this process; go on with [`Receive::receive`] until
    /// [`Receive::is_stopped`]. Nothing happens where the rings survive. An error: call again.
    fn stop(&mut self) -> Result<(), nix::errno::Errno> {
        Ok(())
    }
    /// Whether nothing more will come that would die with this process.
    fn is_stopped(&mut self) -> bool {
        true
    }
    /// Puts frames that would die with this process back into the pool and publishes it, once stopped. Returns how many.
    fn take_back(&mut self, _pool: &mut Pool) -> u32 {
        0
    }
}

/// Cumulative counters of a receiving half since the worker adopted it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReceiveCounters {
    /// Packets dropped because they had more than [`MAX_FRAGMENTS`] pieces or were larger than their buffer.
    pub too_big: u64,
    /// Descriptors the UMEM refused.
    pub invalid: u64,
    /// Packets the kernel dropped because no free frame stood in the fill ring (or no buffer was posted).
    pub kernel_dropped: u64,
    /// Packets the kernel dropped because the receive ring was full.
    pub ring_full: u64,
}

/// What a wake-up said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kick {
    /// Done, or nothing to do.
    Done,
    /// Benign: try again next turn (EAGAIN, EBUSY, ENOBUFS).
    Again,
    /// The interface is down (ENETDOWN).
    Down,
    /// The interface is gone for this socket (ENXIO).
    Gone,
}

/// Label of a packet that a predecessor has put.
pub const UNKNOWN_LABEL: u32 = MAX_LABEL;

/// A packet the kernel refused for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    /// What [`RawDesc::label`] said of it, or [`UNKNOWN_LABEL`].
    pub label: u32,
    /// Its bytes.
    pub len: u32,
}

/// What a coalescing sending half says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Give it to me.
    Take,
    /// Send it by the port's other half.
    Direct,
    /// After the next flush.
    Wait,
}

/// Sending half of a port.
pub trait Transmit {
    /// Whether the kernel's rings outlive the worker (AF_XDP).
    fn survives(&self) -> bool;
    /// Descriptors that can be put before the next [`Transmit::publish`] without overrunning the ring.
    fn free(&mut self) -> u32;
    /// Writes one descriptor. The caller keeps within [`Transmit::free`]. The label in its options stays with us.
    fn put(&mut self, desc: RawDesc);
    /// Makes the put descriptors visible to the kernel.
    fn publish(&mut self);
    /// Wakes the kernel if that is needed. At most a bounded number of system calls.
    fn kick(&mut self) -> Result<Kick, nix::errno::Errno>;
    /// Takes up to `out`'s capacity completed frames' UMEM addresses. They stay in the kernel's ring until
    /// [`Transmit::reaped`].
    fn reap(&mut self, out: &mut ArrayVec<u64, BATCH_LEN>);
    /// Gives the oldest `count` completed entries back to the kernel.
    fn reaped(&mut self, count: u32);
    /// Free-running producer index of the send ring.
    fn position(&self) -> u32;
    /// Free-running consumer index of the completion ring.
    fn reap_position(&self) -> u32;
    /// Frames handed to the kernel and not yet reaped.
    fn outstanding(&self) -> u32;
    /// The next packet that the kernel refused for good, each once.
    fn refused(&mut self) -> Option<Refusal>;
    /// Whether everything put has left, so that another half may send what comes behind it.
    fn is_flushed(&mut self) -> bool;
    /// A coalescing half: a new window of packets begins, with at most one super-frame's packets of each output.
    fn begin_window(&mut self) {}
    /// A coalescing half: what becomes of the packet that begins with this descriptor. A bundle has no other way.
    fn admit(&mut self, _desc: RawDesc) -> Admission {
        Admission::Take
    }
    /// A coalescing half: says of each output of a bundle, by its headers' descriptor, that it will not get the packet of `len` bytes.
    fn disappoint(&self, _headers: RawDesc, _len: u32, _each: &mut dyn FnMut(Refusal)) {}
    /// A coalescing half: whether the device refuses super-frames.
    fn is_off(&self) -> bool {
        false
    }
    /// A predecessor had given this frame back to us, and we to the return ring: it is held no longer.
    fn forget(&mut self, _address: u64) {}
}
