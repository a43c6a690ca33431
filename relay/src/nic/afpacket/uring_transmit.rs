//! Sending through io_uring: one send request per packet, one io_uring_enter per flush.
//!
//! A send on a packet socket copies the packet and ends within the call (MSG_DONTWAIT), so after a flush only
//! what is to be tried again is still here. A kill loses at most one flush, and sends nothing twice.
//!
//! System calls once made: io_uring_enter, io_uring_register (first use).
//! Must never wait for a completion.
#![expect(unsafe_code, reason = "requests that the kernel serves by address")]

use super::Held;
use super::outbox::{Outbox, Pieces};
use super::transmit::SendEngine;
use super::uring::{Ring, SOCKET};
use super::wakeup::classify_call;
use crate::frame::{MAX_FRAGMENTS, RawDesc, Umem};
use crate::nic::Kick;
use io_uring::{opcode, squeue};
use nix::errno::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;

const FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// Sending over io_uring. Fields drop in order: the ring before what its requests point to.
#[derive(Debug)]
pub(super) struct UringTransmit {
    ring: Ring,
    messages: Box<[Scatter]>,
    umem: Arc<Umem>,
}

/// The message of a packet in several pieces. Belongs to the packet's slot while its send is in flight.
#[derive(Debug)]
pub(super) struct Scatter {
    header: libc::msghdr,
    pieces: [libc::iovec; MAX_FRAGMENTS],
}

// SAFETY: its pointers lead to its owner's own UMEM and to itself; they have no affinity to a thread.
unsafe impl Send for Scatter {}

impl Scatter {
    /// No message.
    pub(super) fn new() -> Self {
        // SAFETY: all zeros is a valid msghdr: null pointers and no lengths.
        let header = unsafe { std::mem::zeroed() };
        Self { header, pieces: [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_FRAGMENTS] }
    }

    /// Points the message at a packet's pieces, which the outbox has found to lie in the UMEM. Valid until self moves.
    pub(super) fn point_at(&mut self, umem: &Umem, pieces: &Pieces) -> &libc::msghdr {
        for (to, piece) in self.pieces.iter_mut().zip(pieces) {
            *to = libc::iovec { iov_base: address(umem, piece).cast_mut().cast(), iov_len: piece.len as usize };
        }
        self.header.msg_iov = self.pieces.as_mut_ptr();
        self.header.msg_iovlen = pieces.len() as _;
        &self.header
    }
}

/// Where a piece lies in memory.
fn address(umem: &Umem, piece: &RawDesc) -> *const u8 {
    umem.as_ptr().wrapping_add(piece.addr as usize).cast_const()
}

impl UringTransmit {
    /// Takes a socket of [`super::socket::open_send`]; up to `depth` descriptors may be in flight.
    pub(super) fn new(socket: &OwnedFd, umem: Arc<Umem>, depth: u16) -> Result<Self, Errno> {
        let ring = Ring::new(socket, depth, &[opcode::Send::CODE, opcode::SendMsg::CODE])?;
        Ok(Self { ring, messages: (0..depth).map(|_| Scatter::new()).collect(), umem })
    }

    /// Makes a request of every waiting packet.
    fn load<H: Held>(&mut self, outbox: &mut Outbox<H>) {
        while let Some((number, pieces)) = outbox.next() {
            let Some(request) = request(&self.umem, self.messages.get_mut(usize::from(number)), pieces) else { continue };
            // SAFETY: frames and message stay as they are until settle(); UMEM and messages outlive the ring (field order).
            if !unsafe { self.ring.push(&request.user_data(u64::from(number))) } {
                return outbox.unsend(&[number]);
            }
        }
    }

    /// Takes what has completed.
    fn collect<H: Held>(&mut self, outbox: &mut Outbox<H>) {
        while let Some(completion) = self.ring.completion() {
            let result = match completion.result() {
                negative @ ..0 => Err(Errno::from_raw(negative.wrapping_neg())),
                _ => Ok(()),
            };
            outbox.settle(completion.user_data() as u16, result);
        }
    }
}

/// A packet in one piece needs no message.
fn request(umem: &Umem, scatter: Option<&mut Scatter>, pieces: &Pieces) -> Option<squeue::Entry> {
    if let [piece] = pieces.as_slice() {
        return Some(opcode::Send::new(SOCKET, address(umem, piece), piece.len).flags(FLAGS).build());
    }
    Some(opcode::SendMsg::new(SOCKET, scatter?.point_at(umem, pieces)).flags(FLAGS as u32).build())
}

impl SendEngine for UringTransmit {
    fn flush<H: Held>(&mut self, outbox: &mut Outbox<H>) -> Result<Kick, Errno> {
        self.ring.enable()?;
        self.load(outbox);
        if self.ring.has_work()
            && let Err(errno) = self.ring.submit()
        {
            self.collect(outbox);
            return classify_call(errno);
        }
        self.collect(outbox);
        Ok(outbox.verdict())
    }
}
