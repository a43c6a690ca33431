//! Whole Ethernet frames for generators that bypass the stack. Pure.
//!
//! Its own few lines of checksum and headers on purpose: what the relay's `wire` room gets wrong must not be wrong here as well.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Headers of one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Sender's MAC.
    pub source_mac: [u8; 6],
    /// Receiver's MAC; for groups see [`group_mac`].
    pub destination_mac: [u8; 6],
    /// Sender.
    pub source: SocketAddr,
    /// Destination.
    pub destination: SocketAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// DSCP.
    pub dscp: u8,
}

const ETHERNET: usize = 14;
const UDP: usize = 8;

impl Flow {
    /// Offset of the payload.
    pub fn payload_offset(&self) -> usize {
        ETHERNET + if self.destination.is_ipv4() { 20 } else { 40 } + UDP
    }

    /// A frame around `payload`, checksums complete.
    pub fn frame(&self, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; self.payload_offset() + payload.len()];
        self.write(&mut frame, payload);
        frame
    }

    /// Writes headers and payload into `frame`, which is [`Flow::payload_offset`] longer than `payload`.
    pub fn write(&self, frame: &mut [u8], payload: &[u8]) {
        let mut at = Writer { frame, at: 0 };
        at.put(&self.destination_mac).put(&self.source_mac);
        let udp_len = u16::try_from(UDP + payload.len()).unwrap_or(u16::MAX);
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => self.ipv4(&mut at, udp_len, source, destination),
            (source, destination) => self.ipv6(&mut at, udp_len, v6(source), v6(destination)),
        }
        let checksum = self.udp_checksum(udp_len, payload);
        at.put(&self.source.port().to_be_bytes()).put(&self.destination.port().to_be_bytes());
        at.put(&udp_len.to_be_bytes()).put(&checksum.to_be_bytes()).put(payload);
    }

    fn ipv4(&self, at: &mut Writer<'_>, udp_len: u16, source: Ipv4Addr, destination: Ipv4Addr) {
        let mut header = [0u8; 20];
        let total = (udp_len.saturating_add(20)).to_be_bytes();
        let mut h = Writer { frame: &mut header, at: 0 };
        h.put(&[0x45, self.dscp << 2]).put(&total).put(&[0, 0, 0x40, 0, self.ttl, 17, 0, 0]);
        h.put(&source.octets()).put(&destination.octets());
        let checksum = !fold(sum(0, &header));
        Writer { frame: &mut header, at: 10 }.put(&checksum.to_be_bytes());
        at.put(&[8, 0]).put(&header);
    }

    fn ipv6(&self, at: &mut Writer<'_>, udp_len: u16, source: Ipv6Addr, destination: Ipv6Addr) {
        let class = u32::from(self.dscp << 2) << 20 | 6 << 28;
        at.put(&[0x86, 0xdd]).put(&class.to_be_bytes()).put(&udp_len.to_be_bytes()).put(&[17, self.ttl]);
        at.put(&source.octets()).put(&destination.octets());
    }

    fn udp_checksum(&self, udp_len: u16, payload: &[u8]) -> u16 {
        let mut total = u64::from(udp_len) * 2 + 17 + u64::from(self.source.port()) + u64::from(self.destination.port());
        for addr in [self.source.ip(), self.destination.ip()] {
            total = match addr {
                IpAddr::V4(addr) => sum(total, &addr.octets()),
                IpAddr::V6(addr) => sum(total, &addr.octets()),
            };
        }
        match !fold(sum(total, payload)) {
            0 => 0xffff,
            checksum => checksum,
        }
    }
}

fn v6(addr: IpAddr) -> Ipv6Addr {
    match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped(),
        IpAddr::V6(addr) => addr,
    }
}

/// MAC of a group (RFC 1112 §6.4, RFC 2464 §7); `None` for unicast.
pub fn group_mac(group: IpAddr) -> Option<[u8; 6]> {
    match group {
        _ if !group.is_multicast() => None,
        IpAddr::V4(group) => {
            let [_, b, c, d] = group.octets();
            Some([1, 0, 0x5e, b & 0x7f, c, d])
        }
        IpAddr::V6(group) => {
            let [.., a, b, c, d] = group.octets();
            Some([0x33, 0x33, a, b, c, d])
        }
    }
}

/// RFC 1071 sum of big-endian words, an odd last byte padded.
fn sum(start: u64, bytes: &[u8]) -> u64 {
    bytes.chunks(2).fold(start, |total, pair| match *pair {
        [high, low] => total + u64::from(u16::from_be_bytes([high, low])),
        [high] => total + u64::from(u16::from_be_bytes([high, 0])),
        _ => total,
    })
}

fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap_or(0)
}

/// Appends; what does not fit is cut, since callers size the frame from the same numbers.
struct Writer<'a> {
    frame: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        let rest = self.frame.get_mut(self.at..).unwrap_or_default();
        for (to, from) in rest.iter_mut().zip(bytes) {
            *to = *from;
        }
        self.at += bytes.len();
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_frame() {
        let flow = Flow {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: group_mac("239.129.1.1".parse().unwrap()).unwrap(),
            source: "10.0.0.1:4000".parse().unwrap(),
            destination: "239.129.1.1:5000".parse().unwrap(),
            ttl: 3,
            dscp: 46,
        };
        let frame = flow.frame(b"abc");
        assert_eq!(frame[..6], [1, 0, 0x5e, 1, 1, 1]);
        assert_eq!(frame.len(), 45);
        assert_eq!(fold(sum(0, &frame[14..34])), 0xffff, "IPv4 header sums up");
        let pseudo = sum(sum(17 + 11, &frame[26..34]), &frame[34..]);
        assert_eq!(fold(pseudo), 0xffff, "UDP sums up");
        assert_eq!((frame[15], frame[22]), (46 << 2, 3));
    }

    #[test]
    fn ipv6_sums_up() {
        let flow = Flow {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: group_mac("ff3e::1234:5678".parse().unwrap()).unwrap(),
            source: "[fd00::1]:4000".parse().unwrap(),
            destination: "[ff3e::1234:5678]:5000".parse().unwrap(),
            ttl: 3,
            dscp: 0,
        };
        let frame = flow.frame(&[7; 32]);
        assert_eq!(frame[..6], [0x33, 0x33, 0x12, 0x34, 0x56, 0x78]);
        assert_eq!(fold(sum(sum(17 + 40, &frame[22..54]), &frame[54..])), 0xffff);
    }
}
