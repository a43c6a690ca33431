//! Where everything of a ring lies in its memory, and the checks a side makes before it believes what it finds there.
//!
//! ```text
//!   0  header    magic u64 · version u32 · capacity u32 · element size u32 · element align u32 · layout hash u64
//! 128  producer  published index u32   (written by the producer only)
//! 256  consumer  released index u32    (written by the consumer only)
//! 384  slots     capacity × element size
//! ```
//! Must never trust a byte of shared memory twice: values are copied out, checked, and kept in private memory.

use super::memory::LINE_SIZE;
use super::sync::{AtomicU32, UnsafeCell};
use core::marker::PhantomData;

/// "RLYRING" and a zero byte.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"RLYRING\0");
/// Counted up whenever the layout above changes.
pub(super) const VERSION: u32 = 1;
/// Largest capacity: `producer - consumer` must stay unambiguous in 32 bits.
pub const MAX_CAPACITY: u32 = 1 << 30;

/// Why a ring cannot be made in, or adopted from, a piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Zero, not a power of two, or above [`MAX_CAPACITY`].
    #[error("ring capacity {0} is not a power of two between 1 and 2^30")]
    Capacity(u32),
    /// The memory ends before the ring does, or starts off a 128-byte line.
    #[error("ring of {needed} bytes at offset {offset} does not fit memory of {len} bytes, or is not 128-byte aligned")]
    DoesNotFit {
        /// Where the ring was to start.
        offset: usize,
        /// Bytes of the ring.
        needed: usize,
        /// Bytes of the memory.
        len: usize,
    },
    /// No ring was ever made here.
    #[error("no ring here: magic is {0:#x}")]
    Magic(u64),
    /// Made by another version of this program.
    #[error("ring has layout version {0}, this program speaks {VERSION}")]
    Version(u32),
    /// The elements are of another type.
    #[error("ring elements differ: {size} bytes aligned {align}, hash {hash:#x} (is the other side another build?)")]
    Element {
        /// Size found.
        size: u32,
        /// Alignment found.
        align: u32,
        /// Layout hash found.
        hash: u64,
    },
    /// A side that has to write was given a read-only mapping.
    #[error("memory is mapped read-only: this side has to write its index")]
    ReadOnly,
    /// The two indices claim more filled slots than there are.
    #[error("ring indices are corrupt: producer {producer}, consumer {consumer}, capacity {capacity}")]
    Indices {
        /// Producer's index found.
        producer: u32,
        /// Consumer's index found.
        consumer: u32,
        /// Capacity found.
        capacity: u32,
    },
}

/// What the first line of a ring says.
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) magic: u64,
    pub(super) version: u32,
    pub(super) capacity: u32,
    pub(super) element_size: u32,
    pub(super) element_align: u32,
    pub(super) layout_hash: u64,
}

/// One side's line: its index and nothing else, so that no other write pulls it away from the peer.
#[repr(C, align(128))]
#[derive(Debug)]
pub(super) struct Side {
    pub(super) index: AtomicU32,
}

/// All of a ring before its slots.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Head {
    pub(super) header: Header,
    pub(super) producer: Side,
    pub(super) consumer: Side,
}

/// Offset of the published index in a ring.
pub const PRODUCER_AT: usize = LINE_SIZE;
/// Offset of the released index in a ring.
pub const CONSUMER_AT: usize = 2 * LINE_SIZE;

#[cfg(not(loom))]
const _: () = {
    assert!(core::mem::offset_of!(Head, producer) == LINE_SIZE);
    assert!(core::mem::offset_of!(Head, consumer) == 2 * LINE_SIZE);
    assert!(size_of::<Head>() == 3 * LINE_SIZE);
};

/// Sizes and offsets of a ring of `T`.
#[derive(Clone, Copy, Debug)]
pub struct Layout<T>(PhantomData<T>);

impl<T: bytemuck::Pod> Layout<T> {
    /// Offset of slot 0 from the ring's start.
    pub(super) const SLOTS_AT: usize = size_of::<Head>();

    /// Bytes of one slot.
    pub(super) const SLOT_SIZE: usize = size_of::<UnsafeCell<T>>();

    /// Bytes a ring of `capacity` slots occupies, rounded up to whole lines (so that rings can stand one behind the other).
    pub const fn bytes(capacity: u32) -> usize {
        (Self::SLOTS_AT + capacity as usize * Self::SLOT_SIZE).next_multiple_of(LINE_SIZE)
    }

    /// The header of a ring of `capacity` elements of `T`.
    pub(super) fn header(capacity: u32) -> Header {
        Header {
            magic: MAGIC,
            version: VERSION,
            capacity,
            element_size: size_of::<T>() as u32,
            element_align: align_of::<T>() as u32,
            layout_hash: layout_hash::<T>(),
        }
    }

    /// Says whether a header copied out of shared memory is that of a ring of `T`.
    pub(super) fn check(found: &Header) -> Result<(), RingError> {
        if found.magic != MAGIC {
            return Err(RingError::Magic(found.magic));
        }
        if found.version != VERSION {
            return Err(RingError::Version(found.version));
        }
        let ours = Self::header(found.capacity);
        if (found.element_size, found.element_align, found.layout_hash) != (ours.element_size, ours.element_align, ours.layout_hash) {
            return Err(RingError::Element { size: found.element_size, align: found.element_align, hash: found.layout_hash });
        }
        check_capacity(found.capacity)
    }

    /// Says whether a ring of `capacity` fits `len` bytes at `offset` of memory that starts at `address`.
    pub(super) fn fits(address: usize, len: usize, offset: usize, capacity: u32) -> Result<(), RingError> {
        let needed = Self::bytes(capacity);
        let aligned = address.wrapping_add(offset).is_multiple_of(LINE_SIZE) && align_of::<T>() <= LINE_SIZE;
        match offset.checked_add(needed) {
            Some(end) if end <= len && aligned => Ok(()),
            _ => Err(RingError::DoesNotFit { offset, needed, len }),
        }
    }
}

/// A power of two, and small enough.
pub const fn check_capacity(capacity: u32) -> Result<(), RingError> {
    if capacity.is_power_of_two() && capacity <= MAX_CAPACITY { Ok(()) } else { Err(RingError::Capacity(capacity)) }
}

/// FNV-1a over size, alignment and name of `T`: equal in two processes of one executable, different for another element type.
pub fn layout_hash<T>() -> u64 {
    let name = core::any::type_name::<T>().bytes();
    let shape = (size_of::<T>() as u32).to_le_bytes().into_iter().chain((align_of::<T>() as u32).to_le_bytes());
    shape.chain(name).fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
