//! How long packets are in this worker: from the moment their batch was taken off a receive ring until an egress turn has put what one
//! output port gets of it into that port's ring, and woken the kernel.
//!
//! The ingress thread leaves a stamp for each egress ring it has published a part of a batch to: when the batch was taken, how far
//! the ring went then. The egress thread reads the clock once it has sent that far, and counts the packets in the worker's histogram
//! (plan/latency.rs). A batch costs a look at the clock, and for each of its ports another one and a line between the threads; a packet
//! costs nothing. A packet of several frames counts once for each.
//!
//! Stamps are private memory: journal and recovery know nothing of them, and what a killed worker had in hand is not measured.
//! Must never wait: where there is no room for a stamp, its packets go with the next one, under the older time.

use crate::plan::latency::{SUM, word_of};
use crate::ring::{Consumer, Producer, RingError, heap};
use crate::sys::SharedArray;
use bytemuck::{Pod, Zeroable};

/// Stamps of a port under way: few, since fused a batch is sent in the turn it came in, and these lines stay in the cache.
const STAMPS: u32 = 64;

/// CLOCK_MONOTONIC, ns (no system call: the kernel maps its clock into the process).
#[inline]
pub(super) fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(std::time::Duration::ZERO, std::time::Duration::from);
    now.as_nanos() as u64
}

/// A part of a batch that goes out of one port. 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
struct Stamp {
    /// When the batch was taken.
    taken_ns: u64,
    /// Index of the egress ring behind it.
    end: u32,
    /// Descriptors.
    count: u32,
}

/// The ingress side of a port's stamps.
#[derive(Debug)]
pub struct Stamper {
    ring: Producer<Stamp>,
    /// Not in the ring yet.
    next: Stamp,
}

/// The egress side of a port's stamps.
#[derive(Debug)]
pub struct Meter(Consumer<Stamp>);

/// Both sides for one port.
pub fn stamps() -> Result<(Stamper, Meter), RingError> {
    let (producer, consumer) = heap(STAMPS)?;
    Ok((Stamper { ring: producer, next: Stamp::default() }, Meter(consumer)))
}

impl Stamper {
    /// `count` descriptors of a batch that was taken at `taken_ns` have been published; the egress ring's index is `end` now.
    #[inline]
    pub(super) fn note(&mut self, taken_ns: u64, end: u32, count: u32) {
        let Self { ring, next } = self;
        if next.count == 0 {
            next.taken_ns = taken_ns;
        }
        *next = Stamp { end, count: next.count.saturating_add(count), ..*next };
        if ring.push(*next).is_ok() {
            *next = Stamp::default();
        }
    }
}

impl Meter {
    /// The egress ring is empty up to `position`. What stood there `was_sent`, or thrown away, which has no latency.
    #[inline]
    pub(super) fn settle(&mut self, position: u32, was_sent: bool, histogram: &SharedArray<u64>) {
        let mut now = None;
        while self.0.available_for(1) > 0 {
            let stamp = self.0.read(0);
            if position.wrapping_sub(stamp.end).cast_signed() < 0 {
                break;
            }
            self.0.release(1);
            if was_sent {
                let took_ns = now.get_or_insert_with(now_ns).saturating_sub(stamp.taken_ns);
                add(histogram, word_of(took_ns), u64::from(stamp.count));
                add(histogram, SUM, took_ns.saturating_mul(u64::from(stamp.count)));
            }
        }
    }
}

/// Wraps: what an earlier worker has left there may be anything.
#[inline]
fn add(histogram: &SharedArray<u64>, word: usize, by: u64) {
    histogram.set(word, histogram.get(word).wrapping_add(by));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::latency::{buckets, quantile, total};
    use crate::plan::status::StatusPage;

    fn seen(histogram: &SharedArray<u64>) -> Vec<u64> {
        (0..histogram.len()).map(|word| histogram.get(word)).collect()
    }

    #[test]
    fn packets_count_when_their_last_descriptor_is_sent() {
        let histogram = StatusPage::create().unwrap().1.latency;
        let (mut stamper, mut meter) = stamps().unwrap();
        let start = u32::MAX - 1;
        let taken_ns = now_ns() - 1_000_000_000;
        stamper.note(taken_ns, start.wrapping_add(5), 5);
        stamper.note(now_ns(), start.wrapping_add(7), 2);
        meter.settle(start.wrapping_add(4), true, &histogram);
        assert_eq!(total(&buckets(&seen(&histogram))), 0, "one of them still waits");
        meter.settle(start.wrapping_add(6), true, &histogram);
        let first = buckets(&seen(&histogram));
        assert!(total(&first) == 5 && quantile(&first, 0.0) > Some(900_000_000), "{first:?}");
        assert!(histogram.get(SUM) >= 5_000_000_000, "{}", histogram.get(SUM));
        meter.settle(start.wrapping_add(7), false, &histogram);
        stamper.note(now_ns(), start.wrapping_add(8), 1);
        meter.settle(start.wrapping_add(8), true, &histogram);
        let both = buckets(&seen(&histogram));
        assert!(total(&both) == 6 && quantile(&both, 0.1) < Some(900_000_000), "two were thrown away: {both:?}");
    }

    #[test]
    fn where_stamps_find_no_room_the_oldest_time_stays() {
        let histogram = StatusPage::create().unwrap().1.latency;
        let (mut stamper, mut meter) = stamps().unwrap();
        let long_ago = now_ns() - 2_000_000_000;
        (1..=STAMPS).for_each(|end| stamper.note(now_ns(), end, 1));
        stamper.note(long_ago, STAMPS + 1, 1);
        stamper.note(now_ns(), STAMPS + 2, 1);
        meter.settle(STAMPS + 2, true, &histogram);
        assert_eq!(total(&buckets(&seen(&histogram))), u64::from(STAMPS), "two had no room");
        stamper.note(now_ns(), STAMPS + 3, 1);
        meter.settle(STAMPS + 3, true, &histogram);
        let all = seen(&histogram);
        assert_eq!((total(&buckets(&all)), all[word_of(u64::MAX)]), (u64::from(STAMPS) + 3, 3), "they came with the next one");
    }
}
