//! The free frames of a worker: a last-in first-out list in shared memory, so that a successor finds them again.
//!
//! Two views of its length: `len` (this process's, moves with every take and put) and the published word, which
//! [`Pool::publish`] stores. Elements below the published length are never overwritten before [`Pool::publish`] by a
//! taker, and `put` after `take` overwrites them only in the commit phase of the journal (datapath/journal.rs), so a batch
//! that was cut short by a kill takes the same frames again. Must never know why a frame is free.

use super::{Frame, Umem};
use crate::sys::shared::OutOfMapping;
use crate::sys::{Mapping, SharedArray, SharedWord};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Where the word of lost frames stands.
pub const LOST_AT: usize = 64;
/// Where a pool's elements stand, behind its length word.
const ELEMENTS: usize = 128;

/// The free frames of one worker. Written by its ingress thread only.
#[derive(Debug)]
pub struct Pool {
    published: SharedWord,
    lost: SharedWord,
    elements: SharedArray<u32>,
    len: u32,
}

impl Pool {
    /// Bytes of shared memory a pool of `frame_count` frames takes.
    pub const fn bytes(frame_count: u32) -> usize {
        ELEMENTS + frame_count as usize * 4
    }

    /// The pool at `offset` of a segment, as its last owner left it.
    pub fn attach(mapping: &Arc<Mapping>, offset: usize, frame_count: u32) -> Result<Self, OutOfMapping> {
        let published = SharedWord::new(mapping, offset)?;
        let lost = SharedWord::new(mapping, offset + LOST_AT)?;
        let elements = SharedArray::new(mapping, offset + ELEMENTS, frame_count as usize)?;
        let len = published.load(Ordering::Acquire).min(frame_count);
        Ok(Self { published, lost, elements, len })
    }

    /// Puts every frame of a new UMEM in.
    pub fn fill(&mut self, frame_count: u32) {
        // Highest first, so that the frames taken first are those with the lowest addresses.
        for index in 0..frame_count {
            self.elements.set(index as usize, frame_count - 1 - index);
        }
        self.len = frame_count;
        self.publish();
    }

    /// Frames to be had now.
    #[inline]
    pub const fn len(&self) -> u32 {
        self.len
    }

    /// Whether none is left.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes a frame.
    #[inline]
    pub fn take(&mut self, umem: &Umem) -> Option<Frame> {
        let next = self.len.checked_sub(1)?;
        self.len = next;
        // Numbers come from our own memory; one out of range would mean a corrupted segment and is left out for good.
        umem.claim_index(self.elements.get(next as usize)).ok()
    }

    /// Puts a frame back. One more than there are is in two places, which takes a corrupted segment: it is left out.
    #[inline]
    pub fn put(&mut self, frame: Frame) {
        if (self.len as usize) < self.elements.len() {
            self.elements.set(self.len as usize, frame.into_index());
            self.len += 1;
        }
    }

    /// Element `position` of the list (for moves that are written before they are published).
    pub fn peek(&self, position: u32) -> u32 {
        self.elements.get(position as usize)
    }

    /// Counts frames of which no valid number came back: nobody knows which they were.
    pub fn lose(&self, count: u32) {
        self.lost.store(self.lost.load(Ordering::Relaxed).wrapping_add(count), Ordering::Release);
    }

    /// Frames lost so.
    pub fn lost(&self) -> u32 {
        self.lost.load(Ordering::Acquire)
    }

    /// Sets the length without touching elements (end of a journaled move).
    #[inline]
    pub fn set_len(&mut self, len: u32) {
        self.len = len.min(self.elements.len() as u32);
    }

    /// Stores the length where a successor reads it.
    #[inline]
    pub fn publish(&self) {
        self.published.store(self.len, Ordering::Release);
        crate::sys::fuse::stored();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(bytes: usize) -> Arc<Mapping> {
        let fd = nix::sys::memfd::memfd_create(c"pool-test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, bytes as i64).unwrap();
        Arc::new(Mapping::new(&fd, 0, bytes, true, false).unwrap())
    }

    #[test]
    fn unpublished_takes_are_undone_by_a_successor() {
        let umem = Umem::new(Arc::into_inner(region(8 * 2048)).unwrap());
        let shared = region(Pool::bytes(8));
        let mut pool = Pool::attach(&shared, 0, 8).unwrap();
        pool.fill(8);
        let first = pool.take(&umem).unwrap().into_index();
        let _second = pool.take(&umem).unwrap().into_index();
        assert_eq!(pool.len(), 6);
        let mut successor = Pool::attach(&shared, 0, 8).unwrap();
        assert_eq!(successor.len(), 8);
        assert_eq!(successor.take(&umem).unwrap().into_index(), first);
        successor.publish();
        assert_eq!(Pool::attach(&shared, 0, 8).unwrap().len(), 7);
    }
}
