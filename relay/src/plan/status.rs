//! The status segment of a worker: state, heartbeat, acknowledged epoch, where its frames are, counters.
//!
//! ```text
//! 0 magic u64 · 8 version u32 · 64.. words, one writer: the worker · 512 rungs by port · 1024 send reports by port (egress thread) ·
//! 4096 serials by rule slot · by output slot · counters (ingress) · counters (egress)
//! ```
//! Survives the worker: the successor goes on in the same segment. State machine (who may take the edge):
//! ```text
//!        worker            worker              worker
//!  BOOT ───────▶ RUN ────────────▶ HALT   RUN ───────▶ FAIL
//!    ▲             drained, exits 0        gives up, exits 1
//!    └── supervisor, before it starts a successor
//! ```
//! Must never be believed by the supervisor beyond its bounds: a worker may be compromised.

use super::counters::{COUNTER_COUNT, Counter, MAX_OUTPUTS, MAX_PORTS, MAX_RULES};
use crate::sys::shared::OutOfMapping;
use crate::sys::{Mapping, SharedArray, SharedWord, SharedWord64};
use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// "RLYSTAT" and a zero byte.
const MAGIC: u64 = u64::from_le_bytes(*b"RLYSTAT\0");
const RUNGS: usize = 512;
const SENDS: usize = RUNGS + MAX_PORTS * size_of::<RungReport>();
const RULE_SERIALS: usize = 4096;
const _: () = assert!(SENDS + MAX_PORTS * size_of::<SendReport>() <= RULE_SERIALS);
const OUTPUT_SERIALS: usize = RULE_SERIALS + MAX_RULES * 4;
const COUNTERS: usize = OUTPUT_SERIALS + MAX_OUTPUTS * 4;
const ARRAY_LEN: usize = (COUNTER_COUNT * size_of::<Counter>()).next_multiple_of(4096);
/// Bytes of a status segment (sparse: only touched pages take memory).
pub const STATUS_LEN: usize = COUNTERS + 2 * ARRAY_LEN;

/// Being set up.
pub const STATE_BOOT: u32 = 0;
/// Forwarding.
pub const STATE_RUN: u32 = 1;
/// Drained.
pub const STATE_HALT: u32 = 2;
/// Given up.
pub const STATE_FAIL: u32 = 3;

/// Words of [`FrameStats`], in the order of its fields.
const FRAME_WORDS: usize = 11;

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

/// Where the frames are. The places sum to `total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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

/// A mapped status segment.
#[derive(Clone, Debug)]
pub struct StatusPage {
    magic: SharedWord64,
    /// `STATE_*`.
    pub state: SharedWord,
    /// Epoch of the rules in use.
    pub acked_epoch: SharedWord,
    /// Process id.
    pub pid: SharedWord,
    /// Beats.
    pub beat: SharedWord64,
    /// CLOCK_MONOTONIC of the last beat.
    pub beat_ns: SharedWord64,
    /// Turns that took a packet.
    pub turns: SharedWord64,
    /// Packets processed again after a kill, since the segment was made.
    pub replayed: SharedWord64,
    /// Frames taken back from rings that died.
    pub reclaimed: SharedWord64,
    /// Journal states found at the last start: ingress | egress << 8.
    pub recovered: SharedWord,
    /// Counted up before and after the frame words are written.
    frame_sequence: SharedWord,
    frames: SharedArray<u64>,
    /// CPU of the ingress thread, or `u32::MAX`.
    pub cpu: SharedWord,
    /// The rung by port, written at start.
    pub rungs: SharedArray<RungReport>,
    /// Health of sending ports, written by the egress thread.
    pub sends: SharedArray<SendReport>,
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
    /// The page over a mapping of [`STATUS_LEN`] bytes.
    pub fn new(m: &Arc<Mapping>) -> Result<Self, OutOfMapping> {
        Ok(Self {
            magic: SharedWord64::new(m, 0)?,
            state: SharedWord::new(m, 64)?,
            acked_epoch: SharedWord::new(m, 68)?,
            pid: SharedWord::new(m, 72)?,
            recovered: SharedWord::new(m, 76)?,
            beat: SharedWord64::new(m, 128)?,
            beat_ns: SharedWord64::new(m, 136)?,
            turns: SharedWord64::new(m, 144)?,
            replayed: SharedWord64::new(m, 152)?,
            reclaimed: SharedWord64::new(m, 160)?,
            cpu: SharedWord::new(m, 168)?,
            rungs: SharedArray::new(m, RUNGS, MAX_PORTS)?,
            sends: SharedArray::new(m, SENDS, MAX_PORTS)?,
            frame_sequence: SharedWord::new(m, 256)?,
            frames: SharedArray::new(m, 264, FRAME_WORDS)?,
            ingress: SharedArray::new(m, COUNTERS, COUNTER_COUNT)?,
            egress: SharedArray::new(m, COUNTERS + ARRAY_LEN, COUNTER_COUNT)?,
            rule_serials: SharedArray::new(m, RULE_SERIALS, MAX_RULES)?,
            output_serials: SharedArray::new(m, OUTPUT_SERIALS, MAX_OUTPUTS)?,
        })
    }

    /// Marks a fresh segment.
    pub fn initialise(&self) {
        self.cpu.store(u32::MAX, Relaxed);
        self.magic.store(MAGIC, Release);
    }

    /// Whether this is a status segment.
    pub fn is_valid(&self) -> bool {
        self.magic.load(Acquire) == MAGIC
    }

    /// Says where the frames are.
    pub fn set_frames(&self, f: &FrameStats) {
        let words = [f.total, f.free, f.fill, f.rx, f.egress, f.returning, f.tx, f.completion, f.hand, f.kernel, f.lost_invalid];
        self.frame_sequence.fetch_add(1, Release);
        self.frames.set_all(0, &words);
        self.frame_sequence.fetch_add(1, Release);
    }

    /// Where the frames were at the worker's last beat; `None` while it is writing.
    pub fn frames(&self) -> Option<FrameStats> {
        let before = self.frame_sequence.load(Acquire);
        let mut w = [0; FRAME_WORDS];
        self.frames.get_all(0, &mut w);
        let [total, free, fill, rx, egress, returning, tx, completion, hand, kernel, lost_invalid] = w;
        let stable = before.is_multiple_of(2) && before == self.frame_sequence.load(Acquire);
        stable.then_some(FrameStats { total, free, fill, rx, egress, returning, tx, completion, hand, kernel, lost_invalid })
    }
}
