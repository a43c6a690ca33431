//! Config files: read, refused with a place, written and read back.

use super::*;
use crate::rule::testing;
use proptest::prelude::*;

fn rules(source: &str) -> Vec<Rule> {
    parse("relay.toml", source).unwrap_or_else(|error| panic!("{error}\n{source}"))
}

#[test]
fn the_example_of_the_interface() {
    let source = r#"version = 1
[[rule]]
id = "itch-a"
ingress = "eth0"
match = "239.1.1.1:5000"
[[rule.output]]
egress = "eth1"
to = "239.9.9.9:6000"
ttl = "keep"
"#;
    assert_eq!(rules(source), ["eth0 239.1.1.1:5000 -> eth1 239.9.9.9:6000 ttl=keep; id=itch-a".parse().unwrap()]);
    assert_eq!(rules("version = 1"), []);
}

#[test]
fn every_key_in_every_type() {
    let source = r#"
version = 1
[[rule]]
ingress = "eth0"
match = "10.0.0.0/8@239.1.1.1"
tag = 5
except = ["10.1.0.0/16", '10.2.0.1']
path = "packet"
engine = "tx"
exact = true
join = false
output = [
  { egress = "eth1", ttl = 7, src = "egress", sport = 1_000, dscp = 46, vlan = 9, rate = 500 },
  { egress = "eth2", to = ":6000", ttl = "9", vlan = "none", rate = "2kpps" },
]
[[rule]]
ingress = "eth1"
match = "[ff3e::1]:5"
tag = "7.8"
except = "[2001:db8::]/32"
join = "no"
[[rule.output]]
egress = "eth3"
"#;
    let lines = [
        "eth0 10.0.0.0/8@239.1.1.1 -> eth1 ttl=7 src=egress sport=1000 dscp=46 vlan=9 rate=500pps, eth2 :6000 ttl=9 vlan=none rate=2kpps; tag=5 except=10.1.0.0/16 except=10.2.0.1 path=packet engine=tx exact=yes join=no",
        "eth1 [ff3e::1]:5 -> eth3; tag=7.8 except=[2001:db8::]/32 join=no",
    ];
    assert_eq!(rules(source), lines.map(|line| line.parse::<Rule>().unwrap()));
}

#[test]
fn a_message_is_one_line_whatever_it_quotes() {
    let rule = "version = 1\n[[rule]]\ningress = \"eth0\"\nmatch = \"239.1.1.1\"\n";
    for source in ["version = 1\n\"a\\nb\" = 1".to_owned(), format!("{rule}path = \"x\\ny\""), format!("{rule}path = '''x\ny'''")] {
        let error = parse("relay.toml", &source).unwrap_err().to_string();
        assert!(error.contains("\\n") && !error.contains('\n'), "{error}");
    }
}

/// A file, where it is wrong, and a part of the message.
const REFUSED: &[(&str, usize, usize, &str)] = &[
    ("", 1, 1, "version: missing"),
    ("version = 2", 1, 11, "version: this relay reads version 1"),
    ("version = \"1\"", 1, 11, "version: this relay reads version 1"),
    ("version = 1\nrules = 3", 2, 1, "rules: unknown key (did you mean `rule`?)"),
    ("version = 1\n[rule]\ningress = \"a\"", 2, 1, "rule: not an array of tables (write [[rule]])"),
    ("version = 1\nversion = 1", 2, 1, "syntax: duplicate key"),
    ("version = 1\n[[rule]\n", 2, 8, "syntax"),
    ("version = 1\n[[rule]]\nmatch = \"239.1.1.1\"", 2, 1, "ingress: missing"),
    ("version = 1\n[[rule]]\ningress = \"a\"", 2, 1, "match: missing"),
    ("version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"239.1.1.1\"", 2, 1, "output: no output"),
    ("version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"239.1.1.1\"\noutput = [5]", 5, 11, "write [[rule.output]]"),
    ("version = 1\n[[rule]]\ningress = 5\nmatch = \"239.1.1.1\"", 3, 11, "ingress: of the wrong type (a string)"),
    ("version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"239.1.1.1:x\"", 4, 20, "port: `x` is not a port"),
    ("version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"10.0.0.1@224.0.0.1\"\n[[rule.output]]\negress = \"b\"", 4, 19, "join=no"),
    ("version = 1\n[[rule]]\ningress = \"a\"\nmacth = \"239.1.1.1\"", 4, 1, "macth: unknown key (did you mean `match`?)"),
    (
        "version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"239.1.1.1\"\n[[rule.output]]\negress = \"b\"\nttll = 4",
        7,
        1,
        "did you mean `ttl`?",
    ),
    (
        "version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"239.1.1.1\"\n[[rule.output]]\negress = \"b\"\nttl = 256",
        7,
        7,
        "ttl: `256` is not dec, keep, or a TTL (1 to 255)",
    ),
    (
        "version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"239.1.1.1\"\n[[rule.output]]\negress = \"b\"\nttl = 1.5",
        7,
        7,
        "ttl: of the wrong type",
    ),
    ("version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"239.1.1.1\"\n[[rule.output]]\nttl = 5", 5, 1, "egress: missing"),
    ("version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"239.1.1.1\"\n[[rule.output]]\negress = \"a\"", 6, 10, "also the ingress"),
    (
        "version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"239.1.1.1\"\nexcept = [\"10.0.0.1\", \"[::1]\"]\n[[rule.output]]\negress = \"b\"",
        5,
        23,
        "except: not of the match's address family",
    ),
    ("version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"239.1.1.1\"\nexact = \"maybe\"\n[[rule.output]]\negress = \"b\"", 5, 9, "exact"),
    (
        "version = 1\n# ü\n[[rule]]\ningress = \"ü\"\nmatch = \"239.1.1.1\"\n[[rule.output]]\negress = \"b\" # ü\nto = \"[::1]\"",
        8,
        6,
        "to: not of the match's",
    ),
    (
        "version = 1\n[[rule]]\nid = \"x\"\ningress = \"a\"\nmatch = \"239.1.1.1\"\noutput = [{ egress = \"b\" }]\n[[rule]]\nid = \"x\"\ningress = \"a\"\nmatch = \"239.1.1.2\"\noutput = [{ egress = \"b\" }]\n[[rule]]\ningress = \"c\"\nmatch = \"239.1.1.1\"\noutput = [{ egress = \"d\" }]",
        7,
        1,
        "two rules are called x",
    ),
    (
        "version = 1\n[[rule]]\ningress = \"a\"\nmatch = \"239.1.1.1\"\noutput = [{ egress = \"b\" }]\n[[rule]]\ningress = \"b\"\nmatch = \"239.1.1.1\"\noutput = [{ egress = \"a\" }]",
        6,
        1,
        "circle",
    ),
];

#[test]
fn refusals_name_file_line_column_key_and_remedy() {
    for (source, line, column, part) in REFUSED {
        let error = parse("relay.toml", source).expect_err(source);
        assert_eq!((error.line, error.column), (*line, *column), "{error}\n{source}");
        assert!(error.to_string().contains(part), "{error}\n{source}");
        assert!(
            error.to_string().starts_with(&format!("relay.toml:{line}:{column}: {}", error.field)) && !error.hint.is_empty(),
            "{error}"
        );
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_written_set_reads_back(rules in prop::collection::vec(testing::rule(), 0..5)) {
        let mut kept = crate::rule::RuleSet::default();
        for rule in rules {
            let _ = kept.add(rule);
        }
        let file = write(kept.rules());
        let back = parse("saved.toml", &file).map_err(|error| TestCaseError::fail(format!("{error}\n{file}")))?;
        prop_assert_eq!(back, kept.rules(), "{}", file);
    }
}

#[test]
fn two_hundred_thousand_damaged_files() {
    let whole = "version = 1\n[[rule]]\nid = \"a\"\ningress = \"eth0\"\nmatch = \"10.0.0.1@239.1.1.1:5\"\ntag = 5\nexcept = [\"10.0.0.2\"]\nexact = true\n[[rule.output]]\negress = \"eth1\"\nto = \":6\"\nttl = 7\nrate = \"2kpps\"\n";
    let seeds: Vec<&str> = REFUSED.iter().map(|(source, ..)| *source).collect();
    let letters: Vec<char> = "\n\"'[]{}=#.,:/@-0179efé\t\\\u{0}\u{feff}".chars().collect();
    let mut state = 11u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut taken = 0;
    for round in 0..200_000 {
        let mut file: Vec<char> = if round % 2 == 0 { whole } else { seeds[random(seeds.len())] }.chars().collect();
        for _ in 0..=random(2) {
            let at = random(file.len() + 1);
            match random(3) {
                0 => file.insert(at, letters[random(letters.len())]),
                1 if at < file.len() => drop(file.remove(at)),
                _ if at < file.len() => file[at] = letters[random(letters.len())],
                _ => {}
            }
        }
        let file: String = file.into_iter().collect();
        match parse("f", &file) {
            Ok(rules) => {
                taken += 1;
                assert_eq!(parse("f", &write(&rules)), Ok(rules), "{file}");
            }
            Err(error) => assert!(error.line > 0 && error.line <= file.matches('\n').count() + 1 && error.column > 0, "{error}"),
        }
    }
    assert!(taken > 1000, "{taken} files taken: the damage is too harsh to prove anything");
}
