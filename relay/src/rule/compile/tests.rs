//! The tables against a scan over all rules, and map changes replayed on maps that know nothing of the compiler.

use super::*;
use crate::rule::lookup::Verdict;
use crate::rule::testing::close_match;
use crate::wire::Headers;
use proptest::prelude::*;
use std::cmp::Reverse;

/// A rule as the tables know it, with its match owned.
type Owned = (u32, u32, u32, Match);

fn inputs(rules: &[Owned]) -> Vec<CompileInput<'_>> {
    rules
        .iter()
        .map(|(ifindex, slot, serial, matching)| CompileInput { ifindex: *ifindex, slot: *slot, serial: *serial, matching })
        .collect()
}

fn compiled(rules: &[Owned], old: &Compiled) -> Compiled {
    compile(&inputs(rules), old).unwrap()
}

fn in_prefix(addr: &[u8; 16], prefix: &Prefix) -> bool {
    let bits = |bytes: [u8; 16]| u128::from_be_bytes(bytes).checked_shr(128 - u32::from(prefix.len)).unwrap_or(0);
    bits(*addr) == bits(prefix.bytes())
}

fn takes(matching: &Match, h: &Headers) -> bool {
    let tag = match matching.tag {
        TagMatch::Any => true,
        TagMatch::None => h.tag == 0,
        TagMatch::Vlan(id) => h.tag == u32::from(id),
        TagMatch::QinQ(outer, inner) => h.tag == u32::from(outer) + 65536 * u32::from(inner),
    };
    tag && in_prefix(&h.dst, &matching.group)
        && matching.port.is_none_or(|port| port == h.dport)
        && matching.source.is_none_or(|source| in_prefix(&h.src, &source))
}

/// DECISIONS §4 as written.
fn scan(rules: &[Owned], ifindex: u32, h: &Headers) -> Verdict {
    let rank = |m: &Match| (m.tag != TagMatch::Any, m.group.len, m.port.is_some(), m.source.map_or(0, |source| source.len));
    let winner = rules.iter().filter(|(at, .., m)| *at == ifindex && takes(m, h)).max_by_key(|(.., m)| rank(m));
    match winner {
        None => Verdict::Miss,
        Some((.., m)) if m.except.iter().any(|except| in_prefix(&h.src, except)) => Verdict::Except,
        Some((_, slot, serial, _)) => Verdict::Rule { slot: *slot, serial: *serial },
    }
}

/// The kernel's maps, with the program's algorithm written down again.
#[derive(Clone, Default, PartialEq, Debug)]
struct Maps {
    ingress: HashMap<u32, Vec<Shape>>,
    matches: HashMap<MatchKey, MatchEntry>,
    sources: HashMap<(u32, SourceKey), SourceVerdict>,
}

impl Maps {
    fn apply(&mut self, change: &MapChange) {
        match change.clone() {
            MapChange::SourcePut(len, key, verdict) => assert_eq!(self.sources.insert((len, key), verdict), None, "a live set was edited"),
            MapChange::EntryPut(key, entry) => assert_ne!(self.matches.insert(key, entry), Some(entry), "an unchanged entry was touched"),
            MapChange::IngressPut(ifindex, shapes) => {
                assert!(shapes.len() <= MAX_SHAPES && !shapes.is_empty());
                assert_ne!(self.ingress.insert(ifindex, shapes.clone()), Some(shapes));
            }
            MapChange::IngressDelete(ifindex) => assert!(self.ingress.remove(&ifindex).is_some()),
            MapChange::EntryDelete(key) => assert!(self.matches.remove(&key).is_some()),
            MapChange::Settle => {}
            MapChange::SourceDelete(len, key) => {
                assert!(self.matches.values().all(|entry| entry.source_set.to_be_bytes() != key.set), "a set that can be found was cut");
                assert!(self.sources.remove(&(len, key)).is_some());
            }
        }
    }

    fn longest(&self, set: u32, src: [u8; 16]) -> Option<SourceVerdict> {
        let fits = |(len, key): &(u32, SourceKey)| {
            key.set == set.to_be_bytes()
                && in_prefix(&src, &Prefix { addr: std::net::Ipv6Addr::from(key.addr).into(), len: (len - 32) as u8 })
        };
        self.sources.iter().filter(|(key, _)| fits(key)).max_by_key(|((len, _), _)| *len).map(|(_, verdict)| *verdict)
    }

    fn verdict(&self, ifindex: u32, h: &Headers) -> Verdict {
        for shape in self.ingress.get(&ifindex).into_iter().flatten() {
            if shape.family != h.family {
                continue;
            }
            let keep = u128::MAX.checked_shl(128 - u32::from(shape.group_len)).unwrap_or(0);
            let addr = (u128::from_be_bytes(h.dst) & keep).to_be_bytes();
            let key = MatchKey {
                ifindex,
                tag: if shape.tag_mode == 1 { 0 } else { h.tag },
                addr,
                port: if shape.port_mode == 1 { 0 } else { h.dport },
                zero: 0,
                shape: *shape,
            };
            let Some(entry) = self.matches.get(&key) else { continue };
            let source = if entry.source_set == 0 { None } else { self.longest(entry.source_set, h.src) };
            match source {
                Some(verdict) if verdict.slot == NO_SLOT => return Verdict::Except,
                Some(verdict) => return Verdict::Rule { slot: verdict.slot, serial: verdict.serial },
                None if entry.slot != NO_SLOT => return Verdict::Rule { slot: entry.slot, serial: entry.serial },
                None => {}
            }
        }
        Verdict::Miss
    }

    fn of(tables: &Compiled) -> Self {
        let mut maps = Self::default();
        diff(&Compiled::default(), tables).iter().for_each(|change| maps.apply(change));
        maps
    }
}

/// Rules without two of the same match, numbered from slot `first`.
fn rules(first: u32, count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Owned>> {
    prop::collection::vec((1u32..3, close_match()), count).prop_map(move |matches| {
        let mut seen = BTreeSet::new();
        let mut fresh = |ifindex: u32, m: &Match| seen.insert((ifindex, m.tag, m.group, m.port, m.source));
        let kept = matches.into_iter().filter(|(ifindex, m)| fresh(*ifindex, m));
        kept.zip(first..).map(|((ifindex, m), slot)| (ifindex, slot, slot * 10, m)).collect()
    })
}

fn packets() -> impl Strategy<Value = Vec<(u32, Headers)>> {
    let tag = prop::sample::select(vec![0u32, 0, 5, 6, 5 | 6 << 16]);
    let packet = (1u32..4, tag, 0u8..3, 0u8..3, 0u8..3, 0u8..3, (0u8..3, 0u8..3), prop::sample::select(vec![5000u16, 5001, 1])).prop_map(
        |(ifindex, tag, b, c, d, sb, (sc, sd), dport)| {
            let mut h = Headers { tag, family: 4, dport, ..Headers::default() };
            h.dst[..4].copy_from_slice(&[239, b, c, d]);
            h.src[..4].copy_from_slice(&[10 + u8::from(sb == 2), sb, sc, sd]);
            (ifindex, h)
        },
    );
    prop::collection::vec(packet, 40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn tables_decide_as_the_scan_over_all_rules(rules in rules(0, 1..14), packets in packets()) {
        let tables = compiled(&rules, &Compiled::default());
        let maps = Maps::of(&tables);
        for (ifindex, h) in &packets {
            let want = scan(&rules, *ifindex, h);
            prop_assert_eq!(tables.lookup(*ifindex, h), want);
            prop_assert_eq!(maps.verdict(*ifindex, h), want);
        }
    }

    #[test]
    fn changes_lead_from_any_tables_to_any_others(old in rules(0, 0..10), new in rules(5, 0..10), kept in 0usize..10, packets in packets()) {
        // Some of the old rules stay as they are, so that there is something not to touch.
        let kept: Vec<Owned> = old.iter().take(kept).cloned().collect();
        let is_free = |rule: &Owned| kept.iter().all(|k| (k.0, k.3.tag, k.3.group, k.3.port, k.3.source) != (rule.0, rule.3.tag, rule.3.group, rule.3.port, rule.3.source));
        let new: Vec<Owned> = kept.iter().cloned().chain(new.into_iter().filter(|rule| is_free(rule)).map(|(i, slot, serial, m)| (i, slot + 100, serial, m))).collect();
        let before = compiled(&old, &Compiled::default());
        let after = compiled(&new, &before);
        let mut maps = Maps::of(&before);
        diff(&before, &after).iter().for_each(|change| maps.apply(change));
        prop_assert_eq!(&maps, &Maps::of(&after));
        for (ifindex, h) in &packets {
            prop_assert_eq!(maps.verdict(*ifindex, h), scan(&new, *ifindex, h));
        }
        prop_assert_eq!(diff(&after, &compiled(&new, &after)), vec![]);
    }

    #[test]
    fn rules_more_or_less_are_one_step_for_every_packet(rules in rules(0, 1..12), kept in 0usize..12, packets in packets()) {
        let kept = &rules[kept.min(rules.len())..];
        let before = compiled(kept, &Compiled::default());
        let with = compiled(&rules, &before);
        let without = compiled(kept, &with);
        for (from, to) in [(&before, &with), (&with, &without)] {
            let mut maps = Maps::of(from);
            for change in diff(from, to) {
                maps.apply(&change);
                for (ifindex, h) in &packets {
                    let verdict = maps.verdict(*ifindex, h);
                    prop_assert!([from.lookup(*ifindex, h), to.lookup(*ifindex, h)].contains(&verdict), "{:?}: {:?}", change, verdict);
                }
            }
        }
    }
}

fn rule(line: &str, slot: u32) -> Owned {
    (1, slot, slot, line.parse::<crate::rule::Rule>().unwrap().matching)
}

#[test]
fn shapes_stand_in_order_of_precedence() {
    let lines = [
        "a 239.0.0.0/8 -> b; tag=any",
        "a 239.1.1.1 -> b",
        "a 239.0.0.0/8:5 -> b",
        "a 239.1.1.1:5 -> b; tag=any",
        "a 239.1.1.1:5 -> b; tag=7",
        "a [ff3e::1] -> b",
    ];
    let rules: Vec<Owned> = lines.iter().zip(0..).map(|(line, slot)| rule(line, slot)).collect();
    let tables = compiled(&rules, &Compiled::default());
    let order: Vec<_> = tables.ingresses[&1]
        .iter()
        .filter(|shape| shape.family == 4)
        .map(|shape| (shape.tag_mode, shape.group_len, shape.port_mode))
        .collect();
    assert_eq!(order, [(0, 32, 0), (0, 32, 1), (0, 8, 0), (1, 32, 0), (1, 8, 1)]);
    assert!(tables.ingresses[&1].is_sorted_by_key(|shape| (shape.tag_mode, Reverse(shape.group_len), shape.port_mode)));
}

#[test]
fn an_unchanged_source_set_keeps_its_number_and_a_changed_one_gets_a_new_one() {
    let rules = [rule("a 239.1.1.1 -> b; except=10.0.0.1", 0), rule("a 239.1.1.2 -> b; except=10.0.0.1", 1)];
    let first = compiled(&rules, &Compiled::default());
    let changed = [rule("a 239.1.1.1 -> b; except=10.0.0.1", 0), rule("a 239.1.1.2 -> b; except=10.0.0.2", 1)];
    let second = compiled(&changed, &first);
    let number = |tables: &Compiled, last: u8| tables.entries.iter().find(|(key, _)| key.addr[3] == last).unwrap().1.source_set;
    assert_eq!(number(&first, 1), number(&second, 1));
    let (old, new) = (number(&first, 2), number(&second, 2));
    assert!(old != new && !first.sets.contains_key(&new) && new != 0);
    let changes = diff(&first, &second);
    let settle = changes.iter().position(|change| *change == MapChange::Settle).unwrap();
    assert!(matches!(changes[0], MapChange::SourcePut(64, key, _) if key.set == new.to_be_bytes()));
    assert!(matches!(changes[1], MapChange::EntryPut(_, entry) if entry.source_set == new));
    assert!(changes[settle + 1..].iter().all(|change| matches!(change, MapChange::SourceDelete(64, key) if key.set == old.to_be_bytes())));
    assert_eq!((settle, changes.len()), (2, 4));
    // A number that was used once never comes back.
    let third = compiled(&rules, &compiled(&[], &second));
    assert!(third.sets.keys().all(|number| !first.sets.contains_key(number) && !second.sets.contains_key(number)));
}

#[test]
fn tables_that_would_not_fit_are_refused() {
    let many: Vec<Owned> = (8..25).map(|len| rule(&format!("a 239.0.0.0/{len} -> b"), len)).collect();
    assert_eq!(compile(&inputs(&many), &Compiled::default()).err(), Some(CompileError::Shapes { ifindex: 1, count: 17 }));
    let twice = [rule("a 239.1.1.1 -> b", 3), rule("a 239.1.1.1 -> b; except=10.0.0.1", 4)];
    assert_eq!(compile(&inputs(&twice), &Compiled::default()).err(), Some(CompileError::Same(3, 4)));
    let matches: Vec<Owned> = (0..=MAX_MATCHES).map(|n| rule(&format!("a 239.{}.{}.{} -> b", n >> 16, n >> 8 & 255, n & 255), n)).collect();
    assert_eq!(compile(&inputs(&matches), &Compiled::default()).err(), Some(CompileError::Matches(MAX_MATCHES as usize + 1)));
}

#[test]
fn too_many_shapes_of_both_generations_are_swapped_in_one_step() {
    let old: Vec<Owned> = (8u32..24).map(|len| rule(&format!("a 239.0.0.0/{len} -> b"), len)).collect();
    let new: Vec<Owned> = (9u32..25).map(|len| rule(&format!("a 239.0.0.0/{len}:5 -> b"), 100 + len)).collect();
    let before = compiled(&old, &Compiled::default());
    let after = compiled(&new, &before);
    let mut maps = Maps::of(&before);
    let changes = diff(&before, &after);
    assert_eq!(changes.iter().filter(|change| matches!(change, MapChange::IngressPut(..))).count(), 1);
    let mut h = Headers { family: 4, dport: 5, ..Headers::default() };
    h.dst[0] = 239;
    for change in &changes {
        maps.apply(change);
        let verdict = maps.verdict(1, &h);
        assert!([before.lookup(1, &h), after.lookup(1, &h)].contains(&verdict), "{verdict:?}");
    }
    assert_eq!(maps, Maps::of(&after));
}

#[test]
fn a_source_that_loses_its_rule_never_meets_a_wider_rule_that_goes_too() {
    let lines = ["a 10.0.0.1@239.1.1.1 -> b", "a 10.0.0.2@239.1.1.1 -> b", "a 239.1.0.0/16 -> b"];
    let rules: Vec<Owned> = lines.iter().zip(0..).map(|(line, slot)| rule(line, slot)).collect();
    let before = compiled(&rules, &Compiled::default());
    let after = compiled(&rules[1..2], &before);
    let mut h = Headers { family: 4, ..Headers::default() };
    h.dst[..4].copy_from_slice(&[239, 1, 1, 1]);
    h.src[..4].copy_from_slice(&[10, 0, 0, 1]);
    let mut maps = Maps::of(&before);
    for change in diff(&before, &after) {
        maps.apply(&change);
        assert_ne!(maps.verdict(1, &h), Verdict::Rule { slot: 2, serial: 2 }, "{change:?}");
    }
    assert_eq!(maps.verdict(1, &h), Verdict::Miss);
}
