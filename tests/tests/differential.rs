//! The XDP program against the parser and the lookup of user space: the same verdict on every packet, however damaged.
//!
//! The program is the one in the kernel (BPF_PROG_TEST_RUN). Packets of one expected verdict run one after the other, so the
//! counters say of every single one what it was counted as; the rule's slot and serial stand in its metadata.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::nic::afxdp::program::{Program, socket_index};
use relay::rule::compile::{Compiled, SourcePrefix};
use relay::rule::lookup::Verdict;
use relay::wire::parse;
use relay_common::{
    META_MAGIC,
    XdpCounter::{self, *},
};
use relay_tests::golden::{self, INTERFACE_SLOT};
use relay_tests::mutate::{self, Random};
use relay_tests::paths;
use relay_tests::raw::Datagram;
use relay_tests::xdp::{Lab, META_LEN, XDP_PASS, XDP_REDIRECT, can_run, loaded, run, socket};
use std::collections::BTreeMap;
use std::time::Instant;

/// Packets of one turn, sorted by what user space says of them.
const TURN: usize = 16_384;
/// Packets in all; the program for old kernels gets a tenth of them.
const COUNT: usize = 1_000_000;
const LONG_COUNT: usize = 50_000_000;

/// What a packet is counted as and, where a rule takes it, which.
type Judgement = (XdpCounter, Option<(u32, u32)>);

/// The corpus's tables as user space holds them.
fn tables(ifindex: u32) -> Compiled {
    let tables = golden::tables(ifindex);
    let shapes = tables.ingress.shapes[..tables.ingress.shape_count as usize].to_vec();
    let mut compiled = Compiled { ingresses: [(ifindex, shapes)].into(), ..Compiled::default() };
    compiled.entries.extend(tables.matches);
    for (key, len, verdict) in tables.sources {
        let set = compiled.sets.entry(u32::from_be_bytes(key.set)).or_default();
        set.prefixes.insert(SourcePrefix { len: len as u8, addr: key.addr }, verdict);
        set.lens.push(len as u8);
        set.lens.sort_unstable_by(|a, b| b.cmp(a));
        set.lens.dedup();
    }
    compiled
}

/// By user space alone.
fn judged(tables: &Compiled, ifindex: u32, packet: &[u8]) -> Judgement {
    let headers = match parse(packet, packet.len()) {
        Ok(headers) => headers,
        Err(verdict) => return (verdict.counter(), None),
    };
    match tables.lookup(ifindex, &headers) {
        Verdict::Rule { slot, serial } => (Redirected, Some((slot, serial))),
        Verdict::Except => (PassExcept, None),
        Verdict::Miss => (PassNoRule, None),
    }
}

/// Packets to damage: the corpus, and one that stands in several buffers.
fn seeds(multi_buffer: bool) -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = golden::corpus().into_iter().map(|case| case.bytes).collect();
    if multi_buffer {
        seeds.push(Datagram { payload: vec![7; 8_000], ..Datagram::to("239.1.1.1", 5_000, b"").unwrap() }.bytes());
    }
    seeds
}

/// A damaged packet, or pure noise; as long as the kernel asks for at least.
fn packet(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut packet: Vec<u8> = match random.below(16) {
        0 => (0..random.below(120)).map(|_| random.bits() as u8).collect(),
        _ => random.pick(seeds).clone(),
    };
    mutate::mutate(random, &mut packet, 70, &[]);
    packet.resize(packet.len().max(14), 0);
    packet
}

struct Differential {
    program: Program,
    ifindex: u32,
    tables: Compiled,
}

impl Differential {
    /// What the program does with a packet: action, rule, and the packet itself untouched.
    fn assert_run(&mut self, packet: &[u8], (counter, rule): Judgement) {
        let run = run(self.program.program().unwrap(), self.ifindex, 0, packet);
        let wanted = rule.map_or(vec![], |(slot, serial)| [META_MAGIC, slot, serial, 0].map(u32::to_ne_bytes).concat());
        let told = || format!("{counter:?} {rule:?} by user space: {}", hex(packet));
        assert_eq!(run.action, if rule.is_some() { XDP_REDIRECT } else { XDP_PASS }, "{}", told());
        let (meta, out) = run.out.split_at(if rule.is_some() { META_LEN } else { 0 });
        assert!(meta == wanted && out == packet, "{}: metadata {meta:02x?}, packet {}", told(), hex(out));
    }

    fn counted(&self) -> Vec<u64> {
        self.program.counters(INTERFACE_SLOT).unwrap().iter().map(|value| value.packets).collect()
    }

    /// Runs packets that all have this verdict; none is counted as anything else.
    fn assert_group(&mut self, judgement: Judgement, packets: &[Vec<u8>]) {
        let mut wanted = self.counted();
        wanted[judgement.0 as usize] += packets.len() as u64;
        packets.iter().for_each(|packet| self.assert_run(packet, judgement));
        if self.counted() == wanted {
            return;
        }
        for packet in packets {
            let before = self.counted();
            self.assert_run(packet, judgement);
            let moved: Vec<_> =
                XdpCounter::ALL.iter().filter(|counter| self.counted()[**counter as usize] != before[**counter as usize]).collect();
            assert_eq!(moved, [&judgement.0], "the program's counter, user space's: {}", hex(packet));
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(120).map(|byte| format!("{byte:02x}")).collect()
}

fn differ(single_buffer: bool, count: usize) {
    let (lab, seed) = (Lab::new(), mutate::seed());
    let mut program = loaded(&lab, single_buffer);
    let (_umem, socket) = socket(&lab);
    program.set_socket(socket_index(INTERFACE_SLOT, 0), &socket.fd).unwrap();
    let mut differential = Differential { program, ifindex: lab.ifindex, tables: tables(lab.ifindex) };
    let (seeds, mut random, begin) = (seeds(!single_buffer), Random::seeded(seed), Instant::now());
    let mut totals: BTreeMap<&str, usize> = BTreeMap::new();
    let mut done = 0;
    while done < count {
        let mut groups: BTreeMap<Judgement, Vec<Vec<u8>>> = BTreeMap::new();
        for _ in 0..TURN.min(count - done) {
            let packet = packet(&mut random, &seeds);
            groups.entry(judged(&differential.tables, lab.ifindex, &packet)).or_default().push(packet);
            done += 1;
        }
        for (judgement, packets) in groups {
            *totals.entry(judgement.0.name()).or_default() += packets.len();
            differential.assert_group(judgement, &packets);
        }
    }
    println!("{done} packets in {:.1} s (seed {seed}), all judged alike: {totals:?}", begin.elapsed().as_secs_f64());
    // Every verdict of a packet's own was met often enough to mean something.
    let rare = XdpCounter::ALL.iter().filter(|counter| !matches!(counter, Kernel | PassNoSocket | PassNoConfig));
    let rare: Vec<_> = rare.filter(|counter| totals.get(counter.name()).copied().unwrap_or(0) < done / 5_000).collect();
    assert!(rare.is_empty(), "hardly ever: {rare:?} in {totals:?}");
}

#[test]
fn a_million_packets_are_judged_as_user_space_judges_them() {
    if can_run() {
        differ(false, if paths::long() { LONG_COUNT } else { COUNT });
    }
}

#[test]
fn a_hundred_thousand_on_a_kernel_without_multi_buffer() {
    if can_run() {
        differ(true, if paths::long() { LONG_COUNT / 10 } else { COUNT / 10 });
    }
}
