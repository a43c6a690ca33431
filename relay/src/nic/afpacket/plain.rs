//! The rung below io_uring: recvmmsg and sendmmsg behind the same contract (backend `af_packet_plain`).
//!
//! Used where io_uring is refused (ENOSYS, EPERM, kernel.io_uring_disabled). Frames are the buffers here too, in the same
//! layout. A frame is with the kernel only within a call, so a kill loses at most the batch in hand.
//!
//! System calls: recvmmsg, sendmmsg, ppoll, getsockopt (in [`PlainReceive::housekeeping`]).
//! Must never sleep but in [`PlainReceive::wait`].
#![expect(unsafe_code, reason = "recvmmsg and sendmmsg over frames")]

use super::layout::{self, CONTROL_AT, CONTROL_LEN, Message, PAYLOAD_AT, PAYLOAD_LEN};
use super::outbox::Outbox;
use super::uring_transmit::Scatter;
use super::wakeup::{Verdict, classify};
use super::{Drops, Held};
use crate::frame::{Frame, Pool, RawDesc, Umem};
use crate::nic::{BATCH_DESCS, BATCH_LEN, Batch, Kick, Receive, ReceiveCounters, Transmit};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// System calls of one flush at most: a packet that is refused ends a call.
const MAX_CALLS: usize = 16;

/// Receiving half over recvmmsg.
#[derive(Debug)]
pub struct PlainReceive<H> {
    socket: OwnedFd,
    held: H,
    /// Frames ready to be received into.
    ready: ArrayVec<Frame, BATCH_LEN>,
    stopping: bool,
    counters: ReceiveCounters,
    drops: Drops,
    last_error: Option<Errno>,
}

impl<H: Held> PlainReceive<H> {
    /// Takes a socket of [`super::socket::open_receive`].
    pub fn new(socket: OwnedFd, held: H) -> Self {
        let (counters, drops) = (ReceiveCounters::default(), Drops::default());
        Self { socket, held, ready: ArrayVec::new(), stopping: false, counters, drops, last_error: None }
    }

    /// Reads the kernel's drop counter. Outside the turns of packets.
    pub fn housekeeping(&mut self) {
        self.drops.read(&self.socket, &mut self.counters);
    }

    /// Numbers of the frames set aside for receiving.
    pub fn held(&self) -> impl Iterator<Item = u32> {
        self.ready.iter().map(Frame::index)
    }

    /// Ends receiving; what is in the socket stays there for the successor.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Whether receiving has ended.
    pub fn is_stopped(&self) -> bool {
        self.stopping
    }

    /// Puts the frames set aside back into the pool, once stopped. Returns how many.
    pub fn take_back(&mut self, pool: &mut Pool) -> u32 {
        if !self.stopping {
            return 0;
        }
        let held = &self.held;
        self.ready.drain(..).fold(0, |count, frame| {
            held.set(frame.index(), false);
            pool.put(frame);
            count + 1
        })
    }

    /// Descriptor to poll for packets.
    pub fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Sleeps until there is a packet or the time is over. True for a packet (or an error to look at).
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, Errno> {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(timeout)), None) {
            Ok(count) => Ok(count > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Times receiving found no frame.
    pub fn starved(&self) -> u64 {
        self.drops.starved
    }

    /// Why receiving last failed (ENETDOWN: the interface went down or away).
    pub fn last_error(&self) -> Option<Errno> {
        self.last_error
    }

    /// One recvmmsg into the first `count` ready frames. What came into each.
    fn call(&mut self, umem: &Umem, count: usize) -> ArrayVec<Message, BATCH_LEN> {
        let mut iovecs: ArrayVec<libc::iovec, BATCH_LEN> = ArrayVec::new();
        let mut messages: ArrayVec<libc::mmsghdr, BATCH_LEN> = ArrayVec::new();
        for frame in self.ready.iter_mut().take(count) {
            let payload = umem.bytes_mut(frame, PAYLOAD_AT, PAYLOAD_LEN);
            iovecs.push(libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() });
            let control = umem.bytes_mut(frame, CONTROL_AT, CONTROL_LEN).as_mut_ptr();
            messages.push(receive_header(control));
        }
        for (message, iovec) in messages.iter_mut().zip(&mut iovecs) {
            message.msg_hdr.msg_iov = iovec;
        }
        let (fd, first) = (self.socket.as_raw_fd(), messages.as_mut_ptr());
        // SAFETY: each message points at its own iovec and at bytes of a frame whose token is in `ready`; all outlive the call.
        let result = unsafe { libc::recvmmsg(fd, first, messages.len() as u32, libc::MSG_DONTWAIT, std::ptr::null_mut()) };
        let received = Errno::result(result).unwrap_or_else(|errno| self.note(errno));
        messages.iter().take(received as usize).map(received_message).collect()
    }

    fn note(&mut self, errno: Errno) -> i32 {
        match errno {
            Errno::EAGAIN | Errno::EINTR => {}
            // packet_rcv_vnet: a kind of super-frame that struct virtio_net_hdr has no word for.
            Errno::EINVAL => self.counters.too_big += 1,
            other => self.last_error = Some(other),
        }
        0
    }
}

fn receive_header(control: *mut u8) -> libc::mmsghdr {
    // SAFETY: all zeros is a valid mmsghdr: null pointers and no lengths.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_iovlen = 1;
    message.msg_hdr.msg_control = control.cast();
    message.msg_hdr.msg_controllen = CONTROL_LEN as _;
    message
}

fn received_message(message: &libc::mmsghdr) -> Message {
    let header = &message.msg_hdr;
    Message { control_len: header.msg_controllen as u32, payload_len: message.msg_len, flags: header.msg_flags as u32 }
}

impl<H> AsFd for PlainReceive<H> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<H: Held> Receive for PlainReceive<H> {
    fn receive(&mut self, umem: &Umem, max: usize, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        let room = max.min(batch.remaining_capacity()).min(spare.remaining_capacity());
        let count = room.min(self.ready.len());
        self.drops.starved += u64::from(room > 0 && count == 0);
        if count == 0 || self.stopping {
            return;
        }
        let messages = self.call(umem, count);
        for (message, frame) in messages.iter().zip(self.ready.drain(..messages.len())) {
            match layout::packet(umem, frame, *message) {
                Ok(packet) => batch.push(packet),
                Err(frame) => {
                    self.counters.too_big += 1;
                    spare.push(frame);
                }
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
        self.ready.len() as u32
    }

    fn stage_refill(&mut self, umem: &Umem, pool: &Pool, max: u32) -> u32 {
        let mut count = 0;
        while !self.stopping && count < max.min(pool.len()) && !self.ready.is_full() {
            let Ok(frame) = umem.claim_index(pool.peek(pool.len() - 1 - count)) else { break };
            self.held.set(frame.index(), true);
            self.ready.push(frame);
            count += 1;
        }
        count
    }

    fn refill_position(&self) -> u32 {
        0
    }

    fn publish_refill(&mut self, _count: u32) {}

    fn depth(&self) -> u32 {
        self.ready.capacity() as u32
    }

    fn counters(&self) -> ReceiveCounters {
        self.counters
    }
}

/// Sending half over sendmmsg.
#[derive(Debug)]
pub struct PlainTransmit<H> {
    socket: OwnedFd,
    umem: Arc<Umem>,
    outbox: Outbox<H>,
    messages: Box<[Scatter]>,
}

impl<H: Held> PlainTransmit<H> {
    /// Takes a socket of [`super::socket::open_send`]; up to `depth` descriptors may be put before they are reaped.
    pub fn new(socket: OwnedFd, umem: Arc<Umem>, depth: u16, held: H) -> Self {
        let outbox = Outbox::new(depth, umem.len() as u64, held);
        Self { socket, umem, outbox, messages: (0..BATCH_LEN).map(|_| Scatter::new()).collect() }
    }

    /// Hands up to [`BATCH_LEN`] packets over. False where the device is full and the rest has to wait.
    fn call(&mut self) -> bool {
        let mut numbers: ArrayVec<u16, BATCH_LEN> = ArrayVec::new();
        let mut headers: ArrayVec<libc::mmsghdr, BATCH_LEN> = ArrayVec::new();
        for scatter in &mut self.messages {
            let Some((number, pieces)) = self.outbox.next() else { break };
            headers.push(libc::mmsghdr { msg_hdr: *scatter.point_at(&self.umem, pieces), msg_len: 0 });
            numbers.push(number);
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: each header points at a Scatter that outlives the call, and that at frames in the UMEM held by the outbox.
        let result = unsafe { libc::sendmmsg(self.socket.as_raw_fd(), headers.as_mut_ptr(), headers.len() as u32, flags) };
        self.settle(&numbers, Errno::result(result).map(|sent| sent as usize))
    }

    /// sendmmsg says how many went, or why the first did not.
    fn settle(&mut self, numbers: &[u16], result: Result<usize, Errno>) -> bool {
        let (done, rest) = numbers.split_at(result.unwrap_or(0).min(numbers.len()));
        done.iter().for_each(|number| self.outbox.settle(*number, Ok(())));
        let (Err(errno), Some((first, others))) = (result, rest.split_first()) else {
            self.outbox.unsend(rest);
            return true;
        };
        self.outbox.unsend(others);
        self.outbox.settle(*first, Err(errno));
        classify(errno) != Verdict::Retry
    }
}

impl<H: Held> Transmit for PlainTransmit<H> {
    fn free(&mut self) -> u32 {
        self.outbox.free()
    }

    fn put(&mut self, desc: RawDesc) {
        self.outbox.put(desc);
    }

    fn publish(&mut self) {}

    fn kick(&mut self) -> Result<Kick, Errno> {
        for _ in 0..MAX_CALLS {
            if self.outbox.waiting() == 0 || !self.call() {
                break;
            }
        }
        Ok(self.outbox.verdict())
    }

    fn reap(&mut self, out: &mut ArrayVec<u64, BATCH_LEN>) {
        self.outbox.reap(out);
    }

    fn reaped(&mut self, count: u32) {
        self.outbox.give_back(count);
    }

    fn survives(&self) -> bool {
        false
    }

    fn position(&self) -> u32 {
        self.outbox.produced()
    }

    fn reap_position(&self) -> u32 {
        self.outbox.reaped()
    }

    fn outstanding(&self) -> u32 {
        self.outbox.outstanding()
    }

    fn failed(&self) -> u64 {
        self.outbox.failed()
    }
}
