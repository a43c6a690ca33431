//! Receiving through io_uring: one multishot recvmsg into a ring of provided buffers that are UMEM frames.
//!
//! A frame lent to the kernel stays as a token in `posted` until the completion that names it. At most `depth` packets are
//! with the kernel or unread in the completion queue; a kill loses at most these (DECISIONS §8), what stands in the
//! socket's queue waits for the successor, and the held map tells it which frames were lent.
//! A packet larger than a frame is counted `too_big`: larger or bundled buffers for jumbo packets are a later step; so are
//! super-frames (virtio USO, a local sender's GSO), which are refused whole.
//!
//! System calls once made: io_uring_enter, getsockopt (in [`UringReceive::housekeeping`]), io_uring_register (first use).
//! Must never look at what a packet says.
#![expect(unsafe_code, reason = "requests that the kernel serves by address")]

use super::layout::{self, BUFFER_AT, BUFFER_LEN, CONTROL_LEN};
use super::uring::{BUFFER_GROUP, BufferRing, Ring, SOCKET};
use super::{Drops, Held};
use crate::frame::{Frame, Pool, Umem};
use crate::nic::{BATCH_DESCS, Batch, Receive, ReceiveCounters};
use arrayvec::ArrayVec;
use io_uring::{cqueue, opcode};
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

const RECEIVE: u64 = 1;
const CANCEL: u64 = 2;

/// Receiving half over io_uring. Fields drop in order: the ring before what its requests point to.
#[derive(Debug)]
pub struct UringReceive<H> {
    ring: Ring,
    buffers: BufferRing,
    message: Box<MessageHeader>,
    umem: Arc<Umem>,
    socket: OwnedFd,
    held: H,
    /// By buffer number: the frame lent to the kernel.
    posted: Box<[Option<Frame>]>,
    vacant: Vec<u16>,
    armed: bool,
    stopping: bool,
    counters: ReceiveCounters,
    drops: Drops,
    last_error: Option<Errno>,
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

impl<H: Held> UringReceive<H> {
    /// Takes a socket of [`super::socket::open_receive`]; `depth` (a power of two) frames of `umem` will stand with the kernel.
    /// May be made on any thread; the one that refills it first must go on using it.
    pub fn new(socket: OwnedFd, umem: Arc<Umem>, depth: u16, held: H) -> Result<Self, Errno> {
        if !depth.is_power_of_two() || depth > 1 << 15 {
            return Err(Errno::EINVAL);
        }
        let ring = Ring::new(&socket, depth, &[opcode::RecvMsgMulti::CODE, opcode::AsyncCancel::CODE])?;
        let buffers = BufferRing::new(depth)?;
        ring.register_buffers(&buffers)?;
        Ok(Self {
            ring,
            buffers,
            message: MessageHeader::new(),
            umem,
            socket,
            held,
            posted: (0..depth).map(|_| None).collect(),
            vacant: (0..depth).rev().collect(),
            armed: false,
            stopping: false,
            counters: ReceiveCounters::default(),
            drops: Drops::default(),
            last_error: None,
        })
    }

    /// Reads the kernel's drop counter. Outside the turns of packets.
    pub fn housekeeping(&mut self) {
        self.drops.read(&self.socket, &mut self.counters);
    }

    /// Numbers of the frames lent to the kernel.
    pub fn held(&self) -> impl Iterator<Item = u32> {
        self.posted.iter().flatten().map(Frame::index)
    }

    /// Ends receiving for a planned replacement: packets not yet received stay in the socket for the successor. Go on with
    /// [`Receive::receive`] until [`UringReceive::is_stopped`], then [`UringReceive::take_back`].
    pub fn stop(&mut self) -> Result<(), Errno> {
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

    /// Whether the kernel has ended the request and all its packets were taken.
    pub fn is_stopped(&mut self) -> bool {
        self.stopping && !self.armed && !self.ring.has_completion()
    }

    /// Puts the frames lent to the kernel back into the pool, once stopped. Returns how many.
    pub fn take_back(&mut self, pool: &mut Pool) -> u32 {
        if !self.is_stopped() {
            return 0;
        }
        let held = &self.held;
        let frames = self.posted.iter_mut().filter_map(Option::take);
        frames.fold(0, |count, frame| {
            held.set(frame.index(), false);
            pool.put(frame);
            count + 1
        })
    }

    /// Descriptor to poll for packets.
    pub fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Sleeps until there is a packet or the time is over. True for a packet (or anything else to look at).
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, Errno> {
        if self.ring.has_completion() {
            return Ok(true);
        }
        self.ring.wait(timeout)
    }

    /// Times the kernel found no buffer.
    pub fn starved(&self) -> u64 {
        self.drops.starved
    }

    /// Why receiving last ended by itself (ENETDOWN: the interface went down or away).
    pub fn last_error(&self) -> Option<Errno> {
        self.last_error
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
    fn enter(&mut self) -> bool {
        if !self.ring.has_work() {
            return false;
        }
        if let Err(errno) = self.ring.submit() {
            self.last_error = Some(errno);
        }
        true
    }

    /// Makes one completion a packet, or counts why it is none.
    fn take(&mut self, umem: &Umem, completion: &cqueue::Entry, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        if completion.user_data() != RECEIVE {
            return;
        }
        self.armed &= cqueue::more(completion.flags());
        if let Ok(written) = u32::try_from(completion.result()) {
            match self.reclaim(completion.flags()) {
                Some(frame) => self.accept(umem, frame, written, batch, spare),
                None => self.counters.invalid += 1,
            }
            return;
        }
        // A request that failed after it had chosen a buffer gives it back with its completion.
        spare.extend(self.reclaim(completion.flags()));
        self.ended(Errno::from_raw(completion.result().wrapping_neg()));
    }

    fn accept(&mut self, umem: &Umem, frame: Frame, written: u32, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        let message = layout::uring_message(umem, &frame, written);
        match layout::packet(umem, frame, message) {
            Ok(packet) => batch.push(packet),
            Err(frame) => {
                self.counters.too_big += 1;
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

    /// The multishot request ended; refill() makes a new one.
    fn ended(&mut self, errno: Errno) {
        match errno {
            Errno::ENOBUFS => self.drops.starved += 1,
            Errno::ECANCELED => {}
            // packet_rcv_vnet: a kind of super-frame that struct virtio_net_hdr has no word for.
            Errno::EINVAL => self.counters.too_big += 1,
            other => self.last_error = Some(other),
        }
    }

    fn lend(&mut self, umem: &Umem, number: u16, frame: Frame) {
        self.held.set(frame.index(), true);
        let address = umem.as_ptr() as u64 + frame.base() + u64::from(BUFFER_AT);
        self.buffers.push(address, BUFFER_LEN, number);
        if let Some(place) = self.posted.get_mut(usize::from(number)) {
            *place = Some(frame);
        }
    }
}

impl<H> AsFd for UringReceive<H> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl<H: Held> Receive for UringReceive<H> {
    fn receive(&mut self, umem: &Umem, max: usize, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        let max = max.min(batch.capacity());
        let mut entered = false;
        if !self.armed && !self.stopping && self.vacant.len() < self.posted.len() {
            self.last_error = self.arm().err().or(self.last_error);
        }
        while batch.len() < max && !spare.is_full() {
            match self.ring.completion() {
                Some(completion) => self.take(umem, &completion, batch, spare),
                None if !entered && self.enter() => entered = true,
                None => break,
            }
        }
    }

    fn release(&mut self) {}

    fn position(&self) -> u32 {
        0
    }

    fn survives(&self) -> bool {
        false
    }

    fn standing(&self) -> u32 {
        (self.posted.len() - self.vacant.len()) as u32
    }

    fn stage_refill(&mut self, umem: &Umem, pool: &Pool, max: u32) -> u32 {
        debug_assert!(std::ptr::eq(umem.as_ptr(), self.umem.as_ptr()), "another UMEM");
        let mut count = 0;
        while !self.stopping && count < max.min(pool.len()) {
            let Ok(frame) = umem.claim_index(pool.peek(pool.len() - 1 - count)) else { break };
            let Some(number) = self.vacant.pop() else {
                frame.into_index();
                break;
            };
            self.lend(umem, number, frame);
            count += 1;
        }
        count
    }

    fn refill_position(&self) -> u32 {
        0
    }

    fn publish_refill(&mut self, _count: u32) {
        self.buffers.publish();
    }

    fn depth(&self) -> u32 {
        self.posted.len() as u32
    }

    fn counters(&self) -> ReceiveCounters {
        self.counters
    }
}
