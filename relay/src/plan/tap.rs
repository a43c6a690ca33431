//! Taps: what workers show to `relay capture`, and the word by which they are told what is wanted.
//!
//! ```text
//! record: at_ns u64 · packet u64 · rule slot u32 · serial u32 · len u32 · captured u32 · port u16 · output u16
//!         · point u8 · reason u8 · sent u8 · of u8 · the first `captured` bytes of the packet
//! wanted: snaplen 16 bits · points 8 bits · 8 bits 0 · rule slot + 1 (0: any) 32 bits; 0: nothing
//! ```
//! Records lie in a byte channel (shm/bytes.rs), one for each worker, sparse, written by the ingress thread and read by clients
//! over a read-only mapping: the writer never waits, a reader that falls behind is told how many records it has lost, and any
//! number of captures read the same ring. A worker may be compromised: must never believe a record before [`Record::read`].

use super::fate::{DropReason, OutputDropReason};
use crate::shm::bytes::{ByteClaim, ByteReader, ByteWriter, ReceivedBytes, chunks_of};
use crate::shm::{ChannelError, Segment};
use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Chunks of a tap ring: about 8 MB, of which what was captured takes memory.
const CHUNKS: u32 = 65_536;
/// Most bytes of a packet that are captured (no packet is longer: six fragments of a frame).
pub const MAX_SNAPLEN: u32 = 16_384;
const NONE: u32 = u32::MAX;
const NO_OUTPUT: u16 = u16::MAX;

/// Where packets are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Point {
    /// As it came, before any rewrite.
    Ingress,
    /// As it leaves, one for each output that gets it.
    Egress,
    /// As it came, where an output, or all of them, did not get it.
    Drop,
}

impl Point {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ingress, Self::Egress, Self::Drop];

    const fn bit(self) -> u8 {
        1 << self as u8
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }
}

/// What is to be captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    points: u8,
    snaplen: u16,
    rule: Option<u32>,
}

impl Wanted {
    /// The first `snaplen` bytes at these points, of the rule in a slot or of all packets.
    pub fn new(points: &[Point], snaplen: u32, rule: Option<u32>) -> Self {
        let points = points.iter().fold(0, |bits, point| bits | point.bit());
        Self { points, snaplen: snaplen.min(MAX_SNAPLEN) as u16, rule }
    }

    /// Reads the word; any value is one.
    pub fn from_word(word: u64) -> Self {
        let rule = ((word >> 32) as u32).checked_sub(1);
        Self { points: (word >> 16) as u8 & 7, snaplen: (word as u16).min(MAX_SNAPLEN as u16), rule }
    }

    /// As one word.
    pub fn word(self) -> u64 {
        let rule = self.rule.map_or(0, |slot| u64::from(slot) + 1);
        if self.is_nothing() { 0 } else { u64::from(self.snaplen) | u64::from(self.points) << 16 | rule << 32 }
    }

    /// Whether no tap is wanted.
    pub const fn is_nothing(self) -> bool {
        self.points == 0
    }

    /// Whether packets are looked at there.
    pub const fn at(self, point: Point) -> bool {
        self.points & point.bit() != 0
    }

    /// Bytes of a packet.
    pub fn snaplen(self) -> usize {
        self.snaplen.into()
    }

    /// Whether packets of the rule in this slot (or of none) are looked at.
    pub fn takes(self, slot: Option<u32>) -> bool {
        self.rule.is_none() || self.rule == slot
    }

    /// No less than either wants: each reader takes its own out of it.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        if self.is_nothing() || other.is_nothing() {
            return if self.is_nothing() { other } else { self };
        }
        Self {
            points: self.points | other.points,
            snaplen: self.snaplen.max(other.snaplen),
            rule: self.rule.filter(|slot| other.rule == Some(*slot)),
        }
    }
}

/// The fixed part of a record. 40 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Head {
    at_ns: u64,
    packet: u64,
    rule: u32,
    serial: u32,
    len: u32,
    captured: u32,
    port: u16,
    output: u16,
    point: u8,
    reason: u8,
    sent: u8,
    of: u8,
}

/// Bytes of a [`Head`].
pub const HEAD_LEN: usize = size_of::<Head>();

/// What became of a packet, as far as the tap knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// So many of the rule's outputs got it.
    Forwarded {
        /// Outputs that got it.
        sent: u8,
        /// Outputs of the rule.
        of: u8,
    },
    /// No output got it.
    Dropped(DropReason),
    /// This output got it.
    Sent {
        /// Its place in the rule.
        output: u16,
    },
    /// This output did not get it.
    OutputDropped {
        /// Its place in the rule.
        output: u16,
        /// Why.
        reason: OutputDropReason,
    },
}

/// A record without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// CLOCK_REALTIME of its batch, ns.
    pub at_ns: u64,
    /// Number that all records of one packet share.
    pub packet: u64,
    /// Slot and serial of its rule.
    pub rule: Option<(u32, u32)>,
    /// Bytes of the whole packet.
    pub len: u32,
    /// Number of the port it came by, or leaves by.
    pub port: u16,
    /// Where it was seen.
    pub point: Point,
    /// What became of it.
    pub fate: Fate,
}

impl Sight {
    /// The record's head for `captured` bytes.
    pub fn head(&self, captured: usize) -> Head {
        let (rule, serial) = self.rule.unwrap_or((NONE, 0));
        let (output, reason, sent, of) = match self.fate {
            Fate::Forwarded { sent, of } => (NO_OUTPUT, 0, sent, of),
            Fate::Dropped(reason) => (NO_OUTPUT, reason as u8 + 1, 0, 0),
            Fate::Sent { output } => (output, 0, 0, 0),
            Fate::OutputDropped { output, reason } => (output, reason as u8 + 1, 0, 0),
        };
        let Self { at_ns, packet, len, port, point, .. } = *self;
        Head { at_ns, packet, rule, serial, len, captured: captured as u32, port, output, point: point as u8, reason, sent, of }
    }

    fn of(head: &Head) -> Option<Self> {
        let reason = |number: u8| (number as usize).checked_sub(1);
        let fate = match (head.output, head.reason) {
            (NO_OUTPUT, 0) if head.sent <= head.of => Fate::Forwarded { sent: head.sent, of: head.of },
            (NO_OUTPUT, 0) => return None,
            (NO_OUTPUT, number) => Fate::Dropped(*DropReason::ALL.get(reason(number)?)?),
            (output, 0) => Fate::Sent { output },
            (output, number) => Fate::OutputDropped { output, reason: *OutputDropReason::ALL.get(reason(number)?)? },
        };
        let rule = (head.rule != NONE).then_some((head.rule, head.serial));
        let point = Point::from_number(head.point)?;
        let fits = match point {
            Point::Ingress => matches!(fate, Fate::Forwarded { .. } | Fate::Dropped(_)),
            Point::Egress => matches!(fate, Fate::Sent { .. }),
            Point::Drop => matches!(fate, Fate::Dropped(_) | Fate::OutputDropped { .. }),
        };
        let Head { at_ns, packet, len, port, .. } = *head;
        fits.then_some(Self { at_ns, packet, rule, len, port, point, fate })
    }
}

/// A record that has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// What is said of the packet.
    pub sight: Sight,
    /// Its first bytes.
    pub bytes: &'a [u8],
}

impl<'a> Record<'a> {
    /// Reads one message of a tap ring; `None` if no honest worker writes that.
    pub fn read(message: &'a [u8]) -> Option<Self> {
        let (head, bytes) = message.split_at_checked(HEAD_LEN)?;
        let head: Head = bytemuck::pod_read_unaligned(head);
        let sound = head.captured as usize == bytes.len() && head.captured <= head.len && head.captured <= MAX_SNAPLEN;
        let sight = Sight::of(&head).filter(|_| sound)?;
        Some(Self { sight, bytes })
    }
}

/// The length of the record at the start of `records`, which this process has written itself.
pub fn record_len(records: &[u8]) -> Option<usize> {
    let head: Head = bytemuck::pod_read_unaligned(records.get(..HEAD_LEN)?);
    Some(HEAD_LEN + head.captured as usize)
}

/// Chunks that a record with so many packet bytes takes in the ring.
pub const fn record_chunks(captured: usize) -> u64 {
    chunks_of(HEAD_LEN + captured) as u64
}

/// Makes a tap ring (supervisor).
pub fn create() -> Result<Arc<Segment>, ChannelError> {
    ByteWriter::prepare("relay-tap", CHUNKS)
}

/// A tap ring that its worker is to write.
#[derive(Debug)]
pub struct TapClaim(ByteClaim);

impl TapClaim {
    /// Maps the ring.
    pub fn open(fd: OwnedFd) -> Result<Self, ChannelError> {
        ByteClaim::open(fd).map(Self)
    }

    /// Takes the ring over from a predecessor.
    pub fn take(self) -> Result<TapWriter, ChannelError> {
        self.0.take().map(TapWriter)
    }

    /// The same before the lock is to be had ([`ByteClaim::succeed`]).
    pub fn succeed(self) -> Result<TapWriter, ChannelError> {
        self.0.succeed().map(TapWriter)
    }
}

/// A worker's end of its tap ring.
#[derive(Debug)]
pub struct TapWriter(ByteWriter);

impl TapWriter {
    /// [`TapClaim::open`] and [`TapClaim::take`].
    pub fn adopt(fd: OwnedFd) -> Result<Self, ChannelError> {
        TapClaim::open(fd)?.take()
    }

    /// Writes a record. Never waits.
    pub fn send(&mut self, record: &[u8]) {
        if self.0.send(record).is_err() {
            self.0.count_dropped();
        }
    }

    /// [`ByteWriter::hold`].
    pub fn hold(&mut self) {
        self.0.hold();
    }

    /// Counts a packet or record that was left out.
    pub fn count_missed(&mut self) {
        self.0.count_dropped();
    }
}

/// A client's end.
#[derive(Debug)]
pub struct TapReader {
    ring: ByteReader,
    buffer: Vec<u8>,
    missed_before: u64,
    malformed: u64,
}

impl TapReader {
    /// Reads what is written from now on.
    pub fn open(fd: OwnedFd) -> Result<Self, ChannelError> {
        let mut ring = ByteReader::open(fd)?;
        let missed_before = ring.dropped();
        Ok(Self { ring, buffer: Vec::new(), missed_before, malformed: 0 })
    }

    /// The next record, if there is one. Bounded: what is malformed is counted and passed over.
    pub fn receive(&mut self) -> Option<Record<'_>> {
        loop {
            if self.ring.receive(&mut self.buffer) == ReceivedBytes::Empty {
                return None;
            }
            if Record::read(&self.buffer).is_some() {
                break;
            }
            self.malformed += 1;
        }
        Record::read(&self.buffer)
    }

    /// Records that were overwritten before they were read.
    pub const fn overrun(&self) -> u64 {
        self.ring.lost()
    }

    /// Packets and records that the worker left out since the reader was opened.
    pub fn left_out(&mut self) -> u64 {
        self.ring.dropped().saturating_sub(self.missed_before)
    }

    /// Records and packets lost either way.
    pub fn lost(&mut self) -> u64 {
        self.overrun().saturating_add(self.left_out())
    }

    /// Records that no honest worker writes.
    pub const fn malformed(&self) -> u64 {
        self.malformed.saturating_add(self.ring.malformed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::channel::duplicate;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    fn sight(point: Point, fate: Fate) -> Sight {
        Sight { at_ns: 1_700_000_000_000_000_007, packet: 9, rule: Some((3, 4)), len: 100, port: 2, point, fate }
    }

    fn message(sight: &Sight, bytes: &[u8]) -> Vec<u8> {
        [bytemuck::bytes_of(&sight.head(bytes.len())), bytes].concat()
    }

    #[test]
    fn what_is_written_is_read_by_every_reader() {
        let ring = create().unwrap();
        let mut readers = [0, 1].map(|_| TapReader::open(duplicate(ring.as_fd()).unwrap()).unwrap());
        let mut writer = TapWriter::adopt(duplicate(ring.as_fd()).unwrap()).unwrap();
        let mut sights = vec![sight(Point::Ingress, Fate::Forwarded { sent: 1, of: 2 }), sight(Point::Egress, Fate::Sent { output: 1 })];
        sights.extend(DropReason::ALL.iter().map(|reason| sight(Point::Drop, Fate::Dropped(*reason))));
        sights.extend(OutputDropReason::ALL.iter().map(|reason| sight(Point::Drop, Fate::OutputDropped { output: 0, reason: *reason })));
        sights.push(Sight { rule: None, ..sight(Point::Drop, Fate::Dropped(DropReason::NoRule)) });
        let bytes: Vec<u8> = (0..100).collect();
        sights.iter().for_each(|sight| writer.send(&message(sight, &bytes)));
        writer.count_missed();
        drop(writer);
        // A successor goes on, and nobody is told of a loss.
        TapWriter::adopt(duplicate(ring.as_fd()).unwrap()).unwrap().send(&message(&sights[0], &bytes[..7]));
        for reader in &mut readers {
            for sight in &sights {
                assert_eq!(reader.receive(), Some(Record { sight: *sight, bytes: &bytes }));
            }
            assert_eq!(reader.receive().map(|record| record.bytes.len()), Some(7));
            assert_eq!(reader.receive(), None);
            assert_eq!((reader.overrun(), reader.left_out(), reader.malformed(), reader.lost()), (0, 1, 0, 1));
        }
    }

    #[test]
    fn a_reader_that_stops_is_told_what_it_lost() {
        let ring = create().unwrap();
        let mut reader = TapReader::open(duplicate(ring.as_fd()).unwrap()).unwrap();
        let mut writer = TapWriter::adopt(duplicate(ring.as_fd()).unwrap()).unwrap();
        let record = message(&sight(Point::Egress, Fate::Sent { output: 0 }), &[7; 100]);
        let sent = u64::from(CHUNKS);
        (0..sent).for_each(|_| writer.send(&record));
        let read = std::iter::from_fn(|| reader.receive().map(|_| ())).count() as u64;
        assert!(read > 0 && reader.overrun() > 0);
        assert_eq!(read + reader.overrun(), sent);
    }

    #[test]
    fn words() {
        let all = Wanted::new(&Point::ALL, 70_000, None);
        assert_eq!((all.snaplen(), Wanted::from_word(all.word())), (MAX_SNAPLEN as usize, all));
        let one = Wanted::new(&[Point::Drop], 96, Some(0));
        assert_eq!(Wanted::from_word(one.word()), one);
        assert!(one.takes(Some(0)) && !one.takes(Some(1)) && !one.takes(None) && all.takes(None));
        assert_eq!(one.or(Wanted::default()), one);
        assert_eq!(one.or(Wanted::new(&[Point::Egress], 20, Some(0))), Wanted::new(&[Point::Drop, Point::Egress], 96, Some(0)));
        assert_eq!(one.or(Wanted::new(&[Point::Drop], 20, Some(1))), Wanted::new(&[Point::Drop], 96, None));
        assert_eq!(Wanted::new(&[], 96, None).word(), 0);
    }

    proptest! {
        /// Whatever a compromised worker writes is a record or nothing.
        #[test]
        fn hostile_records_are_checked(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), sound in any::<bool>()) {
            if let (true, Some(captured)) = (sound, (bytes.len() as u32).checked_sub(HEAD_LEN as u32)) {
                bytes[28..32].copy_from_slice(&captured.to_ne_bytes());
                bytes[36] %= 4;
                bytes[37] %= 16;
            }
            if let Some(record) = Record::read(&bytes) {
                prop_assert!(record.bytes.len() <= record.sight.len as usize);
                let again = message(&record.sight, record.bytes);
                prop_assert_eq!(Record::read(&again), Some(record));
            }
        }

        #[test]
        fn every_word_is_a_wish(word in any::<u64>()) {
            let wanted = Wanted::from_word(word);
            prop_assert!(wanted.snaplen() <= MAX_SNAPLEN as usize);
            prop_assert_eq!(Wanted::from_word(wanted.word()).word(), wanted.word());
        }
    }
}
