//! The rule snapshot as the data path reads it: by slot for packets XDP has matched, by lookup for the others.
//!
//! Immutable once made; the worker swaps it between two batches (invariant 6). Must never be built on the packet's way.

use crate::frame::bundle::MAX_BUNDLED;
use crate::plan::counters::MAX_RULES;
use crate::plan::edit::{Edit, VLAN_SET};
use crate::plan::fate::OutputDropReason;
use crate::rule::compile::Compiled;
use crate::rule::lookup::Verdict;
use crate::wire::Headers;

/// Where one output goes and what it changes.
#[derive(Clone, Copy, Debug)]
pub struct OutputPlan {
    /// Slot of its counters.
    pub slot: u32,
    /// Port it sends by.
    pub port: u32,
    /// Why it can't send now, if it can't.
    pub blocked: Option<OutputDropReason>,
    /// Whether its packets may leave in super-frames.
    pub coalesce: bool,
    /// The header edits.
    pub edit: Edit,
    /// Least time between two packets in the long run, in 1/64 ns; 0: unlimited.
    pub gap: u64,
}

/// A rule as the data path needs it.
#[derive(Clone, Debug)]
pub struct RulePlan {
    /// Slot of its counters; what XDP names.
    pub slot: u32,
    /// Epoch at which it was installed.
    pub serial: u32,
    /// Ingress interface.
    pub ifindex: u32,
    /// 4 or 6.
    pub family: u8,
    /// Prefix length of the group.
    pub group_len: u8,
    /// Group, network order.
    pub group: [u8; 16],
    /// Destination port, if one is named.
    pub port: Option<u16>,
    /// VLAN ids as in `MatchKey::tag`, if the rule names them.
    pub tag: Option<u32>,
    /// Its outputs, in order.
    pub outputs: Vec<OutputPlan>,
    /// Ports by which several of them send that may leave in super-frames and push no tag, and which, by bit: their packets may go as
    /// bundles (frame/bundle.rs). Filled in by [`Table::new`].
    pub shared: Vec<(u32, u64)>,
}

/// Outputs of one port of which a packet can be a bundle. More than a bundle can have are left out.
fn shared(outputs: &[OutputPlan]) -> Vec<(u32, u64)> {
    let mut shared: Vec<(u32, u64)> = Vec::new();
    for (number, output) in outputs.iter().enumerate().filter(|(_, output)| output.coalesce && output.edit.vlan_mode != VLAN_SET) {
        let bit = 1u64.checked_shl(number as u32).unwrap_or(0);
        match shared.iter_mut().find(|(port, _)| *port == output.port) {
            Some((_, bits)) if (bits.count_ones() as usize) < MAX_BUNDLED => *bits |= bit,
            Some(_) => {}
            None => shared.push((output.port, bit)),
        }
    }
    shared.retain(|(_, bits)| bits.count_ones() > 1);
    shared
}

impl RulePlan {
    /// Whether the packet is one the rule can have been chosen for (a stale hint must never send a packet the wrong way).
    #[inline]
    pub fn fits(&self, ifindex: u32, headers: &Headers) -> bool {
        self.ifindex == ifindex
            && self.family == headers.family
            && self.port.is_none_or(|port| port == headers.dport)
            && self.tag.is_none_or(|tag| tag == headers.tag)
            && prefix_equal(&self.group, &headers.dst, self.group_len)
    }
}

/// Whether two addresses agree in their first `len` bits. IPv4's four bytes are looked at alone, as the parser has just written them.
#[inline]
fn prefix_equal(a: &[u8; 16], b: &[u8; 16], len: u8) -> bool {
    if len <= 32 {
        let first = |address: &[u8; 16]| u32::from_be_bytes([address[0], address[1], address[2], address[3]]);
        return u32::from(len) <= (first(a) ^ first(b)).leading_zeros();
    }
    let difference = u128::from_be_bytes(*a) ^ u128::from_be_bytes(*b);
    u32::from(len) <= difference.leading_zeros()
}

/// A snapshot of the rules.
#[derive(Debug, Default)]
pub struct Table {
    epoch: u32,
    by_slot: Vec<u32>,
    rules: Vec<RulePlan>,
    compiled: Compiled,
    own_sources: Vec<(u32, [u8; 16])>,
    has_rates: bool,
    widest: usize,
}

impl Table {
    /// A snapshot. `own_sources`: the relay's own addresses by interface (a packet from one of them has looped).
    pub fn new(epoch: u32, mut rules: Vec<RulePlan>, compiled: Compiled, own_sources: Vec<(u32, [u8; 16])>) -> Self {
        rules.iter_mut().for_each(|rule| rule.shared = shared(&rule.outputs));
        // A slot that there is not has no counters either: nothing finds its rule.
        let slots = rules.iter().map(|rule| rule.slot as usize + 1).filter(|slots| *slots <= MAX_RULES).max().unwrap_or(0);
        let mut by_slot = vec![u32::MAX; slots];
        for (position, rule) in rules.iter().enumerate() {
            if let Some(entry) = by_slot.get_mut(rule.slot as usize) {
                *entry = position as u32;
            }
        }
        let has_rates = rules.iter().any(|rule| rule.outputs.iter().any(|output| output.gap != 0));
        let widest = rules.iter().map(|rule| rule.outputs.len()).max().unwrap_or(0);
        Self { epoch, by_slot, rules, compiled, own_sources, has_rates, widest }
    }

    /// The most outputs that a rule has.
    pub const fn widest(&self) -> usize {
        self.widest
    }

    /// Whether any output has a rate limit, so that a batch has to know the time.
    pub const fn has_rates(&self) -> bool {
        self.has_rates
    }

    /// Epoch of the snapshot.
    pub const fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The rules.
    pub fn rules(&self) -> &[RulePlan] {
        &self.rules
    }

    fn slot(&self, slot: u32, serial: u32) -> Option<&RulePlan> {
        let position = *self.by_slot.get(slot as usize)?;
        self.rules.get(position as usize).filter(|rule| rule.serial == serial)
    }

    /// The rule XDP chose, if it still stands and fits the packet.
    #[inline]
    pub fn hinted(&self, (slot, serial): (u32, u32), ifindex: u32, headers: &Headers) -> Option<&RulePlan> {
        self.slot(slot, serial).filter(|rule| rule.fits(ifindex, headers))
    }

    /// The rule for a packet that nobody has matched yet.
    #[inline]
    pub fn find(&self, ifindex: u32, headers: &Headers) -> Option<&RulePlan> {
        match self.compiled.lookup(ifindex, headers) {
            Verdict::Rule { slot, serial } => self.slot(slot, serial),
            Verdict::Except | Verdict::Miss => None,
        }
    }

    /// Whether the source is one of the relay's own addresses on that interface.
    #[inline]
    pub fn is_own_source(&self, ifindex: u32, source: &[u8; 16]) -> bool {
        self.own_sources.iter().any(|(own, address)| *own == ifindex && address == source)
    }
}
