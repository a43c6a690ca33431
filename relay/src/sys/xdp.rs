//! The AF_XDP socket calls (linux/if_xdp.h, Documentation/networking/af_xdp.rst): options, binding, ring mappings.
//!
//! Must never know what a ring is used for. Each function is one system call with its structure.
#![expect(unsafe_code, reason = "setsockopt, getsockopt and bind with AF_XDP's own structures")]

use nix::errno::Errno;
use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// `SOL_XDP`.
const SOL_XDP: i32 = 283;
/// `XDP_MAX_TX_SKB_BUDGET` (Linux 6.18): descriptors one copy-mode send may take.
const XDP_MAX_TX_SKB_BUDGET: i32 = 9;

/// The four rings of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// Received packets, kernel to user.
    Rx,
    /// Packets to send, user to kernel.
    Tx,
    /// Free frames, user to kernel.
    Fill,
    /// Sent frames, kernel to user.
    Completion,
}

impl Ring {
    const fn option(self) -> i32 {
        match self {
            Ring::Rx => libc::XDP_RX_RING,
            Ring::Tx => libc::XDP_TX_RING,
            Ring::Fill => libc::XDP_UMEM_FILL_RING,
            Ring::Completion => libc::XDP_UMEM_COMPLETION_RING,
        }
    }

    /// Offset to give to mmap.
    pub const fn page_offset(self) -> i64 {
        match self {
            Ring::Rx => libc::XDP_PGOFF_RX_RING,
            Ring::Tx => libc::XDP_PGOFF_TX_RING,
            Ring::Fill => libc::XDP_UMEM_PGOFF_FILL_RING as i64,
            Ring::Completion => libc::XDP_UMEM_PGOFF_COMPLETION_RING as i64,
        }
    }
}

/// Where producer, consumer, flags and the first element lie in a ring's mapping (`struct xdp_ring_offset`).
#[derive(Clone, Copy, Debug, Default)]
pub struct RingOffsets {
    /// Producer index, u32.
    pub producer: usize,
    /// Consumer index, u32.
    pub consumer: usize,
    /// Flags, u32.
    pub flags: usize,
    /// First element.
    pub desc: usize,
}

/// `struct xdp_statistics`, all cumulative since the socket was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// No free frame, or the packet did not fit one.
    pub rx_dropped: u64,
    /// Descriptors of the fill ring that the kernel refused.
    pub rx_invalid_descs: u64,
    /// Descriptors of the TX ring that the kernel refused.
    pub tx_invalid_descs: u64,
    /// RX ring full.
    pub rx_ring_full: u64,
    /// Fill ring empty (overlaps `rx_dropped`).
    pub rx_fill_ring_empty_descs: u64,
    /// TX ring found empty.
    pub tx_ring_empty_descs: u64,
}

/// How to bind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BindFlags {
    /// `XDP_ZEROCOPY` instead of `XDP_COPY`.
    pub zero_copy: bool,
    /// `XDP_USE_SG`: packets may span several frames.
    pub multi_buffer: bool,
}

/// A new AF_XDP socket, close-on-exec.
pub fn socket() -> Result<OwnedFd, Errno> {
    // SAFETY: socket() has no memory arguments.
    let fd = Errno::result(unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set<T>(fd: &impl AsFd, option: i32, value: &T) -> Result<(), Errno> {
    // SAFETY: value points to size_of::<T>() readable bytes for the length of the call.
    let result = unsafe {
        libc::setsockopt(fd.as_fd().as_raw_fd(), SOL_XDP, option, std::ptr::from_ref(value).cast::<c_void>(), size_of::<T>() as u32)
    };
    Errno::result(result).map(drop)
}

fn get<T: Default>(fd: &impl AsFd, option: i32) -> Result<T, Errno> {
    let mut value = T::default();
    get_into(fd, option, &mut value)?;
    Ok(value)
}

fn get_into<T>(fd: &impl AsFd, option: i32, value: &mut T) -> Result<(), Errno> {
    let mut len = size_of::<T>() as u32;
    // SAFETY: value points to len writable bytes for the length of the call; T is a plain kernel structure of integers.
    let result = unsafe { libc::getsockopt(fd.as_fd().as_raw_fd(), SOL_XDP, option, std::ptr::from_mut(value).cast::<c_void>(), &mut len) };
    Errno::result(result).map(drop)
}

/// Registers the UMEM at `address` (`frame_size` a power of two); packets are received `headroom` bytes behind the kernel's own
/// 256. Pins its pages: CAP_IPC_LOCK or a large RLIMIT_MEMLOCK.
pub fn register_umem(fd: &impl AsFd, address: *mut u8, len: usize, frame_size: u32, headroom: u32) -> Result<(), Errno> {
    /// `struct xdp_umem_reg` up to `flags` (the kernel accepts the older, shorter forms).
    #[repr(C)]
    struct UmemReg {
        addr: u64,
        len: u64,
        chunk_size: u32,
        headroom: u32,
        flags: u32,
        tx_metadata_len: u32,
    }
    set(
        fd,
        libc::XDP_UMEM_REG,
        &UmemReg { addr: address as u64, len: len as u64, chunk_size: frame_size, headroom, flags: 0, tx_metadata_len: 0 },
    )
}

/// Makes a ring of `size` (power of two) slots.
pub fn create_ring(fd: &impl AsFd, ring: Ring, size: u32) -> Result<(), Errno> {
    set(fd, ring.option(), &size)
}

/// Lets one copy-mode send take up to `budget` descriptors. ENOPROTOOPT or EINVAL where the kernel is older.
pub fn set_tx_budget(fd: &impl AsFd, budget: u32) -> Result<(), Errno> {
    set(fd, XDP_MAX_TX_SKB_BUDGET, &budget)
}

/// Binds to (interface, queue); `shared` names a socket whose UMEM is used.
pub fn bind(fd: &impl AsFd, ifindex: u32, queue: u32, flags: BindFlags, shared: Option<&OwnedFd>) -> Result<(), Errno> {
    // The kernel takes the mode from the UMEM's first socket where it is shared, and refuses other flags beside it.
    let mode = match shared {
        Some(_) => libc::XDP_SHARED_UMEM,
        None => {
            let copy = if flags.zero_copy { libc::XDP_ZEROCOPY } else { libc::XDP_COPY };
            let sg = if flags.multi_buffer { libc::XDP_USE_SG } else { 0 };
            copy | sg | libc::XDP_USE_NEED_WAKEUP
        }
    };
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        sxdp_flags: mode,
        sxdp_ifindex: ifindex,
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: shared.map_or(0, |fd| fd.as_raw_fd() as u32),
    };
    // SAFETY: address is a sockaddr_xdp that lives through the call, and the length is its own.
    let result = unsafe { libc::bind(fd.as_fd().as_raw_fd(), std::ptr::from_ref(&address).cast(), size_of::<libc::sockaddr_xdp>() as u32) };
    Errno::result(result).map(drop)
}

/// Offsets of the four rings, in the order RX, TX, fill, completion.
pub fn ring_offsets(fd: &impl AsFd) -> Result<[RingOffsets; 4], Errno> {
    let mut raw = [0u64; 16];
    get_into(fd, libc::XDP_MMAP_OFFSETS, &mut raw)?;
    let mut offsets = [RingOffsets::default(); 4];
    for (offset, words) in offsets.iter_mut().zip(raw.chunks_exact(4)) {
        if let [producer, consumer, desc, flags] = *words {
            *offset = RingOffsets { producer: producer as usize, consumer: consumer as usize, flags: flags as usize, desc: desc as usize };
        }
    }
    Ok(offsets)
}

/// The socket's counters.
pub fn statistics(fd: &impl AsFd) -> Result<Statistics, Errno> {
    let raw: [u64; 6] = get(fd, libc::XDP_STATISTICS)?;
    let [rx_dropped, rx_invalid_descs, tx_invalid_descs, rx_ring_full, rx_fill_ring_empty_descs, tx_ring_empty_descs] = raw;
    Ok(Statistics { rx_dropped, rx_invalid_descs, tx_invalid_descs, rx_ring_full, rx_fill_ring_empty_descs, tx_ring_empty_descs })
}

/// Whether the bound socket runs in zero-copy mode (`XDP_OPTIONS_ZEROCOPY`).
pub fn is_zero_copy(fd: &impl AsFd) -> Result<bool, Errno> {
    let flags: u32 = get(fd, libc::XDP_OPTIONS)?;
    Ok(flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
}

/// Wakes the sending side: one empty `sendto`.
#[inline]
pub fn kick_send(fd: i32) -> Result<(), Errno> {
    // SAFETY: no buffer, no address.
    let result = unsafe { libc::sendto(fd, std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0) };
    Errno::result(result).map(drop)
}

/// Wakes the receiving side (needed in zero-copy mode when the fill ring's flag asks for it).
#[inline]
pub fn kick_receive(fd: i32) -> Result<(), Errno> {
    // SAFETY: no buffer, no address.
    let result = unsafe { libc::recvfrom(fd, std::ptr::null_mut(), 0, libc::MSG_DONTWAIT, std::ptr::null_mut(), std::ptr::null_mut()) };
    Errno::result(result).map(drop)
}
