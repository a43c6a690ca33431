//! Outputs made into edits.

use super::*;
use crate::rule::Rule;

const FACTS: Facts = Facts { src_mac: [2, 0, 0, 0, 0, 1], address: None, next_hop_mac: None, mtu: 1500 };

fn edit(line: &str, facts: &Facts) -> Result<Edit, Pending> {
    let rule: Rule = line.parse().unwrap();
    edit_for(&rule.matching, &rule.outputs[0], facts)
}

#[test]
fn the_plain_output_only_decrements() {
    let want = Edit { src_mac: FACTS.src_mac, mtu: 1500, family: 4, ttl_mode: TTL_DEC, ..Edit::default() };
    assert_eq!(edit("a 239.1.1.1 -> b", &FACTS), Ok(want));
}

#[test]
fn every_key_has_its_flag() {
    let edit = edit("a 239.1.1.1 -> b 239.129.2.3:6000 ttl=7 src=10.0.0.1 sport=9 dscp=46 vlan=12", &FACTS).unwrap();
    assert_eq!(edit.flags, SET_DST | SET_DPORT | SET_SRC | SET_SPORT | SET_DSCP | SET_DST_MAC);
    assert_eq!((edit.dst[..5].to_vec(), edit.src[..4].to_vec()), (vec![239, 129, 2, 3, 0], vec![10, 0, 0, 1]));
    assert_eq!(edit.dst_mac, [0x01, 0, 0x5e, 1, 2, 3]);
    assert_eq!((edit.dport, edit.sport, edit.dscp, edit.vlan, edit.ttl), (6000, 9, 46, 12, 7));
    assert_eq!((edit.ttl_mode, edit.vlan_mode), (TTL_SET, VLAN_SET));
}

#[test]
fn unicast_waits_for_its_next_hop() {
    let line = "a 239.1.1.1 -> b 10.0.0.5 ttl=keep vlan=none";
    assert_eq!(edit(line, &FACTS), Err(Pending::NextHop));
    let known = edit(line, &Facts { next_hop_mac: Some([6; 6]), ..FACTS }).unwrap();
    assert_eq!((known.dst_mac, known.flags, known.ttl_mode, known.vlan_mode), ([6; 6], SET_DST | SET_DST_MAC, TTL_KEEP, VLAN_NONE));
    assert_eq!(edit("a 10.0.0.9 -> b :7", &FACTS), Err(Pending::NextHop));
    assert_eq!(Pending::NextHop.reason(), OutputDropReason::NoNeighbor);
}

#[test]
fn src_egress_waits_for_an_address_of_the_family() {
    let line = "a [ff3e::1] -> b src=egress";
    assert_eq!(edit(line, &FACTS), Err(Pending::Address));
    assert_eq!(edit(line, &Facts { address: Some("10.0.0.1".parse().unwrap()), ..FACTS }), Err(Pending::Address));
    let known = edit(line, &Facts { address: Some("2001:db8::1".parse().unwrap()), ..FACTS }).unwrap();
    assert_eq!((known.flags, known.src[0], known.src[15], known.family), (SET_SRC, 0x20, 1, 6));
}
