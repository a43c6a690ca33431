//! The rules segment: one snapshot of the rule set for all workers, written by the supervisor, read-only to them.
//!
//! ```text
//! 0 header (shm/header.rs) · 256 epoch u32 (the half in force is epoch & 1) · 264 what taps are wanted u64 (tap.rs)
//! half: counts · rule records · output records · prefixes · own addresses · canonical texts
//! ```
//! Two halves: the supervisor writes the one not in force, then publishes the epoch; it writes a half again only when no
//! worker uses its epoch any more (DECISIONS §5). Each rule's canonical text stands beside it, so that a successor
//! supervisor can restore the set. Sparse: only touched pages take memory.

use super::counters::{MAX_OUTPUTS, MAX_RULES};
use super::edit::Edit;
use super::fate::OutputDropReason;
use crate::ring::layout::layout_hash;
use crate::rule::Prefix;
pub use crate::rule::prefix::to_bytes as address_bytes;
use crate::shm::{HEADER_SIZE, Header, HeaderError};
use crate::sys::shared::OutOfMapping;
use crate::sys::{Mapping, SharedArray, SharedWord, SharedWord64};
use bytemuck::{Pod, Zeroable};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

const MAX_PREFIXES: usize = 65_536;
const MAX_OWN: usize = 4096;
const TEXT_LEN: usize = 8 * 1024 * 1024;

/// A rule. 96 bytes. Addresses in network order, IPv4 in the first 4 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct RuleRecord {
    /// Slot: counters, and what XDP names.
    pub slot: u32,
    /// Epoch at which it was installed.
    pub serial: u32,
    /// Ingress interface.
    pub ifindex: u32,
    /// First of its output records.
    pub first_output: u32,
    /// Output records.
    pub output_count: u32,
    /// 0 untagged, 1 any, 2 one tag, 3 two tags.
    pub tag_mode: u32,
    /// VLAN ids as in `MatchKey::tag`.
    pub tag: u32,
    /// Destination port, or `u32::MAX` for any.
    pub port: u32,
    /// First of its `except` prefixes.
    pub first_prefix: u32,
    /// `except` prefixes.
    pub prefix_count: u32,
    /// Where its text starts.
    pub text_at: u32,
    /// Bytes of its text.
    pub text_len: u32,
    /// 4 or 6.
    pub family: u32,
    /// Prefix length of the group.
    pub group_len: u32,
    /// Prefix length of the source, or `u32::MAX` for none.
    pub source_len: u32,
    /// Always 0.
    pub zero: u32,
    /// Group.
    pub group: [u8; 16],
    /// Source.
    pub source: [u8; 16],
}

/// The output's packets may leave in super-frames.
pub const OUTPUT_COALESCE: u32 = 1;

/// An output. 88 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct OutputRecord {
    /// Slot of its counters.
    pub slot: u32,
    /// Port number in every worker's manifest.
    pub port: u32,
    /// 0: ready; else 1 + the reason it drops everything.
    pub blocked: u32,
    /// [`OUTPUT_COALESCE`] or 0.
    pub flags: u32,
    /// Header edits.
    pub edit: Edit,
    /// `rate=`: least time between two packets of one worker in the long run, in 1/64 ns; 0: unlimited.
    pub gap: u64,
}

impl OutputRecord {
    /// [`Self::gap`] of a rate in packets per second that `workers` share evenly.
    pub fn gap_of(rate: u64, workers: u64) -> u64 {
        (u128::from(workers) * 64_000_000_000 / u128::from(rate.max(1))).clamp(1, u128::from(u64::MAX >> 8)) as u64
    }

    /// Why the output can't send, if it can't.
    pub fn blocked(&self) -> Option<OutputDropReason> {
        OutputDropReason::ALL.get(self.blocked.checked_sub(1)? as usize).copied()
    }

    /// Encodes [`Self::blocked`].
    pub fn block(reason: Option<OutputDropReason>) -> u32 {
        reason.map_or(0, |reason| reason.index() as u32 + 1)
    }
}

/// An address with a number: a prefix length or an interface. 20 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct AddressRecord {
    /// Network order, IPv4 in the first 4 bytes.
    pub addr: [u8; 16],
    /// Prefix length, or ifindex.
    pub number: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct Counts {
    epoch: u32,
    rules: u32,
    outputs: u32,
    prefixes: u32,
    own: u32,
    text: u32,
}

/// One rule with all that belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRule {
    /// The record; its `first_*` and `*_count` fields are filled in by [`RulesSegment::publish`].
    pub record: RuleRecord,
    /// Its outputs.
    pub outputs: Vec<OutputRecord>,
    /// Its `except` prefixes.
    pub except: Vec<AddressRecord>,
    /// Its canonical text.
    pub text: String,
}

/// The rule set at one epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Epoch.
    pub epoch: u32,
    /// Rules.
    pub rules: Vec<SnapshotRule>,
    /// The relay's own addresses: address and interface.
    pub own: Vec<AddressRecord>,
}

/// A prefix of a family from record bytes.
pub fn prefix_from(family: u32, addr: [u8; 16], len: u32) -> Prefix {
    let [a, b, c, d, ..] = addr;
    let addr = if family == 4 { IpAddr::from([a, b, c, d]) } else { IpAddr::from(addr) };
    Prefix { addr, len: len as u8 }
}

/// Why a snapshot could not be published or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordsError {
    /// Not a rules segment of this build.
    #[error("rules segment: {0}")]
    Header(#[from] HeaderError),
    /// Outside the segment.
    #[error(transparent)]
    Layout(#[from] OutOfMapping),
    /// More than fits.
    #[error("{count} {what} are more than the {max} that fit")]
    Full {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many fit.
        max: usize,
    },
    /// The half holds another epoch by now.
    #[error("epoch {0} is not in the rules segment any more")]
    Stale(u32),
}

#[derive(Debug)]
struct Half {
    counts: SharedArray<Counts>,
    rules: SharedArray<RuleRecord>,
    outputs: SharedArray<OutputRecord>,
    prefixes: SharedArray<AddressRecord>,
    own: SharedArray<AddressRecord>,
    text: SharedArray<u8>,
}

const RULES_AT: usize = 4096;
const OUTPUTS_AT: usize = RULES_AT + MAX_RULES * size_of::<RuleRecord>();
const PREFIXES_AT: usize = OUTPUTS_AT + MAX_OUTPUTS * size_of::<OutputRecord>();
const OWN_AT: usize = PREFIXES_AT + MAX_PREFIXES * size_of::<AddressRecord>();
const TEXT_AT: usize = OWN_AT + MAX_OWN * size_of::<AddressRecord>();
const HALF_LEN: usize = (TEXT_AT + TEXT_LEN).next_multiple_of(4096);
/// Bytes of a rules segment.
pub const RULES_LEN: usize = 4096 + 2 * HALF_LEN;

impl Half {
    fn new(m: &Arc<Mapping>, number: usize) -> Result<Self, OutOfMapping> {
        let at = 4096 + number * HALF_LEN;
        Ok(Self {
            counts: SharedArray::new(m, at, 1)?,
            rules: SharedArray::new(m, at + RULES_AT, MAX_RULES)?,
            outputs: SharedArray::new(m, at + OUTPUTS_AT, MAX_OUTPUTS)?,
            prefixes: SharedArray::new(m, at + PREFIXES_AT, MAX_PREFIXES)?,
            own: SharedArray::new(m, at + OWN_AT, MAX_OWN)?,
            text: SharedArray::new(m, at + TEXT_AT, TEXT_LEN)?,
        })
    }
}

/// A mapped rules segment.
#[derive(Debug)]
pub struct RulesSegment {
    epoch: SharedWord,
    wanted: SharedWord64,
    halves: [Half; 2],
}

fn check(what: &'static str, count: usize, max: usize) -> Result<(), RecordsError> {
    if count > max { Err(RecordsError::Full { what, count, max }) } else { Ok(()) }
}

impl RulesSegment {
    /// A fresh segment (supervisor).
    pub fn create(m: &Arc<Mapping>) -> Result<Self, RecordsError> {
        Header::create(Arc::<Mapping>::clone(m), layout_hash::<RuleRecord>())?.own(std::process::id());
        Self::map(m)
    }

    /// An existing segment (worker).
    pub fn join(m: &Arc<Mapping>) -> Result<Self, RecordsError> {
        Header::open(Arc::<Mapping>::clone(m), layout_hash::<RuleRecord>())?;
        Self::map(m)
    }

    fn map(m: &Arc<Mapping>) -> Result<Self, RecordsError> {
        let (epoch, wanted) = (SharedWord::new(m, HEADER_SIZE)?, SharedWord64::new(m, HEADER_SIZE + 8)?);
        Ok(Self { epoch, wanted, halves: [Half::new(m, 0)?, Half::new(m, 1)?] })
    }

    /// What is to be captured (tap.rs). On the epoch's line, which a worker reads at every turn anyway.
    #[inline]
    pub fn wanted(&self) -> u64 {
        self.wanted.load(Relaxed)
    }

    /// Says what is to be captured (supervisor).
    pub fn want(&self, word: u64) {
        self.wanted.store(word, Release);
    }

    /// Epoch in force.
    #[inline]
    pub fn epoch(&self) -> u32 {
        self.epoch.load(Acquire)
    }

    fn half(&self, epoch: u32) -> &Half {
        let [even, odd] = &self.halves;
        if epoch.is_multiple_of(2) { even } else { odd }
    }

    /// Refuses a snapshot that does not fit, before anything is written.
    pub fn check(snapshot: &Snapshot) -> Result<(), RecordsError> {
        check("rules", snapshot.rules.len(), MAX_RULES)?;
        check("outputs", snapshot.rules.iter().map(|rule| rule.outputs.len()).sum(), MAX_OUTPUTS)?;
        check("excepted prefixes", snapshot.rules.iter().map(|rule| rule.except.len()).sum(), MAX_PREFIXES)?;
        check("own addresses", snapshot.own.len(), MAX_OWN)?;
        check("bytes of rule text", snapshot.rules.iter().map(|rule| rule.text.len()).sum(), TEXT_LEN)
    }

    /// Writes the half of the snapshot's epoch and puts it in force.
    pub fn publish(&self, snapshot: &Snapshot) -> Result<(), RecordsError> {
        Self::check(snapshot)?;
        let half = self.half(snapshot.epoch);
        let mut counts = Counts { epoch: snapshot.epoch, ..Counts::default() };
        for rule in &snapshot.rules {
            half.rules.set(
                counts.rules as usize,
                RuleRecord {
                    first_output: counts.outputs,
                    output_count: rule.outputs.len() as u32,
                    first_prefix: counts.prefixes,
                    prefix_count: rule.except.len() as u32,
                    text_at: counts.text,
                    text_len: rule.text.len() as u32,
                    ..rule.record
                },
            );
            half.outputs.set_all(counts.outputs as usize, &rule.outputs);
            half.prefixes.set_all(counts.prefixes as usize, &rule.except);
            half.text.set_all(counts.text as usize, rule.text.as_bytes());
            counts.rules += 1;
            counts.outputs += rule.outputs.len() as u32;
            counts.prefixes += rule.except.len() as u32;
            counts.text += rule.text.len() as u32;
        }
        half.own.set_all(0, &snapshot.own);
        counts.own = snapshot.own.len() as u32;
        half.counts.set(0, counts);
        self.epoch.store(snapshot.epoch, Release);
        Ok(())
    }

    /// Reads the snapshot of an epoch.
    pub fn read(&self, epoch: u32) -> Result<Snapshot, RecordsError> {
        let half = self.half(epoch);
        let counts = half.counts.get(0);
        if counts.epoch != epoch {
            return Err(RecordsError::Stale(epoch));
        }
        let rules = (0..(counts.rules as usize).min(MAX_RULES)).map(|index| read_rule(half, half.rules.get(index))).collect();
        let own = read(&half.own, 0, counts.own);
        if half.counts.get(0).epoch != epoch {
            return Err(RecordsError::Stale(epoch));
        }
        Ok(Snapshot { epoch, rules, own })
    }
}

fn read<T: Pod>(array: &SharedArray<T>, first: u32, count: u32) -> Vec<T> {
    let mut values = vec![T::zeroed(); (count as usize).min(array.len())];
    array.get_all(first as usize, &mut values);
    values
}

fn read_rule(half: &Half, record: RuleRecord) -> SnapshotRule {
    let text = read(&half.text, record.text_at, record.text_len);
    SnapshotRule {
        outputs: read(&half.outputs, record.first_output, record.output_count),
        except: read(&half.prefixes, record.first_prefix, record.prefix_count),
        text: String::from_utf8_lossy(&text).into_owned(),
        record,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::Segment;

    #[test]
    fn what_is_published_is_read() {
        let mapping = Segment::create("rules-test", RULES_LEN).unwrap().into_parts().1;
        let segment = RulesSegment::create(&mapping).unwrap();
        let rule = |slot: u32| SnapshotRule {
            record: RuleRecord { slot, serial: 7, family: 4, ..RuleRecord::default() },
            outputs: vec![OutputRecord { slot: slot * 2, ..OutputRecord::default() }; 2],
            except: vec![AddressRecord { addr: [1; 16], number: 8 }],
            text: format!("rule {slot}"),
        };
        let snapshot = Snapshot { epoch: 7, rules: vec![rule(3), rule(4)], own: vec![AddressRecord::default()] };
        segment.publish(&snapshot).unwrap();
        let read = RulesSegment::join(&mapping).unwrap().read(7).unwrap();
        assert_eq!(read.rules.len(), 2);
        assert_eq!(read.rules[1].text, "rule 4");
        assert_eq!(read.rules[1].outputs, snapshot.rules[1].outputs);
        assert_eq!(read.rules[1].except, snapshot.rules[1].except);
        assert_eq!(segment.read(6), Err(RecordsError::Stale(6)));
        segment.publish(&Snapshot { epoch: 8, ..Snapshot::default() }).unwrap();
        assert_eq!(segment.read(7).unwrap().rules.len(), 2, "the half before stays readable for a journal");
    }
}
