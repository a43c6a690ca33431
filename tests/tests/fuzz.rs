//! Damaged input by the hundred thousand, the same on every run: never a panic, never a hang, and what is taken keeps its promises.
//!
//! Seeds are right inputs; what a target takes joins them. `RELAY_TEST_SEED=N` is another run, `--long` a hundred times as many.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::time::{ClockId, clock_gettime};
use relay::control::framing::{MAX_REQUEST_LEN, MAX_RESPONSE_LEN, encode};
use relay::control::message::{Changes, ErrorBody, Request, Response, RuleInfo, Stats, Status};
use relay::datapath::edit::Edit;
use relay::rule::Rule;
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
    let (mut random, mut pool, begin) = (Random::seeded(mutate::seed()), seeds, Instant::now());
    for seed in &pool {
        let _shown = Shown(name, seed);
        assert!(target(seed), "a seed is not taken");
    }
    let count = if paths::long() { COUNT * 100 } else { COUNT };
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
    println!("{name}: {count} inputs in {took:.1} s, {taken} taken, the slowest {longest:?} (seed {})", mutate::seed());
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
