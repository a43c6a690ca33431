//! Where a worker's frames are: one look at every index, and the sum that must be the size of the UMEM (invariant 1).
//!
//! Only reads. Under traffic the look is repeated until no user-owned index moved meanwhile; then the sum is exact.

use crate::nic::afxdp::ledger::{PortFrames, PortLedger};
use crate::nic::afxdp::port::RingIndices;
use crate::plan::status::FrameStats;
use crate::plan::work::WorkLayout;
use crate::ring::cursor::filled;
use crate::sys::shared::OutOfMapping;
use crate::sys::{Mapping, SharedArray, SharedWord};
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

/// Looks at most before giving up for this time.
const LOOKS: usize = 64;

/// The places of one worker's frames.
#[derive(Debug)]
pub struct Ledger {
    total: u32,
    pool: SharedWord,
    lost: SharedWord,
    rings: Vec<[SharedWord; 2]>,
    returns: [SharedWord; 2],
    ports: Vec<PortLedger>,
    held: [SharedArray<u8>; 2],
}

#[derive(Clone, PartialEq, Eq)]
struct Look {
    pool: u32,
    egress: u32,
    returning: u32,
    users: Vec<u32>,
}

impl Ledger {
    /// The ledger over a work segment and the AF_XDP ports.
    pub fn new(work: &Arc<Mapping>, layout: &WorkLayout, total: u32, ports: Vec<PortLedger>) -> Result<Self, OutOfMapping> {
        let words = |at: usize| -> Result<[SharedWord; 2], OutOfMapping> {
            Ok([
                SharedWord::new(work, at + crate::ring::layout::PRODUCER_AT)?,
                SharedWord::new(work, at + crate::ring::layout::CONSUMER_AT)?,
            ])
        };
        let rings = (0..crate::plan::counters::MAX_PORTS).map(|port| words(layout.egress_ring(port))).collect::<Result<_, _>>()?;
        let maps = [layout.held, layout.held_by_senders(total)].map(|at| SharedArray::new(work, at, total as usize));
        let [receivers, senders] = maps;
        let held = [receivers?, senders?];
        let lost = SharedWord::new(work, layout.pool + crate::frame::pool::LOST_AT)?;
        Ok(Self { total, pool: SharedWord::new(work, layout.pool)?, lost, rings, returns: words(layout.return_ring)?, ports, held })
    }

    fn look(&self) -> (Look, Vec<[RingIndices; 2]>) {
        let depth = |[producer, consumer]: &[SharedWord; 2]| filled(producer.load(Acquire), consumer.load(Acquire));
        let indices: Vec<[RingIndices; 2]> = self.ports.iter().map(PortLedger::indices).collect();
        let users = indices.iter().flatten().flat_map(|i| [i.user, i.back_user]).collect();
        let egress = self.rings.iter().map(depth).fold(0, u32::saturating_add);
        (Look { pool: self.pool.load(Acquire), egress, returning: depth(&self.returns), users }, indices)
    }

    /// The frames by place; `None` where everything moved at every look.
    pub fn read(&self) -> Option<FrameStats> {
        let mut last = self.look();
        for _ in 0..LOOKS {
            let now = self.look();
            if now.0 == last.0 {
                return Some(self.stats(&now.0, &now.1));
            }
            last = now;
        }
        None
    }

    fn stats(&self, look: &Look, indices: &[[RingIndices; 2]]) -> FrameStats {
        let mut sum = PortFrames::default();
        for port in indices.iter().map(|indices| PortLedger::places(*indices)) {
            sum.fill = sum.fill.saturating_add(port.fill);
            sum.rx = sum.rx.saturating_add(port.rx);
            sum.tx = sum.tx.saturating_add(port.tx);
            sum.completion = sum.completion.saturating_add(port.completion);
            sum.kernel = sum.kernel.saturating_add(port.kernel);
        }
        let count = |map: &SharedArray<u8>| (0..map.len()).filter(|frame| map.get(*frame) != 0).count() as u32;
        let [receivers, senders] = &self.held;
        sum.fill = sum.fill.saturating_add(count(receivers));
        sum.kernel = sum.kernel.saturating_add(count(senders));
        let lost = self.lost.load(Acquire);
        // Whatever a worker has written there: no sum of it may overflow.
        let places = [look.pool, sum.fill, sum.rx, look.egress, look.returning, sum.tx, sum.completion, sum.kernel, lost];
        let placed = places.into_iter().fold(0, u32::saturating_add);
        FrameStats {
            total: u64::from(self.total),
            free: u64::from(look.pool),
            fill: u64::from(sum.fill),
            rx: u64::from(sum.rx),
            egress: u64::from(look.egress),
            returning: u64::from(look.returning),
            tx: u64::from(sum.tx),
            completion: u64::from(sum.completion),
            hand: u64::from(self.total.saturating_sub(placed)),
            kernel: u64::from(sum.kernel),
            lost_invalid: u64::from(lost),
        }
    }
}
