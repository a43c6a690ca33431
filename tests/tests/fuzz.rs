//! Damaged input by the hundred thousand, the same on every run: never a panic, never a hang, and what is taken keeps its promises.
//!
//! Seeds are right inputs; what a target takes joins them. `RELAY_TEST_SEED=N` is another run, `--long` a hundred times as many,
//! `RELAY_FUZZ_INPUTS=N` so many.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::time::{ClockId, clock_gettime};
use relay::control::framing::{MAX_REQUEST_LEN, MAX_RESPONSE_LEN, encode};
use relay::control::message::{Changes, ErrorBody, Request, Response, RuleInfo, Stats, Status};
use relay::datapath::edit::Edit;
use relay::rule::Rule;
use relay_tests::fuzz::segments;
use relay_tests::mutate::{self, Random};
use relay_tests::{fuzz, golden, paths, rewrites};
use std::time::{Duration, Instant};

/// Inputs a target; the long form has a hundred times as many.
const COUNT: usize = 200_000;
/// Seeds and what joined them.
const POOL: usize = 2_000;
/// CPU time for one input.
const LIMIT: Duration = Duration::from_secs(1);

/// Shows the input when the target panics.
struct Shown<'a>(&'a str, &'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: input {} ({:?})", self.0, rewrites::hex(self.1), String::from_utf8_lossy(self.1));
        }
    }
}

fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

/// `focus`: where the damage goes, mostly; `least`: share of inputs that must be taken, in percent, so that the run says something.
fn run(name: &str, target: fn(&[u8]) -> bool, seeds: Vec<Vec<u8>>, focus: usize, words: &[&[u8]], least: usize) {
    run_slow(name, target, seeds, focus, words, (least, 1));
}

/// `slowness`: the short form has so many times fewer inputs.
fn run_slow(name: &str, target: fn(&[u8]) -> bool, seeds: Vec<Vec<u8>>, focus: usize, words: &[&[u8]], (least, slowness): (usize, usize)) {
    let (mut random, mut pool, begin) = (Random::seeded(mutate::seed()), seeds, Instant::now());
    for seed in &pool {
        let _shown = Shown(name, seed);
        assert!(target(seed), "a seed is not taken");
    }
    let asked = std::env::var("RELAY_FUZZ_INPUTS").ok().and_then(|text| text.parse().ok());
    let count = asked.unwrap_or(if paths::long() { COUNT * 100 } else { COUNT / slowness });
    let (mut taken, mut longest, mut last) = (0, Duration::ZERO, cpu_time());
    for _ in 0..count {
        let mut input = random.pick(&pool).clone();
        mutate::mutate(&mut random, &mut input, focus, words);
        let _shown = Shown(name, &input);
        let is_taken = target(&input);
        let now = cpu_time();
        longest = longest.max(now - last);
        assert!(now - last < LIMIT, "{:?} of CPU time", now - last);
        last = now;
        taken += usize::from(is_taken);
        if is_taken && input.len() < 8_192 && (pool.len() < POOL || random.below(16) == 0) {
            let at = if pool.len() < POOL { pool.len() } else { random.below(POOL) };
            pool.splice(at..(at + 1).min(pool.len()), [input.clone()]);
        }
    }
    let took = begin.elapsed().as_secs_f64();
    println!(
        "{name}: {count} inputs in {took:.1} s ({:.0} a second), {taken} taken, the slowest {longest:?} (seed {})",
        count as f64 / took,
        mutate::seed()
    );
    assert!(taken * 100 >= count * least, "{taken} of {count} taken: too few to say something");
}

/// Edits of every kind before packets of both corpora.
fn packets() -> Vec<Vec<u8>> {
    let mut random = Random::seeded(1);
    let mut edit = || {
        let mut bytes: Vec<u8> = (0..fuzz::EDIT_LEN).map(|_| random.bits() as u8).collect();
        let small = bytemuck::pod_read_unaligned::<Edit>(&bytes);
        // Kinds that exist, a TTL that lives, an MTU and headroom that do.
        let edit = Edit { mtu: 0, ttl_mode: small.ttl_mode % 3, ttl: small.ttl | 1, vlan_mode: small.vlan_mode % 3, zero: [7; 3], ..small };
        bytes.copy_from_slice(bytemuck::bytes_of(&edit));
        bytes
    };
    let rewritten = rewrites::corpus().into_iter().map(|case| case.packet);
    let packets = rewritten.chain(golden::corpus().into_iter().map(|case| case.bytes));
    packets.map(|packet| [edit(), packet].concat()).filter(|input| fuzz::packet(input)).collect()
}

const LINES: [&str; 7] = [
    "eth0 10.1.0.7@232.1.1.1:5000 -> eth1 ttl=16 dscp=46        # source-specific",
    "eth0 239.1.1.1:5000 -> eth1 239.9.9.9:6000 ttl=keep, eth2 10.0.0.5:6000 src=egress rate=10kpps",
    "eth0 [2001:db8::]/32@[ff3e::]/32:5000 -> eth1 :6000 src=[fd00::7] sport=1; id=a tag=100.200 path=xsk engine=coalesce join=no",
    "eth0 239.0.0.0/8 -> eth1 vlan=none, eth2 vlan=7, eth3 vlan=keep; except=10.0.0.0/8 except=10.1.2.3 tag=any exact=yes",
    "eth0 10.0.0.9:7000 -> eth1 239.1.2.3:7000",
    "eth0 239.1.1.1:5000 -> eth1\neth0 239.1.1.1:5001 -> eth1; tag=5\neth1 239.1.1.2 -> eth0; path=kernel",
    "eth0 239.1.1.1:5000 -> eth1\neth0 10.0.0.1@239.1.1.1:5000 -> eth2",
];

const RULE_WORDS: [&[u8]; 40] = [
    b"->",
    b" -> ",
    b",",
    b";",
    b"; ",
    b"@",
    b"[",
    b"]",
    b":",
    b"/",
    b"=",
    b"#",
    b"\n",
    b" ",
    b"\t",
    b"\0",
    b"\xc3\xa9",
    b"\xff",
    b"ttl=",
    b"src=",
    b"sport=",
    b"dscp=",
    b"vlan=",
    b"rate=",
    b"id=",
    b"tag=any",
    b"except=",
    b"path=",
    b"engine=",
    b"exact=",
    b"join=no",
    b"keep",
    b"egress",
    b"none",
    b"239.1.1.1",
    b"[ff3e::1]",
    b"65535",
    b"18446744073709551616",
    b"kpps",
    b"eth1",
];

const CONFIG_WORDS: [&[u8]; 40] = [
    b"[[rule]]\n",
    b"[[rule.output]]\n",
    b"version = 1\n",
    b"id",
    b"ingress",
    b"match",
    b"tag",
    b"except",
    b"path",
    b"engine",
    b"exact",
    b"join",
    b"egress",
    b"to",
    b"ttl",
    b"src",
    b"sport",
    b"dscp",
    b"vlan",
    b"rate",
    b" = ",
    b"\"",
    b"'",
    b"\"\"\"",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b"\n",
    b"#",
    b"true",
    b"0x10",
    b"1_000",
    b"-1",
    b"1e400",
    b"1979-05-27",
    b"\\u0000",
    b"\\",
    b"\xf0\x9f\x90\x99",
];

const JSON_WORDS: [&[u8]; 30] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\"",
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"null",
    b"true",
    b"1e999",
    b"-0",
    b"18446744073709551616",
    b"\"request\"",
    b"\"rule_add\"",
    b"\"rule\"",
    b"\"rules\"",
    b"\"dry_run\"",
    b"\"response\"",
    b"\"body\"",
    b"\"id\"",
    b"\"file\"",
    b"\xff",
    b"\xc3\xa9",
    b"[[[[[[[[",
    b"\x00\x00\x00\x00\x01",
    b"\x01\x00\x00\x00\x01",
    b"\xff\xff\xff\x7f\x01",
];

fn rules() -> Vec<Rule> {
    LINES.iter().flat_map(|lines| lines.lines()).map(|line| line.parse().unwrap()).collect()
}

/// Messages of both directions, in pieces of several sizes.
fn messages() -> Vec<Vec<u8>> {
    let lines = || LINES.map(str::to_owned).to_vec();
    let requests = [
        Request::RuleAdd { rule: LINES[0].into() },
        Request::RuleDel { id: "a".into() },
        Request::Apply { rules: lines(), dry_run: true },
        Request::RuleSave { file: Some("/etc/relay/relay.toml".into()) },
        Request::Status,
        Request::Shutdown,
    ];
    let info = RuleInfo { id: "a".into(), query_age_ms: Some(1), pending: vec!["output 0: why".into()], ..RuleInfo::default() };
    let responses = [
        Response::Done("a".into()),
        Response::Rules(vec![info]),
        Response::Status(Box::new(Status { epoch: 7, ..Status::default() })),
        Response::Stats(Box::<Stats>::default()),
        Response::Changes(Changes { added: lines(), removed: vec![], unchanged: 3 }),
        Response::Error(ErrorBody { code: 2, message: "no".into(), field: "ttl".into(), hint: "1-255".into() }),
    ];
    let mut messages: Vec<Vec<u8>> = requests.iter().map(|request| encode(request, MAX_REQUEST_LEN).unwrap()).collect();
    messages.extend(responses.iter().map(|response| encode(response, MAX_RESPONSE_LEN).unwrap()));
    messages.push(messages.concat());
    (1_u8..).step_by(19).zip(messages).map(|(piece, message)| [vec![piece], message].concat()).collect()
}

#[test]
fn packets_are_parsed_and_rewritten() {
    let seeds = packets();
    assert!(seeds.len() > 150, "{} seeds", seeds.len());
    run("packet", fuzz::packet, seeds, fuzz::EDIT_LEN + 70, &[], 5);
}

#[test]
fn rule_texts_are_read() {
    let mut seeds: Vec<Vec<u8>> = LINES.iter().map(|line| line.as_bytes().to_vec()).collect();
    seeds.extend(rewrites::corpus().into_iter().map(|case| case.rule.into_bytes()));
    run("rule text", fuzz::rule_text, seeds, 200, &RULE_WORDS, 5);
}

#[test]
fn config_files_are_read() {
    let mut seeds: Vec<Vec<u8>> = rules().chunks(2).map(|rules| relay::config::write(rules).into_bytes()).collect();
    seeds.push(include_bytes!("../../packaging/relay.toml").to_vec());
    seeds.retain(|seed| fuzz::config(seed));
    assert!(seeds.len() > 2, "{} seeds", seeds.len());
    run("config", fuzz::config, seeds, 600, &CONFIG_WORDS, 1);
}

#[test]
fn control_messages_are_read() {
    run("control", fuzz::control, messages(), 200, &JSON_WORDS, 2);
}

/// Values that hurt, as they lie in memory.
const NUMBERS: [&[u8]; 10] = [
    &[0; 8],
    &[0xff; 8],
    &[1, 0, 0, 0],
    &[2, 0, 0, 0],
    &[0xff, 0xff, 0xff, 0x7f],
    &[0, 0, 0, 0x80],
    &[0, 0x10, 0, 0],
    &[0, 0x20, 0, 0],
    &[33, 0, 0, 0],
    &[129, 0, 0, 0],
];

/// One edit in each of the words from there on.
fn edits(places: std::ops::Range<u16>) -> Vec<Vec<u8>> {
    let edit = |place: u16| [&place.to_le_bytes()[..], &u64::from(place % 5).to_le_bytes()].concat();
    places.step_by(8).map(edit).collect()
}

#[test]
fn a_status_segment_is_read_whatever_a_worker_writes() {
    // Header and reports; words behind them.
    let seeds = [edits(0..2_048), edits(4_096..8_192)].concat().into_iter().filter(|seed| segments::status(seed)).collect();
    run_slow("status segment", segments::status, seeds, 60, &NUMBERS, (5, 10));
}

#[test]
fn a_rules_segment_is_read_whatever_is_in_it() {
    // Counts and the first rules of the half in force.
    let seeds = [edits(4_096..4_120), edits(8_192..8_576)].concat().into_iter().filter(|seed| segments::rules(seed)).collect();
    run_slow("rules segment", segments::rules, seeds, 60, &NUMBERS, (5, 40));
}

#[test]
fn descriptors_of_a_ring_are_claimed_or_refused() {
    let desc = |addr: u64, len: u32| [&addr.to_le_bytes()[..], &len.to_le_bytes(), &[0; 4]].concat();
    let seeds = (0..16_u64).map(|frame| desc(frame * 2_048 + 256, 100)).chain([desc(0, 2_048), desc(32_767, 1)]).collect();
    run("descriptors", segments::descriptors, seeds, 64, &NUMBERS, 5);
}

#[test]
fn tables_of_descriptors_are_taken_whole_or_not_at_all() {
    let seeds = [
        "0{\"Begin\":{\"protocol\":1,\"count\":0}}\n0\"Commit\"",
        "0{\"Begin\":{\"protocol\":1,\"count\":2}}\n2{\"Entries\":[{\"role\":\"join\",\"key\":\"1\"},{\"role\":\"link\",\"key\":\"4\"}]}\n0\"Commit\"",
        "0{\"Begin\":{\"protocol\":1,\"count\":2}}\n1{\"Entries\":[{\"role\":\"umem\",\"key\":\"0\"}]}\n1{\"Entries\":[{\"role\":\"umem\",\"key\":\"1\"}]}\n0\"Commit\"",
    ];
    let words: [&[u8]; 10] =
        [b"\n", b"0", b"1", b"7", b"\"Take\"", b"\"Commit\"", b"{\"Entries\":[]}", b"\"key\":\"\"", b"4294967295", b"\"blob\""];
    run_slow("descriptor table", segments::table, seeds.map(|seed| seed.as_bytes().to_vec()).into(), 200, &words, (0, 20));
}

#[test]
fn hand_overs_are_read_whole_or_refused() {
    let kept = relay::supervisor::book::KeptRule { text: LINES[0].into(), slot: 1, serial: 2, outputs: vec![3] };
    let handover = relay::supervisor::handover::Handover {
        version: relay::supervisor::handover::VERSION,
        layout: relay::plan::manifest::LAYOUT_VERSION,
        build: "0.1.0".into(),
        options: [("--frames".into(), "32768".into())].into(),
        ports: vec![],
        burials: 0,
        rules: vec![kept],
        next_slots: [4, 5],
        workers: vec![],
        retired: [("r0".into(), [1, 2, 3, 4])].into(),
        sums: Default::default(),
        counted: Default::default(),
    };
    let seeds = vec![serde_json::to_vec(&handover).unwrap()];
    run_slow("hand-over", segments::handover, seeds, 400, &JSON_WORDS, (1, 10));
}

/// What these targets have found once: a rule slot that had a worker take gigabytes, an address at the end of all addresses, a
/// hand-over whose error was two lines of the log.
#[test]
fn what_was_found_stays_mended() {
    assert!(segments::rules(&[0x20, 0x21, 0, 0, 0, 0x81, 0, 0, 0, 0]));
    assert!(!segments::descriptors(&[0xff; 16]));
    assert!(!segments::handover(b"{\"version\":1,\"layout\":1,\"build\":\"0.1\\n0\"}"));
    assert!(!segments::handover(b"{\"version\":1,\"optio\\ns\":{}}"));
}
