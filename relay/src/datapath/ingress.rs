//! The ingress turn: recycle → refill → receive → process → commit, for each port in turn.
//!
//! A batch moves from a port's receive ring to the egress rings under the journal (journal.rs): nothing another process
//! can see changes before its ring's index is published, and the receive ring's index is stored last. No allocation, no
//! system call but those of the port contract, no log, no lock. Every packet gets exactly one fate per output.
//! The losing design: frames shared by several outputs with a count (DECISIONS §2) saves a memcpy of 1–4 % and costs a
//! shared count that a kill can leave wrong. Outputs of one port that coalesce share a packet without one (bundle.rs).

mod bundle;

pub use bundle::Bundling;
use bundle::{Templates, wanted};

use super::copy::{Fragments, copy, header_of, place_of_copy, restore};
use super::journal::{Armed, EgressMark, Journal, MOVE_RECYCLE, MOVE_REFILL, Move, SAVED_LEN, SavedHeader};
use super::latency::{Stamper, now_ns};
use super::rewrite::{Checked, inspect, rewrite};
use super::table::{OutputPlan, RulePlan, Table};
use super::tally::Tally;
use super::tap::{Original, Tap};
use crate::frame::HeldMap;
use crate::frame::{COALESCE, CONTINUES, FRAME_SIZE, Frame, HEADROOM, MAX_FRAGMENTS, Pool, RawDesc, Umem};
use crate::nic::{BATCH_DESCS, BATCH_LEN, Batch, Fragment, Packet, Receive, TAKEN_DESCS};
use crate::plan::counters::{
    Counter, MAX_PORTS, MAX_RULE_OUTPUTS, output_clock, output_drop, output_tx, port_drop, port_rx, rule_drop, rule_rx,
};
use crate::plan::fate::{DropReason, OutputDropReason};
use crate::ring::{Consumer, Producer};
use crate::sys::{SharedArray, fuse};
use crate::wire::Headers;
use crate::wire::parse::parse_into;
use arrayvec::ArrayVec;
use std::sync::Arc;

/// Frames moved at most by one refill.
const MOVE_LEN: u32 = 256;
/// Frames moved at most by one recycle: all that a batch may have taken. With 256, a rule with 16 outputs found no frame for three
/// of four packets.
const RECYCLE_LEN: u32 = (BATCH_LEN * MAX_RULE_OUTPUTS) as u32;
/// A refill waits until this many frames are missing, so that its journal entry is paid once for many.
const REFILL_FROM: u32 = if cfg!(test) { 4 } else { 32 };

/// A receiving port of this worker.
#[derive(Debug)]
pub struct IngressPort<R> {
    /// The port contract.
    pub receive: R,
    /// Number of the port in the manifest.
    pub number: usize,
    /// Its interface.
    pub ifindex: u32,
}

/// Room and progress of the egress rings during one batch.
#[derive(Debug)]
struct Staging {
    room: [u32; MAX_PORTS],
    staged: [u32; MAX_PORTS],
    published: u64,
}

impl Default for Staging {
    fn default() -> Self {
        Self { room: [0; MAX_PORTS], staged: [0; MAX_PORTS], published: 0 }
    }
}

impl Staging {
    fn room(&self, port: u32) -> u32 {
        self.room.get(port as usize).copied().unwrap_or(0)
    }

    fn is_published(&self, port: u32) -> bool {
        self.published & 1u64.checked_shl(port).unwrap_or(0) != 0
    }
}

/// The ingress side of a worker.
#[derive(Debug)]
pub struct Ingress<R> {
    pub(super) umem: Arc<Umem>,
    pub(super) pool: Pool,
    pub(super) journal: Journal,
    pub(super) ports: Vec<IngressPort<R>>,
    pub(super) egress: Vec<Option<Producer<RawDesc>>>,
    pub(super) returns: Consumer<u64>,
    pub(super) counters: SharedArray<Counter>,
    pub(super) held: HeldMap,
    pub(super) held_by_senders: HeldMap,
    stamps: Vec<Option<Stamper>>,
    bundling: Vec<Option<Bundling>>,
    templates: Templates,
    /// When the batch in hand was taken, ns; 0: by a worker that is dead.
    taken_ns: u64,
    tap: Tap,
    tally: Tally,
    batch: Batch,
    spare: ArrayVec<Frame, BATCH_DESCS>,
    freed: ArrayVec<u32, TAKEN_DESCS>,
    staging: Staging,
    /// Clocks of rate limits that the batch in hand has moved: counter, new time.
    clocks: Vec<(u32, u64)>,
}

/// The parts an [`Ingress`] is made of.
#[derive(Debug)]
pub struct IngressParts<R> {
    /// Packet memory.
    pub umem: Arc<Umem>,
    /// Free frames.
    pub pool: Pool,
    /// Journal of this thread.
    pub journal: Journal,
    /// Receiving ports.
    pub ports: Vec<IngressPort<R>>,
    /// Egress rings by port number.
    pub egress: Vec<Option<Producer<RawDesc>>>,
    /// The return ring.
    pub returns: Consumer<u64>,
    /// The counters this thread writes.
    pub counters: SharedArray<Counter>,
    /// Which frames receiving packet ports hold.
    pub held: HeldMap,
    /// Which frames sending packet ports held when the worker started.
    pub held_by_senders: HeldMap,
    /// What tells the egress side when batches were taken, by port number.
    pub stamps: Vec<Option<Stamper>>,
    /// Whether a port's coalescing half wants bundles, by port number.
    pub bundling: Vec<Option<Bundling>>,
    /// What shows packets to a capture.
    pub tap: Tap,
}

impl<R: Receive> Ingress<R> {
    /// Puts the parts together; [`Ingress::recover`] comes next.
    pub fn new(parts: IngressParts<R>) -> Self {
        let IngressParts { umem, pool, journal, ports, egress, returns, counters, held, held_by_senders, stamps, bundling, tap } = parts;
        Self {
            umem,
            pool,
            journal,
            ports,
            egress,
            returns,
            counters,
            held,
            held_by_senders,
            stamps,
            bundling,
            templates: Templates::default(),
            taken_ns: 0,
            tap,
            tally: Tally::default(),
            batch: Batch::new(),
            spare: ArrayVec::new(),
            freed: ArrayVec::new(),
            staging: Staging::default(),
            clocks: Vec::new(),
        }
    }

    /// The receiving ports.
    pub fn ports(&self) -> &[IngressPort<R>] {
        &self.ports
    }

    /// The receiving ports, for housekeeping.
    pub fn ports_mut(&mut self) -> &mut [IngressPort<R>] {
        &mut self.ports
    }

    /// Whether an egress ring is more than half full: whoever empties it wants for a CPU, or its output stalls.
    pub fn is_pressed(&mut self) -> bool {
        self.egress.iter_mut().flatten().any(|ring| ring.free_for(ring.capacity() / 2) < ring.capacity() / 2)
    }

    /// Free frames.
    pub const fn free_frames(&self) -> u32 {
        self.pool.len()
    }

    /// What is to be captured from the next batch on (plan/tap.rs).
    #[inline]
    pub fn want(&mut self, word: u64) {
        self.tap.want(word);
    }

    /// [`Tap::hold`].
    pub fn hold_tap(&mut self) {
        self.tap.hold();
    }

    /// One turn over all ports. Returns the packets taken. Without `receiving` it only recycles (draining).
    pub fn turn(&mut self, table: &Table, receiving: bool) -> usize {
        self.recycle();
        let mut taken = 0;
        for index in 0..self.ports.len() {
            if receiving {
                self.refill(index, REFILL_FROM);
                taken += self.receive_batch(index, table);
            }
        }
        taken
    }

    /// Ends receiving by the ports whose packets would die with this process, takes what they had received, and takes their
    /// frames back: a planned replacement. Call until it says that nothing is left.
    pub fn wind_up(&mut self, table: &Table) -> bool {
        let mut is_done = true;
        for index in 0..self.ports.len() {
            let Some(port) = self.ports.get_mut(index).filter(|port| !port.receive.survives()) else { continue };
            if port.receive.is_stopped() {
                port.receive.take_back(&mut self.pool);
                continue;
            }
            is_done = false;
            // Refused for the moment: asked again at the next call.
            let _ = port.receive.stop();
            self.receive_batch(index, table);
        }
        is_done
    }

    /// Fills the receive side of every port before the first packet.
    pub fn prime(&mut self) {
        for index in 0..self.ports.len() {
            while self.refill(index, 1) > 0 {}
        }
    }

    /// Return ring → pool.
    pub(super) fn recycle(&mut self) {
        let count = self.returns.available_for(RECYCLE_LEN).min(RECYCLE_LEN);
        if count == 0 {
            return;
        }
        let (from, to) = (self.returns.position(), self.pool.len());
        for offset in 0..count {
            let frame = self.returns.read(offset) / u64::from(FRAME_SIZE);
            if let Ok(frame) = self.umem.claim_index(frame as u32) {
                self.pool.put(frame);
            }
        }
        let to_count = self.pool.len() - to;
        self.journal.begin_move(Move { kind: MOVE_RECYCLE, port: 0, from, from_count: count, to, to_count });
        self.pool.publish();
        self.returns.release(count);
        fuse::stored();
        self.journal.done();
        if to_count < count {
            self.pool.lose(count - to_count);
        }
    }

    /// Pool → a port's free frames, if at least `from` are missing. Returns how many.
    fn refill(&mut self, index: usize, at_least: u32) -> u32 {
        let Some(port) = self.ports.get_mut(index) else { return 0 };
        if port.receive.depth().saturating_sub(port.receive.standing()) < at_least {
            return 0;
        }
        let count = port.receive.stage_refill(&self.umem, &self.pool, MOVE_LEN);
        if count == 0 {
            return 0;
        }
        let (from, to) = (self.pool.len(), port.receive.refill_position());
        self.journal.begin_move(Move { kind: MOVE_REFILL, port: port.number as u32, from, from_count: count, to, to_count: count });
        port.receive.publish_refill(count);
        self.pool.set_len(from - count);
        self.pool.publish();
        self.journal.done();
        count
    }

    fn receive_batch(&mut self, index: usize, table: &Table) -> usize {
        let Some(port) = self.ports.get_mut(index) else { return 0 };
        let most = most_packets(&self.egress, table.widest());
        port.receive.receive(&self.umem, most, &mut self.batch, &mut self.spare);
        if self.batch.is_empty() && self.spare.is_empty() {
            return 0;
        }
        let count = self.batch.len();
        self.taken_ns = now_ns();
        let armed = Armed {
            port: port.number as u32,
            rx_position: port.receive.position(),
            packet_count: count as u32,
            pool_len: self.pool.len(),
            epoch: table.epoch(),
            slot_count: port.receive.taken(),
            now: if table.has_rates() { self.taken_ns << 6 } else { 0 },
            ..Armed::default()
        };
        self.tap.begin();
        // A capture shows packets as they leave: it gets a copy for each output.
        let armed = Armed { bundling: if self.tap.is_live() { 0 } else { wanted(&self.bundling) }, ..armed };
        let armed = self.arm(armed);
        self.process_batch(index, table, None, &armed);
        self.commit(index, armed);
        self.tap.flush();
        count
    }

    /// Saves packets and marks, then arms the journal.
    fn arm(&mut self, armed: Armed) -> Armed {
        let mut desc_count = 0;
        for (number, packet) in self.batch.iter().enumerate() {
            self.journal.save(number, &header_of(&self.umem, packet), packet.hint);
            let last = packet.fragments.len().saturating_sub(1);
            for (piece, fragment) in packet.fragments.iter().enumerate() {
                let options = if piece < last { CONTINUES } else { 0 };
                let addr = fragment.frame.base() + u64::from(fragment.offset);
                self.journal.save_desc(desc_count, RawDesc { addr, len: fragment.len, options });
                desc_count += 1;
            }
        }
        for (number, frame) in self.spare.iter().enumerate() {
            self.journal.save_desc(desc_count + number, RawDesc { addr: frame.base(), ..RawDesc::default() });
        }
        let armed = Armed { desc_count: desc_count as u32, spare_count: self.spare.len() as u32, ..armed };
        self.staging.published = 0;
        for (port, ring) in self.egress.iter_mut().enumerate() {
            let Some(ring) = ring else { continue };
            // All there is, not what was known to be free: a batch for many outputs needs more than any fixed number.
            let room = ring.free_for(ring.capacity());
            let mark = EgressMark { position: ring.position(), room };
            self.journal.mark(port, mark);
            set(&mut self.staging.room, port, mark.room);
            set(&mut self.staging.staged, port, 0);
        }
        self.journal.arm(armed);
        armed
    }

    /// Rebuilds the room of a batch that a dead worker had armed. Rings whose index has moved are not written again.
    pub(super) fn rearm(&mut self) {
        self.staging = Staging::default();
        for (port, ring) in self.egress.iter().enumerate() {
            let Some(ring) = ring else { continue };
            let mark = self.journal.marked(port);
            set(&mut self.staging.room, port, mark.room);
            if ring.position() != mark.position {
                self.staging.published |= 1 << port;
            }
        }
    }

    /// Makes the batch that a dead worker had armed once more: its frames are still what they were, whatever became of the
    /// ring they came by. Numbers out of range, and pieces that no packet has, would mean a corrupted segment and are left out.
    pub(super) fn take_again(&mut self, armed: &Armed) {
        let pieces = (0..armed.desc_count as usize).map(|at| self.journal.desc(at));
        let mut fragments = Fragments::new();
        for desc in pieces {
            let Ok((frame, offset)) = self.umem.claim(desc) else { continue };
            let _ = fragments.try_push(Fragment { frame, offset, len: desc.len });
            if desc.options & CONTINUES == 0 && !self.batch.is_full() {
                let packet = Packet { fragments: std::mem::take(&mut fragments), hint: self.journal.hint(self.batch.len()) };
                let _ = self.batch.try_push(packet);
            }
        }
        for at in 0..armed.spare_count {
            let desc = self.journal.desc((armed.desc_count + at) as usize);
            let _ = self.umem.claim(desc).map(|(frame, _)| self.spare.try_push(frame));
        }
    }

    /// Gives every packet its fate. `poison`: bits of packets to drop unprocessed, on a replay only. The time by which rates are
    /// limited, and what is bundled, are the armed batch's, so that a replay decides the same.
    pub(super) fn process_batch(&mut self, index: usize, table: &Table, poison: Option<u64>, armed: &Armed) {
        let Some(port) = self.ports.get(index) else { return };
        let (number, ifindex) = (port.number, port.ifindex);
        self.tally.clear();
        self.freed.clear();
        self.freed.extend(self.spare.drain(..).map(Frame::into_index));
        self.clocks.clear();
        let Self { umem, pool, journal, egress, tally, tap, batch, freed, staging, counters, clocks, templates, .. } = self;
        for (at, packet) in batch.iter_mut().enumerate() {
            journal.at(at);
            let skip = poison.is_some_and(|bits| bits & 1u64.checked_shl(at as u32).unwrap_or(0) != 0);
            let Armed { now, bundling, epoch, .. } = *armed;
            let replay = poison.is_some();
            let mut hand = Hand { umem, pool, egress, staging, tally, tap, replay, now, bundling, epoch, templates, counters, clocks };
            let saved = journal.saved(at);
            if !skip {
                fuse::reached(&saved);
            }
            hand.packet(table, (number, ifindex), packet, &saved, skip);
            freed.extend(packet.fragments.drain(..).map(|fragment| fragment.frame.into_index()));
        }
        batch.clear();
    }

    /// Publishes the egress rings, then everything else, the receive ring last.
    pub(super) fn commit(&mut self, index: usize, armed: Armed) {
        for (port, ring) in self.egress.iter_mut().enumerate() {
            let staged = self.staging.staged.get(port).copied().unwrap_or(0);
            if let Some(ring) = ring
                && staged > 0
                && !self.staging.is_published(port as u32)
            {
                ring.publish(staged);
                fuse::stored();
                if self.taken_ns > 0
                    && let Some(Some(stamper)) = self.stamps.get_mut(port)
                {
                    stamper.note(self.taken_ns, ring.position(), staged);
                }
            }
        }
        let armed = Armed { pool_after: self.pool.len(), ..armed };
        self.journal.begin_commit(armed, &self.freed, self.tally.entries());
        self.finish(index, &armed);
    }

    /// COMMIT to its end.
    pub(super) fn finish(&mut self, index: usize, armed: &Armed) {
        if self.ports.get(index).is_some_and(|port| !port.receive.survives()) {
            for at in 0..armed.desc_count + armed.spare_count {
                self.held.clear((self.journal.desc(at as usize).addr / u64::from(FRAME_SIZE)) as u32);
            }
        }
        let umem = &self.umem;
        self.journal.commit(&mut self.pool, &self.counters, |pool, frame| {
            if let Ok(frame) = umem.claim_index(frame) {
                pool.put(frame);
            }
        });
        if let Some(port) = self.ports.get_mut(index) {
            port.receive.release();
        }
        self.journal.done();
    }
}

/// Packets of a batch at most, so that an empty egress ring has room for all of them when a rule has `widest` outputs.
fn most_packets(egress: &[Option<Producer<RawDesc>>], widest: usize) -> usize {
    let room = egress.iter().flatten().map(|ring| ring.capacity() as usize).min().unwrap_or(usize::MAX);
    (room / widest.max(1)).clamp(1, BATCH_LEN)
}

fn set(array: &mut [u32; MAX_PORTS], at: usize, value: u32) {
    if let Some(entry) = array.get_mut(at) {
        *entry = value;
    }
}

/// What one packet's processing may touch.
struct Hand<'a> {
    umem: &'a Umem,
    pool: &'a mut Pool,
    egress: &'a mut [Option<Producer<RawDesc>>],
    staging: &'a mut Staging,
    tally: &'a mut Tally,
    tap: &'a mut Tap,
    /// A dead worker had this batch in hand: some of its rings may be published.
    replay: bool,
    /// CLOCK_MONOTONIC in 1/64 ns, for rate limits.
    now: u64,
    /// Ports (bits) that take bundles, by rules of this epoch.
    bundling: u64,
    epoch: u32,
    templates: &'a mut Templates,
    counters: &'a SharedArray<Counter>,
    clocks: &'a mut Vec<(u32, u64)>,
}

/// What a rate limit lets through at once after a silence, in 1/64 ns: 10 ms of its rate.
const RATE_BURST: u64 = 10_000_000 << 6;

fn original<'a>(umem: &'a Umem, head: &'a [u8], fragments: &'a Fragments, len: u64) -> Original<'a> {
    Original { umem, head, fragments, len }
}

/// A packet whose headers are known.
struct Parsed<'a> {
    headers: &'a Headers,
    checked: Checked,
    /// The original header bytes, cut to the packet.
    head: &'a [u8],
    /// Bytes of the whole packet.
    len: u64,
}

impl Hand<'_> {
    /// Gives one packet its fate at every output; what no output took in place stays in its fragments. (These are never moved as a
    /// whole: 76 bytes, written one by one and read 16 at a time right after, were a tenth of the time at 1:1.)
    fn packet(&mut self, table: &Table, (port, ifindex): (usize, u32), packet: &mut Packet, saved: &SavedHeader, skip: bool) {
        let len: u64 = packet.fragments.iter().map(|fragment| u64::from(fragment.len)).sum();
        self.tally.add(port_rx(port), len);
        let first_len = packet.fragments.first().map_or(0, |first| first.len) as usize;
        let head = saved.get(..first_len.min(SAVED_LEN)).unwrap_or_default();
        let mut headers = Headers::default();
        let found = if skip { Err(DropReason::Poison) } else { find(table, ifindex, packet, head, len, &mut headers) };
        let rule = match found {
            Ok(rule) => rule,
            Err(reason) => {
                self.tally.add(port_drop(port, reason), len);
                self.tap.refuse(port, &original(self.umem, head, &packet.fragments, len), reason);
                return;
            }
        };
        self.tally.add(rule_rx(rule.slot as usize), len);
        self.tap.arrive(port, rule, &original(self.umem, head, &packet.fragments, len));
        let checked = if table.is_own_source(ifindex, &headers.src) {
            Err(DropReason::OwnSource)
        } else {
            self.inspect(&headers, head, &packet.fragments)
        };
        match checked {
            Ok(checked) => self.fan_out(rule, &Parsed { headers: &headers, checked, head, len }, &mut packet.fragments),
            Err(reason) => {
                self.tally.add(rule_drop(rule.slot as usize, reason), len);
                self.tap.leave(&original(self.umem, head, &packet.fragments, len), Err(reason));
            }
        }
    }

    fn inspect(&self, headers: &Headers, head: &[u8], fragments: &Fragments) -> Result<Checked, DropReason> {
        let mut pieces: ArrayVec<&[u8], { MAX_FRAGMENTS + 1 }> = ArrayVec::new();
        pieces.push(head);
        for (index, fragment) in fragments.iter().enumerate() {
            let skip = if index == 0 { head.len() as u32 } else { 0 };
            pieces.push(self.umem.bytes(&fragment.frame, fragment.offset + skip, fragment.len - skip));
        }
        inspect(headers, &pieces)
    }

    /// Every output but the last gets a copy, the last the packet itself; those that are bundled are one output.
    fn fan_out(&mut self, rule: &RulePlan, parsed: &Parsed<'_>, fragments: &mut Fragments) {
        let Some((last, others)) = rule.outputs.split_last() else { return };
        let together = self.together(rule, parsed, fragments);
        for (_, output) in others.iter().enumerate().filter(|(number, _)| together >> number & 1 == 0) {
            let sent = self.admit(output, fragments.len()).and_then(|()| self.copy_out(output, parsed, fragments));
            self.count(output, parsed, fragments, sent);
        }
        if together != 0 && self.bundle_out(rule, parsed, fragments) {
            return;
        }
        let published = self.staging.is_published(last.port);
        if self.replay && !published {
            restore(self.umem, fragments, parsed.head);
        }
        let sent = self.admit(last, fragments.len()).and_then(|()| self.send_in_place(last, parsed, fragments, published));
        self.count(last, parsed, fragments, sent);
        self.tap.leave(&original(self.umem, parsed.head, fragments, parsed.len), Ok(()));
    }

    fn count(&mut self, output: &OutputPlan, parsed: &Parsed<'_>, fragments: &Fragments, sent: Result<(), OutputDropReason>) {
        let slot = output.slot as usize;
        self.tally.add(sent.map_or_else(|reason| output_drop(slot, reason), |()| output_tx(slot)), parsed.len);
        self.tap.asked(&original(self.umem, parsed.head, fragments, parsed.len), sent);
    }

    fn admit(&mut self, output: &OutputPlan, fragment_count: usize) -> Result<(), OutputDropReason> {
        match output.blocked {
            Some(reason) => Err(reason),
            None if (self.staging.room(output.port) as usize) < fragment_count => match self.egress.get(output.port as usize) {
                Some(Some(_)) => Err(OutputDropReason::EgressFull),
                // The port was taken away after these rules were written.
                _ => Err(OutputDropReason::OutputDown),
            },
            None if output.gap != 0 && !self.is_due(output) => Err(OutputDropReason::RateLimited),
            None => Ok(()),
        }
    }

    /// The generic cell rate algorithm: a packet is due unless the clock is ahead by more than the burst; it moves the clock by
    /// one gap. The clock is a counter, moved by the tally, so that a kill moves it once or not at all.
    fn is_due(&mut self, output: &OutputPlan) -> bool {
        let clock = output_clock(output.slot as usize);
        let moved = self.clocks.iter_mut().rev().find(|(moved, _)| *moved == clock);
        let due = moved.as_ref().map_or_else(|| self.counters.get(clock as usize).bytes, |(_, due)| *due);
        if due > self.now.saturating_add(RATE_BURST) {
            return false;
        }
        let next = due.max(self.now).saturating_add(output.gap);
        match moved {
            Some((_, due)) => *due = next,
            None => self.clocks.push((clock, next)),
        }
        self.tally.add(clock, next - due);
        true
    }

    fn copy_out(&mut self, output: &OutputPlan, parsed: &Parsed<'_>, fragments: &Fragments) -> Result<(), OutputDropReason> {
        if (self.pool.len() as usize) < fragments.len() {
            return Err(OutputDropReason::NoFrame);
        }
        if self.replay {
            // The frames of a copy that does not fit are the next copy's, which may be published.
            verdict(output, parsed)?;
        }
        let mut copies = Fragments::new();
        // On a replay the copies may be in the published ring, or with the kernel already: the same frames, not written again.
        let published = self.staging.is_published(output.port);
        for (index, fragment) in fragments.iter().enumerate() {
            let head = if index == 0 { parsed.head } else { &[] };
            let Some(copy) = self.duplicate(fragment, head, published) else { break };
            copies.push(copy);
        }
        let fits = if published { Ok(()) } else { self.edit(output, parsed, &mut copies) };
        match fits {
            Ok(()) => {
                self.tap.sent(self.umem, output, &copies);
                self.stage(output, 0, &mut copies);
                Ok(())
            }
            Err(reason) => {
                // Back in reverse order: the pool's elements stay as they were, which a replay relies on.
                for fragment in copies.into_iter().rev() {
                    self.pool.put(fragment.frame);
                }
                Err(reason)
            }
        }
    }

    /// A copy of a piece whose first bytes are `head`; of one that is published, the frame alone.
    fn duplicate(&mut self, fragment: &Fragment, head: &[u8], published: bool) -> Option<Fragment> {
        let mut frame = self.pool.take(self.umem)?;
        let offset = place_of_copy(&frame, fragment.len);
        if !published {
            copy(self.umem, fragment, head, &mut frame, offset);
        }
        Some(Fragment { frame, offset, len: fragment.len })
    }

    fn send_in_place(
        &mut self,
        output: &OutputPlan,
        parsed: &Parsed<'_>,
        fragments: &mut Fragments,
        published: bool,
    ) -> Result<(), OutputDropReason> {
        if published {
            // The dead worker has published this ring: where the packet got in, its frames are the ring's already.
            let fits = verdict(output, parsed);
            if fits.is_ok() {
                self.stage(output, 0, fragments);
            }
            return fits;
        }
        self.edit(output, parsed, fragments)?;
        self.tap.sent(self.umem, output, fragments);
        self.stage(output, 0, fragments);
        Ok(())
    }

    fn edit(&self, output: &OutputPlan, parsed: &Parsed<'_>, fragments: &mut Fragments) -> Result<(), OutputDropReason> {
        let Some(Fragment { frame, offset, len }) = fragments.first_mut() else { return Ok(()) };
        let bytes = self.umem.bytes_mut(frame, 0, FRAME_SIZE);
        rewrite(bytes, offset, len, parsed.headers, parsed.checked, &output.edit)
    }

    /// Writes the descriptors, the first with `first_flags` too; the tokens end here, the frames are the egress ring's.
    fn stage(&mut self, output: &OutputPlan, first_flags: u32, fragments: &mut Fragments) {
        let port = output.port as usize;
        let skip = self.staging.is_published(output.port);
        let (Some(staged), Some(room)) = (self.staging.staged.get_mut(port), self.staging.room.get_mut(port)) else { return };
        let last = fragments.len().saturating_sub(1);
        for (index, Fragment { frame, offset, len }) in fragments.drain(..).enumerate() {
            let flags = if output.coalesce { COALESCE } else { 0 } | if index < last { CONTINUES } else { 0 };
            let options = RawDesc::options(output.slot, flags | if index == 0 { first_flags } else { 0 });
            let desc = RawDesc { addr: frame.base() + u64::from(offset), len, options };
            if let (Some(Some(ring)), false) = (self.egress.get_mut(port), skip) {
                ring.write(*staged, desc);
            }
            *staged += 1;
            *room -= 1;
            frame.into_index();
        }
    }
}

/// The verdict of a rewrite without touching the packet (its frame may be the kernel's by now).
fn verdict(output: &OutputPlan, parsed: &Parsed<'_>) -> Result<(), OutputDropReason> {
    let mut scratch = [0u8; SAVED_LEN + HEADROOM as usize];
    let start = HEADROOM as usize;
    if let Some(to) = scratch.get_mut(start..start + parsed.head.len()) {
        to.copy_from_slice(parsed.head);
    }
    let (mut offset, mut len) = (HEADROOM, parsed.head.len() as u32);
    rewrite(&mut scratch, &mut offset, &mut len, parsed.headers, parsed.checked, &output.edit)
}

fn find<'t>(
    table: &'t Table,
    ifindex: u32,
    packet: &Packet,
    head: &[u8],
    len: u64,
    headers: &mut Headers,
) -> Result<&'t RulePlan, DropReason> {
    // Headers must lie in the saved bytes; what is said about the rest follows from the lengths.
    parse_into(head, len as usize, headers).map_err(|_| DropReason::Malformed)?;
    match packet.hint.rule {
        Some(hint) => table.hinted(hint, ifindex, headers).ok_or(DropReason::RuleGone),
        None => table.find(ifindex, headers).ok_or(DropReason::NoRule),
    }
}
