//! Making a restricted io_uring over one packet socket. One ring per half, so that each belongs to one thread.
//!
//! The ring is made disabled, gets its socket (registered file 0), its restrictions and is enabled at its first use, by
//! the thread that uses it (IORING_SETUP_SINGLE_ISSUER). From then on it accepts the opcodes of its half on registered
//! files and no registration, so a worker that was taken over can do nothing with it but relay.
//!
//! System calls: io_uring_setup, io_uring_register and mmap until the half is made; after that io_uring_enter, and
//! io_uring_register once per half (IORING_REGISTER_ENABLE_RINGS, at its first use).
//! Must never fall back to another engine: it says why it can't, `afpacket` decides.
#![expect(unsafe_code, reason = "submission entries and a buffer ring that the kernel reads by address")]

use crate::sys::Mapping;
use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::BufRingEntry;
use io_uring::{Builder, IoUring, cqueue, squeue};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU16, Ordering};

/// Group number of the provided buffers.
pub(super) const BUFFER_GROUP: u16 = 0;
/// Number of the socket among the registered files.
pub(super) const SOCKET: io_uring::types::Fixed = io_uring::types::Fixed(0);
/// Where `struct io_uring_buf_ring` has its tail (linux/io_uring.h: over the first entry's `resv`).
const TAIL_AT: usize = 14;

/// The errno of an io::Error of the ring.
pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// A ring that is not yet enabled, or is.
#[derive(Debug)]
pub(super) struct Ring {
    uring: DebugRing,
    enabled: bool,
}

/// `IoUring` has no Debug.
struct DebugRing(IoUring);

impl std::fmt::Debug for DebugRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("IoUring").field(&self.0.as_raw_fd()).finish()
    }
}

impl Ring {
    /// A ring of `entries` submissions and twice the completions for `socket`, restricted to `opcodes`.
    pub(super) fn new(socket: &impl AsFd, entries: u16, opcodes: &[u8]) -> Result<Self, Errno> {
        let uring = build(u32::from(entries)).map_err(|error| errno(&error))?;
        let submitter = uring.submitter();
        submitter.register_files(&[socket.as_fd().as_raw_fd()]).map_err(|error| errno(&error))?;
        submitter.register_restrictions(&mut restrictions(opcodes)).map_err(|error| errno(&error))?;
        Ok(Self { uring: DebugRing(uring), enabled: false })
    }

    /// Enables the ring for the calling thread, once.
    pub(super) fn enable(&mut self) -> Result<(), Errno> {
        if !self.enabled {
            self.uring.0.submitter().register_enable_rings().map_err(|error| errno(&error))?;
            self.enabled = true;
        }
        Ok(())
    }

    /// Registers the buffers' ring. Before [`Ring::enable`].
    pub(super) fn register_buffers(&self, buffers: &BufferRing) -> Result<(), Errno> {
        let address = buffers.mapping.as_ptr() as u64;
        // SAFETY: the mapping has room for `entries` entries; the half that owns both drops this ring first.
        let result = unsafe { self.uring.0.submitter().register_buf_ring_with_flags(address, buffers.entries, BUFFER_GROUP, 0) };
        result.map_err(|error| errno(&error))
    }

    /// Queues a submission; false where the queue is full.
    ///
    /// # Safety
    /// What the entry points to must stay valid until its (last) completion was seen or the ring was dropped and closed.
    pub(super) unsafe fn push(&mut self, entry: &Entry) -> bool {
        // SAFETY: the caller's promise.
        unsafe { self.uring.0.submission().push(entry) }.is_ok()
    }

    /// One io_uring_enter: submits what is queued, runs the kernel's deferred work if there is some.
    pub(super) fn submit(&mut self) -> Result<(), Errno> {
        self.uring.0.submit().map(drop).map_err(|error| errno(&error))
    }

    /// Waits for a completion.
    pub(super) fn wait(&mut self, timeout: std::time::Duration) -> Result<bool, Errno> {
        let timespec = io_uring::types::Timespec::from(timeout);
        let args = io_uring::types::SubmitArgs::new().timespec(&timespec);
        match self.uring.0.submitter().submit_with_args(1, &args).map_err(|error| errno(&error)) {
            Ok(_) => Ok(true),
            Err(Errno::ETIME | Errno::EINTR) => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// Whether an io_uring_enter would do anything: work deferred by the kernel, completions it kept back, submissions queued.
    #[inline]
    pub(super) fn has_work(&mut self) -> bool {
        let queue = self.uring.0.submission();
        queue.taskrun() || queue.cq_overflow() || !queue.is_empty()
    }

    /// The oldest completion.
    #[inline]
    pub(super) fn completion(&mut self) -> Option<cqueue::Entry> {
        self.uring.0.completion().next()
    }

    /// Whether a completion is there to be taken.
    pub(super) fn has_completion(&mut self) -> bool {
        !self.uring.0.completion().is_empty()
    }

    /// Descriptor to poll for completions.
    pub(super) fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        // SAFETY: the descriptor is the ring's own and stays open as long as self is borrowed.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }

    /// The ring's descriptor by number.
    pub(super) fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.uring.0.as_raw_fd()
    }
}

/// The best set of flags the kernel knows, best first.
fn build(entries: u32) -> io::Result<IoUring> {
    type Flags = fn(&mut Builder<squeue::Entry, cqueue::Entry>) -> &mut Builder<squeue::Entry, cqueue::Entry>;
    let flag_sets: [Flags; 3] = [
        |builder| builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all(),
        |builder| builder.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all(),
        |builder| builder,
    ];
    let mut result = Err(io::Error::from(io::ErrorKind::InvalidInput));
    for set in flag_sets {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(entries.saturating_mul(2)).setup_r_disabled().dontfork();
        set(&mut builder);
        result = builder.build(entries);
        match &result {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            _ => break,
        }
    }
    result
}

fn restrictions(opcodes: &[u8]) -> Vec<Restriction> {
    let mut all: Vec<Restriction> = opcodes.iter().map(|opcode| Restriction::sqe_op(*opcode)).collect();
    all.push(Restriction::sqe_flags_allowed((Flags::FIXED_FILE | Flags::BUFFER_SELECT).bits()));
    all.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
    all
}

/// The ring of provided buffers (`struct io_uring_buf_ring`), ours to fill, the kernel's to empty.
#[derive(Debug)]
pub(super) struct BufferRing {
    mapping: Mapping,
    entries: u16,
    tail: u16,
}

impl BufferRing {
    /// Room for `entries` buffers (a power of two).
    pub(super) fn new(entries: u16) -> Result<Self, Errno> {
        let len = usize::from(entries) * size_of::<BufRingEntry>();
        let memory = memfd_create(c"relay-buffers", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&memory, i64::try_from(len).map_err(|_| Errno::EINVAL)?)?;
        Ok(Self { mapping: Mapping::new(&memory, 0, len, true, true)?, entries, tail: 0 })
    }

    /// Writes one buffer; the kernel sees it at the next [`BufferRing::publish`]. Never more than `entries` standing.
    pub(super) fn push(&mut self, address: u64, len: u32, number: u16) {
        let position = usize::from(self.tail & (self.entries - 1));
        // SAFETY: position < entries, and the mapping has room for that many.
        let entry = unsafe { self.mapping.as_ptr().cast::<BufRingEntry>().add(position) };
        // SAFETY: the kernel reads this entry only after publish(); the tail it shares bytes with is not written by the setters.
        let entry = unsafe { &mut *entry };
        entry.set_addr(address);
        entry.set_len(len);
        entry.set_bid(number);
        self.tail = self.tail.wrapping_add(1);
    }

    /// Shows the written buffers to the kernel.
    pub(super) fn publish(&mut self) {
        // SAFETY: a ring has at least one entry of 16 bytes, so the tail lies inside the mapping.
        let tail = unsafe { self.mapping.as_ptr().add(TAIL_AT) };
        // SAFETY: the mapping is page-aligned, so the tail is aligned to 2; the kernel only reads it.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast()) };
        tail.store(self.tail, Ordering::Release);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that cannot set up its objects has failed")]
mod tests {
    use super::*;
    use io_uring::opcode;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    /// Result of one request on a ring that may only send.
    fn result(request: &Entry) -> i32 {
        let (socket, _peer) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let mut ring = match Ring::new(&socket, 4, &[opcode::Send::CODE]) {
            Ok(ring) => ring,
            Err(errno) => {
                eprintln!("skipped: io_uring refused here: {errno}");
                return -libc::EACCES;
            }
        };
        ring.enable().unwrap();
        // SAFETY: the tests' requests point to static memory or to nothing.
        assert!(unsafe { ring.push(request) });
        ring.submit().unwrap();
        ring.completion().unwrap().result()
    }

    #[test]
    fn a_ring_does_nothing_but_its_half() {
        assert_eq!(result(&opcode::Nop::new().build().flags(Flags::FIXED_FILE)), -libc::EACCES);
        assert_eq!(result(&opcode::Socket::new(2, 2, 0).build().flags(Flags::FIXED_FILE)), -libc::EACCES);
        let unregistered = opcode::Send::new(io_uring::types::Fd(1), b"x".as_ptr(), 1).build();
        assert_eq!(result(&unregistered), -libc::EACCES, "only registered files");
    }

    #[test]
    fn its_own_half_works() {
        let sent = result(&opcode::Send::new(SOCKET, b"x".as_ptr(), 1).build());
        assert!(sent == 1 || sent == -libc::EACCES, "{sent}");
    }
}
