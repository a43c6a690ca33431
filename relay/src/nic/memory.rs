//! The NIC of the tests: the port contract in plain memory, with a kernel's side that outlives the worker.
//!
//! A [`Wire`] is what the kernel holds. With `survives` it is an AF_XDP socket: rings stay when a worker dies. Without, it is
//! a packet socket: what was not received yet stays, everything else dies with the worker ([`Wire::worker_died`]).
//! Every store that a real worker would make to a shared ring burns the fuse. Must never tell the data path anything that
//! the kernel would not.

use super::{BATCH_DESCS, BATCH_LEN, Batch, Fragment, Hint, Kick, Packet, Receive, ReceiveCounters, Refusal, Transmit};
use crate::frame::HeldMap;
use crate::frame::bundle::Bundle;
use crate::frame::{CONTINUES, FRAME_SIZE, Frame, HEADROOM, MAX_FRAGMENTS, Pool, RawDesc, Umem};
use crate::sys::fuse;
use arrayvec::ArrayVec;
use nix::errno::Errno;
use relay_common::META_MAGIC;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

/// A packet on its way to the relay: its pieces, and what XDP says of it.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The bytes, cut into pieces.
    pub pieces: Vec<Vec<u8>>,
    /// Slot and serial of the rule.
    pub hint: (u32, u32),
}

/// The kernel's side of a port. Rings grow for ever; indices are positions in them.
#[derive(Clone, Debug, Default)]
pub struct Wire {
    /// Whether the rings outlive the worker.
    pub survives: bool,
    /// Frames wanted with the kernel.
    pub depth: u32,
    /// Packets not received yet.
    pub queue: VecDeque<Arrival>,
    /// What was sent, in order.
    pub sent: Vec<Vec<u8>>,
    rx: Vec<RawDesc>,
    rx_released: usize,
    fill: Vec<u64>,
    fill_taken: usize,
    tx: Vec<RawDesc>,
    tx_taken: usize,
    done: Vec<u64>,
    reaped: usize,
}

/// Both halves of a worker and the test share it.
pub type SharedWire = Rc<RefCell<Wire>>;

impl Wire {
    /// A port with nothing in it.
    pub fn new(survives: bool, depth: u32) -> Self {
        Self { survives, depth, ..Self::default() }
    }

    /// The kernel receives up to `count` packets, as far as free frames stand.
    pub fn deliver(&mut self, umem: &Umem, count: usize) {
        for _ in 0..count {
            let free = self.fill.len() - self.fill_taken;
            if self.queue.front().is_none_or(|arrival| arrival.pieces.len() > free) {
                return;
            }
            let Some(arrival) = self.queue.pop_front() else { return };
            let last = arrival.pieces.len() - 1;
            for (at, piece) in arrival.pieces.iter().enumerate() {
                let Some(mut frame) = self.next_free(umem) else { return };
                let (slot, serial) = arrival.hint;
                let meta: Vec<u8> = [META_MAGIC, slot, serial].iter().flat_map(|word| word.to_ne_bytes()).collect();
                umem.bytes_mut(&mut frame, HEADROOM - 12, 12).copy_from_slice(&meta);
                umem.bytes_mut(&mut frame, HEADROOM, piece.len() as u32).copy_from_slice(piece);
                let options = if at < last { CONTINUES } else { 0 };
                self.rx.push(RawDesc { addr: frame.base() + u64::from(HEADROOM), len: piece.len() as u32, options });
                frame.into_index();
            }
        }
    }

    /// The next free frame; as the kernel does, it leaves out what is none.
    fn next_free(&mut self, umem: &Umem) -> Option<Frame> {
        loop {
            let addr = *self.fill.get(self.fill_taken)?;
            self.fill_taken += 1;
            if let Ok((frame, _)) = umem.claim(RawDesc { addr, ..RawDesc::default() }) {
                return Some(frame);
            }
        }
    }

    /// What dies with a worker.
    pub fn worker_died(&mut self) {
        if !self.survives {
            self.tx.truncate(self.tx_taken);
            (self.rx_released, self.fill_taken, self.reaped) = (self.rx.len(), self.fill.len(), self.done.len());
        }
    }

    /// Numbers of all frames in this port's rings.
    pub fn frames(&self) -> Vec<u32> {
        let descs = self.rx[self.rx_released..].iter().chain(&self.tx[self.tx_taken..]).map(|desc| desc.addr);
        let addresses = self.fill[self.fill_taken..].iter().chain(&self.done[self.reaped..]).copied();
        descs.chain(addresses).map(|address| (address / u64::from(FRAME_SIZE)) as u32).collect()
    }
}

/// Receiving half.
#[derive(Debug)]
pub struct MemoryReceive {
    wire: SharedWire,
    held: HeldMap,
    position: usize,
    taken: u32,
    staged: Vec<u64>,
}

impl MemoryReceive {
    /// Adopts the port.
    pub fn new(wire: &SharedWire, held: HeldMap) -> Self {
        let position = wire.borrow().rx_released;
        Self { wire: wire.clone(), held, position, taken: 0, staged: Vec::new() }
    }
}

fn read_hint(umem: &Umem, fragment: &Fragment) -> Hint {
    let bytes = umem.bytes(&fragment.frame, fragment.offset - 12, 12);
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    Hint { rule: (word(0) == META_MAGIC).then(|| (word(4), word(8))), partial: false }
}

impl Receive for MemoryReceive {
    fn survives(&self) -> bool {
        self.wire.borrow().survives
    }

    fn receive(&mut self, umem: &Umem, max: usize, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        let mut wire = self.wire.borrow_mut();
        if !wire.survives {
            wire.deliver(umem, 3);
        }
        let ready: Vec<RawDesc> = wire.rx[self.position..].to_vec();
        self.taken = 0;
        let mut packet = Vec::new();
        for desc in ready {
            if batch.len() == max {
                break;
            }
            let (frame, offset) = umem.claim(desc).unwrap();
            packet.push(Fragment { frame, offset, len: desc.len });
            if desc.options & CONTINUES == 0 {
                self.taken += packet.len() as u32;
                if packet.len() > MAX_FRAGMENTS {
                    spare.extend(packet.drain(..).map(|fragment| fragment.frame));
                } else {
                    let fragments: ArrayVec<Fragment, MAX_FRAGMENTS> = packet.drain(..).collect();
                    let hint = read_hint(umem, &fragments[0]);
                    batch.push(Packet { fragments, hint });
                }
            }
        }
        if !wire.survives {
            // A packet socket's message is gone from the kernel once it is received.
            self.position += self.taken as usize;
            wire.rx_released = self.position;
            self.taken = 0;
        }
    }

    fn release(&mut self) {
        self.position += self.taken as usize;
        self.taken = 0;
        self.wire.borrow_mut().rx_released = self.position;
        fuse::stored();
    }

    fn taken(&self) -> u32 {
        self.taken
    }

    fn retake(&mut self, count: u32) {
        self.taken = count.min((self.wire.borrow().rx.len() - self.position) as u32);
    }

    fn position(&self) -> u32 {
        if self.survives() { self.position as u32 } else { 0 }
    }

    fn depth(&self) -> u32 {
        self.wire.borrow().depth
    }

    fn standing(&self) -> u32 {
        let wire = self.wire.borrow();
        (wire.fill.len() - wire.fill_taken + wire.rx.len() - self.position) as u32
    }

    fn stage_refill(&mut self, _umem: &Umem, pool: &Pool, max: u32) -> u32 {
        let count = self.depth().saturating_sub(self.standing()).min(pool.len()).min(max);
        let survives = self.survives();
        self.staged.clear();
        for index in 0..count {
            let frame = pool.peek(pool.len() - 1 - index);
            if !survives {
                self.held.set(frame);
            }
            self.staged.push(u64::from(frame) * u64::from(FRAME_SIZE));
        }
        count
    }

    fn refill_position(&self) -> u32 {
        if self.survives() { self.wire.borrow().fill.len() as u32 } else { 0 }
    }

    fn publish_refill(&mut self, count: u32) {
        assert_eq!(count as usize, self.staged.len());
        self.wire.borrow_mut().fill.append(&mut self.staged);
        fuse::stored();
    }

    fn counters(&self) -> ReceiveCounters {
        ReceiveCounters::default()
    }
}

/// Sending half.
#[derive(Debug)]
pub struct MemoryTransmit {
    wire: SharedWire,
    umem: Arc<Umem>,
    held: HeldMap,
    staged: Vec<RawDesc>,
}

impl MemoryTransmit {
    /// Adopts the port.
    pub fn new(wire: &SharedWire, umem: &Arc<Umem>, held: HeldMap) -> Self {
        Self { wire: wire.clone(), umem: umem.clone(), held, staged: Vec::new() }
    }
}

impl Transmit for MemoryTransmit {
    fn survives(&self) -> bool {
        self.wire.borrow().survives
    }

    fn free(&mut self) -> u32 {
        64 - self.outstanding()
    }

    fn put(&mut self, desc: RawDesc) {
        if !self.survives() {
            self.held.set((desc.addr / u64::from(FRAME_SIZE)) as u32);
        }
        self.staged.push(desc);
    }

    fn publish(&mut self) {
        self.wire.borrow_mut().tx.append(&mut self.staged);
        fuse::stored();
    }

    /// The kernel sends what stands in the ring; a kill may come after any packet.
    fn kick(&mut self) -> Result<Kick, Errno> {
        loop {
            let mut wire = self.wire.borrow_mut();
            let standing = &wire.tx[wire.tx_taken..];
            let Some(end) = standing.iter().position(|desc| desc.options & CONTINUES == 0) else { return Ok(Kick::Done) };
            let packet = standing[..=end].to_vec();
            let mut bytes = Vec::new();
            for desc in &packet {
                let Ok((frame, offset)) = self.umem.claim(*desc) else { continue };
                bytes.extend(self.umem.bytes(&frame, offset, desc.len));
                frame.into_index();
            }
            // A kill may come between two outputs of a bundle.
            for (number, packet) in expanded(bytes, &packet).into_iter().enumerate() {
                if number > 0 {
                    drop(wire);
                    fuse::stored();
                    wire = self.wire.borrow_mut();
                }
                wire.sent.push(packet);
            }
            wire.tx_taken += packet.len();
            wire.done.extend(packet.iter().map(|desc| desc.addr));
            drop(wire);
            fuse::stored();
        }
    }

    fn reap(&mut self, out: &mut ArrayVec<u64, BATCH_LEN>) {
        let wire = self.wire.borrow();
        out.extend(wire.done[wire.reaped..].iter().take(BATCH_LEN).copied());
    }

    fn reaped(&mut self, count: u32) {
        let survives = self.survives();
        let mut wire = self.wire.borrow_mut();
        let first = wire.reaped;
        wire.reaped = wire.done.len().min(first + count as usize);
        let given: Vec<u64> = wire.done[first..wire.reaped].to_vec();
        drop(wire);
        fuse::stored();
        if !survives {
            given.iter().for_each(|address| self.held.clear((address / u64::from(FRAME_SIZE)) as u32));
        }
    }

    fn position(&self) -> u32 {
        self.wire.borrow().tx.len() as u32
    }

    fn reap_position(&self) -> u32 {
        self.wire.borrow().reaped as u32
    }

    fn outstanding(&self) -> u32 {
        let wire = self.wire.borrow();
        (wire.tx.len() - wire.reaped) as u32
    }

    fn refused(&mut self) -> Option<Refusal> {
        None
    }

    fn is_flushed(&mut self) -> bool {
        true
    }

    fn forget(&mut self, address: u64) {
        self.held.clear((address / u64::from(FRAME_SIZE)) as u32);
    }
}

/// What leaves: the packet, or a bundle's packet once for each of its headers. Nothing, if it is no bundle after all.
fn expanded(bytes: Vec<u8>, descs: &[RawDesc]) -> Vec<Vec<u8>> {
    let Some(headers) = descs.first().filter(|first| first.is_bundle()) else { return vec![bytes] };
    let Some((headers, packet)) = bytes.split_at_checked(headers.len as usize) else { return Vec::new() };
    let Some(bundle) = Bundle::read(headers) else { return Vec::new() };
    let Some(rest) = packet.get(bundle.head().header_len as usize..) else { return Vec::new() };
    (0..bundle.head().count as usize).filter_map(|number| Some([bundle.header(number)?.1, rest].concat())).collect()
}
