//! The packet port over veth pairs in a namespace of its own: what arrives is what was sent, and every frame comes back.
//!
//! Root only. `s0 → s1` is the ingress side (tests send on s0, the port receives on s1), `d0 → d1` the egress side.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use arrayvec::ArrayVec;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::sockopt::RcvBuf;
use nix::sys::socket::{MsgFlags, recv, send, setsockopt};
use nix::unistd::{Uid, ftruncate};
use relay::frame::{CONTINUES, FRAME_CAPACITY, FRAME_SIZE, HEADROOM, Pool, RawDesc, Umem};
use relay::nic::afpacket::{Engines, PacketReceive, PacketTransmit, socket};
use relay::nic::{BATCH_LEN, Batch, Kick, Packet, Receive, Transmit};
use relay::sys::{Mapping, SharedArray};
use std::fs::File;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const FRAMES: u32 = 1024;

/// A network namespace with two veth pairs; this thread is in it until it ends. Deleted when dropped.
struct World {
    name: String,
}

impl World {
    /// None (with the reason printed) where this can't run.
    fn new(mtu: u32) -> Option<Self> {
        if !Uid::effective().is_root() {
            eprintln!("skipped: needs root for network namespaces and packet sockets");
            return None;
        }
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let world = Self { name: format!("pk-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)) };
        world.run(&format!("ip netns add {}", world.name));
        setns(File::open(format!("/run/netns/{}", world.name)).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
        for side in ["s", "d"] {
            world.ip(&format!("link add {side}0 mtu {mtu} type veth peer name {side}1 mtu {mtu}"));
            world.ip(&format!("link set {side}0 up"));
            world.ip(&format!("link set {side}1 up"));
        }
        Some(world)
    }

    fn ip(&self, arguments: &str) {
        self.run(&format!("ip -n {} {arguments}", self.name));
    }

    fn run(&self, command: &str) {
        let mut words = command.split(' ');
        let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

fn ifindex(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).unwrap()
}

fn memory(len: usize) -> Mapping {
    let fd = memfd_create(c"pk-test", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&fd, len as i64).unwrap();
    Mapping::new(&fd, 0, len, true, true).unwrap()
}

/// UMEM, pool and held map, as the worker has them.
struct Memory {
    umem: Arc<Umem>,
    pool: Pool,
    held: SharedArray<u8>,
}

impl Memory {
    fn new() -> Self {
        let umem = Arc::new(Umem::new(memory((FRAMES * FRAME_SIZE) as usize)));
        let mut pool = Pool::attach(&Arc::new(memory(Pool::bytes(FRAMES))), 0, FRAMES).unwrap();
        pool.fill(FRAMES);
        let held = SharedArray::new(&Arc::new(memory(FRAMES as usize)), 0, FRAMES as usize).unwrap();
        Self { umem, pool, held }
    }

    fn held_count(&self) -> u32 {
        (0..FRAMES as usize).map(|frame| u32::from(self.held.get(frame))).sum()
    }

    fn give_back(&mut self, packet: Packet) {
        packet.fragments.into_iter().for_each(|fragment| self.pool.put(fragment.frame));
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Engine {
    Uring,
    Plain,
}

const BOTH: [Engine; 2] = [Engine::Uring, Engine::Plain];

/// What the port is told, and what it must then say it is.
const fn told(engine: Engine) -> (Engines, &'static str) {
    match engine {
        Engine::Uring => (Engines::Best, "af_packet"),
        Engine::Plain => (Engines::PlainOnly, "af_packet_plain"),
    }
}

fn receiver(engine: Engine, socket: OwnedFd, memory: &Memory) -> PacketReceive<SharedArray<u8>> {
    let (engines, backend) = told(engine);
    let half = PacketReceive::open(socket, &memory.umem, 256, memory.held.clone(), engines).unwrap();
    assert_eq!((half.backend(), half.reason().is_some()), (backend, engine == Engine::Plain));
    half
}

fn sender(engine: Engine, socket: OwnedFd, memory: &Memory) -> PacketTransmit<SharedArray<u8>> {
    let (engines, backend) = told(engine);
    let half = PacketTransmit::open(socket, &memory.umem, 256, memory.held.clone(), engines);
    assert_eq!((half.backend(), half.reason().is_some()), (backend, engine == Engine::Plain));
    half
}

/// Packets refused since the last call.
fn failed(tx: &mut impl Transmit) -> usize {
    std::iter::from_fn(|| tx.refused()).count()
}

/// Ethernet, tags, IPv4, UDP to 239.1.2.3:5000 and a payload that begins with `sequence`.
fn packet(sequence: u32, tags: &[[u8; 4]], total_len: usize) -> Vec<u8> {
    let mut bytes = vec![1, 0, 0x5e, 1, 2, 3, 2, 0, 0, 0, 0, 1];
    tags.iter().for_each(|tag| bytes.extend(tag));
    bytes.extend([8, 0]);
    let ip_len = (total_len - bytes.len()) as u16;
    bytes.extend([0x45, 0]);
    bytes.extend(ip_len.to_be_bytes());
    bytes.extend([0, 0, 0, 0, 8, 17, 0, 0, 10, 0, 0, 1, 239, 1, 2, 3, 0x13, 0x88, 0x13, 0x88]);
    bytes.extend((ip_len - 20).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(sequence.to_be_bytes());
    assert!(bytes.len() <= total_len);
    bytes.resize(total_len, sequence as u8);
    bytes
}

/// Where [`packet`] has its sequence number, without tags.
const SEQUENCE_AT: usize = 42;

fn sequence(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[SEQUENCE_AT..SEQUENCE_AT + 4].try_into().unwrap())
}

fn inject(socket: &OwnedFd, bytes: &[u8]) {
    assert_eq!(send(socket.as_raw_fd(), bytes, MsgFlags::empty()), Ok(bytes.len()));
}

/// The next packet at a receiving socket, without its virtio header.
fn collect(socket: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 16384];
    let len = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT).ok()?;
    Some(bytes[10..len].to_vec())
}

fn bytes_of(memory: &Memory, packet: &Packet) -> Vec<u8> {
    packet.fragments.iter().flat_map(|piece| memory.umem.bytes(&piece.frame, piece.offset, piece.len).to_vec()).collect()
}

/// Hands the port what it wants of the pool, as the ingress turn does.
fn refill(rx: &mut impl Receive, memory: &mut Memory) {
    let count = rx.stage_refill(&memory.umem, &memory.pool, 256);
    rx.publish_refill(count);
    memory.pool.set_len(memory.pool.len() - count);
}

/// One receive, with refill before and the refused frames back in the pool.
fn take(rx: &mut impl Receive, memory: &mut Memory) -> Batch {
    let (mut batch, mut spare) = (Batch::new(), ArrayVec::new());
    refill(rx, memory);
    rx.receive(&memory.umem, BATCH_LEN, &mut batch, &mut spare);
    batch.iter().flat_map(|packet| &packet.fragments).for_each(|piece| memory.held.set(piece.frame.index() as usize, 0));
    for frame in spare {
        memory.held.set(frame.index() as usize, 0);
        memory.pool.put(frame);
    }
    rx.release();
    batch
}

/// Turns until `count` packets came or 2 s passed.
fn take_count(rx: &mut impl Receive, memory: &mut Memory, count: usize) -> Vec<Packet> {
    let until = Instant::now() + Duration::from_secs(2);
    let mut packets = Vec::new();
    while packets.len() < count && Instant::now() < until {
        packets.extend(take(rx, memory));
    }
    packets
}

fn put(tx: &mut impl Transmit, packet: Packet) {
    let last = packet.fragments.len() - 1;
    for (position, piece) in packet.fragments.into_iter().enumerate() {
        let options = if position < last { CONTINUES } else { 0 };
        tx.put(RawDesc { addr: piece.frame.base() + u64::from(piece.offset), len: piece.len, options });
        let _ = piece.frame.into_index();
    }
}

fn reap(tx: &mut impl Transmit, memory: &mut Memory) -> usize {
    let mut addresses = ArrayVec::new();
    tx.reap(&mut addresses);
    for addr in &addresses {
        let (frame, _) = memory.umem.claim(RawDesc { addr: *addr, len: 0, options: 0 }).unwrap();
        memory.pool.put(frame);
    }
    tx.reaped(addresses.len() as u32);
    addresses.len()
}

/// Receive → transmit of one turn. Returns packets forwarded.
fn turn(rx: &mut impl Receive, tx: &mut impl Transmit, memory: &mut Memory) -> usize {
    let batch = take(rx, memory);
    let count = batch.len();
    for packet in batch {
        if tx.free() >= packet.fragments.len() as u32 { put(tx, packet) } else { memory.give_back(packet) }
    }
    tx.publish();
    assert_ne!(tx.kick(), Err(Errno::EIO));
    while reap(tx, memory) > 0 {}
    count
}

/// Ends receiving and checks that every frame is back.
fn finish(mut rx: PacketReceive<SharedArray<u8>>, mut memory: Memory) {
    assert_eq!(memory.held_count(), rx.standing(), "the map says what the port holds");
    assert_eq!(memory.pool.len() + memory.held_count(), FRAMES, "pool + held = all");
    rx.stop().unwrap();
    let until = Instant::now() + Duration::from_secs(2);
    while !rx.is_stopped() && Instant::now() < until {
        take(&mut rx, &mut memory).into_iter().for_each(|packet| memory.give_back(packet));
    }
    rx.take_back(&mut memory.pool);
    assert_eq!((memory.pool.len(), memory.held_count()), (FRAMES, 0));
}

#[test]
fn every_packet_goes_through_once_and_in_order() {
    for engine in BOTH {
        let Some(_world) = World::new(1500) else { return };
        let source = socket::open_send(ifindex("s0")).unwrap();
        let sink = socket::open_receive(ifindex("d1"), &[], None).unwrap();
        let mut memory = Memory::new();
        let mut rx = receiver(engine, socket::open_receive(ifindex("s1"), &[], None).unwrap(), &memory);
        let mut tx = sender(engine, socket::open_send(ifindex("d0")).unwrap(), &memory);
        turn(&mut rx, &mut tx, &mut memory);
        let (mut next, mut got, count) = (0, 0, 20_000);
        while got < count {
            for _ in 0..if next < count { 100 } else { 0 } {
                inject(&source, &packet(next, &[], 64 + next as usize % 1400));
                next += 1;
            }
            let before = got;
            while turn(&mut rx, &mut tx, &mut memory) > 0 {}
            while let Some(bytes) = collect(&sink) {
                assert_eq!(bytes, packet(got, &[], 64 + got as usize % 1400), "{engine:?} packet {got}");
                got += 1;
            }
            assert!(got > before || next < count, "{engine:?}: {got} of {count} arrived");
        }
        assert_eq!((failed(&mut tx), tx.outstanding(), tx.position(), tx.reap_position()), (0, 0, count, count));
        assert_eq!(rx.counters(), Default::default());
        finish(rx, memory);
    }
}

#[test]
fn tags_come_through_byte_for_byte() {
    let single = [[0x81, 0, 0x60, 100]];
    let service = [[0x88, 0xa8, 0x20, 7]];
    let double = [[0x88, 0xa8, 0x20, 7], [0x81, 0, 0x60, 100]];
    for engine in BOTH {
        let Some(_world) = World::new(1500) else { return };
        let source = socket::open_send(ifindex("s0")).unwrap();
        let mut memory = Memory::new();
        let mut rx = receiver(engine, socket::open_receive(ifindex("s1"), &[], None).unwrap(), &memory);
        take(&mut rx, &mut memory);
        for (number, tags) in [&single[..], &service, &double, &[]].into_iter().enumerate() {
            let sent = packet(number as u32, tags, 100);
            inject(&source, &sent);
            let mut packets = take_count(&mut rx, &mut memory, 1);
            let packet = packets.pop().unwrap();
            assert_eq!(bytes_of(&memory, &packet), sent, "{engine:?} {tags:x?}");
            assert_eq!(packet.fragments[0].offset, HEADROOM - if tags.is_empty() { 0 } else { 4 });
            memory.give_back(packet);
        }
        finish(rx, memory);
    }
}

/// A UDP socket that sends multicast out of s0.
fn udp(world: &World) -> UdpSocket {
    world.ip("addr add 10.7.0.1/24 dev s0");
    let udp = UdpSocket::bind("10.7.0.1:0").unwrap();
    let interface = Ipv4Addr::new(10, 7, 0, 1);
    setsockopt(&udp, nix::sys::socket::sockopt::IpMulticastTtl, &4).unwrap();
    world.ip("route add 224.0.0.0/4 dev s0");
    assert_eq!(udp.local_addr().unwrap().ip(), interface);
    udp
}

#[test]
fn unfinished_checksums_are_flagged() {
    for engine in BOTH {
        let Some(world) = World::new(1500) else { return };
        let source = socket::open_send(ifindex("s0")).unwrap();
        let mut memory = Memory::new();
        let mut rx = receiver(engine, socket::open_receive(ifindex("s1"), &[], None).unwrap(), &memory);
        take(&mut rx, &mut memory);
        udp(&world).send_to(b"from a local sender", "239.1.2.3:5000").unwrap();
        let packet_of_socket = take_count(&mut rx, &mut memory, 1).pop().unwrap();
        assert!(packet_of_socket.hint.partial && packet_of_socket.hint.rule.is_none(), "{engine:?}");
        memory.give_back(packet_of_socket);
        inject(&source, &packet(0, &[], 64));
        let finished = take_count(&mut rx, &mut memory, 1).pop().unwrap();
        assert!(!finished.hint.partial, "{engine:?}");
        memory.give_back(finished);
        finish(rx, memory);
    }
}

#[test]
fn what_does_not_fit_a_frame_is_counted() {
    for engine in BOTH {
        let Some(_world) = World::new(9000) else { return };
        let source = socket::open_send(ifindex("s0")).unwrap();
        let mut memory = Memory::new();
        let mut rx = receiver(engine, socket::open_receive(ifindex("s1"), &[], None).unwrap(), &memory);
        take(&mut rx, &mut memory);
        let most = FRAME_CAPACITY as usize;
        for len in [most + 1, 9014, most, most + 1] {
            inject(&source, &packet(7, &[], len));
        }
        let packets = take_count(&mut rx, &mut memory, 1);
        assert_eq!(bytes_of(&memory, &packets[0]).len(), most);
        packets.into_iter().for_each(|packet| memory.give_back(packet));
        assert_eq!(take_count_none(&mut rx, &mut memory), 0);
        assert_eq!(rx.counters().too_big, 3, "{engine:?}");
        finish(rx, memory);
    }
}

/// Turns for a while in which nothing should come.
fn take_count_none(rx: &mut impl Receive, memory: &mut Memory) -> usize {
    let mut count = 0;
    for _ in 0..100 {
        let batch = take(rx, memory);
        count += batch.len();
        batch.into_iter().for_each(|packet| memory.give_back(packet));
    }
    count
}

#[test]
fn a_super_frame_is_never_taken_for_a_packet() {
    for engine in BOTH {
        let Some(world) = World::new(1500) else { return };
        let mut memory = Memory::new();
        let mut rx = receiver(engine, socket::open_receive(ifindex("s1"), &[], None).unwrap(), &memory);
        take(&mut rx, &mut memory);
        let udp = udp(&world);
        setsockopt(&udp, nix::sys::socket::sockopt::UdpGsoSegment, &400).unwrap();
        udp.send_to(&[1; 1200], "239.1.2.3:5000").unwrap();
        let packets: Vec<Packet> = (0..100).flat_map(|_| take(&mut rx, &mut memory)).collect();
        assert!(packets.iter().all(|packet| packet.fragments[0].len == 442), "{engine:?}: three datagrams taken for one");
        assert!(rx.counters().too_big == 1 || packets.len() == 3, "{engine:?}: neither refused nor split");
        packets.into_iter().for_each(|packet| memory.give_back(packet));
        finish(rx, memory);
    }
}

#[test]
fn packets_in_pieces_are_sent_whole() {
    for engine in BOTH {
        let Some(_world) = World::new(9000) else { return };
        let sink = socket::open_receive(ifindex("d1"), &[], None).unwrap();
        let mut memory = Memory::new();
        let mut tx = sender(engine, socket::open_send(ifindex("d0")).unwrap(), &memory);
        let sent = packet(3, &[], 9000);
        for round in 0..200 {
            let pieces: Vec<&[u8]> = sent.chunks(FRAME_CAPACITY as usize).collect();
            for (position, piece) in pieces.iter().enumerate() {
                let mut frame = memory.pool.take(&memory.umem).unwrap();
                memory.umem.bytes_mut(&mut frame, HEADROOM, piece.len() as u32).copy_from_slice(piece);
                let options = if position + 1 < pieces.len() { CONTINUES } else { 0 };
                tx.put(RawDesc { addr: frame.base() + u64::from(HEADROOM), len: piece.len() as u32, options });
                let _ = frame.into_index();
            }
            assert_eq!((tx.outstanding(), memory.held_count()), (6, 6));
            tx.publish();
            assert_eq!(tx.kick(), Ok(Kick::Done));
            assert_eq!(reap(&mut tx, &mut memory), 6);
            assert_eq!(collect(&sink).as_deref(), Some(&sent[..]), "{engine:?} round {round}");
        }
        assert_eq!((failed(&mut tx), memory.pool.len(), memory.held_count()), (0, FRAMES, 0));
    }
}

#[test]
fn a_downed_and_a_deleted_interface_are_told_apart() {
    for engine in BOTH {
        let Some(world) = World::new(1500) else { return };
        let mut memory = Memory::new();
        let mut tx = sender(engine, socket::open_send(ifindex("d0")).unwrap(), &memory);
        let mut send_one = |memory: &mut Memory, len: u32| {
            let mut frame = memory.pool.take(&memory.umem).unwrap();
            let bytes = packet(0, &[], 64);
            memory.umem.bytes_mut(&mut frame, HEADROOM, 64).copy_from_slice(&bytes);
            tx.put(RawDesc { addr: frame.base() + u64::from(HEADROOM), len, options: 0 });
            let _ = frame.into_index();
            let kick = tx.kick();
            reap(&mut tx, memory);
            (kick, failed(&mut tx), tx.outstanding())
        };
        assert_eq!(send_one(&mut memory, 64), (Ok(Kick::Done), 0, 0), "{engine:?}");
        assert_eq!(send_one(&mut memory, 1700), (Ok(Kick::Done), 1, 0), "{engine:?}: EMSGSIZE is this packet's only");
        world.ip("link set d0 down");
        assert_eq!(send_one(&mut memory, 64), (Ok(Kick::Down), 1, 0), "{engine:?}");
        world.ip("link set d0 up");
        assert_eq!(send_one(&mut memory, 64), (Ok(Kick::Done), 0, 0), "{engine:?}");
        world.ip("link del d0");
        assert_eq!(send_one(&mut memory, 64), (Ok(Kick::Gone), 1, 0), "{engine:?}");
        assert_eq!((memory.pool.len(), memory.held_count()), (FRAMES, 0));
    }
}

#[test]
fn a_refused_packet_takes_no_other_with_it() {
    for engine in BOTH {
        let Some(_world) = World::new(1500) else { return };
        let sink = socket::open_receive(ifindex("d1"), &[], None).unwrap();
        let mut memory = Memory::new();
        let mut tx = sender(engine, socket::open_send(ifindex("d0")).unwrap(), &memory);
        for number in 0..100 {
            let len = if number % 10 == 5 { 1700 } else { 64 };
            let mut frame = memory.pool.take(&memory.umem).unwrap();
            memory.umem.bytes_mut(&mut frame, 0, len).copy_from_slice(&packet(number, &[], len as usize));
            tx.put(RawDesc { addr: frame.base(), len, options: 0 });
            let _ = frame.into_index();
        }
        assert_eq!(tx.free(), 156);
        // sendmmsg stops at each refused packet, and calls are bounded: what is left goes with the next turn.
        let kicks: Vec<_> = (0..3).map(|_| tx.kick()).collect();
        assert_eq!(kicks.last(), Some(&Ok(Kick::Done)), "{engine:?} {kicks:?}");
        while reap(&mut tx, &mut memory) > 0 {}
        for number in (0..100).filter(|number| number % 10 != 5) {
            assert_eq!(collect(&sink).as_deref().map(sequence), Some(number), "{engine:?}");
        }
        assert_eq!((failed(&mut tx), tx.outstanding(), memory.pool.len(), memory.held_count()), (10, 0, FRAMES, 0), "{engine:?}");
    }
}

#[test]
fn receiving_survives_a_link_that_flaps() {
    for engine in BOTH {
        let Some(world) = World::new(1500) else { return };
        let source = socket::open_send(ifindex("s0")).unwrap();
        let mut memory = Memory::new();
        let mut rx = receiver(engine, socket::open_receive(ifindex("s1"), &[], None).unwrap(), &memory);
        take(&mut rx, &mut memory);
        world.ip("link set s1 down");
        assert_eq!(take_count_none(&mut rx, &mut memory), 0);
        assert_eq!(rx.last_error(), Some(Errno::ENETDOWN), "{engine:?}");
        world.ip("link set s1 up");
        inject(&source, &packet(1, &[], 64));
        let packets = take_count(&mut rx, &mut memory, 1);
        assert_eq!(packets.len(), 1, "{engine:?}");
        packets.into_iter().for_each(|packet| memory.give_back(packet));
        finish(rx, memory);
    }
}

#[test]
fn a_planned_replacement_loses_nothing() {
    for engine in BOTH {
        let Some(_world) = World::new(1500) else { return };
        let source = socket::open_send(ifindex("s0")).unwrap();
        let socket = socket::open_receive(ifindex("s1"), &[], None).unwrap();
        let (mut next, mut sent, mut memory) = (0, 0, Memory::new());
        for _worker in 0..6 {
            let mut rx = receiver(engine, socket.try_clone().unwrap(), &memory);
            for _ in 0..3 {
                (0..400).for_each(|n| inject(&source, &packet(sent + n, &[], 64)));
                sent += 400;
                take_in_order(&mut rx, &mut memory, &mut next);
            }
            rx.stop().unwrap();
            while !rx.is_stopped() {
                take_in_order(&mut rx, &mut memory, &mut next);
            }
            rx.take_back(&mut memory.pool);
            assert_eq!((memory.pool.len(), memory.held_count()), (FRAMES, 0));
        }
        assert!(next < sent, "{engine:?}: some are left for the last one");
        let mut rx = receiver(engine, socket, &memory);
        while take_in_order(&mut rx, &mut memory, &mut next) || next == 0 {}
        assert_eq!(next, sent, "{engine:?}");
        finish(rx, memory);
    }
}

/// One receive of packets that must go on with sequence `next`. Whether there were any.
fn take_in_order(rx: &mut impl Receive, memory: &mut Memory, next: &mut u32) -> bool {
    let batch = take(rx, memory);
    let any = !batch.is_empty();
    for packet in batch {
        assert_eq!(sequence(&bytes_of(memory, &packet)), *next);
        *next += 1;
        memory.give_back(packet);
    }
    any
}

#[test]
fn what_the_kernel_drops_is_counted() {
    for engine in BOTH {
        let Some(_world) = World::new(1500) else { return };
        let source = socket::open_send(ifindex("s0")).unwrap();
        let socket = socket::open_receive(ifindex("s1"), &[], None).unwrap();
        setsockopt(&socket, RcvBuf, &100_000).unwrap();
        let mut memory = Memory::new();
        let mut rx = receiver(engine, socket, &memory);
        take(&mut rx, &mut memory);
        (0..2000).for_each(|n| inject(&source, &packet(n, &[], 64)));
        let received = take_count_none(&mut rx, &mut memory) as u64;
        assert_eq!(rx.counters().ring_full, 0, "only housekeeping asks the kernel");
        rx.housekeeping();
        rx.housekeeping();
        let counters = rx.counters();
        assert!(counters.ring_full > 0 && counters.kernel_dropped == 0, "{engine:?} {counters:?}");
        assert_eq!(received + counters.ring_full, 2000, "{engine:?}");
        finish(rx, memory);
    }
}

#[test]
fn an_empty_pool_starves_and_recovers() {
    for engine in BOTH {
        let Some(_world) = World::new(1500) else { return };
        let source = socket::open_send(ifindex("s0")).unwrap();
        let mut memory = Memory::new();
        let mut rx = receiver(engine, socket::open_receive(ifindex("s1"), &[], None).unwrap(), &memory);
        let depth = rx.depth();
        let mut kept: Vec<_> = (depth..FRAMES).map(|_| memory.pool.take(&memory.umem).unwrap()).collect();
        take(&mut rx, &mut memory);
        (0..1000).for_each(|n| inject(&source, &packet(n, &[], 64)));
        let mut packets = Vec::new();
        (0..50).for_each(|_| packets.extend(take(&mut rx, &mut memory)));
        assert_eq!(packets.len(), depth as usize, "{engine:?}: as many as there were frames");
        assert!(rx.starved() > 0, "{engine:?}");
        kept.drain(..).for_each(|frame| memory.pool.put(frame));
        let rest = take_count(&mut rx, &mut memory, 500);
        packets.extend(rest);
        let mut next = 0;
        for packet in packets {
            assert_eq!(sequence(&bytes_of(&memory, &packet)), next, "{engine:?}");
            next += 1;
            memory.give_back(packet);
        }
        next += take_count(&mut rx, &mut memory, 1000 - next as usize).into_iter().map(|packet| memory.give_back(packet)).count() as u32;
        assert_eq!(next, 1000, "{engine:?}: nothing lost");
        finish(rx, memory);
    }
}

#[test]
fn waiting_wakes_for_a_packet_and_for_the_time() {
    for engine in BOTH {
        let Some(_world) = World::new(1500) else { return };
        let source = socket::open_send(ifindex("s0")).unwrap();
        let mut memory = Memory::new();
        let mut rx = receiver(engine, socket::open_receive(ifindex("s1"), &[], None).unwrap(), &memory);
        take(&mut rx, &mut memory);
        let started = Instant::now();
        assert_eq!(rx.wait(Duration::from_millis(20)), Ok(false), "{engine:?}");
        assert!(started.elapsed() >= Duration::from_millis(19));
        let later = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            inject(&source, &packet(0, &[], 64));
        });
        assert_eq!(rx.wait(Duration::from_secs(5)), Ok(true), "{engine:?}");
        assert!(started.elapsed() < Duration::from_secs(3));
        later.join().unwrap();
        let packets = take_count(&mut rx, &mut memory, 1);
        assert_eq!(packets.len(), 1, "{engine:?}");
        packets.into_iter().for_each(|packet| memory.give_back(packet));
        finish(rx, memory);
    }
}
