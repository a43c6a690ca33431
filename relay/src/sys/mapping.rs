//! A shared memory mapping that is unmapped when dropped.
//!
//! Hands out raw pointers only; who reads or writes them says why that is sound.
#![expect(unsafe_code, reason = "mmap and munmap")]

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

/// `len` bytes of a descriptor, mapped MAP_SHARED.
#[derive(Debug)]
pub struct Mapping {
    ptr: NonNull<core::ffi::c_void>,
    len: usize,
    writable: bool,
}

// SAFETY: a mapping is an address range owned by this value; it has no thread affinity.
unsafe impl Send for Mapping {}
// SAFETY: only the address and the length can be read through a shared reference.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at `offset`, readable, and writable if asked. All pages are touched at once if `populate`.
    pub fn new(fd: impl AsFd, offset: i64, len: usize, writable: bool, populate: bool) -> nix::Result<Self> {
        let size = NonZeroUsize::new(len).ok_or(nix::errno::Errno::EINVAL)?;
        let prot = if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        let flags = if populate { MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE } else { MapFlags::MAP_SHARED };
        // SAFETY: no fixed address is asked for, so no existing mapping can be replaced.
        let ptr = unsafe { mmap(None, size, prot, flags, fd, offset) }?;
        Ok(Self { ptr, len, writable })
    }

    /// Has this process's page tables filled for the first `len` bytes, so that no access of them faults (Linux 5.14).
    pub fn populate(&self, len: usize) -> nix::Result<()> {
        let advice = if self.writable { MmapAdvise::MADV_POPULATE_WRITE } else { MmapAdvise::MADV_POPULATE_READ };
        // SAFETY: the range is within our own mapping, and this advice changes nothing in it.
        unsafe { madvise(self.ptr, len.min(self.len), advice) }
    }

    /// First byte.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr().cast()
    }

    /// Bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

// SAFETY: the range stays mapped at one address until drop, and is reached only through pointers by fenced code.
unsafe impl crate::ring::Memory for Mapping {
    fn as_ptr(&self) -> *mut u8 {
        Self::as_ptr(self)
    }

    fn len(&self) -> usize {
        self.len
    }

    fn writable(&self) -> bool {
        self.writable
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ptr and len are those of our own mmap, and nothing borrowed from this value outlives it.
        let unmapped = unsafe { munmap(self.ptr, self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping failed: {unmapped:?}");
    }
}
