//! The atomics and cells the ring is made of: the machine's own, or loom's under `--cfg loom`.
//!
//! Must never hold logic: whatever stands here is not seen by the model checker.

#[cfg(not(loom))]
pub(super) use core::sync::atomic::AtomicU32;
pub(super) use core::sync::atomic::Ordering;
#[cfg(loom)]
pub(super) use loom::{cell::UnsafeCell, sync::atomic::AtomicU32};

/// `core::cell::UnsafeCell` with loom's interface: the pointer exists only inside a closure.
#[cfg(not(loom))]
#[repr(transparent)]
#[derive(Debug)]
pub(super) struct UnsafeCell<T>(core::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    /// Wraps a value.
    pub(super) const fn new(value: T) -> Self {
        Self(core::cell::UnsafeCell::new(value))
    }

    /// Pointer for reading, while nobody writes.
    #[inline]
    pub(super) fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    /// Pointer for writing, while nobody else reads or writes.
    #[inline]
    pub(super) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}
