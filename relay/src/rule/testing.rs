//! Random rules for tests: valid alone, and, from small pools, likely to overlap.

use super::{EngineChoice, Match, Output, PathChoice, Prefix, Rule, SourceEdit, TagMatch, Ttl, VlanEdit};
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

fn v4() -> impl Strategy<Value = IpAddr> {
    any::<[u8; 4]>().prop_map(|[a, b, c, d]| IpAddr::V4(Ipv4Addr::new(1 + a % 223, b, c, d)))
}

fn v6() -> impl Strategy<Value = IpAddr> {
    any::<[u8; 14]>().prop_map(|tail| {
        let mut bytes = [0x20; 16];
        bytes[2..].copy_from_slice(&tail);
        if tail[0] % 2 == 0 {
            bytes[6..14].fill(0);
        }
        IpAddr::V6(Ipv6Addr::from(bytes))
    })
}

fn unicast(v6_wanted: bool) -> BoxedStrategy<IpAddr> {
    if v6_wanted { v6().boxed() } else { v4().boxed() }
}

fn group(v6_wanted: bool) -> BoxedStrategy<IpAddr> {
    match v6_wanted {
        false => any::<[u8; 3]>().prop_map(|[b, c, d]| IpAddr::V4(Ipv4Addr::new(239, b, c, d))).boxed(),
        true => v6()
            .prop_map(|addr| {
                let IpAddr::V6(addr) = addr else { unreachable!() };
                let mut bytes = addr.octets();
                bytes[0] = 0xff;
                bytes[1] = 0x3e;
                IpAddr::V6(bytes.into())
            })
            .boxed(),
    }
}

fn source(v6: bool) -> impl Strategy<Value = Prefix> {
    let max = if v6 { 128u8 } else { 32 };
    (unicast(v6), prop_oneof![Just(max), 8..=max]).prop_map(|(addr, len)| Prefix::new(addr, len))
}

fn port() -> impl Strategy<Value = Option<u16>> {
    prop::option::of(1..=u16::MAX)
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z]{2,4}[0-9]{1,3}", "[!-~&&[^,;=@\\[\\]#/:>.\"]]{1,15}", "(é|ß|x|\\.|-|_){3,7}"]
}

pub(crate) fn tag() -> impl Strategy<Value = TagMatch> {
    prop_oneof![
        4 => Just(TagMatch::None),
        1 => Just(TagMatch::Any),
        1 => (1u16..4095).prop_map(TagMatch::Vlan),
        1 => (1u16..4095, 1u16..4095).prop_map(|(outer, inner)| TagMatch::QinQ(outer, inner)),
    ]
}

fn output(v6: bool) -> impl Strategy<Value = Output> {
    let to = prop::option::of(prop_oneof![unicast(v6), group(v6)]);
    let ttl = prop_oneof![Just(Ttl::Dec), Just(Ttl::Keep), (1u8..).prop_map(Ttl::Set)];
    let src = prop_oneof![Just(SourceEdit::Keep), Just(SourceEdit::Egress), unicast(v6).prop_map(SourceEdit::Set)];
    let vlan = prop_oneof![Just(VlanEdit::Keep), Just(VlanEdit::None), (1u16..4095).prop_map(VlanEdit::Set)];
    let rate = prop::option::of(prop_oneof![1u64.., (1u64..2000).prop_map(|k| k * 1000), (1u64..20).prop_map(|m| m * 1_000_000)]);
    (name(), (to, port()), ttl, src, port(), prop::option::of(0u8..64), vlan, rate).prop_map(
        |(egress, (to, port), ttl, src, sport, dscp, vlan, rate)| Output {
            egress: format!("o{egress}").chars().take(9).collect(),
            to,
            port,
            ttl,
            src,
            sport,
            dscp,
            vlan,
            rate,
        },
    )
}

fn matching(v6: bool) -> impl Strategy<Value = Match> {
    let max = if v6 { 128u8 } else { 32 };
    let group = prop_oneof![
        4 => group(v6).prop_map(Prefix::host),
        2 => (group(v6), 16..=max).prop_map(|(addr, len)| Prefix::new(addr, len)),
        1 => unicast(v6).prop_map(Prefix::host),
    ];
    (tag(), group, port(), prop::option::of(source(v6)), prop::collection::vec(source(v6), 0..3))
        .prop_map(|(tag, group, port, source, except)| Match { tag, group, port, source, except })
}

/// Any valid rule, its id given or the default.
pub(crate) fn rule() -> impl Strategy<Value = Rule> {
    let path = prop_oneof![Just(PathChoice::Auto), Just(PathChoice::Kernel), Just(PathChoice::Xsk), Just(PathChoice::Packet)];
    let engine = prop_oneof![Just(EngineChoice::Auto), Just(EngineChoice::Tx), Just(EngineChoice::Coalesce)];
    let body = any::<bool>().prop_flat_map(|v6| (matching(v6), prop::collection::vec(output(v6), 1..4)));
    (name(), body, prop::option::of("[A-Za-z0-9._-]{1,64}"), path, engine, any::<bool>(), any::<bool>()).prop_map(
        |(ingress, (matching, outputs), id, path, engine, exact, join)| {
            let ingress = format!("i{ingress}").chars().take(9).collect();
            let mut rule = Rule { path, engine, exact, join, ..Rule::new(ingress, matching, outputs) };
            rule.id = id.unwrap_or_else(|| rule.default_id());
            rule
        },
    )
}

/// A match from a pool so small that matches meet.
pub(crate) fn close_match() -> impl Strategy<Value = Match> {
    let bit = 0u8..2;
    let group = (bit.clone(), bit.clone(), bit.clone(), prop::sample::select(vec![4u8, 8, 16, 24, 31, 32, 32, 32]))
        .prop_map(|(b, c, d, len)| Prefix::new(IpAddr::V4(Ipv4Addr::new(239, b, c, d)), len));
    let source = (bit.clone(), bit.clone(), bit, prop::sample::select(vec![7u8, 8, 15, 16, 24, 31, 32]))
        .prop_map(|(b, c, d, len)| Prefix::new(IpAddr::V4(Ipv4Addr::new(10, b, c, d)), len));
    let tag = prop::sample::select(vec![TagMatch::None, TagMatch::None, TagMatch::Any, TagMatch::Vlan(5), TagMatch::QinQ(5, 6)]);
    let port = prop::sample::select(vec![None, Some(5000), Some(5001)]);
    (tag, group, port, prop::option::of(source.clone()), prop::collection::vec(source, 0..3))
        .prop_map(|(tag, group, port, source, except)| Match { tag, group, port, source, except })
}
