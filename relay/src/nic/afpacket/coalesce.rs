//! Sending runs of packets as UDP super-frames (`engine=coalesce`): sendmmsg with a virtio header before each message.
//!
//! What waits in the outbox is sorted into runs ([`super::runs`]), never waiting for more; a run of several packets is one message
//! that the kernel or the device cuts up again, a packet alone goes as it is. Runs go out in the order of their first packets,
//! so a flow stays in order. Where a super-frame is refused its packets go one by one, and after a few such refusals the engine
//! says that it is not to be used ([`super::adaptive`]). At most once: everything handed over has left its ring before the call.
//!
//! System call: sendmmsg. Must never wait for more packets, and never write one.
#![expect(unsafe_code, reason = "sendmmsg over frames")]

use super::Held;
use super::adaptive::Adaptive;
use super::outbox::Outbox;
use super::runs::{Header, Shape};
use super::transmit::SendEngine;
use super::wakeup::{Verdict, classify};
use crate::frame::{MAX_FRAGMENTS, RawDesc, Umem};
use crate::nic::{Admission, Kick};
use nix::errno::Errno;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// Packets sorted at a time, and so the most that a kill loses.
pub(super) const WINDOW: usize = 1024;
/// Places for runs that may still grow, and those looked at for one flow.
const OPEN: usize = 512;
const PROBES: usize = 8;
const NONE: u16 = u16::MAX;

/// The run that a flow may go on with.
#[derive(Clone, Copy, Debug)]
struct Open {
    hash: u32,
    /// Of which window; any other: the place is empty.
    window: u32,
    run: u16,
}

impl Open {
    const NONE: Self = Self { hash: 0, window: 0, run: NONE };
}

/// A packet in the window: its number in the outbox, and the next of its run.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    number: u16,
    next: u16,
}

/// Packets that go out together.
#[derive(Clone, Copy, Debug)]
struct Run {
    header: Header,
    /// `None`: a packet that can't be in a run.
    shape: Option<Shape>,
    label: u32,
    first: u16,
    last: u16,
    count: u16,
}

/// Messages of one call. The pointers are of use only while a call is made ready and made.
#[derive(Debug)]
struct Call {
    iovecs: Vec<libc::iovec>,
    messages: Vec<libc::mmsghdr>,
}

// SAFETY: its pointers are written and used within one call of `send`, on one thread.
unsafe impl Send for Call {}

/// The engine.
#[derive(Debug)]
pub(super) struct CoalesceTransmit {
    socket: OwnedFd,
    umem: Arc<Umem>,
    packets: Vec<Waiting>,
    runs: Vec<Run>,
    numbers: Vec<u16>,
    open: Box<[Open]>,
    window: u32,
    /// Runs before it grow no more.
    floor: u16,
    call: Call,
    adaptive: Adaptive,
}

impl CoalesceTransmit {
    /// Takes a socket of [`super::socket::open_coalesce`].
    pub(super) fn new(socket: OwnedFd, umem: Arc<Umem>) -> Self {
        Self {
            socket,
            umem,
            packets: Vec::with_capacity(WINDOW),
            runs: Vec::with_capacity(WINDOW),
            numbers: Vec::with_capacity(WINDOW),
            open: vec![Open::NONE; OPEN].into(),
            window: 0,
            floor: 0,
            call: Call { iovecs: Vec::with_capacity(WINDOW * (MAX_FRAGMENTS + 1)), messages: Vec::with_capacity(WINDOW) },
            adaptive: Adaptive::new(),
        }
    }

    /// A new window begins.
    pub(super) const fn begin_window(&mut self) {
        self.adaptive.begin_window();
    }

    /// What becomes of the next packet of an output.
    pub(super) fn admit(&mut self, label: u32) -> Admission {
        self.adaptive.admit(label)
    }

    /// Whether the device refuses super-frames.
    pub(super) const fn is_off(&self) -> bool {
        self.adaptive.is_off()
    }

    /// Sorts what waits into runs. False where nothing waits.
    fn gather<H: Held>(&mut self, outbox: &mut Outbox<H>) -> bool {
        self.packets.clear();
        self.runs.clear();
        self.window = self.window.wrapping_add(1);
        self.floor = 0;
        let umem = Arc::clone(&self.umem);
        while self.packets.len() < WINDOW {
            let Some((number, pieces)) = outbox.next() else { break };
            let at = self.packets.len() as u16;
            self.packets.push(Waiting { number, next: NONE });
            let [piece] = pieces.as_slice() else {
                let label = pieces.first().map_or(0, RawDesc::label);
                self.alone(Run { header: Header::NONE, shape: None, label, first: at, last: at, count: 1 });
                continue;
            };
            self.sort(&umem, at, *piece);
        }
        for run in &mut self.runs {
            match run.shape {
                Some(shape) if run.count > 1 => run.header.finish(shape, usize::from(run.count)),
                _ => run.header = Header::NONE,
            }
        }
        !self.packets.is_empty()
    }

    /// A packet that no run may take, nor may one go on past it: it could be of the same flow.
    fn alone(&mut self, run: Run) {
        self.runs.push(run);
        self.floor = self.runs.len() as u16;
    }

    /// Puts a packet in one piece into the run that it continues, or begins one.
    fn sort(&mut self, umem: &Umem, at: u16, piece: RawDesc) {
        let label = piece.label();
        let alone = Run { header: Header::NONE, shape: None, label, first: at, last: at, count: 1 };
        // The outbox has checked that the piece lies in the UMEM; the token ends here, the frame stays the outbox's.
        let Ok((frame, offset)) = umem.claim(piece) else { return self.alone(alone) };
        let bytes = umem.bytes(&frame, offset, piece.len);
        match Shape::of(bytes) {
            None => self.alone(alone),
            Some(shape) => self.join(at, label, shape, bytes),
        }
        frame.into_index();
    }

    /// Into the run that is open for its flow, or a new one that takes its place.
    fn join(&mut self, at: u16, label: u32, shape: Shape, bytes: &[u8]) {
        let new = self.runs.len() as u16;
        let mut none = Open::NONE;
        let hash = shape.hash(bytes) ^ label.wrapping_mul(0x85eb_ca6b);
        let open = place(&mut self.open, self.window, hash).unwrap_or(&mut none);
        let number = if open.run < self.floor { NONE } else { open.run };
        match self.runs.get_mut(usize::from(number)) {
            Some(run)
                if run.label == label && run.shape == Some(shape) && shape.continues(run.header.first(), usize::from(run.count), bytes) =>
            {
                if let Some(last) = self.packets.get_mut(usize::from(run.last)) {
                    last.next = at;
                }
                (run.last, run.count) = (at, run.count + 1);
            }
            _ => {
                open.run = new;
                self.runs.push(Run { header: Header::begin(shape, bytes), shape: Some(shape), label, first: at, last: at, count: 1 });
            }
        }
    }

    /// Sends runs; returns the number that went, or why the first did not.
    fn send<H: Held>(&mut self, outbox: &Outbox<H>, runs: &[Run]) -> Result<usize, Errno> {
        let Self { call: Call { iovecs, messages }, packets, umem, socket, .. } = self;
        iovecs.clear();
        messages.clear();
        for run in runs {
            let first = iovecs.len();
            iovecs.push(libc::iovec { iov_base: run.header.bytes().as_ptr().cast_mut().cast(), iov_len: run.header.bytes().len() });
            let skip = if run.count > 1 { run.shape } else { None };
            let mut next = run.first;
            while let Some(packet) = packets.get(usize::from(next)) {
                for piece in outbox.pieces(packet.number) {
                    let (skip, len) = skip.map_or((0, piece.len as usize), |shape| (shape.header_len(), shape.payload_len));
                    let from = umem.as_ptr().wrapping_add(piece.addr as usize + skip);
                    iovecs.push(libc::iovec { iov_base: from.cast(), iov_len: len });
                }
                next = if run.count > 1 { packet.next } else { NONE };
            }
            // SAFETY: all zeros is a valid mmsghdr: null pointers and no lengths.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            // Where its iovecs begin, until all of them have their places.
            message.msg_hdr.msg_iov = std::ptr::without_provenance_mut(first);
            message.msg_hdr.msg_iovlen = (iovecs.len() - first) as _;
            messages.push(message);
        }
        for message in messages.iter_mut() {
            message.msg_hdr.msg_iov = iovecs.as_mut_ptr().wrapping_add(message.msg_hdr.msg_iov.addr());
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: every message points at its own iovecs, these at headers in `runs` and at frames that the outbox holds (it
        // has found them to lie in the UMEM); all outlive the call.
        let result = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), messages.len() as u32, flags) };
        Errno::result(result).map(|sent| (sent as usize).min(runs.len()))
    }

    /// The packets of a run, from `at` on: place in the window and number in the outbox.
    fn chain(&self, at: u16) -> impl Iterator<Item = (u16, u16)> + '_ {
        let get = |at: u16| self.packets.get(usize::from(at)).map(|packet| (at, *packet));
        std::iter::successors(get(at), move |(_, packet)| get(packet.next)).map(|(at, packet)| (at, packet.number))
    }

    /// Sends the runs in order; `Err`: from this run, and this packet of it, on they have to wait.
    fn send_all<H: Held>(&mut self, outbox: &mut Outbox<H>, runs: &[Run]) -> Result<(), (usize, u16)> {
        let mut done = 0;
        while let Some(rest @ [run, ..]) = runs.get(done..) {
            match self.send(outbox, rest) {
                Ok(sent) if sent > 0 => {
                    for run in rest.iter().take(sent) {
                        self.chain(run.first).for_each(|(_, number)| outbox.settle(number, Ok(())));
                        self.adaptive.sent(u32::from(run.count));
                    }
                    done += sent;
                }
                Ok(_) => return Err((done, run.first)),
                Err(errno) => {
                    self.one_by_one(outbox, run, errno).map_err(|at| (done, at))?;
                    done += 1;
                }
            }
        }
        Ok(())
    }

    /// What was refused: the packets of a super-frame each for itself; a packet alone waits or is given up. `Err`: from this
    /// packet on they have to wait.
    fn one_by_one<H: Held>(&mut self, outbox: &mut Outbox<H>, run: &Run, errno: Errno) -> Result<(), u16> {
        let is_dead = matches!(classify(errno), Verdict::Down | Verdict::Gone);
        let mut next = run.first;
        while let Some(Waiting { number, next: following }) = self.packets.get(usize::from(next)).copied() {
            let single = Run { header: Header::NONE, first: next, count: 1, ..*run };
            let result = if is_dead || run.count == 1 { Err(errno) } else { self.send(outbox, &[single]) };
            match result {
                Ok(_) => {
                    outbox.settle(number, Ok(()));
                    if next == run.first {
                        self.adaptive.refused();
                    }
                }
                Err(again) if classify(again) == Verdict::Retry && outbox.may_wait(number) => return Err(next),
                Err(other) => outbox.give_up(number, other),
            }
            next = following;
        }
        Ok(())
    }

    /// Puts packets back to the front of the outbox, in order: the rest of the first run from packet `at` on, and the other runs.
    fn put_back<H: Held>(&mut self, outbox: &mut Outbox<H>, runs: &[Run], at: u16) {
        let mut numbers = std::mem::take(&mut self.numbers);
        numbers.clear();
        let firsts = std::iter::once(at).chain(runs.iter().skip(1).map(|run| run.first));
        firsts.for_each(|first| numbers.extend(self.chain(first).map(|(_, number)| number)));
        outbox.unsend(&numbers);
        self.numbers = numbers;
    }
}

/// Where the run of a flow stands: its place, or an empty one, or where all that were looked at are taken, the first of them. (One
/// place a flow had two outputs of 16 fall on the same one as a rule, and each packet of them cut the other's run.)
fn place(open: &mut [Open], window: u32, hash: u32) -> Option<&mut Open> {
    let at = |probe: usize| (hash as usize).wrapping_add(probe) % OPEN;
    let fits = |place: &Open| place.window != window || place.hash == hash;
    let chosen = (0..PROBES).map(at).find(|at| open.get(*at).is_some_and(fits)).unwrap_or_else(|| at(0));
    let place = open.get_mut(chosen)?;
    if (place.window, place.hash) != (window, hash) {
        *place = Open { hash, window, run: NONE };
    }
    Some(place)
}

impl SendEngine for CoalesceTransmit {
    fn flush<H: Held>(&mut self, outbox: &mut Outbox<H>) -> Result<Kick, Errno> {
        while self.gather(outbox) {
            let runs = std::mem::take(&mut self.runs);
            let result = self.send_all(outbox, &runs);
            if let Err((from, at)) = result {
                self.put_back(outbox, runs.get(from..).unwrap_or_default(), at);
            }
            self.runs = runs;
            if result.is_err() {
                break;
            }
        }
        Ok(outbox.verdict())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_with_one_place_keep_their_runs() {
        let mut open = vec![Open::NONE; OPEN];
        let hashes: Vec<u32> = (0..PROBES as u32).map(|n| 7 + n * OPEN as u32).collect();
        let mut run_of = |window, hash| place(&mut open, window, hash).unwrap().run;
        assert_eq!(run_of(1, hashes[0]), NONE);
        for (number, hash) in hashes.iter().enumerate() {
            place(&mut open, 1, *hash).unwrap().run = number as u16;
        }
        let mut run_of = |window, hash| place(&mut open, window, hash).unwrap().run;
        assert!(hashes.iter().enumerate().all(|(number, hash)| run_of(1, *hash) == number as u16), "each has its own");
        assert_eq!(run_of(1, 7 + 99 * OPEN as u32), NONE, "one too many takes the first place");
        assert_eq!((run_of(1, hashes[1]), run_of(2, hashes[1])), (1, NONE), "a new window has none");
    }
}
