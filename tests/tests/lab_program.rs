//! The lab object: the generator writes what it is told, and the counters of its programs can be relied on.
//!
//! Each test runs in a network namespace of its own thread, which ends with it.

#![expect(clippy::unwrap_used, reason = "a test's way to fail")]

use aya::maps::{Array, PerCpuArray, PerCpuValues};
use aya::programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use nix::sched::{CloneFlags, unshare};
use relay::lab::clock;
use relay::lab::packet::Flow;
use relay::nic::afxdp::program::LAB_OBJECT;
use relay_common::{
    CounterValue,
    lab::{Pace, TEMPLATE_LEN, Template, VARY_GROUP, VARY_SOURCE_PORT},
};
use relay_tests::golden;
use std::process::Command;

const XDP_ABORTED: u32 = 0;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
/// Where the payload and the UDP checksum of the corpus's plain packet stand.
const PAYLOAD: u32 = 42;
const CHECKSUM: u32 = 40;

fn can_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIPPED: loading XDP programs and making network namespaces needs root");
    }
    root
}

fn xdp<'a>(lab: &'a mut Ebpf, name: &str) -> &'a mut Xdp {
    let xdp: &mut Xdp = lab.program_mut(name).unwrap().try_into().unwrap();
    if xdp.fd().is_err() {
        xdp.load().unwrap();
    }
    xdp
}

fn run(xdp: &Xdp, packet: &[u8]) -> (u32, Vec<u8>) {
    let mut out = vec![0; packet.len() + 64];
    let mut options = TestRunOptions::new();
    options.data_in = Some(packet);
    options.data_out = Some(&mut out);
    let result = xdp.test_run(options).unwrap();
    out.truncate(result.data_size_out as usize);
    (result.return_value, out)
}

fn count(lab: &Ebpf) -> CounterValue {
    let map = PerCpuArray::<_, CounterValue>::try_from(lab.map("LAB_COUNT").unwrap()).unwrap();
    let values = map.get(&0, 0).unwrap();
    CounterValue { packets: values.iter().map(|value| value.packets).sum(), bytes: values.iter().map(|value| value.bytes).sum() }
}

/// The plain packet with a payload of zeros in the place of the sequence number, and its UDP checksum.
fn template(packet: &mut [u8]) -> Template {
    packet[PAYLOAD as usize..PAYLOAD as usize + 8].fill(0);
    packet[CHECKSUM as usize..CHECKSUM as usize + 2].fill(0);
    let checksum = !udp_sum(packet);
    packet[CHECKSUM as usize..CHECKSUM as usize + 2].copy_from_slice(&checksum.to_be_bytes());
    let mut bytes = [0; TEMPLATE_LEN];
    bytes[..packet.len()].copy_from_slice(packet);
    let (len, checksum) = (packet.len() as u32, checksum.into());
    Template { len, sequence_offset: PAYLOAD, checksum_offset: CHECKSUM, checksum, stamp_offset: 0, flows: 0, vary: 0, zero: 0, bytes }
}

/// RFC 768's sum over pseudo-header and datagram of an untagged IPv4 packet; 0xffff where its checksum is right.
fn udp_sum(packet: &[u8]) -> u16 {
    let udp = &packet[34..];
    let words =
        packet[26..34].chunks(2).chain(udp.chunks(2)).map(|word| u32::from(word[0]) << 8 | word.get(1).copied().map_or(0, u32::from));
    let sum = words.sum::<u32>() + 17 + udp.len() as u32;
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The sum of the IPv4 header; 0xffff where its checksum is right.
fn ip_sum(packet: &[u8]) -> u16 {
    let sum: u32 = packet[14..34].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

fn set_template(lab: &mut Ebpf, template: Template) {
    Array::<_, Template>::try_from(lab.map_mut("LAB_TEMPLATE").unwrap()).unwrap().set(0, template, 0).unwrap();
}

fn set_sequence(lab: &mut Ebpf, next: u64) {
    let values = PerCpuValues::try_from(vec![next; aya::util::nr_cpus().unwrap()]).unwrap();
    PerCpuArray::<_, u64>::try_from(lab.map_mut("LAB_SEQUENCE").unwrap()).unwrap().set(0, values, 0).unwrap();
}

#[test]
fn the_generator_writes_whole_packets_with_rising_sequence_and_right_checksum() {
    if !can_run() {
        return;
    }
    let mut lab = EbpfLoader::new().load(LAB_OBJECT).unwrap();
    let mut packet = golden::corpus()[0].bytes.clone();
    set_template(&mut lab, template(&mut packet));
    for start in [0, 0xffff, 0xffff_fffe, 0x1234_5678_9abc_def0, u64::MAX - 1] {
        set_sequence(&mut lab, start);
        let (action, out) = run(xdp(&mut lab, "lab_generate"), &vec![0xee; packet.len()]);
        let sequence = u64::from_be_bytes(out[42..50].try_into().unwrap());
        assert_eq!((action, sequence, udp_sum(&out)), (XDP_TX, start, 0xffff), "sequence {start:#x}");
        assert_eq!((&out[..40], &out[50..]), (&packet[..40], &packet[50..]), "the rest is the template's");
    }
    assert_eq!(run(xdp(&mut lab, "lab_generate"), &vec![0; packet.len() - 1]).0, XDP_ABORTED, "the template is longer than the packet");
    assert_eq!(count(&lab).packets, 5);
}

/// A datagram of 32 zero bytes.
fn datagram() -> Vec<u8> {
    let flow = Flow {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: [1, 0, 0x5e, 1, 1, 1],
        source: "10.0.0.1:4000".parse().unwrap(),
        destination: "239.1.1.1:5000".parse().unwrap(),
        ttl: 9,
        dscp: 0,
    };
    flow.frame(&[0; 32])
}

/// The time of sending, on the clock that was asked for, under a checksum that is right.
#[test]
fn the_generator_stamps_what_it_sends() {
    if !can_run() {
        return;
    }
    let mut lab = EbpfLoader::new().load(LAB_OBJECT).unwrap();
    let mut packet = datagram();
    let stamped = Template { stamp_offset: PAYLOAD + 8, ..template(&mut packet) };
    set_template(&mut lab, stamped);
    let clock_ns = clock::realtime_ns() - clock::monotonic_ns();
    Array::<_, Pace>::try_from(lab.map_mut("LAB_PACE").unwrap()).unwrap().set(0, Pace { clock_ns, ..Pace::default() }, 0).unwrap();
    let before = clock::realtime_ns();
    let (action, out) = run(xdp(&mut lab, "lab_generate"), &vec![0xee; packet.len()]);
    let stamp = u64::from_be_bytes(out[50..58].try_into().unwrap());
    // The two clocks were read one after the other.
    assert!(stamp + 1_000_000_000 > before && stamp < clock::realtime_ns() + 1_000_000_000, "{stamp} is not after {before}");
    assert_eq!((action, udp_sum(&out), &out[58..]), (XDP_TX, 0xffff, &packet[58..]));
}

/// Each flow has its turn before one comes again, whole, with right checksums.
#[test]
fn flows_take_turns() {
    if !can_run() {
        return;
    }
    for vary in [VARY_SOURCE_PORT, VARY_GROUP] {
        let mut lab = EbpfLoader::new().load(LAB_OBJECT).unwrap();
        let mut packet = datagram();
        let flows = Template { sequence_offset: 0, flows: 300, vary, ..template(&mut packet) };
        set_template(&mut lab, flows);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..300 {
            let (action, out) = run(xdp(&mut lab, "lab_generate"), &vec![0xee; packet.len()]);
            assert_eq!((action, udp_sum(&out), ip_sum(&out)), (XDP_TX, 0xffff, 0xffff), "{out:02x?}");
            let [port, group] = [u32::from(out[34]) << 8 | u32::from(out[35]), u32::from_be_bytes(out[30..34].try_into().unwrap())];
            assert_eq!(out[..6], [1, 0, 0x5e, out[31] & 0x7f, out[32], out[33]]);
            seen.insert(if vary == VARY_GROUP { group - 0xef01_0101 } else { port - 4000 });
        }
        assert!(seen.into_iter().eq(0..300), "all of them, once each");
    }
}

#[test]
fn the_others_count_what_they_see() {
    if !can_run() {
        return;
    }
    let mut lab = EbpfLoader::new().load(LAB_OBJECT).unwrap();
    let corpus = golden::corpus();
    let (udp, other) = (&corpus[0].bytes, &corpus.iter().find(|case| case.name == "ARP").unwrap().bytes);
    assert_eq!(run(xdp(&mut lab, "lab_drop"), udp).0, XDP_DROP);
    assert_eq!(run(xdp(&mut lab, "lab_count_pass"), other).0, XDP_PASS);
    assert_eq!(run(xdp(&mut lab, "lab_redirect"), udp).0, XDP_PASS, "no device is set");
    assert_eq!(run(xdp(&mut lab, "lab_xsk"), udp).0, XDP_PASS, "no socket is set");
    assert_eq!(run(xdp(&mut lab, "lab_xsk"), other).0, XDP_PASS, "not UDP, not counted");
    assert_eq!(count(&lab), CounterValue { packets: 4, bytes: 3 * udp.len() as u64 + other.len() as u64 });
}

/// Live frames: 1,000 packets leave one veth and arrive at the other, each in its own sequence.
#[test]
fn generated_packets_cross_a_veth() {
    if !can_run() {
        return;
    }
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let quiet = ["link set eb0 addrgenmode none", "link set eb1 addrgenmode none"];
    for args in ["link add eb0 type veth peer name eb1", quiet[0], quiet[1], "link set eb0 up", "link set eb1 up"] {
        assert!(Command::new("ip").args(args.split(' ')).status().unwrap().success(), "ip {args}");
    }
    let ifindex = |name: &str| nix::net::if_::if_nametoindex(name).unwrap();
    let mut sink = EbpfLoader::new().load(LAB_OBJECT).unwrap();
    xdp(&mut sink, "lab_drop").attach_to_if_index(ifindex("eb1"), XdpMode::Driver).unwrap();
    let mut gate = EbpfLoader::new().load(LAB_OBJECT).unwrap();
    xdp(&mut gate, "lab_drop").attach_to_if_index(ifindex("eb0"), XdpMode::Driver).unwrap();
    let mut source = EbpfLoader::new().load(LAB_OBJECT).unwrap();
    let mut packet = golden::corpus()[0].bytes.clone();
    set_template(&mut source, template(&mut packet));
    let context = [0, packet.len() as u32, 0, ifindex("eb0"), 0, 0].map(u32::to_ne_bytes).concat();
    let mut options = TestRunOptions::new();
    options.data_in = Some(&packet);
    options.ctx_in = Some(&context);
    options.repeat = 1_000;
    options.attrs = TestRunAttrs::new().xdp_live_frames(64);
    xdp(&mut source, "lab_generate").test_run(options).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(count(&sink), CounterValue { packets: 1_000, bytes: 1_000 * packet.len() as u64 });
    assert_eq!(count(&source).packets, 1_000);
}
