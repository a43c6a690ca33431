//! What must hold between the fields of one rule, whoever wrote it down (one line, config file, program).
//!
//! Must never look at a second rule: what holds between rules is in `set`.

use super::error::Fault;
use super::value::families;
use super::{Match, Output, Prefix, Rule, SourceEdit};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Which part of a rule a fault lies in, so that whoever parsed it can say where that stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The rule as a whole.
    Rule,
    /// The group of the match.
    Group,
    /// The source of the match.
    Source,
    /// The n-th `except`.
    Except(usize),
    /// The interface of the n-th output.
    Egress(usize),
    /// The destination of the n-th output.
    To(usize),
    /// `src` of the n-th output.
    Src(usize),
}

/// 224.0.0.0/24 and ff02::/16: what routers never forward.
fn link_local(family: u8) -> Prefix {
    match family {
        4 => Prefix { addr: IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), len: 24 },
        _ => Prefix { addr: IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0)), len: 16 },
    }
}

/// 224.0.0.0/4 and ff00::/8.
fn all_groups(family: u8) -> Prefix {
    match family {
        4 => Prefix { addr: IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), len: 4 },
        _ => Prefix { addr: IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), len: 8 },
    }
}

fn is_broadcast(addr: IpAddr) -> bool {
    addr == IpAddr::V4(Ipv4Addr::BROADCAST)
}

/// Checks one rule; the first fault wins.
pub fn check(rule: &Rule) -> Result<(), (Place, Fault)> {
    check_group(&rule.matching.group, rule.join).map_err(|fault| (Place::Group, fault))?;
    check_sources(&rule.matching)?;
    if rule.outputs.is_empty() {
        return Err((Place::Rule, Fault::new("output", "no output", "-> EGRESS [ADDR][:PORT]")));
    }
    rule.outputs.iter().enumerate().try_for_each(|(at, output)| check_output(rule, at, output))
}

fn check_group(group: &Prefix, join: bool) -> Result<(), Fault> {
    let groups = all_groups(group.family());
    if groups.covers(group) {
        let local = join && group.overlaps(&link_local(group.family()));
        let fault = || {
            Fault::new(
                "group",
                format!("{group} holds link-local groups, which no router forwards"),
                "say join=no to relay them all the same",
            )
        };
        return if local { Err(fault()) } else { Ok(()) };
    }
    if !group.is_host() {
        return Err(Fault::new(
            "group",
            format!("{group} is not within {groups}"),
            "a prefix must hold groups only; unicast takes one address",
        ));
    }
    match group.addr.is_unspecified() || is_broadcast(group.addr) {
        true => Err(Fault::new(
            "group",
            format!("{group} is neither a group nor a unicast address"),
            "a group, or one of the relay's own addresses",
        )),
        false => Ok(()),
    }
}

fn check_sources(matching: &Match) -> Result<(), (Place, Fault)> {
    let check = |field: &'static str, place: Place, source: &Prefix| match source.family() == matching.group.family() {
        false => Err((place, families(field))),
        true if source.addr.is_multicast() || is_broadcast(source.addr) => {
            Err((place, Fault::new(field, format!("{source} is no source address"), "sources are unicast")))
        }
        true => Ok(()),
    };
    matching.source.iter().try_for_each(|source| check("source", Place::Source, source))?;
    matching.except.iter().enumerate().try_for_each(|(at, source)| check("except", Place::Except(at), source))
}

fn check_output(rule: &Rule, at: usize, output: &Output) -> Result<(), (Place, Fault)> {
    let family = rule.matching.group.family();
    if output.egress == rule.ingress {
        let fault = Fault::new("egress", format!("{} is also the ingress", output.egress), "send out of another interface");
        return Err((Place::Egress(at), fault));
    }
    if let Some(to) = output.to {
        check_address("to", family, to, false).map_err(|fault| (Place::To(at), fault))?;
    }
    if let SourceEdit::Set(src) = output.src {
        check_address("src", family, src, true).map_err(|fault| (Place::Src(at), fault))?;
    }
    Ok(())
}

fn check_address(field: &'static str, family: u8, addr: IpAddr, unicast: bool) -> Result<(), Fault> {
    if super::prefix::family(addr) != family {
        return Err(families(field));
    }
    match addr.is_unspecified() || is_broadcast(addr) || unicast && addr.is_multicast() {
        true if unicast => Err(Fault::new(field, format!("{addr} is no source address"), "a unicast address, egress or keep")),
        true => Err(Fault::new(field, format!("{addr} is no destination"), "a group or a unicast address")),
        false => Ok(()),
    }
}
