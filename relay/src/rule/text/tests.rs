//! The rule language: what INTERFACE.md shows is taken, what it refuses is refused with field, column and remedy.

use super::*;
use crate::rule::testing;
use proptest::prelude::*;

fn parse(line: &str) -> Rule {
    line.parse().unwrap_or_else(|error| panic!("{line}: {error}"))
}

fn refused(line: &str) -> RuleError {
    line.parse::<Rule>().expect_err(line)
}

#[test]
fn the_examples_of_the_interface() {
    for (line, canonical) in [
        ("eth0 239.1.1.1:5000 -> eth1", None),
        ("eth0 239.1.1.1:5000 -> eth1 239.9.9.9:6000 ttl=keep, eth2 10.0.0.5:6000 src=egress", None),
        (
            "eth0 10.1.0.7@232.1.1.1:5000 -> eth1 ttl=16 dscp=46        # source-specific",
            Some("eth0 10.1.0.7@232.1.1.1:5000 -> eth1 ttl=16 dscp=46"),
        ),
        ("eth0 [ff3e::1234]:5000 -> eth1", None),
        (
            "eth0 10.0.0.9:7000 -> eth1 239.1.2.3:7000                  # unicast in, multicast out",
            Some("eth0 10.0.0.9:7000 -> eth1 239.1.2.3:7000"),
        ),
        ("eth0 [2001:db8::1]/128@[ff3e::]/32:5000 -> eth1 :6000", Some("eth0 [2001:db8::1]@[ff3e::]/32:5000 -> eth1 :6000")),
        (
            "eth0  239.1.0.0/16->eth1,eth2 vlan=7 rate=20000pps ;join=no id=a",
            Some("eth0 239.1.0.0/16 -> eth1, eth2 vlan=7 rate=20kpps; id=a join=no"),
        ),
        (
            "a 0.0.0.0/0@239.1.1.1 -> b; tag=5.6 except=10.0.0.0/8 except=11.1.1.1 path=xsk engine=tx exact=yes",
            Some("a 239.1.1.1 -> b; tag=5.6 except=10.0.0.0/8 except=11.1.1.1 path=xsk engine=tx exact=yes"),
        ),
        ("eth0 224.0.0.251:5353 -> eth1; join=no", None),
        (
            "eth0 239.1.1.1 -> eth1 ttl=dec src=keep sport=keep dscp=keep vlan=keep; tag=none path=auto engine=auto exact=no join=yes",
            Some("eth0 239.1.1.1 -> eth1"),
        ),
    ] {
        assert_eq!(parse(line).to_string(), canonical.unwrap_or(line));
    }
}

#[test]
fn values_land_where_they_belong() {
    let rule =
        parse("eth0 10.0.0.0/8@239.1.1.1:5000 -> eth1 239.9.9.9:6000 ttl=16 src=10.9.9.9 sport=7 dscp=46 vlan=none rate=3Mpps; tag=any");
    let output = &rule.outputs[0];
    assert_eq!((output.to, output.port), (Some("239.9.9.9".parse().unwrap()), Some(6000)));
    assert_eq!(
        (output.ttl, output.sport, output.dscp, output.vlan, output.rate),
        (Ttl::Set(16), Some(7), Some(46), VlanEdit::None, Some(3_000_000))
    );
    assert_eq!((rule.matching.tag, rule.matching.port, rule.join, rule.exact), (TagMatch::Any, Some(5000), true, false));
    assert_eq!(rule.match_text(), "10.0.0.0/8@239.1.1.1:5000");
}

/// line, field, column, a part of problem or hint.
const REFUSED: &[(&str, &str, usize, &str)] = &[
    ("", "ingress", 1, "missing"),
    ("eth0", "match", 5, "missing"),
    ("eth0 239.1.1.1", "output", 15, "`->` missing"),
    ("eth0 239.1.1.1 ->", "egress", 18, "missing"),
    ("eth0 239.1.1.1 -> eth1,", "egress", 24, "missing"),
    ("eth0 239.1.1.1 5000 -> eth1", "match", 16, "`5000` before the arrow"),
    ("et@0 239.1.1.1 -> eth1", "ingress", 3, "`@`"),
    ("et/0 239.1.1.1 -> eth1", "ingress", 3, "`/`"),
    ("interface-name-16 239.1.1.1 -> eth1", "ingress", 1, "at most 15"),
    ("eth0 239.1.1.1 -> eth[1", "egress", 22, "`[`"),
    ("eth0 239.1.1.1 -> eth1 ->", "to", 24, "`->` is no address"),
    ("eth0 239.1.1.1 -> eth0", "egress", 19, "also the ingress"),
    ("eth0 239.1.1.256 -> eth1", "group", 6, "no address"),
    ("eth0 ff3e::1:5000 -> eth1", "group", 6, "write [ff3e::1:5000]"),
    ("eth0 [ff3e::1 -> eth1", "group", 6, "without `]`"),
    ("eth0 [ff3e::1]x -> eth1", "group", 15, "`x` after the address"),
    ("eth0 [239.1.1.1] -> eth1", "group", 6, "no address"),
    ("eth0 239.1.1.1:0 -> eth1", "port", 16, "leave the port out"),
    ("eth0 239.1.1.1:5000-5010 -> eth1", "port", 16, "port ranges don't exist"),
    ("eth0 239.1.1.1:65536 -> eth1", "port", 16, "1 to 65535"),
    ("eth0 239.1.1.1:+5 -> eth1", "port", 16, "not a port"),
    ("eth0 239.1.1.1/16 -> eth1", "group", 6, "write 239.1.0.0/16"),
    ("eth0 239.1.1.1/33 -> eth1", "group", 16, "0 to 32"),
    ("eth0 192.0.0.0/2 -> eth1", "group", 6, "not within 224.0.0.0/4"),
    ("eth0 10.0.0.0/8 -> eth1 239.1.1.1", "group", 6, "unicast takes one address"),
    ("eth0 0.0.0.0 -> eth1", "group", 6, "neither a group"),
    ("eth0 224.0.0.5 -> eth1", "group", 6, "join=no"),
    ("eth0 224.0.0.0/4 -> eth1", "group", 6, "join=no"),
    ("eth0 [ff02::fb]:5353 -> eth1", "group", 6, "join=no"),
    ("eth0 [::1]@239.1.1.1 -> eth1", "source", 6, "address family"),
    ("eth0 [::]/0@239.1.1.1 -> eth1", "source", 6, "address family"),
    ("eth0 239.2.2.2@239.1.1.1 -> eth1", "source", 6, "sources are unicast"),
    ("eth0 10.0.0.1:5@239.1.1.1 -> eth1", "source", 15, "port has no place"),
    ("eth0 10.0.0.1@239.1.1.1@x -> eth1", "group", 15, "no address"),
    ("eth0 10.0.0.1@224.0.0.1 -> eth1", "group", 15, "join=no"),
    ("eth0 239.1.1.1 -> eth1 [ff3e::1]", "to", 24, "address family"),
    ("eth0 239.1.1.1 -> eth1, eth2 0.0.0.0", "to", 30, "no destination"),
    ("eth0 239.1.1.1 -> eth1 10.0.0.0/8:5", "to", 32, "no prefix"),
    ("eth0 239.1.1.1 -> eth1 10.0.0.1:x", "to", 33, "not a port"),
    ("eth0 239.1.1.1 -> eth1 src=224.1.1.1", "src", 28, "no source address"),
    ("eth0 239.1.1.1 -> eth1 src=[::1]", "src", 28, "address family"),
    ("eth0 239.1.1.1 -> eth1 ttl=0", "ttl", 28, "1 to 255"),
    ("eth0 239.1.1.1 -> eth1 ttl=256", "ttl", 28, "1 to 255"),
    ("eth0 239.1.1.1 -> eth1 dscp=64", "dscp", 29, "0 to 63"),
    ("eth0 239.1.1.1 -> eth1 vlan=4095", "vlan", 29, "1 to 4094"),
    ("eth0 239.1.1.1 -> eth1 vlan=0", "vlan", 29, "1 to 4094"),
    ("eth0 239.1.1.1 -> eth1 sport=0", "sport", 30, "port 0"),
    ("eth0 239.1.1.1 -> eth1 rate=0pps", "rate", 29, "20kpps"),
    ("eth0 239.1.1.1 -> eth1 rate=5", "rate", 29, "20kpps"),
    ("eth0 239.1.1.1 -> eth1 rate=99999999999999999999Mpps", "rate", 29, "20kpps"),
    ("eth0 239.1.1.1 -> eth1 tll=4", "key", 24, "did you mean `ttl`?"),
    ("eth0 239.1.1.1 -> eth1 ttl=4 ttl=5", "key", 30, "twice"),
    ("eth0 239.1.1.1 -> eth1 ttl=4 keep", "key", 30, "no key=value"),
    ("eth0 239.1.1.1 -> eth1 id=a", "key", 24, "after `;`"),
    ("eth0 239.1.1.1 -> eth1; ttl=4", "key", 25, "before `;`"),
    ("eth0 239.1.1.1 -> eth1; id=a;join=no", "id", 28, "no rule id"),
    ("eth0 239.1.1.1 -> eth1; id=", "id", 28, "1 to 64"),
    ("eth0 239.1.1.1 -> eth1; id=a id=b", "key", 30, "twice"),
    ("eth0 239.1.1.1 -> eth1; tag=4095", "tag", 29, "1 to 4094"),
    ("eth0 239.1.1.1 -> eth1; tag=0", "tag", 29, "1 to 4094"),
    ("eth0 239.1.1.1 -> eth1; tag=5.x", "tag", 29, "none, any"),
    ("eth0 239.1.1.1 -> eth1; except=[::1]", "except", 32, "address family"),
    ("eth0 239.1.1.1 -> eth1; except=10.0.0.0/8 except=10.0.0.1/8", "except", 50, "10.0.0.0/8"),
    ("eth0 239.1.1.1 -> eth1; path=xks", "path", 30, "did you mean `xsk`?"),
    ("eth0 239.1.1.1 -> eth1; engine=fast", "engine", 32, "auto, tx, coalesce"),
    ("eth0 239.1.1.1 -> eth1; join=true", "join", 30, "yes, no"),
    ("ä 239.1.1.1 -> ö ttl=0", "ttl", 22, "1 to 255"),
];

#[test]
fn refusals_name_field_column_and_remedy() {
    for (line, field, column, part) in REFUSED {
        let error = refused(line);
        assert_eq!((error.field, error.column), (*field, *column), "{line}: {error}");
        assert!(error.to_string().contains(part), "{line}: {error}");
        assert!(!error.hint.is_empty() && !error.to_string().contains('\n'), "{line}: {error}");
    }
}

#[test]
fn the_default_id_is_stable_for_ever() {
    // Scripts keep these: a change of these letters is a change of the interface.
    assert_eq!(parse("eth0 239.1.1.1:5000 -> eth1").id, "r-cf304544c1");
    assert_eq!(parse("eth0 10.1.0.7@232.1.1.1 -> eth1; tag=5.6").id, "r-cd4b311347");
}

#[test]
fn the_default_id_follows_ingress_tag_and_match_alone() {
    let id = parse("eth0 239.1.1.1:5000 -> eth1").id;
    for same in ["eth0 239.1.1.1:5000 -> eth2 ttl=3; path=xsk", "eth0 239.1.1.1/32:5000 -> eth1; except=10.0.0.1"] {
        assert_eq!(parse(same).id, id);
    }
    for other in ["eth1 239.1.1.1:5000 -> eth2", "eth0 239.1.1.1 -> eth1", "eth0 239.1.1.1:5000 -> eth1; tag=any"] {
        assert_ne!(parse(other).id, id);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_canonical_line_parses_back(rule in testing::rule()) {
        prop_assume!(check::check(&rule).is_ok());
        let line = rule.to_string();
        let back: Rule = line.parse().map_err(|error| TestCaseError::fail(format!("{line}: {error}")))?;
        prop_assert_eq!(&back, &rule, "{}", line);
        prop_assert_eq!(back.to_string(), line);
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,60}", words in prop::collection::vec(prop::sample::select(vec![" ", "->", ",", ";", "=", "@", "[", "]", ":", "/", "#", "eth0", "239.1.1.1", "ttl", "except", "ff3e::1", "é", "\u{2003}"]), 0..30)) {
        let _ = text.parse::<Rule>();
        let _ = words.concat().parse::<Rule>();
    }
}

#[test]
fn two_hundred_thousand_damaged_lines() {
    let seeds: Vec<&str> = REFUSED
        .iter()
        .map(|(line, ..)| *line)
        .chain(["eth0 10.0.0.0/8@239.1.1.1:5000 -> eth1 239.9.9.9:6000 ttl=16 src=egress, eth2 vlan=none; tag=5.6 except=10.0.0.1"])
        .collect();
    let letters: Vec<char> = " ->,;=@[]:/#.0129afétl\t\u{0}\u{2028}".chars().collect();
    let mut state = 7u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut taken = 0;
    for round in 0..200_000 {
        let mut line: Vec<char> = seeds[if round % 2 == 0 { seeds.len() - 1 } else { random(seeds.len()) }].chars().collect();
        for _ in 0..=random(3) {
            let at = random(line.len() + 1);
            match random(3) {
                0 => line.insert(at, letters[random(letters.len())]),
                1 if at < line.len() => drop(line.remove(at)),
                _ if at < line.len() => line[at] = letters[random(letters.len())],
                _ => {}
            }
        }
        let line: String = line.into_iter().collect();
        match line.parse::<Rule>() {
            Ok(rule) => {
                taken += 1;
                assert_eq!(rule.to_string().parse(), Ok(rule), "{line}");
            }
            Err(error) => assert!(error.column <= line.chars().count() + 1 && error.column > 0, "{line}: {error}"),
        }
    }
    assert!(taken > 1000, "{taken} lines taken: the damage is too harsh to prove anything");
}
