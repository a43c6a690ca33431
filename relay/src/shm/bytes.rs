//! Messages of any length (up to [`MAX_LEN`]) over a channel of fixed slots.
//!
//! A message is cut into [`Chunk`]s; each says which message it is of, how long that is and which part it carries. A reader that
//! was lapped, or finds parts that do not belong together (the peer is untrusted), drops that message and counts it.
//! Must never believe a length before it is checked against [`MAX_LEN`].

use super::channel::{self, ChannelError, Claim, Reader, Writer};
use super::segment::Segment;
use crate::ring::{Behind, Received};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Bytes of payload in a chunk.
const PART: usize = 96;
/// Longest message.
pub const MAX_LEN: usize = 64 << 10;

/// One slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Chunk {
    message: u64,
    len: u32,
    part: u32,
    bytes: [u8; PART],
}

/// Why a message was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Longer than [`MAX_LEN`], or than the channel could hold at once.
    #[error("message of {len} bytes is longer than {max}")]
    TooLong {
        /// Its length.
        len: usize,
        /// What fits.
        max: usize,
    },
    /// The gate is closed. The message may be sent again: readers drop the unfinished one.
    #[error(transparent)]
    Behind(#[from] Behind),
}

/// A channel to be written later ([`Claim`]).
#[derive(Debug)]
pub struct ByteClaim(Claim<Chunk>);

impl ByteClaim {
    /// Maps the channel; its writer goes on.
    pub fn open(fd: OwnedFd) -> Result<Self, ChannelError> {
        Claim::open(fd).map(Self)
    }

    /// Takes over the writing end from nobody, or from a writer that is gone: numbers go on, its unfinished message is lost.
    pub fn take(self) -> Result<ByteWriter, ChannelError> {
        self.0.take().map(ByteWriter::of)
    }

    /// The same before the lock is to be had ([`Claim::succeed`]).
    pub fn succeed(self) -> Result<ByteWriter, ChannelError> {
        self.0.succeed().map(ByteWriter::of)
    }
}

/// The writing end.
#[derive(Debug)]
pub struct ByteWriter {
    chunks: Writer<Chunk>,
    message: u64,
    max_len: usize,
}

impl ByteWriter {
    /// A channel that holds `capacity` chunks of 96 bytes; a message may fill half of it.
    pub fn create(name: &str, capacity: u32) -> Result<Self, ChannelError> {
        Ok(Self { chunks: Writer::create(name, capacity)?, message: 0, max_len: max_len(capacity) })
    }

    /// The segment of such a channel, for a writer that is to come ([`ByteWriter::adopt`]). Memory is taken as it is written.
    pub fn prepare(name: &str, capacity: u32) -> Result<Arc<Segment>, ChannelError> {
        channel::prepare::<Chunk>(Segment::create(name, channel::channel_len::<Chunk>(capacity))?, capacity)
    }

    fn of(chunks: Writer<Chunk>) -> Self {
        Self { message: chunks.last().map_or(0, |chunk| chunk.message), max_len: max_len(chunks.capacity()), chunks }
    }

    /// [`Writer::hold`].
    pub fn hold(&mut self) {
        self.chunks.hold();
    }

    /// [`ByteClaim::open`] and [`ByteClaim::take`].
    pub fn adopt(fd: OwnedFd) -> Result<Self, ChannelError> {
        ByteClaim::open(fd)?.take()
    }

    /// Counts a message that the caller gives up on.
    pub fn count_dropped(&mut self) {
        self.chunks.count_dropped();
    }

    /// Sends all of `bytes` or nothing that a reader would accept.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), SendError> {
        if bytes.len() > self.max_len {
            return Err(SendError::TooLong { len: bytes.len(), max: self.max_len });
        }
        // Wrapping: the number may be one that a predecessor left behind, and nobody knows what had become of that.
        self.message = self.message.wrapping_add(1);
        // An empty message is one chunk too.
        let parts = chunks_of(bytes.len());
        for part in 0..parts {
            let from = bytes.get(part * PART..).unwrap_or_default();
            let mut chunk = Chunk { message: self.message, len: bytes.len() as u32, part: part as u32, bytes: [0; PART] };
            chunk.bytes.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            self.chunks.send(&chunk)?;
        }
        Ok(())
    }
}

const fn max_len(capacity: u32) -> usize {
    let half = capacity as usize / 2 * PART;
    if half < MAX_LEN { half } else { MAX_LEN }
}

/// Chunks that a message of `len` bytes takes.
pub const fn chunks_of(len: usize) -> usize {
    let parts = len.div_ceil(PART);
    if parts == 0 { 1 } else { parts }
}

impl AsFd for ByteWriter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.chunks.as_fd()
    }
}

/// What [`ByteReader::receive`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceivedBytes {
    /// A whole message is in the buffer.
    Message,
    /// Nothing (more) yet.
    Empty,
}

/// The reading end.
#[derive(Debug)]
pub struct ByteReader {
    chunks: Reader<Chunk>,
    /// Message under assembly: (number, length, next part).
    open: Option<(u64, u32, u32)>,
    last: u64,
    lost: u64,
    malformed: u64,
}

impl ByteReader {
    /// Reads what is sent from now on.
    pub fn open(fd: OwnedFd) -> Result<Self, ChannelError> {
        let chunks = Reader::<Chunk>::open(fd)?;
        let last = chunks.latest().map_or(0, |chunk| chunk.message);
        Ok(Self { chunks, open: None, last, lost: 0, malformed: 0 })
    }

    /// Assembles the next message in `buffer`. Looks at no more chunks than a longest message has, then says Empty.
    pub fn receive(&mut self, buffer: &mut Vec<u8>) -> ReceivedBytes {
        for _ in 0..=MAX_LEN / PART {
            match self.chunks.receive() {
                Received::Empty => break,
                Received::Overrun(_) => self.open = None,
                Received::Message(chunk) => {
                    if self.take(&chunk, buffer) {
                        return ReceivedBytes::Message;
                    }
                }
            }
        }
        ReceivedBytes::Empty
    }

    /// Messages that were sent and could not be put together.
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Messages that the writers gave up on so far, as they say.
    pub fn dropped(&mut self) -> u64 {
        self.chunks.stats().dropped
    }

    /// Chunks that no honest writer sends.
    pub const fn malformed(&self) -> u64 {
        self.malformed
    }

    /// Adds a chunk; true if its message is complete.
    fn take(&mut self, chunk: &Chunk, buffer: &mut Vec<u8>) -> bool {
        let len = chunk.len as usize;
        let start = (chunk.part as usize).saturating_mul(PART);
        if chunk.message == self.last && chunk.part != 0 {
            return false; // the rest of a message that began before we opened
        }
        if len > MAX_LEN || (start >= len && chunk.part != 0) || chunk.message <= self.last {
            self.malformed += 1;
            self.open = None;
            return false;
        }
        if chunk.part == 0 {
            buffer.clear();
            self.open = Some((chunk.message, chunk.len, 0));
        }
        if self.open != Some((chunk.message, chunk.len, chunk.part)) {
            self.open = None; // the middle of a message whose beginning was overrun
            return false;
        }
        let part = chunk.bytes.get(..PART.min(len - start)).unwrap_or_default();
        buffer.extend_from_slice(part);
        self.open = Some((chunk.message, chunk.len, chunk.part + 1));
        if buffer.len() < len {
            return false;
        }
        self.lost += chunk.message - self.last - 1;
        self.last = chunk.message;
        self.open = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::channel::duplicate;
    use proptest::prelude::*;

    prop_compose! {
        /// Near what an honest writer sends, so that some get far.
        fn chunk()(message in prop_oneof![0..6u64, any::<u64>()], len in prop_oneof![0..300u32, any::<u32>()],
                   part in prop_oneof![0..4u32, any::<u32>()], byte in any::<u8>()) -> Chunk {
            Chunk { message, len, part, bytes: [byte; PART] }
        }
    }

    proptest! {
        /// Whatever a compromised writer sends: no panic, no message longer than it may be, and the counts close.
        #[test]
        fn hostile_chunks_are_judged(chunks in proptest::collection::vec(chunk(), 1..40)) {
            let segment = ByteWriter::prepare("hostile", 64).unwrap();
            let mut reader = ByteReader::open(duplicate(segment.as_fd()).unwrap()).unwrap();
            let mut writer = Writer::<Chunk>::adopt(duplicate(segment.as_fd()).unwrap()).unwrap();
            let mut buffer = Vec::new();
            for chunk in &chunks {
                writer.send(chunk).unwrap();
                if reader.receive(&mut buffer) == ReceivedBytes::Message {
                    prop_assert!(buffer.len() <= MAX_LEN);
                }
            }
            prop_assert!(reader.lost() <= reader.last && reader.malformed() <= chunks.len() as u64);
            drop(writer);
            // A successor of the compromised writer goes on, whatever number it finds.
            let mut writer = ByteWriter::adopt(duplicate(segment.as_fd()).unwrap()).unwrap();
            writer.send(b"honest again").unwrap();
            reader.receive(&mut buffer);
        }
    }
}
