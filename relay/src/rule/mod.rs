//! Rules: what a line of the rule language means, the set of them, and how they compile into lookups.
//!
//! Pure: must never know a socket, libc, a file or an interface's state.

pub mod check;
pub mod compile;
mod cycle;
pub mod error;
pub mod lookup;
pub mod prefix;
pub mod set;
pub mod text;
pub mod value;

#[cfg(test)]
pub(crate) mod testing;

pub use error::RuleError;
pub use set::{RuleSet, SetDiff, SetError};

use std::net::IpAddr;

/// An address prefix; bits behind `len` are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    /// Masked address.
    pub addr: IpAddr,
    /// 0–32 or 0–128.
    pub len: u8,
}

/// `tag=` of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TagMatch {
    /// Untagged packets only (a priority tag with VLAN id 0 counts as untagged).
    #[default]
    None,
    /// With or without tags.
    Any,
    /// One tag.
    Vlan(u16),
    /// Two tags: outer, inner.
    QinQ(u16, u16),
}

/// What a rule takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Match {
    /// VLAN condition.
    pub tag: TagMatch,
    /// Destination: group, group prefix, or one of the relay's own unicast addresses.
    pub group: Prefix,
    /// Destination port; `None`: any.
    pub port: Option<u16>,
    /// Source prefix; `None`: any source.
    pub source: Option<Prefix>,
    /// Sources that pass to the kernel instead, without falling through to a wider rule.
    pub except: Vec<Prefix>,
}

/// `ttl=` of an output (hop limit for IPv6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Ttl {
    /// One less; 0 is a counted drop.
    #[default]
    Dec,
    /// Unchanged.
    Keep,
    /// This value.
    Set(u8),
}

/// `src=` of an output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SourceEdit {
    /// Unchanged.
    #[default]
    Keep,
    /// The egress interface's address.
    Egress,
    /// This address.
    Set(IpAddr),
}

/// `vlan=` of an output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum VlanEdit {
    /// Tags as they came.
    #[default]
    Keep,
    /// All tags removed.
    None,
    /// Exactly this one tag.
    Set(u16),
}

/// One output of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Output {
    /// Interface name.
    pub egress: String,
    /// New destination address; `None`: unchanged.
    pub to: Option<IpAddr>,
    /// New destination port; `None`: unchanged.
    pub port: Option<u16>,
    /// TTL edit.
    pub ttl: Ttl,
    /// Source address edit.
    pub src: SourceEdit,
    /// New source port; `None`: unchanged.
    pub sport: Option<u16>,
    /// New DSCP; `None`: unchanged. ECN is always kept.
    pub dscp: Option<u8>,
    /// Tag edit.
    pub vlan: VlanEdit,
    /// Packets per second at most.
    pub rate: Option<u64>,
}

/// `path=` of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PathChoice {
    /// The planner chooses.
    #[default]
    Auto,
    /// XDP devmap broadcast.
    Kernel,
    /// AF_XDP.
    Xsk,
    /// AF_PACKET.
    Packet,
}

/// `engine=` of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EngineChoice {
    /// The planner chooses.
    #[default]
    Auto,
    /// One packet, one descriptor.
    Tx,
    /// Runs of one flow as one super-frame.
    Coalesce,
}

/// A rule of the relay: what one line says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// Name; the default is a stable hash of ingress, tag and match.
    pub id: String,
    /// Ingress interface name.
    pub ingress: String,
    /// What it takes.
    pub matching: Match,
    /// Where it sends, in order.
    pub outputs: Vec<Output>,
    /// Path asked for.
    pub path: PathChoice,
    /// Engine asked for.
    pub engine: EngineChoice,
    /// Exactly-once asked for (never coalesced).
    pub exact: bool,
    /// Whether the relay joins the group (default yes).
    pub join: bool,
}
