//! The kernel path's short way (flows it knows) leaves the same bytes and counts the same as its long way, and ends with the tables
//! it was found in.
//!
//! By BPF_PROG_TEST_RUN. Which way a packet took is found out by taking its rule's entry out of the table behind the loader's
//! back: what goes on all the same was known.
#![expect(clippy::unwrap_used, reason = "a test's way to fail")]

use aya::maps::{HashMap, Map, MapData, PerCpuArray, PerCpuValues};
use relay::lab::packet::{Flow, group_mac};
use relay::nic::afxdp::program::{LoadOptions, Mode, Program};
use relay_common::edit::*;
use relay_common::kernel::{KernelOutput, KernelPlan, MAX_LINEAR_L3_LEN, NO_OWNER, QUEUE_SLOTS, Queue};
use relay_common::{IngressConfig, MatchEntry, MatchKey, PORT_EXACT, Shape, TAG_EXACT, TAG_NONE, XdpCounter};
use relay_tests::mutate::{Random, seed};
use relay_tests::raw;
use relay_tests::xdp::{Lab, Run, XDP_PASS, XDP_REDIRECT, can_run, object, run};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

const SHAPE: Shape = Shape { family: 4, tag_mode: TAG_EXACT, group_len: 32, port_mode: PORT_EXACT };
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 1, 1, 1);
const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const ENTRY: MatchEntry = MatchEntry { slot: 5, serial: 7, source_set: 0, zero: 0 };
/// Slot of the output's counters.
const OUTPUT: u32 = 9;
const CASES: u32 = 1_500;

struct World {
    program: Program,
    ifindex: u32,
    key: MatchKey,
    matches: HashMap<MapData, MatchKey, MatchEntry>,
    /// [`Queue`]s as words.
    queues: PerCpuArray<MapData, [u32; size_of::<Queue>() / 4]>,
    /// Packets and bytes that were in them.
    carried: [u64; 2],
    plans: u32,
}

fn wide(address: Ipv4Addr) -> [u8; 16] {
    let mut wide = [0; 16];
    wide[..4].copy_from_slice(&address.octets());
    wide
}

impl World {
    fn new(lab: &Lab) -> Self {
        let mut program = Program::load(&LoadOptions { object: object(), ..LoadOptions::default() }).unwrap();
        let mut config = IngressConfig { shape_count: 1, kernel: 1, ..IngressConfig::default() };
        config.shapes[0] = SHAPE;
        config.own4[0] = u32::from_ne_bytes(OWN.octets());
        program.set_ingress(lab.ifindex, &config).unwrap();
        program.attach(lab.ifindex, Mode::Native).unwrap();
        program.kernel_mut().unwrap().set_device(0, nix::net::if_::if_nametoindex("eb1").unwrap(), false, None).unwrap();
        let ids = program.program().unwrap().info().unwrap().map_ids().unwrap().unwrap();
        let named = |name: &str| {
            let is = |id: &&u32| MapData::from_id(**id).unwrap().info().unwrap().name_as_str() == Some(name);
            MapData::from_id(*ids.iter().find(is).unwrap()).unwrap()
        };
        let matches = HashMap::try_from(Map::HashMap(named("MATCHES"))).unwrap();
        let queues = PerCpuArray::try_from(Map::PerCpuArray(named("QUEUES"))).unwrap();
        let key = MatchKey { ifindex: lab.ifindex, tag: TAG_NONE, addr: wide(GROUP), port: 5000, zero: 0, shape: SHAPE };
        program.insert_match(&key, &ENTRY).unwrap();
        Self { program, ifindex: lab.ifindex, key, matches, queues, carried: [0; 2], plans: 0 }
    }

    /// Puts another plan in force, as the supervisor does.
    fn plan(&mut self, edit: Edit) {
        let only = KernelOutput { edit, slot: OUTPUT, ifindex: 0, device: 0, blocked: 0 };
        let min_ttl = [2, 1, 0][usize::from(edit.ttl_mode)];
        let max_l3_len = if edit.mtu == 0 { MAX_LINEAR_L3_LEN } else { edit.mtu };
        let (slot, serial, flags, first_output, output_count, family, ready) = (ENTRY.slot, ENTRY.serial, 0, self.plans, 1, 4, 1);
        let plan = KernelPlan { slot, serial, flags, first_output, output_count, max_l3_len, min_ttl, family, ready, only };
        let tables = self.program.kernel_mut().unwrap();
        tables.write_plan(self.plans, &plan, &[only]).unwrap();
        tables.set_rule(ENTRY.slot, Some(self.plans)).unwrap();
        self.plans += 1;
    }

    fn run(&mut self, packet: &[u8]) -> Run {
        run(self.program.program().unwrap(), self.ifindex, 0, packet)
    }

    /// With the rule's entry gone, which nobody has been told of.
    fn run_if_known(&mut self, packet: &[u8]) -> Run {
        self.matches.remove(&self.key).unwrap();
        let run = self.run(packet);
        self.matches.insert(self.key, ENTRY, 0).unwrap();
        run
    }

    /// What a driver would have been handed: the short way's packets are counted then. A test run has no driver.
    fn settle(&mut self) {
        for cpu in self.queues.get(&0, 0).unwrap().iter() {
            for number in cpu[1]..cpu[0] {
                let at = 2 + (number % QUEUE_SLOTS) as usize * 4;
                let [owner, len, count] = [cpu[at], cpu[at + 2], cpu[at + 3]].map(u64::from);
                if owner >> 16 != u64::from(NO_OWNER) {
                    assert_eq!((owner, cpu[at + 1]), (u64::from(OUTPUT | ENTRY.slot << 16), ENTRY.serial), "whose it is");
                    self.carried = [self.carried[0] + count, self.carried[1] + count * (len & 0xffff)];
                }
            }
        }
        let cpus = aya::util::nr_cpus().unwrap();
        self.queues.set(0, PerCpuValues::try_from(vec![[0; size_of::<Queue>() / 4]; cpus]).unwrap(), 0).unwrap();
    }

    /// Packets and bytes the rule took, packets and bytes of its interface, drops for any reason.
    fn counts(&mut self) -> [u64; 5] {
        self.settle();
        let [packets, bytes] = self.carried;
        let tables = self.program.kernel().unwrap();
        let (rule, interface) = (tables.rule_rx(ENTRY.slot), self.program.counters(0).unwrap()[XdpCounter::Kernel as usize]);
        let drops = tables.drops().values().map(|drops| drops.packets).sum();
        [rule.packets + packets, rule.bytes + bytes, interface.packets + packets, interface.bytes + bytes, drops]
    }
}

fn edit(random: &mut Random) -> Edit {
    let mut bytes = || [random.below(256) as u8, random.below(256) as u8, random.below(256) as u8];
    let ([a, b, c], [d, e, f], [g, h, i]) = (bytes(), bytes(), bytes());
    Edit {
        dst: wide(Ipv4Addr::new(224 + a % 15, b, c, d)),
        src: wide(Ipv4Addr::new(e, f, g, h)),
        dst_mac: [1, 0, 0x5e, b & 0x7f, c, d],
        src_mac: [2, e, f, g, h, i],
        dport: u16::from_be_bytes([a, i]),
        sport: u16::from_be_bytes([g, c]),
        flags: random.below(64) as u16,
        vlan: 77,
        mtu: *random.pick(&[0, 0, 0, 700, 1500]),
        ttl_mode: random.below(3) as u8,
        ttl: 1 + (h >> 1),
        dscp: f & 63,
        vlan_mode: *random.pick(&[VLAN_KEEP, VLAN_KEEP, VLAN_NONE, VLAN_SET]),
        family: 4,
        zero: [0; 3],
    }
}

/// A right packet, or one of those the short way has to leave alone; whether it is right.
fn packet(random: &mut Random) -> (Vec<u8>, bool) {
    let destination = SocketAddr::from((GROUP, 5000));
    let source = Ipv4Addr::from(random.below(1 << 32) as u32 & 0x7fff_ffff);
    let flow = Flow {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: group_mac(IpAddr::V4(GROUP)).unwrap(),
        source: SocketAddr::from((source, random.below(65_536) as u16)),
        destination,
        ttl: *random.pick(&[0, 1, 2, 3, 16, 255]),
        dscp: random.below(64) as u8,
    };
    let payload: Vec<u8> =
        (0..*random.pick(&[0, 1, 2, 3, 7, 64, 119, 120, 121, 500, 1399, 1472])).map(|_| random.below(256) as u8).collect();
    let mut frame = flow.frame(&payload);
    let odd = random.below(24);
    match odd {
        0 => frame[40..42].fill(0),
        1 => frame[41] ^= 1,
        2 => frame[24] ^= 0x10,
        3 => frame[20] ^= 0x20,
        4 => frame[26..30].copy_from_slice(&OWN.octets()),
        5 => frame[26] = 0xe1,
        6 => frame.truncate(frame.len() - 1),
        7 => frame[38..40].copy_from_slice(&7_u16.to_be_bytes()),
        8 => {
            let last = frame.len() - 1;
            frame[last] ^= 0x40;
        }
        // Only the pseudo-header's sum, as a local sender leaves it.
        9 => {
            let pseudo = [&frame[26..34], &[0, 17][..], &frame[38..40]].concat();
            let sum = raw::sum(&pseudo, 0);
            frame[40..42].copy_from_slice(&sum.to_be_bytes());
        }
        10 => frame.extend([0; 9]),
        _ => {}
    }
    (frame, matches!(odd, 0 | 10..))
}

#[test]
fn the_short_way_leaves_the_same_bytes_and_counts_the_same() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let (mut world, mut random) = (World::new(&lab), Random::seeded(seed()));
    let (mut known, mut sent) = (0, 0);
    for case in 0..CASES {
        let edit = edit(&mut random);
        world.plan(edit);
        let (packet, is_right) = packet(&mut random);
        let before = world.counts();
        let long = world.run(&packet);
        let between = world.counts();
        let again = world.run(&packet);
        let after = world.counts();
        let what = format!("case {case}: {edit:?} {packet:02x?}");
        assert_eq!((long.action, &long.out), (again.action, &again.out), "{what}");
        let moved = |from: [u64; 5], to: [u64; 5]| [0, 1, 2, 3, 4].map(|at| to[at] - from[at]);
        assert_eq!(moved(before, between), moved(between, after), "{what}");
        let third = world.run_if_known(&packet);
        if third.action == XDP_REDIRECT {
            assert_eq!(third.out, long.out, "{what}");
            assert!(is_right, "an odd packet took the short way: {what}");
            known += 1;
        }
        sent += u32::from(long.action == XDP_REDIRECT);
    }
    assert!(known > CASES / 6, "only {known} of {CASES} packets took the short way ({sent} were sent at all)");
}

#[test]
fn a_flow_is_forgotten_with_the_tables_it_was_found_in() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let mut world = World::new(&lab);
    let flow = Flow {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: group_mac(IpAddr::V4(GROUP)).unwrap(),
        source: SocketAddr::from(([10, 0, 0, 1], 4000)),
        destination: SocketAddr::from((GROUP, 5000)),
        ttl: 16,
        dscp: 0,
    };
    let packet = flow.frame(&[7; 64]);
    let edit = Edit { family: 4, ttl_mode: TTL_SET, ttl: 9, ..Edit::default() };
    world.plan(edit);
    assert_eq!(world.run_if_known(&packet).action, XDP_PASS, "nothing is known at the start");
    assert_eq!(world.run(&packet).out[22], 9);
    assert_eq!(world.run_if_known(&packet).action, XDP_REDIRECT, "known now");
    // Another plan: the next packet goes by it.
    world.plan(Edit { ttl: 5, ..edit });
    assert_eq!(world.run_if_known(&packet).action, XDP_PASS, "a plan's change forgets");
    assert_eq!((world.run(&packet).out[22], world.run(&packet).out[22]), (5, 5));
    // An address of the interface's own, which the packets are from: a loop.
    let mut config = IngressConfig { shape_count: 1, kernel: 1, ..IngressConfig::default() };
    config.shapes[0] = SHAPE;
    config.own4[0] = u32::from_ne_bytes([10, 0, 0, 1]);
    world.program.set_ingress(world.ifindex, &config).unwrap();
    assert_ne!(world.run(&packet).action, XDP_REDIRECT, "an own address's packet has come round");
    config.own4[0] = 0;
    world.program.set_ingress(world.ifindex, &config).unwrap();
    assert_eq!((world.run(&packet).action, world.run_if_known(&packet).action), (XDP_REDIRECT, XDP_REDIRECT));
    // The rule's entry goes as the supervisor takes it.
    let key = world.key;
    world.program.remove_match(&key).unwrap();
    assert_eq!(world.run(&packet).action, XDP_PASS);
}
