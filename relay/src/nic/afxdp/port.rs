//! A worker's side of AF_XDP: map the rings of inherited sockets and go on where they stand.
//!
//! Indices are published in the order the data path asks for, never on their own. Errors of a wake-up are classified in
//! one function. Must never register, create or bind anything.

use super::create::RingSizes;
use super::rings::{KernelRing, RingMapError};
use super::sending::Sending;
use crate::frame::{CONTINUES, Frame, HEADROOM, MAX_FRAGMENTS, Pool, RawDesc, UMEM_HEADROOM, Umem};
use crate::nic::{BATCH_DESCS, BATCH_LEN, Batch, Fragment, Hint, Kick, Packet, Receive, ReceiveCounters, Refusal, Transmit};
use crate::ring::cursor;
use crate::sys::xdp::{self, Ring};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use relay_common::{META_MAGIC, RedirectMeta};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Why a socket could not be adopted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    /// XDP_MMAP_OFFSETS refused: not an AF_XDP socket?
    #[error("asking for the ring offsets: {0}")]
    Offsets(Errno),
    /// A ring could not be mapped.
    #[error(transparent)]
    Ring(#[from] RingMapError),
}

/// Wake-ups per flush at most.
const MAX_KICKS: u32 = 64;

/// The four rings of a bound socket, mapped. Their indices may still be another process's.
#[derive(Debug)]
pub struct Mapped {
    rx: KernelRing<RawDesc>,
    tx: KernelRing<RawDesc>,
    fill: KernelRing<u64>,
    completion: KernelRing<u64>,
    is_copying: bool,
    fd: Arc<OwnedFd>,
}

/// Maps the rings of a bound socket.
pub fn map(fd: Arc<OwnedFd>, sizes: RingSizes) -> Result<Mapped, AdoptError> {
    let [rx_at, tx_at, fill_at, completion_at] = xdp::ring_offsets(&fd.as_fd()).map_err(AdoptError::Offsets)?;
    Ok(Mapped {
        rx: KernelRing::map(&fd, Ring::Rx, sizes.rx, rx_at)?,
        tx: KernelRing::map(&fd, Ring::Tx, sizes.tx, tx_at)?,
        fill: KernelRing::map(&fd, Ring::Fill, sizes.fill, fill_at)?,
        completion: KernelRing::map(&fd, Ring::Completion, sizes.completion, completion_at)?,
        is_copying: !xdp::is_zero_copy(&fd.as_fd()).unwrap_or(false),
        fd,
    })
}

impl Mapped {
    /// Goes on where the indices stand. `depth`: frames that shall stand in the fill ring (0 on an egress-only port).
    pub fn go_on(self, depth: u32) -> (XskReceive, XskTransmit) {
        let Self { rx, tx, fill, completion, is_copying, fd } = self;
        let receive = XskReceive {
            position: rx.consumer(),
            taken: 0,
            fill_position: fill.producer(),
            depth: depth.min(fill.size()),
            counters: ReceiveCounters::default(),
            rx,
            fill,
            fd: Arc::clone(&fd),
        };
        let transmit = XskTransmit {
            position: tx.producer(),
            put: 0,
            reap_position: completion.consumer(),
            sending: Sending::new(tx.size(), tx.consumer()),
            is_copying,
            tx,
            completion,
            fd,
        };
        (receive, transmit)
    }
}

/// Receiving half: RX ring and fill ring.
#[derive(Debug)]
pub struct XskReceive {
    rx: KernelRing<RawDesc>,
    fill: KernelRing<u64>,
    position: u32,
    taken: u32,
    fill_position: u32,
    depth: u32,
    counters: ReceiveCounters,
    fd: Arc<OwnedFd>,
}

impl XskReceive {
    /// Index up to which the fill ring is published.
    pub const fn fill_position(&self) -> u32 {
        self.fill_position
    }

    /// Producer and consumer of the fill and RX rings, as memory has them now (for the ledger).
    pub fn indices(&self) -> RingIndices {
        RingIndices {
            user: self.fill.producer(),
            kernel: self.fill.consumer(),
            back_kernel: self.rx.producer(),
            back_user: self.rx.consumer(),
        }
    }

    /// Number of slots of the packet at `offset` behind the position, or 0 while it is not complete.
    fn packet_len(&self, offset: u32, available: u32) -> u32 {
        let mut len = 0;
        while offset + len < available {
            len += 1;
            if self.rx.get(self.position.wrapping_add(offset + len - 1)).options & CONTINUES == 0 {
                return len;
            }
        }
        0
    }

    fn take(&mut self, umem: &Umem, desc: RawDesc, packet: &mut Packet, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        match umem.claim(desc) {
            Ok((frame, offset)) => {
                let fragment = Fragment { frame, offset, len: desc.len };
                if let Err(full) = packet.fragments.try_push(fragment) {
                    spare.push(full.element().frame);
                }
            }
            Err(_) => self.counters.invalid += 1,
        }
    }
}

fn hint(umem: &Umem, fragment: &Fragment) -> Hint {
    let size = size_of::<RedirectMeta>() as u32;
    if fragment.offset < size {
        return Hint::default();
    }
    let bytes = umem.bytes(&fragment.frame, fragment.offset - size, size);
    let mut words = bytes.chunks_exact(4).map(|word| word.try_into().map_or(0, u32::from_ne_bytes));
    let mut next = || words.next().unwrap_or(0);
    let (magic, slot, serial) = (next(), next(), next());
    Hint { rule: (magic == META_MAGIC).then_some((slot, serial)), partial: false }
}

impl AsFd for XskReceive {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Receive for XskReceive {
    fn survives(&self) -> bool {
        true
    }

    fn receive(&mut self, umem: &Umem, max: usize, batch: &mut Batch, spare: &mut ArrayVec<Frame, BATCH_DESCS>) {
        let available = cursor::filled(self.rx.producer(), self.position).min(BATCH_DESCS as u32);
        self.taken = 0;
        for index in 0..available.min(max as u32) {
            umem.prefetch(self.rx.get(self.position.wrapping_add(index)));
        }
        while batch.len() < max.min(BATCH_LEN) {
            let len = self.packet_len(self.taken, available);
            if len == 0 {
                break;
            }
            // In its place from the beginning: moved there, it would be read before its last bytes have left the store buffer.
            batch.push(Packet { fragments: ArrayVec::new(), hint: Hint::default() });
            let Some(packet) = batch.last_mut() else { break };
            for index in 0..len {
                let desc = self.rx.get(self.position.wrapping_add(self.taken + index));
                self.take(umem, desc, packet, spare);
            }
            self.taken += len;
            if packet.fragments.len() as u32 == len {
                packet.hint = packet.fragments.first().map(|first| hint(umem, first)).unwrap_or_default();
            } else {
                self.counters.too_big += u64::from(len as usize > MAX_FRAGMENTS);
                spare.extend(packet.fragments.drain(..).map(|fragment| fragment.frame));
                batch.pop();
            }
        }
    }

    fn release(&mut self) {
        self.position = self.position.wrapping_add(self.taken);
        self.taken = 0;
        self.rx.release(self.position);
    }

    fn taken(&self) -> u32 {
        self.taken
    }

    fn retake(&mut self, count: u32) {
        self.taken = count.min(cursor::filled(self.rx.producer(), self.position));
    }

    fn position(&self) -> u32 {
        self.position
    }

    fn depth(&self) -> u32 {
        self.depth
    }

    fn standing(&self) -> u32 {
        self.fill_position.wrapping_sub(self.position)
    }

    fn stage_refill(&mut self, _umem: &Umem, pool: &Pool, max: u32) -> u32 {
        // Frames that stand with the kernel are those in the fill ring and those in the RX ring.
        let room = cursor::free(self.fill.size(), self.fill_position, self.fill.consumer());
        let count = self.depth.saturating_sub(self.standing()).min(room).min(pool.len()).min(max);
        for index in 0..count {
            let frame = pool.peek(pool.len() - 1 - index);
            self.fill.set(self.fill_position.wrapping_add(index), u64::from(frame) * u64::from(crate::frame::FRAME_SIZE));
        }
        count
    }

    fn refill_position(&self) -> u32 {
        self.fill_position
    }

    fn publish_refill(&mut self, count: u32) {
        self.fill_position = self.fill_position.wrapping_add(count);
        self.fill.publish(self.fill_position);
        if self.fill.needs_wakeup() {
            // Zero copy only; an error shows as a starved ring, which is counted there.
            let _ = xdp::kick_receive(self.fd.as_raw_fd());
        }
    }

    fn counters(&self) -> ReceiveCounters {
        self.counters
    }
}

/// Four indices of two paired rings: frames go out by one (`user` produces, `kernel` consumes) and come back by the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingIndices {
    /// Producer of fill or TX.
    pub user: u32,
    /// Consumer of fill or TX.
    pub kernel: u32,
    /// Producer of RX or completion.
    pub back_kernel: u32,
    /// Consumer of RX or completion.
    pub back_user: u32,
}

/// Sending half: TX ring and completion ring.
#[derive(Debug)]
pub struct XskTransmit {
    tx: KernelRing<RawDesc>,
    completion: KernelRing<u64>,
    position: u32,
    put: u32,
    reap_position: u32,
    sending: Sending,
    /// Copy mode, where EBUSY means a packet thrown away.
    is_copying: bool,
    fd: Arc<OwnedFd>,
}

impl XskTransmit {
    /// Producer and consumer of the TX and completion rings, as memory has them now (for the ledger).
    pub fn indices(&self) -> RingIndices {
        RingIndices {
            user: self.tx.producer(),
            kernel: self.tx.consumer(),
            back_kernel: self.completion.producer(),
            back_user: self.completion.consumer(),
        }
    }
}

/// What a wake-up's error means (TRAPS.md, Sending).
pub fn classify(errno: Errno) -> Result<Kick, Errno> {
    match errno {
        Errno::EAGAIN | Errno::EBUSY | Errno::ENOBUFS | Errno::EINTR => Ok(Kick::Again),
        Errno::ENETDOWN => Ok(Kick::Down),
        Errno::ENXIO | Errno::ENODEV => Ok(Kick::Gone),
        other => Err(other),
    }
}

impl Transmit for XskTransmit {
    fn survives(&self) -> bool {
        true
    }

    fn free(&mut self) -> u32 {
        cursor::free(self.tx.size(), self.position.wrapping_add(self.put), self.tx.consumer())
    }

    fn put(&mut self, desc: RawDesc) {
        let index = self.position.wrapping_add(self.put);
        self.sending.put(index, desc);
        self.tx.set(index, RawDesc { options: desc.options & CONTINUES, ..desc });
        self.put += 1;
    }

    fn publish(&mut self) {
        self.position = self.position.wrapping_add(self.put);
        self.put = 0;
        self.tx.publish(self.position);
    }

    fn kick(&mut self) -> Result<Kick, Errno> {
        for _ in 0..MAX_KICKS {
            let before = self.tx.consumer();
            if before == self.position || !self.tx.needs_wakeup() {
                return Ok(Kick::Done);
            }
            let result = xdp::kick_send(self.fd.as_raw_fd());
            let after = self.tx.consumer();
            let dropped = result == Err(Errno::EBUSY) && self.is_copying && self.sending.dropped_one(before, after, self.position);
            match result.map_or_else(classify, |()| Ok(Kick::Done))? {
                // The budget of one call was used up, or nothing moved: only in the first case it is worth calling again now.
                Kick::Again | Kick::Done if after == before && !dropped => return Ok(Kick::Again),
                Kick::Again | Kick::Done => {}
                Kick::Gone => {
                    self.sending.gone(after, self.position);
                    return Ok(Kick::Gone);
                }
                other => return Ok(other),
            }
        }
        Ok(Kick::Again)
    }

    fn reap(&mut self, out: &mut ArrayVec<u64, BATCH_LEN>) {
        let ready = cursor::filled(self.completion.producer(), self.reap_position).min(BATCH_LEN as u32);
        for index in 0..ready {
            out.push(self.completion.get(self.reap_position.wrapping_add(index)));
        }
    }

    fn reaped(&mut self, count: u32) {
        let ready = cursor::filled(self.completion.producer(), self.reap_position);
        self.reap_position = self.reap_position.wrapping_add(count.min(ready));
        self.completion.release(self.reap_position);
    }

    fn position(&self) -> u32 {
        self.position
    }

    fn reap_position(&self) -> u32 {
        self.reap_position
    }

    fn outstanding(&self) -> u32 {
        self.position.wrapping_sub(self.reap_position)
    }

    fn refused(&mut self) -> Option<Refusal> {
        self.sending.refused()
    }

    /// In copy mode a descriptor that was taken has been handed to the driver, on this thread.
    fn is_flushed(&mut self) -> bool {
        if self.is_copying { self.tx.consumer() == self.position } else { self.outstanding() == 0 }
    }
}

/// Where received data starts at least; a smaller offset would leave no room for tags.
const _: () = assert!(HEADROOM as usize >= size_of::<RedirectMeta>() + 8);
/// What the XDP program says of a packet stands in the cache line of its headers.
const _: () = assert!(UMEM_HEADROOM as usize >= size_of::<RedirectMeta>());
