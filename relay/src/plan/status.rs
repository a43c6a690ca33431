//! The status segment of a worker: a channel of reports, heartbeat, state, acknowledged epoch, counters.
//!
//! ```text
//!    0 header: owner, state, beats, turns (shm/header.rs, shm/state.rs) · 256 channel of FrameStats (shm/channel.rs)
//! 4096 words, one writer: the worker · 4608 rungs by port · 5120 send reports by port, 6656 latency (egress thread)
//! 8192 serials by rule slot · by output slot · counters (ingress) · counters (egress)
//! ```
//! Made by the supervisor before the worker, and survives it: the successor goes on in the same segment, under a new epoch.
//! Must never be believed by the supervisor beyond its bounds: a worker may be compromised.

use super::counters::{COUNTER_COUNT, Counter, MAX_OUTPUTS, MAX_PORTS, MAX_RULES};
use super::latency;
use crate::ring::layout::layout_hash;
use crate::ring::memory::LINE_SIZE;
use crate::shm::channel::{channel_len, duplicate, prepare};
use crate::shm::{Access, ChannelError, Header, Reader, Segment};
use crate::sys::shared::OutOfMapping;
use crate::sys::{SharedArray, SharedWord, SharedWord64};
use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// Reports that a reader may fall behind (a report a beat).
pub const REPORTS: u32 = 16;
const PAGE: usize = 4096;
const RUNGS: usize = PAGE + 512;
const SENDS: usize = RUNGS + MAX_PORTS * size_of::<RungReport>();
const LATENCY: usize = SENDS + MAX_PORTS * size_of::<SendReport>();
const RULE_SERIALS: usize = 2 * PAGE;
const _: () = assert!(LATENCY + latency::WORDS * size_of::<u64>() <= RULE_SERIALS);
const OUTPUT_SERIALS: usize = RULE_SERIALS + MAX_RULES * 4;
const COUNTERS: usize = OUTPUT_SERIALS + MAX_OUTPUTS * 4;
const ARRAY_LEN: usize = (COUNTER_COUNT * size_of::<Counter>()).next_multiple_of(4096);
/// Bytes of a status segment (sparse: only touched pages take memory).
pub const STATUS_LEN: usize = COUNTERS + 2 * ARRAY_LEN;

const _: () = assert!(COUNTERS.is_multiple_of(LINE_SIZE) && ARRAY_LEN.is_multiple_of(LINE_SIZE), "two writers would share a line");
const _: () = assert!(channel_len::<FrameStats>(REPORTS) <= PAGE, "the reports reach into the words");

/// AF_XDP.
pub const RUNG_XSK: u32 = 1;
/// AF_PACKET with io_uring.
pub const RUNG_URING: u32 = 2;
/// AF_PACKET with plain system calls.
pub const RUNG_PLAIN: u32 = 3;

/// The rung on which a worker drives a port. 8 bytes; zeros before its first start.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct RungReport {
    /// `RUNG_*`.
    pub rung: u32,
    /// What refused the rung above; 0: it was not asked for.
    pub errno: i32,
}

/// The interface is down.
pub const PORT_DOWN: u32 = 1;
/// The interface is gone.
pub const PORT_GONE: u32 = 2;
/// The device refuses super-frames: what should be coalesced goes packet by packet.
pub const PORT_SINGLES: u32 = 4;

/// Health of a sending port. 24 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct SendReport {
    /// Wake-ups that failed with an error that is neither benign nor a state.
    pub kick_errors: u64,
    /// Packets handed over that will never be sent.
    pub refused: u64,
    /// `PORT_*` bits.
    pub flags: u32,
    /// Always 0.
    pub zero: u32,
}

/// Where the frames are, as the worker reports it at every beat. The places sum to `total`. 88 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Pod, Zeroable)]
pub struct FrameStats {
    /// Frames of all UMEMs.
    pub total: u64,
    /// In the pools.
    pub free: u64,
    /// In fill rings (or posted as receive buffers).
    pub fill: u64,
    /// In RX rings.
    pub rx: u64,
    /// In egress rings.
    pub egress: u64,
    /// In return rings.
    #[serde(rename = "return")]
    pub returning: u64,
    /// In TX rings.
    pub tx: u64,
    /// In completion rings.
    pub completion: u64,
    /// In a worker's hand.
    pub hand: u64,
    /// With the kernel, in no ring.
    pub kernel: u64,
    /// Lost: the kernel gave back an address that is no frame's.
    pub lost_invalid: u64,
}

impl FrameStats {
    /// Every place with its name, in the order of a frame's way; the counts add up to `total`.
    pub const fn places(&self) -> [(&'static str, u64); 10] {
        [
            ("free", self.free),
            ("fill", self.fill),
            ("rx", self.rx),
            ("egress", self.egress),
            ("return", self.returning),
            ("tx", self.tx),
            ("completion", self.completion),
            ("hand", self.hand),
            ("kernel", self.kernel),
            ("lost_invalid", self.lost_invalid),
        ]
    }
}

/// Why a status segment could not be made or used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StatusError {
    /// The channel in it.
    #[error("status segment: {0}")]
    Channel(#[from] ChannelError),
    /// Too small.
    #[error("status segment: {0}")]
    Layout(#[from] OutOfMapping),
}

/// A mapped status segment, but for the reports in it: those have an end for each side.
#[derive(Clone, Debug)]
pub struct StatusPage {
    /// Owner, state, heartbeat, turns.
    pub header: Arc<Header>,
    /// Epoch of the rules in use.
    pub acked_epoch: SharedWord,
    /// Journal states found at the last start: ingress | egress << 8.
    pub recovered: SharedWord,
    /// CPU of the ingress thread plus 1; 0: not pinned.
    cpu: SharedWord,
    /// Commands taken from the control channels, by this worker and its predecessors.
    pub commands: SharedWord,
    /// Packets processed again after a kill, since the segment was made.
    pub replayed: SharedWord64,
    /// Frames taken back from rings that died.
    pub reclaimed: SharedWord64,
    /// The rung by port, written at start.
    pub rungs: SharedArray<RungReport>,
    /// Health of sending ports, written by the egress thread.
    pub sends: SharedArray<SendReport>,
    /// How long packets were in the worker (plan/latency.rs), written by the egress thread.
    pub latency: SharedArray<u64>,
    /// Counters of the ingress thread.
    pub ingress: SharedArray<Counter>,
    /// Counters of the egress thread.
    pub egress: SharedArray<Counter>,
    /// Serial of the rule whose numbers stand in a rule slot's counters.
    pub rule_serials: SharedArray<u32>,
    /// The same for output slots.
    pub output_serials: SharedArray<u32>,
}

impl StatusPage {
    /// Makes a status segment before its worker exists (supervisor).
    pub fn create() -> Result<(Arc<Segment>, Self, Reader<FrameStats>), StatusError> {
        let segment = Segment::create("relay-status", STATUS_LEN).map_err(ChannelError::from)?;
        let segment = prepare::<FrameStats>(segment, REPORTS)?;
        let reports = Reader::open(duplicate(segment.as_fd())?)?;
        Ok((Arc::clone(&segment), Self::of(&segment)?, reports))
    }

    /// A status segment that another supervisor has made.
    pub fn join(fd: OwnedFd) -> Result<(Arc<Segment>, Self, Reader<FrameStats>), StatusError> {
        let segment = Segment::join(fd, Access::ReadWrite).and_then(|segment| segment.at_least(STATUS_LEN)).map_err(ChannelError::from)?;
        let reports = Reader::open(duplicate(segment.as_fd())?)?;
        let segment = Arc::new(segment);
        Ok((Arc::clone(&segment), Self::of(&segment)?, reports))
    }

    /// The page in a segment whose channel has been opened (worker), or made.
    pub fn of(segment: &Arc<Segment>) -> Result<Self, StatusError> {
        let header = Header::open(segment.clone(), layout_hash::<FrameStats>()).map_err(ChannelError::from)?;
        let m = segment.mapping();
        Ok(Self {
            header: Arc::new(header),
            acked_epoch: SharedWord::new(m, PAGE)?,
            recovered: SharedWord::new(m, PAGE + 4)?,
            cpu: SharedWord::new(m, PAGE + 8)?,
            commands: SharedWord::new(m, PAGE + 12)?,
            replayed: SharedWord64::new(m, PAGE + 16)?,
            reclaimed: SharedWord64::new(m, PAGE + 24)?,
            rungs: SharedArray::new(m, RUNGS, MAX_PORTS)?,
            sends: SharedArray::new(m, SENDS, MAX_PORTS)?,
            latency: SharedArray::new(m, LATENCY, latency::WORDS)?,
            ingress: SharedArray::new(m, COUNTERS, COUNTER_COUNT)?,
            egress: SharedArray::new(m, COUNTERS + ARRAY_LEN, COUNTER_COUNT)?,
            rule_serials: SharedArray::new(m, RULE_SERIALS, MAX_RULES)?,
            output_serials: SharedArray::new(m, OUTPUT_SERIALS, MAX_OUTPUTS)?,
        })
    }

    /// CPU of the ingress thread, or -1 (`relay status`).
    pub fn cpu(&self) -> i32 {
        i32::try_from(self.cpu.load(Relaxed)).unwrap_or(0) - 1
    }

    /// Says where the ingress thread runs.
    pub fn set_cpu(&self, cpu: usize) {
        self.cpu.store(u32::try_from(cpu).map_or(0, |cpu| cpu.saturating_add(1)), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::{Actor, State, Writer, coarse_now};

    /// The owner's words, the reports, the worker's words and each thread's counters begin on lines of their own.
    #[test]
    fn req_003_3_each_writer_has_lines_of_its_own() {
        let places = [
            0,
            crate::shm::HEADER_SIZE,
            PAGE,
            RUNGS,
            SENDS,
            LATENCY,
            RULE_SERIALS,
            OUTPUT_SERIALS,
            COUNTERS,
            COUNTERS + ARRAY_LEN,
            STATUS_LEN,
        ];
        assert!(places.is_sorted() && places.iter().all(|at| at.is_multiple_of(LINE_SIZE)), "{places:?}");
        assert_eq!(LINE_SIZE, 128, "two lines of 64, because the prefetcher pulls pairs");
    }

    #[test]
    fn a_worker_reports_and_its_successor_goes_on() {
        let (segment, page, mut reports) = StatusPage::create().unwrap();
        for epoch in 1..3 {
            let mut worker = Writer::<FrameStats>::adopt(duplicate(segment.as_fd()).unwrap()).unwrap();
            let own = StatusPage::of(worker.segment()).unwrap();
            assert_eq!((own.header.epoch(), own.cpu()), (epoch, -1));
            own.header.become_state(State::Run, Actor::Worker).unwrap();
            own.header.beat(coarse_now());
            worker.send(&FrameStats { total: epoch, ..FrameStats::default() }).unwrap();
            assert_eq!((page.header.state(), page.header.last_beat().count), (Some(State::Run), epoch));
            drop(worker);
            page.header.become_state(State::Fail, Actor::Supervisor).unwrap();
            page.header.become_state(State::Boot, Actor::Supervisor).unwrap();
        }
        assert_eq!((reports.stats().sent, reports.latest().map(|frames| frames.total)), (2, Some(2)));
        page.set_cpu(3);
        assert_eq!(page.cpu(), 3);
    }
}
