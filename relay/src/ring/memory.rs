//! Memory a ring can lie in: a heap block in this process, or whatever [`Memory`] stands for (a sealed memfd).
//!
//! Words of it are handed out as atomics, so that whatever lies in words needs no unsafe code.
//! Must never know who else maps it.
#![expect(unsafe_code, reason = "states that an address range stays readable and writable as long as its owner lives")]

use super::sync::AtomicU64;
use core::cell::UnsafeCell;
use std::sync::Arc;

/// Bytes that the two sides of a ring are kept apart: two cache lines, because the adjacent-line prefetcher pulls pairs.
pub const LINE_SIZE: usize = 128;

/// An address range that others may write at the same time.
///
/// # Safety
/// `as_ptr()` must be the start of `len()` readable (and, if it says so, writable) bytes, at the same address until the value is dropped, reached by
/// this process only through atomics and the cells of rings and channels.
pub unsafe trait Memory: Send + Sync + 'static {
    /// First byte.
    fn as_ptr(&self) -> *mut u8;
    /// Bytes.
    fn len(&self) -> usize;
    /// Whether the bytes may be written. A write to others is SIGSEGV.
    fn writable(&self) -> bool {
        true
    }
    /// True if there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[repr(C, align(128))]
struct Line([u8; LINE_SIZE]);

/// A zeroed heap block, aligned to [`LINE_SIZE`].
pub struct Heap(Box<[UnsafeCell<Line>]>);

impl Heap {
    /// At least `len` bytes.
    pub fn new(len: usize) -> Self {
        Self(std::iter::repeat_with(|| UnsafeCell::new(Line([0; LINE_SIZE]))).take(len.div_ceil(LINE_SIZE)).collect())
    }
}

// SAFETY: the bytes are reached only through raw pointers by code that says itself why that is sound.
unsafe impl Sync for Heap {}

// SAFETY: the boxed slice neither moves nor shrinks while it lives, and UnsafeCell permits writing through a shared pointer.
unsafe impl Memory for Heap {
    fn as_ptr(&self) -> *mut u8 {
        self.0.as_ptr().cast_mut().cast()
    }

    fn len(&self) -> usize {
        self.0.len() * LINE_SIZE
    }
}

/// A run of 64-bit words in shared memory, reachable only as atomics: sound whatever a peer writes.
///
/// Read-only memory may be viewed too; a store to it is SIGSEGV, so writing sides ask for [`Words::writable`] when they attach.
pub struct Words {
    memory: Arc<dyn Memory>,
    first: *const AtomicU64,
    len: usize,
}

// SAFETY: the address stays valid wherever the value goes, because `memory` goes along; atomics may be shared.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Views `len` words at `offset` bytes; `None` if they do not fit or are not aligned.
    pub fn new(memory: Arc<dyn Memory>, offset: usize, len: usize) -> Option<Self> {
        let end = len.checked_mul(size_of::<AtomicU64>())?.checked_add(offset)?;
        let aligned = memory.as_ptr().addr().wrapping_add(offset).is_multiple_of(align_of::<AtomicU64>());
        if end > memory.len() || !aligned {
            return None;
        }
        // SAFETY: offset <= end <= len of the memory.
        let first = unsafe { memory.as_ptr().add(offset) };
        Some(Self { first: first.cast(), len, memory })
    }

    /// Sets every word to 0, for memory that nobody else has attached to yet; `None` if it cannot be written.
    pub fn cleared(self) -> Option<Self> {
        for index in 0..self.writable().then_some(self.len)? {
            // SAFETY: new() has checked that len words fit.
            let word = unsafe { self.first.cast_mut().add(index) };
            // SAFETY: in bounds, aligned and writable; not yet shared, as the caller states.
            unsafe { word.write(AtomicU64::new(0)) };
        }
        Some(self)
    }

    /// Whether the words may be stored to.
    pub fn writable(&self) -> bool {
        self.memory.writable()
    }
}

impl core::ops::Deref for Words {
    type Target = [AtomicU64];

    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: new() has checked bounds and alignment, `memory` keeps the range alive, and the words are only reached as atomics.
        unsafe { core::slice::from_raw_parts(self.first, self.len) }
    }
}

impl core::fmt::Debug for Words {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Words").field("len", &self.len).finish_non_exhaustive()
    }
}
