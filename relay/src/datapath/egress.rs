//! The egress turn, for each port: reap → return → drain → transmit → flush.
//!
//! A pure mover: every element of an egress ring goes to that port's TX ring in order, every completed frame to the
//! return ring. It never drops for want of room (the ring fills and the ingress turn drops with a name), never waits, and
//! never lets one port's stall touch another. What the kernel refuses for good is counted here, by output; what stands
//! before an interface that is gone goes straight to the return ring, counted too. Must never read a packet.

use super::journal::{Journal, MOVE_DISCARD, MOVE_REAP, MOVE_SEND, Move};
use crate::frame::{CONTINUES, FRAME_SIZE, RawDesc};
use crate::nic::{BATCH_LEN, Kick, Refusal, Transmit};
use crate::plan::counters::{Counter, MAX_OUTPUTS, output_drop};
use crate::plan::fate::OutputDropReason;
use crate::plan::status::{PORT_DOWN, PORT_GONE, SendReport};
use crate::ring::{Consumer, Producer};
use crate::sys::{SharedArray, fuse};
use arrayvec::ArrayVec;
use std::collections::HashSet;

/// Batches one port sends in a turn at most. An ingress turn stages a batch for each output of a rule, so one batch a turn
/// overflowed the ring of a port with four outputs while packets could have waited in the receive ring (1:4 lost three of
/// four under a backlog). A port that makes no progress takes no second round.
const ROUNDS: usize = 32;

/// A sending port of this worker.
#[derive(Debug)]
pub struct EgressPort<T> {
    /// The port contract.
    pub transmit: T,
    /// Its egress ring.
    pub ring: Consumer<RawDesc>,
    /// Number of the port in the manifest.
    pub number: usize,
    /// What the last wake-up said.
    pub state: PortState,
}

/// Health of a sending port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortState {
    /// The interface is down.
    pub down: bool,
    /// The interface is gone for this socket.
    pub gone: bool,
    /// Wake-ups that failed with an error that is neither benign nor a state.
    pub kick_errors: u64,
    /// Packets that were handed over and will never be sent.
    pub refused: u64,
}

impl PortState {
    fn report(self) -> SendReport {
        let flags = if self.down { PORT_DOWN } else { 0 } | if self.gone { PORT_GONE } else { 0 };
        SendReport { kick_errors: self.kick_errors, refused: self.refused, flags, zero: 0 }
    }
}

/// Where the egress side writes what it sees. Its thread is the only writer.
#[derive(Debug)]
pub struct EgressBooks {
    /// Drops by output, of packets that an ingress thread has counted as sent.
    pub counters: SharedArray<Counter>,
    /// Health by port.
    pub ports: SharedArray<SendReport>,
}

impl EgressBooks {
    fn count(&self, state: &mut PortState, refusal: Refusal, reason: OutputDropReason) {
        state.refused += 1;
        if (refusal.label as usize) < MAX_OUTPUTS {
            let index = output_drop(refusal.label as usize, reason) as usize;
            let Counter { packets, bytes } = self.counters.get(index);
            self.counters.set(index, Counter { packets: packets + 1, bytes: bytes + u64::from(refusal.len) });
        }
    }
}

/// The egress side of a worker.
#[derive(Debug)]
pub struct Egress<T> {
    pub(super) journal: Journal,
    pub(super) ports: Vec<EgressPort<T>>,
    pub(super) returns: Producer<u64>,
    books: EgressBooks,
}

impl<T: Transmit> Egress<T> {
    /// Puts the parts together; [`Egress::recover`] comes next.
    pub fn new(journal: Journal, mut ports: Vec<EgressPort<T>>, returns: Producer<u64>, books: EgressBooks) -> Self {
        for port in &mut ports {
            let SendReport { kick_errors, refused, .. } = books.ports.get(port.number);
            port.state = PortState { kick_errors, refused, ..PortState::default() };
        }
        Self { journal, ports, returns, books }
    }

    /// The sending ports.
    pub fn ports(&self) -> &[EgressPort<T>] {
        &self.ports
    }

    /// One turn over all ports. Returns descriptors moved, either way.
    pub fn turn(&mut self) -> usize {
        let mut moved = 0;
        for port in &mut self.ports {
            let before = port.state;
            for _ in 0..ROUNDS {
                let mut now = reap(&self.journal, &mut self.returns, port);
                now +=
                    if port.state.gone { discard(&self.journal, &mut self.returns, port, &self.books) } else { drain(&self.journal, port) };
                flush(port, &self.books);
                moved += now;
                if now == 0 || port.ring.available() == 0 {
                    break;
                }
            }
            if port.state != before {
                self.books.ports.set(port.number, port.state.report());
            }
        }
        moved
    }

    /// Numbers of the frames standing in egress rings and the return ring (for the recovery of packet ports).
    pub fn standing_frames(&mut self) -> HashSet<u32> {
        let mut frames = HashSet::new();
        for port in &mut self.ports {
            let count = port.ring.available_for(port.ring.capacity());
            frames.extend((0..count).map(|offset| (port.ring.read(offset).addr / u64::from(FRAME_SIZE)) as u32));
        }
        let depth = self.returns.capacity() - self.returns.free_for(self.returns.capacity());
        frames.extend((1..=depth).map(|back| (self.returns.published(back) / u64::from(FRAME_SIZE)) as u32));
        frames
    }

    /// Whether any frame is on its way out. What stands before an interface that is down or gone is not: it waits for no one.
    pub fn is_busy(&mut self) -> bool {
        let mut sending = self.ports.iter_mut().filter(|port| !port.state.down && !port.state.gone);
        sending.any(|port| port.transmit.outstanding() > 0 || port.ring.available() > 0)
    }
}

/// Completion ring → return ring.
fn reap<T: Transmit>(journal: &Journal, returns: &mut Producer<u64>, port: &mut EgressPort<T>) -> usize {
    let mut done: ArrayVec<u64, BATCH_LEN> = ArrayVec::new();
    port.transmit.reap(&mut done);
    let count = (done.len() as u32).min(returns.free_for(done.len() as u32));
    if count == 0 {
        return 0;
    }
    for (offset, address) in done.iter().take(count as usize).enumerate() {
        returns.write(offset as u32, *address);
    }
    let (from, to) = (port.transmit.reap_position(), returns.position());
    journal.begin_move(Move { kind: MOVE_REAP, port: port.number as u32, from, from_count: count, to, to_count: count });
    returns.publish(count);
    fuse::stored();
    port.transmit.reaped(count);
    journal.done();
    count as usize
}

/// Egress ring → TX ring, whole packets only.
fn drain<T: Transmit>(journal: &Journal, port: &mut EgressPort<T>) -> usize {
    let available = port.ring.available_for(BATCH_LEN as u32);
    if available == 0 {
        return 0;
    }
    let limit = available.min(port.transmit.free()).min(BATCH_LEN as u32);
    let count = whole_packets(&port.ring, limit);
    if count == 0 {
        return 0;
    }
    for offset in 0..count {
        port.transmit.put(port.ring.read(offset));
    }
    let (from, to) = (port.ring.position(), port.transmit.position());
    journal.begin_move(Move { kind: MOVE_SEND, port: port.number as u32, from, from_count: count, to, to_count: count });
    port.transmit.publish();
    port.ring.release(count);
    fuse::stored();
    journal.done();
    count as usize
}

/// Egress ring → return ring: the interface is gone, and its ring will never be emptied by anybody else.
fn discard<T: Transmit>(journal: &Journal, returns: &mut Producer<u64>, port: &mut EgressPort<T>, books: &EgressBooks) -> usize {
    let limit = port.ring.available_for(BATCH_LEN as u32).min(returns.free_for(BATCH_LEN as u32)).min(BATCH_LEN as u32);
    let count = whole_packets(&port.ring, limit);
    if count == 0 {
        return 0;
    }
    let mut len = 0;
    for offset in 0..count {
        let desc = port.ring.read(offset);
        returns.write(offset, desc.addr);
        len += desc.len;
        if !desc.continues() {
            let refusal = Refusal { label: desc.label(), len: std::mem::take(&mut len) };
            books.count(&mut port.state, refusal, OutputDropReason::OutputDown);
        }
    }
    let (from, to) = (port.ring.position(), returns.position());
    journal.begin_move(Move { kind: MOVE_DISCARD, port: port.number as u32, from, from_count: count, to, to_count: count });
    returns.publish(count);
    fuse::stored();
    port.ring.release(count);
    fuse::stored();
    journal.done();
    count as usize
}

/// The largest number of descriptors up to `limit` that ends on a packet's end.
fn whole_packets(ring: &Consumer<RawDesc>, limit: u32) -> u32 {
    (0..limit).rev().find(|offset| ring.read(*offset).options & CONTINUES == 0).map_or(0, |offset| offset + 1)
}

/// Wakes the kernel, and counts what it refused.
fn flush<T: Transmit>(port: &mut EgressPort<T>, books: &EgressBooks) {
    match port.transmit.kick() {
        Ok(Kick::Done) => (port.state.down, port.state.gone) = (false, false),
        Ok(Kick::Again) => {}
        Ok(Kick::Down) => port.state.down = true,
        Ok(Kick::Gone) => port.state.gone = true,
        Err(_) => port.state.kick_errors += 1,
    }
    while let Some(refusal) = port.transmit.refused() {
        books.count(&mut port.state, refusal, OutputDropReason::SendFailed);
    }
}
