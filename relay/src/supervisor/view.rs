//! What the rule book has to know of the world: ports, interface facts, next hops.
//!
//! Asks netlink for routes and neighbours of unicast outputs; must never change anything but asking the kernel to resolve.

use super::book::{World, blocked};
use super::interfaces::{Interface, Interfaces};
use super::ports::{Ports, Way};
use crate::plan::fate::OutputDropReason;
use crate::plan::records::{AddressRecord, OUTPUT_COALESCE, OutputRecord, address_bytes};
use crate::plan::resolve::{Facts, edit_for, unicast_destination};
use crate::rule::{EngineChoice, Rule};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// A look at the world.
pub struct View<'a> {
    /// The ports.
    pub ports: &'a Ports,
    /// Interfaces by name.
    pub known: &'a BTreeMap<String, Interface>,
    /// For routes and neighbours.
    pub interfaces: &'a mut Interfaces,
    /// Next hops asked for already in this look.
    pub hops: BTreeMap<(u32, IpAddr), Option<[u8; 6]>>,
}

impl<'a> View<'a> {
    /// A fresh look.
    pub fn new(ports: &'a Ports, known: &'a BTreeMap<String, Interface>, interfaces: &'a mut Interfaces) -> Self {
        Self { ports, known, interfaces, hops: BTreeMap::new() }
    }

    fn next_hop_mac(&mut self, destination: IpAddr, egress: u32) -> Option<[u8; 6]> {
        if let Some(known) = self.hops.get(&(egress, destination)) {
            return *known;
        }
        let hop = self.interfaces.next_hop(destination, Some(egress)).ok().flatten();
        if let Some(hop) = hop
            && hop.mac.is_none()
        {
            // The answer comes as news from the kernel; a failure leaves the output pending, which `rule list` shows.
            let _ = self.interfaces.resolve(egress, hop.gateway);
        }
        let mac = hop.and_then(|hop| hop.mac);
        self.hops.insert((egress, destination), mac);
        mac
    }

    fn facts(&mut self, rule: &Rule, index: usize, interface: &Interface) -> Facts {
        let output = rule.outputs.get(index);
        let destination = output.and_then(|output| unicast_destination(&rule.matching, output));
        let ipv4 = rule.matching.group.addr.is_ipv4();
        Facts {
            src_mac: interface.mac.unwrap_or_default(),
            address: if ipv4 { interface.ipv4().map(IpAddr::V4) } else { interface.ipv6().map(IpAddr::V6) },
            next_hop_mac: destination.and_then(|destination| self.next_hop_mac(destination, interface.ifindex)),
            mtu: interface.mtu,
        }
    }
}

impl World for View<'_> {
    fn ifindex(&self, rule: &Rule) -> Option<u32> {
        let (_, port) = self.ports.ingress(rule).filter(|(_, port)| port.is_live())?;
        Some(port.facts.ifindex)
    }

    fn output(&mut self, rule: &Rule, index: usize) -> OutputRecord {
        let Some(output) = rule.outputs.get(index) else { return blocked(0, OutputDropReason::OutputDown) };
        let Some((number, port)) = self.ports.egress(rule, &output.egress) else { return blocked(0, OutputDropReason::OutputDown) };
        let ifindex = port.is_live().then_some(port.facts.ifindex);
        let (port, workers) = (number as u32, port.sockets.len() as u64);
        let known: &BTreeMap<String, Interface> = self.known;
        let interface = match known.get(&output.egress) {
            Some(interface) if interface.up && interface.mac.is_some() && Some(interface.ifindex) == ifindex => interface,
            _ => return blocked(port, OutputDropReason::OutputDown),
        };
        let facts = self.facts(rule, index, interface);
        match edit_for(&rule.matching, output, &facts) {
            Ok(edit) => OutputRecord {
                port,
                edit,
                flags: if rule.engine == EngineChoice::Coalesce { OUTPUT_COALESCE } else { 0 },
                gap: output.rate.map_or(0, |rate| OutputRecord::gap_of(rate, workers)),
                ..OutputRecord::default()
            },
            Err(pending) => blocked(port, pending.reason()),
        }
    }

    fn own_addresses(&self) -> Vec<AddressRecord> {
        let ingress: BTreeSet<&str> = self.ports.list().iter().filter(|port| port.ingress).map(|port| port.name.as_str()).collect();
        let own = ingress.iter().filter_map(|name| self.known.get(*name));
        own.flat_map(|interface| {
            interface.addresses.iter().map(|own| AddressRecord { addr: address_bytes(own.address), number: interface.ifindex })
        })
        .collect()
    }

    fn in_xdp(&self, rule: &Rule) -> bool {
        self.ports.ingress(rule).is_some_and(|(_, port)| port.way == Way::Xsk)
    }
}
