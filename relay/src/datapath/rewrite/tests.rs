//! Rewrites, checked by a parser and a verifier that share nothing with them.

use super::*;
use crate::datapath::edit::{TTL_DEC, VLAN_KEEP};
use crate::wire::parse;
use crate::wire::parse::testing::{Spec, checksums_hold, pseudo, reference, spec, words};
use proptest::prelude::*;

const ROOM: usize = 256;
const MAC: mac::Mac = [2, 0, 0, 0, 0, 9];

/// A packet in a frame of 2048 bytes, as a port hands it over.
struct Framed {
    frame: Vec<u8>,
    offset: u32,
    len: u32,
    headers: Headers,
}

impl Framed {
    fn new(spec: &Spec, room: usize) -> Self {
        let bytes = spec.build();
        let mut frame = vec![0x55; 2048];
        frame[room..room + bytes.len()].copy_from_slice(&bytes);
        let headers = parse(&bytes, bytes.len()).unwrap();
        Self { frame, offset: room as u32, len: bytes.len() as u32, headers }
    }

    fn bytes(&self) -> &[u8] {
        &self.frame[self.offset as usize..][..self.len as usize]
    }

    fn inspect(&self) -> Result<Checked, DropReason> {
        inspect(&self.headers, &[self.bytes()])
    }

    fn rewrite(&mut self, edit: &Edit) -> Result<(), OutputDropReason> {
        let checked = self.inspect().unwrap();
        rewrite(&mut self.frame, &mut self.offset, &mut self.len, &self.headers, checked, edit)
    }

    /// The rewritten packet's headers, after everything that can be verified has been.
    fn verified(&self) -> Headers {
        let headers = reference(self.bytes()).unwrap();
        assert!(checksums_hold(self.bytes(), &headers), "{headers:?} {:02x?}", self.bytes());
        headers
    }
}

fn edit() -> Edit {
    Edit { src_mac: MAC, ttl_mode: TTL_DEC, vlan_mode: VLAN_KEEP, ..Edit::default() }
}

fn addr(bytes: &[u8]) -> [u8; 16] {
    let mut addr = [0; 16];
    addr[..bytes.len()].copy_from_slice(bytes);
    addr
}

#[test]
fn the_default_edit_decrements_and_readdresses() {
    let mut packet = Framed::new(&Spec::v4(), ROOM);
    packet.rewrite(&edit()).unwrap();
    let h = packet.verified();
    assert_eq!((h.ttl, h.sport, h.dport, h.dst), (7, 4000, 5000, addr(&[239, 1, 1, 1])));
    assert_eq!(packet.bytes()[..12], [0x01, 0, 0x5e, 1, 1, 1, 2, 0, 0, 0, 0, 9]);
}

#[test]
fn ttl_modes_and_their_ends() {
    let result = |ttl, mode| {
        let mut packet = Framed::new(&Spec { ttl, ..Spec::v4() }, ROOM);
        packet.rewrite(&Edit { ttl_mode: mode, ttl: 16, ..edit() }).map(|()| packet.verified().ttl)
    };
    assert_eq!((result(2, TTL_DEC), result(1, TTL_KEEP), result(1, TTL_SET)), (Ok(1), Ok(1), Ok(16)));
    for (ttl, mode) in [(1, TTL_DEC), (0, TTL_DEC), (0, TTL_KEEP)] {
        assert_eq!(result(ttl, mode), Err(OutputDropReason::TtlExpired));
    }
}

#[test]
fn a_new_group_brings_its_mac() {
    let mut packet = Framed::new(&Spec::v6(), ROOM);
    let mut dst = addr(&[0xff, 0x3e]);
    dst[12..].copy_from_slice(&[1, 2, 3, 4]);
    packet.rewrite(&Edit { dst, flags: SET_DST, ..edit() }).unwrap();
    assert_eq!((packet.verified().dst, &packet.bytes()[..6]), (dst, &[0x33, 0x33, 1, 2, 3, 4][..]));
    let mut packet = Framed::new(&Spec::v4(), ROOM);
    let fixed = Edit { dst: addr(&[10, 0, 0, 5]), dst_mac: [6; 6], flags: SET_DST | SET_DST_MAC, ..edit() };
    packet.rewrite(&fixed).unwrap();
    assert_eq!((packet.verified().dst[3], &packet.bytes()[..6]), (5, &[6; 6][..]));
}

#[test]
fn tags_come_and_go() {
    for tags in [vec![], vec![5], vec![5, 6]] {
        let spec = Spec { tags: tags.clone(), ..Spec::v4() };
        let old = spec.build();
        for (mode, want) in [(VLAN_KEEP, tags.clone()), (VLAN_NONE, vec![]), (VLAN_SET, vec![99])] {
            let mut packet = Framed::new(&spec, ROOM);
            packet.rewrite(&Edit { vlan_mode: mode, vlan: 99, ..edit() }).unwrap();
            let h = packet.verified();
            assert_eq!(usize::from(h.tag_count), want.len());
            assert_eq!(h.tag, want.iter().rev().fold(0, |tag, vid| tag << 16 | u32::from(*vid)));
            assert_eq!(packet.bytes().len(), old.len() + 4 * want.len() - 4 * tags.len());
        }
    }
}

#[test]
fn a_tag_needs_headroom() {
    for (room, fits) in [(0, false), (3, false), (4, true)] {
        let mut packet = Framed::new(&Spec::v4(), room);
        let before = packet.frame.clone();
        let result = packet.rewrite(&Edit { vlan_mode: VLAN_SET, vlan: 9, ..edit() });
        assert_eq!(result, if fits { Ok(()) } else { Err(OutputDropReason::NoHeadroom) });
        assert_eq!(packet.frame == before, !fits);
    }
}

#[test]
fn the_mtu_is_that_of_the_ip_packet() {
    let spec = Spec { tags: vec![5], padding: 10, ..Spec::v4() };
    let mut packet = Framed::new(&spec, ROOM);
    assert_eq!(packet.rewrite(&Edit { mtu: 38, ..edit() }), Err(OutputDropReason::MtuExceeded));
    assert_eq!(packet.rewrite(&Edit { mtu: 39, ..edit() }), Ok(()));
}

#[test]
fn dscp_keeps_ecn() {
    for spec in [Spec { traffic_class: 0xff, ..Spec::v4() }, Spec { traffic_class: 0xff, ..Spec::v6() }] {
        let mut packet = Framed::new(&spec, ROOM);
        packet.rewrite(&Edit { dscp: 10, flags: SET_DSCP, ..edit() }).unwrap();
        assert_eq!(packet.verified().traffic_class, 10 << 2 | 3);
    }
}

#[test]
fn unfinished_checksums_are_finished_once() {
    for spec in [Spec { partial: true, ..Spec::v4() }, Spec { partial: true, ..Spec::v6() }] {
        let mut packet = Framed::new(&spec, ROOM);
        assert!(!checksums_hold(packet.bytes(), &packet.headers));
        let checked = packet.inspect().unwrap();
        let whole = Framed::new(&Spec { partial: false, ..spec }, ROOM).headers.udp_checksum;
        assert_eq!((checked.udp_checksum(), checked.finished()), (Some(whole), true));
        packet.rewrite(&edit()).unwrap();
        packet.verified();
    }
}

#[test]
fn no_checksum_stays_none_over_ipv4_and_is_a_drop_over_ipv6() {
    let mut packet = Framed::new(&Spec { no_checksum: true, ..Spec::v4() }, ROOM);
    packet.rewrite(&Edit { dport: 1, flags: SET_DPORT, ..edit() }).unwrap();
    assert_eq!((packet.verified().udp_checksum, packet.verified().dport), (0, 1));
    let mut packet = Framed::new(&Spec::v6(), ROOM);
    packet.headers.udp_checksum = 0;
    assert_eq!(packet.inspect(), Err(DropReason::BadUdpChecksum));
}

#[test]
fn damage_and_forged_sources_are_drops() {
    let inspected = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = Spec::v4().build();
        edit(&mut bytes);
        inspect(&parse(&bytes, bytes.len()).unwrap(), &[&bytes])
    };
    assert!(inspected(&|_| ()).is_ok());
    assert_eq!(inspected(&|b| b[22] ^= 1), Err(DropReason::BadIpChecksum));
    assert_eq!(inspected(&|b| b[50] ^= 1), Err(DropReason::BadUdpChecksum));
    assert_eq!(inspected(&|b| b[41] ^= 1), Err(DropReason::BadUdpChecksum));
    for (src, v6) in [([224, 0, 0, 1], false), ([239, 9, 9, 9], false), ([255; 4], false), ([0xff, 2, 0, 0], true)] {
        let spec = Spec { src: addr(&src), ..if v6 { Spec::v6() } else { Spec::v4() } };
        assert_eq!(Framed::new(&spec, ROOM).inspect(), Err(DropReason::MulticastSource));
    }
    assert!(Framed::new(&Spec { src: addr(&[]), ..Spec::v4() }, ROOM).inspect().is_ok());
}

#[test]
fn a_packet_shorter_than_parsed_is_malformed() {
    let packet = Framed::new(&Spec::v4(), ROOM);
    assert_eq!(inspect(&packet.headers, &[]), Err(DropReason::Malformed));
    assert_eq!(inspect(&packet.headers, &[&packet.bytes()[..20]]), Err(DropReason::Malformed));
    assert_eq!(inspect(&packet.headers, &[&packet.bytes()[..50]]), Err(DropReason::Malformed));
    let mut short = Framed::new(&Spec::v4(), ROOM);
    let before = short.frame.clone();
    short.len = 41;
    let checked = Checked::NONE;
    let result = rewrite(&mut short.frame, &mut short.offset, &mut short.len, &short.headers, checked, &edit());
    assert_eq!((result, short.frame == before), (Err(OutputDropReason::NoHeadroom), true));
}

#[test]
fn a_checksum_that_becomes_zero_is_sent_as_ones() {
    let mut seen = false;
    for dport in 0..=u16::MAX {
        let mut packet = Framed::new(&Spec::v4(), ROOM);
        packet.rewrite(&Edit { dport, flags: SET_DPORT, ..edit() }).unwrap();
        let sum = packet.verified().udp_checksum;
        assert_ne!(sum, 0);
        seen |= sum == 0xffff;
    }
    assert!(seen);
}

fn edits() -> impl Strategy<Value = Edit> {
    let addresses = (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<[u8; 6]>());
    let numbers = (any::<u16>(), any::<u16>(), 0u16..64, 1u16..4095, prop_oneof![Just(0u32), 20u32..200]);
    (addresses, numbers, 0u8..3, 1u8..=255, 0u8..64, 0u8..3).prop_map(
        |((dst, src, dst_mac), (dport, sport, flags, vlan, mtu), ttl_mode, ttl, dscp, vlan_mode)| Edit {
            dst,
            src,
            dst_mac,
            src_mac: MAC,
            dport,
            sport,
            flags,
            vlan,
            mtu,
            ttl_mode,
            ttl,
            dscp,
            vlan_mode,
            ..Edit::default()
        },
    )
}

/// Cuts an address to the family's length.
fn family_addr(v6: bool, addr: [u8; 16]) -> [u8; 16] {
    let mut out = addr;
    if !v6 {
        out[4..].fill(0);
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_rewrite_verifies_and_says_what_was_asked(spec in spec(), edit in edits(), room in 0usize..40) {
        let mut packet = Framed::new(&spec, room);
        let (before, old) = (packet.frame.clone(), packet.headers);
        let place = (packet.offset, packet.len);
        if let Err(reason) = packet.rewrite(&edit) {
            let expected = match reason {
                OutputDropReason::TtlExpired => edit.ttl_mode == TTL_DEC && old.ttl < 2 || edit.ttl_mode == TTL_KEEP && old.ttl == 0,
                OutputDropReason::MtuExceeded => edit.mtu != 0 && edit.mtu < old.l3_len,
                OutputDropReason::NoHeadroom => room < 4 && edit.vlan_mode == VLAN_SET && spec.tags.is_empty(),
                _ => false,
            };
            prop_assert!(expected, "{:?}", reason);
            prop_assert!(packet.frame == before && place == (packet.offset, packet.len));
            return Ok(());
        }
        let h = packet.verified();
        let set = |flag| edit.flags & flag != 0;
        prop_assert_eq!(h.dst, if set(SET_DST) { family_addr(spec.v6, edit.dst) } else { old.dst });
        prop_assert_eq!(h.src, if set(SET_SRC) { family_addr(spec.v6, edit.src) } else { old.src });
        prop_assert_eq!(h.dport, if set(SET_DPORT) { edit.dport } else { old.dport });
        prop_assert_eq!(h.sport, if set(SET_SPORT) { edit.sport } else { old.sport });
        prop_assert_eq!(h.traffic_class, if set(SET_DSCP) { edit.dscp * 4 + old.traffic_class % 4 } else { old.traffic_class });
        prop_assert_eq!(h.ttl, match edit.ttl_mode { TTL_SET => edit.ttl, TTL_KEEP => old.ttl, _ => old.ttl - 1 });
        prop_assert_eq!(h.udp_checksum == 0, old.udp_checksum == 0);
        let mac = if set(SET_DST_MAC) { edit.dst_mac } else { mac::group(h.family, &h.dst) };
        prop_assert_eq!((&packet.bytes()[..6], &packet.bytes()[6..12]), (&mac[..], &MAC[..]));

        // Incremental equals full: the same packet built from scratch, byte for byte behind the EtherType.
        let built = Spec {
            src: h.src, dst: h.dst, sport: h.sport, dport: h.dport, ttl: h.ttl, traffic_class: h.traffic_class, partial: false, ..spec.clone()
        }.build();
        prop_assert_eq!(&packet.bytes()[usize::from(h.l3_offset)..], &built[usize::from(old.l3_offset)..]);
        // Tags that stay are carried with their priorities; nothing outside the packet was touched.
        if edit.vlan_mode == VLAN_KEEP {
            prop_assert_eq!(&packet.bytes()[12..usize::from(h.l3_offset)], &built[12..usize::from(old.l3_offset)]);
        }
        let (low, high) = (packet.offset.min(place.0) as usize, (place.0 + place.1) as usize);
        prop_assert!(packet.frame[..low] == before[..low] && packet.frame[high..] == before[high..]);
    }

    #[test]
    fn pieces_make_no_difference(spec in spec(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5)) {
        let packet = Framed::new(&spec, ROOM);
        let (head, tail) = packet.bytes().split_at(usize::from(packet.headers.l4_offset) + 8);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(tail.len() + 1)).collect();
        cuts.extend([0, tail.len()]);
        cuts.sort_unstable();
        let mut pieces = vec![head];
        pieces.extend(cuts.windows(2).map(|cut| &tail[cut[0]..cut[1]]));
        prop_assert_eq!(inspect(&packet.headers, &pieces), packet.inspect());
    }

    #[test]
    fn one_flipped_bit_never_passes(spec in spec(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut packet = Framed::new(&Spec { no_checksum: false, partial: false, ..spec }, ROOM);
        let l4 = usize::from(packet.headers.l4_offset);
        let at = packet.offset as usize + l4 + 8 + at.index(usize::from(packet.headers.udp_len).max(9) - 8);
        prop_assume!(packet.headers.udp_len > 8);
        packet.frame[at] ^= 1 << bit;
        // Unless the field happens to hold the pseudo-header sum, which asks for finishing.
        let h = packet.headers;
        let unfinished = words(&pseudo(h.family == 6, &h.src, &h.dst, usize::from(h.udp_len))) == h.udp_checksum;
        prop_assert!(packet.inspect() == Err(DropReason::BadUdpChecksum) || unfinished);
    }
}
