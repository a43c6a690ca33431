//! What a rule takes and what it leaves: sources, prefixes, exceptions, groups, ports. What it leaves, it does not count.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::send;
use relay_tests::paths::{Listen, Moved, Path, Run, await_moved};
use relay_tests::{Lab, assert_rules_conserved, on_every_path, send_args};

on_every_path!(
    a_source_specific_rule_ignores_other_sources,
    a_source_prefix_takes_its_sources,
    an_exception_is_not_relayed,
    an_exception_may_be_a_prefix,
    a_group_prefix_takes_its_groups,
    a_rule_without_port_takes_every_port,
    the_more_specific_rule_wins,
);

/// Sequences of different sends never overlap, so that a receiver knows a stranger.
const STEP: u64 = 100;

/// The usual lab with 10.0.0.1, .33, .34 and .77 in the source namespace.
fn lab() -> Lab {
    let lab = Lab::simple().unwrap();
    lab.src.ip_batch("addr add 10.0.0.33/24 dev s0\naddr add 10.0.0.34/24 dev s0\naddr add 10.0.0.77/24 dev s0\n").unwrap();
    lab
}

/// `STEP` datagrams from each source to each destination.
fn sends(flows: &[(&str, &str)]) -> Vec<send::Args> {
    let one = |(number, (source, to)): (usize, &(&str, &str))| {
        let mut args = send_args("s0", to, 10_000, STEP).unwrap();
        args.source = Some(format!("{source}:7100").parse().unwrap());
        args.first = number as u64 * STEP;
        args
    };
    flows.iter().enumerate().map(one).collect()
}

/// Sends the flows; rule `a` takes the multiples of `STEP` that the listeners expect.
fn check(path: &Path, rules: &[&str], flows: &[(&str, &str)], listens: &[Listen<'_>], counts: &[(&str, u64)]) -> Run {
    let lab = lab();
    let relay = path.start(&lab, rules).unwrap();
    let run = Run::of(&lab, &relay, &sends(flows), listens).unwrap();
    run.assert_whole(listens);
    for (id, count) in counts {
        let after = await_moved(&relay, &run.before, id, &Moved::all(*count, 1)).unwrap();
        assert_rules_conserved(&after);
    }
    run
}

/// What is taken is sent last, so that what is left would have come before.
fn a_source_specific_rule_ignores_other_sources(path: &Path) {
    let rules = ["r0 10.0.0.1@232.1.1.1:5000 -> r1 232.9.9.9:6000; id=a"];
    let flows = [("10.0.0.77", "232.1.1.1:5000"), ("10.0.0.1", "232.1.1.1:5000")];
    let run = check(path, &rules, &flows, &[(1, "232.9.9.9:6000", STEP)], &[("a", STEP)]);
    assert_eq!(run.reports[0].sources.iter().collect::<Vec<_>>(), ["10.0.0.1:7100"]);
}

fn a_source_prefix_takes_its_sources(path: &Path) {
    let rules = ["r0 10.0.0.32/28@239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"];
    let flows = ["10.0.0.1", "10.0.0.77", "10.0.0.33", "10.0.0.34"].map(|source| (source, "239.1.1.1:5000"));
    let run = check(path, &rules, &flows, &[(1, "239.9.9.9:6000", 2 * STEP)], &[("a", 2 * STEP)]);
    assert_eq!(run.reports[0].sources.iter().collect::<Vec<_>>(), ["10.0.0.33:7100", "10.0.0.34:7100"]);
}

fn an_exception_is_not_relayed(path: &Path) {
    let rules = ["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a except=10.0.0.77 except=10.0.0.1"];
    let flows = ["10.0.0.77", "10.0.0.1", "10.0.0.33", "10.0.0.34"].map(|source| (source, "239.1.1.1:5000"));
    let run = check(path, &rules, &flows, &[(1, "239.9.9.9:6000", 2 * STEP)], &[("a", 2 * STEP)]);
    assert_eq!(run.reports[0].sources.iter().collect::<Vec<_>>(), ["10.0.0.33:7100", "10.0.0.34:7100"]);
}

fn an_exception_may_be_a_prefix(path: &Path) {
    let rules = ["r0 10.0.0.0/24@239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a except=10.0.0.32/30"];
    let flows = ["10.0.0.33", "10.0.0.34", "10.0.0.1", "10.0.0.77"].map(|source| (source, "239.1.1.1:5000"));
    let run = check(path, &rules, &flows, &[(1, "239.9.9.9:6000", 2 * STEP)], &[("a", 2 * STEP)]);
    assert_eq!(run.reports[0].sources.iter().collect::<Vec<_>>(), ["10.0.0.1:7100", "10.0.0.77:7100"]);
}

/// Groups inside the prefix keep their address; those outside stay.
fn a_group_prefix_takes_its_groups(path: &Path) {
    let rules = ["r0 239.1.4.0/22:5000 -> r1; id=a"];
    let flows = ["239.1.3.255:5000", "239.1.8.0:5000", "239.1.4.0:5001", "239.1.4.0:5000", "239.1.7.255:5000"].map(|to| ("10.0.0.1", to));
    let listens = [
        (1, "239.1.4.0:5000", STEP),
        (1, "239.1.7.255:5000", STEP),
        (1, "239.1.3.255:5000", 0),
        (1, "239.1.8.0:5000", 0),
        (1, "239.1.4.0:5001", 0),
    ];
    check(path, &rules, &flows, &listens, &[("a", 2 * STEP)]);
}

fn a_rule_without_port_takes_every_port(path: &Path) {
    let rules = ["r0 239.1.1.1 -> r1 239.9.9.9; id=a"];
    let flows = ["239.1.1.2:5000", "239.1.1.1:1", "239.1.1.1:5000", "239.1.1.1:65535"].map(|to| ("10.0.0.1", to));
    let listens = [(1, "239.9.9.9:1", STEP), (1, "239.9.9.9:5000", STEP), (1, "239.9.9.9:65535", STEP)];
    check(path, &rules, &flows, &listens, &[("a", 3 * STEP)]);
}

fn the_more_specific_rule_wins(path: &Path) {
    let rules = [
        "r0 239.1.1.1:5000 -> r1 239.9.9.1:6000; id=any",
        "r0 10.0.0.0/24@239.1.1.1:5000 -> r1 239.9.9.2:6000; id=prefix",
        "r0 10.0.0.77@239.1.1.1:5000 -> r1 239.9.9.3:6000; id=one",
    ];
    let flows = [("10.0.0.77", "239.1.1.1:5000"), ("10.0.0.33", "239.1.1.1:5000")];
    let listens = [(1, "239.9.9.1:6000", 0), (1, "239.9.9.2:6000", STEP), (1, "239.9.9.3:6000", STEP)];
    check(path, &rules, &flows, &listens, &[("any", 0), ("prefix", STEP), ("one", STEP)]);
}
