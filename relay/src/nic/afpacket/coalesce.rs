//! Sending runs of packets as UDP super-frames (`engine=coalesce`): sendmmsg with a virtio header before each message.
//!
//! What waits in the outbox is sorted into runs ([`super::runs`]), never waiting for more; a run of several packets is one message
//! that the kernel or the device cuts up again, a packet alone goes as it is. Runs go out in the order of their first packets,
//! so a flow stays in order. Packets for several outputs of this port come as bundles (frame/bundle.rs): their runs are sorted once,
//! and sent to one output after the other, each with its own header before the same payloads. Where a super-frame is refused its
//! packets go one by one, and after a few such refusals the engine says that it is not to be used ([`super::adaptive`]). At most
//! once: everything handed over has left its ring before the call.
//!
//! System call: sendmmsg. Must never wait for more packets, and never write one.
#![expect(unsafe_code, reason = "sendmmsg over frames")]

use super::Held;
use super::adaptive::Adaptive;
use super::outbox::Outbox;
use super::runs::{Header, Shape};
use super::transmit::SendEngine;
use super::wakeup::{Verdict, classify};
use crate::frame::bundle::{Bundle, BundleHead};
use crate::frame::{Frame, MAX_FRAGMENTS, RawDesc, Umem};
use crate::nic::{Admission, Kick, Refusal, UNKNOWN_LABEL};
use nix::errno::Errno;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

/// Descriptors sorted at a time, and so the most packets of an output that a kill loses.
pub(super) const WINDOW: usize = 1024;
/// Messages of one call at most: their pieces stay in the nearest cache.
const CALL_LEN: usize = 64;
/// Payloads up to this size are put together once for all outputs of their run: the kernel takes 64 short pieces five times slower than
/// one long one.
const SHORT: usize = 256;
/// Room for payloads of one call: those of 16 runs that are as long as can be.
const PAYLOADS_LEN: usize = 16 * super::runs::MAX_SEGMENTS * SHORT;
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

/// Whose packets they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    /// One output's, by its label.
    One(u32),
    /// Those of a bundle: the same headers for all, of which so many outputs have been served.
    Bundle(BundleHead, u8),
}

impl Whose {
    /// The outputs that are to be served: the first, and the one behind the last.
    const fn outputs(&self) -> (u8, u8) {
        match self {
            Self::One(_) => (0, 1),
            Self::Bundle(head, served) => (*served, head.count as u8),
        }
    }
}

/// Packets that go out together.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// The first packet's, as it is in its frame.
    header: Header,
    /// `None`: a packet that can't be in a run.
    shape: Option<Shape>,
    whose: Whose,
    first: u16,
    last: u16,
    count: u16,
}

/// One message to be sent: a run, and which of its outputs it is for.
#[derive(Clone, Copy, Debug)]
struct Message {
    run: u16,
    output: u8,
}

/// Messages of one call. The pointers are of use only while a call is made ready and made.
#[derive(Debug)]
struct Call {
    headers: Vec<Header>,
    iovecs: Vec<libc::iovec>,
    messages: Vec<libc::mmsghdr>,
    /// Payloads of runs, and the last of these: its number, and where they are.
    payloads: Vec<u8>,
    gathered: Option<(u16, usize, usize)>,
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
    messages: Vec<Message>,
    numbers: Vec<u16>,
    open: Box<[Open]>,
    window: u32,
    /// Runs before it grow no more.
    floor: u16,
    call: Call,
    adaptive: Adaptive,
    pays: Arc<AtomicBool>,
}

impl CoalesceTransmit {
    /// Takes a socket of [`super::socket::open_coalesce`], and the place where it says whether super-frames pay.
    pub(super) fn new(socket: OwnedFd, umem: Arc<Umem>, pays: Arc<AtomicBool>) -> Self {
        pays.store(true, Relaxed);
        let call = Call {
            headers: Vec::with_capacity(CALL_LEN),
            iovecs: Vec::with_capacity(CALL_LEN * (super::runs::MAX_SEGMENTS + MAX_FRAGMENTS + 1)),
            messages: Vec::with_capacity(CALL_LEN),
            payloads: Vec::with_capacity(PAYLOADS_LEN),
            gathered: None,
        };
        Self {
            socket,
            umem,
            packets: Vec::with_capacity(WINDOW),
            runs: Vec::with_capacity(WINDOW),
            messages: Vec::with_capacity(WINDOW * crate::frame::bundle::MAX_BUNDLED),
            numbers: Vec::with_capacity(WINDOW),
            open: vec![Open::NONE; OPEN].into(),
            window: 0,
            floor: 0,
            call,
            adaptive: Adaptive::new(),
            pays,
        }
    }

    /// A new window begins.
    pub(super) fn begin_window(&mut self) {
        self.adaptive.begin_window();
        self.pays.store(self.adaptive.pays(), Relaxed);
    }

    /// What becomes of the next packet of an output, or of a bundle.
    pub(super) fn admit(&mut self, desc: RawDesc) -> Admission {
        if desc.is_bundle() { self.adaptive.take(desc.label()) } else { self.adaptive.admit(desc.label()) }
    }

    /// Whether the device refuses super-frames.
    pub(super) const fn is_off(&self) -> bool {
        self.adaptive.is_off()
    }

    /// Each output of a bundle of which nothing will be sent.
    pub(super) fn disappoint(&self, headers: RawDesc, len: u32, each: &mut dyn FnMut(Refusal)) {
        read(&self.umem, headers, |bytes| {
            Bundle::read(bytes).into_iter().flat_map(|bundle| bundle.labels()).for_each(|label| each(Refusal { label, len }));
        });
    }

    /// Sorts what waits into runs, and notes the messages that they are. False where nothing waits.
    fn gather<H: Held>(&mut self, outbox: &mut Outbox<H>) -> bool {
        self.packets.clear();
        self.runs.clear();
        self.window = self.window.wrapping_add(1);
        self.floor = 0;
        let umem = Arc::clone(&self.umem);
        while self.packets.len() < WINDOW {
            let Some((number, _)) = outbox.next() else { break };
            let at = self.packets.len() as u16;
            self.packets.push(Waiting { number, next: NONE });
            match outbox.pieces(number) {
                [headers, packet] if headers.is_bundle() => {
                    let (packet, head) = (*packet, read(&umem, *headers, |bytes| Bundle::read(bytes).map(|bundle| *bundle.head())));
                    let whose = head.flatten().map(|head| Whose::Bundle(head, outbox.served(number)));
                    self.sort(&umem, at, packet, whose.unwrap_or(Whose::One(headers.label())));
                }
                [packet] => self.sort(&umem, at, *packet, Whose::One(packet.label())),
                pieces => {
                    let whose = Whose::One(pieces.first().map_or(0, RawDesc::label));
                    self.alone(Run { header: Header::NONE, shape: None, whose, first: at, last: at, count: 1 });
                }
            }
        }
        self.messages.clear();
        for (number, run) in self.runs.iter().enumerate() {
            let (from, to) = run.whose.outputs();
            self.messages.extend((from..to).map(|output| Message { run: number as u16, output }));
        }
        !self.packets.is_empty()
    }

    /// A packet that no run may take, nor may one go on past it: it could be of the same flow.
    fn alone(&mut self, run: Run) {
        self.runs.push(run);
        self.floor = self.runs.len() as u16;
    }

    /// Puts a packet in one piece into the run that it continues, or begins one.
    fn sort(&mut self, umem: &Umem, at: u16, piece: RawDesc, whose: Whose) {
        let alone = Run { header: Header::NONE, shape: None, whose, first: at, last: at, count: 1 };
        let is_off = self.adaptive.is_off();
        let sorted = read(umem, piece, |bytes| match Shape::of(bytes).filter(|_| !is_off) {
            None => self.alone(alone),
            Some(shape) => self.join(at, whose, shape, bytes),
        });
        if sorted.is_none() {
            self.alone(alone);
        }
    }

    /// Into the run that is open for its flow, or a new one that takes its place.
    fn join(&mut self, at: u16, whose: Whose, shape: Shape, bytes: &[u8]) {
        let new = self.runs.len() as u16;
        let mut none = Open::NONE;
        let salt = match whose {
            Whose::One(label) => label,
            Whose::Bundle(head, _) => !head.rule[0],
        };
        let hash = shape.hash(bytes) ^ salt.wrapping_mul(0x85eb_ca6b);
        let open = place(&mut self.open, self.window, hash).unwrap_or(&mut none);
        let number = if open.run < self.floor { NONE } else { open.run };
        match self.runs.get_mut(usize::from(number)) {
            Some(run)
                if run.whose == whose && run.shape == Some(shape) && shape.continues(run.header.first(), usize::from(run.count), bytes) =>
            {
                if let Some(last) = self.packets.get_mut(usize::from(run.last)) {
                    last.next = at;
                }
                (run.last, run.count) = (at, run.count + 1);
            }
            _ => {
                open.run = new;
                self.runs.push(Run { header: Header::begin(shape, bytes), shape: Some(shape), whose, first: at, last: at, count: 1 });
            }
        }
    }

    /// Sends messages; returns the number that went, or why the first did not.
    fn send<H: Held>(&mut self, outbox: &Outbox<H>, runs: &[Run], wanted: &[Message]) -> Result<usize, Errno> {
        self.call.headers.clear();
        self.call.iovecs.clear();
        self.call.messages.clear();
        self.call.payloads.clear();
        self.call.gathered = None;
        for message in wanted.iter().take(CALL_LEN) {
            let Some(run) = runs.get(usize::from(message.run)) else { break };
            let first = self.call.iovecs.len();
            self.write(outbox, run, *message);
            // SAFETY: all zeros is a valid mmsghdr: null pointers and no lengths.
            let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
            // Where its iovecs begin, until all of them have their places.
            header.msg_hdr.msg_iov = std::ptr::without_provenance_mut(first);
            header.msg_hdr.msg_iovlen = (self.call.iovecs.len() - first) as _;
            self.call.messages.push(header);
        }
        let Call { headers, iovecs, messages, .. } = &mut self.call;
        for (message, header) in messages.iter_mut().zip(headers.iter()) {
            let first = message.msg_hdr.msg_iov.addr();
            if let Some(iovec) = iovecs.get_mut(first) {
                *iovec = libc::iovec { iov_base: header.bytes().as_ptr().cast_mut().cast(), iov_len: header.bytes().len() };
            }
            message.msg_hdr.msg_iov = iovecs.as_mut_ptr().wrapping_add(first);
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: every message points at its own iovecs, these at its header in `headers`, and at `payloads`, which has not grown
        // beyond its capacity, or at frames that the outbox holds (it has found them to lie in the UMEM); all outlive the call.
        let result = unsafe { libc::sendmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), messages.len() as u32, flags) };
        Errno::result(result).map(|sent| (sent as usize).min(messages.len()))
    }

    /// The header and the pieces of a message; the first of these is left for the header's address.
    fn write<H: Held>(&mut self, outbox: &Outbox<H>, run: &Run, message: Message) {
        let Self { call: Call { headers, iovecs, payloads, gathered, .. }, packets, umem, .. } = self;
        iovecs.push(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 });
        let piece = |desc: &RawDesc, skip: usize, len: usize| {
            let from = umem.as_ptr().wrapping_add(desc.addr as usize + skip);
            libc::iovec { iov_base: from.cast(), iov_len: len }
        };
        let packet = |at: u16| packets.get(usize::from(at)).map(|packet| (outbox.pieces(packet.number), packet.next));
        let (is_bundle, first) = (matches!(run.whose, Whose::Bundle(..)), packet(run.first).map_or(&[][..], |(pieces, _)| pieces));
        let own = first.first().filter(|_| is_bundle).and_then(|headers| header_of(umem, *headers, message.output));
        if let (Some(shape), true) = (run.shape, run.count > 1) {
            let mut header = own.map_or(run.header, |(_, header)| header);
            header.finish(shape, usize::from(run.count));
            headers.push(header);
            let chain = std::iter::successors(packet(run.first), |(_, next)| packet(*next)).filter_map(|(pieces, _)| pieces.last());
            let len = usize::from(run.count) * shape.payload_len;
            match *gathered {
                Some((number, from, len)) if number == message.run => iovecs.push(at(payloads, from, len)),
                _ if shape.payload_len <= SHORT && payloads.capacity() - payloads.len() >= len => {
                    let from = payloads.len();
                    chain.for_each(|desc| {
                        read(umem, *desc, |bytes| payloads.extend_from_slice(bytes.get(shape.payload()).unwrap_or_default()));
                    });
                    *gathered = Some((message.run, from, payloads.len() - from));
                    iovecs.push(at(payloads, from, payloads.len() - from));
                }
                _ => iovecs.extend(chain.map(|desc| piece(desc, shape.header_len(), shape.payload_len))),
            }
            return;
        }
        let header = own.map_or(Header::NONE, |(_, header)| header);
        let skip = header.first().len();
        headers.push(header);
        iovecs
            .extend(first.iter().filter(|desc| !desc.is_bundle()).map(|desc| piece(desc, skip, (desc.len as usize).saturating_sub(skip))));
    }

    /// The packets of a run, from `at` on: place in the window and number in the outbox.
    fn chain(&self, at: u16) -> impl Iterator<Item = (u16, u16)> + '_ {
        let get = |at: u16| self.packets.get(usize::from(at)).map(|packet| (at, *packet));
        std::iter::successors(get(at), move |(_, packet)| get(packet.next)).map(|(at, packet)| (at, packet.number))
    }

    /// Sends messages in order; `Err`: from this one, and this packet of it, on they have to wait.
    fn send_all<H: Held>(&mut self, outbox: &mut Outbox<H>, runs: &[Run], messages: &[Message]) -> Result<(), (usize, u16)> {
        let mut done = 0;
        while let Some(rest @ [message, ..]) = messages.get(done..) {
            let Some(run) = runs.get(usize::from(message.run)) else { break };
            match self.send(outbox, runs, rest) {
                Ok(sent) if sent > 0 => {
                    for message in rest.iter().take(sent) {
                        let Some(run) = runs.get(usize::from(message.run)) else { continue };
                        self.adaptive.sent(u32::from(run.count));
                        if message.output + 1 == run.whose.outputs().1 {
                            self.chain(run.first).for_each(|(_, number)| outbox.settle(number, Ok(())));
                        }
                    }
                    done += sent;
                }
                Ok(_) => return Err((done, run.first)),
                Err(errno) => {
                    self.one_by_one(outbox, run, message.output, errno).map_err(|at| (done, at))?;
                    done += 1;
                }
            }
        }
        Ok(())
    }

    /// What was refused: the packets of a super-frame each for itself; a packet alone waits or is given up. `Err`: from this
    /// packet on they have to wait.
    fn one_by_one<H: Held>(&mut self, outbox: &mut Outbox<H>, run: &Run, output: u8, errno: Errno) -> Result<(), u16> {
        let is_dead = matches!(classify(errno), Verdict::Down | Verdict::Gone);
        let is_last = output + 1 == run.whose.outputs().1;
        let mut next = run.first;
        while let Some(Waiting { number, next: following }) = self.packets.get(usize::from(next)).copied() {
            let single = Run { first: next, count: 1, ..*run };
            outbox.serve(number, output);
            let message = Message { run: 0, output };
            let result = if is_dead || run.count == 1 { Err(errno) } else { self.send(outbox, &[single], &[message]) };
            match result {
                Ok(_) if next == run.first => self.adaptive.refused(),
                Ok(_) => {}
                Err(again) if classify(again) == Verdict::Retry && outbox.may_wait(number) => return Err(next),
                Err(other) => self.give_up(outbox, run, (number, output), other),
            }
            match (is_last, run.whose, result) {
                (false, ..) => outbox.serve(number, output + 1),
                (true, Whose::One(_), Err(_)) => {}
                (true, ..) => outbox.settle(number, Ok(())),
            }
            next = following;
        }
        Ok(())
    }

    /// A packet will not reach this output.
    fn give_up<H: Held>(&self, outbox: &mut Outbox<H>, run: &Run, (number, output): (u16, u8), errno: Errno) {
        let headers = outbox.pieces(number).first().copied().filter(|_| matches!(run.whose, Whose::Bundle(..)));
        match headers {
            Some(headers) => {
                let label = header_of(&self.umem, headers, output).map_or(UNKNOWN_LABEL, |(label, _)| label);
                outbox.give_up_one(number, label, errno);
            }
            None => outbox.give_up(number, errno),
        }
    }

    /// Puts packets back to the front of the outbox, in order: those of the first message's run, from packet `at` on with this output
    /// to be served next, before it with the next one; and the other runs.
    fn put_back<H: Held>(&mut self, outbox: &mut Outbox<H>, runs: &[Run], message: Message, at: u16) {
        let mut numbers = std::mem::take(&mut self.numbers);
        numbers.clear();
        let rest = runs.get(usize::from(message.run)..).unwrap_or_default();
        for (place, run) in rest.iter().enumerate() {
            let is_last = message.output + 1 == run.whose.outputs().1;
            for (packet, number) in self.chain(run.first) {
                let is_served = place == 0 && packet < at;
                if place == 0 {
                    outbox.serve(number, message.output + u8::from(is_served));
                }
                if !(is_served && is_last) {
                    numbers.push(number);
                }
            }
        }
        outbox.unsend(&numbers);
        self.numbers = numbers;
    }
}

fn at(payloads: &[u8], from: usize, len: usize) -> libc::iovec {
    libc::iovec { iov_base: payloads.as_ptr().wrapping_add(from).cast_mut().cast(), iov_len: len }
}

/// What `with` makes of a descriptor's bytes; `None`: they do not lie in the UMEM. The outbox keeps the frame.
fn read<T>(umem: &Umem, desc: RawDesc, with: impl FnOnce(&[u8]) -> T) -> Option<T> {
    let (frame, offset): (Frame, u32) = umem.claim(desc).ok()?;
    let made = with(umem.bytes(&frame, offset, desc.len));
    frame.into_index();
    Some(made)
}

/// Label and header of one output of a bundle.
fn header_of(umem: &Umem, headers: RawDesc, output: u8) -> Option<(u32, Header)> {
    let own = |bytes: &[u8]| Bundle::read(bytes)?.header(usize::from(output)).map(|(label, header)| (label, Header::of(header)));
    read(umem, headers, own).flatten()
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
            let (runs, messages) = (std::mem::take(&mut self.runs), std::mem::take(&mut self.messages));
            let result = self.send_all(outbox, &runs, &messages);
            if let Err((from, at)) = result
                && let Some(message) = messages.get(from)
            {
                self.put_back(outbox, &runs, *message, at);
            }
            (self.runs, self.messages) = (runs, messages);
            if result.is_err() {
                break;
            }
        }
        Ok(outbox.verdict())
    }
}

#[cfg(test)]
mod tests;
