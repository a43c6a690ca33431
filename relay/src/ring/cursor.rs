//! Pure arithmetic of free-running ring indices (u32, wrapping). No memory, no atomics: also drives the kernel's rings.
//!
//! `producer - consumer` (wrapping) is the number of filled slots, so all `size` slots are usable and full is never
//! mistaken for empty. `size` is a power of two.

/// Slots filled between two free-running indices.
#[inline]
pub const fn filled(producer: u32, consumer: u32) -> u32 {
    producer.wrapping_sub(consumer)
}

/// Slots free in a ring of `size` slots. A peer that claims more than `size` filled slots yields 0.
#[inline]
pub const fn free(size: u32, producer: u32, consumer: u32) -> u32 {
    size.saturating_sub(filled(producer, consumer))
}

/// Position in the slot array of a free-running index.
#[inline]
pub const fn slot(index: u32, size: u32) -> usize {
    (index & (size - 1)) as usize
}
