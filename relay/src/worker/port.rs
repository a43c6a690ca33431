//! The ports a worker can have, behind one type each for receiving and sending (chosen once a batch, not once a packet).
//!
//! Must never hold logic of its own.

use crate::frame::{Frame, Pool, RawDesc, Umem};
use crate::nic::afpacket::{PacketReceive, PacketTransmit, Reason};
use crate::nic::afxdp::{XskReceive, XskTransmit};
use crate::nic::{Admission, BATCH_DESCS, BATCH_LEN, Batch, Kick, Receive, ReceiveCounters, Refusal, Transmit};
use crate::plan::status::{RUNG_PLAIN, RUNG_URING, RUNG_XSK, RungReport};
use crate::sys::SharedArray;
use arrayvec::ArrayVec;
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd};

/// The place of a port whose interface is missing, for the journal of a predecessor that had it. Never receives.
#[derive(Debug)]
pub struct NoReceive;

impl Receive for NoReceive {
    fn survives(&self) -> bool {
        false
    }

    fn receive(&mut self, _: &Umem, _: usize, _: &mut Batch, _: &mut ArrayVec<Frame, BATCH_DESCS>) {}

    fn release(&mut self) {}

    fn taken(&self) -> u32 {
        0
    }

    fn retake(&mut self, _: u32) {}

    fn position(&self) -> u32 {
        0
    }

    fn depth(&self) -> u32 {
        0
    }

    fn standing(&self) -> u32 {
        0
    }

    fn stage_refill(&mut self, _: &Umem, _: &Pool, _: u32) -> u32 {
        0
    }

    fn refill_position(&self) -> u32 {
        0
    }

    fn publish_refill(&mut self, _: u32) {}

    fn counters(&self) -> ReceiveCounters {
        ReceiveCounters::default()
    }
}

/// Any receiving half.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few values a process; a box would cost the AF_XDP path an indirection")]
pub enum AnyReceive {
    /// None, until the predecessor's work is finished.
    Absent(NoReceive),
    /// AF_XDP.
    Xsk(XskReceive),
    /// AF_PACKET.
    Packet(Box<PacketReceive<SharedArray<u8>>>),
}

/// Any sending half.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few values a process; a box would cost the AF_XDP path an indirection")]
pub enum AnyTransmit {
    /// AF_XDP.
    Xsk(XskTransmit),
    /// AF_PACKET.
    Packet(Box<PacketTransmit<SharedArray<u8>>>),
}

macro_rules! each {
    ($self:expr, $port:ident => $call:expr $(, $also:ident)*) => {
        match $self {
            Self::Xsk($port) => $call,
            Self::Packet($port) => $call,
            $(Self::$also($port) => $call,)*
        }
    };
}

impl AnyReceive {
    /// The rung it runs on.
    pub fn rung(&self) -> RungReport {
        match self {
            Self::Absent(_) | Self::Xsk(_) => RungReport { rung: RUNG_XSK, errno: 0 },
            Self::Packet(port) => packet_rung(port.reason()),
        }
    }

    /// What to poll for packets; nothing where the interface is missing.
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Absent(_) => None,
            Self::Xsk(port) => Some(port.as_fd()),
            Self::Packet(port) => Some(port.as_fd()),
        }
    }

    /// Reads the counters that cost a system call, and returns all.
    pub fn housekeeping(&mut self) -> ReceiveCounters {
        if let Self::Packet(port) = self {
            port.housekeeping();
        }
        self.counters()
    }
}

fn packet_rung(reason: Option<Reason>) -> RungReport {
    match reason {
        None => RungReport { rung: RUNG_URING, errno: 0 },
        Some(Reason::NotWanted) => RungReport { rung: RUNG_PLAIN, errno: 0 },
        Some(Reason::Refused(errno)) => RungReport { rung: RUNG_PLAIN, errno: errno as i32 },
    }
}

impl AnyTransmit {
    /// The rung it runs on.
    pub fn rung(&self) -> RungReport {
        match self {
            Self::Xsk(_) => RungReport { rung: RUNG_XSK, errno: 0 },
            Self::Packet(port) => packet_rung(port.reason()),
        }
    }
}

impl Receive for AnyReceive {
    fn survives(&self) -> bool {
        each!(self, port => port.survives(), Absent)
    }

    fn receive(&mut self, umem: &Umem, max: usize, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        each!(self, port => port.receive(umem, max, batch, spare), Absent);
    }

    fn release(&mut self) {
        each!(self, port => port.release(), Absent);
    }

    fn taken(&self) -> u32 {
        each!(self, port => port.taken(), Absent)
    }

    fn retake(&mut self, count: u32) {
        each!(self, port => port.retake(count), Absent);
    }

    fn position(&self) -> u32 {
        each!(self, port => port.position(), Absent)
    }

    fn standing(&self) -> u32 {
        each!(self, port => port.standing(), Absent)
    }

    fn stage_refill(&mut self, umem: &Umem, pool: &Pool, max: u32) -> u32 {
        each!(self, port => port.stage_refill(umem, pool, max), Absent)
    }

    fn refill_position(&self) -> u32 {
        each!(self, port => port.refill_position(), Absent)
    }

    fn publish_refill(&mut self, count: u32) {
        each!(self, port => port.publish_refill(count), Absent);
    }

    fn depth(&self) -> u32 {
        each!(self, port => port.depth(), Absent)
    }

    fn counters(&self) -> ReceiveCounters {
        each!(self, port => port.counters(), Absent)
    }

    fn stop(&mut self) -> Result<(), Errno> {
        each!(self, port => port.stop(), Absent)
    }

    fn is_stopped(&mut self) -> bool {
        each!(self, port => port.is_stopped(), Absent)
    }

    fn take_back(&mut self, pool: &mut Pool) -> u32 {
        each!(self, port => port.take_back(pool), Absent)
    }
}

impl Transmit for AnyTransmit {
    fn survives(&self) -> bool {
        each!(self, port => port.survives())
    }

    fn free(&mut self) -> u32 {
        each!(self, port => port.free())
    }

    fn put(&mut self, desc: RawDesc) {
        each!(self, port => port.put(desc));
    }

    fn publish(&mut self) {
        each!(self, port => port.publish());
    }

    fn kick(&mut self) -> Result<Kick, Errno> {
        each!(self, port => port.kick())
    }

    fn reap(&mut self, out: &mut ArrayVec<u64, BATCH_LEN>) {
        each!(self, port => port.reap(out));
    }

    fn reaped(&mut self, count: u32) {
        each!(self, port => port.reaped(count));
    }

    fn position(&self) -> u32 {
        each!(self, port => port.position())
    }

    fn reap_position(&self) -> u32 {
        each!(self, port => port.reap_position())
    }

    fn outstanding(&self) -> u32 {
        each!(self, port => port.outstanding())
    }

    fn refused(&mut self) -> Option<Refusal> {
        each!(self, port => port.refused())
    }

    fn is_flushed(&mut self) -> bool {
        each!(self, port => port.is_flushed())
    }

    fn begin_window(&mut self) {
        each!(self, port => port.begin_window());
    }

    fn admit(&mut self, desc: RawDesc) -> Admission {
        each!(self, port => port.admit(desc))
    }

    fn disappoint(&self, headers: RawDesc, len: u32, each: &mut dyn FnMut(Refusal)) {
        each!(self, port => port.disappoint(headers, len, each));
    }

    fn is_off(&self) -> bool {
        each!(self, port => port.is_off())
    }

    fn forget(&mut self, address: u64) {
        each!(self, port => port.forget(address));
    }
}
