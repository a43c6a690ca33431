//! The golden corpus: packets with the verdict every path must give them, and the rules that verdict stands on.
//!
//! Written out in `tests/golden/corpus.txt`, one line each (`counter slot hex name`), so that any tool can read it and
//! no change of the builders goes unnoticed. Must never call the code it judges.

use relay_common::{
    IngressConfig, MatchEntry, MatchKey, NO_SLOT, PORT_ANY, PORT_EXACT, Shape, SourceKey, SourceVerdict, TAG_ANY, TAG_EXACT, TAG_NONE,
    XdpCounter::{self, *},
};
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

/// One packet and what must become of it.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is special about it.
    pub name: String,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
    /// The one counter that counts it, given a socket for every rule.
    pub counter: XdpCounter,
    /// The rule's slot, for [`XdpCounter::Redirected`]; its serial is [`serial`] of it.
    pub slot: Option<u32>,
}

/// The serial every entry of [`tables`] has beside its slot.
pub const fn serial(slot: u32) -> u32 {
    slot + 100
}

/// The tables the verdicts stand on.
pub struct Tables {
    /// For map `INGRESS`; the interface's slot is [`INTERFACE_SLOT`].
    pub ingress: IngressConfig,
    /// For map `MATCHES`.
    pub matches: Vec<(MatchKey, MatchEntry)>,
    /// For map `SOURCES`, with the prefix length of the address.
    pub sources: Vec<(SourceKey, u32, SourceVerdict)>,
}

/// Slot of the interface in [`tables`].
pub const INTERFACE_SLOT: u32 = 3;

const fn shape(family: u8, tag_mode: u8, group_len: u8, port_mode: u8) -> Shape {
    Shape { family, tag_mode, group_len, port_mode }
}

const V4_FULL: Shape = shape(4, TAG_EXACT, 32, PORT_EXACT);
const V4_PORTLESS: Shape = shape(4, TAG_EXACT, 32, PORT_ANY);
const V4_TAGLESS: Shape = shape(4, TAG_ANY, 32, PORT_EXACT);
const V4_NET: Shape = shape(4, TAG_ANY, 24, PORT_ANY);
const V6_FULL: Shape = shape(6, TAG_EXACT, 128, PORT_EXACT);
const V6_NET: Shape = shape(6, TAG_ANY, 64, PORT_ANY);
const V6_WIDE: Shape = shape(6, TAG_ANY, 12, PORT_EXACT);
const V6_ALL: Shape = shape(6, TAG_EXACT, 0, PORT_EXACT);

/// Shapes in order of precedence, every kind of entry, and source sets with exceptions.
pub fn tables(ifindex: u32) -> Tables {
    let mut ingress = IngressConfig { slot: INTERFACE_SLOT, ..Default::default() };
    for (place, shape) in ingress.shapes.iter_mut().zip([V4_FULL, V4_PORTLESS, V4_TAGLESS, V4_NET, V6_FULL, V6_NET, V6_WIDE, V6_ALL]) {
        *place = shape;
        ingress.shape_count += 1;
    }
    let matches = [
        (V4_FULL, TAG_NONE, addr("239.1.1.1"), 5000, 1, 0),
        (V4_FULL, 100, addr("239.1.1.1"), 5000, 2, 0),
        (V4_FULL, 100 | 200 << 16, addr("239.1.1.1"), 5000, 3, 0),
        (V4_PORTLESS, TAG_NONE, addr("239.1.1.2"), 0, 4, 0),
        (V4_TAGLESS, 0, addr("239.1.1.3"), 5000, NO_SLOT, 1),
        (V4_NET, 0, addr("239.2.2.0"), 0, 7, 2),
        (V4_NET, 0, addr("239.1.1.0"), 0, 8, 0),
        (V6_FULL, TAG_NONE, addr("ff3e::1234"), 5000, 9, 0),
        (V6_NET, 0, addr("ff3e:0:0:1::"), 0, 10, 3),
        (V4_FULL, TAG_NONE, addr("192.0.2.7"), 6000, 12, 0),
        (V6_WIDE, 0, addr("ff30::"), 7000, 13, 0),
        (V6_ALL, 7, addr("::"), 9, 4095, 0),
        (V4_FULL, TAG_NONE, addr("239.1.1.9"), 0, 14, 0),
    ];
    let matches = matches.map(|(shape, tag, addr, port, slot, source_set)| {
        let key = MatchKey { ifindex, tag, addr, port, zero: 0, shape };
        (key, MatchEntry { slot, serial: serial_of(slot), source_set, zero: 0 })
    });
    let sources = [
        (1, addr("10.0.0.0"), 8, 5),
        (1, addr("10.9.0.0"), 16, NO_SLOT),
        (1, addr("10.9.9.9"), 32, 6),
        (2, addr("10.0.0.13"), 32, NO_SLOT),
        (3, addr("2001:db8::"), 32, 11),
    ];
    let sources = sources.map(|(set, addr, len, slot): (u32, _, _, _)| {
        (SourceKey { set: set.to_be_bytes(), addr }, len, SourceVerdict { slot, serial: serial_of(slot) })
    });
    Tables { ingress, matches: matches.to_vec(), sources: sources.to_vec() }
}

fn serial_of(slot: u32) -> u32 {
    if slot == NO_SLOT { 0 } else { serial(slot) }
}

/// Network order, IPv4 in the first 4 bytes.
fn addr(text: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    match text.parse::<Ipv4Addr>() {
        Ok(v4) => bytes[..4].copy_from_slice(&v4.octets()),
        Err(_) => bytes = text.parse::<Ipv6Addr>().map_or([0; 16], |v6| v6.octets()),
    }
    bytes
}

/// Ethertypes and protocols by name, where a case reads better so.
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const UDP: u8 = 17;

/// Ethernet header to a group, tags as (ethertype, TCI), then the payload.
fn frame(tags: &[(u16, u16)], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x01, 0x00, 0x5e, 1, 1, 1, 2, 0, 0, 0, 0, 1];
    for (tpid, tci) in tags {
        bytes.extend([tpid.to_be_bytes(), tci.to_be_bytes()].concat());
    }
    bytes.extend(ethertype.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn udp(port: u16, payload_len: usize) -> Vec<u8> {
    let mut bytes = [4000_u16, port, 8 + payload_len as u16, 0].map(u16::to_be_bytes).concat();
    bytes.extend((0..payload_len).map(|index| index as u8));
    bytes
}

/// RFC 791 with `words` 32-bit words of options (no-operation).
fn ipv4(protocol: u8, src: &str, dst: &str, words: usize, payload: &[u8]) -> Vec<u8> {
    let total = (20 + words * 4 + payload.len()) as u16;
    let mut bytes = vec![0x45 + words as u8, 0, 0, 0, 0x12, 0x34, 0x40, 0, 8, protocol, 0, 0];
    bytes[2..4].copy_from_slice(&total.to_be_bytes());
    bytes.extend([&addr(src)[..4], &addr(dst)[..4]].concat());
    bytes.extend(vec![1; words * 4]);
    bytes.extend(payload);
    bytes
}

/// RFC 8200.
fn ipv6(next: u8, src: &str, dst: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x60, 0, 0, 0, 0, 0, next, 8];
    bytes[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
    bytes.extend([addr(src), addr(dst)].concat());
    bytes.extend(payload);
    bytes
}

/// The plain packet most cases are a distortion of: rule 1's.
fn plain4(tags: &[(u16, u16)]) -> Vec<u8> {
    frame(tags, IPV4, &ipv4(UDP, "10.0.0.1", "239.1.1.1", 0, &udp(5000, 32)))
}

/// Rule 9's.
fn plain6(tags: &[(u16, u16)]) -> Vec<u8> {
    frame(tags, IPV6, &ipv6(UDP, "2001:db9::1", "ff3e::1234", &udp(5000, 32)))
}

fn v4(src: &str, dst: &str, port: u16) -> Vec<u8> {
    frame(&[], IPV4, &ipv4(UDP, src, dst, 0, &udp(port, 20)))
}

fn v6(src: &str, dst: &str, port: u16) -> Vec<u8> {
    frame(&[], IPV6, &ipv6(UDP, src, dst, &udp(port, 20)))
}

fn patched(mut bytes: Vec<u8>, at: usize, new: &[u8]) -> Vec<u8> {
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

fn cut(mut bytes: Vec<u8>, len: usize) -> Vec<u8> {
    bytes.truncate(len);
    bytes
}

#[derive(Default)]
struct Corpus(Vec<Case>);

impl Corpus {
    fn pass(&mut self, counter: XdpCounter, name: &str, bytes: Vec<u8>) {
        self.0.push(Case { name: name.to_owned(), bytes, counter, slot: None });
    }

    fn hit(&mut self, slot: u32, name: &str, bytes: Vec<u8>) {
        self.0.push(Case { name: name.to_owned(), bytes, counter: Redirected, slot: Some(slot) });
    }
}

/// All cases. Every packet has 14 bytes at least: the kernel's test run takes no shorter ones.
pub fn corpus() -> Vec<Case> {
    let mut corpus = Corpus::default();
    rules(&mut corpus);
    sources(&mut corpus);
    tags(&mut corpus);
    protocols(&mut corpus);
    hostile_ethernet(&mut corpus);
    hostile_ipv4(&mut corpus);
    hostile_ipv6(&mut corpus);
    truncated(&mut corpus);
    corpus.0
}

fn rules(corpus: &mut Corpus) {
    corpus.hit(1, "plain", plain4(&[]));
    corpus.hit(4, "rule without a port", v4("10.0.0.1", "239.1.1.2", 1));
    corpus.hit(4, "rule without a port, port 65535", v4("10.0.0.1", "239.1.1.2", 65535));
    corpus.hit(4, "rule without a port, port 0", v4("10.0.0.1", "239.1.1.2", 0));
    corpus.hit(14, "rule for port 0", v4("10.0.0.1", "239.1.1.9", 0));
    corpus.hit(8, "other port of a group falls to the network's rule", v4("10.0.0.1", "239.1.1.1", 5001));
    corpus.hit(8, "last address of a /24", v4("10.0.0.1", "239.1.1.255", 77));
    corpus.pass(PassNoRule, "first address after a /24", v4("10.0.0.1", "239.1.2.0", 77));
    corpus.pass(PassNoRule, "unknown group", v4("10.0.0.1", "239.9.9.9", 5000));
    corpus.hit(12, "unicast", v4("10.0.0.1", "192.0.2.7", 6000));
    corpus.pass(PassNoRule, "unicast, other port", v4("10.0.0.1", "192.0.2.7", 6001));
    corpus.pass(PassNoRule, "broadcast", v4("10.0.0.1", "255.255.255.255", 67));
    corpus.hit(9, "plain over IPv6", plain6(&[]));
    corpus.pass(PassNoRule, "IPv6, other port", v6("2001:db9::1", "ff3e::1234", 5001));
    corpus.hit(13, "IPv6 /12 with a port", v6("fe80::1", "ff3f:ffff::1", 7000));
    corpus.pass(PassNoRule, "IPv6 /12, bit 12 differs", v6("fe80::1", "ff20::1", 7000));
    corpus.pass(PassNoRule, "IPv6, last bit of the group differs", v6("2001:db9::1", "ff3e::1235", 5000));
    let small = frame(&[], IPV4, &ipv4(UDP, "10.0.0.1", "239.1.1.1", 0, &udp(5000, 0)));
    corpus.hit(1, "no payload", small.clone());
    corpus.hit(1, "no payload, padded to 60 bytes", [small, vec![0; 18]].concat());
    corpus.hit(1, "largest of an Ethernet", frame(&[], IPV4, &ipv4(UDP, "10.0.0.1", "239.1.1.1", 0, &udp(5000, 1472))));
    corpus.hit(1, "UDP shorter than its IP packet", patched(plain4(&[]), 38, &16_u16.to_be_bytes()));
    corpus.hit(1, "do not fragment clear, TTL 1", patched(patched(plain4(&[]), 20, &[0, 0]), 22, &[1]));
    corpus.hit(1, "TOS, wrong header checksum", patched(patched(plain4(&[]), 15, &[0xb8]), 24, &[0xff, 0xff]));
    corpus.hit(9, "IPv6 traffic class and flow label", patched(plain6(&[]), 14, &[0x6f, 0xff, 0xff, 0xff]));
    corpus.hit(9, "IPv6 padded", [plain6(&[]), vec![0; 9]].concat());
    for words in [1, 2, 5, 10] {
        let packet = frame(&[], IPV4, &ipv4(UDP, "10.0.0.1", "239.1.1.1", words, &udp(5000, 32)));
        corpus.hit(1, &format!("{} bytes of options", words * 4), packet);
    }
    let tagged = frame(&[(0x8100, 100)], IPV4, &ipv4(UDP, "10.0.0.1", "239.1.1.1", 3, &udp(5000, 32)));
    corpus.hit(2, "options behind a tag", tagged);
    let other = frame(&[], IPV4, &ipv4(UDP, "10.0.0.1", "239.9.9.9", 4, &udp(5000, 32)));
    corpus.pass(PassNoRule, "options, unknown group", other);
}

fn sources(corpus: &mut Corpus) {
    corpus.hit(5, "source in the set's /8", v4("10.1.2.3", "239.1.1.3", 5000));
    corpus.pass(PassExcept, "source in the set's excepted /16", v4("10.9.1.1", "239.1.1.3", 5000));
    corpus.hit(6, "source in the /32 within the excepted /16", v4("10.9.9.9", "239.1.1.3", 5000));
    corpus.hit(8, "source in no prefix falls to the next shape", v4("11.0.0.1", "239.1.1.3", 5000));
    corpus.hit(7, "source not excepted", v4("10.0.0.12", "239.2.2.2", 9));
    corpus.pass(PassExcept, "source excepted from a network rule", v4("10.0.0.13", "239.2.2.2", 9));
    corpus.hit(8, "the other set's exception does not count", v4("10.0.0.13", "239.1.1.77", 9));
    corpus.hit(11, "IPv6 source in the set", v6("2001:db8:ffff::1", "ff3e:0:0:1::5", 3));
    corpus.hit(10, "IPv6 source not in the set", v6("2001:db9::1", "ff3e:0:0:1::5", 3));
}

fn tags(corpus: &mut Corpus) {
    corpus.hit(2, "tag 100", plain4(&[(0x8100, 100)]));
    corpus.hit(2, "tag 100, priority 7, DEI", plain4(&[(0x8100, 0xf000 | 100)]));
    corpus.hit(2, "tag 100 as a service tag", plain4(&[(0x88a8, 100)]));
    corpus.hit(8, "tag 101: only rules for any tag", plain4(&[(0x8100, 101)]));
    corpus.hit(1, "priority tag", plain4(&[(0x8100, 0xe000)]));
    corpus.hit(3, "QinQ 100/200", plain4(&[(0x88a8, 100), (0x8100, 200)]));
    corpus.hit(3, "QinQ 100/200, both 0x8100", plain4(&[(0x8100, 100), (0x8100, 200)]));
    corpus.hit(8, "QinQ 200/100", plain4(&[(0x88a8, 200), (0x8100, 100)]));
    corpus.hit(2, "QinQ with inner id 0", plain4(&[(0x88a8, 100), (0x8100, 0)]));
    corpus.hit(1, "QinQ with both ids 0", plain4(&[(0x88a8, 0), (0x8100, 0)]));
    corpus.hit(4095, "IPv6 tag 7, prefix of length 0", frame(&[(0x8100, 7)], IPV6, &ipv6(UDP, "fe80::1", "2001:db8::9", &udp(9, 1))));
    corpus.pass(
        PassNoRule,
        "IPv6 tag 8, prefix of length 0",
        frame(&[(0x8100, 8)], IPV6, &ipv6(UDP, "fe80::1", "2001:db8::9", &udp(9, 1))),
    );
    corpus.pass(PassNoRule, "IPv6 tagged, rule untagged", plain6(&[(0x8100, 100)]));
    corpus.pass(PassTagDepth, "three tags", plain4(&[(0x88a8, 1), (0x8100, 2), (0x8100, 3)]));
    corpus.pass(PassTagDepth, "three service tags, then nothing", frame(&[(0x88a8, 1), (0x88a8, 2)], 0x88a8, &[]));
    corpus.pass(PassNotIp, "0x9100 is no tag", plain4(&[(0x9100, 100)]));
    corpus.pass(PassNotIp, "ARP behind a tag", frame(&[(0x8100, 100)], 0x0806, &[0; 46]));
}

fn protocols(corpus: &mut Corpus) {
    let over4 = |protocol| frame(&[], IPV4, &ipv4(protocol, "10.0.0.1", "239.1.1.1", 0, &[0x11; 24]));
    let over6 = |next| frame(&[], IPV6, &ipv6(next, "2001:db9::1", "ff3e::1234", &udp(5000, 32)));
    let router_alert = frame(&[], IPV4, &ipv4(2, "10.0.0.1", "224.0.0.22", 1, &[0x22; 16]));
    corpus.pass(PassNotIp, "ARP", frame(&[], 0x0806, &[0; 46]));
    corpus.pass(PassNotIp, "LLDP", frame(&[], 0x88cc, &[0; 46]));
    corpus.pass(PassNotIp, "802.3 length", frame(&[], 46, &[0x42; 46]));
    corpus.pass(PassIgmp, "IGMPv3 report with router alert", router_alert);
    corpus.pass(PassIgmp, "IGMP to a rule's group", over4(2));
    corpus.pass(PassIgmp, "IGMP behind a tag", frame(&[(0x8100, 100)], IPV4, &ipv4(2, "10.0.0.1", "224.0.0.1", 1, &[0x11; 8])));
    corpus.pass(PassIcmp, "ICMP", over4(1));
    corpus.pass(PassPim, "PIM", over4(103));
    corpus.pass(PassNotUdp, "TCP", over4(6));
    corpus.pass(PassNotUdp, "UDP-Lite", over4(136));
    corpus.pass(PassNotUdp, "protocol 255", over4(255));
    corpus.pass(PassIcmpv6, "ICMPv6", over6(58));
    corpus.pass(PassPim, "PIM over IPv6", over6(103));
    corpus.pass(PassFragment, "IPv6 fragment header", over6(44));
    for next in [0, 43, 51, 60, 135, 139, 140] {
        corpus.pass(PassExtension, &format!("IPv6 extension header {next}"), over6(next));
    }
    for next in [1, 2, 6, 50, 59, 132, 255] {
        corpus.pass(PassNotUdp, &format!("IPv6 next header {next}"), over6(next));
    }
    let mld = [vec![58, 0, 5, 2, 0, 0, 1, 0], vec![0x8f; 28]].concat();
    corpus.pass(PassExtension, "MLDv2 report behind hop-by-hop", frame(&[], IPV6, &ipv6(0, "fe80::1", "ff02::16", &mld)));
    for (name, field) in
        [("first fragment", 0x2000_u16), ("later fragment", 0x0001), ("last fragment", 0x1fff), ("more and offset", 0x2001)]
    {
        corpus.pass(PassFragment, name, patched(plain4(&[]), 20, &field.to_be_bytes()));
    }
    corpus.hit(1, "evil bit", patched(plain4(&[]), 20, &0x8000_u16.to_be_bytes()));
    corpus.pass(PassIcmp, "ICMP fragment", patched(over4(1), 20, &0x2000_u16.to_be_bytes()));
    corpus.pass(PassFragment, "later fragment shorter than a UDP header", {
        patched(frame(&[], IPV4, &ipv4(UDP, "10.0.0.1", "239.1.1.1", 0, &[1; 4])), 20, &0x00b9_u16.to_be_bytes())
    });
}

fn hostile_ethernet(corpus: &mut Corpus) {
    corpus.pass(PassMalformed, "IPv4 ethertype and nothing behind", frame(&[], IPV4, &[]));
    corpus.pass(PassMalformed, "IPv6 ethertype and nothing behind", frame(&[], IPV6, &[]));
    corpus.pass(PassMalformed, "tag ethertype and nothing behind", frame(&[], 0x8100, &[]));
    corpus.pass(PassMalformed, "tag cut in half", frame(&[], 0x8100, &[0, 100]));
    corpus.pass(PassMalformed, "second tag missing", frame(&[(0x88a8, 100)], 0x8100, &[]));
    corpus.pass(PassMalformed, "second tag one byte short", frame(&[(0x88a8, 100)], 0x8100, &[0, 200, 8]));
    corpus.pass(PassNotIp, "ethertype 0", frame(&[], 0, &[0xff; 50]));
    corpus.pass(PassNotIp, "all ones", vec![0xff; 64]);
    corpus.pass(PassMalformed, "IPv4 in an IPv6 ethertype", frame(&[], IPV6, &ipv4(UDP, "10.0.0.1", "239.1.1.1", 0, &udp(5000, 64))));
    corpus.pass(PassMalformed, "IPv6 in an IPv4 ethertype", frame(&[], IPV4, &ipv6(UDP, "2001:db9::1", "ff3e::1234", &udp(5000, 64))));
}

fn hostile_ipv4(corpus: &mut Corpus) {
    let with = |at: usize, bytes: &[u8]| patched(plain4(&[]), at, bytes);
    for first in [0x05_u8, 0x15, 0x55, 0x65, 0xf5] {
        corpus.pass(PassMalformed, &format!("IPv4 version {}", first >> 4), with(14, &[first]));
    }
    for first in [0x40_u8, 0x41, 0x44] {
        corpus.pass(PassMalformed, &format!("header length {}", (first & 15) * 4), with(14, &[first]));
    }
    // The source port becomes a UDP length that would fit.
    corpus.pass(PassMalformed, "header length 16, all else plausible", patched(with(14, &[0x44]), 34, &30_u16.to_be_bytes()));
    corpus.pass(PassMalformed, "header longer than the packet", {
        patched(frame(&[], IPV4, &ipv4(UDP, "10.0.0.1", "239.1.1.1", 0, &udp(5000, 0))), 14, &[0x4f])
    });
    for total in [0_u16, 19, 20, 27, 61, 1500, 0xffff] {
        corpus.pass(PassMalformed, &format!("total length {total}"), with(16, &total.to_be_bytes()));
    }
    corpus.pass(PassIgmp, "IGMP, total length 20", {
        patched(frame(&[], IPV4, &ipv4(2, "10.0.0.1", "239.1.1.1", 0, &[0; 8])), 16, &20_u16.to_be_bytes())
    });
    corpus.pass(PassMalformed, "IGMP, total length 19", {
        patched(frame(&[], IPV4, &ipv4(2, "10.0.0.1", "239.1.1.1", 0, &[0; 8])), 16, &19_u16.to_be_bytes())
    });
    for len in [0_u16, 1, 7, 41, 1500, 0xffff] {
        corpus.pass(PassMalformed, &format!("UDP length {len}"), with(38, &len.to_be_bytes()));
    }
    corpus.pass(PassMalformed, "padding is not payload", patched([plain4(&[]), vec![0; 8]].concat(), 38, &48_u16.to_be_bytes()));
    corpus.pass(PassMalformed, "options leave no room for UDP", frame(&[], IPV4, &ipv4(UDP, "10.0.0.1", "239.1.1.1", 10, &[0; 7])));
    corpus.pass(PassMalformed, "options, UDP length too large", {
        patched(frame(&[], IPV4, &ipv4(UDP, "10.0.0.1", "239.1.1.1", 2, &udp(5000, 4))), 14 + 28 + 4, &13_u16.to_be_bytes())
    });
    corpus.pass(
        PassMalformed,
        "option bytes read as UDP",
        patched(frame(&[], IPV4, &ipv4(UDP, "10.0.0.1", "239.1.1.1", 1, &udp(5000, 0))), 14, &[0x47]),
    );
}

fn hostile_ipv6(corpus: &mut Corpus) {
    let with = |at: usize, bytes: &[u8]| patched(plain6(&[]), at, bytes);
    for first in [0x00_u8, 0x40, 0x50, 0x70, 0xf0] {
        corpus.pass(PassMalformed, &format!("IPv6 version {}", first >> 4), with(14, &[first]));
    }
    for len in [0_u16, 7, 41, 1500, 0xffff] {
        corpus.pass(PassMalformed, &format!("payload length {len}"), with(18, &len.to_be_bytes()));
    }
    for len in [0_u16, 7, 41, 0xffff] {
        corpus.pass(PassMalformed, &format!("IPv6, UDP length {len}"), with(58, &len.to_be_bytes()));
    }
    corpus.pass(PassMalformed, "ICMPv6 beyond the packet", patched(with(18, &1500_u16.to_be_bytes()), 20, &[58]));
}

fn truncated(corpus: &mut Corpus) {
    for len in [14, 15, 18, 19, 27, 33, 34, 35, 41, 42, 73] {
        corpus.pass(PassMalformed, &format!("cut after {len} bytes"), cut(plain4(&[]), len));
    }
    for len in [17, 18, 37, 38, 45, 77] {
        corpus.pass(PassMalformed, &format!("tagged, cut after {len} bytes"), cut(plain4(&[(0x8100, 100)]), len));
    }
    for len in [21, 22, 41, 42, 49] {
        corpus.pass(PassMalformed, &format!("QinQ, cut after {len} bytes"), cut(plain4(&[(0x88a8, 100), (0x8100, 200)]), len));
    }
    for len in [15, 53, 54, 61, 93] {
        corpus.pass(PassMalformed, &format!("IPv6, cut after {len} bytes"), cut(plain6(&[]), len));
    }
}

/// The corpus as it stands in `tests/golden/corpus.txt`.
pub fn text() -> String {
    let mut text = String::new();
    for Case { name, bytes, counter, slot } in corpus() {
        let slot = slot.map_or_else(|| "-".to_owned(), |slot| slot.to_string());
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let _ = writeln!(text, "{} {slot} {hex} {name}", counter.name());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Run with `RELAY_GOLDEN_WRITE=1` after a deliberate change.
    #[test]
    fn the_written_corpus_is_the_built_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/corpus.txt");
        if std::env::var_os("RELAY_GOLDEN_WRITE").is_some() {
            std::fs::write(path, text()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), text());
    }

    /// User space comes to the same verdict by the same headers.
    #[test]
    fn the_parser_of_user_space_agrees() {
        for Case { name, bytes, counter, .. } in corpus() {
            let is_udp = matches!(counter, Redirected | PassNoRule | PassExcept);
            let verdict = relay::wire::parse::parse(&bytes, bytes.len());
            assert_eq!(verdict.map(|_| ()).map_err(|verdict| verdict.counter()), if is_udp { Ok(()) } else { Err(counter) }, "{name}");
        }
    }

    #[test]
    fn names_are_unique_and_every_verdict_occurs() {
        let cases = corpus();
        let names: std::collections::BTreeSet<_> = cases.iter().map(|case| &case.name).collect();
        assert_eq!(names.len(), cases.len());
        let absent: Vec<_> = XdpCounter::ALL.iter().filter(|&&counter| !cases.iter().any(|case| case.counter == counter)).collect();
        assert_eq!(absent, [&Kernel, &PassNoSocket, &PassNoConfig], "those two are no packet's own verdict");
    }
}
