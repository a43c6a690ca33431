//! Receiving through io_uring: one multishot recvmsg into a ring of provided buffers that are UMEM frames.
//!
//! A frame lent to the kernel stays as a token in `posted` until the completion that names it. At most `depth` packets are
//! with the kernel or unread in the completion queue; a kill loses at most these (DECISIONS §8), what stands in the
//! socket's queue waits for the successor, and the held map tells it which frames were lent.
//! A packet larger than a frame is counted `too_big`: larger or bundled buffers for jumbo packets are a later step; so are
//! super-frames (virtio USO, a local sender's GSO), which are refused whole.
//!
//! System calls once made: io_uring_enter, io_uring_register (first use).
//! Must never look at what a packet says.
#![expect(unsafe_code, reason = "requests that the kernel serves by address")]

use super::layout::{self, BUFFER_AT, BUFFER_LEN, CONTROL_LEN};
use super::receive::{Books, ReceiveEngine};
use super::uring::{BUFFER_GROUP, BufferRing, Ring, SOCKET};
use crate::frame::{Frame, Umem};
use crate::nic::{BATCH_DESCS, Batch};
use arrayvec::ArrayVec;
use io_uring::{cqueue, opcode};
use nix::errno::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

const RECEIVE: u64 = 1;
const CANCEL: u64 = 2;

/// Receiving over io_uring. Fields drop in order: the ring before what its requests point to.
#[derive(Debug)]
pub(super) struct UringReceive {
    ring: Ring,
    buffers: BufferRing,
    message: Box<MessageHeader>,
    umem: Arc<Umem>,
    /// By buffer number: the frame lent to the kernel.
    posted: Box<[Option<Frame>]>,
    vacant: Vec<u16>,
    armed: bool,
    stopping: bool,
}

/// `struct msghdr` that says how long the control data may be; it holds no pointers.
#[derive(Debug)]
struct MessageHeader(libc::msghdr);

// SAFETY: all pointers in it are null.
unsafe impl Send for MessageHeader {}

impl MessageHeader {
    fn new() -> Box<Self> {
        // SAFETY: all zeros is a valid msghdr: null pointers and no lengths.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_controllen = CONTROL_LEN as _;
        Box::new(Self(header))
    }
}

impl UringReceive {
    /// Takes a socket of [`super::socket::open_receive`]; `depth` (a power of two) frames of `umem` will stand with the kernel.
    pub(super) fn new(socket: &OwnedFd, umem: Arc<Umem>, depth: u16) -> Result<Self, Errno> {
        if !depth.is_power_of_two() || depth > 1 << 15 {
            return Err(Errno::EINVAL);
        }
        let ring = Ring::new(socket, depth, &[opcode::RecvMsgMulti::CODE, opcode::AsyncCancel::CODE])?;
        let buffers = BufferRing::new(depth)?;
        ring.register_buffers(&buffers)?;
        Ok(Self {
            ring,
            buffers,
            message: MessageHeader::new(),
            umem,
            posted: (0..depth).map(|_| None).collect(),
            vacant: (0..depth).rev().collect(),
            armed: false,
            stopping: false,
        })
    }

    /// Queues and submits the multishot request.
    fn arm(&mut self) -> Result<(), Errno> {
        self.ring.enable()?;
        let message = &raw const self.message.0;
        // MSG_TRUNC is not asked for: it would change the length reported, and msg_flags tells of truncation anyway.
        let request = opcode::RecvMsgMulti::new(SOCKET, message, BUFFER_GROUP).build().user_data(RECEIVE);
        // SAFETY: the header is boxed and outlives the ring (field order); buffers are frames of `umem`, alive as long.
        self.armed = unsafe { self.ring.push(&request) };
        self.ring.submit()
    }

    /// Enters the kernel where that yields something.
    #[inline]
    fn enter(&mut self, books: &mut Books) -> bool {
        if !self.ring.has_work() {
            return false;
        }
        if let Err(errno) = self.ring.submit() {
            books.last_error = Some(errno);
        }
        true
    }

    /// Makes one completion a packet, or counts why it is none.
    fn take(
        &mut self,
        books: &mut Books,
        umem: &Umem,
        completion: &cqueue::Entry,
        batch: &mut Batch,
        spare: &mut ArrayVec<Frame, BATCH_DESCS>,
    ) {
        if completion.user_data() != RECEIVE {
            return;
        }
        self.armed &= cqueue::more(completion.flags());
        let frame = self.reclaim(completion.flags());
        let Ok(written) = u32::try_from(completion.result()) else {
            // A request that failed after it had chosen a buffer gives it back with its completion.
            spare.extend(frame);
            return books.ended(Errno::from_raw(completion.result().wrapping_neg()));
        };
        let Some(frame) = frame else {
            books.counters.invalid += 1;
            return;
        };
        let message = layout::uring_message(umem, &frame, written);
        match layout::packet(umem, frame, message) {
            Ok(packet) => batch.push(packet),
            Err(frame) => {
                books.counters.too_big += 1;
                spare.push(frame);
            }
        }
    }

    /// The frame a completion names. It stays marked as held until the data path has put it elsewhere.
    fn reclaim(&mut self, flags: u32) -> Option<Frame> {
        let number = cqueue::buffer_select(flags)?;
        let frame = self.posted.get_mut(usize::from(number)).and_then(Option::take)?;
        self.vacant.push(number);
        Some(frame)
    }
}

impl ReceiveEngine for UringReceive {
    fn lend(&mut self, umem: &Umem, frame: Frame) -> Result<(), Frame> {
        debug_assert!(std::ptr::eq(umem.as_ptr(), self.umem.as_ptr()), "another UMEM");
        let number = if self.stopping { None } else { self.vacant.pop() };
        let Some((number, place)) = number.and_then(|number| Some((number, self.posted.get_mut(usize::from(number))?))) else {
            return Err(frame);
        };
        let address = umem.as_ptr() as u64 + frame.base() + u64::from(BUFFER_AT);
        self.buffers.push(address, BUFFER_LEN, number);
        *place = Some(frame);
        Ok(())
    }

    fn publish(&mut self) {
        self.buffers.publish();
    }

    fn receive(&mut self, books: &mut Books, umem: &Umem, max: usize, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        let max = max.min(batch.capacity());
        let mut entered = false;
        if !self.armed && !self.stopping && self.vacant.len() < self.posted.len() {
            books.last_error = self.arm().err().or(books.last_error);
        }
        while batch.len() < max && !spare.is_full() {
            match self.ring.completion() {
                Some(completion) => self.take(books, umem, &completion, batch, spare),
                None if !entered && self.enter(books) => entered = true,
                None => break,
            }
        }
    }

    fn standing(&self) -> u32 {
        (self.posted.len() - self.vacant.len()) as u32
    }

    fn depth(&self) -> u32 {
        self.posted.len() as u32
    }

    fn stop(&mut self) -> Result<(), Errno> {
        if self.armed && !self.stopping {
            let cancel = opcode::AsyncCancel::new(RECEIVE).build().flags(io_uring::squeue::Flags::FIXED_FILE).user_data(CANCEL);
            // SAFETY: a cancel request points to nothing.
            if !unsafe { self.ring.push(&cancel) } {
                return Err(Errno::EAGAIN);
            }
            self.ring.submit()?;
        }
        self.stopping = true;
        Ok(())
    }

    fn is_stopped(&mut self) -> bool {
        self.stopping && !self.armed && !self.ring.has_completion()
    }

    fn take_back(&mut self) -> Option<Frame> {
        let (number, frame) = self.posted.iter_mut().enumerate().find_map(|(number, place)| Some((number, place.take()?)))?;
        self.vacant.push(number as u16);
        Some(frame)
    }

    fn wait(&mut self, _socket: &OwnedFd, timeout: Duration) -> Result<bool, Errno> {
        if self.ring.has_completion() {
            return Ok(true);
        }
        self.ring.wait(timeout)
    }
}
