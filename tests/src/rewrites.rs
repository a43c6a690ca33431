//! The rewrite corpus: a rule, a packet, and the packets that must come out of it, byte for byte, or the drop that must count it.
//!
//! Written out in `tests/golden/rewrites.txt` for any tool to read. What comes out is built here from what the rule says in words of
//! [`Datagram`], and again by `tests/golden/check.py` from the rule's text. Must never call the code it judges.

use crate::raw::{Checksum, Datagram};
use std::fmt::Write as _;
use std::net::IpAddr;

mod cases;

/// An interface of the relay in the corpus's world.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Its name.
    pub name: &'static str,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its addresses, as `relay::lab` gives them.
    pub ipv4: &'static str,
    /// The same.
    pub ipv6: &'static str,
    /// Its MTU.
    pub mtu: usize,
}

/// The ingress, then the egress interfaces.
pub const LINKS: [Link; 3] = [
    Link { name: "r0", mac: [2, 0, 0, 0, 0, 2], ipv4: "10.0.0.2", ipv6: "fd00::2", mtu: 1_500 },
    Link { name: "r1", mac: [2, 0, 0, 0, 1, 1], ipv4: "10.0.1.1", ipv6: "fd00:0:0:1::1", mtu: 1_500 },
    Link { name: "r2", mac: [2, 0, 0, 0, 2, 1], ipv4: "10.0.2.1", ipv6: "fd00:0:0:2::1", mtu: 1_400 },
];

/// The stations behind `r1` and `r2`.
pub const SINK_MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 1, 2], [2, 0, 0, 0, 2, 2]];

/// Unicast destinations: egress interface, address, next hop.
pub const HOPS: [(&str, &str, &str); 6] = [
    ("r1", "10.0.1.2", "10.0.1.2"),
    ("r2", "10.0.2.2", "10.0.2.2"),
    ("r1", "fd00:0:0:1::2", "fd00:0:0:1::2"),
    ("r2", "fd00:0:0:2::2", "fd00:0:0:2::2"),
    ("r1", "10.77.0.1", "10.0.1.2"),
    ("r2", "fd77::1", "fd00:0:0:2::2"),
];

/// What an output makes of the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// This frame leaves by this interface.
    Sent(&'static str, Vec<u8>),
    /// A drop of the output.
    Dropped(&'static str),
}

/// One rule, one packet, what comes of it.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is special about it; the rule's id.
    pub name: String,
    /// The line.
    pub rule: String,
    /// From the Ethernet header on.
    pub packet: Vec<u8>,
    /// A drop before any output, or what each output does.
    pub fate: Result<Vec<Fate>, &'static str>,
}

/// What an output does, in words of the datagram that goes in.
enum Expected {
    /// Out of `r1` or `r2`, changed like this (TTL, MAC addresses and an unfinished checksum have been seen to).
    Out(usize, Box<dyn Fn(&mut Datagram)>),
    /// Not out.
    Lost(&'static str),
}

fn out(link: usize, change: impl Fn(&mut Datagram) + 'static) -> Expected {
    Expected::Out(link, Box::new(change))
}

/// Out by a station's MAC address.
fn hop(link: usize, change: impl Fn(&mut Datagram) + 'static) -> Expected {
    out(link, move |d| {
        d.dst_mac = Some(SINK_MACS[link - 1]);
        change(d);
    })
}

/// The corpus as it grows. Each case has a group of its own, unless it says what it matches.
#[derive(Default)]
struct Corpus(Vec<Case>);

impl Corpus {
    /// The next case's own group.
    fn group(&self, v6: bool) -> IpAddr {
        let number = self.0.len() as u16 + 1;
        if v6 { IpAddr::from([0xff3e, 0, 0, 0, 0, 0, 0x1234, number]) } else { IpAddr::from([239, 1, (number >> 8) as u8, number as u8]) }
    }

    /// `rule`: what follows the match.
    fn add(&mut self, name: &str, rule: &str, packet: Datagram, expected: Vec<Expected>) {
        let packet = Datagram { dst: self.group(packet.dst.is_ipv6()), ..packet };
        let matching =
            if packet.dst.is_ipv6() { format!("[{}]:{}", packet.dst, packet.dport) } else { format!("{}:{}", packet.dst, packet.dport) };
        self.matching(name, &format!("{matching} {rule}"), packet, expected);
    }

    fn matching(&mut self, name: &str, rule: &str, packet: Datagram, expected: Vec<Expected>) {
        let fates = expected.iter().map(|expected| fate(&packet, expected)).collect();
        self.frame(name, rule, packet.bytes(), Ok(fates));
    }

    fn drop(&mut self, name: &str, packet: Datagram, reason: &'static str) {
        let packet = Datagram { dst: self.group(packet.dst.is_ipv6()), ..packet };
        let dst = if packet.dst.is_ipv6() { format!("[{}]", packet.dst) } else { packet.dst.to_string() };
        self.frame(name, &format!("{dst} -> r1, r2 :6000 ttl=keep"), packet.bytes(), Err(reason));
    }

    fn frame(&mut self, name: &str, rule: &str, packet: Vec<u8>, fate: Result<Vec<Fate>, &'static str>) {
        let separator = if rule.contains(';') { "" } else { ";" };
        let rule = format!("r0 {rule}{separator} id={name}");
        self.0.push(Case { name: name.to_owned(), rule, packet, fate });
    }
}

fn fate(packet: &Datagram, expected: &Expected) -> Fate {
    match expected {
        Expected::Lost(reason) => Fate::Dropped(reason),
        Expected::Out(link, change) => {
            let checksum = if packet.checksum == Checksum::Partial { Checksum::Right } else { packet.checksum };
            let ttl = packet.ttl.saturating_sub(1);
            let mut new = Datagram { ttl, checksum, src_mac: LINKS[*link].mac, dst_mac: None, padding: 0, ..packet.clone() };
            change(&mut new);
            Fate::Sent(LINKS[*link].name, new.bytes())
        }
    }
}

/// All cases.
pub fn corpus() -> Vec<Case> {
    let mut corpus = Corpus::default();
    cases::all(&mut corpus);
    corpus.0
}

/// A frame cut behind its IP packet: Ethernet padding is nobody's promise.
pub fn without_padding(frame: &[u8]) -> &[u8] {
    let word = |at: usize| frame.get(at..at + 2).map_or(0, |pair| usize::from(pair[0]) << 8 | usize::from(pair[1]));
    let tags = (0..2).take_while(|tag| matches!(word(12 + tag * 4), 0x8100 | 0x88a8)).count();
    let l3 = 14 + tags * 4;
    let len = if word(l3 - 2) == 0x0800 { word(l3 + 2) } else { 40 + word(l3 + 4) };
    frame.get(..l3 + len).unwrap_or(frame)
}

/// Hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The corpus as it stands in `tests/golden/rewrites.txt`.
pub fn text() -> String {
    let mut text = String::from(
        "# What each rule makes of one packet. Written by tests/src/rewrites.rs, checked by tests/golden/check.py; do not edit.\n\
         # link NAME MAC IPV4 IPV6 MTU: an interface of the relay. hop EGRESS ADDRESS MAC: how a unicast destination is reached.\n\
         # case NAME, rule LINE, in FRAME; then for each output by number `out N EGRESS FRAME` or `drop N REASON`, or for all `drop * REASON`.\n\
         # Frames from the Ethernet header on, in hexadecimal; those that go out without Ethernet padding.\n",
    );
    for Link { name, mac, ipv4, ipv6, mtu } in LINKS {
        let _ = writeln!(text, "link {name} {} {ipv4} {ipv6} {mtu}", hex(&mac));
    }
    for (egress, address, _) in HOPS {
        let _ = writeln!(text, "hop {egress} {address} {}", hex(&SINK_MACS[usize::from(egress == "r2")]));
    }
    for Case { name, rule, packet, fate } in corpus() {
        let _ = writeln!(text, "\ncase {name}\nrule {rule}\nin {}", hex(&packet));
        match fate {
            Err(reason) => drop(writeln!(text, "drop * {reason}")),
            Ok(outputs) => outputs.iter().enumerate().for_each(|(number, output)| {
                let _ = match output {
                    Fate::Sent(egress, frame) => writeln!(text, "out {number} {egress} {}", hex(frame)),
                    Fate::Dropped(reason) => writeln!(text, "drop {number} {reason}"),
                };
            }),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::process::Command;

    /// Run with `RELAY_GOLDEN_WRITE=1` after a deliberate change.
    #[test]
    fn the_written_corpus_is_the_built_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/rewrites.txt");
        if std::env::var_os("RELAY_GOLDEN_WRITE").is_some() {
            std::fs::write(path, text()).unwrap();
        }
        assert!(std::fs::read_to_string(path).unwrap() == text(), "{path} is not what tests/src/rewrites builds");
    }

    #[test]
    fn names_are_unique_and_every_key_occurs() {
        let cases = corpus();
        assert!(cases.len() > 100, "{}", cases.len());
        assert_eq!(cases.iter().map(|case| &case.name).collect::<BTreeSet<_>>().len(), cases.len());
        let keys = ["ttl=keep", "ttl=9", "src=egress", "src=10", "src=[", "sport=", "dscp=", "vlan=keep", "vlan=none", "vlan=7", " :6000"];
        for word in keys {
            assert!(cases.iter().any(|case| case.rule.contains(word)), "no case with {word}");
        }
        for case in &cases {
            case.rule.parse::<relay::rule::Rule>().unwrap_or_else(|error| panic!("{}: {error}", case.rule));
        }
    }

    /// scapy builds the same frames from the rules' texts.
    #[test]
    fn an_independent_implementation_agrees() {
        let (check, corpus) =
            (concat!(env!("CARGO_MANIFEST_DIR"), "/golden/check.py"), concat!(env!("CARGO_MANIFEST_DIR"), "/golden/rewrites.txt"));
        // The distribution's own first: that one sees the distribution's scapy.
        for python in ["/usr/bin/python3", "python3"] {
            let Ok(output) = Command::new(python).args(["-B", check, corpus]).output() else { continue };
            let told = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
            if output.status.code() == Some(77) {
                continue;
            }
            print!("{told}");
            assert!(output.status.success(), "{told}");
            return;
        }
        println!("SKIPPED: no python3 with scapy (apt-get install python3-scapy)");
    }
}
