//! The tap of an ingress thread: shows the packets of a batch to whoever captures them.
//!
//! What it costs while nobody captures: one relaxed load a turn (of the word beside the epoch, a line that the turn has read
//! anyway), a comparison with the word before, and per packet and output a branch on a flag of this thread's own, always the
//! same way. No line is shared but for reading, no clock is read.
//!
//! While somebody captures, records are gathered in private memory as packets get their fates, and written to the tap ring
//! after the batch is committed: the journal never sees them, a kill in between loses the batch's records and nothing else, and a
//! replayed batch shows none (its frames may be the kernel's by then). Copying is limited in time ([`Budget`]): above that,
//! whole packets are left out and counted. Must never wait, allocate, or touch anything that forwarding reads.

use super::table::{OutputPlan, RulePlan};
use crate::frame::Umem;
use crate::nic::Fragment;
use crate::plan::fate::{DropReason, OutputDropReason};
use crate::plan::tap::{Fate, HEAD_LEN, Point, Sight, TapWriter, Wanted, record_chunks, record_len};

/// Private memory for the records of a batch. Address space: pages are touched when something is captured.
const GATHER_LEN: usize = 1 << 20;
/// What a chunk of the ring is taken to cost, ns: half a million a second. Writing one takes some 40 ns (perf, unoptimised
/// build), so capturing has about 2 % of a CPU at most.
const CHUNK_NS: u64 = 2_000;
/// How far copying may run ahead: half a ring, which is 5,000 short packets in a burst, in and out.
const BURST_NS: u64 = 32_768 * CHUNK_NS;

/// A packet as it came.
#[derive(Clone, Copy, Debug)]
pub struct Original<'a> {
    /// Where its frames are.
    pub umem: &'a Umem,
    /// Its first bytes, which in the frame may have been rewritten.
    pub head: &'a [u8],
    /// Its pieces.
    pub fragments: &'a [Fragment],
    /// All its bytes.
    pub len: u64,
}

/// The generic cell rate algorithm over chunks, with time as a parameter.
#[derive(Clone, Copy, Debug, Default)]
struct Budget {
    due: u64,
}

impl Budget {
    /// A clock that was set back leaves a debt of one burst, not of the step.
    fn is_open(&mut self, now: u64) -> bool {
        self.due = self.due.min(now.saturating_add(2 * BURST_NS));
        self.due <= now.saturating_add(BURST_NS)
    }

    fn spend(&mut self, chunks: u64, now: u64) {
        self.due = self.due.max(now).saturating_add(chunks * CHUNK_NS);
    }
}

/// The packet in hand, if it is shown.
#[derive(Clone, Copy, Debug)]
struct InHand {
    sight: Sight,
    /// Where its ingress record starts, if that is wanted.
    record: Option<usize>,
    outputs: u16,
    sent: u8,
}

/// See the file's header. Without a ring it shows nothing.
#[derive(Debug, Default)]
pub struct Tap {
    ring: Option<TapWriter>,
    word: u64,
    wanted: Wanted,
    /// A batch is in hand of which something is wanted.
    is_live: bool,
    now: u64,
    budget: Budget,
    packet: u64,
    in_hand: Option<InHand>,
    gathered: Vec<u8>,
    missed: u32,
}

/// CLOCK_REALTIME, ns (no system call: the kernel maps its clock into the process).
fn now() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).map_or(std::time::Duration::ZERO, std::time::Duration::from);
    now.as_nanos() as u64
}

impl Tap {
    /// A tap that writes to `ring`. Packets are numbered from the time on, so that no two processes give out one number.
    pub fn new(ring: TapWriter) -> Self {
        Self { ring: Some(ring), packet: now(), gathered: Vec::with_capacity(GATHER_LEN), ..Self::default() }
    }

    /// Takes the ring's lock, if that is still a dead predecessor's ([`TapWriter::hold`]).
    pub fn hold(&mut self) {
        self.ring.iter_mut().for_each(TapWriter::hold);
    }

    /// What is wanted from now on ([`Wanted`] as a word).
    #[inline]
    pub fn want(&mut self, word: u64) {
        if word != self.word {
            self.word = word;
            self.wanted = if self.ring.is_some() { Wanted::from_word(word) } else { Wanted::default() };
        }
    }

    /// A batch comes. Without this call (a replay) nothing is shown.
    #[inline]
    pub fn begin(&mut self) {
        if !self.wanted.is_nothing() {
            self.now = now();
            self.is_live = true;
        }
    }

    /// Whether anything of the batch in hand is shown.
    #[inline]
    pub const fn is_live(&self) -> bool {
        self.is_live
    }

    /// The batch is committed: its records go out.
    #[inline]
    pub fn flush(&mut self) {
        if self.is_live {
            self.write();
        }
    }

    #[cold]
    fn write(&mut self) {
        self.is_live = false;
        let Some(ring) = &mut self.ring else { return };
        let mut rest = self.gathered.as_slice();
        while let Some((record, others)) = record_len(rest).and_then(|len| rest.split_at_checked(len)) {
            ring.send(record);
            rest = others;
        }
        (0..std::mem::take(&mut self.missed)).for_each(|_| ring.count_missed());
        self.gathered.clear();
    }

    /// A packet of a rule has come by a port.
    #[inline]
    pub fn arrive(&mut self, port: usize, rule: &RulePlan, original: &Original<'_>) {
        if self.is_live {
            self.open(port, Some(rule), original);
        }
    }

    /// A packet has come that no rule takes.
    #[inline]
    pub fn refuse(&mut self, port: usize, original: &Original<'_>, reason: DropReason) {
        if self.is_live {
            self.open(port, None, original);
            self.close(original, Err(reason));
        }
    }

    /// All outputs of the packet in hand have been asked, or none will be.
    #[inline]
    pub fn leave(&mut self, original: &Original<'_>, outcome: Result<(), DropReason>) {
        if self.is_live {
            self.close(original, outcome);
        }
    }

    /// The next output gets the packet in hand, as it is in these pieces.
    #[inline]
    pub fn sent(&mut self, umem: &Umem, output: &OutputPlan, fragments: &[Fragment]) {
        if self.is_live {
            self.show_sent(umem, output, fragments);
        }
    }

    /// An output has been asked; where it does not get the packet in hand, why not.
    #[inline]
    pub fn asked(&mut self, original: &Original<'_>, outcome: Result<(), OutputDropReason>) {
        if self.is_live {
            self.show_asked(original, outcome);
        }
    }

    #[cold]
    fn open(&mut self, port: usize, rule: Option<&RulePlan>, original: &Original<'_>) {
        self.in_hand = None;
        if !self.wanted.takes(rule.map(|rule| rule.slot)) {
            return;
        }
        if !self.budget.is_open(self.now) {
            self.missed += 1;
            return;
        }
        self.packet = self.packet.wrapping_add(1);
        let fate = Fate::Forwarded { sent: 0, of: rule.map_or(0, |rule| rule.outputs.len() as u8) };
        let rule = rule.map(|rule| (rule.slot, rule.serial));
        let (at_ns, packet, len) = (self.now, self.packet, original.len as u32);
        let sight = Sight { at_ns, packet, rule, len, port: port as u16, point: Point::Ingress, fate };
        let wanted = self.wanted.at(Point::Ingress);
        let record = if wanted { self.gather(&sight, original.umem, original.head, original.fragments) } else { None };
        self.in_hand = Some(InHand { sight, record, outputs: 0, sent: 0 });
    }

    #[cold]
    fn close(&mut self, original: &Original<'_>, outcome: Result<(), DropReason>) {
        let Some(InHand { sight, record, sent, .. }) = self.in_hand.take() else { return };
        let fate = match (outcome, sight.fate) {
            (Err(reason), _) => Fate::Dropped(reason),
            (Ok(()), Fate::Forwarded { of, .. }) => Fate::Forwarded { sent, of },
            (Ok(()), other) => other,
        };
        if let Some(at) = record {
            self.rewrite_head(at, &Sight { fate, ..sight });
        }
        if outcome.is_err() && self.wanted.at(Point::Drop) {
            self.gather(&Sight { point: Point::Drop, fate, ..sight }, original.umem, original.head, original.fragments);
        }
    }

    #[cold]
    fn show_sent(&mut self, umem: &Umem, output: &OutputPlan, fragments: &[Fragment]) {
        let Some(hand) = &self.in_hand else { return };
        let (sight, number) = (hand.sight, hand.outputs);
        if self.wanted.at(Point::Egress) {
            let len = fragments.iter().map(|fragment| fragment.len).sum();
            let fate = Fate::Sent { output: number };
            self.gather(&Sight { len, port: output.port as u16, point: Point::Egress, fate, ..sight }, umem, &[], fragments);
        }
    }

    #[cold]
    fn show_asked(&mut self, original: &Original<'_>, outcome: Result<(), OutputDropReason>) {
        let Some(hand) = &mut self.in_hand else { return };
        let (sight, output) = (hand.sight, hand.outputs);
        hand.outputs += 1;
        match outcome {
            Ok(()) => hand.sent = hand.sent.saturating_add(1),
            Err(reason) if self.wanted.at(Point::Drop) => {
                let sight = Sight { point: Point::Drop, fate: Fate::OutputDropped { output, reason }, ..sight };
                self.gather(&sight, original.umem, original.head, original.fragments);
            }
            Err(_) => {}
        }
    }

    /// Adds a record; says where it starts, or counts it as missed where there is no room.
    fn gather(&mut self, sight: &Sight, umem: &Umem, head: &[u8], fragments: &[Fragment]) -> Option<usize> {
        let snaplen = self.wanted.snaplen().min(sight.len as usize);
        let start = self.gathered.len();
        if start + HEAD_LEN + snaplen > self.gathered.capacity() {
            self.missed += 1;
            return None;
        }
        self.gathered.resize(start + HEAD_LEN, 0);
        self.take(head, snaplen);
        let mut skip = head.len() as u32;
        for fragment in fragments {
            let bytes = umem.bytes(&fragment.frame, fragment.offset + skip.min(fragment.len), fragment.len.saturating_sub(skip));
            self.take(bytes, (snaplen + HEAD_LEN + start).saturating_sub(self.gathered.len()));
            skip = skip.saturating_sub(fragment.len);
        }
        let captured = self.gathered.len() - start - HEAD_LEN;
        self.budget.spend(record_chunks(captured), self.now);
        self.write_head(start, sight, captured);
        Some(start)
    }

    fn take(&mut self, bytes: &[u8], limit: usize) {
        self.gathered.extend_from_slice(bytes.get(..limit).unwrap_or(bytes));
    }

    fn rewrite_head(&mut self, at: usize, sight: &Sight) {
        let len = self.gathered.get(at..).and_then(record_len);
        if let Some(len) = len {
            self.write_head(at, sight, len - HEAD_LEN);
        }
    }

    fn write_head(&mut self, at: usize, sight: &Sight, captured: usize) {
        if let Some(place) = self.gathered.get_mut(at..at + HEAD_LEN) {
            place.copy_from_slice(bytemuck::bytes_of(&sight.head(captured)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `count` records of two chunks are taken, one every `gap` ns from `start` on.
    fn taken(budget: &mut Budget, start: u64, count: u64, gap: u64) -> u64 {
        let admit = |at: u64| {
            let now = start + at * gap;
            let is_open = budget.is_open(now);
            if is_open {
                budget.spend(2, now);
            }
            u64::from(is_open)
        };
        (0..count).map(admit).sum()
    }

    #[test]
    fn the_budget_takes_a_burst_and_then_its_rate() {
        let (mut budget, start) = (Budget::default(), 1_000_000_000_000);
        let burst = BURST_NS / CHUNK_NS / 2;
        assert_eq!(taken(&mut budget, start, 100_000, 0), burst + 1);
        // 3 M records in the next second, of which a quarter of a million have the time; then 100,000, and all have.
        let second = taken(&mut budget, start, 3_000_000, 333);
        assert!((249_000..=251_000).contains(&second), "{second}");
        assert_eq!(taken(&mut budget, start + 1_100_000_000, 100_000, 10_000), 100_000);
        // The clock was set back: a debt, but not of the whole step.
        assert_eq!(taken(&mut budget, start - 500_000_000_000, 1, 0), 0);
        assert_eq!(taken(&mut budget, start - 499_000_000_000, 1, 0), 1, "a second later all is well");
    }
}
