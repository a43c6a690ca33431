//! The work segment of a worker: everything it would take into the grave, in shared memory.
//!
//! ```text
//! IDLE ─ arm: positions of all rings, pool length, epoch, original headers ─▶ ARMED
//! ARMED ─ copies, rewrites, egress ring entries; publish each egress ring ─ freed frames, tally ─▶ COMMIT
//! COMMIT ─ freed frames to the pool, pool length, counters, RX consumer index LAST ─▶ IDLE
//! MOVE: n elements from one place to another: write them, record, publish `to`, publish `from`, IDLE
//! ```
//! A successor (after pidfd: it sees every store of the dead worker, so compiler order suffices) finishes what it finds:
//! ARMED: the same packets again from the saved descriptors, hints and headers (a ring may have died, and a pushed tag
//! overwrites the hint before the packet), with the recorded room and pool, skipping egress rings whose index moved;
//! COMMIT: again, every step of it is idempotent; MOVE: if `to` moved, publish `from`. One journal for each thread:
//! ingress and egress. Must never be written by anybody but that thread.

use super::tally::{Increment, MAX_INCREMENTS};
use crate::frame::{Pool, RawDesc};
use crate::nic::{BATCH_LEN, Hint, TAKEN_DESCS};
use crate::plan::counters::{Counter, MAX_PORTS};
use crate::plan::work::JOURNAL_LEN;
use crate::sys::fuse;
use crate::sys::shared::OutOfMapping;
use crate::sys::{Mapping, SharedArray, SharedWord, SharedWord64};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use std::sync::atomic::compiler_fence;

/// Nothing in hand.
pub const IDLE: u32 = 0;
/// A batch is being processed.
pub const ARMED: u32 = 1;
/// A batch is being committed.
pub const COMMIT: u32 = 2;
/// Elements are being moved between two places.
pub const MOVE: u32 = 3;

/// Header bytes saved of each packet: Ethernet 14 + two tags 8 + IPv4 with options 60 + UDP 8 is 90.
pub const SAVED_LEN: usize = 96;

/// A packet's original header. 96 bytes.
pub type SavedHeader = [u8; SAVED_LEN];
/// The same as it stands in the segment: a volatile access is one for each element, and 96 bytes read one by one were a tenth of a
/// worker's time.
type SavedWords = [u64; SAVED_LEN / 8];

/// What the receiving side knew of a packet. 12 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
struct SavedHint {
    /// Bit 0: a rule was named; bit 1: the checksum is partial.
    flags: u32,
    slot: u32,
    serial: u32,
}

/// What is fixed for the batch in hand. 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Armed {
    /// Port the batch came in by.
    pub port: u32,
    /// Its RX consumer index.
    pub rx_position: u32,
    /// Packets.
    pub packet_count: u32,
    /// Length of the pool.
    pub pool_len: u32,
    /// Epoch of the rules it is processed by.
    pub epoch: u32,
    /// Frames freed (COMMIT).
    pub freed_count: u32,
    /// Length of the pool without the frames taken, before the freed ones go in (COMMIT).
    pub pool_after: u32,
    /// Entries of the tally (COMMIT).
    pub increment_count: u32,
    /// Descriptors saved of its packets.
    pub desc_count: u32,
    /// Descriptors saved behind those: frames received with no packet in them.
    pub spare_count: u32,
    /// Entries of the receive ring it takes.
    pub slot_count: u32,
    /// Always 0.
    pub zero: u32,
    /// When it was armed, in 1/64 ns, where rates are limited.
    pub now: u64,
    /// Ports (bits) by which several outputs' packets go as bundles.
    pub bundling: u64,
}

/// One egress ring at the moment of arming. 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct EgressMark {
    /// Published producer index.
    pub position: u32,
    /// Free slots counted on.
    pub room: u32,
}

/// A move between two places. 24 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Move {
    /// What is moved: one of the `MOVE_*` kinds.
    pub kind: u32,
    /// Port concerned.
    pub port: u32,
    /// Cursor of the place elements leave.
    pub from: u32,
    /// Elements that leave.
    pub from_count: u32,
    /// Cursor of the place they go to.
    pub to: u32,
    /// Elements that arrive (fewer where some were invalid).
    pub to_count: u32,
}

/// Pool to a port's fill ring.
pub const MOVE_REFILL: u32 = 1;
/// Return ring to pool.
pub const MOVE_RECYCLE: u32 = 2;
/// Egress ring to a port's TX ring.
pub const MOVE_SEND: u32 = 3;
/// A port's completion ring to the return ring.
pub const MOVE_REAP: u32 = 4;
/// Egress ring to the return ring (the interface is gone).
pub const MOVE_DISCARD: u32 = 5;
/// Egress ring to a coalescing half, which dies with the worker and sends nothing before the ring was released.
pub const MOVE_COALESCE: u32 = 6;
/// What a coalescing half has finished to the return ring.
pub const MOVE_REAP_COALESCED: u32 = 7;

/// More elements than any move has.
const MAX_MOVE: u32 = 1 << 16;

/// Where a journal's state stands (u32).
pub const STATE: usize = 0;
const ATTEMPTS: usize = 4;
/// Where the packet stands that is being processed (u32).
pub const CURSOR: usize = 8;
/// Where the count of settled counters stands (u32).
pub const APPLIED: usize = 12;
const POISON: usize = 16;
const TARGET: usize = 32;
const ARMED_AT: usize = 64;
const MOVE_AT: usize = 128;
const MARKS_AT: usize = 256;
const FREED_AT: usize = MARKS_AT + MAX_PORTS * 8;
/// Where the saved headers begin.
pub const SAVED_AT: usize = FREED_AT + 1024;
const DESCS_AT: usize = SAVED_AT + BATCH_LEN * SAVED_LEN;
const HINTS_AT: usize = DESCS_AT + TAKEN_DESCS * size_of::<RawDesc>();
const INCREMENTS_AT: usize = (HINTS_AT + BATCH_LEN * size_of::<SavedHint>()).next_multiple_of(64);
const _: () = assert!(TAKEN_DESCS * 4 <= 1024);
const _: () = assert!(INCREMENTS_AT + MAX_INCREMENTS * size_of::<Increment>() <= JOURNAL_LEN);

/// The journal of one thread of a worker.
#[derive(Debug)]
pub struct Journal {
    state: SharedWord,
    attempts: SharedWord,
    cursor: SharedWord,
    applied: SharedWord,
    poison: SharedWord64,
    target: SharedArray<Counter>,
    armed: SharedArray<Armed>,
    moving: SharedArray<Move>,
    marks: SharedArray<EgressMark>,
    freed: SharedArray<u32>,
    saved: SharedArray<SavedWords>,
    descs: SharedArray<RawDesc>,
    hints: SharedArray<SavedHint>,
    increments: SharedArray<Increment>,
}

impl Journal {
    /// The journal at `offset` of a work segment.
    pub fn attach(m: &Arc<Mapping>, offset: usize) -> Result<Self, OutOfMapping> {
        Ok(Self {
            state: SharedWord::new(m, offset + STATE)?,
            attempts: SharedWord::new(m, offset + ATTEMPTS)?,
            cursor: SharedWord::new(m, offset + CURSOR)?,
            applied: SharedWord::new(m, offset + APPLIED)?,
            poison: SharedWord64::new(m, offset + POISON)?,
            target: SharedArray::new(m, offset + TARGET, 2)?,
            armed: SharedArray::new(m, offset + ARMED_AT, 1)?,
            moving: SharedArray::new(m, offset + MOVE_AT, 1)?,
            marks: SharedArray::new(m, offset + MARKS_AT, MAX_PORTS)?,
            freed: SharedArray::new(m, offset + FREED_AT, TAKEN_DESCS)?,
            saved: SharedArray::new(m, offset + SAVED_AT, BATCH_LEN)?,
            descs: SharedArray::new(m, offset + DESCS_AT, TAKEN_DESCS)?,
            hints: SharedArray::new(m, offset + HINTS_AT, BATCH_LEN)?,
            increments: SharedArray::new(m, offset + INCREMENTS_AT, MAX_INCREMENTS)?,
        })
    }

    /// What was going on.
    pub fn state(&self) -> u32 {
        self.state.load(Acquire)
    }

    /// Notes one more attempt at the batch that is armed; returns how many there have been.
    pub fn attempt(&self) -> u32 {
        let attempts = self.attempts.load(Acquire).saturating_add(1);
        self.attempts.store(attempts, Release);
        fuse::stored();
        attempts
    }

    /// Packets (bits) of the armed batch that are to be dropped as poison.
    pub fn poison(&self) -> u64 {
        self.poison.load(Acquire)
    }

    /// Marks the packet at the cursor as poison.
    pub fn poison_at_cursor(&self) {
        let bit = 1u64.checked_shl(self.cursor.load(Acquire)).unwrap_or(0);
        self.poison.store(self.poison() | bit, Release);
    }

    /// Says which packet of the batch is being processed.
    #[inline]
    pub fn at(&self, packet: usize) {
        self.cursor.store(packet as u32, Release);
    }

    /// Saves a packet's header bytes (at most [`SAVED_LEN`]) and its hint.
    #[inline]
    pub fn save(&self, packet: usize, header: &SavedHeader, hint: Hint) {
        self.saved.set(packet, bytemuck::must_cast(*header));
        let (slot, serial) = hint.rule.unwrap_or_default();
        self.hints.set(packet, SavedHint { flags: u32::from(hint.rule.is_some()) | u32::from(hint.partial) << 1, slot, serial });
    }

    /// The saved hint of a packet.
    pub fn hint(&self, packet: usize) -> Hint {
        let SavedHint { flags, slot, serial } = self.hints.get(packet);
        Hint { rule: (flags & 1 != 0).then_some((slot, serial)), partial: flags & 2 != 0 }
    }

    /// Saves where a piece of a packet lies.
    #[inline]
    pub fn save_desc(&self, at: usize, desc: RawDesc) {
        self.descs.set(at, desc);
    }

    /// Where a piece of a packet lies.
    pub fn desc(&self, at: usize) -> RawDesc {
        self.descs.get(at)
    }

    /// The saved header of a packet.
    #[inline]
    pub fn saved(&self, packet: usize) -> SavedHeader {
        bytemuck::must_cast(self.saved.get(packet))
    }

    /// Records an egress ring before the batch.
    #[inline]
    pub fn mark(&self, port: usize, mark: EgressMark) {
        self.marks.set(port, mark);
    }

    /// The egress ring as it was recorded.
    #[inline]
    pub fn marked(&self, port: usize) -> EgressMark {
        self.marks.get(port)
    }

    /// IDLE → ARMED. Headers and marks have been written.
    #[inline]
    pub fn arm(&self, armed: Armed) {
        self.poison.store(0, Release);
        self.attempts.store(0, Release);
        self.armed.set(0, armed);
        self.enter(ARMED);
    }

    /// The batch in hand. No count is larger than what there is room for, whatever a dead worker has left there.
    #[inline]
    pub fn armed(&self) -> Armed {
        let armed = self.armed.get(0);
        let (most, desc_count) = (TAKEN_DESCS as u32, armed.desc_count.min(TAKEN_DESCS as u32));
        Armed {
            desc_count,
            spare_count: armed.spare_count.min(most - desc_count),
            freed_count: armed.freed_count.min(most),
            increment_count: armed.increment_count.min(MAX_INCREMENTS as u32),
            ..armed
        }
    }

    /// ARMED → COMMIT. All egress rings have been published.
    #[inline]
    pub fn begin_commit(&self, armed: Armed, freed: &[u32], tally: &[Increment]) {
        self.freed.set_all(0, freed);
        self.increments.set_all(0, tally);
        self.applied.store(0, Release);
        fuse::stored();
        self.armed.set(0, Armed { freed_count: freed.len() as u32, increment_count: tally.len() as u32, ..armed });
        self.enter(COMMIT);
    }

    /// COMMIT, all but the RX index: freed frames into the pool, its length, the counters. Idempotent.
    #[inline]
    pub fn commit(&self, pool: &mut Pool, counters: &SharedArray<Counter>, put: impl Fn(&mut Pool, u32)) {
        let armed = self.armed();
        pool.set_len(armed.pool_after);
        for index in 0..armed.freed_count {
            put(pool, self.freed.get(index as usize));
        }
        pool.publish();
        self.apply(armed.increment_count, counters);
    }

    /// Adds each entry of the tally exactly once: the new value is stored before the counter, so that a kill between the
    /// two is repaired by storing it again. Two target places in turn: the next target must not overwrite the one that a
    /// successor would store.
    fn apply(&self, count: u32, counters: &SharedArray<Counter>) {
        let mut done = self.applied.load(Acquire);
        if done > 0 && done <= count {
            let last = self.increments.get(done as usize - 1);
            if (last.counter as usize) < counters.len() {
                counters.set(last.counter as usize, self.target.get((done as usize - 1) % 2));
            }
        }
        while done < count {
            let entry = self.increments.get(done as usize);
            if entry.counter as usize >= counters.len() {
                // Not written by a worker that was in its senses.
                done += 1;
                continue;
            }
            let now = counters.get(entry.counter as usize);
            let packets = now.packets.wrapping_add(u64::from(entry.packets));
            let target = Counter { packets, bytes: now.bytes.wrapping_add(entry.bytes) };
            self.target.set(done as usize % 2, target);
            done += 1;
            self.applied.store(done, Release);
            compiler_fence(SeqCst);
            fuse::stored();
            counters.set(entry.counter as usize, target);
        }
    }

    /// IDLE → MOVE. The elements have been written to where they go, but not published.
    #[inline]
    pub fn begin_move(&self, moving: Move) {
        self.moving.set(0, moving);
        self.enter(MOVE);
    }

    /// The move in progress; its counts are none that no move has.
    pub fn moving(&self) -> Move {
        let moving = self.moving.get(0);
        Move { from_count: moving.from_count.min(MAX_MOVE), to_count: moving.to_count.min(MAX_MOVE), ..moving }
    }

    /// Any state → IDLE.
    #[inline]
    pub fn done(&self) {
        self.enter(IDLE);
    }

    /// A successor sees the stores of a dead worker in program order; the fence keeps the compiler from moving the stores
    /// that the new state speaks of before it (Release alone forbids only the other direction).
    #[inline]
    fn enter(&self, state: u32) {
        self.state.store(state, Release);
        compiler_fence(SeqCst);
        fuse::stored();
    }
}
