//! Random damage to bytes, the same for the same seed: for the differential test of the two parsers and the fuzz tests.
//!
//! Must never know what the bytes mean beyond a list of values that parsers trip over.

/// A small generator (xorshift64*): tests need speed and repetition, not secrecy.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The same sequence for the same seed.
    pub const fn seeded(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15 | 1)
    }

    /// 64 random bits.
    pub const fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8 ^ self.0 << 56
    }

    /// A number below `end`; 0 where `end` is 0.
    pub const fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { (self.bits() % end as u64) as usize }
    }

    /// One of these.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// `RELAY_TEST_SEED`, so that a run can be had again or be another one.
pub fn seed() -> u64 {
    std::env::var("RELAY_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(4)
}

/// Ends of ranges, header lengths, and what EtherType and protocol fields hold.
const WORDS: [u16; 27] = [
    0, 1, 7, 8, 9, 20, 28, 40, 48, 0x7fff, 0x8000, 0xffff, 0x0800, 0x86dd, 0x8100, 0x88a8, 0x9100, 0x2000, 0x1fff, 0x4000, 0x4500, 0x4f00,
    0x6000, 0x1100, 0x0011, 5000, 0x0806,
];
const BYTES: [u8; 29] = [
    0, 1, 2, 4, 6, 8, 17, 43, 44, 51, 58, 59, 60, 103, 135, 139, 140, 0x40, 0x44, 0x45, 0x46, 0x4f, 0x55, 0x60, 0x65, 0x7f, 0x80, 0xfe,
    0xff,
];

/// Changes `bytes` in one to four ways. `focus`: most changes fall into this many bytes from the start. `words`: put in whole.
pub fn mutate(random: &mut Random, bytes: &mut Vec<u8>, focus: usize, words: &[&[u8]]) {
    for _ in 0..=random.below(4) {
        once(random, bytes, focus, words);
    }
}

fn once(random: &mut Random, bytes: &mut Vec<u8>, focus: usize, words: &[&[u8]]) {
    let end = if random.below(8) == 0 { bytes.len() } else { bytes.len().min(focus) };
    let at = random.below(end);
    match random.below(if words.is_empty() { 10 } else { 14 }) {
        0 | 1 => put(bytes, at, &[random.bits() as u8]),
        2 => flip(bytes, at, random.below(8)),
        3 | 4 => put(bytes, at, &[*random.pick(&BYTES)]),
        5 | 6 => put(bytes, at & !1, &random.pick(&WORDS).to_be_bytes()),
        7 => bytes.truncate(random.below(bytes.len() + 1)),
        8 => move_bytes(random, bytes, at),
        9 => nudge(random, bytes, at & !1),
        _ => drop(bytes.splice(at..at, random.pick(words).iter().copied())),
    }
}

fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    for (place, byte) in bytes.iter_mut().skip(at).zip(new) {
        *place = *byte;
    }
}

fn flip(bytes: &mut [u8], at: usize, bit: usize) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << bit;
    }
}

/// Takes out or puts in up to eight bytes, in fours mostly, as tags and options do.
fn move_bytes(random: &mut Random, bytes: &mut Vec<u8>, at: usize) {
    let len = if random.below(3) == 0 { random.below(9) } else { 4 };
    if random.below(2) == 0 {
        bytes.drain(at..(at + len).min(bytes.len()));
    } else {
        let new: Vec<u8> = (0..len).map(|_| random.bits() as u8).collect();
        bytes.splice(at..at, new);
    }
}

/// A length that is off by a little.
fn nudge(random: &mut Random, bytes: &mut [u8], at: usize) {
    let Some(word) = bytes.get(at..at + 2) else { return };
    let off = (random.below(17) as u16).wrapping_sub(8);
    let new = u16::from_be_bytes([word[0], word[1]]).wrapping_add(off);
    put(bytes, at, &new.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_it_all_and_nothing_stays_as_it_was() {
        let damaged = |seed| {
            let mut random = Random::seeded(seed);
            let mut all: Vec<Vec<u8>> = (0..1_000).map(|_| vec![0x55; 60]).collect();
            all.iter_mut().for_each(|bytes| mutate(&mut random, bytes, 40, &[b"word"]));
            all
        };
        assert_eq!(damaged(1), damaged(1));
        assert_ne!(damaged(1), damaged(2));
        let same = damaged(3).into_iter().filter(|bytes| *bytes == [0x55; 60]).count();
        assert!(same < 20, "{same} of 1000 are as they were");
        mutate(&mut Random::seeded(1), &mut Vec::new(), 40, &[]);
    }
}
