//! The rung below io_uring: recvmmsg and sendmmsg (backend `af_packet_plain`).
//!
//! Used where io_uring is refused (ENOSYS, EPERM, kernel.io_uring_disabled). Frames are the buffers here too, in the same
//! layout. A frame is with the kernel only within a call, so a kill loses at most the batch in hand.
//!
//! System calls: recvmmsg, sendmmsg, ppoll (in `wait`).
//! Must never sleep but in `wait`.
#![expect(unsafe_code, reason = "recvmmsg and sendmmsg over frames")]

use super::Held;
use super::layout::{self, CONTROL_AT, CONTROL_LEN, Message, PAYLOAD_AT, PAYLOAD_LEN};
use super::outbox::Outbox;
use super::receive::{Books, ReceiveEngine};
use super::transmit::SendEngine;
use super::uring_transmit::Scatter;
use super::wakeup::{Verdict, classify};
use crate::frame::{Frame, Umem};
use crate::nic::{BATCH_DESCS, BATCH_LEN, Batch, Kick};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// System calls of one flush at most: a packet that is refused ends a call.
const MAX_CALLS: usize = 16;

/// Receiving over recvmmsg.
#[derive(Debug)]
pub(super) struct PlainReceive {
    socket: OwnedFd,
    /// Frames ready to be received into.
    ready: ArrayVec<Frame, BATCH_LEN>,
    stopping: bool,
}

impl PlainReceive {
    /// Takes a socket of [`super::socket::open_receive`].
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, ready: ArrayVec::new(), stopping: false }
    }

    /// One recvmmsg into the first `count` ready frames. What came into each.
    fn call(&mut self, books: &mut Books, umem: &Umem, count: usize) -> ArrayVec<Message, BATCH_LEN> {
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
        let received = Errno::result(result).unwrap_or_else(|errno| {
            books.ended(errno);
            0
        });
        messages.iter().take(received as usize).map(received_message).collect()
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

impl ReceiveEngine for PlainReceive {
    fn lend(&mut self, _umem: &Umem, frame: Frame) -> Result<(), Frame> {
        if self.stopping {
            return Err(frame);
        }
        self.ready.try_push(frame).map_err(|full| full.element())
    }

    fn publish(&mut self) {}

    fn receive(&mut self, books: &mut Books, umem: &Umem, max: usize, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        let room = max.min(batch.remaining_capacity()).min(spare.remaining_capacity());
        let count = room.min(self.ready.len());
        books.starved += u64::from(room > 0 && count == 0);
        if count == 0 || self.stopping {
            return;
        }
        let messages = self.call(books, umem, count);
        for (message, frame) in messages.iter().zip(self.ready.drain(..messages.len())) {
            match layout::packet(umem, frame, *message) {
                Ok(packet) => batch.push(packet),
                Err(frame) => {
                    books.counters.too_big += 1;
                    spare.push(frame);
                }
            }
        }
    }

    fn standing(&self) -> u32 {
        self.ready.len() as u32
    }

    fn depth(&self) -> u32 {
        self.ready.capacity() as u32
    }

    fn stop(&mut self) -> Result<(), Errno> {
        self.stopping = true;
        Ok(())
    }

    fn is_stopped(&mut self) -> bool {
        self.stopping
    }

    fn take_back(&mut self) -> Option<Frame> {
        self.ready.pop()
    }

    fn wait(&mut self, socket: &OwnedFd, timeout: Duration) -> Result<bool, Errno> {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(timeout)), None) {
            Ok(count) => Ok(count > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno),
        }
    }
}

/// Sending over sendmmsg.
#[derive(Debug)]
pub(super) struct PlainTransmit {
    socket: OwnedFd,
    umem: Arc<Umem>,
    messages: Box<[Scatter]>,
}

impl PlainTransmit {
    /// Takes a socket of [`super::socket::open_send`].
    pub(super) fn new(socket: OwnedFd, umem: Arc<Umem>) -> Self {
        Self { socket, umem, messages: (0..BATCH_LEN).map(|_| Scatter::new()).collect() }
    }

    /// Hands up to [`BATCH_LEN`] packets over. False where the device is full and the rest has to wait.
    fn call<H: Held>(&mut self, outbox: &mut Outbox<H>) -> bool {
        let mut numbers: ArrayVec<u16, BATCH_LEN> = ArrayVec::new();
        let mut headers: ArrayVec<libc::mmsghdr, BATCH_LEN> = ArrayVec::new();
        for scatter in &mut self.messages {
            let Some((number, pieces)) = outbox.next() else { break };
            headers.push(libc::mmsghdr { msg_hdr: *scatter.point_at(&self.umem, pieces), msg_len: 0 });
            numbers.push(number);
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: each header points at a Scatter that outlives the call, and that at frames in the UMEM held by the outbox.
        let result = unsafe { libc::sendmmsg(self.socket.as_raw_fd(), headers.as_mut_ptr(), headers.len() as u32, flags) };
        settle(outbox, &numbers, Errno::result(result).map(|sent| sent as usize))
    }
}

/// sendmmsg says how many went, or why the first did not.
fn settle<H: Held>(outbox: &mut Outbox<H>, numbers: &[u16], result: Result<usize, Errno>) -> bool {
    let (done, rest) = numbers.split_at(result.unwrap_or(0).min(numbers.len()));
    done.iter().for_each(|number| outbox.settle(*number, Ok(())));
    let (Err(errno), Some((first, others))) = (result, rest.split_first()) else {
        outbox.unsend(rest);
        return true;
    };
    outbox.unsend(others);
    outbox.settle(*first, Err(errno));
    classify(errno) != Verdict::Retry
}

impl SendEngine for PlainTransmit {
    fn flush<H: Held>(&mut self, outbox: &mut Outbox<H>) -> Result<Kick, Errno> {
        for _ in 0..MAX_CALLS {
            if outbox.waiting() == 0 || !self.call(outbox) {
                break;
            }
        }
        Ok(outbox.verdict())
    }
}
