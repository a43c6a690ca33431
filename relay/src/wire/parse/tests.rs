//! The parser against the second parser, verdict by verdict and on random damage.

use super::testing::{Spec, reference, spec};
use super::*;
use proptest::prelude::*;

fn verdict(frame: &[u8]) -> Result<Headers, ParseVerdict> {
    let result = parse(frame, frame.len());
    assert_eq!(result, reference(frame), "{frame:02x?}");
    result
}

/// Sets bytes of a built packet and returns the verdict.
fn changed(spec: &Spec, edits: &[(usize, u8)]) -> ParseVerdict {
    let mut frame = spec.build();
    edits.iter().for_each(|&(at, byte)| frame[at] = byte);
    verdict(&frame).unwrap_err()
}

#[test]
fn reads_a_plain_packet() {
    let h = verdict(&Spec::v4().build()).unwrap();
    assert_eq!((h.sport, h.dport, h.ttl, h.family, h.tag, h.tag_count), (4000, 5000, 8, 4, 0, 0));
    assert_eq!((h.l3_offset, h.l4_offset, h.udp_len, h.l3_len), (14, 34, 19, 39));
    assert_eq!(&h.dst[..5], &[239, 1, 1, 1, 0]);
    let h = verdict(&Spec::v6().build()).unwrap();
    assert_eq!((h.family, h.l4_offset, h.l3_len, h.dst[0], h.dst[15]), (6, 54, 59, 0xff, 0x34));
}

#[test]
fn reads_tags() {
    for (tags, tag) in [(vec![0], 0), (vec![7], 7), (vec![7, 9], 7 | 9 << 16), (vec![0, 9], 9 << 16), (vec![7, 0], 7)] {
        let h = verdict(&Spec { tags: tags.clone(), ..Spec::v4() }.build()).unwrap();
        assert_eq!((h.tag, usize::from(h.tag_count)), (tag, tags.len()));
    }
    assert_eq!(verdict(&Spec { tags: vec![1, 2, 3], ..Spec::v4() }.build()), Err(ParseVerdict::TagDepth));
}

#[test]
fn every_pass_reason_has_its_verdict() {
    let (v4, v6) = (Spec::v4(), Spec::v6());
    let protocols = [(2, ParseVerdict::Igmp), (1, ParseVerdict::Icmp), (103, ParseVerdict::Pim), (6, ParseVerdict::NotUdp)];
    protocols.iter().for_each(|&(number, want)| assert_eq!(changed(&v4, &[(23, number)]), want));
    let next = [(58, ParseVerdict::Icmpv6), (44, ParseVerdict::Fragment), (103, ParseVerdict::Pim), (6, ParseVerdict::NotUdp)];
    next.iter().for_each(|&(number, want)| assert_eq!(changed(&v6, &[(20, number)]), want));
    for number in [0, 43, 60, 51, 135, 139, 140] {
        assert_eq!(changed(&v6, &[(20, number)]), ParseVerdict::Extension);
    }
    assert_eq!(changed(&v4, &[(20, 0x20)]), ParseVerdict::Fragment);
    assert_eq!(changed(&v4, &[(21, 0x01)]), ParseVerdict::Fragment);
    assert_eq!(changed(&v4, &[(12, 0x08), (13, 0x06)]), ParseVerdict::NotIp);
    assert_eq!(changed(&v4, &[(14, 0x44)]), ParseVerdict::Malformed);
    assert_eq!(changed(&v4, &[(14, 0x65)]), ParseVerdict::Malformed);
    assert_eq!(changed(&v4, &[(17, 40)]), ParseVerdict::Malformed);
    assert_eq!(changed(&v4, &[(39, 7)]), ParseVerdict::Malformed);
    assert_eq!(changed(&v4, &[(39, 20)]), ParseVerdict::Malformed);
    assert_eq!(changed(&v6, &[(19, 7)]), ParseVerdict::Malformed);
}

#[test]
fn every_verdict_has_a_counter_of_its_own() {
    use ParseVerdict::*;
    let all = [NotIp, Igmp, Icmp, Icmpv6, Pim, NotUdp, Fragment, Extension, TagDepth, Malformed];
    let counters: std::collections::HashSet<_> = all.iter().map(|verdict| verdict.counter()).collect();
    assert_eq!(counters.len(), all.len());
}

#[test]
fn any_truncation_is_malformed() {
    for spec in [Spec::v4(), Spec::v6(), Spec { tags: vec![5, 6], options: 3, ..Spec::v4() }] {
        let frame = spec.build();
        for len in 0..frame.len() {
            assert_eq!(verdict(&frame[..len]), Err(ParseVerdict::Malformed), "cut to {len}");
        }
    }
}

#[test]
fn the_payload_may_lie_in_later_pieces_but_no_header() {
    let frame = Spec::v4().build();
    assert_eq!(parse(&frame[..42], frame.len()), verdict(&frame));
    assert_eq!(parse(&frame[..41], frame.len()), Err(ParseVerdict::Malformed));
}

/// A small deterministic generator (SplitMix64), so that 200,000 inputs are the same on every run.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[test]
fn agrees_with_the_reference_on_damaged_packets() {
    let seeds = [Spec::v4(), Spec::v6(), Spec { tags: vec![5], options: 2, ..Spec::v4() }, Spec { tags: vec![5, 6], ..Spec::v6() }];
    let seeds: Vec<Vec<u8>> = seeds.iter().map(Spec::build).collect();
    let mut state = 1;
    let mut accepted = 0;
    for round in 0..250_000 {
        let mut frame = seeds[round % seeds.len()].clone();
        for _ in 0..random(&mut state) % 4 {
            let at = random(&mut state) as usize % frame.len().min(60);
            frame[at] = match random(&mut state) % 3 {
                0 => random(&mut state) as u8,
                1 => frame[at] ^ 1 << (random(&mut state) % 8),
                _ => [0, 0xff, 0x08, 0x81, 0x88, 0xa8, 0x11][random(&mut state) as usize % 7],
            };
        }
        if random(&mut state).is_multiple_of(8) {
            frame.truncate(random(&mut state) as usize % (frame.len() + 1));
        }
        accepted += usize::from(verdict(&frame).is_ok());
    }
    assert!((10_000..240_000).contains(&accepted), "{accepted} accepted: the damage is too mild or too harsh");
}

proptest! {
    #[test]
    fn reads_what_was_built(spec in spec()) {
        let h = verdict(&spec.build()).unwrap();
        prop_assert_eq!((h.src, h.dst, h.sport, h.dport, h.ttl, h.traffic_class), (spec.src, spec.dst, spec.sport, spec.dport, spec.ttl, spec.traffic_class));
        prop_assert_eq!((h.tag_count as usize, h.family == 6, h.udp_len as usize), (spec.tags.len(), spec.v6, spec.payload.len() + 8));
    }
}
