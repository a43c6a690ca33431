//! Sets of rules: what is refused between rules, and that a refusal changes nothing.

use super::*;

fn rule(line: &str) -> Rule {
    line.parse().unwrap_or_else(|error| panic!("{line}: {error}"))
}

fn set(lines: &[&str]) -> Result<RuleSet, SetError> {
    RuleSet::new(lines.iter().map(|line| rule(line)).collect())
}

fn error(lines: &[&str]) -> String {
    set(lines).expect_err(&lines.join("\n")).to_string()
}

#[test]
fn the_same_match_twice_names_both_rules_and_apply() {
    let text = error(&["eth0 239.1.1.1:5000 -> eth1; id=a", "eth0 239.1.1.1/32:5000 -> eth2; id=b"]);
    assert!(text.contains("rules a and b") && text.contains("eth0 239.1.1.1:5000") && text.contains("apply"), "{text}");
    let text = error(&["eth0 239.1.1.1 -> eth1", "eth0 239.1.1.1 -> eth2"]);
    assert!(text.contains("apply"), "the same default id is the same match first: {text}");
    assert!(set(&["eth0 239.1.1.1 -> eth1; id=a", "eth0 239.1.1.1 -> eth1; id=b except=10.0.0.1"]).is_err());
    let disjoint = [
        "eth0 239.1.1.1 -> eth1",
        "eth0 239.1.1.1 -> eth1; tag=any",
        "eth0 239.1.1.1 -> eth1; tag=5",
        "eth2 239.1.1.1 -> eth1",
        "eth0 239.1.1.1:1 -> eth1",
        "eth0 10.0.0.0/8@239.1.1.1 -> eth1",
        "eth0 10.0.0.0/9@239.1.1.1 -> eth1",
        "eth0 239.1.1.0/24 -> eth1",
    ];
    set(&disjoint).unwrap();
}

#[test]
fn a_source_of_length_0_is_no_source() {
    let mut any = rule("eth0 239.1.1.1 -> eth1; id=a");
    any.matching.source = Some(Prefix::new("0.0.0.0".parse().unwrap(), 0));
    assert!(matches!(RuleSet::new(vec![any, rule("eth0 239.1.1.1 -> eth1; id=b")]), Err(SetError::SameMatch { .. })));
}

#[test]
fn one_name_is_one_rule() {
    let text = error(&["eth0 239.1.1.1 -> eth1; id=a", "eth0 239.1.1.2 -> eth1; id=a"]);
    assert!(text.contains("two rules are called a") && text.contains("239.1.1.2"), "{text}");
}

#[test]
fn rules_in_a_circle_are_refused() {
    for circle in [
        &["a 239.1.1.1 -> b", "b 239.1.1.1 -> a"][..],
        &["a 239.1.1.1 -> b", "b 239.1.0.0/16 -> c", "c 239.0.0.0/8 -> a"],
        &["a 239.1.1.1:5 -> b 239.2.2.2:6", "b 239.2.2.2:6 -> a 239.1.1.1:5"],
        &["a 239.1.1.1 -> x, b", "b 239.1.1.1 -> y, a src=egress"],
        &["a 239.1.1.1 -> b vlan=5", "b 239.1.1.1 -> a vlan=none; tag=5"],
        &["x 239.1.1.1 -> a", "a 239.1.1.1 -> b src=10.0.0.1", "b 10.0.0.0/8@239.1.1.1 -> a"],
    ] {
        let text = error(circle);
        assert!(text.contains("circle") && text.contains("->"), "{text}");
    }
    let text = error(&["a 239.1.1.1 -> b; id=one", "x 239.1.1.1 -> a; id=zero", "b 239.1.1.1 -> a; id=two"]);
    assert!(text.contains("one -> two -> one") || text.contains("two -> one -> two"), "{text}");
}

#[test]
fn what_looks_like_a_circle_but_is_none_is_taken() {
    for fine in [
        &["a 239.1.1.1 -> b", "b 239.1.1.2 -> a"][..],
        &["a 239.1.1.1 -> b 239.2.2.2", "b 239.1.1.1 -> a"],
        &["a 239.1.1.1:5 -> b :6", "b 239.1.1.1:5 -> a"],
        &["a 239.1.1.1 -> b vlan=5", "b 239.1.1.1 -> a"],
        &["a 239.1.1.1 -> b src=10.0.0.1", "b 239.1.1.1 -> a; except=10.0.0.1"],
        &["a 10.0.0.0/8@239.1.1.1 -> b", "b 11.0.0.0/8@239.1.1.1 -> a"],
        &["a 239.1.1.1 -> b", "b 239.1.1.1 -> c", "a 239.1.1.2 -> c", "c 239.1.1.3 -> a"],
        &["a [ff3e::1] -> b", "b 239.1.1.1 -> a"],
    ] {
        set(fine).unwrap();
    }
}

#[test]
fn an_ingress_has_sixteen_shapes_at_most() {
    let line = |len: u8| format!("eth0 239.0.0.0/{len} -> eth1");
    let mut rules: Vec<Rule> = (8..24).map(|len| rule(&line(len))).collect();
    RuleSet::new(rules.clone()).unwrap();
    rules.push(rule("eth9 239.0.0.0/30 -> eth1"));
    rules.push(rule(&line(24)));
    let text = RuleSet::new(rules).unwrap_err().to_string();
    assert!(text.contains("eth0") && text.contains("17") && text.contains("16"), "{text}");
}

#[test]
fn a_refused_change_changes_nothing() {
    let mut rules = set(&["eth0 239.1.1.1 -> eth1; id=a", "eth0 239.1.1.2 -> eth1; id=b"]).unwrap();
    let before = rules.clone();
    assert!(rules.add(rule("eth0 239.1.1.2 -> eth3; id=c")).is_err());
    assert!(rules.add(rule("eth0 239.1.1.3 -> eth3; id=a")).is_err());
    assert!(rules.replace_all(vec![rule("eth0 239.1.1.1 -> eth1"), rule("eth0 239.1.1.1 -> eth2")]).is_err());
    let mut broken = rule("eth0 239.1.1.9 -> eth1; id=c");
    broken.outputs.clear();
    assert!(matches!(rules.add(broken), Err(SetError::Invalid { field: "output", .. })));
    assert_eq!(rules.remove("aa").unwrap_err().to_string(), "id: no rule aa (did you mean a?)");
    assert_eq!(rules, before);
}

#[test]
fn sets_differ_by_id() {
    let mut rules = set(&["eth0 239.1.1.1 -> eth1; id=a", "eth0 239.1.1.2 -> eth1; id=b", "eth0 239.1.1.3 -> eth1; id=c"]).unwrap();
    let new = ["eth0 239.1.1.4 -> eth1; id=d", "eth0 239.1.1.3 -> eth1; id=c", "eth0 239.1.1.1 -> eth2; id=a"].map(rule);
    let diff = rules.replace_all(new.to_vec()).unwrap();
    let ids = |rules: &[Rule]| rules.iter().map(|rule| rule.id.clone()).collect::<Vec<_>>();
    assert_eq!((ids(&diff.added), diff.removed, ids(&diff.changed)), (vec!["d".into()], vec!["b".into()], vec!["a".into()]));
    assert_eq!(rules.get("a").map(|rule| rule.outputs[0].egress.as_str()), Some("eth2"));
    let same = set(&["eth0 239.1.1.1 -> eth2; id=a", "eth0 239.1.1.3 -> eth1; id=c", "eth0 239.1.1.4 -> eth1; id=d"]).unwrap();
    assert!(rules.diff(&same).is_empty());
    assert_eq!(rules.remove("d").unwrap().id, "d");
    assert_eq!(rules.rules().len(), 2);
}

#[test]
fn ten_thousand_rules_are_checked_in_reasonable_time() {
    let line = |n: usize| format!("eth{} 239.{}.{}.{}:5000 -> eth{}", n % 2, n >> 16, n >> 8 & 255, n & 255, 1 - n % 2);
    let started = std::time::Instant::now();
    let rules = RuleSet::new((0..10_000).map(|n| rule(&line(n))).collect()).unwrap();
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    let ids: HashSet<&str> = rules.rules().iter().map(|rule| rule.id.as_str()).collect();
    assert_eq!(ids.len(), 10_000);
}
