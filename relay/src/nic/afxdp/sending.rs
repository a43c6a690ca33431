//! Whose packets stand in a TX ring, so that one the kernel throws away is counted where it belongs.
//!
//! A descriptor in the TX ring has no room for our label, so it is kept here, by index, in private memory: what a predecessor
//! had put has [`UNKNOWN_LABEL`]. Must never touch a ring.

use crate::frame::{CONTINUES, RawDesc};
use crate::nic::{Refusal, UNKNOWN_LABEL};
use crate::ring::cursor;
use std::collections::VecDeque;

/// The packets of one TX ring.
#[derive(Debug)]
pub(super) struct Sending {
    /// Options and length by ring index.
    descs: Box<[(u32, u32)]>,
    /// Everything before this index has had its fate.
    settled: u32,
    refused: VecDeque<Refusal>,
}

impl Sending {
    /// For a ring of `size` slots whose consumer stands at `position`.
    pub(super) fn new(size: u32, position: u32) -> Self {
        let unknown = (RawDesc::options(UNKNOWN_LABEL, 0), 0);
        Self { descs: vec![unknown; size as usize].into(), settled: position, refused: VecDeque::with_capacity(size as usize) }
    }

    /// Notes the descriptor put at `index`.
    #[inline]
    pub(super) fn put(&mut self, index: u32, desc: RawDesc) {
        let slot = cursor::slot(index, self.descs.len() as u32);
        if let Some(place) = self.descs.get_mut(slot) {
            *place = (desc.options, desc.len);
        }
    }

    /// One wake-up said EBUSY in copy mode: `__dev_direct_xmit` gave NET_XMIT_DROP for one packet, which has been completed all
    /// the same (net/xdp/xsk.c). The kernel shows its consumer index only where it had sent another packet before: then the
    /// dropped one is the last before `after`, else the first from `before`. False where there is none.
    pub(super) fn dropped_one(&mut self, before: u32, after: u32, end: u32) -> bool {
        if after != before {
            let first = self.first_of_packet(before, after.wrapping_sub(1));
            self.settled = first;
        } else if (before.wrapping_sub(self.settled) as i32) > 0 {
            self.settled = before;
        }
        self.refuse_one(end)
    }

    /// The interface is gone: what the kernel has not taken up to `end` will never be sent.
    pub(super) fn gone(&mut self, consumer: u32, end: u32) {
        if (consumer.wrapping_sub(self.settled) as i32) > 0 {
            self.settled = consumer;
        }
        while self.refuse_one(end) {}
    }

    /// A packet that was refused, once.
    pub(super) fn refused(&mut self) -> Option<Refusal> {
        self.refused.pop_front()
    }

    fn get(&self, index: u32) -> (u32, u32) {
        self.descs.get(cursor::slot(index, self.descs.len() as u32)).copied().unwrap_or_default()
    }

    /// Index of the first piece of the packet that ends at `last`, not before `from`.
    fn first_of_packet(&self, from: u32, last: u32) -> u32 {
        let mut first = last;
        while first != from && self.get(first.wrapping_sub(1)).0 & CONTINUES != 0 {
            first = first.wrapping_sub(1);
        }
        first
    }

    /// Refuses the packet at `settled`, if there is one before `end`.
    fn refuse_one(&mut self, end: u32) -> bool {
        let mut len = 0;
        while self.settled != end {
            let (options, piece) = self.get(self.settled);
            self.settled = self.settled.wrapping_add(1);
            len += piece;
            if options & CONTINUES == 0 {
                self.refused.push_back(Refusal { label: RawDesc { options, ..RawDesc::default() }.label(), len });
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Labels 0, 1, 2 … in a ring of 8 whose indices wrap; packet 2 has two pieces.
    fn ring() -> (Sending, u32) {
        let first = u32::MAX - 1;
        let mut sending = Sending::new(8, first);
        for (at, (label, flags)) in [(0, 0), (1, 0), (2, CONTINUES), (2, 0), (3, 0)].into_iter().enumerate() {
            let desc = RawDesc { addr: 0, len: 10, options: RawDesc::options(label, flags) };
            sending.put(first.wrapping_add(at as u32), desc);
        }
        (sending, first)
    }

    #[test]
    fn the_dropped_packet_is_the_last_sent_or_the_next() {
        let (mut sending, first) = ring();
        let end = first.wrapping_add(5);
        assert!(sending.dropped_one(first, first, end), "nothing sent before it");
        assert!(sending.dropped_one(first, first, end), "nor here, and the index does not move");
        assert!(sending.dropped_one(first, first.wrapping_add(4), end));
        assert!(sending.dropped_one(first.wrapping_add(4), end, end));
        assert!(!sending.dropped_one(end, end, end));
        let refused: Vec<_> = std::iter::from_fn(|| sending.refused()).map(|packet| (packet.label, packet.len)).collect();
        assert_eq!(refused, [(0, 10), (1, 10), (2, 20), (3, 10)]);
    }

    #[test]
    fn what_stands_in_a_dead_ring_is_refused_once() {
        let (mut sending, first) = ring();
        let end = first.wrapping_add(5);
        sending.gone(first.wrapping_add(1), end);
        sending.gone(first.wrapping_add(1), end);
        assert_eq!(std::iter::from_fn(|| sending.refused()).map(|packet| packet.label).collect::<Vec<_>>(), [1, 2, 3]);
    }
}
