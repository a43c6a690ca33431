//! One kernel ring in this process's memory: producer and consumer words, flags, elements.
//!
//! Must never publish or release by itself, and never move an index that the kernel owns.

use crate::ring::cursor;
use crate::sys::shared::OutOfMapping;
use crate::sys::xdp::{Ring, RingOffsets};
use crate::sys::{Mapping, SharedArray, SharedWord};
use bytemuck::Pod;
use nix::errno::Errno;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// `XDP_RING_NEED_WAKEUP`.
const NEED_WAKEUP: u32 = 1;

/// Why a ring could not be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingMapError {
    /// mmap refused.
    #[error("mapping the {0:?} ring: {1}")]
    Map(Ring, Errno),
    /// The offsets of the kernel do not fit the mapping.
    #[error(transparent)]
    Layout(#[from] OutOfMapping),
}

/// A mapped kernel ring of `size` slots.
#[derive(Debug)]
pub struct KernelRing<T> {
    producer: SharedWord,
    consumer: SharedWord,
    flags: SharedWord,
    slots: SharedArray<T>,
    size: u32,
}

impl<T: Pod> KernelRing<T> {
    /// Maps a ring of a socket.
    pub fn map(fd: &impl AsFd, ring: Ring, size: u32, offsets: RingOffsets) -> Result<Self, RingMapError> {
        let len = offsets.desc + size as usize * size_of::<T>();
        let mapping = Mapping::new(fd.as_fd(), ring.page_offset(), len, true, true).map_err(|errno| RingMapError::Map(ring, errno))?;
        let mapping = Arc::new(mapping);
        Ok(Self {
            producer: SharedWord::new(&mapping, offsets.producer)?,
            consumer: SharedWord::new(&mapping, offsets.consumer)?,
            flags: SharedWord::new(&mapping, offsets.flags)?,
            slots: SharedArray::new(&mapping, offsets.desc, size as usize)?,
            size,
        })
    }

    /// Slots.
    pub const fn size(&self) -> u32 {
        self.size
    }

    /// Producer index, with everything written before it visible.
    #[inline]
    pub fn producer(&self) -> u32 {
        self.producer.load(Acquire)
    }

    /// Consumer index, with everything read before it done.
    #[inline]
    pub fn consumer(&self) -> u32 {
        self.consumer.load(Acquire)
    }

    /// Publishes everything written below `index` (rings that user space fills).
    #[inline]
    pub fn publish(&self, index: u32) {
        self.producer.store(index, Release);
    }

    /// Gives back everything below `index` (rings that user space empties).
    #[inline]
    pub fn release(&self, index: u32) {
        self.consumer.store(index, Release);
    }

    /// Element at a free-running index.
    #[inline]
    pub fn get(&self, index: u32) -> T {
        self.slots.get(cursor::slot(index, self.size))
    }

    /// Writes the element at a free-running index.
    #[inline]
    pub fn set(&self, index: u32, value: T) {
        self.slots.set(cursor::slot(index, self.size), value);
    }

    /// Whether the kernel asks to be woken.
    #[inline]
    pub fn needs_wakeup(&self) -> bool {
        self.flags.load(Relaxed) & NEED_WAKEUP != 0
    }
}
