//! The UMEM region and the frame token.
//!
//! The only place where UMEM bytes are reached by pointer. Must never hand out bytes of a frame without its token.
#![expect(unsafe_code, reason = "UMEM memory is shared with the kernel and other processes and is reached by pointer")]

use super::{FRAME_SIZE, RawDesc, UMEM_HEADROOM};
use crate::sys::Mapping;

/// Ownership of one frame of the UMEM. Not Copy, not Clone: moving it is moving the frame.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped frame token is a leaked frame: put it into a ring or a pool"]
pub struct Frame(u32);

impl Frame {
    /// Number of the frame in its UMEM.
    #[inline]
    pub const fn index(&self) -> u32 {
        self.0
    }

    /// UMEM offset of the frame's first byte.
    #[inline]
    pub const fn base(&self) -> u64 {
        self.0 as u64 * FRAME_SIZE as u64
    }

    /// Ends the token: the frame is now where the caller has written this number.
    #[inline]
    pub fn into_index(self) -> u32 {
        self.0
    }
}

/// Why a descriptor was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UmemError {
    /// Address outside the UMEM.
    #[error("descriptor address {0:#x} lies outside the UMEM")]
    OutOfRange(u64),
    /// Data would cross the end of its frame.
    #[error("descriptor of {len} bytes at {addr:#x} crosses the end of its frame")]
    CrossesFrame {
        /// Address.
        addr: u64,
        /// Length.
        len: u32,
    },
}

/// The packet memory of one worker: `frame_count` frames of [`FRAME_SIZE`] bytes in a memfd.
#[derive(Debug)]
pub struct Umem {
    mapping: Mapping,
    frame_count: u32,
}

impl Umem {
    /// Takes the mapping of a UMEM memfd; the frame count follows from its size.
    pub fn new(mapping: Mapping) -> Self {
        let frame_count = u32::try_from(mapping.len() / FRAME_SIZE as usize).unwrap_or(u32::MAX);
        Self { mapping, frame_count }
    }

    /// Frames in the region.
    #[inline]
    pub const fn frame_count(&self) -> u32 {
        self.frame_count
    }

    /// Address of the first byte, for the kernel's registration.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// Bytes of the region.
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// Never true: a UMEM has frames.
    pub fn is_empty(&self) -> bool {
        self.mapping.len() == 0
    }

    /// Turns a descriptor read from a ring into the frame's token and the data's place in it (offset in the frame).
    ///
    /// The caller states by calling that the ring entry was consumed exactly once; that is what makes the token unique.
    #[inline]
    pub fn claim(&self, desc: RawDesc) -> Result<(Frame, u32), UmemError> {
        let index = desc.addr / u64::from(FRAME_SIZE);
        if index >= u64::from(self.frame_count) {
            return Err(UmemError::OutOfRange(desc.addr));
        }
        let offset = (desc.addr % u64::from(FRAME_SIZE)) as u32;
        if desc.len > FRAME_SIZE - offset {
            return Err(UmemError::CrossesFrame { addr: desc.addr, len: desc.len });
        }
        Ok((Frame(index as u32), offset))
    }

    /// Token of a frame named by number (fill and completion rings, pool).
    #[inline]
    pub fn claim_index(&self, index: u32) -> Result<Frame, UmemError> {
        if index < self.frame_count { Ok(Frame(index)) } else { Err(UmemError::OutOfRange(u64::from(index) * u64::from(FRAME_SIZE))) }
    }

    /// The frame's bytes `[offset, offset + len)`, cut at the frame's end.
    #[inline]
    pub fn bytes<'a>(&'a self, frame: &'a Frame, offset: u32, len: u32) -> &'a [u8] {
        let (start, len) = self.range(frame, offset, len);
        // SAFETY: range() keeps start + len inside the mapping, which lives as long as self.
        let first = unsafe { self.mapping.as_ptr().add(start) };
        // SAFETY: the token is borrowed, so nobody else holds the frame's bytes; the kernel touches only frames in its rings.
        unsafe { std::slice::from_raw_parts(first, len) }
    }

    /// The frame's bytes `[offset, offset + len)` to write, cut at the frame's end.
    #[inline]
    pub fn bytes_mut<'a>(&'a self, frame: &'a mut Frame, offset: u32, len: u32) -> &'a mut [u8] {
        let (start, len) = self.range(frame, offset, len);
        // SAFETY: range() keeps start + len inside the mapping, which lives as long as self.
        let first = unsafe { self.mapping.as_ptr().add(start) };
        // SAFETY: the token is borrowed exclusively, so nobody else holds the frame's bytes.
        unsafe { std::slice::from_raw_parts_mut(first, len) }
    }

    /// Asks the processor to fetch the first cache lines of a packet, from what stands right before it on. The NIC's side has
    /// written them on another core; asked for together, the misses of a batch overlap instead of adding up.
    #[inline]
    pub fn prefetch(&self, desc: RawDesc) {
        #[cfg(target_arch = "x86_64")]
        for line in 0..(desc.len.saturating_add(UMEM_HEADROOM)).div_ceil(64).min(3) as usize {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let at = (desc.addr as usize).saturating_sub(UMEM_HEADROOM as usize).saturating_add(line * 64);
            if at < self.mapping.len() {
                // SAFETY: at lies inside the mapping, as just checked.
                let address = unsafe { self.mapping.as_ptr().add(at) };
                // SAFETY: a prefetch reads nothing as far as the program can tell, and never faults.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast::<i8>()) };
            }
        }
    }

    #[inline]
    fn range(&self, frame: &Frame, offset: u32, len: u32) -> (usize, usize) {
        let offset = offset.min(FRAME_SIZE);
        let len = len.min(FRAME_SIZE - offset);
        debug_assert!(frame.0 < self.frame_count, "a token of another UMEM");
        (frame.0 as usize * FRAME_SIZE as usize + offset as usize, len as usize)
    }
}
