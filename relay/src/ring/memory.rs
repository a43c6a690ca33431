//! Memory a ring can lie in: a heap block in this process, or whatever [`Memory`] stands for (a sealed memfd).
//!
//! Must never know who else maps it.
#![expect(unsafe_code, reason = "states that an address range stays readable and writable as long as its owner lives")]

use core::cell::UnsafeCell;

/// Bytes that the two sides of a ring are kept apart: two cache lines, because the adjacent-line prefetcher pulls pairs.
pub const LINE_SIZE: usize = 128;

/// An address range that others may write at the same time.
///
/// # Safety
/// `as_ptr()` must be the start of `len()` readable and writable bytes, at the same address until the value is dropped, reached by
/// this process only through atomics and the cells of rings and channels.
pub unsafe trait Memory: Send + Sync + 'static {
    /// First byte.
    fn as_ptr(&self) -> *mut u8;
    /// Bytes.
    fn len(&self) -> usize;
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
