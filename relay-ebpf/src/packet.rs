//! The packet's bytes, each access checked against the packet's end.
//!
//! Must never interpret what it reads. Offsets are from the first byte of the Ethernet header.
#![expect(unsafe_code, reason = "packet memory is reached through the context's addresses and the kernel's helpers")]

use aya_ebpf::{EbpfContext as _, Global, bindings::xdp_md, helpers, programs::XdpContext};
use core::{hint::black_box, mem::MaybeUninit};

/// 1: the kernel has `bpf_xdp_get_buff_len` and `bpf_xdp_load_bytes` (5.18). The loader writes 0 for an older one; the
/// verifier knows the value and never looks at the branch that is not taken.
#[unsafe(no_mangle)]
static MULTI_BUFFER: Global<u32> = Global::new(1);

/// A packet on its way through the driver.
pub struct Packet<'a> {
    ctx: &'a XdpContext,
    data: usize,
    end: usize,
}

impl<'a> Packet<'a> {
    /// The packet of this context. Invalid after a helper that moves the packet or its metadata.
    #[inline(always)]
    pub fn new(ctx: &'a XdpContext) -> Self {
        Self { ctx, data: ctx.data(), end: ctx.data_end() }
    }

    /// Bytes of the whole packet, those behind the linear part included.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        if MULTI_BUFFER.load() == 0 {
            return (self.end - self.data) as u32;
        }
        // SAFETY: the pointer is the context the kernel called this program with.
        unsafe { helpers::bpf_xdp_get_buff_len(self.md()) as u32 }
    }

    /// `N` bytes at a constant `offset` of the linear part, which holds the headers.
    #[inline(always)]
    pub fn bytes<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let at = self.data + offset;
        if at + N > self.end {
            return None;
        }
        // SAFETY: `at..at + N` lies within `data..data_end` (just compared); an array of bytes needs no alignment.
        Some(unsafe { core::ptr::read(at as *const [u8; N]) })
    }

    /// `N` bytes at an `offset` that varies from packet to packet. By a helper where there is one: arithmetic on packet
    /// addresses with an unknown number takes CAP_PERFMON.
    #[inline(always)]
    pub fn bytes_at<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        if MULTI_BUFFER.load() == 0 {
            return self.bytes((offset & 0xff) as usize);
        }
        let mut out = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the pointer is this program's context, and `out` has room for the N bytes the helper writes.
        let status = unsafe { helpers::bpf_xdp_load_bytes(self.md(), offset, out.as_mut_ptr().cast(), N as u32) };
        if status != 0 {
            return None;
        }
        // SAFETY: the helper returned 0, so it has written all N bytes.
        Some(unsafe { out.assume_init() })
    }

    /// The address of `N` bytes at a constant `offset` of the linear part, to write to.
    #[inline(always)]
    pub fn place<const N: usize>(&self, offset: usize) -> Option<*mut [u8; N]> {
        let at = self.data + offset;
        if at + N > self.end {
            return None;
        }
        Some(at as *mut [u8; N])
    }

    /// The address of a `T`, which need not be aligned, at an `offset` that varies from packet to packet. Kept from the optimiser:
    /// it would compare the end with another sum than the one that is read by, and the verifier knows the two are one only
    /// where they are. Takes CAP_PERFMON.
    #[inline(always)]
    pub fn place_at<T>(&self, offset: usize) -> Option<*mut T> {
        let at = black_box(self.data + offset);
        if at + size_of::<T>() > self.end {
            return None;
        }
        Some(at as *mut T)
    }

    /// Whether all of the packet stands in one buffer. `len`: bytes of the whole packet.
    #[inline(always)]
    pub fn is_linear(&self, len: u32) -> bool {
        (self.end - self.data) as u32 == len
    }

    #[inline(always)]
    fn md(&self) -> *mut xdp_md {
        self.ctx.as_ptr().cast()
    }
}

/// Puts `value` directly before the packet as metadata. False where the driver has no room for metadata.
/// Ends the validity of every [`Packet`] of this context.
#[inline(always)]
pub fn put_metadata<T: Copy>(ctx: &XdpContext, value: T) -> bool {
    // SAFETY: the pointer is this program's context; the kernel refuses what it can't grant.
    let status = unsafe { helpers::bpf_xdp_adjust_meta(ctx.as_ptr().cast(), -(size_of::<T>() as i32)) };
    let at = ctx.metadata();
    if status != 0 || at + size_of::<T>() > ctx.metadata_end() {
        return false;
    }
    // SAFETY: `at..at + size_of::<T>()` lies within the metadata (just compared); no alignment is assumed.
    unsafe { core::ptr::write_unaligned(at as *mut T, value) };
    true
}

/// Moves the packet's beginning: `by` bytes go (or, if negative, come) before it. Ends the validity of every [`Packet`].
#[inline(always)]
pub fn move_head(ctx: &XdpContext, by: i32) -> bool {
    // SAFETY: the pointer is this program's context; the kernel refuses what it can't grant.
    unsafe { helpers::bpf_xdp_adjust_head(ctx.as_ptr().cast(), by) == 0 }
}

/// Copies `len` bytes at `offset` of the packet to `to`, which has room for them (the verifier sees to it).
///
/// # Safety
/// `to` points to `len` writable bytes.
#[inline(always)]
pub unsafe fn load(ctx: &XdpContext, offset: u32, to: *mut u8, len: u32) -> bool {
    // SAFETY: the pointer is this program's context; the caller vouches for `to`.
    unsafe { helpers::bpf_xdp_load_bytes(ctx.as_ptr().cast(), offset, to.cast(), len) == 0 }
}

/// Overwrites `len` bytes (1 to `N`) at `offset` of the packet. False if they don't lie within it.
#[inline(always)]
pub fn store<const N: usize>(ctx: &XdpContext, offset: u32, bytes: &[u8; N], len: u32) -> bool {
    if len == 0 || len as usize > N {
        return false;
    }
    // SAFETY: the pointer is this program's context and `bytes` has at least `len` bytes (just compared); the kernel checks the packet's.
    unsafe { helpers::bpf_xdp_store_bytes(ctx.as_ptr().cast(), offset, bytes.as_ptr().cast_mut().cast(), len) == 0 }
}

/// Adds one packet of `bytes` bytes to a counter of this CPU.
#[inline(always)]
pub fn add(counter: Option<*mut relay_common::CounterValue>, bytes: u32) {
    add_all(counter, 1, bytes);
}

/// Adds `count` packets of `bytes` bytes each to a counter of this CPU.
#[inline(always)]
pub fn add_all(counter: Option<*mut relay_common::CounterValue>, count: u32, bytes: u32) {
    let Some(counter) = counter else { return };
    // SAFETY: a non-null lookup in a per-CPU array is this CPU's own element; programs on one CPU don't interleave here.
    let counter = unsafe { &mut *counter };
    counter.packets += u64::from(count);
    counter.bytes += u64::from(count) * u64::from(bytes);
}
