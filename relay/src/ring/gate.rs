//! The optional gate of a broadcast: readers that must lose nothing say how far they are, and the writer stops before it laps one.
//!
//! ```text
//! words 0 ..        from[reader]: 0 = not admitted, else 1 + messages published when it was   (written by the publisher)
//! then 16 a reader  consumed, received, lost                                                  (written by that reader)
//! ```
//! Lies in memory of its own, so that readers of the broadcast itself need only a read-only mapping.
//! Must never believe a reader that claims to be ahead of the writer: counted, and no longer waited for.

use super::broadcast::Behind;
use super::memory::Words;
use super::sync::Ordering;

const LINE: usize = 16;

/// The writer's side of a gate.
#[derive(Debug)]
pub struct Gate {
    words: Words,
    reader_count: usize,
    invalid_peer: u64,
}

impl Gate {
    /// Words a gate of `reader_count` readers needs.
    pub const fn words(reader_count: u32) -> usize {
        (reader_count as usize).next_multiple_of(LINE) + reader_count as usize * LINE
    }

    /// Takes `words` (of [`Self::words`] words); nobody is admitted yet if they are clear.
    pub fn new(words: Words, reader_count: u32) -> Option<Self> {
        let fits = words.len() >= Self::words(reader_count) && words.writable();
        fits.then_some(Self { words, reader_count: reader_count as usize, invalid_peer: 0 })
    }

    /// From now on the writer waits for `reader`, which has to see everything after message `published`.
    pub fn admit(&mut self, reader: u32, published: u64) {
        if let Some(from) = self.admissions().get(reader as usize) {
            from.store(published.wrapping_add(1), Ordering::Release);
        }
    }

    /// The writer no longer waits for `reader` (it died, or it is too slow).
    pub fn evict(&mut self, reader: u32) {
        if let Some(from) = self.admissions().get(reader as usize) {
            from.store(0, Ordering::Release);
        }
    }

    /// Times a reader claimed to have consumed what was never sent.
    pub const fn invalid_peer(&self) -> u64 {
        self.invalid_peer
    }

    /// The reader furthest behind `published`, if anybody is admitted.
    pub fn slowest(&mut self, published: u64) -> Option<Behind> {
        let mut slowest: Option<Behind> = None;
        for reader in 0..self.reader_count {
            let from = self.admissions().get(reader).map_or(0, |word| word.load(Ordering::Relaxed));
            let line = self.reader_count.next_multiple_of(LINE) + reader * LINE;
            let consumed = self.words.get(line).map_or(0, |word| word.load(Ordering::Acquire));
            if from == 0 {
                continue;
            }
            if consumed > published {
                self.invalid_peer += 1;
                continue;
            }
            let messages = published.saturating_sub(consumed.max(from - 1));
            if slowest.is_none_or(|found| messages > found.messages) {
                slowest = Some(Behind { reader: reader as u32, messages });
            }
        }
        slowest
    }

    fn admissions(&self) -> &[super::sync::AtomicU64] {
        self.words.get(..self.reader_count).unwrap_or_default()
    }
}

/// One reader's line of a gate.
#[derive(Debug)]
pub struct GateLine {
    words: Words,
    at: usize,
    from_at: usize,
}

impl GateLine {
    /// Line of `reader` in a gate of `reader_count` readers.
    pub fn new(words: Words, reader_count: u32, reader: u32) -> Option<Self> {
        let fits = reader < reader_count && words.len() >= Gate::words(reader_count) && words.writable();
        let at = (reader_count as usize).next_multiple_of(LINE) + reader as usize * LINE;
        fits.then_some(Self { words, at, from_at: reader as usize })
    }

    /// Messages that this reader need not see: what was published when it was admitted, or consumed by its predecessor.
    pub fn start(&self) -> Option<u64> {
        let from = self.words.get(self.from_at)?.load(Ordering::Acquire);
        let consumed = self.words.get(self.at)?.load(Ordering::Relaxed);
        from.checked_sub(1).map(|from| from.max(consumed))
    }

    /// Tells the writer that everything up to message `number` was copied out.
    #[inline]
    pub fn consumed(&self, number: u64) {
        if let Some(word) = self.words.get(self.at) {
            word.store(number, Ordering::Release);
        }
    }
}
