//! The tally of one batch: what it adds to which counters. Private until the journal applies it (journal.rs).
//!
//! Must never allocate after it was made.

use bytemuck::{Pod, Zeroable};

/// What one batch adds to one counter. 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Increment {
    /// Counter index.
    pub counter: u32,
    /// Packets.
    pub packets: u32,
    /// Bytes.
    pub bytes: u64,
}

/// Different counters one batch can touch: 64 packets to 64 outputs each, a counter and a clock for each, and three for the packet.
pub const MAX_INCREMENTS: usize = 8448;
const CACHE: usize = 128;

/// What the batch in hand adds. Merges by a small direct-mapped cache, so a uniform flow needs a handful of entries.
#[derive(Debug)]
pub struct Tally {
    entries: Vec<Increment>,
    cache: [u16; CACHE],
}

impl Default for Tally {
    fn default() -> Self {
        Self { entries: Vec::with_capacity(MAX_INCREMENTS), cache: [0; CACHE] }
    }
}

impl Tally {
    /// Adds one packet of `bytes` to a counter.
    #[inline]
    pub fn add(&mut self, counter: u32, bytes: u64) {
        let cached = &mut self.cache[counter as usize % CACHE];
        if let Some(entry) = self.entries.get_mut(usize::from(*cached))
            && entry.counter == counter
        {
            entry.packets += 1;
            entry.bytes += bytes;
            return;
        }
        // A batch is cut so that it never needs more entries (ingress.rs); the capacity is never grown.
        if self.entries.len() < MAX_INCREMENTS {
            *cached = self.entries.len() as u16;
            self.entries.push(Increment { counter, packets: 1, bytes });
        }
    }

    /// The entries.
    pub fn entries(&self) -> &[Increment] {
        &self.entries
    }

    /// Empties the tally.
    pub fn clear(&mut self) {
        self.entries.clear();
    }
}
