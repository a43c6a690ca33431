//! Frames that stood in rings of interfaces that are gone: into the pool, once.
//!
//! The kernel lets nobody map the rings of an unbound socket, so the supervisor, which had them mapped before, says in the
//! manifest which frames were in them; our own egress ring of the port is read here. Must never run twice for one burial: a
//! word in the work segment says which was the last.

use super::port::{AnyReceive, AnyTransmit};
use crate::datapath::egress::Egress;
use crate::datapath::ingress::Ingress;
use crate::frame::{FRAME_SIZE, RawDesc};
use crate::plan::manifest::{Manifest, PortKind};
use crate::plan::work::{BURIED_AT, WorkLayout};
use crate::ring::{Consumer, Memory, RingError};
use crate::sys::shared::OutOfMapping;
use crate::sys::{Mapping, SharedWord};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

/// What is left of ports whose interface is missing.
pub struct Orphans {
    frames: HashSet<u32>,
    serial: u32,
    buried: SharedWord,
    absent: Vec<usize>,
    rings: Vec<Consumer<RawDesc>>,
}

/// Why the orphans can't be told.
#[derive(Debug, thiserror::Error)]
pub enum OrphansError {
    /// Outside the segment.
    #[error(transparent)]
    Layout(#[from] OutOfMapping),
    /// An egress ring is corrupt.
    #[error(transparent)]
    Ring(#[from] RingError),
}

impl Orphans {
    /// Reads the manifest; changes nothing.
    pub fn new(work: &Arc<Mapping>, layout: &WorkLayout, manifest: &Manifest) -> Result<Self, OrphansError> {
        let buried = SharedWord::new(work, BURIED_AT)?;
        let absent: Vec<usize> =
            manifest.ports.iter().enumerate().filter(|(_, port)| port.kind == PortKind::Absent).map(|(number, _)| number).collect();
        let ring = |number: &usize| {
            let memory: Arc<dyn Memory> = Arc::<Mapping>::clone(work);
            Consumer::attach(memory, layout.egress_ring(*number))
        };
        let rings = absent.iter().map(ring).collect::<Result<_, _>>()?;
        let is_new = manifest.orphans.serial != buried.load(Acquire);
        let words = manifest.orphans.frames.iter().enumerate().filter(|_| is_new);
        let frames = words.flat_map(|(word, bits)| (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word as u32 * 64 + bit));
        Ok(Self { frames: frames.collect(), serial: manifest.orphans.serial, buried, absent, rings })
    }

    /// But for these.
    #[must_use]
    pub fn without(mut self, in_hand: &HashSet<u32>) -> Self {
        self.frames.retain(|frame| !in_hand.contains(frame));
        self
    }

    /// Takes the frames back. Returns how many.
    pub fn bury(mut self, ingress: &mut Ingress<AnyReceive>, egress: &mut Egress<AnyTransmit>) -> u32 {
        for ring in &mut self.rings {
            let count = ring.available_for(ring.capacity());
            self.frames.extend((0..count).map(|offset| (ring.read(offset).addr / u64::from(FRAME_SIZE)) as u32));
        }
        let count = ingress.bury(&self.frames, &egress.standing_frames(), |number| self.absent.contains(&number));
        for ring in &mut self.rings {
            let count = ring.available_for(ring.capacity());
            ring.release(count);
        }
        self.buried.store(self.serial, Release);
        count
    }
}
