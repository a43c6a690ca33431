//! The packets a sending half holds: being put, to be sent, in flight, to be tried again, done. No system call.
//!
//! Both engines (io_uring, sendmmsg) drive it: [`Outbox::next`] names the packet to send, [`Outbox::settle`] says how its send
//! ended. Every descriptor put comes out of [`Outbox::reap`] exactly once, whatever happened to its packet.
//! Must never look into a frame.

use super::Held;
use super::wakeup::{Verdict, classify};
use crate::frame::{CONTINUES, FRAME_SIZE, MAX_FRAGMENTS, RawDesc};
use crate::nic::{BATCH_LEN, Kick, Refusal};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use std::collections::VecDeque;

/// Sends of one packet before it counts as failed. Each is a turn of its own; a packet tried again may be overtaken by
/// those behind it that found room.
const MAX_ATTEMPTS: u8 = 16;

/// A packet's pieces.
pub(super) type Pieces = ArrayVec<RawDesc, MAX_FRAGMENTS>;

#[derive(Debug, Default)]
struct Slot {
    pieces: Pieces,
    /// What is said of the packet should it be refused; its length grows with its pieces.
    packet: Refusal,
    attempts: u8,
    /// Outputs of a bundle that have had their fate.
    served: u8,
    /// A piece was refused (outside the UMEM, one too many): the packet fails when it is complete.
    refused: bool,
}

/// See the file's header.
#[derive(Debug)]
pub(super) struct Outbox<H> {
    slots: Box<[Slot]>,
    vacant: Vec<u16>,
    open: Option<u16>,
    again: VecDeque<u16>,
    fresh: VecDeque<u16>,
    done: VecDeque<u64>,
    held: H,
    umem_len: u64,
    outstanding: u32,
    produced: u32,
    reaped: u32,
    refused: VecDeque<Refusal>,
    trouble: Kick,
}

impl<H: Held> Outbox<H> {
    /// Room for `depth` descriptors over a UMEM of `umem_len` bytes.
    pub(super) fn new(depth: u16, umem_len: u64, held: H) -> Self {
        let capacity = usize::from(depth);
        Self {
            slots: (0..depth).map(|_| Slot::default()).collect(),
            vacant: (0..depth).rev().collect(),
            open: None,
            again: VecDeque::with_capacity(capacity),
            fresh: VecDeque::with_capacity(capacity),
            done: VecDeque::with_capacity(capacity),
            held,
            umem_len,
            outstanding: 0,
            produced: 0,
            reaped: 0,
            refused: VecDeque::with_capacity(capacity),
            trouble: Kick::Done,
        }
    }

    /// Descriptors that may be put. A packet takes one slot however many pieces it has, so slots never run out first.
    pub(super) fn free(&self) -> u32 {
        (self.slots.len() as u32).saturating_sub(self.outstanding)
    }

    /// Takes one descriptor; the packet is complete with the first that has no [`CONTINUES`].
    pub(super) fn put(&mut self, desc: RawDesc) {
        self.outstanding = self.outstanding.wrapping_add(1);
        self.produced = self.produced.wrapping_add(1);
        let Some(number) = self.open.take().or_else(|| self.vacant.pop()) else {
            debug_assert!(false, "put() beyond free()");
            return self.refuse(desc);
        };
        let valid = self.is_valid(desc);
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return self.refuse(desc) };
        let len = if desc.is_bundle() { 0 } else { desc.len };
        slot.packet = Refusal { label: desc.label(), len: slot.packet.len.saturating_add(len) };
        if desc.addr < self.umem_len {
            self.held.set((desc.addr / u64::from(FRAME_SIZE)) as u32, true);
        }
        if !valid || slot.pieces.try_push(desc).is_err() {
            slot.refused = true;
            self.done.push_back(desc.addr);
        }
        match desc.options & CONTINUES {
            0 => self.close(number),
            _ => self.open = Some(number),
        }
    }

    /// The next packet to send, those tried before first.
    pub(super) fn next(&mut self) -> Option<(u16, &Pieces)> {
        let number = self.again.pop_front().or_else(|| self.fresh.pop_front())?;
        self.slots.get(usize::from(number)).map(|slot| (number, &slot.pieces))
    }

    /// Packets waiting to be sent.
    pub(super) fn waiting(&self) -> usize {
        self.again.len() + self.fresh.len()
    }

    /// Puts packets that [`Outbox::next`] named back to the front, in their order: they were not handed over after all.
    pub(super) fn unsend(&mut self, numbers: &[u16]) {
        numbers.iter().rev().for_each(|number| self.again.push_front(*number));
    }

    /// Says how the send of a packet ended.
    pub(super) fn settle(&mut self, number: u16, result: Result<(), Errno>) {
        let Err(errno) = result else { return self.finish(number) };
        match classify(errno) {
            Verdict::Retry if self.may_wait(number) => self.again.push_back(number),
            _ => self.give_up(number, errno),
        }
    }

    /// The packet will not be tried again.
    pub(super) fn give_up(&mut self, number: u16, errno: Errno) {
        self.note(errno);
        self.fail(number);
    }

    fn note(&mut self, errno: Errno) {
        match classify(errno) {
            Verdict::Retry | Verdict::Refused => {}
            Verdict::Down => self.trouble = Kick::Down,
            Verdict::Gone => self.trouble = Kick::Gone,
        }
    }

    /// One output of a bundle will not get the packet.
    pub(super) fn give_up_one(&mut self, number: u16, label: u32, errno: Errno) {
        self.note(errno);
        let len = self.slots.get(usize::from(number)).map_or(0, |slot| slot.packet.len);
        self.refused.push_back(Refusal { label, len });
    }

    /// Outputs of a bundle that have had their fate.
    pub(super) fn served(&self, number: u16) -> u8 {
        self.slots.get(usize::from(number)).map_or(0, |slot| slot.served)
    }

    /// Notes how many outputs of a bundle have had their fate; those behind them may be tried as often as they.
    pub(super) fn serve(&mut self, number: u16, served: u8) {
        if let Some(slot) = self.slots.get_mut(usize::from(number)).filter(|slot| slot.served != served) {
            (slot.served, slot.attempts) = (served, 0);
        }
    }

    /// The pieces of a packet that [`Outbox::next`] named.
    pub(super) fn pieces(&self, number: u16) -> &[RawDesc] {
        self.slots.get(usize::from(number)).map_or(&[], |slot| &slot.pieces)
    }

    /// Whether every packet put has had its fate.
    pub(super) fn is_flushed(&self) -> bool {
        self.outstanding as usize == self.done.len()
    }

    /// A frame that a predecessor held is held no longer.
    pub(super) fn forget(&self, frame: u32) {
        self.held.set(frame, false);
    }

    /// What the sends since the last call said.
    pub(super) fn verdict(&mut self) -> Kick {
        match std::mem::replace(&mut self.trouble, Kick::Done) {
            Kick::Done if self.waiting() > 0 => Kick::Again,
            kick => kick,
        }
    }

    /// Copies addresses of finished descriptors to `out`; they stay here until [`Outbox::give_back`].
    pub(super) fn reap(&mut self, out: &mut ArrayVec<u64, BATCH_LEN>) {
        let room = out.remaining_capacity();
        out.extend(self.done.iter().take(room).copied());
    }

    /// The oldest `count` finished descriptors are somewhere else now; their frames are no longer held.
    pub(super) fn give_back(&mut self, count: u32) {
        for addr in self.done.drain(..(count as usize).min(self.done.len())) {
            if addr < self.umem_len {
                self.held.set((addr / u64::from(FRAME_SIZE)) as u32, false);
            }
            self.outstanding = self.outstanding.wrapping_sub(1);
            self.reaped = self.reaped.wrapping_add(1);
        }
    }

    /// Descriptors put and not reaped.
    pub(super) const fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// Descriptors put since the beginning.
    pub(super) const fn produced(&self) -> u32 {
        self.produced
    }

    /// Descriptors reaped since the beginning.
    pub(super) const fn reaped(&self) -> u32 {
        self.reaped
    }

    /// A packet that will never be sent, once.
    pub(super) fn refused(&mut self) -> Option<Refusal> {
        self.refused.pop_front()
    }

    /// Whether the piece lies in one frame of the UMEM.
    fn is_valid(&self, desc: RawDesc) -> bool {
        let within = desc.addr % u64::from(FRAME_SIZE) + u64::from(desc.len) <= u64::from(FRAME_SIZE);
        within && desc.len > 0 && desc.addr < self.umem_len
    }

    fn refuse(&mut self, desc: RawDesc) {
        self.refused.push_back(Refusal { label: desc.label(), len: desc.len });
        self.done.push_back(desc.addr);
    }

    fn close(&mut self, number: u16) {
        let refused = self.slots.get(usize::from(number)).is_none_or(|slot| slot.refused);
        if refused {
            self.fail(number);
        } else {
            self.fresh.push_back(number);
        }
    }

    /// Whether a packet that was refused for the moment may be tried once more; counts the attempt.
    pub(super) fn may_wait(&mut self, number: u16) -> bool {
        self.slots.get_mut(usize::from(number)).is_some_and(|slot| {
            slot.attempts += 1;
            slot.attempts < MAX_ATTEMPTS
        })
    }

    fn fail(&mut self, number: u16) {
        self.refused.extend(self.slots.get(usize::from(number)).map(|slot| slot.packet));
        self.finish(number);
    }

    fn finish(&mut self, number: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        self.done.extend(slot.pieces.drain(..).map(|piece| piece.addr));
        (slot.packet, slot.attempts, slot.served, slot.refused) = (Refusal::default(), 0, 0, false);
        self.vacant.push(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    /// Frames marked as held.
    #[derive(Default)]
    struct Marks(RefCell<BTreeSet<u32>>);

    impl Held for &Marks {
        fn set(&self, frame: u32, held: bool) {
            let changed = if held { self.0.borrow_mut().insert(frame) } else { self.0.borrow_mut().remove(&frame) };
            assert!(changed, "frame {frame} marked {held} twice");
        }
    }

    const UMEM_LEN: u64 = 16 * FRAME_SIZE as u64;

    fn desc(frame: u64, options: u32) -> RawDesc {
        RawDesc { addr: frame * u64::from(FRAME_SIZE) + 256, len: 64, options }
    }

    fn send_all<H: Held>(outbox: &mut Outbox<H>, result: Result<(), Errno>) -> usize {
        let numbers: Vec<u16> = std::iter::from_fn(|| outbox.next().map(|(number, _)| number)).collect();
        numbers.iter().for_each(|number| outbox.settle(*number, result));
        numbers.len()
    }

    fn reap<H: Held>(outbox: &mut Outbox<H>) -> Vec<u64> {
        let mut out = ArrayVec::new();
        outbox.reap(&mut out);
        outbox.give_back(out.len() as u32);
        out.to_vec()
    }

    fn failed<H: Held>(outbox: &mut Outbox<H>) -> Vec<Refusal> {
        std::iter::from_fn(|| outbox.refused()).collect()
    }

    #[test]
    fn every_descriptor_comes_back_once() {
        let marks = Marks::default();
        let mut outbox = Outbox::new(8, UMEM_LEN, &marks);
        for frame in 0..3 {
            outbox.put(desc(frame, CONTINUES));
        }
        outbox.put(desc(3, 0));
        outbox.put(desc(4, 0));
        assert_eq!((outbox.free(), outbox.outstanding(), marks.0.borrow().len()), (3, 5, 5));
        assert_eq!(send_all(&mut outbox, Ok(())), 2);
        assert_eq!(outbox.verdict(), Kick::Done);
        assert_eq!(reap(&mut outbox), (0..5).map(|frame| desc(frame, 0).addr).collect::<Vec<_>>());
        assert_eq!((outbox.free(), failed(&mut outbox).len(), marks.0.borrow().len()), (8, 0, 0));
    }

    #[test]
    fn a_full_device_is_tried_again_and_then_counted() {
        let marks = Marks::default();
        let mut outbox = Outbox::new(4, UMEM_LEN, &marks);
        outbox.put(RawDesc { options: RawDesc::options(77, 0), ..desc(1, 0) });
        for _ in 1..MAX_ATTEMPTS {
            assert_eq!(send_all(&mut outbox, Err(Errno::ENOBUFS)), 1);
            assert_eq!((outbox.verdict(), failed(&mut outbox)), (Kick::Again, vec![]));
        }
        assert_eq!(send_all(&mut outbox, Err(Errno::ENOBUFS)), 1);
        assert_eq!((outbox.verdict(), failed(&mut outbox)), (Kick::Done, vec![Refusal { label: 77, len: 64 }]));
        assert_eq!(reap(&mut outbox), [desc(1, 0).addr]);
    }

    #[test]
    fn a_dead_interface_is_said_and_its_frames_come_back() {
        let marks = Marks::default();
        let mut outbox = Outbox::new(4, UMEM_LEN, &marks);
        for (frame, errno, kick) in [(1, Errno::ENETDOWN, Kick::Down), (2, Errno::ENXIO, Kick::Gone), (3, Errno::EMSGSIZE, Kick::Done)] {
            outbox.put(desc(frame, 0));
            send_all(&mut outbox, Err(errno));
            assert_eq!((outbox.verdict(), reap(&mut outbox)), (kick, vec![desc(frame, 0).addr]));
        }
        assert_eq!(failed(&mut outbox).len(), 3);
    }

    #[test]
    fn a_bad_piece_fails_its_packet_only() {
        let marks = Marks::default();
        let mut outbox = Outbox::new(16, UMEM_LEN, &marks);
        outbox.put(desc(0, CONTINUES));
        outbox.put(desc(99, 0));
        outbox.put(RawDesc { len: FRAME_SIZE, ..desc(1, 0) });
        for frame in 2..9 {
            outbox.put(desc(frame, if frame < 8 { CONTINUES } else { 0 }));
        }
        outbox.put(desc(9, 0));
        assert_eq!(send_all(&mut outbox, Ok(())), 1, "only the last packet is sound");
        assert_eq!((failed(&mut outbox).len(), reap(&mut outbox).len(), outbox.outstanding()), (3, 11, 0));
        assert_eq!(outbox.free(), 16);
    }
}
