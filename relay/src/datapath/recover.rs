//! What a successor finishes of its predecessor's work, before its first turn (states and promises: journal.rs).
//!
//! Must never run twice in one process, and never while the predecessor lives (the supervisor waits for its pidfd).

use super::egress::Egress;
use super::ingress::Ingress;
use super::journal::Armed;
use super::journal::{ARMED, COMMIT, MOVE, MOVE_DISCARD, MOVE_REAP, MOVE_REAP_COALESCED, MOVE_RECYCLE, MOVE_REFILL, MOVE_SEND};
use super::table::Table;
use crate::frame::FRAME_SIZE;
use crate::nic::{Receive, Transmit};
use crate::sys::fuse;
use std::collections::HashSet;

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
                (MOVE_REAP_COALESCED, Some(port)) => {
                    // What the return ring has is held no longer, wherever the ingress thread has put it since.
                    let moved = self.returns.position() == moving.to.wrapping_add(moving.to_count);
                    for back in (1..=moving.to_count).filter(|_| moved) {
                        let address = self.returns.published(back);
                        port.coalescer.iter_mut().for_each(|half| half.forget(address));
                    }
                }
                (MOVE_DISCARD, Some(port)) => {
                    let moved = self.returns.position() == moving.to.wrapping_add(moving.to_count);
                    if moved && port.ring.position() == moving.from {
                        let count = port.ring.available_for(moving.from_count).min(moving.from_count);
                        port.ring.release(count);
                        fuse::stored();
                    }
                }
                (MOVE_SEND, Some(port)) => {
                    // A ring that died had not been kicked yet (that comes after the move): nothing was sent.
                    let published = port.transmit.position() == moving.to.wrapping_add(moving.to_count);
                    if published && port.transmit.survives() && port.ring.position() == moving.from {
                        let count = port.ring.available_for(moving.from_count).min(moving.from_count);
                        port.ring.release(count);
                        fuse::stored();
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
                    let count = self.returns.available_for(moving.from_count).min(moving.from_count);
                    self.returns.release(count);
                    fuse::stored();
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
        self.retake(index, &armed);
        self.finish(index, &armed);
    }

    fn recover_batch(&mut self, table: impl FnOnce(u32) -> Option<Table>) -> u32 {
        let (Some(index), armed) = (self.armed_port(), self.journal.armed()) else { return 0 };
        if self.journal.attempt() >= MAX_ATTEMPTS {
            self.journal.poison_at_cursor();
        }
        let Some(table) = table(armed.epoch) else { return 0 };
        self.rearm();
        self.take_again(&armed);
        self.retake(index, &armed);
        self.process_batch(index, &table, Some(self.journal.poison()), &armed);
        self.commit(index, armed);
        armed.packet_count
    }

    /// The ring entries of the batch are ours again, unless they were released.
    fn retake(&mut self, index: usize, armed: &Armed) {
        if let Some(port) = self.ports.get_mut(index)
            && port.receive.survives()
            && port.receive.position() == armed.rx_position
        {
            port.receive.retake(armed.slot_count);
        }
    }

    /// Takes back the frames of rings that died with the worker. `standing`: frames found in egress rings.
    ///
    /// A kill in here is harmless: frames stay marked until the pool that has them is published.
    pub fn reclaim(&mut self, standing: &HashSet<u32>) -> u32 {
        let held: std::collections::BTreeSet<u32> = self.held.frames().chain(self.held_by_senders.frames()).collect();
        if held.is_empty() {
            return 0;
        }
        let in_pool: HashSet<u32> = (0..self.pool.len()).map(|position| self.pool.peek(position)).collect();
        let before = self.pool.len();
        for frame in held.iter().filter(|frame| !in_pool.contains(frame) && !standing.contains(frame)) {
            if let Ok(frame) = self.umem.claim_index(*frame) {
                self.pool.put(frame);
            }
        }
        self.pool.publish();
        for frame in &held {
            self.held.clear(*frame);
            self.held_by_senders.clear(*frame);
        }
        self.pool.len() - before
    }

    /// Frames of the batch that the journal has in hand; they get their fate by the recovery.
    pub fn frames_in_hand(&self) -> HashSet<u32> {
        if !matches!(self.journal.state(), ARMED | COMMIT) {
            return HashSet::new();
        }
        let armed = self.journal.armed();
        let frame = |at: u32| (self.journal.desc(at as usize).addr / u64::from(FRAME_SIZE)) as u32;
        (0..armed.desc_count + armed.spare_count).map(frame).collect()
    }

    /// Puts frames that are in no ring any more into the pool, but for those that stand somewhere all the same, and lets go of
    /// the ports that only the recovery needed. Comes after it. Returns how many frames.
    ///
    /// A kill in here is harmless: until the first turn nobody takes a frame out of the pool.
    pub fn bury(&mut self, frames: &HashSet<u32>, standing: &HashSet<u32>, is_absent: impl Fn(usize) -> bool) -> u32 {
        self.ports.retain(|port| !is_absent(port.number));
        let in_pool: HashSet<u32> = (0..self.pool.len()).map(|position| self.pool.peek(position)).collect();
        let before = self.pool.len();
        for frame in frames.iter().filter(|frame| !in_pool.contains(frame) && !standing.contains(frame)) {
            if let Ok(frame) = self.umem.claim_index(*frame) {
                self.pool.put(frame);
            }
        }
        self.pool.publish();
        self.pool.len() - before
    }
}
