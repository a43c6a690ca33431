//! The work segment of a worker: where its journals, pool, held map and rings lie.
//!
//! Plain arithmetic; must never touch the memory.

use super::counters::MAX_PORTS;
use crate::frame::Pool;

/// Where the segment says which burial of orphaned frames was the last (u32; the word at 0 says that it has been used).
pub const BURIED_AT: usize = 64;
/// Bytes of one journal (datapath/journal.rs asserts that its parts fit).
pub const JOURNAL_LEN: usize = 160 * 1024;

/// Where everything lies in a work segment.
#[derive(Clone, Copy, Debug)]
pub struct WorkLayout {
    /// Journal of the ingress thread.
    pub ingress_journal: usize,
    /// Journal of the egress thread.
    pub egress_journal: usize,
    /// The pool.
    pub pool: usize,
    /// One byte for each frame: whether a receiving packet port holds it; then the same for sending ports (each map has
    /// one writer).
    pub held: usize,
    /// The return ring (all frames fit).
    pub return_ring: usize,
    /// The first egress ring.
    pub egress_rings: usize,
    /// Bytes from one egress ring to the next.
    pub egress_stride: usize,
    /// Slots of each egress ring.
    pub egress_capacity: u32,
    /// Bytes in all.
    pub len: usize,
}

impl WorkLayout {
    /// The layout for a UMEM of `frame_count` frames (a power of two) and egress rings of `egress_capacity` slots.
    pub fn new(frame_count: u32, egress_capacity: u32) -> Self {
        let page = |bytes: usize| bytes.next_multiple_of(4096);
        let ingress_journal = 4096;
        let egress_journal = ingress_journal + JOURNAL_LEN;
        let pool = egress_journal + JOURNAL_LEN;
        let held = pool + page(Pool::bytes(frame_count));
        let return_ring = held + 2 * page(frame_count as usize);
        let egress_rings = return_ring + page(crate::ring::Layout::<u64>::bytes(frame_count));
        let egress_stride = page(crate::ring::Layout::<crate::frame::RawDesc>::bytes(egress_capacity));
        let len = egress_rings + MAX_PORTS * egress_stride;
        Self { ingress_journal, egress_journal, pool, held, return_ring, egress_rings, egress_stride, egress_capacity, len }
    }

    /// Offset of the map of frames that sending packet ports hold.
    pub const fn held_by_senders(&self, frame_count: u32) -> usize {
        self.held + (frame_count as usize).next_multiple_of(4096)
    }

    /// Offset of a port's egress ring.
    pub const fn egress_ring(&self, port: usize) -> usize {
        self.egress_rings + port * self.egress_stride
    }
}
