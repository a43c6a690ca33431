//! The crash matrix: a worker is killed after each of its stores to shared memory, its successor too, and nothing is lost,
//! sent twice, damaged or counted wrongly, and no frame is lost or in two places.
//!
//! The worlds are small, so that every kill of the first worker meets (nearly) every kill of the second.

mod hostile;

use super::egress::{Egress, EgressBooks, EgressPort, Lane, PortState};
use super::ingress::{Ingress, IngressParts, IngressPort};
use super::journal::Journal;
use super::latency::stamps;
use super::table::{OutputPlan, RulePlan, Table};
use super::tap::Tap;
use crate::frame::HeldMap;
use crate::frame::{FRAME_SIZE, Pool, RawDesc, Umem};
use crate::nic::Transmit;
use crate::nic::memory::{Arrival, MemoryReceive, MemoryTransmit, SharedWire, Wire};
use crate::plan::counters::{Counter, output_clock, output_range, port_drop, port_rx, rule_range};
use crate::plan::edit::{Edit, SET_DPORT, SET_DST, TTL_DEC, TTL_KEEP, TTL_SET, VLAN_KEEP, VLAN_SET};
use crate::plan::fate::{DropReason, OutputDropReason};
use crate::plan::status::StatusPage;
use crate::plan::tap::{self, Fate, Point, TapReader, TapWriter, Wanted};
use crate::plan::work::WorkLayout;
use crate::ring::{self, Consumer, Memory, Producer};
use crate::rule::compile::Compiled;
use crate::shm::Segment;
use crate::shm::channel::duplicate;
use crate::sys::{Mapping, SharedArray, fuse};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

const FRAMES: u32 = 64;
const SLOTS: u32 = 32;
const PORTS: usize = 4;
const IFINDEX: u32 = 7;
const SERIAL: u32 = 5;
/// Packets the kernel receives between two turns.
const WAVE: usize = 3;

fn region(len: usize) -> Mapping {
    let fd = memfd_create(c"crash-test", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, len as i64).unwrap();
    Mapping::new(&fd, 0, len, true, false).unwrap()
}

/// Everything that outlives a worker.
struct World {
    umem: Arc<Umem>,
    work: Arc<Mapping>,
    layout: WorkLayout,
    page: StatusPage,
    counters: SharedArray<Counter>,
    wires: Vec<SharedWire>,
    outputs: Vec<OutputPlan>,
    /// Whether port 1 has a coalescing half, which takes bundles; its wire is the one behind the ports'.
    bundling: bool,
    /// Where what is captured goes, if anything is.
    ring: Option<Arc<Segment>>,
    /// Whether the ingress side is at work (a kill there may find the egress thread alive a little longer).
    in_ingress: Cell<bool>,
}

/// A copy of all of it.
#[derive(Clone)]
struct Snapshot {
    umem: Vec<u8>,
    work: Vec<Vec<u64>>,
    counters: Vec<Counter>,
    wires: Vec<Wire>,
}

struct Worker {
    ingress: Ingress<MemoryReceive>,
    egress: Egress<MemoryTransmit>,
}

/// What a worker does between two looks of the kernel.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    /// Ingress turns for each egress turn.
    ingress_turns: usize,
    /// Egress turns (of the thread of its own) between the ingress thread's death and the process's.
    egress_after: usize,
}

fn counter_indices() -> impl Iterator<Item = usize> {
    let outputs = (0..4).flat_map(output_range);
    (0..port_rx(1) as usize).chain(rule_range(0)).chain(outputs)
}

impl World {
    fn new(outputs: Vec<OutputPlan>, survives: [bool; PORTS], arrivals: Vec<Arrival>) -> Self {
        let layout = WorkLayout::new(FRAMES, SLOTS);
        let work = Arc::new(region(layout.len));
        Pool::attach(&work, layout.pool, FRAMES).unwrap().fill(FRAMES);
        ring::init::<u64>(work.as_ref(), layout.return_ring, FRAMES).unwrap();
        for port in 0..PORTS {
            ring::init::<RawDesc>(work.as_ref(), layout.egress_ring(port), SLOTS).unwrap();
        }
        let page = StatusPage::create().unwrap().1;
        let wire = |survives: bool| Rc::new(RefCell::new(Wire::new(survives, 16)));
        let wires: Vec<SharedWire> = survives.into_iter().map(wire).collect();
        wires[0].borrow_mut().queue = arrivals.into();
        let umem = Arc::new(Umem::new(region((FRAMES * FRAME_SIZE) as usize)));
        Self {
            umem,
            work,
            layout,
            counters: page.ingress.clone(),
            page,
            wires,
            outputs,
            bundling: false,
            ring: None,
            in_ingress: Cell::new(false),
        }
    }

    fn tap(&self) -> Tap {
        let writer = |ring: &Arc<Segment>| TapWriter::adopt(duplicate(ring.as_fd()).unwrap()).unwrap();
        let mut tap = self.ring.as_ref().map(writer).map(Tap::new).unwrap_or_default();
        tap.want(Wanted::new(&Point::ALL, 200, None).word());
        tap
    }

    fn table(&self) -> Table {
        let mut group = [0; 16];
        group[..4].copy_from_slice(&[239, 1, 1, 1]);
        let rule = RulePlan {
            slot: 0,
            serial: SERIAL,
            ifindex: IFINDEX,
            family: 4,
            group_len: 32,
            group,
            port: Some(5000),
            tag: None,
            outputs: self.outputs.clone(),
            shared: Vec::new(),
        };
        Table::new(1, vec![rule], Compiled::default(), Vec::new())
    }

    fn maps(&self) -> [HeldMap; 2] {
        let map = |at| HeldMap::new(SharedArray::new(&self.work, at, FRAMES as usize).unwrap());
        [map(self.layout.held), map(self.layout.held_by_senders(FRAMES))]
    }

    /// A new worker with what is there.
    fn attach(&self) -> Worker {
        let layout = &self.layout;
        let memory: Arc<dyn Memory> = Arc::<Mapping>::clone(&self.work);
        let [held, held_by_senders] = self.maps();
        let (stamps, mut meters): (Vec<_>, Vec<_>) = (0..PORTS).map(|_| stamps().unwrap()).map(|(a, b)| (Some(a), Some(b))).unzip();
        let egress_ring = |port| Producer::attach(memory.clone(), layout.egress_ring(port)).unwrap();
        let ingress = Ingress::new(IngressParts {
            umem: self.umem.clone(),
            pool: Pool::attach(&self.work, layout.pool, FRAMES).unwrap(),
            journal: Journal::attach(&self.work, layout.ingress_journal).unwrap(),
            ports: vec![IngressPort { receive: MemoryReceive::new(&self.wires[0], held.clone()), number: 0, ifindex: IFINDEX }],
            egress: (0..PORTS).map(|port| (port > 0).then(|| egress_ring(port))).collect(),
            returns: Consumer::attach(memory.clone(), layout.return_ring).unwrap(),
            counters: self.counters.clone(),
            held,
            held_by_senders: held_by_senders.clone(),
            stamps,
            bundling: (0..PORTS).map(|port| (self.bundling && port == 1).then(|| Arc::new(true.into()))).collect(),
            tap: self.tap(),
        });
        let mut port = |number: usize| EgressPort {
            transmit: MemoryTransmit::new(&self.wires[number], &self.umem, held_by_senders.clone()),
            ring: Consumer::attach(memory.clone(), layout.egress_ring(number)).unwrap(),
            coalescer: self
                .wires
                .get(PORTS)
                .filter(|_| number == 1)
                .map(|wire| MemoryTransmit::new(wire, &self.umem, held_by_senders.clone())),
            lane: Lane::Direct,
            number,
            state: PortState::default(),
            meter: meters[number].take(),
        };
        let journal = Journal::attach(&self.work, layout.egress_journal).unwrap();
        let page = &self.page;
        let books = EgressBooks { counters: page.egress.clone(), ports: page.sends.clone(), latency: page.latency.clone() };
        let returns = Producer::attach(memory.clone(), layout.return_ring).unwrap();
        let egress = Egress::new(journal, (0..PORTS).map(&mut port).collect(), returns, books);
        Worker { ingress, egress }
    }

    /// What `worker::run` does before the first turn.
    fn start(&self) -> Worker {
        let mut worker = self.attach();
        worker.egress.recover();
        worker.ingress.recover(|_| Some(self.table()));
        let standing = worker.egress.standing_frames();
        worker.ingress.reclaim(&standing);
        worker.ingress.prime();
        worker
    }

    /// Turns until nothing moves any more.
    fn work(&self, worker: &mut Worker, schedule: Schedule) {
        let table = self.table();
        for _ in 0..100 {
            let mut moved = 0;
            for _ in 0..schedule.ingress_turns {
                if self.wires[0].borrow().survives {
                    self.wires[0].borrow_mut().deliver(&self.umem, WAVE);
                }
                self.in_ingress.set(true);
                moved += worker.ingress.turn(&table, true);
                self.in_ingress.set(false);
            }
            moved += worker.egress.turn();
            let waiting = self.wires[0].borrow().queue.len();
            if moved == 0 && waiting == 0 && !worker.egress.is_busy() {
                worker.ingress.turn(&table, false);
                return;
            }
        }
        panic!("the worker is stuck: {:?}", self.wires);
    }

    /// A worker's life, killed after `stores` stores; whether it lived to the end.
    fn live(&self, stores: Option<u64>, schedule: Schedule) -> bool {
        let mut worker = None;
        if let Some(stores) = stores {
            fuse::arm(stores);
        }
        let end = catch_unwind(AssertUnwindSafe(|| {
            worker = Some(self.start());
            self.work(worker.as_mut().unwrap(), schedule);
        }));
        fuse::disarm();
        if let Err(panic) = end {
            assert!(panic.is::<fuse::Killed>(), "not our kill");
            if let (Some(worker), true) = (&mut worker, self.in_ingress.take()) {
                for _ in 0..schedule.egress_after {
                    worker.egress.turn();
                }
            }
            self.wires.iter().for_each(|wire| wire.borrow_mut().worker_died());
            return false;
        }
        true
    }

    /// Runs of words of the work segment that the tests touch.
    fn ranges(&self) -> [(usize, usize); 3] {
        let (journal, pool) = (self.layout.ingress_journal, self.layout.pool);
        [(0, journal + 16 * 1024), (self.layout.egress_journal, 256), (pool, self.layout.egress_ring(PORTS) - pool)]
    }

    fn save(&self) -> Snapshot {
        let frame = |number| {
            let frame = self.umem.claim_index(number).unwrap();
            self.umem.bytes(&frame, 0, FRAME_SIZE).to_vec()
        };
        let words = |(at, len): (usize, usize)| {
            let mut words = vec![0u64; len / 8];
            SharedArray::new(&self.work, at, len / 8).unwrap().get_all(0, &mut words);
            words
        };
        Snapshot {
            umem: (0..FRAMES).flat_map(frame).collect(),
            work: self.ranges().map(words).into(),
            counters: counter_indices().map(|index| self.counters.get(index)).collect(),
            wires: self.wires.iter().map(|wire| wire.borrow().clone()).collect(),
        }
    }

    fn restore(&self, snapshot: &Snapshot) {
        for (number, bytes) in snapshot.umem.chunks_exact(FRAME_SIZE as usize).enumerate() {
            let mut frame = self.umem.claim_index(number as u32).unwrap();
            self.umem.bytes_mut(&mut frame, 0, FRAME_SIZE).copy_from_slice(bytes);
        }
        for ((at, len), words) in self.ranges().into_iter().zip(&snapshot.work) {
            SharedArray::new(&self.work, at, len / 8).unwrap().set_all(0, words);
        }
        counter_indices().zip(&snapshot.counters).for_each(|(index, counter)| self.counters.set(index, *counter));
        self.wires.iter().zip(&snapshot.wires).for_each(|(wire, saved)| *wire.borrow_mut() = saved.clone());
    }

    fn sent(&self) -> Vec<Vec<Vec<u8>>> {
        self.wires.iter().map(|wire| wire.borrow().sent.clone()).collect()
    }

    /// All counters but the clocks of rate limits, which tell the time.
    fn counted(&self) -> Vec<Counter> {
        let is_clock = |index: &usize| (0..4).any(|slot| *index == output_clock(slot) as usize);
        counter_indices().filter(|index| !is_clock(index)).map(|index| self.counters.get(index)).collect()
    }

    /// Every frame is in exactly one place.
    fn assert_frames(&self, what: &dyn std::fmt::Debug) {
        let mut worker = self.attach();
        let pool = Pool::attach(&self.work, self.layout.pool, FRAMES).unwrap();
        let mut places: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
        (0..pool.len()).for_each(|at| places.entry(pool.peek(at)).or_default().push("pool"));
        worker.egress.standing_frames().iter().for_each(|frame| places.entry(*frame).or_default().push("ring"));
        for wire in &self.wires {
            wire.borrow().frames().iter().for_each(|frame| places.entry(*frame).or_default().push("nic"));
        }
        places.retain(|frame, places| places.len() != 1 || *frame >= FRAMES);
        let standing = worker.egress.standing_frames().len() + pool.len() as usize;
        let total = standing + self.wires.iter().map(|wire| wire.borrow().frames().len()).sum::<usize>();
        assert!(places.is_empty() && total == FRAMES as usize, "{what:?}: {total} frames of {FRAMES}, in two places: {places:?}");
    }
}

fn ones(bytes: &[u8], start: u32) -> u32 {
    bytes.chunks(2).fold(start, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
}

fn fold(sum: u32) -> [u8; 2] {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_be_bytes()
}

/// An untagged IPv4 packet for 239.1.1.1:5000 with right checksums.
fn packet(number: u8, ttl: u8, payload_len: usize) -> Vec<u8> {
    let payload: Vec<u8> = (0..payload_len).map(|at| number.wrapping_mul(31).wrapping_add(at as u8)).collect();
    let udp_len = ((8 + payload_len) as u16).to_be_bytes();
    let ip_len = ((28 + payload_len) as u16).to_be_bytes();
    let addresses = [10, 0, 0, 1, 239, 1, 1, 1];
    let mut ip = vec![0x45, 0, ip_len[0], ip_len[1], 0, number, 0, 0, ttl, 17, 0, 0];
    ip.extend(addresses);
    let sum = fold(ones(&ip, 0));
    ip[10..12].copy_from_slice(&sum);
    let mut udp = vec![0x0f, 0xa0, 0x13, 0x88, udp_len[0], udp_len[1], 0, 0];
    udp.extend(&payload);
    let sum = fold(ones(&udp, ones(&addresses, 17 + 8 + payload_len as u32)));
    udp[6..8].copy_from_slice(&sum);
    [&[1, 0, 0x5e, 1, 1, 1, 2, 0, 0, 0, 0, 1, 8, 0][..], &ip, &udp].concat()
}

fn whole(bytes: Vec<u8>) -> Arrival {
    Arrival { pieces: vec![bytes], hint: (0, SERIAL) }
}

/// Packets of every fate; the second wave ends with one that is too big.
fn arrivals() -> Vec<Arrival> {
    let long = packet(4, 9, 400);
    let pieces = vec![long[..200].to_vec(), long[200..].to_vec()];
    let huge = Arrival { pieces: vec![vec![0; 100]; 7], hint: (0, SERIAL) };
    vec![
        whole(packet(0, 16, 120)),
        whole(packet(1, 16, 20)),
        Arrival { hint: (0, SERIAL - 1), ..whole(packet(2, 16, 50)) },
        whole(packet(3, 1, 100)),
        Arrival { pieces, hint: (0, SERIAL) },
        huge,
        whole(packet(6, 16, 33)),
        whole(packet(7, 255, 300)),
        whole(packet(8, 2, 64)),
    ]
}

fn output(slot: u32, port: u32, edit: Edit) -> OutputPlan {
    let mut dst = [0; 16];
    dst[..4].copy_from_slice(&[239, 9, 9, slot as u8]);
    let edit = Edit { family: 4, flags: SET_DST | SET_DPORT, dst, dport: 6000, src_mac: [2, 0, 0, 0, 9, slot as u8], ..edit };
    OutputPlan { slot, port, blocked: None, coalesce: false, edit, gap: 0 }
}

/// One output that is not idempotent: one hop less, new group, a tag pushed over the hint.
fn single() -> Vec<OutputPlan> {
    vec![output(0, 1, Edit { ttl_mode: TTL_DEC, vlan_mode: VLAN_SET, vlan: 5, ..Edit::default() })]
}

/// Four outputs on the given ports, each different.
fn four(ports: [u32; 4]) -> Vec<OutputPlan> {
    let edits = [
        Edit { ttl_mode: TTL_DEC, vlan_mode: VLAN_SET, vlan: 6, ..Edit::default() },
        Edit { ttl_mode: TTL_SET, ttl: 3, vlan_mode: VLAN_KEEP, ..Edit::default() },
        Edit { ttl_mode: TTL_KEEP, vlan_mode: VLAN_SET, vlan: 7, mtu: 200, ..Edit::default() },
        Edit { ttl_mode: TTL_DEC, vlan_mode: VLAN_SET, vlan: 8, ..Edit::default() },
    ];
    (0..4).map(|slot| output(slot, ports[slot as usize], edits[slot as usize])).collect()
}

const FUSED: Schedule = Schedule { ingress_turns: 1, egress_after: 0 };
const LATE: Schedule = Schedule { ingress_turns: 3, egress_after: 0 };
const SPLIT: Schedule = Schedule { ingress_turns: 1, egress_after: 2 };

/// Kills at every store, and the successor at every `stride`-th of its own.
fn matrix(
    outputs: &[OutputPlan],
    survives: [bool; PORTS],
    stride: usize,
    schedule: Schedule,
    judge: impl FnMut(&World, &dyn std::fmt::Debug),
) {
    matrix_of(&World::new(outputs.to_vec(), survives, arrivals()), stride, schedule, judge);
}

fn matrix_of(world: &World, stride: usize, schedule: Schedule, mut judge: impl FnMut(&World, &dyn std::fmt::Debug)) {
    let fresh = world.save();
    let mut kills = 0u64;
    for first in 0.. {
        world.restore(&fresh);
        if world.live(Some(first), schedule) {
            break;
        }
        let dead = world.save();
        // The second kill moves from store to store of recovery, and on into the turns behind it.
        for second in (first as usize % stride..).step_by(stride) {
            world.restore(&dead);
            let lived = world.live(Some(second as u64), schedule);
            assert!(lived || world.live(None, FUSED));
            let what = (first, second, schedule);
            world.assert_frames(&what);
            judge(world, &what);
            kills += 1;
            if lived {
                break;
            }
        }
    }
    assert!(kills > 1_000, "the fuse does not burn: {kills}");
    println!("{kills} double kills");
}

/// What comes out without a kill.
fn golden(outputs: &[OutputPlan], survives: [bool; PORTS]) -> (Vec<Vec<Vec<u8>>>, Vec<Counter>) {
    let world = World::new(outputs.to_vec(), survives, arrivals());
    assert!(world.live(None, FUSED));
    world.assert_frames(&"no kill");
    (world.sent(), world.counted())
}

fn exactly_once(outputs: &[OutputPlan], stride: usize, schedule: Schedule) {
    let (sent, counted) = golden(outputs, [true; PORTS]);
    matrix(outputs, [true; PORTS], stride, schedule, |world, what| {
        assert!(world.sent() == sent, "{what:?}: sent {:?} instead of {:?}", lens(&world.sent()), lens(&sent));
        assert_eq!(world.counted(), counted, "{what:?}");
    });
}

fn lens(sent: &[Vec<Vec<u8>>]) -> Vec<Vec<(u8, usize)>> {
    sent.iter().map(|port| port.iter().map(|packet| (packet.get(23).copied().unwrap_or(0), packet.len())).collect()).collect()
}

#[test]
fn without_a_kill_every_packet_has_its_fate() {
    let (sent, _) = golden(&single(), [true; PORTS]);
    // Of nine: one of a rule that is gone, one with TTL 1, one too big.
    assert_eq!(sent[1].len(), 6);
    assert!(sent[1].iter().all(|packet| packet[12..16] == [0x81, 0, 0, 5]));
    assert_eq!(sent[1].iter().map(|packet| packet[26]).collect::<Vec<_>>(), [15, 15, 8, 15, 254, 1]);
    let (sent, _) = golden(&four([1, 2, 3, 1]), [true; PORTS]);
    // TTL_SET: seven; MTU: the two longest do not fit; TTL_DEC twice on port 1: six each.
    assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [0, 12, 7, 5]);
}

#[test]
fn req_004_1_one_output_exactly_once_wherever_workers_die() {
    exactly_once(&single(), 1, FUSED);
}

#[test]
fn req_004_1_one_output_with_rings_that_fill_up() {
    exactly_once(&single(), 3, LATE);
}

#[test]
fn req_004_1_one_output_with_an_egress_thread_that_dies_later() {
    exactly_once(&single(), 3, SPLIT);
}

#[test]
fn req_004_1_four_outputs_exactly_once_wherever_workers_die() {
    exactly_once(&four([1, 2, 3, 1]), 7, FUSED);
    exactly_once(&four([3, 2, 1, 3]), 11, FUSED);
}

#[test]
fn req_004_1_four_outputs_with_an_egress_thread_that_dies_later() {
    exactly_once(&four([2, 3, 3, 1]), 7, SPLIT);
    exactly_once(&four([1, 1, 2, 3]), 11, LATE);
}

/// An output that is blocked, one whose port is full: fates that need no ring are the same after a kill.
#[test]
fn a_blocked_output_is_counted_once() {
    let mut outputs = four([1, 2, 3, 1]);
    outputs[3].blocked = Some(OutputDropReason::OutputDown);
    exactly_once(&outputs, 7, FUSED);
}

/// The number in a packet that was sent, tagged or not.
fn number_of(packet: &[u8]) -> u8 {
    let ip = if packet[12..14] == [0x81, 0] { 18 } else { 14 };
    packet[ip + 5]
}

/// What is sent with packets that kill everybody who comes to them: each costs the workers it takes to tell, and itself.
fn poisoned(outputs: &[OutputPlan], numbers: &[u8]) {
    let (mut sent, _) = golden(outputs, [true; PORTS]);
    sent.iter_mut().for_each(|port| port.retain(|packet| !numbers.contains(&number_of(packet))));
    let world = World::new(outputs.to_vec(), [true; PORTS], arrivals());
    let poison = |arrival: Arrival| arrival.pieces.first().filter(|first| numbers.contains(&first[19])).map(|first| first[..34].to_vec());
    fuse::mine(arrivals().into_iter().filter_map(poison).collect());
    let mut deaths = 0;
    while !world.live(None, FUSED) {
        deaths += 1;
        assert!(deaths < 20, "{numbers:?}: a crash loop");
    }
    fuse::mine(Vec::new());
    // The first needs three deaths. One behind it in the same batch is known at once; of another batch, it needs three again.
    assert!((3..=3 * numbers.len()).contains(&deaths), "{numbers:?}: {deaths} deaths");
    assert!(world.sent() == sent, "{numbers:?}: sent {:?} instead of {:?}", lens(&world.sent()), lens(&sent));
    assert_eq!(world.counters.get(port_drop(0, DropReason::Poison) as usize).packets, numbers.len() as u64, "{numbers:?}");
    world.assert_frames(&numbers);
}

/// DECISIONS §9: the packet at the cursor is dropped when the batch has killed three workers. The others lose nothing.
#[test]
fn a_packet_that_kills_every_worker_is_skipped_and_counted() {
    for number in [0, 1, 4, 6, 7, 8] {
        poisoned(&single(), &[number]);
        poisoned(&four([1, 2, 3, 1]), &[number]);
    }
    for numbers in [[0, 1], [1, 4], [0, 8]] {
        poisoned(&four([3, 2, 1, 3]), &numbers);
    }
}

/// Packets seen by a capture: number in the packet, where, by which output.
fn seen(reader: &mut TapReader) -> Vec<(u8, Point, Option<u16>)> {
    let mut seen = Vec::new();
    while let Some(record) = reader.receive() {
        let output = match record.sight.fate {
            Fate::Sent { output } | Fate::OutputDropped { output, .. } => Some(output),
            Fate::Forwarded { .. } | Fate::Dropped(_) => None,
        };
        seen.push((number_of(record.bytes), record.sight.point, output));
    }
    seen
}

/// A capture changes nothing of what is sent or counted, wherever workers die, and shows no packet twice.
#[test]
fn a_capture_changes_nothing_and_shows_nothing_twice() {
    let outputs = four([1, 2, 3, 1]);
    let (sent, counted) = golden(&outputs, [true; PORTS]);
    for schedule in [FUSED, SPLIT] {
        let mut world = World::new(outputs.clone(), [true; PORTS], arrivals());
        let ring = tap::create().unwrap();
        let mut reader = TapReader::open(duplicate(ring.as_fd()).unwrap()).unwrap();
        world.ring = Some(ring);
        let fresh = world.save();
        assert!(world.live(None, schedule));
        let whole = seen(&mut reader);
        let at = |point| whole.iter().filter(|(_, seen, _)| *seen == point).count();
        // All but the one that is too big; sent as without a capture; one of a rule that is gone, two expired, two too long.
        assert_eq!([at(Point::Ingress), at(Point::Egress), at(Point::Drop)], [8, 24, 5], "{whole:?}");
        world.restore(&fresh);
        let mut most = 0;
        matrix_of(&world, 23, schedule, |world, what| {
            assert!(world.sent() == sent && world.counted() == counted, "{what:?}");
            let mut seen = seen(&mut reader);
            let count = seen.len();
            seen.sort_unstable();
            seen.dedup();
            // The life that two others were branched from is read only once.
            assert_eq!(seen.len(), count, "{what:?}");
            most = most.max(count);
        });
        assert!(most > 20 && (reader.overrun(), reader.malformed()) == (0, 0), "{most}");
    }
}

/// A rate limit that has let a packet through lets no second one through because a worker died: its clock moves with the
/// counters, and a replay has the time of the batch.
#[test]
fn a_rate_limit_decides_once() {
    let mut outputs = four([1, 2, 3, 1]);
    (outputs[1].gap, outputs[3].gap) = (1 << 50, 1 << 50);
    let (sent, _) = golden(&outputs, [true; PORTS]);
    assert_eq!((sent[1].len(), sent[2].len()), (7, 1));
    exactly_once(&outputs, 7, FUSED);
    exactly_once(&outputs, 7, SPLIT);
}

/// Packet ports lose what died with their rings, and nothing else; nothing is sent twice or out of order.
#[test]
fn packet_ports_lose_at_most_what_died_with_their_rings() {
    for survives in [[false; PORTS], [true, false, true, false], [false, true, true, true]] {
        let outputs = four([1, 2, 3, 1]);
        let (sent, _) = golden(&outputs, survives);
        matrix(&outputs, survives, 9, SPLIT, |world, what| {
            for (port, now) in world.sent().iter().enumerate() {
                let mut expected = sent[port].iter();
                assert!(now.iter().all(|packet| expected.any(|other| other == packet)), "{what:?}: port {port} {:?}", lens(&world.sent()));
            }
        });
    }
}

/// Outputs of port 1 that coalesce, and one of port 2 that does not; which comes last decides what a bundle gets.
fn bundled(ports: [u32; 4]) -> Vec<OutputPlan> {
    let mut outputs = four(ports);
    for output in outputs.iter_mut().filter(|output| output.port == 1) {
        output.coalesce = true;
    }
    (outputs[0].edit.vlan_mode, outputs[3].edit.vlan_mode) = (VLAN_KEEP, VLAN_KEEP);
    outputs
}

fn bundling(ports: [u32; 4]) -> World {
    let mut world = World::new(bundled(ports), [true; PORTS], arrivals());
    world.wires.push(Rc::new(RefCell::new(Wire::new(false, 16))));
    world.bundling = true;
    world
}

/// What each output got, in order: the last byte of its group names it.
fn by_output(sent: &[Vec<Vec<u8>>]) -> BTreeMap<u8, Vec<Vec<u8>>> {
    let mut by_output: BTreeMap<u8, Vec<Vec<u8>>> = BTreeMap::new();
    for packet in sent.iter().flatten() {
        let ip = if packet[12..14] == [0x81, 0] { 18 } else { 14 };
        by_output.entry(packet[ip + 19]).or_default().push(packet.clone());
    }
    by_output
}

/// A bundle sends bit for bit what copies would have sent. Where workers die, it loses what had left the ring, sends nothing twice
/// or out of order, and everything is counted once, as without a kill; what goes by the port's other half is exactly once.
#[test]
fn bundles_are_what_copies_are_and_are_sent_at_most_once() {
    for (ports, schedule) in [([1, 1, 1, 1], FUSED), ([1, 1, 1, 2], SPLIT), ([1, 2, 1, 1], LATE)] {
        let (copies, _) = golden(&bundled(ports), [true; PORTS]);
        let world = bundling(ports);
        let fresh = world.save();
        assert!(world.live(None, schedule));
        world.assert_frames(&"no kill");
        let (sent, counted) = (world.sent(), world.counted());
        assert_eq!(by_output(&sent), by_output(&copies), "{ports:?}");
        assert!(sent[PORTS].len() > 10, "{ports:?}: nothing was bundled");
        world.restore(&fresh);
        matrix_of(&world, 11, schedule, |world, what| {
            let now = world.sent();
            let mut expected = sent[PORTS].iter();
            assert!(now[PORTS].iter().all(|packet| expected.any(|other| other == packet)), "{what:?}: {:?}", lens(&now));
            assert!(now[..PORTS] == sent[..PORTS] && world.counted() == counted, "{what:?}: {:?}", lens(&now));
        });
    }
}

/// Used by the matrix: a transmit half that never sends would make it blind.
#[test]
fn the_wire_is_idle_at_the_end() {
    let world = World::new(single(), [true; PORTS], arrivals());
    assert!(world.live(None, SPLIT));
    let worker = world.attach();
    assert!(worker.egress.ports().iter().all(|port| port.transmit.outstanding() == 0));
}

#[test]
fn an_address_that_is_no_frames_is_a_frame_lost_by_name() {
    let world = World::new(Vec::new(), [true; PORTS], Vec::new());
    let mut worker = world.start();
    let frame = worker.ingress.pool.take(&world.umem).unwrap();
    worker.ingress.pool.publish();
    let (free, address) = (worker.ingress.free_frames(), frame.base());
    worker.egress.returns.write(0, address);
    worker.egress.returns.write(1, u64::from(FRAMES * FRAME_SIZE));
    frame.into_index();
    worker.egress.returns.publish(2);
    worker.ingress.recycle();
    assert_eq!((worker.ingress.free_frames(), worker.ingress.pool.lost()), (free + 1, 1));
}
