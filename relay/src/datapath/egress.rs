//! The egress turn, for each port: reap → return → drain → transmit → flush.
//!
//! A pure mover: every element of an egress ring goes to that port's TX ring in order, every completed frame to the
//! return ring. It never drops for want of room (the ring fills and the ingress turn drops with a name), never waits, and
//! never lets one port's stall touch another. Must never read a packet.

use super::journal::{Journal, MOVE_REAP, MOVE_SEND, Move};
use crate::frame::{CONTINUES, FRAME_SIZE, RawDesc};
use crate::nic::{BATCH_LEN, Kick, Transmit};
use crate::ring::{Consumer, Producer};
use arrayvec::ArrayVec;

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
}

/// The egress side of a worker.
#[derive(Debug)]
pub struct Egress<T> {
    pub(super) journal: Journal,
    pub(super) ports: Vec<EgressPort<T>>,
    pub(super) returns: Producer<u64>,
}

impl<T: Transmit> Egress<T> {
    /// Puts the parts together; [`Egress::recover`] comes next.
    pub const fn new(journal: Journal, ports: Vec<EgressPort<T>>, returns: Producer<u64>) -> Self {
        Self { journal, ports, returns }
    }

    /// The sending ports.
    pub fn ports(&self) -> &[EgressPort<T>] {
        &self.ports
    }

    /// One turn over all ports. Returns descriptors moved, either way.
    pub fn turn(&mut self) -> usize {
        let mut moved = 0;
        for port in &mut self.ports {
            moved += reap(&self.journal, &mut self.returns, port);
            moved += drain(&self.journal, port);
            flush(port);
        }
        moved
    }

    /// Numbers of the frames standing in egress rings and the return ring (for the recovery of packet ports).
    pub fn standing_frames(&mut self) -> Vec<u32> {
        let mut frames = Vec::new();
        for port in &mut self.ports {
            let count = port.ring.available();
            frames.extend((0..count).map(|offset| (port.ring.read(offset).addr / u64::from(FRAME_SIZE)) as u32));
        }
        let depth = self.returns.capacity() - self.returns.free_for(self.returns.capacity());
        frames.extend((1..=depth).map(|back| (self.returns.published(back) / u64::from(FRAME_SIZE)) as u32));
        frames
    }

    /// Whether any frame is on its way out.
    pub fn is_busy(&mut self) -> bool {
        self.ports.iter_mut().any(|port| port.transmit.outstanding() > 0 || port.ring.available() > 0)
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
        let desc = port.ring.read(offset);
        port.transmit.put(RawDesc { options: desc.options & CONTINUES, ..desc });
    }
    let (from, to) = (port.ring.position(), port.transmit.position());
    journal.begin_move(Move { kind: MOVE_SEND, port: port.number as u32, from, from_count: count, to, to_count: count });
    port.transmit.publish();
    port.ring.release(count);
    journal.done();
    count as usize
}

/// The largest number of descriptors up to `limit` that ends on a packet's end.
fn whole_packets(ring: &Consumer<RawDesc>, limit: u32) -> u32 {
    (0..limit).rev().find(|offset| ring.read(*offset).options & CONTINUES == 0).map_or(0, |offset| offset + 1)
}

fn flush<T: Transmit>(port: &mut EgressPort<T>) {
    match port.transmit.kick() {
        Ok(Kick::Done) => (port.state.down, port.state.gone) = (false, false),
        Ok(Kick::Again) => {}
        Ok(Kick::Down) => port.state.down = true,
        Ok(Kick::Gone) => port.state.gone = true,
        Err(_) => port.state.kick_errors += 1,
    }
}
