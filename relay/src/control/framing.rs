//! One message on the control socket: how its bytes are laid out, put together and taken apart.
//!
//! ```text
//! offset 0  u32  length of the JSON document in bytes, little-endian, 1 ..= limit of the direction
//! offset 4  u8   PROTOCOL_VERSION of the sender
//! offset 5  …    the JSON document (UTF-8)
//! ```
//! Must never allocate for a length that was only announced: memory grows as bytes arrive. Knows no socket.

use super::message::PROTOCOL_VERSION;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read};

/// Bytes before the document.
pub const HEADER_LEN: usize = 5;
/// Longest request document: an `apply` of 16,384 rules of 500 bytes (10,000 plain ones have 1.1 MB).
pub const MAX_REQUEST_LEN: u32 = 8 << 20;
/// Longest response document.
pub const MAX_RESPONSE_LEN: u32 = 64 << 20;

/// The version byte of this build.
const VERSION: u8 = PROTOCOL_VERSION as u8;
/// Bytes taken from a socket at once.
const CHUNK_LEN: usize = 16 << 10;

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The sender speaks another protocol, or none.
    #[error("control protocol version {got} is not spoken here: this relay speaks version {VERSION}")]
    Version {
        /// The byte that came.
        got: u8,
    },
    /// Announced or produced more than the limit.
    #[error("a message of {len} bytes is over the limit of {limit}")]
    TooLong {
        /// Document length.
        len: u64,
        /// Limit of this direction.
        limit: u32,
    },
    /// Length 0.
    #[error("a message without a document")]
    Empty,
    /// The document does not say what it should.
    #[error("the message is not understood: {0}")]
    Document(#[from] serde_json::Error),
}

/// The bytes of `value` as one message of at most `limit` bytes.
pub fn encode<T: Serialize>(value: &T, limit: u32) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; HEADER_LEN];
    serde_json::to_writer(&mut bytes, value)?;
    let document_len = bytes.len() - HEADER_LEN;
    let len = checked_len(document_len as u64, limit)?;
    for (slot, byte) in bytes.iter_mut().zip(header(len)) {
        *slot = byte;
    }
    Ok(bytes)
}

/// What a document says.
pub fn decode<T: DeserializeOwned>(document: &[u8]) -> Result<T, FrameError> {
    Ok(serde_json::from_slice(document)?)
}

fn header(len: u32) -> [u8; HEADER_LEN] {
    let [a, b, c, d] = len.to_le_bytes();
    [a, b, c, d, VERSION]
}

fn checked_len(len: u64, limit: u32) -> Result<u32, FrameError> {
    match u32::try_from(len) {
        Ok(0) => Err(FrameError::Empty),
        Ok(len) if len <= limit => Ok(len),
        _ => Err(FrameError::TooLong { len, limit }),
    }
}

/// What one read brought.
#[derive(Debug)]
pub enum Step {
    /// Bytes, but no whole message yet.
    More,
    /// A whole document; the next message starts afresh.
    Whole(Vec<u8>),
    /// The other side will send nothing more.
    Closed,
    /// Not a message; nothing after it can be understood.
    Bad(FrameError),
}

/// One message being put together. Never reads beyond its end, so what follows stays in the socket.
#[derive(Debug)]
pub struct Reassembly {
    limit: u32,
    header: [u8; HEADER_LEN],
    header_have: usize,
    document_len: usize,
    document: Vec<u8>,
}

impl Reassembly {
    /// Waits for a message of at most `limit` bytes.
    pub fn new(limit: u32) -> Self {
        Self { limit, header: [0; HEADER_LEN], header_have: 0, document_len: 0, document: Vec::new() }
    }

    /// Whether no byte of a message has come yet.
    pub fn is_empty(&self) -> bool {
        self.header_have == 0
    }

    /// Memory held for the message.
    pub fn held_len(&self) -> usize {
        self.document.capacity()
    }

    /// One read from `source`. Errors are those of the read, `WouldBlock` included.
    pub fn step(&mut self, source: &mut impl Read) -> io::Result<Step> {
        if self.header_have < HEADER_LEN { self.step_header(source) } else { self.step_document(source) }
    }

    fn step_header(&mut self, source: &mut impl Read) -> io::Result<Step> {
        let missing = self.header.get_mut(self.header_have..).unwrap_or_default();
        match source.read(missing)? {
            0 => return Ok(Step::Closed),
            got => self.header_have += got,
        }
        if self.header_have < HEADER_LEN {
            return Ok(Step::More);
        }
        Ok(self.accept_header().map_or_else(Step::Bad, |()| Step::More))
    }

    /// Checks the announced length before a byte is allocated for it.
    fn accept_header(&mut self) -> Result<(), FrameError> {
        let [a, b, c, d, got] = self.header;
        if got != VERSION {
            return Err(FrameError::Version { got });
        }
        let len = u32::from_le_bytes([a, b, c, d]);
        self.document_len = checked_len(len.into(), self.limit)? as usize;
        Ok(())
    }

    fn step_document(&mut self, source: &mut impl Read) -> io::Result<Step> {
        let mut chunk = [0; CHUNK_LEN];
        let missing = self.document_len.saturating_sub(self.document.len()).min(CHUNK_LEN);
        let part = chunk.get_mut(..missing).unwrap_or_default();
        let got = source.read(part)?;
        if got == 0 {
            return Ok(Step::Closed);
        }
        self.document.extend_from_slice(part.get(..got).unwrap_or_default());
        if self.document.len() < self.document_len {
            return Ok(Step::More);
        }
        let document = std::mem::take(&mut self.document);
        *self = Self::new(self.limit);
        Ok(Step::Whole(document))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::message::Request;

    /// Gives `bytes` in pieces of `piece` bytes and returns what the last step said.
    fn feed(bytes: &[u8], piece: usize, limit: u32) -> (Reassembly, Step) {
        let mut reassembly = Reassembly::new(limit);
        let mut last = Step::More;
        for part in bytes.chunks(piece) {
            let mut rest = part;
            while !rest.is_empty() {
                last = reassembly.step(&mut rest).expect("reading from memory");
                if !matches!(last, Step::More) {
                    return (reassembly, last);
                }
            }
        }
        (reassembly, last)
    }

    #[test]
    fn every_cut_of_a_message_gives_the_same_message() {
        let bytes = encode(&Request::RuleDel { id: "x".repeat(40_000) }, MAX_REQUEST_LEN).expect("encodes");
        for piece in [1, 2, 4, 5, 6, 1000, CHUNK_LEN, 100_000] {
            let (reassembly, Step::Whole(document)) = feed(&bytes, piece, MAX_REQUEST_LEN) else { panic!("piece {piece}") };
            let Request::RuleDel { id } = decode(&document).expect("decodes") else { panic!("another request") };
            assert_eq!(id.len(), 40_000);
            assert!(reassembly.is_empty());
        }
    }

    #[test]
    fn an_announced_length_allocates_nothing() {
        let (reassembly, step) = feed(&[0, 0, 0, 0x40, VERSION], 5, MAX_REQUEST_LEN);
        assert!(matches!(step, Step::Bad(FrameError::TooLong { len: 0x4000_0000, .. })), "{step:?}");
        assert_eq!(reassembly.held_len(), 0);
        let (reassembly, step) = feed(&[0, 0, 0x80, 0, VERSION, b'x'], 6, MAX_REQUEST_LEN);
        assert!(matches!(step, Step::More), "{step:?}");
        assert!(reassembly.held_len() <= 64, "1 byte came, {} are held", reassembly.held_len());
    }

    #[test]
    fn wrong_headers_are_named() {
        assert!(matches!(feed(&[1, 0, 0, 0, 9], 5, 10).1, Step::Bad(FrameError::Version { got: 9 })));
        assert!(matches!(feed(&[0, 0, 0, 0, VERSION], 5, 10).1, Step::Bad(FrameError::Empty)));
        assert!(matches!(feed(&[11, 0, 0, 0, VERSION], 5, 10).1, Step::Bad(FrameError::TooLong { len: 11, limit: 10 })));
        assert!(matches!(feed(b"GET / HTTP/1.1", 14, 10).1, Step::Bad(FrameError::Version { got: b'/' })));
    }

    #[test]
    fn the_next_message_stays_in_the_source() {
        let one = encode(&Request::Status, 100).expect("encodes");
        let both = [one.clone(), one].concat();
        let mut source = both.as_slice();
        let mut reassembly = Reassembly::new(100);
        for _ in 0..2 {
            while !matches!(reassembly.step(&mut source).expect("memory"), Step::Whole(_)) {}
        }
        assert!(source.is_empty());
        assert!(matches!(reassembly.step(&mut source), Ok(Step::Closed)));
    }

    #[test]
    fn too_long_a_value_is_refused_by_the_sender() {
        let request = Request::RuleDel { id: "x".repeat(100) };
        assert!(matches!(encode(&request, 50), Err(FrameError::TooLong { limit: 50, .. })));
    }
}
