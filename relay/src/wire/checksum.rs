//! The Internet checksum (RFC 1071): whole, over pieces of any length, and incrementally (RFC 1624).
//!
//! Sums are of big-endian 16-bit words, carried in a `u64` and folded late. Must never read outside the slices it is
//! given, and never decides what a wrong checksum means.

/// Adds the carries back until 16 bits are left. 0 only for a sum of nothing but zeros.
#[inline]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// Sum of one slice as if it started at an even offset; a last odd byte is the high half of a word.
///
/// Adds native 32-bit words (any byte order gives the same sum up to a swap, RFC 1071 §2 (B)) in lanes of 64 bits, which 2^32 of them
/// don't fill, so that nothing waits for a carry. The last bytes are added as they are: written together
/// into a word first, they were read before they had left the store buffer, which cost more than all of an IPv4 header's words.
#[inline]
fn slice_sum(bytes: &[u8]) -> u16 {
    let (words, mut rest) = bytes.as_chunks::<8>();
    let mut lanes = [0u64; 2];
    for word in words {
        let word = u64::from_ne_bytes(*word);
        lanes[0] += word & 0xffff_ffff;
        lanes[1] += word >> 32;
    }
    let mut sum = lanes[0] + lanes[1];
    if let Some((four, behind)) = rest.split_first_chunk::<4>() {
        sum += u64::from(u32::from_ne_bytes(*four));
        rest = behind;
    }
    if let Some((two, behind)) = rest.split_first_chunk::<2>() {
        sum += u64::from(u16::from_ne_bytes(*two));
        rest = behind;
    }
    if let [last] = rest {
        sum += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    u16::from_be(fold(sum))
}

/// A sum over consecutive pieces of one message.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    words: u64,
    odd: bool,
}

impl Sum {
    /// A sum that starts with `words` (a pseudo-header's).
    #[inline]
    pub const fn starting_with(words: u64) -> Self {
        Self { words, odd: false }
    }

    /// Adds the next piece; pieces may have odd lengths.
    #[inline]
    pub fn add(&mut self, piece: &[u8]) {
        let sum = slice_sum(piece);
        self.words += u64::from(if self.odd { sum.swap_bytes() } else { sum });
        self.odd ^= piece.len() % 2 == 1;
    }

    /// The folded, uncomplemented sum: 0xffff over a message that contains its own right checksum.
    #[inline]
    pub const fn folded(self) -> u16 {
        fold(self.words)
    }
}

/// The checksum of `bytes` (complemented sum), as it stands in a header.
#[inline]
pub fn checksum(bytes: &[u8]) -> u16 {
    !slice_sum(bytes)
}

/// Whether `bytes`, which contain their own checksum, are intact.
#[inline]
pub fn verifies(bytes: &[u8]) -> bool {
    slice_sum(bytes) == 0xffff
}

/// Sum of a 16-byte address field, network order (for IPv4: 4 bytes and 12 zeros).
#[inline]
fn address_sum(addr: &[u8; 16]) -> u64 {
    addr.as_chunks::<4>().0.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum()
}

/// The pseudo-header sum of UDP over either family (RFC 768; RFC 8200 §8.1), unfolded. IPv4 addresses stand in the first
/// 4 bytes, the rest zero. `len`: the UDP length.
#[inline]
pub fn pseudo_header(src: &[u8; 16], dst: &[u8; 16], len: u16) -> u64 {
    address_sum(src) + address_sum(dst) + 17 + u64::from(len)
}

/// Changes to a summed message, collected so that one checksum, or several, can follow (RFC 1624 eqn. 3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(u64);

impl Delta {
    /// A 16-bit word at an even offset changes.
    #[inline]
    pub const fn word(&mut self, old: u16, new: u16) {
        self.0 += !old as u64 + new as u64;
    }

    /// Two words at an even offset change.
    #[inline]
    pub const fn long(&mut self, old: u32, new: u32) {
        self.0 += !old as u64 + new as u64;
    }

    /// The checksum after the changes; `old` stands in the header now.
    #[inline]
    pub const fn apply(self, old: u16) -> u16 {
        !fold(!old as u64 + self.0)
    }

    /// Both changes together.
    #[inline]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

/// A computed UDP checksum as it is sent: 0 would mean "none" (RFC 768, RFC 8200 §8.1).
#[inline]
pub const fn udp_sent(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 as written: one big-endian word after the other.
    fn reference(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn rfc_1071_example() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    #[test]
    fn rfc_1624_example() {
        let mut delta = Delta::default();
        delta.word(0x5555, 0x3285);
        assert_eq!(delta.apply(0xdd2f), 0x0000);
    }

    #[test]
    fn nothing_sums_to_zero() {
        assert_eq!((fold(0), fold(u64::MAX), fold(0xffff)), (0, 0xffff, 0xffff));
    }

    proptest! {
        #[test]
        fn whole_equals_the_rfc(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(slice_sum(&bytes), reference(&bytes));
        }

        #[test]
        fn pieces_equal_the_whole(bytes in prop::collection::vec(any::<u8>(), 0..300), cuts in prop::collection::vec(0usize..300, 0..5)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut sum = Sum::default();
            cuts.windows(2).for_each(|cut| sum.add(&bytes[cut[0]..cut[1]]));
            prop_assert_eq!(sum.folded(), reference(&bytes));
        }

        #[test]
        fn incremental_equals_full(mut words in prop::collection::vec(any::<u16>(), 3..40), at in any::<prop::sample::Index>(), new in any::<u16>(), long in any::<u32>()) {
            let bytes = |words: &[u16]| words.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<u8>>();
            words[0] |= 1; // never all zero, as no real header is
            let before = checksum(&bytes(&words));
            let at = 1 + at.index(words.len() - 2);
            let mut delta = Delta::default();
            if new % 2 == 0 {
                delta.word(words[at], new);
                words[at] = new;
            } else {
                delta.long(u32::from(words[at]) << 16 | u32::from(words[at + 1]), long);
                (words[at], words[at + 1]) = ((long >> 16) as u16, long as u16);
            }
            prop_assert_eq!(delta.apply(before), checksum(&bytes(&words)));
        }
    }
}
