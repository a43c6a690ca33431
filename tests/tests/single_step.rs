//! Kills at chosen instructions (issue 7, 1; ADOPTION.md: random kills prove nothing). The worker is stopped under traffic; every
//! other time it is let run to a store to a word that its successor goes by (each of them in turn; `relay_tests::step`) and up to
//! three instructions further, else stepped on by a random number of instructions, so that it dies anywhere in a batch. Ordinary
//! receivers say what arrived: everything, once, in order, rewritten as the rule says.
//!
//! Short form: 8 kills a path. `RELAY_TEST_LONG=1`: 200 each on fused 1:1, fused 1:4 and split; `RELAY_TEST_KILLS=N` is another
//! number. Where they landed is printed; the long form fails unless all of its kills were made, and one behind each kind of store.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use relay::datapath::journal::IDLE;
use relay::lab::recv::{Report, Verdict};
use relay_tests::paths::long;
use relay_tests::process::wait_replaced;
use relay_tests::step::{Place, Until, Words, lead_and_kill};
use relay_tests::{
    Lab, Listener, RelayProcess, Sending, assert_frames_conserved, assert_rules_conserved, needs_root, send_args, send_in_background,
    start_relay, tagged,
};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher};
use std::net::SocketAddr;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Packets a second, all streams together: so few that what gathers while the worker is stepped (some 10 µs an instruction) makes
/// small batches of which it gets through several, and so many that there is always one.
const RATE: u64 = 300;
/// Instructions stepped at most: through the first batch and into the next.
const MAX_STEPS: u64 = 15_000;
/// Which of a word's stores, at most.
const MAX_STORES: u64 = 6;
/// Rings whose indices move within this time are used.
const SEEN_WITHIN: Duration = Duration::from_millis(40);
/// One kill, with the steps before it and the replacement after it.
const PER_KILL: Duration = Duration::from_millis(540);

/// Where a receiver listens: at a socket of its own, or under tag 7.
#[derive(Clone, Copy)]
enum Seen {
    At(&'static str),
    Tagged(u16),
}

use Seen::{At, Tagged};

/// An output, and what an ordinary receiver behind it must see.
struct Output {
    text: &'static str,
    to: Seen,
    ttl: u8,
    dscp: u8,
}

const fn output(text: &'static str, to: Seen, ttl: u8, dscp: u8) -> Output {
    Output { text, to, ttl, dscp }
}

/// A stream of its own, and the outputs of its rule.
struct Stream {
    name: &'static str,
    from: &'static str,
    tagged: bool,
    outputs: &'static [Output],
}

const fn stream(name: &'static str, from: &'static str, outputs: &'static [Output]) -> Stream {
    Stream { name, from, tagged: false, outputs }
}

/// One output each, another rewrite each.
const ONE: &[Stream] = &[
    stream("group+port", "239.1.1.1:5000", &[output("r1 239.9.9.1:6001", At("239.9.9.1:6001"), 15, 0)]),
    stream("ttl=keep", "239.1.1.2:5000", &[output("r1 239.9.9.2:6002 ttl=keep", At("239.9.9.2:6002"), 16, 0)]),
    stream("ttl+dscp", "239.1.1.3:5000", &[output("r1 :6003 ttl=9 dscp=46", At("239.1.1.3:6003"), 9, 46)]),
    stream("source", "239.1.1.4:5000", &[output("r1 239.9.9.4 src=10.99.0.7 sport=4444", At("239.9.9.4:5000"), 15, 0)]),
    stream("own source", "239.1.1.5:5000", &[output("r1 src=egress", At("239.1.1.5:5000"), 15, 0)]),
    stream("tag put on", "239.1.1.6:5000", &[output("r1 239.9.9.6:6006 vlan=7", Tagged(6006), 15, 0)]),
    stream("unicast", "239.1.1.7:5000", &[output("r1 10.0.1.2:6007", At("10.0.1.2:6007"), 15, 0)]),
    stream(
        "everything",
        "239.1.1.8:5000",
        &[output("r1 239.9.9.8:6008 src=10.99.0.7 sport=4444 ttl=9 dscp=46 vlan=7", Tagged(6008), 9, 46)],
    ),
    Stream {
        tagged: true,
        ..stream("tag taken off", "239.1.1.9:5000", &[output("r1 239.9.9.9:6009 vlan=none", At("239.9.9.9:6009"), 15, 0)])
    },
    stream("IPv6", "[ff3e::1]:5000", &[output("r1 [ff3e::9]:6010 src=egress dscp=10", At("[ff3e::9]:6010"), 15, 10)]),
];

/// Four outputs each; every rewrite is among them.
const FOUR: &[Stream] = &[
    stream(
        "headers",
        "239.1.1.1:5000",
        &[
            output("r1 239.9.9.1:6001 ttl=keep", At("239.9.9.1:6001"), 16, 0),
            output("r1 239.9.9.2:6002 ttl=9 dscp=46", At("239.9.9.2:6002"), 9, 46),
            output("r1 :6003 src=10.99.0.7 sport=4444", At("239.1.1.1:6003"), 15, 0),
            output("r1 239.9.9.4:6004 src=egress", At("239.9.9.4:6004"), 15, 0),
        ],
    ),
    stream(
        "lengths",
        "239.1.1.2:5000",
        &[
            output("r1 239.9.8.1:6001", At("239.9.8.1:6001"), 15, 0),
            output("r1 239.9.8.2:6002 vlan=7", Tagged(6002), 15, 0),
            output("r1 10.0.1.2:6007", At("10.0.1.2:6007"), 15, 0),
            output("r1 239.9.8.4:6004 src=10.99.0.7 sport=4444 ttl=9 dscp=46 vlan=7", Tagged(6004), 9, 46),
        ],
    ),
    Stream {
        tagged: true,
        ..stream(
            "tagged",
            "239.1.1.3:5000",
            &[
                output("r1 239.9.7.1:6001 vlan=none", At("239.9.7.1:6001"), 15, 0),
                output("r1 239.9.7.2:6012 vlan=7", Tagged(6012), 15, 0),
                output("r1 239.9.7.3:6003 vlan=none ttl=keep", At("239.9.7.3:6003"), 16, 0),
                output("r1 239.9.7.4:6014 vlan=7 dscp=10", Tagged(6014), 15, 10),
            ],
        )
    },
    stream(
        "IPv6",
        "[ff3e::1]:5000",
        &[
            output("r1 [ff3e::6:1]:6001 ttl=9", At("[ff3e::6:1]:6001"), 9, 0),
            output("r1 [ff3e::6:2]:6002 src=egress", At("[ff3e::6:2]:6002"), 15, 0),
            output("r1 [ff3e::6:3]:6023 vlan=7 dscp=46", Tagged(6023), 15, 46),
            output("r1 [ff3e::6:4]:6004 src=[fd99::7] sport=4444 ttl=keep", At("[ff3e::6:4]:6004"), 16, 0),
        ],
    ),
];

struct Plan {
    name: &'static str,
    pipeline: &'static str,
    streams: &'static [Stream],
}

fn kills() -> u64 {
    let asked = std::env::var("RELAY_TEST_KILLS").ok().map(|text| text.parse().unwrap());
    asked.unwrap_or(if long() { 200 } else { 8 })
}

fn random(below: u64) -> u64 {
    std::hash::RandomState::new().build_hasher().finish() % below
}

/// Tags are in the frames, and the unicast destination's station is known.
fn lab() -> Lab {
    let lab = Lab::simple().unwrap();
    for (namespace, iface) in [(&lab.src, "s0"), (&lab.relay, "r0"), (&lab.relay, "r1"), (lab.sink(1), "k1")] {
        let _ = namespace.output("ethtool", &["-K", iface, "txvlan", "off", "rxvlan", "off"]);
    }
    lab.sink(1).ip_batch("link set k1 address 02:00:00:00:01:02\n").unwrap();
    lab.relay.ip_batch("neigh replace 10.0.1.2 lladdr 02:00:00:00:01:02 dev r1 nud permanent\n").unwrap();
    lab
}

fn rule(stream: &Stream) -> String {
    let outputs: Vec<&str> = stream.outputs.iter().map(|output| output.text).collect();
    format!("r0 {} -> {}{}", stream.from, outputs.join(", "), if stream.tagged { "; tag=9" } else { "" })
}

/// Where kills landed.
#[derive(Default)]
struct Landed {
    made: u64,
    /// Somebody else was first, or the store did not come.
    missed: u64,
    steps: u64,
    in_hand: u64,
    instructions: BTreeSet<u64>,
    after: BTreeMap<&'static str, u64>,
    /// Words seen to be written so far, by the thread that writes them (the egress thread or not) and number.
    words: BTreeMap<(bool, usize), &'static str>,
    by_stream: BTreeMap<&'static str, u64>,
}

impl Landed {
    fn note(&mut self, place: &Place, streams: &[Stream]) {
        self.steps += place.steps;
        self.instructions.insert(place.instruction);
        self.in_hand += u64::from(place.state != IDLE);
        if let Some(name) = place.after {
            *self.after.entry(name).or_default() += 1;
        }
        let of = |stream: &&Stream| place.header.as_ref().is_some_and(|header| goes_to(header, stream.from));
        if let Some(stream) = streams.iter().find(of) {
            *self.by_stream.entry(stream.name).or_default() += 1;
        }
    }

    fn summary(&self, name: &str, found: usize) -> String {
        let Self { made, missed, steps, in_hand, instructions, after, by_stream, .. } = self;
        format!(
            "{name}: {made} kills ({missed} of them not where they should be) and {steps} single steps, at {} different instructions; \
             {in_hand} with a batch or a move in hand, {found} repaired; up to three instructions behind a store to {after:?}; \
             by the packet in hand {by_stream:?}",
            instructions.len()
        )
    }
}

/// Whether this header has that destination, behind a tag or not.
fn goes_to(header: &[u8], destination: &str) -> bool {
    let destination: SocketAddr = destination.parse().unwrap();
    let octets = match destination.ip() {
        std::net::IpAddr::V4(addr) => addr.octets().to_vec(),
        std::net::IpAddr::V6(addr) => addr.octets().to_vec(),
    };
    header.windows(octets.len()).any(|window| window == octets)
}

/// Stops a thread of the worker, leads it on and kills it there; its successor has to be there with a closed ledger.
fn kill_one(relay: &RelayProcess, frames: u32, landed: &mut Landed, streams: &[Stream]) {
    let pids = relay.worker_pids().unwrap();
    let threads: Vec<(i32, String)> = std::fs::read_dir(format!("/proc/{}/task", pids[0]))
        .unwrap()
        .filter_map(|task| Some(task.ok()?.path()))
        .filter_map(|task| Some((task.file_name()?.to_string_lossy().parse().ok()?, std::fs::read_to_string(task.join("comm")).ok()?)))
        .collect();
    let (thread, name) = &threads[random(threads.len() as u64) as usize];
    let egress = name.trim() == "egress";
    let words = Words::of(pids[0], frames, !egress, egress || threads.len() == 1).unwrap();
    let killed = if landed.made.is_multiple_of(2) {
        landed.words.extend(words.written_within(SEEN_WITHIN).unwrap().into_iter().map(|(number, name)| ((egress, number), name)));
        let own: Vec<usize> = landed.words.keys().filter(|(of, _)| *of == egress).map(|(_, number)| *number).collect();
        let word = own[(landed.made / 2) as usize % own.len()];
        lead_and_kill(&words, Pid::from_raw(*thread), Until::Store { word, count: 1 + random(MAX_STORES), beyond: random(4) })
    } else {
        // The supervisor would take a worker that stands still so long for hung.
        relay.signal(Signal::SIGSTOP).unwrap();
        let killed = lead_and_kill(&words, Pid::from_raw(*thread), Until::Steps(random(MAX_STEPS)));
        relay.signal(Signal::SIGCONT).unwrap();
        killed
    };
    match killed.unwrap() {
        Some(place) => landed.note(&place, streams),
        None => landed.missed += 1,
    }
    landed.made += 1;
    wait_replaced(relay, &pids, Duration::from_secs(5)).unwrap();
    assert_frames_conserved(&relay.stats().unwrap());
}

/// States of the journal that successors have found: ingress in the low byte, egress in the next.
fn repaired(log: &str) -> usize {
    let states = log.lines().filter_map(|line| line.split("recovered=").nth(1)?.split_whitespace().next()?.parse().ok());
    states.filter(|state: &u32| *state != 0).count()
}

/// Every stream, and a receiver behind every output.
struct Traffic {
    sending: Vec<Sending>,
    tagged: Vec<JoinHandle<anyhow::Result<u64>>>,
    listeners: Vec<(&'static Output, Listener)>,
    under_tag: tagged::Listener,
}

impl Traffic {
    fn begin(lab: &Lab, plan: &Plan, rate: u64, count: u64) -> Self {
        let outputs = || plan.streams.iter().flat_map(|stream| stream.outputs);
        let listen = |output: &'static Output| match output.to {
            At(group) => Some((output, Listener::on(lab.sink(1), "k1", group, Some(count)).unwrap())),
            Tagged(_) => None,
        };
        let ports: Vec<u16> = outputs().filter_map(|output| if let Tagged(port) = output.to { Some(port) } else { None }).collect();
        let (under_tag, listeners) =
            (tagged::Listener::on(lab.sink(1), "k1", 7, &ports, count).unwrap(), outputs().filter_map(listen).collect());
        let (tagged, plain): (Vec<_>, Vec<_>) = plan.streams.iter().partition(|stream| stream.tagged);
        let send = |stream: &&Stream| send_in_background(lab, &send_args("s0", stream.from, rate, count).unwrap()).unwrap();
        let send_tagged = |stream: &&Stream| {
            let (group, port) = stream.from.split_once(':').unwrap();
            tagged::send(&lab.src, "s0", 9, (group, port.parse().unwrap()), (rate, count)).unwrap()
        };
        Self { sending: plain.iter().map(send).collect(), tagged: tagged.iter().map(send_tagged).collect(), listeners, under_tag }
    }

    fn end(self, plan: &Plan, count: u64) {
        self.sending.into_iter().for_each(|sending| assert_eq!(sending.wait().unwrap().sent, count));
        self.tagged.into_iter().for_each(|sending| assert_eq!(sending.join().unwrap().unwrap(), count));
        for (output, listener) in self.listeners {
            check(plan.name, output, &listener.wait().unwrap());
        }
        let reports = self.under_tag.wait().unwrap();
        for output in plan.streams.iter().flat_map(|stream| stream.outputs) {
            if let Tagged(port) = output.to {
                check(plan.name, output, &reports[&port]);
            }
        }
    }
}

fn run(plan: &Plan) {
    let lab = lab();
    let rules: Vec<String> = plan.streams.iter().map(rule).collect();
    let mut args = vec!["--backend", "xsk", "--pipeline", plan.pipeline];
    rules.iter().for_each(|rule| args.extend(["--rule", rule]));
    let relay = start_relay(&lab, &args).unwrap();
    let frames = relay.stats().unwrap()["frames"]["total"].as_u64().unwrap() as u32;
    let (kills, rate) = (kills(), RATE / plan.streams.len() as u64);
    let time = PER_KILL * kills as u32;
    let count = rate * (time.as_millis() as u64 + 2_000) / 1_000;
    let traffic = Traffic::begin(&lab, plan, rate, count);
    std::thread::sleep(Duration::from_millis(300));
    let (begin, mut landed) = (Instant::now(), Landed::default());
    while landed.made < kills && begin.elapsed() < time {
        std::thread::sleep(Duration::from_micros(random(20_000)));
        kill_one(&relay, frames, &mut landed, plan.streams);
    }
    traffic.end(plan, count);
    let stats = relay.stats().unwrap();
    assert_rules_conserved(&stats);
    assert_eq!(stats["frames"]["hand"], 0, "{}", stats["frames"]);
    let found = repaired(&relay.log());
    println!("{}", landed.summary(plan.name, found));
    assert!(landed.made < 100 || found > 0, "no kill hit the journal");
    if long() {
        assert_eq!(landed.made, kills, "not all kills were made in time");
        let unmet: Vec<_> = landed.words.values().filter(|name| !landed.after.contains_key(*name)).collect();
        assert!(kills < 200 || unmet.is_empty() || landed.after.is_empty(), "no kill came behind a store to {unmet:?}");
    }
}

fn check(name: &str, output: &Output, report: &Report) {
    if report.verdict == Verdict::Void {
        return println!("SKIPPED {name} {}: the receiver dropped {} itself", output.text, report.socket_drops);
    }
    let damage = (report.lost, report.duplicated, report.reordered, report.corrupted);
    assert_eq!(damage, (0, 0, 0, 0), "{name} {}: lost, duplicated, reordered, corrupted", output.text);
    let seen = (report.ttls.clone(), report.dscps.clone(), report.sources.len());
    assert_eq!(seen, ([output.ttl].into(), [output.dscp].into(), 1), "{name} {}: TTLs, DSCPs, sources", output.text);
}

#[test]
fn fused_one_output() {
    needs_root!();
    run(&Plan { name: "fused 1:1", pipeline: "fused", streams: ONE });
}

#[test]
fn fused_four_outputs() {
    needs_root!();
    run(&Plan { name: "fused 1:4", pipeline: "fused", streams: FOUR });
}

#[test]
fn split_one_output() {
    needs_root!();
    run(&Plan { name: "split 1:1", pipeline: "split", streams: ONE });
}
