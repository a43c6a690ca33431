//! What a successor finishes of its predecessor's work, before its first turn (states and promises: journal.rs).
//!
//! Must never run twice in one process, and never while the predecessor lives (the supervisor waits for its pidfd).

use super::egress::Egress;
use super::ingress::Ingress;
use super::journal::{ARMED, COMMIT, MOVE, MOVE_REAP, MOVE_RECYCLE, MOVE_REFILL, MOVE_SEND};
use super::table::Table;
use crate::frame::FRAME_SIZE;
use crate::nic::{Receive, Transmit};

/// The same batch is processed this many times before the packet at its cursor is taken for poison (DECISIONS §9).
const MAX_ATTEMPTS: u32 = 3;

/// What a recovery found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Journal state of the ingress thread.
    pub ingress_state: u32,
    /// Journal state of the egress thread.
    pub egress_state: u32,
    /// Packets of the batch that was processed again.
    pub replayed: u32,
    /// Frames taken back from rings that died with the worker.
    pub reclaimed: u32,
}

impl<T: Transmit> Egress<T> {
    /// Finishes a move. Returns the state that was found.
    pub fn recover(&mut self) -> u32 {
        let state = self.journal.state();
        if state == MOVE {
            let moving = self.journal.moving();
            let port = self.ports.iter_mut().find(|port| port.number as u32 == moving.port);
            match (moving.kind, port) {
                (MOVE_REAP, Some(port)) => {
                    let moved = self.returns.position() == moving.to.wrapping_add(moving.to_count);
                    if moved && port.transmit.survives() && port.transmit.reap_position() == moving.from {
                        port.transmit.reaped(moving.from_count);
                    }
                }
                (MOVE_SEND, Some(port)) => {
                    // A ring that died may have sent already: never twice, so the descriptors count as moved.
                    let moved = !port.transmit.survives() || port.transmit.position() == moving.to.wrapping_add(moving.to_count);
                    if moved && port.ring.position() == moving.from {
                        port.ring.available_for(moving.from_count);
                        port.ring.release(moving.from_count);
                    }
                }
                _ => {}
            }
        }
        self.journal.done();
        state
    }
}

impl<R: Receive> Ingress<R> {
    /// Finishes a move, a commit or a batch. `table` gives the rules of the epoch the batch was armed under.
    pub fn recover(&mut self, table: impl FnOnce(u32) -> Option<Table>) -> (u32, u32) {
        let state = self.journal.state();
        let mut replayed = 0;
        match state {
            MOVE => self.recover_move(),
            COMMIT => self.recover_commit(),
            ARMED => replayed = self.recover_batch(table),
            _ => {}
        }
        self.journal.done();
        (state, replayed)
    }

    fn recover_move(&mut self) {
        let moving = self.journal.moving();
        match moving.kind {
            MOVE_RECYCLE => {
                let moved = self.pool.len() == moving.to.wrapping_add(moving.to_count);
                if moved && self.returns.position() == moving.from {
                    self.returns.available_for(moving.from_count);
                    self.returns.release(moving.from_count);
                }
            }
            MOVE_REFILL => {
                let port = self.ports.iter().find(|port| port.number as u32 == moving.port);
                let published = moving.to.wrapping_add(moving.to_count);
                if port.is_some_and(|port| port.receive.survives() && port.receive.refill_position() == published) {
                    self.pool.set_len(moving.from.saturating_sub(moving.from_count));
                    self.pool.publish();
                }
            }
            _ => {}
        }
    }

    fn armed_port(&self) -> Option<usize> {
        let number = self.journal.armed().port as usize;
        self.ports.iter().position(|port| port.number == number)
    }

    fn recover_commit(&mut self) {
        let Some(index) = self.armed_port() else { return };
        let armed = self.journal.armed();
        self.release_published();
        let survives = self.ports.get(index).is_some_and(|port| port.receive.survives());
        if survives && self.ports.get(index).is_some_and(|port| port.receive.position() == armed.rx_position) {
            self.receive_again(index, armed.packet_count as usize);
            self.forget_batch();
        }
        self.finish(index);
    }

    fn recover_batch(&mut self, table: impl FnOnce(u32) -> Option<Table>) -> u32 {
        let (Some(index), armed) = (self.armed_port(), self.journal.armed()) else { return 0 };
        self.release_published();
        if !self.ports.get(index).is_some_and(|port| port.receive.survives()) {
            return 0;
        }
        if self.journal.attempt() >= MAX_ATTEMPTS {
            self.journal.poison_at_cursor();
        }
        let Some(table) = table(armed.epoch) else { return 0 };
        self.rearm();
        self.receive_again(index, armed.packet_count as usize);
        self.process_batch(index, &table, Some(self.journal.poison()));
        self.commit(index, armed);
        armed.packet_count
    }

    /// Frames that the batch in hand has put into egress rings are no longer held by the port they came from.
    fn release_published(&mut self) {
        for (port, ring) in self.egress.iter().enumerate() {
            let Some(ring) = ring else { continue };
            let mark = self.journal.marked(port);
            for back in 1..=ring.position().wrapping_sub(mark.position).min(ring.capacity()) {
                let address = ring.published(back).addr;
                self.held.clear((address / u64::from(FRAME_SIZE)) as u32);
            }
        }
    }

    /// Takes back the frames of rings that died with the worker. `standing`: frames found in egress rings.
    pub fn reclaim(&mut self, standing: &[u32]) -> u32 {
        let pool_len = self.pool.len();
        let in_pool: std::collections::HashSet<u32> = (0..pool_len).map(|position| self.pool.peek(position)).collect();
        let held: std::collections::BTreeSet<u32> = self.held.frames().chain(self.held_by_senders.frames()).collect();
        let mut count = 0;
        for frame in held {
            self.held.clear(frame);
            self.held_by_senders.clear(frame);
            if in_pool.contains(&frame) || standing.contains(&frame) {
                continue;
            }
            if let Ok(frame) = self.umem.claim_index(frame) {
                self.pool.put(frame);
                count += 1;
            }
        }
        self.pool.publish();
        count
    }
}
