//! Which rule takes a packet: the XDP program's algorithm over the same tables, for the packet path.
//!
//! On the path of every packet: must never allocate, lock or panic.

use super::compile::Compiled;
use super::prefix::masked;
use crate::wire::Headers;
use relay_common::{MatchEntry, MatchKey, NO_SLOT, PORT_EXACT, Shape, TAG_EXACT, TAG_NONE};

/// What the tables say about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This rule takes it.
    Rule {
        /// Its slot.
        slot: u32,
        /// Epoch at which that slot's rule was installed.
        serial: u32,
    },
    /// The rule that would take it excepts its source: the kernel's packet.
    Except,
    /// No rule takes it.
    Miss,
}

impl Compiled {
    /// The verdict on a packet that came in by `ifindex`.
    #[inline]
    pub fn lookup(&self, ifindex: u32, headers: &Headers) -> Verdict {
        let Some(shapes) = self.ingresses.get(&ifindex) else { return Verdict::Miss };
        for shape in shapes.iter().filter(|shape| shape.family == headers.family) {
            let Some(entry) = self.entries.get(&probe(ifindex, *shape, headers)) else { continue };
            if let Some(verdict) = self.judge(entry, headers) {
                return verdict;
            }
        }
        Verdict::Miss
    }

    /// What a hit means; `None`: go on with the next shape.
    #[inline]
    fn judge(&self, entry: &MatchEntry, headers: &Headers) -> Option<Verdict> {
        let found = match entry.source_set {
            0 => None,
            set => self.sets.get(&set).and_then(|set| set.lookup(headers.src)),
        };
        match found {
            Some(verdict) if verdict.slot == NO_SLOT => Some(Verdict::Except),
            Some(verdict) => Some(Verdict::Rule { slot: verdict.slot, serial: verdict.serial }),
            None if entry.slot == NO_SLOT => None,
            None => Some(Verdict::Rule { slot: entry.slot, serial: entry.serial }),
        }
    }
}

#[inline]
fn probe(ifindex: u32, shape: Shape, headers: &Headers) -> MatchKey {
    MatchKey {
        ifindex,
        tag: if shape.tag_mode == TAG_EXACT { headers.tag } else { TAG_NONE },
        addr: masked(headers.dst, shape.group_len),
        port: if shape.port_mode == PORT_EXACT { headers.dport } else { 0 },
        zero: 0,
        shape,
    }
}
