//! What a verifying receiver knows about a stream: lost, duplicated, reordered, damaged, late, silent. Pure; time is a parameter.

use super::payload::{self, Parsed};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Sequences per page of the bitmap.
const PAGE: u64 = 65_536;
/// Pages kept at most (32 MiB): 2^28 sequences. What lies beyond counts as corrupted.
const MAX_PAGES: usize = 4_096;
/// A gap between two arrivals that is worth a line.
const SILENCE_NS: u64 = 1_000_000;
/// Silences listed at most.
const MAX_SILENCES: usize = 10_000;

/// A gap between two arrivals.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Silence {
    /// Its begin, µs after the first arrival.
    pub at_us: u64,
    /// Its length, µs.
    pub len_us: u64,
}

/// Sequences missing one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LossRuns {
    /// How many such runs.
    pub count: u64,
    /// Sequences of the longest.
    pub longest: u64,
}

impl LossRuns {
    fn add(&mut self, missing: u64) {
        self.count += u64::from(missing > 0);
        self.longest = self.longest.max(missing);
    }
}

/// Running account of one stream.
#[derive(Debug)]
pub struct Tally {
    pages: HashMap<u64, Box<[u64]>, foldhash::fast::FixedState>,
    lowest: u64,
    highest: Option<u64>,
    latency: Histogram<u64>,
    first_ns: u64,
    last_ns: u64,
    longest_ns: u64,
    /// How far below the highest sequence so far a first arrival came, at most.
    pub reorder_depth: u64,
    /// Gaps over 1 ms, in order.
    pub silences: Vec<Silence>,
    /// Datagrams of any kind.
    pub received: u64,
    /// Different sequences.
    pub distinct: u64,
    /// Sequences seen again.
    pub duplicated: u64,
    /// First arrivals below the highest sequence so far.
    pub reordered: u64,
    /// Ours, but damaged.
    pub corrupted: u64,
    /// Ours, too short for a number.
    pub unnumbered: u64,
    /// Not ours.
    pub foreign: u64,
}

impl Tally {
    /// An empty account.
    pub fn new() -> Result<Self, hdrhistogram::CreationError> {
        Ok(Self {
            pages: HashMap::default(),
            lowest: u64::MAX,
            highest: None,
            latency: Histogram::new_with_bounds(1, 60_000_000_000, 3)?,
            first_ns: 0,
            last_ns: 0,
            longest_ns: 0,
            reorder_depth: 0,
            silences: Vec::new(),
            received: 0,
            distinct: 0,
            duplicated: 0,
            reordered: 0,
            corrupted: 0,
            unnumbered: 0,
            foreign: 0,
        })
    }

    /// Takes one datagram that arrived at `arrival_ns` (CLOCK_MONOTONIC).
    pub fn record(&mut self, bytes: &[u8], arrival_ns: u64) {
        self.received += 1;
        match payload::parse(bytes) {
            Parsed::Foreign => self.foreign += 1,
            Parsed::Corrupted => self.corrupted += 1,
            Parsed::Unnumbered => {
                self.unnumbered += 1;
                self.note_arrival(arrival_ns);
            }
            Parsed::Numbered { sequence, sent_ns } => {
                self.note_arrival(arrival_ns);
                self.note_sequence(sequence);
                if let Some(sent_ns) = sent_ns {
                    self.latency.saturating_record(arrival_ns.saturating_sub(sent_ns).max(1));
                }
            }
        }
    }

    fn note_arrival(&mut self, arrival_ns: u64) {
        if self.last_ns == 0 {
            (self.first_ns, self.last_ns) = (arrival_ns, arrival_ns);
        }
        let gap = arrival_ns.saturating_sub(self.last_ns);
        self.longest_ns = self.longest_ns.max(gap);
        if gap > SILENCE_NS && self.silences.len() < MAX_SILENCES {
            self.silences.push(Silence { at_us: (self.last_ns - self.first_ns) / 1_000, len_us: gap / 1_000 });
        }
        self.last_ns = self.last_ns.max(arrival_ns);
    }

    fn note_sequence(&mut self, sequence: u64) {
        match self.mark(sequence) {
            None => self.corrupted += 1,
            Some(false) => self.duplicated += 1,
            Some(true) => {
                self.distinct += 1;
                let depth = self.highest.map_or(0, |highest| highest.saturating_sub(sequence));
                self.reordered += u64::from(depth > 0);
                self.reorder_depth = self.reorder_depth.max(depth);
                self.highest = self.highest.max(Some(sequence));
                self.lowest = self.lowest.min(sequence);
            }
        }
    }

    /// Sets the bit of a sequence; whether it was clear. `None`: no room for so wide a range.
    fn mark(&mut self, sequence: u64) -> Option<bool> {
        let number = sequence / PAGE;
        if !self.pages.contains_key(&number) && self.pages.len() >= MAX_PAGES {
            return None;
        }
        let page = self.pages.entry(number).or_insert_with(|| vec![0; (PAGE / 64) as usize].into_boxed_slice());
        let word = page.get_mut((sequence % PAGE / 64) as usize)?;
        let bit = 1 << (sequence % 64);
        let clear = *word & bit == 0;
        *word |= bit;
        Some(clear)
    }

    /// Sequences that should have come and did not: of `expected`, or between the lowest and the highest seen.
    pub fn lost(&self, expected: Option<u64>) -> u64 {
        let span = self.highest.map_or(0, |highest| (highest - self.lowest).saturating_add(1));
        expected.unwrap_or(span).max(span).saturating_sub(self.distinct)
    }

    /// Runs of missing sequences between the lowest and the highest seen: one walk over the pages there are, at the end of a run.
    pub fn loss_runs(&self) -> LossRuns {
        let mut runs = LossRuns::default();
        let mut pages: Vec<(&u64, &Box<[u64]>)> = self.pages.iter().collect();
        pages.sort_unstable_by_key(|(number, _)| **number);
        let words = pages.into_iter().flat_map(|(number, page)| page.iter().zip(number * PAGE / 64..));
        let mut last = None;
        for (word, position) in words {
            let mut left = *word;
            while left != 0 {
                let sequence = position * 64 + u64::from(left.trailing_zeros());
                runs.add(last.map_or(0, |last| sequence - last - 1));
                last = Some(sequence);
                left &= left - 1;
            }
        }
        runs
    }

    /// Lowest sequence seen.
    pub fn lowest(&self) -> Option<u64> {
        self.highest.map(|_| self.lowest)
    }

    /// Highest sequence seen.
    pub fn highest(&self) -> Option<u64> {
        self.highest
    }

    /// First to last arrival, ns.
    pub fn duration_ns(&self) -> u64 {
        self.last_ns - self.first_ns
    }

    /// Longest gap between two arrivals, µs.
    pub fn longest_silence_us(&self) -> u64 {
        self.longest_ns / 1_000
    }

    /// Latency at a quantile (0–1), µs; `None` without a stamped datagram.
    pub fn latency_us(&self, quantile: f64) -> Option<f64> {
        (!self.latency.is_empty()).then(|| self.latency.value_at_quantile(quantile) as f64 / 1_000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(sequences: &[u64]) -> Tally {
        let mut tally = Tally::new().unwrap();
        for (index, sequence) in sequences.iter().enumerate() {
            let mut buf = [0; 64];
            let now = 1_000_000 + index as u64 * 1_000;
            payload::write(&mut buf, *sequence, now - 500);
            tally.record(&buf, now);
        }
        tally
    }

    #[test]
    fn loss_duplicates_and_order_are_told_apart() {
        let t = tally(&[0, 1, 2, 4, 3, 4, 4, 9]);
        assert_eq!((t.received, t.distinct, t.duplicated, t.reordered, t.corrupted), (8, 6, 2, 1, 0));
        assert_eq!((t.lost(None), t.lost(Some(12)), t.lost(Some(10))), (4, 6, 4));
        assert_eq!((t.lowest(), t.highest()), (Some(0), Some(9)));
        assert_eq!(t.latency_us(0.5), Some(0.5));
    }

    #[test]
    fn runs_of_losses_and_the_depth_of_reordering_are_counted() {
        let runs = |sequences: &[u64]| {
            let runs = tally(sequences).loss_runs();
            (runs.count, runs.longest)
        };
        assert_eq!(runs(&[]), (0, 0));
        assert_eq!(runs(&[5, 6, 7, 6]), (0, 0));
        assert_eq!(runs(&[5, 9, 7, 12]), (3, 2));
        assert_eq!(runs(&[63, 64, 66, 127, 128]), (2, 60));
        assert_eq!(runs(&[PAGE - 1, PAGE, 3 * PAGE + 1]), (1, 2 * PAGE));
        assert_eq!(runs(&[0, u64::MAX]), (1, u64::MAX - 1));
        assert_eq!((tally(&[0, 4, 1, 3]).reorder_depth, tally(&[0, 1, 1, 2]).reorder_depth), (3, 0));
    }

    #[test]
    fn silences_are_listed() {
        let mut t = Tally::new().unwrap();
        let mut buf = [0; 32];
        for (sequence, at) in [(0, 10_000_000), (1, 10_500_000), (2, 14_000_000), (3, 14_000_100)] {
            payload::write(&mut buf, sequence, at);
            t.record(&buf, at);
        }
        assert_eq!(t.silences, [Silence { at_us: 500, len_us: 3_500 }]);
        assert_eq!(t.longest_silence_us(), 3_500);
    }

    #[test]
    fn an_absurd_range_neither_panics_nor_eats_memory() {
        let mut t = Tally::new().unwrap();
        let mut buf = [0; 32];
        for page in 0..(MAX_PAGES as u64 + 10) {
            payload::write(&mut buf, page * PAGE, 1);
            t.record(&buf, 2);
        }
        assert_eq!((t.corrupted, t.distinct), (10, MAX_PAGES as u64));
        let empty = Tally::new().unwrap();
        assert_eq!((empty.lost(None), empty.lost(Some(5)), empty.duration_ns()), (0, 5, 0));
    }
}
