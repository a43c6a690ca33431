//! UMEM memory and the frames in it. A [`Frame`] is a token: whoever holds it owns the frame's bytes.
//!
//! Must never know a NIC or a rule. Invariant 1: every frame is in exactly one place. A `Frame` is neither Copy nor
//! Clone; it is made only by [`Umem::claim`] (from a validated ring entry) and ends only by being put into a ring or pool.

pub mod bundle;
mod held;
pub mod pool;
pub mod umem;

pub use held::HeldMap;
pub use pool::Pool;
pub use umem::{Frame, Umem, UmemError};

/// Bytes of one frame. Power of two, as the kernel's aligned-chunk mode wants it.
pub const FRAME_SIZE: u32 = 2048;
/// Headroom that a UMEM is registered with, behind the kernel's own (XDP_PACKET_HEADROOM, 256): what the XDP program says of a packet
/// stands right before it, and so lies in the cache line of its headers. With 0 each packet was one line more to fetch from the core
/// that had received it.
pub const UMEM_HEADROOM: u32 = 16;
/// Where received data starts in a frame.
pub const HEADROOM: u32 = 256 + UMEM_HEADROOM;
/// Bytes of packet one frame can hold.
pub const FRAME_CAPACITY: u32 = FRAME_SIZE - HEADROOM;
/// Frames one packet can span (9000-byte packets with room to spare).
pub const MAX_FRAGMENTS: usize = 6;

/// A run of bytes in one frame, as the kernel's rings and ours carry it. Layout of `struct xdp_desc`
/// (linux/if_xdp.h): `addr u64, len u32, options u32`, 16 bytes. Untrusted until [`Umem::claim`] accepts it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RawDesc {
    /// Offset in the UMEM of the first byte.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`CONTINUES`], and in our own rings what [`RawDesc::options`] adds.
    pub options: u32,
}

/// `XDP_PKT_CONTD`: the packet goes on in the next descriptor.
pub const CONTINUES: u32 = 1;
/// In our own rings: the packet may leave as part of a super-frame (`engine=coalesce`).
pub const COALESCE: u32 = 2;
/// In our own rings: headers for several outputs; the packet they belong to is the next descriptor ([`bundle`]).
pub const BUNDLE: u32 = 4;
/// First bit of the label in [`RawDesc::options`].
const LABEL_SHIFT: u32 = 3;
/// The highest label.
pub const MAX_LABEL: u32 = u32::MAX >> LABEL_SHIFT;

impl RawDesc {
    /// `options` of a descriptor in our own rings: whose packet it is, and `flags` ([`CONTINUES`], [`COALESCE`], [`BUNDLE`]).
    #[inline]
    pub const fn options(label: u32, flags: u32) -> u32 {
        label << LABEL_SHIFT | flags
    }

    /// Whose packet it is: the output's slot.
    #[inline]
    pub const fn label(&self) -> u32 {
        self.options >> LABEL_SHIFT
    }

    /// Whether these are the headers of a bundle.
    #[inline]
    pub const fn is_bundle(&self) -> bool {
        self.options & BUNDLE != 0
    }

    /// Whether the packet goes on in the next descriptor.
    #[inline]
    pub const fn continues(&self) -> bool {
        self.options & CONTINUES != 0
    }
}
