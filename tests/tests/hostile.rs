//! Packets that are wrong, odd or malicious: no crash, no wrong packet out, each with a named fate, and the same on every path.
//!
//! The corpus goes into one interface frame by frame; what comes out of the other is captured and must be byte for byte what the
//! right ones become, whatever path carries them, and the rules' counters must be the same.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay_tests::paths::{self, Moved, PATHS, Path, moved};
use relay_tests::raw::{Capture, Checksum, Datagram, Injector};
use relay_tests::{Lab, RelayProcess, assert_frames_conserved, assert_rules_conserved, interface_stats, needs_root};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const RULES: [&str; 4] = [
    "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 dscp=46; id=four",
    "r0 [ff3e::1234]:5000 -> r1 [ff3e::9999]:6000 src=[fd00::7]; id=six",
    "r0 239.1.1.2:5000 -> r1 239.9.9.8:6000 vlan=none ttl=keep; id=any tag=any",
    "r0 239.1.1.3 -> r1 239.9.9.7 vlan=33; id=two tag=100.200",
];

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Sent on by the rule of this id.
    Sent(&'static str),
    /// Dropped by the rule of this id for this reason.
    Dropped(&'static str, &'static str),
    /// Dropped by the rule's output for this reason.
    OutputDropped(&'static str, &'static str),
    /// No rule's: left to the kernel.
    Left,
}

use Fate::{Dropped, Left, OutputDropped, Sent};

struct Corpus(Vec<(String, Vec<u8>, Fate)>);

impl Corpus {
    fn add(&mut self, name: impl Into<String>, frame: Vec<u8>, fate: Fate) {
        self.0.push((name.into(), frame, fate));
    }
}

fn four() -> Datagram {
    Datagram::to("239.1.1.1", 5_000, b"thirty-two bytes of IPv4 payload").unwrap()
}

fn six() -> Datagram {
    Datagram::to("ff3e::1234", 5_000, b"thirty-two bytes of IPv6 payload").unwrap()
}

fn patched(mut frame: Vec<u8>, at: usize, new: &[u8]) -> Vec<u8> {
    frame[at..at + new.len()].copy_from_slice(new);
    frame
}

/// The IPv4 header checksum made right again.
fn fixed(mut frame: Vec<u8>) -> Vec<u8> {
    frame[24..26].copy_from_slice(&[0, 0]);
    let header_len = usize::from(frame[14] & 15) * 4;
    let right = (!relay_tests::raw::sum(&frame[14..14 + header_len], 0)).to_be_bytes();
    patched(frame, 24, &right)
}

fn corpus() -> Corpus {
    let mut corpus = Corpus(Vec::new());
    plain(&mut corpus);
    truncated(&mut corpus);
    lengths(&mut corpus);
    checksums(&mut corpus);
    sources(&mut corpus);
    options_and_fragments(&mut corpus);
    tags(&mut corpus);
    extension_headers(&mut corpus);
    corpus
}

fn plain(corpus: &mut Corpus) {
    corpus.add("IPv4", four().bytes(), Sent("four"));
    corpus.add("IPv6", six().bytes(), Sent("six"));
    corpus.add("IPv4, no payload", Datagram { payload: vec![], ..four() }.bytes(), Sent("four"));
    corpus.add("IPv6, no payload", Datagram { payload: vec![], ..six() }.bytes(), Sent("six"));
    corpus.add("IPv4, odd payload", Datagram { payload: vec![0xff; 33], ..four() }.bytes(), Sent("four"));
    corpus.add("IPv4, longest", Datagram { payload: vec![0xa5; 1_472], ..four() }.bytes(), Sent("four"));
    corpus.add("IPv6, longest", Datagram { payload: vec![0xa5; 1_452], ..six() }.bytes(), Sent("six"));
    corpus.add("IPv4, padded", [four().bytes(), vec![0xee; 7]].concat(), Sent("four"));
    corpus.add("IPv6, padded", [six().bytes(), vec![0xee; 7]].concat(), Sent("six"));
    corpus.add("another port", Datagram { dport: 5_001, ..four() }.bytes(), Left);
    corpus.add("another group", Datagram { dst: "239.1.1.77".parse().unwrap(), ..four() }.bytes(), Left);
    for (ttl, fate) in
        [(0, OutputDropped("four", "ttl_expired")), (1, OutputDropped("four", "ttl_expired")), (2, Sent("four")), (255, Sent("four"))]
    {
        corpus.add(format!("IPv4, TTL {ttl}"), Datagram { ttl, ..four() }.bytes(), fate);
    }
    for (ttl, fate) in [(0, OutputDropped("six", "ttl_expired")), (1, OutputDropped("six", "ttl_expired")), (2, Sent("six"))] {
        corpus.add(format!("IPv6, hop limit {ttl}"), Datagram { ttl, ..six() }.bytes(), fate);
    }
    corpus.add(
        "TTL 0, kept",
        Datagram { dst: "239.1.1.2".parse().unwrap(), ttl: 0, ..four() }.bytes(),
        OutputDropped("any", "ttl_expired"),
    );
    corpus.add("ECN and DSCP", Datagram { tos: 0xff, ..four() }.bytes(), Sent("four"));
    corpus.add("traffic class", Datagram { tos: 0xff, ..six() }.bytes(), Sent("six"));
}

/// Cut at every byte behind the Ethernet header, tagged and not.
fn truncated(corpus: &mut Corpus) {
    let tagged = Datagram { tags: vec![(0x8100, 5)], dst: "239.1.1.2".parse().unwrap(), ..four() };
    for (name, whole) in [("IPv4", four().bytes()), ("IPv6", six().bytes()), ("tagged", tagged.bytes())] {
        for len in 14..whole.len() {
            corpus.add(format!("{name} cut at {len}"), whole[..len].to_vec(), Left);
        }
    }
}

fn lengths(corpus: &mut Corpus) {
    let total = four().bytes().len() - 14;
    for (name, len) in [("0", 0), ("19", 19), ("20", 20), ("27", 27), ("one more", total + 1), ("all", 0xffff)] {
        corpus.add(format!("IPv4 total length {name}"), fixed(patched(four().bytes(), 16, &(len as u16).to_be_bytes())), Left);
    }
    for (name, len) in [("0", 0), ("7", 7), ("one more", total - 19), ("all", 0xffff)] {
        corpus.add(format!("UDP length {name}"), patched(four().bytes(), 38, &(len as u16).to_be_bytes()), Left);
    }
    for words in [0, 1, 4, 15] {
        let frame = patched(four().bytes(), 14, &[0x40 | words]);
        corpus.add(format!("IPv4 header of {words} words"), if words == 15 { fixed(frame) } else { frame }, Left);
    }
    for version in [0, 5, 6, 15] {
        corpus.add(format!("version {version} under an IPv4 ethertype"), fixed(patched(four().bytes(), 14, &[version << 4 | 5])), Left);
    }
    let payload = six().bytes().len() - 54;
    for (name, len) in [("0", 0), ("7", 7), ("one more", payload + 1), ("all", 0xffff)] {
        corpus.add(format!("IPv6 payload length {name}"), patched(six().bytes(), 18, &(len as u16).to_be_bytes()), Left);
    }
    corpus.add("version 4 under an IPv6 ethertype", patched(six().bytes(), 14, &[0x40]), Left);
}

fn checksums(corpus: &mut Corpus) {
    corpus.add("IPv4 header checksum", patched(four().bytes(), 24, &[0xde, 0xad]), Dropped("four", "bad_ip_checksum"));
    corpus.add("UDP checksum", Datagram { checksum: Checksum::Wrong, ..four() }.bytes(), Dropped("four", "bad_udp_checksum"));
    corpus.add("UDP checksum over IPv6", Datagram { checksum: Checksum::Wrong, ..six() }.bytes(), Dropped("six", "bad_udp_checksum"));
    corpus.add("no UDP checksum", Datagram { checksum: Checksum::Zero, ..four() }.bytes(), Sent("four"));
    corpus.add("no UDP checksum over IPv6", Datagram { checksum: Checksum::Zero, ..six() }.bytes(), Dropped("six", "bad_udp_checksum"));
    corpus.add("unfinished UDP checksum", Datagram { checksum: Checksum::Partial, ..four() }.bytes(), Sent("four"));
    corpus.add("unfinished UDP checksum over IPv6", Datagram { checksum: Checksum::Partial, ..six() }.bytes(), Sent("six"));
    corpus.add("payload damaged", patched(four().bytes(), 50, &[0x00]), Dropped("four", "bad_udp_checksum"));
}

fn sources(corpus: &mut Corpus) {
    let from = |datagram: Datagram, src: &str| Datagram { src: src.parse().unwrap(), ..datagram }.bytes();
    corpus.add("multicast source", from(four(), "239.1.1.1"), Dropped("four", "multicast_source"));
    corpus.add("broadcast source", from(four(), "255.255.255.255"), Dropped("four", "multicast_source"));
    corpus.add("multicast source over IPv6", from(six(), "ff02::1"), Dropped("six", "multicast_source"));
    corpus.add("our own source", from(four(), "10.0.0.2"), Dropped("four", "own_source"));
    corpus.add("our own source over IPv6", from(six(), "fd00::2"), Dropped("six", "own_source"));
}

fn options_and_fragments(corpus: &mut Corpus) {
    for words in [1, 5, 10] {
        corpus.add(format!("{words} words of options"), Datagram { options: vec![1; words * 4], ..four() }.bytes(), Sent("four"));
    }
    corpus.add("options that lie about their length", Datagram { options: vec![0x44, 0xff, 0, 0], ..four() }.bytes(), Sent("four"));
    for (name, fragment) in [("first", 0x2000), ("middle", 0x2001), ("last", 0x0002), ("DF and more", 0x6000)] {
        corpus.add(format!("{name} fragment"), Datagram { fragment, ..four() }.bytes(), Left);
    }
    corpus.add("reserved flag", Datagram { fragment: 0x8000, ..four() }.bytes(), Sent("four"));
}

fn tags(corpus: &mut Corpus) {
    let any = |tags: &[(u16, u16)]| Datagram { tags: tags.to_vec(), dst: "239.1.1.2".parse().unwrap(), ..four() }.bytes();
    let two = |tags: &[(u16, u16)]| Datagram { tags: tags.to_vec(), dst: "239.1.1.3".parse().unwrap(), ..four() }.bytes();
    corpus.add("untagged, any", any(&[]), Sent("any"));
    corpus.add("tagged, any", any(&[(0x8100, 9)]), Sent("any"));
    corpus.add("two tags, any", any(&[(0x88a8, 9), (0x8100, 10)]), Sent("any"));
    corpus.add("priority tag, any", any(&[(0x8100, 0xe000)]), Sent("any"));
    corpus.add("three tags, any", any(&[(0x88a8, 9), (0x8100, 10), (0x8100, 11)]), Left);
    corpus.add("four tags, any", any(&[(0x88a8, 9), (0x8100, 10), (0x8100, 11), (0x8100, 12)]), Left);
    corpus.add("both tags", two(&[(0x88a8, 100), (0x8100, 200)]), Sent("two"));
    corpus.add("both tags, other way round", two(&[(0x88a8, 200), (0x8100, 100)]), Left);
    corpus.add("one of the tags", two(&[(0x8100, 100)]), Left);
    corpus.add("tag on a rule without", Datagram { tags: vec![(0x8100, 9)], ..four() }.bytes(), Left);
    corpus.add("priority tag on a rule without", Datagram { tags: vec![(0x8100, 0x6000)], ..four() }.bytes(), Sent("four"));
    corpus.add("tag, then nothing", any(&[(0x8100, 9)])[..18].to_vec(), Left);
}

/// Each header in front of UDP, alone and stacked.
fn extension_headers(corpus: &mut Corpus) {
    let with = |next: u8, header: &[u8]| {
        let frame = six().bytes();
        let len = (frame.len() - 54 + header.len()) as u16;
        [&patched(patched(frame.clone(), 20, &[next]), 18, &len.to_be_bytes())[..54], header, &frame[54..]].concat()
    };
    for next in [0, 43, 51, 60, 135] {
        corpus.add(format!("extension header {next}"), with(next, &[17, 0, 1, 4, 0, 0, 0, 0]), Left);
    }
    corpus.add("fragment header", with(44, &[17, 0, 0, 1, 0, 0, 0, 9]), Left);
    corpus.add("atomic fragment", with(44, &[17, 0, 0, 0, 0, 0, 0, 9]), Left);
    corpus.add("hop-by-hop and routing", with(0, &[43, 0, 1, 4, 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0]), Left);
    corpus.add("no next header", with(59, &[]), Left);
}

/// What the corpus has to do to the counters of a rule.
fn expected(corpus: &Corpus, id: &str) -> Moved {
    let mut moved = Moved { tx: vec![0], output_drops: vec![BTreeMap::new()], ..Moved::default() };
    for (_, _, fate) in &corpus.0 {
        match fate {
            Sent(rule) if *rule == id => moved.tx[0] += 1,
            Dropped(rule, reason) if *rule == id => *moved.drops.entry((*reason).into()).or_default() += 1,
            OutputDropped(rule, reason) if *rule == id => *moved.output_drops[0].entry((*reason).into()).or_default() += 1,
            _ => continue,
        }
        moved.rx += 1;
    }
    moved
}

/// Frames that `r0` has seen by its own counters: taken for a rule, or left to the kernel under a name.
fn accounted(stats: &Value) -> u64 {
    let r0 = interface_stats(stats, "r0").unwrap();
    let passed: u64 = r0["passed_by"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    r0["rx_packets"].as_u64().unwrap() + passed
}

/// Frames that left `s0`: what the corpus's sender's kernel itself refused (too short for their own tags) is not among them.
fn departed(lab: &Lab) -> u64 {
    let text = lab.src.output("ip", &["-j", "-s", "link", "show", "dev", "s0"]).unwrap();
    let links: Value = serde_json::from_str(&text).unwrap();
    links[0]["stats64"]["tx"]["packets"].as_u64().unwrap()
}

/// Whatever else the interfaces carry meanwhile, everything that departed is accounted for.
fn assert_all_accounted(path: &Path, lab: &Lab, relay: &RelayProcess, (seen, sent): (u64, u64), corpus: usize) {
    let begin = Instant::now();
    loop {
        let stats = relay.stats().unwrap();
        let (now_seen, now_sent) = (accounted(&stats) - seen, departed(lab) - sent);
        if now_seen == now_sent && now_sent + 8 >= corpus as u64 {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(2), "{}: {now_seen} of {now_sent} ({corpus}) accounted for: {stats}", path.name);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Sends the corpus through a path; what came out.
fn carried(path: &Path, corpus: &Corpus) -> Vec<Vec<u8>> {
    let lab = Lab::simple().unwrap();
    for (namespace, iface) in [(&lab.src, "s0"), (&lab.relay, "r0"), (&lab.relay, "r1"), (lab.sink(1), "k1")] {
        let _ = namespace.output("ethtool", &["-K", iface, "txvlan", "off", "rxvlan", "off"]);
    }
    let relay = path.start(&lab, &RULES).unwrap();
    let capture = Capture::on(lab.sink(1), "k1", &[]).unwrap();
    let injector = Injector::on(&lab.src, "s0").unwrap();
    let workers = relay.worker_pids().unwrap();
    let before = relay.stats().unwrap();
    let departed_before = (accounted(&before), departed(&lab));
    let wanted = corpus.0.iter().filter(|(_, _, fate)| matches!(fate, Sent(_))).count();
    for (name, frame, _) in &corpus.0 {
        injector.send(frame).unwrap_or_else(|errno| eprintln!("{name}: not sent: {errno}"));
    }
    let (begin, mut frames) = (Instant::now(), Vec::new());
    while frames.len() < wanted && begin.elapsed() < Duration::from_secs(3) {
        frames.extend(capture.frames());
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(200));
    frames.extend(capture.frames());
    let after = relay.stats().unwrap();
    for id in ["four", "six", "any", "two"] {
        assert_eq!(moved(&before, &after, id).unwrap(), expected(corpus, id), "{}: rule {id}: {after}", path.name);
    }
    assert_rules_conserved(&after);
    assert_frames_conserved(&after);
    assert_eq!(relay.worker_pids().unwrap(), workers, "{}: {}", path.name, relay.log());
    if path.path == "xsk" {
        assert_all_accounted(path, &lab, &relay, departed_before, corpus.0.len());
    }
    frames
}

/// The receiver's own veth pads nothing; the relay carries padding on or leaves it out, but the packet is the same.
fn packet(frame: &[u8]) -> Vec<u8> {
    let tags = (0..2).take_while(|tag| matches!(frame[12 + tag * 4..14 + tag * 4], [0x81, 0] | [0x88, 0xa8])).count();
    let ip = 14 + tags * 4;
    let len = match frame[ip] >> 4 {
        4 => usize::from(frame[ip + 2]) << 8 | usize::from(frame[ip + 3]),
        _ => 40 + (usize::from(frame[ip + 4]) << 8 | usize::from(frame[ip + 5])),
    };
    frame[..ip + len].to_vec()
}

/// What the frames of the corpus that are right become.
fn golden(corpus: &Corpus) -> Vec<Vec<u8>> {
    let sent = corpus.0.iter().filter_map(|(_, frame, fate)| if let Sent(id) = fate { Some((*id, packet(frame))) } else { None });
    sent.map(|(id, frame)| rewritten(id, &frame)).collect()
}

/// By the text of the rules, with checksums made anew.
fn rewritten(id: &str, frame: &[u8]) -> Vec<u8> {
    let tags = (0..2).take_while(|tag| matches!(frame[12 + tag * 4..14 + tag * 4], [0x81, 0] | [0x88, 0xa8])).count();
    let (link, mut ip) = (&frame[..12], frame[14 + tags * 4..].to_vec());
    let ethertype = &frame[12 + tags * 4..14 + tags * 4];
    let l4 = if id == "six" { 40 } else { usize::from(ip[0] & 15) * 4 };
    let (group, new_tag): (&[u8], Option<u16>) = match id {
        "four" => (&[239, 9, 9, 9], None),
        "any" => (&[239, 9, 9, 8], None),
        "two" => (&[239, 9, 9, 7], Some(33)),
        _ => (&[0xff, 0x3e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x99, 0x99], None),
    };
    if id == "six" {
        ip[7] -= 1;
        ip[8..24].copy_from_slice(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
        ip[24..40].copy_from_slice(group);
    } else {
        ip[8] -= u8::from(id != "any");
        ip[1] = if id == "four" { 46 << 2 | ip[1] & 3 } else { ip[1] };
        ip[16..20].copy_from_slice(group);
        ip[10..12].fill(0);
        let sum = !relay_tests::raw::sum(&ip[..l4], 0);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    if id != "two" {
        ip[l4 + 2..l4 + 4].copy_from_slice(&6_000u16.to_be_bytes());
    }
    if ip[l4 + 6..l4 + 8] != [0, 0] {
        let addresses = if id == "six" { 8..40 } else { 12..20 };
        let pseudo = relay_tests::raw::sum(&[&ip[addresses], &[0, 17], &ip[l4 + 4..l4 + 6]].concat(), 0);
        ip[l4 + 6..l4 + 8].fill(0);
        let sum = match !relay_tests::raw::sum(&ip[l4..], pseudo) {
            0 => 0xffff,
            sum => sum,
        };
        ip[l4 + 6..l4 + 8].copy_from_slice(&sum.to_be_bytes());
    }
    let mac = if id == "six" {
        [0x33, 0x33, group[12], group[13], group[14], group[15]]
    } else {
        [1, 0, 0x5e, group[1] & 0x7f, group[2], group[3]]
    };
    let kept: &[u8] = if id == "four" { &frame[12..12 + tags * 4] } else { &[] };
    let tag = new_tag.map_or(vec![], |id| [0x8100u16.to_be_bytes(), id.to_be_bytes()].concat());
    // The capture has no outermost tag: what it says is judged by rule_keys.rs.
    let tags = [kept, &tag].concat();
    [&mac[..], &link[6..12], tags.get(4..).unwrap_or_default(), ethertype, &ip].concat()
}

/// The source MAC is the egress interface's, which the corpus can't know.
fn without_source_mac(mut frame: Vec<u8>) -> Vec<u8> {
    frame[6..12].fill(0);
    frame
}

#[test]
fn a_hostile_corpus_has_the_same_fate_on_every_path() {
    needs_root!();
    let _turn = paths::turn();
    let corpus = corpus();
    assert!(corpus.0.len() > 250, "{}", corpus.0.len());
    let golden: Vec<Vec<u8>> = golden(&corpus).into_iter().map(without_source_mac).collect();
    let names: Vec<&String> = corpus.0.iter().filter(|(_, _, fate)| matches!(fate, Sent(_))).map(|(name, ..)| name).collect();
    for path in PATHS {
        let out: Vec<Vec<u8>> = carried(&path, &corpus).iter().map(|frame| without_source_mac(packet(frame))).collect();
        eprintln!("{}: {} frames in, {} out", path.name, corpus.0.len(), out.len());
        for (at, (out, golden)) in out.iter().zip(&golden).enumerate() {
            assert_eq!(out, golden, "{}: {}", path.name, names[at]);
        }
        assert_eq!(out.len(), golden.len(), "{}", path.name);
    }
}
