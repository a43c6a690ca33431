//! Packets for tests: a builder, a second parser written from the specification alone, and a full verifier.
//!
//! Must never call the code it is there to check.

use super::{Headers, ParseVerdict};
use proptest::prelude::*;

/// A UDP packet to be built.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) v6: bool,
    pub(crate) tags: Vec<u16>,
    pub(crate) options: usize,
    pub(crate) src: [u8; 16],
    pub(crate) dst: [u8; 16],
    pub(crate) sport: u16,
    pub(crate) dport: u16,
    pub(crate) ttl: u8,
    pub(crate) traffic_class: u8,
    pub(crate) payload: Vec<u8>,
    pub(crate) padding: usize,
    pub(crate) no_checksum: bool,
    /// The checksum field holds the pseudo-header sum only.
    pub(crate) partial: bool,
}

impl Spec {
    /// `10.0.0.1:4000 -> 239.1.1.1:5000`, 11 bytes of payload.
    pub(crate) fn v4() -> Self {
        let mut spec = Self {
            v6: false,
            tags: vec![],
            options: 0,
            src: [0; 16],
            dst: [0; 16],
            sport: 4000,
            dport: 5000,
            ttl: 8,
            traffic_class: 0,
            payload: b"hello world".to_vec(),
            padding: 0,
            no_checksum: false,
            partial: false,
        };
        spec.src[..4].copy_from_slice(&[10, 0, 0, 1]);
        spec.dst[..4].copy_from_slice(&[239, 1, 1, 1]);
        spec
    }

    /// `[2001:db8::1]:4000 -> [ff3e::1234]:5000`.
    pub(crate) fn v6() -> Self {
        let mut spec = Self { v6: true, ..Self::v4() };
        spec.src = "2001:db8::1".parse::<std::net::Ipv6Addr>().unwrap().octets();
        spec.dst = "ff3e::1234".parse::<std::net::Ipv6Addr>().unwrap().octets();
        spec
    }

    fn udp(&self) -> Vec<u8> {
        let mut udp = Vec::new();
        for word in [self.sport, self.dport, (8 + self.payload.len()) as u16, 0] {
            udp.extend(word.to_be_bytes());
        }
        udp.extend(&self.payload);
        let sum = match (self.no_checksum && !self.v6, self.partial) {
            (true, _) => 0,
            (_, true) => words(&self.pseudo(udp.len())),
            _ => match !words(&[self.pseudo(udp.len()), udp.clone()].concat()) {
                0 => 0xffff,
                sum => sum,
            },
        };
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        udp
    }

    fn pseudo(&self, len: usize) -> Vec<u8> {
        pseudo(self.v6, &self.src, &self.dst, len)
    }

    /// The bytes, from the Ethernet header to the padding.
    pub(crate) fn build(&self) -> Vec<u8> {
        let mut frame = vec![0x01, 0, 0x5e, 1, 1, 1, 2, 0, 0, 0, 0, 1];
        for (at, vid) in self.tags.iter().enumerate() {
            frame.extend(if at == 0 && self.tags.len() == 2 { [0x88, 0xa8] } else { [0x81, 0x00] });
            frame.extend((vid | 0x6000).to_be_bytes());
        }
        let udp = self.udp();
        if self.v6 {
            frame.extend([0x86, 0xdd, 0x60 | self.traffic_class >> 4, self.traffic_class << 4 | 0x0a, 0xbc, 0xde]);
            frame.extend((udp.len() as u16).to_be_bytes());
            frame.extend([17, self.ttl]);
            frame.extend(self.src);
            frame.extend(self.dst);
        } else {
            let header_len = 20 + 4 * self.options;
            let mut ip = vec![0x40 | (header_len / 4) as u8, self.traffic_class];
            ip.extend(((header_len + udp.len()) as u16).to_be_bytes());
            ip.extend([0x12, 0x34, 0x40, 0x00, self.ttl, 17, 0, 0]);
            ip.extend(&self.src[..4]);
            ip.extend(&self.dst[..4]);
            ip.resize(header_len, 1);
            let sum = !words(&ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend([0x08, 0x00]);
            frame.extend(ip);
        }
        frame.extend(udp);
        frame.resize(frame.len() + self.padding, 0xee);
        frame
    }
}

/// Pseudo-header bytes.
pub(crate) fn pseudo(v6: bool, src: &[u8; 16], dst: &[u8; 16], len: usize) -> Vec<u8> {
    let size = if v6 { 16 } else { 4 };
    let mut bytes = [&src[..size], &dst[..size]].concat();
    bytes.extend((len as u32).to_be_bytes());
    bytes.extend([0, 0, 0, 17]);
    bytes
}

/// Folded sum of big-endian words.
pub(crate) fn words(bytes: &[u8]) -> u16 {
    let sum: u64 = bytes.chunks(2).map(|w| u64::from(w[0]) * 256 + u64::from(*w.get(1).unwrap_or(&0))).sum();
    let mut sum = sum;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Whether all checksums of a packet are right (0 over IPv4 counts).
pub(crate) fn checksums_hold(frame: &[u8], h: &Headers) -> bool {
    let l3 = usize::from(h.l3_offset);
    let l4 = usize::from(h.l4_offset);
    let udp = &frame[l4..l4 + usize::from(h.udp_len)];
    let ip_holds = h.family == 6 || words(&frame[l3..l4]) == 0xffff;
    let none = h.family == 4 && udp[6..8] == [0, 0];
    ip_holds && (none || words(&[pseudo(h.family == 6, &h.src, &h.dst, udp.len()), udp.to_vec()].concat()) == 0xffff)
}

/// The specification again, byte by byte, with panics in place of care: the input is cut to what exists first.
pub(crate) fn reference(p: &[u8]) -> Result<Headers, ParseVerdict> {
    use ParseVerdict::*;
    let word = |at: usize| u16::from_be_bytes([p[at], p[at + 1]]);
    if p.len() < 14 {
        return Err(Malformed);
    }
    let mut vids = vec![];
    let mut at = 12;
    while [0x8100, 0x88a8].contains(&word(at)) {
        if vids.len() == 2 {
            return Err(TagDepth);
        }
        if p.len() < at + 6 {
            return Err(Malformed);
        }
        vids.push(u32::from(word(at + 2) % 4096));
        at += 4;
    }
    let l3 = at + 2;
    let mut h = Headers { l3_offset: l3 as u16, tag_count: vids.len() as u8, ..Headers::default() };
    h.tag = vids.first().unwrap_or(&0) + 65536 * vids.get(1).unwrap_or(&0);
    let rest = p.len() - l3;
    let (protocol, payload_len);
    match word(at) {
        0x0800 => {
            if rest < 20 || p[l3] / 16 != 4 || p[l3] % 16 < 5 {
                return Err(Malformed);
            }
            let (ihl, total) = (usize::from(p[l3] % 16) * 4, usize::from(word(l3 + 2)));
            if ihl > rest || total < ihl || total > rest {
                return Err(Malformed);
            }
            (h.family, h.ip_header_len, h.l3_len, h.ttl, h.traffic_class) = (4, ihl as u8, total as u32, p[l3 + 8], p[l3 + 1]);
            h.src[..4].copy_from_slice(&p[l3 + 12..l3 + 16]);
            h.dst[..4].copy_from_slice(&p[l3 + 16..l3 + 20]);
            protocol = match p[l3 + 9] {
                17 if word(l3 + 6) & 0x2000 != 0 || word(l3 + 6) & 0x1fff != 0 => Err(Fragment),
                17 => Ok(()),
                2 => Err(Igmp),
                1 => Err(Icmp),
                103 => Err(Pim),
                _ => Err(NotUdp),
            };
            payload_len = total - ihl;
        }
        0x86dd => {
            if rest < 40 || p[l3] / 16 != 6 || usize::from(word(l3 + 4)) + 40 > rest {
                return Err(Malformed);
            }
            payload_len = usize::from(word(l3 + 4));
            (h.family, h.ip_header_len, h.l3_len, h.ttl) = (6, 40, 40 + payload_len as u32, p[l3 + 7]);
            h.traffic_class = (word(l3) >> 4 & 0xff) as u8;
            h.src.copy_from_slice(&p[l3 + 8..l3 + 24]);
            h.dst.copy_from_slice(&p[l3 + 24..l3 + 40]);
            protocol = match p[l3 + 6] {
                17 => Ok(()),
                58 => Err(Icmpv6),
                44 => Err(Fragment),
                103 => Err(Pim),
                0 | 43 | 60 | 51 | 135 | 139 | 140 => Err(Extension),
                _ => Err(NotUdp),
            };
        }
        _ => return Err(NotIp),
    }
    protocol?;
    let l4 = l3 + usize::from(h.ip_header_len);
    if payload_len < 8 || usize::from(word(l4 + 4)) < 8 || usize::from(word(l4 + 4)) > payload_len {
        return Err(Malformed);
    }
    (h.l4_offset, h.sport, h.dport, h.udp_len, h.udp_checksum) = (l4 as u16, word(l4), word(l4 + 2), word(l4 + 4), word(l4 + 6));
    Ok(h)
}

/// Any UDP packet a relay may meet.
pub(crate) fn spec() -> impl Strategy<Value = Spec> {
    let addresses = (any::<bool>(), any::<[u8; 16]>(), any::<[u8; 16]>());
    let link = (prop::collection::vec(0u16..4096, 0..=2), 0usize..=10, 0usize..20);
    let numbers = (any::<u16>(), any::<u16>(), any::<u8>(), any::<u8>());
    let payload = prop::collection::vec(any::<u8>(), 0..100);
    (addresses, link, numbers, payload, prop::bool::weighted(0.2), prop::bool::weighted(0.2)).prop_map(
        |((v6, mut src, mut dst), (tags, options, padding), (sport, dport, ttl, traffic_class), payload, no_checksum, partial)| {
            src[0] = src[0] % 223 + 1;
            dst[0] = if v6 { 0xff } else { 224 + dst[0] % 16 };
            if !v6 {
                src[4..].fill(0);
                dst[4..].fill(0);
            }
            Spec { v6, tags, options, src, dst, sport, dport, ttl, traffic_class, payload, padding, no_checksum, partial }
        },
    )
}
