//! The generator's payload: bytes ↔ (sequence, stamp, integrity). Pure; no sockets, no clock.
//!
//! Layout, little-endian, cut where the datagram ends: `magic [8] | sequence u64 | CLOCK_MONOTONIC ns u64 | pattern…`.
//! The pattern is a function of the sequence and the position, so that swapped, shifted or foreign bytes are found.

/// First 8 bytes of every datagram of `relay send`.
pub const MAGIC: [u8; 8] = *b"relaylab";
/// Bytes up to and with the sequence.
pub const NUMBERED_LEN: usize = 16;
/// Bytes up to and with the stamp.
pub const STAMPED_LEN: usize = 24;

/// What a received payload turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Ours, whole.
    Numbered {
        /// Place in the stream.
        sequence: u64,
        /// When it was sent, if the datagram was long enough to say.
        sent_ns: Option<u64>,
    },
    /// Ours by its magic (or a part of it), too short to be numbered.
    Unnumbered,
    /// Ours by its magic, but the pattern is damaged.
    Corrupted,
    /// Not from our generator.
    Foreign,
}

/// Fills `buf` for `sequence`, stamped `now_ns`.
pub fn write(buf: &mut [u8], sequence: u64, now_ns: u64) {
    let (head, pattern) = buf.split_at_mut(buf.len().min(STAMPED_LEN));
    let mut bytes = [0u8; STAMPED_LEN];
    let (magic, numbers) = bytes.split_at_mut(MAGIC.len());
    magic.copy_from_slice(&MAGIC);
    let (number, stamp) = numbers.split_at_mut(8);
    number.copy_from_slice(&sequence.to_le_bytes());
    stamp.copy_from_slice(&now_ns.to_le_bytes());
    for (to, from) in head.iter_mut().zip(bytes) {
        *to = from;
    }
    for (chunk, word) in pattern.chunks_mut(8).zip(words(sequence)) {
        for (to, from) in chunk.iter_mut().zip(word.to_le_bytes()) {
            *to = from;
        }
    }
}

/// Reads a payload back and checks every byte of it but the stamp.
pub fn parse(buf: &[u8]) -> Parsed {
    if !buf.iter().zip(MAGIC).all(|(a, b)| *a == b) || buf.is_empty() {
        return Parsed::Foreign;
    }
    let Some(sequence) = word_at(buf, MAGIC.len()) else { return Parsed::Unnumbered };
    let Some(sent_ns) = word_at(buf, NUMBERED_LEN) else { return Parsed::Numbered { sequence, sent_ns: None } };
    let pattern = buf.get(STAMPED_LEN..).unwrap_or_default();
    let whole = pattern.chunks(8).zip(words(sequence)).all(|(chunk, word)| word.to_le_bytes().starts_with(chunk));
    if whole { Parsed::Numbered { sequence, sent_ns: Some(sent_ns) } } else { Parsed::Corrupted }
}

fn word_at(buf: &[u8], at: usize) -> Option<u64> {
    buf.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

/// Words of the pattern: every sequence has its own base, every position its own offset.
fn words(sequence: u64) -> impl Iterator<Item = u64> {
    let base = sequence.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0u64..).map(move |position| base ^ position.wrapping_mul(0xd6e8_feb8_6659_fd93))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for len in 24..200 {
            let mut buf = vec![0; len];
            write(&mut buf, 77, 123);
            assert_eq!(parse(&buf), Parsed::Numbered { sequence: 77, sent_ns: Some(123) }, "{len} bytes");
        }
    }

    #[test]
    fn short_payloads_say_what_fits() {
        let mut buf = [0; 23];
        write(&mut buf, 9, 1);
        assert_eq!(parse(&buf), Parsed::Numbered { sequence: 9, sent_ns: None });
        assert_eq!(parse(&buf[..15]), Parsed::Unnumbered);
        assert_eq!(parse(&buf[..3]), Parsed::Unnumbered);
        assert_eq!(parse(&[]), Parsed::Foreign);
        assert_eq!(parse(b"something else, and long enough"), Parsed::Foreign);
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let mut buf = [0; 61];
        write(&mut buf, 5, 6);
        for byte in (0..NUMBERED_LEN).chain(STAMPED_LEN..buf.len()) {
            for bit in 0..8 {
                buf[byte] ^= 1 << bit;
                assert_ne!(parse(&buf), Parsed::Numbered { sequence: 5, sent_ns: Some(6) }, "byte {byte} bit {bit}");
                buf[byte] ^= 1 << bit;
            }
        }
    }
}
