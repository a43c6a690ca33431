//! The engine over a socket pair: it says ENOBUFS' cousin EAGAIN when it is full, and EMSGSIZE to what is too long.
//!
//! Must never need a network namespace.

use super::*;
use crate::frame::bundle::{bundle_len, place as header_place, write_head};
use crate::frame::{BUNDLE, COALESCE, CONTINUES, FRAME_SIZE};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, setsockopt, socketpair, sockopt};
use std::collections::BTreeMap;

#[test]
fn flows_with_one_place_keep_their_runs() {
    let mut open = vec![Open::NONE; OPEN];
    let hashes: Vec<u32> = (0..PROBES as u32).map(|n| 7 + n * OPEN as u32).collect();
    let mut run_of = |window, hash| place(&mut open, window, hash).unwrap().run;
    assert_eq!(run_of(1, hashes[0]), NONE);
    for (number, hash) in hashes.iter().enumerate() {
        place(&mut open, 1, *hash).unwrap().run = number as u16;
    }
    let mut run_of = |window, hash| place(&mut open, window, hash).unwrap().run;
    assert!(hashes.iter().enumerate().all(|(number, hash)| run_of(1, *hash) == number as u16), "each has its own");
    assert_eq!(run_of(1, 7 + 99 * OPEN as u32), NONE, "one too many takes the first place");
    assert_eq!((run_of(1, hashes[1]), run_of(2, hashes[1])), (1, NONE), "a new window has none");
}

#[derive(Debug)]
struct NotHeld;

impl Held for NotHeld {
    fn set(&self, _frame: u32, _held: bool) {}
}

const FRAMES: u32 = 256;
const OUTPUTS: usize = 5;
const LABEL: u32 = 40;

/// An untagged IPv4 datagram with DF and some checksum. Byte 5 of the destination MAC names the output.
fn datagram(output: u8, number: u16, payload_len: usize) -> Vec<u8> {
    let mut bytes = vec![1, 0, 0x5e, 0, 0, output, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
    bytes.extend((28 + payload_len as u16).to_be_bytes());
    bytes.extend(number.to_be_bytes());
    bytes.extend([0x40, 0, 9, 17, 0, 0, 10, 0, 0, 1, 239, 1, 1, 1, 0x13, 0x88, 0x13, 0x89]);
    bytes.extend((8 + payload_len as u16).to_be_bytes());
    bytes.extend([0x12, 0x34]);
    bytes.extend(number.to_be_bytes().repeat(payload_len / 2));
    bytes
}

/// The engine, its outbox, and the other end of its socket with so much room.
struct Bench {
    engine: CoalesceTransmit,
    outbox: Outbox<NotHeld>,
    far: OwnedFd,
    next_frame: u32,
    got: BTreeMap<u8, Vec<u16>>,
    super_frames: usize,
}

impl Bench {
    fn new(send_buffer: usize) -> Self {
        let (near, far) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_NONBLOCK).unwrap();
        setsockopt(&near, sockopt::SndBuf, &send_buffer).unwrap();
        let fd = nix::sys::memfd::memfd_create(c"coalesce-test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, i64::from(FRAMES * FRAME_SIZE)).unwrap();
        let umem = Arc::new(Umem::new(crate::sys::Mapping::new(&fd, 0, (FRAMES * FRAME_SIZE) as usize, true, false).unwrap()));
        let outbox = Outbox::new(512, umem.len() as u64, NotHeld);
        let engine = CoalesceTransmit::new(near, umem, Arc::default());
        Self { engine, outbox, far, next_frame: 0, got: BTreeMap::new(), super_frames: 0 }
    }

    fn place(&mut self, bytes: &[u8]) -> RawDesc {
        let mut frame = self.engine.umem.claim_index(self.next_frame).unwrap();
        self.next_frame += 1;
        self.engine.umem.bytes_mut(&mut frame, 256, bytes.len() as u32).copy_from_slice(bytes);
        let addr = frame.base() + 256;
        frame.into_index();
        RawDesc { addr, len: bytes.len() as u32, options: 0 }
    }

    /// One packet for all outputs.
    fn put_bundle(&mut self, number: u16, payload_len: usize) {
        let mut headers = vec![0; bundle_len(OUTPUTS, 42)];
        let head = BundleHead { outputs: 0b11111, rule: [1, 2, 3], count: OUTPUTS as u32, header_len: 42, zero: 0 };
        write_head(&mut headers, &head);
        for output in 0..OUTPUTS {
            let header = header_place(&mut headers, output, 42, LABEL + output as u32).unwrap();
            header.copy_from_slice(&datagram(output as u8 + 1, number, payload_len)[..42]);
        }
        let desc = self.place(&headers);
        self.outbox.put(RawDesc { options: RawDesc::options(LABEL, BUNDLE | COALESCE | CONTINUES), ..desc });
        let desc = self.place(&datagram(0, number, payload_len));
        self.outbox.put(RawDesc { options: RawDesc::options(LABEL, COALESCE), ..desc });
    }

    /// Up to `count` messages, cut into their packets.
    fn receive(&mut self, count: usize) {
        for _ in 0..count {
            let mut bytes = vec![0; 70_000];
            let Ok(len) = recv(self.far.as_raw_fd(), &mut bytes, MsgFlags::empty()) else { return };
            let (vnet, packet) = bytes[..len].split_at(super::super::runs::VNET_LEN);
            let (header, payloads) = packet.split_at(42);
            let size = usize::from(u16::from_ne_bytes([vnet[4], vnet[5]]));
            let size = if size == 0 { payloads.len() } else { size };
            self.super_frames += usize::from(payloads.len() > size);
            let numbers = self.got.entry(header[5]).or_default();
            for payload in payloads.chunks(size) {
                let number = u16::from_be_bytes([payload[0], payload[1]]);
                assert!(payload.chunks(2).all(|pair| pair == number.to_be_bytes()), "the payload of one packet");
                numbers.push(number);
            }
        }
    }

    /// Turns until everything has had its fate, with so many messages received between two of them.
    fn run(&mut self, messages: usize) -> usize {
        for turn in 0..10_000 {
            self.engine.flush(&mut self.outbox).unwrap();
            self.receive(messages);
            if self.outbox.is_flushed() {
                self.receive(usize::MAX);
                return turn;
            }
        }
        panic!("stuck: {:?}", self.outbox);
    }
}

#[test]
fn a_bundles_run_is_one_super_frame_an_output() {
    let mut bench = Bench::new(1 << 20);
    (0..100).for_each(|number| bench.put_bundle(number, 64));
    assert_eq!(bench.run(0), 0);
    assert_eq!((bench.got.len(), bench.super_frames), (OUTPUTS, 2 * OUTPUTS), "64 and 36 packets for each");
    assert!(bench.got.values().all(|numbers| numbers.iter().copied().eq(0..100)));
    assert_eq!(bench.outbox.refused(), None);
}

/// A socket that is full stops a window in the middle of its outputs, again and again.
#[test]
fn a_full_device_costs_no_output_a_packet_or_its_order() {
    for (send_buffer, messages) in [(4_608, 1), (4_608, 2), (20_000, 3)] {
        let mut bench = Bench::new(send_buffer);
        (0..100).for_each(|number| bench.put_bundle(number, if number % 10 < 7 { 64 } else { 20 }));
        assert!(bench.run(messages) > 5, "it was never full");
        let numbers = |output: u8| bench.got[&output].clone();
        for output in 1..=OUTPUTS as u8 {
            let [long, short]: [Vec<u16>; 2] =
                [true, false].map(|is_long| numbers(output).into_iter().filter(|n| (n % 10 < 7) == is_long).collect());
            assert!(
                long.is_sorted() && short.is_sorted() && long.len() == 70 && short.len() == 30,
                "output {output}: {:?}",
                numbers(output)
            );
        }
        assert_eq!(bench.outbox.refused(), None);
    }
}

/// What is too long as a super-frame goes one by one, and an output that takes nothing is named for each packet.
#[test]
fn what_is_refused_goes_one_by_one_or_is_counted_by_output() {
    let mut bench = Bench::new(4_608);
    (0..60).for_each(|number| bench.put_bundle(number, 200));
    bench.run(usize::MAX);
    assert!(bench.got.len() == OUTPUTS && bench.got.values().all(|numbers| numbers.iter().copied().eq(0..60)), "{:?}", bench.got);
    assert_eq!(bench.outbox.refused(), None);
    drop(std::mem::replace(&mut bench.far, std::fs::File::open("/dev/null").unwrap().into()));
    (60..70).for_each(|number| bench.put_bundle(number, 64));
    bench.engine.flush(&mut bench.outbox).unwrap();
    let refused: Vec<Refusal> = std::iter::from_fn(|| bench.outbox.refused()).collect();
    assert!(bench.outbox.is_flushed() && refused.len() == 10 * OUTPUTS, "{refused:?}");
    for output in 0..OUTPUTS as u32 {
        assert_eq!(refused.iter().filter(|refusal| **refusal == Refusal { label: LABEL + output, len: 106 }).count(), 10);
    }
}

#[test]
fn a_bundle_of_which_nothing_is_sent_names_its_outputs() {
    let mut bench = Bench::new(1 << 20);
    bench.put_bundle(7, 64);
    let headers = RawDesc { addr: 256, len: bundle_len(OUTPUTS, 42) as u32, options: 0 };
    let mut labels = Vec::new();
    bench.engine.disappoint(headers, 106, &mut |refusal| labels.push(refusal.label));
    assert_eq!(labels, (LABEL..LABEL + OUTPUTS as u32).collect::<Vec<_>>());
}
