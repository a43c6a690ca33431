//! An output and the facts about its interface, made into the bytes of an [`Edit`].
//!
//! Pure: the facts are the caller's. Must never ask the kernel itself.

use super::edit::{
    Edit, SET_DPORT, SET_DSCP, SET_DST, SET_DST_MAC, SET_SPORT, SET_SRC, TTL_DEC, TTL_KEEP, TTL_SET, VLAN_KEEP, VLAN_NONE, VLAN_SET,
};
use super::fate::OutputDropReason;
use super::records::address_bytes;
use crate::rule::{Match, Output, SourceEdit, Ttl, VlanEdit};
use crate::wire::mac::{self, Mac};
use std::net::IpAddr;
use thiserror::Error;

/// What is known about an output's interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The egress interface's MAC.
    pub src_mac: Mac,
    /// Its address of the rule's family, if it has one.
    pub address: Option<IpAddr>,
    /// The next hop's MAC, for unicast destinations, if it is known.
    pub next_hop_mac: Option<Mac>,
    /// Its MTU; 0: unlimited.
    pub mtu: u32,
}

/// What an output still waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Pending {
    /// `src=egress`, and the interface has no address of the family.
    #[error("src: the egress interface has no address of this family yet (give it one, or say src=ADDR)")]
    Address,
    /// A unicast destination whose neighbour has not answered yet.
    #[error("to: the next hop's link-layer address is not known yet (is there a route, and does the host answer?)")]
    NextHop,
}

impl Pending {
    /// The reason under which packets are dropped meanwhile.
    pub const fn reason(self) -> OutputDropReason {
        match self {
            Self::Address => OutputDropReason::OutputDown,
            Self::NextHop => OutputDropReason::NoNeighbor,
        }
    }
}

/// The address to which an output sends unicast, for which the caller has to find the next hop.
pub fn unicast_destination(matching: &Match, output: &Output) -> Option<IpAddr> {
    Some(output.to.unwrap_or(matching.group.addr)).filter(|addr| !addr.is_multicast())
}

/// The edit of `output`, one of a rule that takes `matching`.
pub fn edit_for(matching: &Match, output: &Output, facts: &Facts) -> Result<Edit, Pending> {
    let family = matching.group.family();
    let mut edit = Edit { src_mac: facts.src_mac, mtu: facts.mtu, family, ..Edit::default() };
    set_destination(&mut edit, matching, output, facts)?;
    set_source(&mut edit, output, facts)?;
    (edit.ttl_mode, edit.ttl) = match output.ttl {
        Ttl::Dec => (TTL_DEC, 0),
        Ttl::Keep => (TTL_KEEP, 0),
        Ttl::Set(ttl) => (TTL_SET, ttl),
    };
    (edit.vlan_mode, edit.vlan) = match output.vlan {
        VlanEdit::Keep => (VLAN_KEEP, 0),
        VlanEdit::None => (VLAN_NONE, 0),
        VlanEdit::Set(id) => (VLAN_SET, id),
    };
    if let Some(dscp) = output.dscp {
        edit.flags |= SET_DSCP;
        edit.dscp = dscp;
    }
    Ok(edit)
}

fn set_destination(edit: &mut Edit, matching: &Match, output: &Output, facts: &Facts) -> Result<(), Pending> {
    if let Some(to) = output.to {
        edit.flags |= SET_DST | SET_DST_MAC;
        edit.dst = address_bytes(to);
        edit.dst_mac = mac::group(edit.family, &edit.dst);
    }
    if unicast_destination(matching, output).is_some() {
        edit.flags |= SET_DST_MAC;
        edit.dst_mac = facts.next_hop_mac.ok_or(Pending::NextHop)?;
    }
    if let Some(port) = output.port {
        edit.flags |= SET_DPORT;
        edit.dport = port;
    }
    Ok(())
}

fn set_source(edit: &mut Edit, output: &Output, facts: &Facts) -> Result<(), Pending> {
    let family = edit.family;
    let address = match output.src {
        SourceEdit::Keep => None,
        SourceEdit::Egress => Some(facts.address.filter(|addr| crate::rule::prefix::family(*addr) == family).ok_or(Pending::Address)?),
        SourceEdit::Set(addr) => Some(addr),
    };
    if let Some(address) = address {
        edit.flags |= SET_SRC;
        edit.src = address_bytes(address);
    }
    if let Some(port) = output.sport {
        edit.flags |= SET_SPORT;
        edit.sport = port;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
