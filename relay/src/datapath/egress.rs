//! The egress turn, for each port: reap → return → drain → transmit → flush.
//!
//! A pure mover: every element of an egress ring goes to that port's TX ring in order, every completed frame to the
//! return ring. It never drops for want of room (the ring fills and the ingress turn drops with a name), never waits, and
//! never lets one port's stall touch another. What the kernel refuses for good is counted here, by output; what stands
//! before an interface that is gone goes straight to the return ring, counted too. Must never read a packet.

use super::journal::{Journal, MOVE_COALESCE, MOVE_DISCARD, MOVE_REAP, MOVE_REAP_COALESCED, MOVE_SEND, Move};
use super::latency::Meter;
use crate::frame::{COALESCE, CONTINUES, FRAME_SIZE, RawDesc};
use crate::nic::{Admission, BATCH_LEN, Kick, Refusal, Transmit};
use crate::plan::counters::{Counter, MAX_OUTPUTS, output_drop};
use crate::plan::fate::OutputDropReason;
use crate::plan::status::{PORT_DOWN, PORT_GONE, PORT_SINGLES, SendReport};
use crate::ring::{Consumer, Producer};
use crate::sys::{SharedArray, fuse};
use arrayvec::ArrayVec;
use std::collections::HashSet;

/// Batches one port sends in a turn at most. An ingress turn stages a batch for each output of a rule, so one batch a turn
/// overflowed the ring of a port with four outputs while packets could have waited in the receive ring (1:4 lost three of
/// four under a backlog). A port that makes no progress takes no second round.
const ROUNDS: usize = 32;
/// Descriptors looked at for one window of a coalescing half.
const WINDOW_DESCS: u32 = 1024;

/// Which half of a port sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// The port's own.
    Direct,
    /// The coalescing one.
    Coalesce,
}

/// A sending port of this worker.
#[derive(Debug)]
pub struct EgressPort<T> {
    /// The port contract.
    pub transmit: T,
    /// The half that sends runs of packets as super-frames, where rules want that. What it takes dies with this process: its
    /// ring is released before the first packet goes, so a kill sends nothing twice.
    pub coalescer: Option<T>,
    /// The half that sent last. The other one may send only when this one has nothing left (order within a flow).
    pub lane: Lane,
    /// Its egress ring.
    pub ring: Consumer<RawDesc>,
    /// Number of the port in the manifest.
    pub number: usize,
    /// What the last wake-up said.
    pub state: PortState,
    /// When the batches in the ring were taken, where that is measured.
    pub meter: Option<Meter>,
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
    /// The device refuses super-frames.
    pub singles: bool,
}

impl PortState {
    fn report(self) -> SendReport {
        let flags = [(self.down, PORT_DOWN), (self.gone, PORT_GONE), (self.singles, PORT_SINGLES)];
        let flags = flags.into_iter().filter(|(is_set, _)| *is_set).fold(0, |flags, (_, flag)| flags | flag);
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
    /// How long packets were in this worker (plan/latency.rs).
    pub latency: SharedArray<u64>,
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
                let position = port.ring.position();
                let mut now = reap(&self.journal, &mut self.returns, port.number, &mut port.transmit, MOVE_REAP);
                now += match port.coalescer {
                    _ if port.state.gone => discard(&self.journal, &mut self.returns, port, &self.books),
                    Some(_) => coalesce_round(&self.journal, &mut self.returns, port, &self.books),
                    None => drain(&self.journal, port),
                };
                let is_gone = port.state.gone;
                flush(&mut port.transmit, &mut port.state, &self.books);
                if let Some(meter) = port.meter.as_mut().filter(|_| port.ring.position() != position) {
                    meter.settle(port.ring.position(), !is_gone, &self.books.latency);
                }
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
        let coalescing = |port: &EgressPort<T>| port.coalescer.as_ref().map_or(0, Transmit::outstanding);
        let mut sending = self.ports.iter_mut().filter(|port| !port.state.down && !port.state.gone);
        sending.any(|port| port.transmit.outstanding() + coalescing(port) > 0 || port.ring.available() > 0)
    }
}

/// Completion ring → return ring.
fn reap<T: Transmit>(journal: &Journal, returns: &mut Producer<u64>, port: usize, half: &mut T, kind: u32) -> usize {
    let mut done: ArrayVec<u64, BATCH_LEN> = ArrayVec::new();
    half.reap(&mut done);
    let count = (done.len() as u32).min(returns.free_for(done.len() as u32));
    if count == 0 {
        return 0;
    }
    for (offset, address) in done.iter().take(count as usize).enumerate() {
        returns.write(offset as u32, *address);
    }
    let (from, to) = (half.reap_position(), returns.position());
    journal.begin_move(Move { kind, port: port as u32, from, from_count: count, to, to_count: count });
    returns.publish(count);
    fuse::stored();
    half.reaped(count);
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

/// One window: egress ring → either half; what the coalescing half has finished → return ring. The other half is flushed after.
fn coalesce_round<T: Transmit>(journal: &Journal, returns: &mut Producer<u64>, port: &mut EgressPort<T>, books: &EgressBooks) -> usize {
    let mut moved = drain_window(journal, port);
    let Some(coalescer) = &mut port.coalescer else { return moved };
    flush(coalescer, &mut port.state, books);
    port.state.singles = coalescer.is_off();
    let mut reaped = BATCH_LEN;
    while reaped == BATCH_LEN {
        reaped = reap(journal, returns, port.number, coalescer, MOVE_REAP_COALESCED);
        moved += reaped;
    }
    moved
}

/// The packets at the head of the egress ring that go by one half → that half. None where the other half is not done yet.
fn drain_window<T: Transmit>(journal: &Journal, port: &mut EgressPort<T>) -> usize {
    let Some(coalescer) = &mut port.coalescer else { return 0 };
    let available = port.ring.available_for(WINDOW_DESCS).min(WINDOW_DESCS);
    if available == 0 {
        return 0;
    }
    let room = [port.transmit.free().min(BATCH_LEN as u32), coalescer.free()];
    let (lane, count) = window(&port.ring, available, room, coalescer);
    let is_clear = lane == port.lane || if port.lane == Lane::Direct { port.transmit.is_flushed() } else { coalescer.is_flushed() };
    if count == 0 || !is_clear {
        return 0;
    }
    port.lane = lane;
    let (half, kind) = if lane == Lane::Direct { (&mut port.transmit, MOVE_SEND) } else { (coalescer, MOVE_COALESCE) };
    (0..count).for_each(|offset| half.put(port.ring.read(offset)));
    let (from, to) = (port.ring.position(), half.position());
    journal.begin_move(Move { kind, port: port.number as u32, from, from_count: count, to, to_count: count });
    half.publish();
    port.ring.release(count);
    fuse::stored();
    journal.done();
    count as usize
}

/// Which half the first packet goes by, and how many descriptors from there on go by the same: whole packets, as far as there is
/// room, and of each output no more than one super-frame's.
fn window<T: Transmit>(ring: &Consumer<RawDesc>, available: u32, [direct, coalesce]: [u32; 2], coalescer: &mut T) -> (Lane, u32) {
    coalescer.begin_window();
    let (mut lane, mut whole, mut is_first) = (None, 0, true);
    for offset in 0..available {
        let desc = ring.read(offset);
        if is_first {
            let admission = if desc.options & COALESCE == 0 { Admission::Direct } else { coalescer.admit(desc) };
            let wanted = match admission {
                Admission::Take => Lane::Coalesce,
                Admission::Direct => Lane::Direct,
                Admission::Wait => break,
            };
            if *lane.get_or_insert(wanted) != wanted {
                break;
            }
        }
        let lane = lane.unwrap_or(Lane::Direct);
        if offset >= if lane == Lane::Direct { direct } else { coalesce } {
            break;
        }
        is_first = !desc.continues();
        if is_first {
            whole = offset + 1;
        }
    }
    (lane.unwrap_or(Lane::Direct), whole)
}

/// Egress ring → return ring: the interface is gone, and its ring will never be emptied by anybody else.
fn discard<T: Transmit>(journal: &Journal, returns: &mut Producer<u64>, port: &mut EgressPort<T>, books: &EgressBooks) -> usize {
    let limit = port.ring.available_for(BATCH_LEN as u32).min(returns.free_for(BATCH_LEN as u32)).min(BATCH_LEN as u32);
    let count = whole_packets(&port.ring, limit);
    if count == 0 {
        return 0;
    }
    let (mut len, mut headers) = (0, None);
    for offset in 0..count {
        let desc = port.ring.read(offset);
        returns.write(offset, desc.addr);
        match desc.is_bundle() {
            true => headers = Some(desc),
            false => len += desc.len,
        }
        if !desc.continues() {
            let len = std::mem::take(&mut len);
            let mut count = |refusal| books.count(&mut port.state, refusal, OutputDropReason::OutputDown);
            match (headers.take(), &port.coalescer) {
                (Some(headers), Some(coalescer)) => coalescer.disappoint(headers, len, &mut count),
                _ => count(Refusal { label: desc.label(), len }),
            }
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
fn flush<T: Transmit>(half: &mut T, state: &mut PortState, books: &EgressBooks) {
    match half.kick() {
        Ok(Kick::Done) => (state.down, state.gone) = (false, false),
        Ok(Kick::Again) => {}
        Ok(Kick::Down) => state.down = true,
        Ok(Kick::Gone) => state.gone = true,
        Err(_) => state.kick_errors += 1,
    }
    while let Some(refusal) = half.refused() {
        books.count(state, refusal, OutputDropReason::SendFailed);
    }
}
