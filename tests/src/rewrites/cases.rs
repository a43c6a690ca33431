//! The cases themselves: a name, the rule behind its match, the packet, what each output makes of it.
//!
//! `out(1, …)` is by `r1`, one hop further; what stands in the closure is what the rule asks for besides. Must never be derived
//! from the rule's text: that is check.py's part.
#![expect(clippy::unwrap_used, reason = "addresses written out in a test")]

use super::{Corpus, Expected, HOPS, LINKS, hop, out};
use crate::raw::{Checksum, Datagram};
use std::net::IpAddr;

pub(super) fn all(corpus: &mut Corpus) {
    for v6 in [false, true] {
        addresses(corpus, v6);
        ttl(corpus, v6);
        dscp(corpus, v6);
        checksums(corpus, v6);
        payloads(corpus, v6);
        tags(corpus, v6);
        several(corpus, v6);
        matches(corpus, v6);
        conversions(corpus, v6);
        drops(corpus, v6);
    }
    ipv4_fields(corpus);
    group_macs(corpus);
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A packet for port 5000 with an odd payload.
fn plain(v6: bool) -> Datagram {
    let dst = if v6 { "ff3e::1" } else { "239.1.1.1" };
    Datagram {
        tos: 0x29,
        flow: if v6 { 0xa_bcde } else { 0 },
        ..Datagram::to(dst, 5_000, b"what goes in comes out as the rule says").unwrap()
    }
}

/// `four` or `six`.
fn by<T>(v6: bool, four: T, six: T) -> T {
    if v6 { six } else { four }
}

fn named(v6: bool, name: &str) -> String {
    format!("{}-{name}", by(v6, "v4", "v6"))
}

fn addresses(corpus: &mut Corpus, v6: bool) {
    let (to, source) = (by(v6, "239.9.9.9", "ff3e::9:9"), by(v6, "10.99.0.7", "fd99::7"));
    let text = |addr: &str| by(v6, addr.to_owned(), format!("[{addr}]"));
    let (to_text, source_text) = (text(to), text(source));
    let own = ip(by(v6, LINKS[1].ipv4, LINKS[1].ipv6));
    let (to, source) = (ip(to), ip(source));
    corpus.add(&named(v6, "plain"), "-> r1", plain(v6), vec![out(1, |_| ())]);
    corpus.add(&named(v6, "other-interface"), "-> r2", plain(v6), vec![out(2, |_| ())]);
    corpus.add(&named(v6, "group"), &format!("-> r1 {to_text}"), plain(v6), vec![out(1, move |d| d.dst = to)]);
    corpus.add(&named(v6, "port"), "-> r1 :6000", plain(v6), vec![out(1, |d| d.dport = 6_000)]);
    corpus.add(
        &named(v6, "group-port"),
        &format!("-> r1 {to_text}:6000"),
        plain(v6),
        vec![out(1, move |d| (d.dst, d.dport) = (to, 6_000))],
    );
    corpus.add(&named(v6, "port-65535"), "-> r1 :65535", plain(v6), vec![out(1, |d| d.dport = 65_535)]);
    corpus.add(&named(v6, "src-keep"), "-> r1 src=keep", plain(v6), vec![out(1, |_| ())]);
    corpus.add(&named(v6, "src-egress"), "-> r1 src=egress", plain(v6), vec![out(1, move |d| d.src = own)]);
    corpus.add(&named(v6, "src-fixed"), &format!("-> r1 src={source_text}"), plain(v6), vec![out(1, move |d| d.src = source)]);
    corpus.add(&named(v6, "sport"), "-> r1 sport=4444", plain(v6), vec![out(1, |d| d.sport = 4_444)]);
    corpus.add(&named(v6, "sport-keep"), "-> r1 sport=keep", plain(v6), vec![out(1, |_| ())]);
    let everything = format!("-> r1 {to_text}:6000 src={source_text} sport=4444 ttl=9 dscp=46 vlan=7");
    let all = move |d: &mut Datagram| {
        (d.dst, d.dport, d.src, d.sport, d.ttl, d.tos, d.tags) = (to, 6_000, source, 4_444, 9, 46 << 2 | 1, vec![(0x8100, 7)]);
    };
    corpus.add(&named(v6, "everything"), &everything, plain(v6), vec![out(1, all)]);
    corpus.add(&named(v6, "everything-partial"), &everything, Datagram { checksum: Checksum::Partial, ..plain(v6) }, vec![out(1, all)]);
    let same = corpus.group(v6);
    let same_text = text(&same.to_string());
    corpus.add(&named(v6, "to-what-it-is"), &format!("-> r1 {same_text}:5000 sport=4000"), plain(v6), vec![out(1, |_| ())]);
}

fn ttl(corpus: &mut Corpus, v6: bool) {
    for (name, rule, before, after) in [
        ("ttl-dec-255", "-> r1 ttl=dec", 255, Some(254)),
        ("ttl-dec-2", "-> r1", 2, Some(1)),
        ("ttl-dec-1", "-> r1", 1, None),
        ("ttl-dec-0", "-> r1", 0, None),
        ("ttl-keep", "-> r1 ttl=keep", 16, Some(16)),
        ("ttl-keep-1", "-> r1 ttl=keep", 1, Some(1)),
        ("ttl-keep-0", "-> r1 ttl=keep", 0, None),
        ("ttl-set", "-> r1 ttl=9", 16, Some(9)),
        ("ttl-set-more", "-> r1 ttl=255", 1, Some(255)),
        ("ttl-set-1", "-> r1 ttl=1", 200, Some(1)),
        ("ttl-set-0", "-> r1 ttl=64", 0, Some(64)),
    ] {
        let expected = after.map_or(Expected::Lost("ttl_expired"), |ttl| out(1, move |d| d.ttl = ttl));
        corpus.add(&named(v6, name), rule, Datagram { ttl: before, ..plain(v6) }, vec![expected]);
    }
}

fn dscp(corpus: &mut Corpus, v6: bool) {
    for (name, rule, before, after) in [
        ("dscp-46", "-> r1 dscp=46", 0x00, 0xb8),
        ("dscp-keeps-ect0", "-> r1 dscp=46", 0x02, 0xba),
        ("dscp-keeps-ce", "-> r1 dscp=10", 0xff, 0x2b),
        ("dscp-0", "-> r1 dscp=0", 0xb9, 0x01),
        ("dscp-63", "-> r1 dscp=63", 0x01, 0xfd),
        ("dscp-keep", "-> r1 dscp=keep", 0xb9, 0xb9),
    ] {
        corpus.add(&named(v6, name), rule, Datagram { tos: before, ..plain(v6) }, vec![out(1, move |d| d.tos = after)]);
    }
}

/// The last two bytes of the payload that make the checksum of `packet`, changed so, come out as `wanted`.
fn tuned(packet: Datagram, change: impl Fn(&mut Datagram), wanted: u16) -> Datagram {
    let at = if packet.dst.is_ipv6() { 60 } else { 40 };
    let with = |word: u16| Datagram { payload: [packet.payload.clone(), word.to_be_bytes().to_vec()].concat(), ..packet.clone() };
    let hits = |word: &u16| {
        let mut changed = with(*word);
        change(&mut changed);
        changed.bytes()[at..at + 2] == wanted.to_be_bytes()
    };
    with((0..=u16::MAX).find(hits).unwrap())
}

fn checksums(corpus: &mut Corpus, v6: bool) {
    let change = "-> r1 :6000 sport=4444 dscp=46";
    let changed = |d: &mut Datagram| (d.dport, d.sport, d.tos) = (6_000, 4_444, 46 << 2 | 1);
    let even = Datagram { payload: b"even".to_vec(), ..plain(v6) };
    corpus.add(&named(v6, "partial"), "-> r1", Datagram { checksum: Checksum::Partial, ..plain(v6) }, vec![out(1, |_| ())]);
    corpus.add(&named(v6, "partial-changed"), change, Datagram { checksum: Checksum::Partial, ..plain(v6) }, vec![out(1, changed)]);
    let empty = Datagram { checksum: Checksum::Partial, payload: vec![], ..plain(v6) };
    corpus.add(&named(v6, "partial-empty"), change, empty, vec![out(1, changed)]);
    // The sums that look like others: all ones in or out (0 means none), and one beside them.
    for (name, wanted) in [("ones", 0xffff), ("one", 1), ("fffe", 0xfffe)] {
        let mut into = Datagram { dst: corpus.group(v6), ..even.clone() };
        into = tuned(into, |_| (), wanted);
        corpus.add(&named(v6, &format!("sum-{name}-in")), change, into, vec![out(1, changed)]);
        let mut from = Datagram { dst: corpus.group(v6), ..even.clone() };
        from = tuned(from, changed, wanted);
        corpus.add(&named(v6, &format!("sum-{name}-out")), change, from, vec![out(1, changed)]);
    }
    let kept = tuned(Datagram { dst: corpus.group(v6), ..even }, |_| (), 0xffff);
    corpus.add(&named(v6, "sum-ones-kept"), "-> r1", kept, vec![out(1, |_| ())]);
    if !v6 {
        let none = Datagram { checksum: Checksum::Zero, ..plain(v6) };
        corpus.add("v4-no-checksum", "-> r1", none.clone(), vec![out(1, |_| ())]);
        corpus.add("v4-no-checksum-changed", change, none, vec![out(1, changed)]);
    }
}

fn payloads(corpus: &mut Corpus, v6: bool) {
    let change = "-> r1 :6000 dscp=46 src=egress";
    let own = ip(by(v6, LINKS[1].ipv4, LINKS[1].ipv6));
    let changed = move |d: &mut Datagram| (d.dport, d.tos, d.src) = (6_000, 46 << 2 | 1, own);
    let longest = by(v6, 1_472, 1_452);
    for len in [0, 1, 2, 3, 17, 18, 255, 1_024, longest - 1, longest] {
        let payload = (0..len).map(|at| (at * 7 + len) as u8).collect();
        corpus.add(&named(v6, &format!("payload-{len}")), change, Datagram { payload, ..plain(v6) }, vec![out(1, changed)]);
    }
    for (name, byte) in [("zeros", 0), ("ones", 0xff)] {
        let packet = Datagram { payload: vec![byte; 63], ..plain(v6) };
        corpus.add(&named(v6, &format!("payload-{name}")), change, packet, vec![out(1, changed)]);
    }
    let padded = Datagram { payload: vec![5], padding: 17, ..plain(v6) };
    corpus.add(&named(v6, "padded"), change, padded.clone(), vec![out(1, changed)]);
    let tagged = move |d: &mut Datagram| {
        changed(d);
        d.tags = vec![(0x8100, 7)];
    };
    corpus.add(&named(v6, "padded-tag-put-on"), "-> r1 :6000 dscp=46 src=egress vlan=7", padded, vec![out(1, tagged)]);
    let full = Datagram { payload: vec![0xa5; longest], ..plain(v6) };
    corpus.add(&named(v6, "longest-tag-put-on"), "-> r1 vlan=7", full.clone(), vec![out(1, |d| d.tags = vec![(0x8100, 7)])]);
    corpus.add(&named(v6, "mtu"), "-> r2", Datagram { payload: vec![1; longest - 100], ..plain(v6) }, vec![out(2, |_| ())]);
    let one_more = Datagram { payload: vec![1; longest - 99], ..plain(v6) };
    corpus.add(&named(v6, "mtu-exceeded"), "-> r2, r1", one_more, vec![Expected::Lost("mtu_exceeded"), out(1, |_| ())]);
}

fn tags(corpus: &mut Corpus, v6: bool) {
    let (one, two) = (vec![(0x8100, 0xa064)], vec![(0x88a8, 0x6064), (0x8100, 0xe0c8)]);
    let with = |tags: &[(u16, u16)]| Datagram { tags: tags.to_vec(), ..plain(v6) };
    let to = |tags: &'static [(u16, u16)]| vec![out(1, move |d| d.tags = tags.to_vec())];
    corpus.add(&named(v6, "tag-put-on"), "-> r1 vlan=7", plain(v6), to(&[(0x8100, 7)]));
    corpus.add(&named(v6, "tag-4094"), "-> r1 vlan=4094", plain(v6), to(&[(0x8100, 4_094)]));
    corpus.add(&named(v6, "untagged-none"), "-> r1 vlan=none", plain(v6), to(&[]));
    corpus.add(&named(v6, "tag-kept"), "-> r1 vlan=keep; tag=100", with(&one), vec![out(1, |_| ())]);
    corpus.add(&named(v6, "tag-taken-off"), "-> r1 vlan=none; tag=100", with(&one), to(&[]));
    corpus.add(&named(v6, "tag-changed"), "-> r1 vlan=7; tag=100", with(&one), to(&[(0x8100, 7)]));
    corpus.add(&named(v6, "tag-of-any-kept"), "-> r1; tag=any", with(&one), vec![out(1, |_| ())]);
    corpus.add(&named(v6, "tags-kept"), "-> r1 :6000; tag=100.200", with(&two), vec![out(1, |d| d.dport = 6_000)]);
    corpus.add(&named(v6, "tags-taken-off"), "-> r1 vlan=none; tag=100.200", with(&two), to(&[]));
    corpus.add(&named(v6, "tags-to-one"), "-> r1 vlan=7; tag=100.200", with(&two), to(&[(0x8100, 7)]));
    corpus.add(&named(v6, "tags-of-any-to-one"), "-> r1 vlan=7; tag=any", with(&two), to(&[(0x8100, 7)]));
    let priority = with(&[(0x8100, 0xe000)]);
    corpus.add(&named(v6, "priority-tag-kept"), "-> r1", priority.clone(), vec![out(1, |_| ())]);
    corpus.add(&named(v6, "priority-tag-taken-off"), "-> r1 vlan=none", priority, to(&[]));
    corpus.add(&named(v6, "service-tag-kept"), "-> r1 ttl=keep; tag=100", with(&[(0x88a8, 100)]), vec![out(1, |d| d.ttl = 16)]);
    let each = vec![out(1, |_| ()), out(2, |d| d.tags = vec![]), out(1, |d| (d.tags, d.dport) = (vec![(0x8100, 7)], 6_000))];
    corpus.add(&named(v6, "tags-by-output"), "-> r1, r2 vlan=none, r1 :6000 vlan=7; tag=100", with(&one), each);
}

fn several(corpus: &mut Corpus, v6: bool) {
    let (a, b) = (by(v6, "239.9.8.1", "[ff3e::8:1]"), by(v6, "239.9.8.2", "[ff3e::8:2]"));
    let plain_addr = |text: &str| ip(text.trim_matches(['[', ']']));
    let (to_a, to_b) = (plain_addr(a), plain_addr(b));
    corpus.add(&named(v6, "two-interfaces"), "-> r1, r2", plain(v6), vec![out(1, |_| ()), out(2, |_| ())]);
    let three = format!("-> r1 {a}:6001 ttl=9, r2 {b} dscp=8, r1 {b}:6003 src=egress sport=1");
    let own = ip(by(v6, LINKS[1].ipv4, LINKS[1].ipv6));
    let expected = vec![
        out(1, move |d| (d.dst, d.dport, d.ttl) = (to_a, 6_001, 9)),
        out(2, move |d| (d.dst, d.tos) = (to_b, 8 << 2 | 1)),
        out(1, move |d| (d.dst, d.dport, d.src, d.sport) = (to_b, 6_003, own, 1)),
    ];
    corpus.add(&named(v6, "three-outputs"), &three, plain(v6), expected);
    let eight: Vec<String> = (0..8).map(|n| format!("r{} :{} ttl={}", n % 2 + 1, 6_100 + n, 20 + n)).collect();
    let expected = (0..8_u8).map(|n| out(usize::from(n % 2 + 1), move |d| (d.dport, d.ttl) = (6_100 + u16::from(n), 20 + n))).collect();
    corpus.add(&named(v6, "eight-outputs"), &format!("-> {}", eight.join(", ")), plain(v6), expected);
    let expected = vec![Expected::Lost("ttl_expired"), out(2, |d| d.ttl = 1), out(1, |d| (d.dport, d.ttl) = (6_000, 9))];
    corpus.add(&named(v6, "one-expires"), "-> r1, r2 ttl=keep, r1 :6000 ttl=9", Datagram { ttl: 1, ..plain(v6) }, expected);
    let partial = Datagram { checksum: Checksum::Partial, ..plain(v6) };
    let expected = vec![out(1, |_| ()), out(2, |d| d.sport = 9), out(2, |d| d.dport = 9)];
    corpus.add(&named(v6, "partial-to-three"), "-> r1, r2 sport=9, r2 :9", partial, expected);
}

/// Every kind of match leads to the same rewriting.
fn matches(corpus: &mut Corpus, v6: bool) {
    let packet = |dst: &str| Datagram { dst: ip(dst), ..plain(v6) };
    let changed = || vec![out(1, |d| d.dport = 6_000)];
    let (dst, prefix) = by(v6, ("239.77.3.4", "239.77.0.0/16"), ("ff3e::77:3:4", "[ff3e::77:0:0]/96"));
    corpus.matching(&named(v6, "group-prefix"), &format!("{prefix}:5000 -> r1 :6000"), packet(dst), changed());
    let (dst, text) = by(v6, ("239.78.0.1", "239.78.0.1"), ("ff3e::78:1", "[ff3e::78:1]"));
    corpus.matching(&named(v6, "any-port"), &format!("{text} -> r1 :6000"), Datagram { dport: 1, ..packet(dst) }, changed());
    let (dst, text) = by(v6, ("232.1.1.1", "10.0.0.1@232.1.1.1"), ("ff3e::79:1", "[fd00::1]@[ff3e::79:1]"));
    corpus.matching(&named(v6, "one-source"), &format!("{text}:5000 -> r1 :6000"), packet(dst), changed());
    let (to, dst) = by(v6, ("239.9.9.1", "239.79.3.4"), ("[ff3e::9:1]", "ff3e::79:3:4"));
    let prefix = by(v6, "239.79.0.0/16", "[ff3e::79:0:0]/96");
    let (merged, all) = (ip(to.trim_matches(['[', ']'])), format!("{prefix} -> r1 {to}"));
    corpus.matching(&named(v6, "prefix-to-one"), &all, packet(dst), vec![out(1, move |d| d.dst = merged)]);
}

/// Multicast to unicast and back, over a neighbour and a gateway.
fn conversions(corpus: &mut Corpus, v6: bool) {
    for (link, to, _) in HOPS.iter().filter(|(_, to, _)| to.contains(':') == v6) {
        let (link, addr) = (if *link == "r1" { 1 } else { 2 }, ip(to));
        let (tail, text) = (to.replace([':', '.'], "-"), by(v6, (*to).to_owned(), format!("[{to}]")));
        let rule = format!("-> r{link} {text}:6000");
        corpus.add(&named(v6, &format!("to-unicast-{tail}")), &rule, plain(v6), vec![hop(link, move |d| (d.dst, d.dport) = (addr, 6_000))]);
    }
    let (to, me) = by(v6, ("10.0.1.2", "10.0.0.2"), ("[fd00:0:0:1::2]", "[fd00::2]"));
    let (addr, own) = (ip(to.trim_matches(['[', ']'])), ip(by(v6, LINKS[1].ipv4, LINKS[1].ipv6)));
    let changed = move |d: &mut Datagram| (d.dst, d.src, d.tags) = (addr, own, vec![(0x8100, 7)]);
    corpus.add(&named(v6, "to-unicast-tagged"), &format!("-> r1 {to} src=egress vlan=7"), plain(v6), vec![hop(1, changed)]);
    let both = vec![out(1, |_| ()), hop(1, move |d| d.dst = addr), out(2, |d| d.dport = 6_000)];
    corpus.add(&named(v6, "to-group-and-unicast"), &format!("-> r1, r1 {to}, r2 :6000"), plain(v6), both);
    let to_me = |dport| Datagram { dst: ip(me.trim_matches(['[', ']'])), dst_mac: Some(LINKS[0].mac), dport, ..plain(v6) };
    let group = by(v6, "239.9.7.1", "[ff3e::7:1]");
    let new = ip(group.trim_matches(['[', ']']));
    let rule = format!("{me}:7000 -> r1 {group}:6000 src=egress");
    let changed = move |d: &mut Datagram| (d.dst, d.dport, d.src) = (new, 6_000, own);
    corpus.matching(&named(v6, "unicast-to-group"), &rule, to_me(7_000), vec![out(1, changed)]);
    let rule = format!("{me}:7001 -> r1 {to}:6000");
    corpus.matching(&named(v6, "unicast-to-unicast"), &rule, to_me(7_001), vec![hop(1, move |d| (d.dst, d.dport) = (addr, 6_000))]);
}

/// Drops of the rule: before any output.
fn drops(corpus: &mut Corpus, v6: bool) {
    let from = |src: &str| Datagram { src: ip(src), ..plain(v6) };
    corpus.drop(&named(v6, "bad-udp-checksum"), Datagram { checksum: Checksum::Wrong, ..plain(v6) }, "bad_udp_checksum");
    corpus.drop(&named(v6, "multicast-source"), from(by(v6, "239.1.1.1", "ff02::1")), "multicast_source");
    corpus.drop(&named(v6, "own-source"), from(by(v6, LINKS[0].ipv4, LINKS[0].ipv6)), "own_source");
    if v6 {
        corpus.drop("v6-no-checksum", Datagram { checksum: Checksum::Zero, ..plain(v6) }, "bad_udp_checksum");
    } else {
        corpus.drop("v4-broadcast-source", from("255.255.255.255"), "multicast_source");
    }
}

/// Identification, flags and options are the sender's.
fn ipv4_fields(corpus: &mut Corpus) {
    let change = "-> r1 239.9.9.9:6000 ttl=9 dscp=46";
    let changed = |d: &mut Datagram| (d.dst, d.dport, d.ttl, d.tos) = ("239.9.9.9".parse().unwrap(), 6_000, 9, 46 << 2 | 1);
    for (name, id, fragment) in [("df-id-0", 0, 0x4000), ("no-df", 0xbeef, 0), ("no-df-id-0", 0, 0), ("reserved-flag", 0xffff, 0x8000)] {
        corpus.add(&format!("v4-{name}"), change, Datagram { id, fragment, ..plain(false) }, vec![out(1, changed)]);
    }
    let router_alert: &[u8] = &[0x94, 4, 0, 0];
    let record_route: &[u8] = &[7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let timestamp: &[u8] = &[0x44, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (name, options) in [
        ("router-alert", router_alert.to_vec()),
        ("record-route", record_route.to_vec()),
        ("timestamp", timestamp.to_vec()),
        ("options-40", [router_alert, record_route, timestamp, record_route].concat()),
        ("options-nop", vec![1; 20]),
    ] {
        let packet = Datagram { options, ..plain(false) };
        corpus.add(&format!("v4-{name}"), change, packet.clone(), vec![out(1, changed)]);
        let tagged = Datagram { tags: vec![(0x8100, 100)], checksum: Checksum::Partial, ..packet };
        let off = move |d: &mut Datagram| {
            changed(d);
            d.tags = vec![];
        };
        let rule = format!("{change} vlan=none; tag=100");
        corpus.add(&format!("v4-{name}-tagged-partial"), &rule, tagged, vec![out(1, off)]);
    }
    let none = Datagram { options: router_alert.to_vec(), checksum: Checksum::Zero, ..plain(false) };
    corpus.add("v4-options-no-checksum", change, none, vec![out(1, changed)]);
}

/// 23 bits of an IPv4 group, 32 of an IPv6 group (RFC 1112 §6.4, RFC 2464 §7).
fn group_macs(corpus: &mut Corpus) {
    for (name, to, mac) in [
        ("v4-mac-high-bit", "239.255.255.255", [1, 0, 0x5e, 0x7f, 0xff, 0xff]),
        ("v4-mac-bit-23", "225.128.0.1", [1, 0, 0x5e, 0, 0, 1]),
        ("v6-mac", "ff3e::dead:beef", [0x33, 0x33, 0xde, 0xad, 0xbe, 0xef]),
    ] {
        let (v6, addr) = (to.contains(':'), ip(to));
        let text = by(v6, to.to_owned(), format!("[{to}]"));
        let changed = move |d: &mut Datagram| (d.dst, d.dst_mac) = (addr, Some(mac));
        corpus.add(name, &format!("-> r1 {text}"), plain(v6), vec![out(1, changed)]);
    }
}
