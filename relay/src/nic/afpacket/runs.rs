//! Which packets may leave as one super-frame, and what its header says. Pure.
//!
//! A run is packets of one flow and one size whose headers differ in nothing that segmentation would not make anew: length and
//! checksums, and the IPv4 identification. Segmentation counts that one up from the first, so a run either counts up itself, or
//! consists of atomic datagrams (DF set), whose identification says nothing and may be any (RFC 6864 §4.1).
//! Packets with tags, options, extension headers or no UDP checksum go alone. Must never write a packet.

use crate::wire::checksum::{checksum, fold, pseudo_header};

/// Packets of one super-frame at most.
pub(super) const MAX_SEGMENTS: usize = 64;
/// Bytes of one super-frame at most: below the 65,536 of gso_max_size, and its lengths fit 16 bits.
const MAX_BYTES: usize = 65_000;
/// `struct virtio_net_hdr` (linux/virtio_net.h).
pub(super) const VNET_LEN: usize = 10;
/// VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_UDP_L4.
const NEEDS_CSUM: u8 = 1;
const GSO_UDP_L4: u8 = 5;
const IPV4_LEN: usize = 42;
const IPV6_LEN: usize = 62;
const UDP_LEN: usize = 8;
const DONT_FRAGMENT: u8 = 0x40;

/// What a packet that may be in a run looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    is_ipv4: bool,
    /// Bytes of UDP payload.
    pub(super) payload_len: usize,
}

fn word(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |pair| u16::from_be_bytes([pair[0], pair[1]]))
}

impl Shape {
    /// Of a whole packet in one piece; `None`: it goes alone.
    #[inline]
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let is_ipv4 = match word(bytes, 12) {
            0x0800 => true,
            0x86dd => false,
            _ => return None,
        };
        let header_len = if is_ipv4 { IPV4_LEN } else { IPV6_LEN };
        let header = bytes.get(..header_len)?;
        let udp_len = usize::from(word(header, header_len - 4));
        let plain = match is_ipv4 {
            true => {
                header[14] == 0x45 && header[23] == 17 && word(header, 20) & 0x3fff == 0 && usize::from(word(header, 16)) == udp_len + 20
            }
            false => header[20] == 17 && usize::from(word(header, 18)) == udp_len,
        };
        let payload_len = udp_len.checked_sub(UDP_LEN)?;
        let whole = payload_len > 0 && bytes.len() >= header_len + payload_len;
        (plain && whole && word(header, header_len - 2) != 0).then_some(Self { is_ipv4, payload_len })
    }

    /// Bytes before the payload.
    pub(super) const fn header_len(self) -> usize {
        if self.is_ipv4 { IPV4_LEN } else { IPV6_LEN }
    }

    /// Where the payload is in a packet.
    pub(super) const fn payload(self) -> std::ops::Range<usize> {
        self.header_len()..self.header_len() + self.payload_len
    }

    /// Whether `count` packets and one more fit a super-frame.
    const fn has_room(self, count: usize) -> bool {
        count < MAX_SEGMENTS && self.header_len() + self.payload_len * (count + 1) <= MAX_BYTES
    }

    /// Whether a packet of this shape goes on with the run of `count` packets that `first` (a header) began.
    #[inline]
    pub(super) fn continues(self, first: &[u8], count: usize, packet: &[u8]) -> bool {
        let same = |range: std::ops::Range<usize>| first.get(range.clone()) == packet.get(range);
        if !self.has_room(count) {
            return false;
        }
        if !self.is_ipv4 {
            return same(0..18) && same(20..58);
        }
        let counts_up = || word(packet, 18) == word(first, 18).wrapping_add(count as u16);
        let is_atomic = packet.get(20).is_some_and(|flags| flags & DONT_FRAGMENT != 0);
        same(0..16) && same(20..24) && same(26..38) && (is_atomic || counts_up())
    }

    /// A number that is equal for packets of one flow, and mostly differs otherwise.
    #[inline]
    pub(super) fn hash(self, packet: &[u8]) -> u32 {
        let end = self.header_len() - 4;
        let tail = packet.get(end.saturating_sub(12)..end).unwrap_or_default();
        tail.as_chunks::<4>()
            .0
            .iter()
            .fold(0, |hash: u32, four| (hash ^ u32::from_ne_bytes(*four)).wrapping_mul(0x9e37_79b1).rotate_left(13))
    }
}

/// The header of a super-frame: virtio header, Ethernet, IP, UDP.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    bytes: [u8; VNET_LEN + IPV6_LEN],
    len: usize,
}

impl Header {
    /// No super-frame: a virtio header of zeros, before a packet that goes as it is.
    pub(super) const NONE: Self = Self { bytes: [0; VNET_LEN + IPV6_LEN], len: VNET_LEN };

    /// Of a run that `packet` begins.
    pub(super) fn begin(shape: Shape, packet: &[u8]) -> Self {
        Self::of(packet.get(..shape.header_len()).unwrap_or_default())
    }

    /// These bytes, before the payload of one packet.
    pub(super) fn of(bytes: &[u8]) -> Self {
        let mut header = Self { len: VNET_LEN + bytes.len(), ..Self::NONE };
        match header.bytes.get_mut(VNET_LEN..header.len) {
            Some(to) => to.copy_from_slice(bytes),
            None => return Self::NONE,
        }
        header
    }

    /// The first packet's own header.
    pub(super) fn first(&self) -> &[u8] {
        self.bytes.get(VNET_LEN..self.len).unwrap_or_default()
    }

    /// All of it.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// Makes it the header of `count` packets: lengths of the whole, the IP checksum, and the pseudo-header's sum where each
    /// segment's UDP checksum will stand.
    pub(super) fn finish(&mut self, shape: Shape, count: usize) {
        let udp_len = (UDP_LEN + shape.payload_len * count) as u16;
        let udp = shape.header_len() - UDP_LEN;
        let packet = &mut self.bytes[VNET_LEN..];
        let mut put = |at: usize, value: u16| {
            if let Some(to) = packet.get_mut(at..at + 2) {
                to.copy_from_slice(&value.to_be_bytes());
            }
        };
        put(udp + 4, udp_len);
        if shape.is_ipv4 {
            put(16, udp_len + 20);
            put(24, 0);
        } else {
            put(18, udp_len);
        }
        if shape.is_ipv4 {
            let sum = packet.get(14..34).map_or(0, checksum);
            packet[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        let (src, dst) = addresses(shape, packet);
        let partial = fold(pseudo_header(&src, &dst, udp_len));
        packet[udp + 6..udp + 8].copy_from_slice(&partial.to_be_bytes());
        self.write_vnet(shape);
    }

    /// struct virtio_net_hdr, in the machine's byte order as AF_PACKET wants it.
    fn write_vnet(&mut self, shape: Shape) {
        let words = [shape.header_len() as u16, shape.payload_len as u16, (shape.header_len() - UDP_LEN) as u16, 6];
        self.bytes[0] = NEEDS_CSUM;
        self.bytes[1] = GSO_UDP_L4;
        for (to, word) in self.bytes[2..VNET_LEN].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
    }
}

fn addresses(shape: Shape, packet: &[u8]) -> ([u8; 16], [u8; 16]) {
    let (mut src, mut dst) = ([0; 16], [0; 16]);
    let (at, len) = if shape.is_ipv4 { (26, 4) } else { (22, 16) };
    if let (Some(from), Some(to)) = (packet.get(at..at + len), packet.get(at + len..at + 2 * len)) {
        src[..len].copy_from_slice(from);
        dst[..len].copy_from_slice(to);
    }
    (src, dst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::checksum::verifies;

    fn ipv4(id: u16, flags: u8, payload: usize) -> Vec<u8> {
        let mut bytes = vec![1, 0, 0x5e, 1, 2, 3, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
        bytes.extend((28 + payload as u16).to_be_bytes());
        bytes.extend(id.to_be_bytes());
        bytes.extend([flags, 0, 9, 17, 0, 0, 10, 0, 0, 1, 239, 1, 2, 3, 0x13, 0x88, 0x13, 0x89]);
        bytes.extend((8 + payload as u16).to_be_bytes());
        bytes.extend([0x12, 0x34]);
        bytes.resize(42 + payload, 7);
        bytes
    }

    fn ipv6(payload: usize) -> Vec<u8> {
        let mut bytes = vec![0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0];
        bytes.extend((8 + payload as u16).to_be_bytes());
        bytes.extend([17, 9]);
        bytes.extend([0xfe; 16]);
        bytes.extend([0xff; 16]);
        bytes.extend([0x13, 0x88, 0x13, 0x89]);
        bytes.extend((8 + payload as u16).to_be_bytes());
        bytes.extend([0x12, 0x34]);
        bytes.resize(62 + payload, 7);
        bytes
    }

    fn joins(first: &[u8], count: usize, packet: &[u8]) -> bool {
        let (Some(one), Some(two)) = (Shape::of(first), Shape::of(packet)) else { return false };
        one == two && two.continues(Header::begin(one, first).first(), count, packet)
    }

    #[test]
    fn a_run_is_one_flow_of_one_size() {
        let first = ipv4(5, 0x40, 64);
        assert!(joins(&first, 1, &ipv4(5, 0x40, 64)) && joins(&first, 1, &ipv4(9, 0x40, 64)), "atomic: any identification");
        assert!(joins(&ipv4(5, 0, 64), 2, &ipv4(7, 0, 64)) && !joins(&ipv4(5, 0, 64), 2, &ipv4(5, 0, 64)), "others count up");
        assert!(joins(&ipv4(u16::MAX, 0, 64), 1, &ipv4(0, 0, 64)));
        assert!(!joins(&first, 1, &ipv4(5, 0x40, 65)) && !joins(&first, MAX_SEGMENTS, &first));
        assert!(joins(&ipv4(5, 0x40, 1472), 43, &ipv4(5, 0x40, 1472)) && !joins(&ipv4(5, 0x40, 1472), 44, &ipv4(5, 0x40, 1472)));
        for at in [0, 6, 15, 22, 26, 30, 34, 36] {
            let mut other = first.clone();
            other[at] ^= 1;
            assert!(!joins(&first, 1, &other), "byte {at}");
        }
        for at in [24, 25, 40, 41, 42] {
            let mut other = first.clone();
            other[at] ^= 1;
            assert!(joins(&first, 1, &other), "byte {at} is made anew");
        }
        assert!(joins(&ipv6(64), 1, &ipv6(64)) && !joins(&ipv6(64), 1, &first));
    }

    #[test]
    fn what_segmentation_would_change_goes_alone() {
        let alone = |change: fn(&mut Vec<u8>)| {
            let mut packet = ipv4(5, 0x40, 64);
            change(&mut packet);
            Shape::of(&packet).is_none()
        };
        assert!(Shape::of(&ipv4(5, 0x40, 64)).is_some() && Shape::of(&ipv6(64)).is_some());
        assert!(
            alone(|p| p[12] = 0x81) && alone(|p| p[14] = 0x46) && alone(|p| p[20] = 0x20) && alone(|p| p[21] = 1) && alone(|p| p[23] = 6)
        );
        assert!(alone(|p| p[40..42].fill(0)), "no checksum");
        assert!(alone(|p| p.truncate(105)) && alone(|p| p.truncate(30)) && alone(|p| p[39] = 8), "lengths");
        assert!(!alone(|p| p.resize(200, 0)), "padding behind the packet is not part of it");
        assert!(Shape::of(&ipv4(5, 0x40, 0)).is_none(), "nothing to segment");
    }

    #[test]
    fn the_header_of_a_run_says_the_whole_and_its_checksum_is_right() {
        for (packet, header_len) in [(ipv4(5, 0x40, 100), 42), (ipv6(100), 62)] {
            let shape = Shape::of(&packet).unwrap();
            let mut header = Header::begin(shape, &packet);
            assert_eq!(header.first(), &packet[..header_len]);
            header.finish(shape, 3);
            let (vnet, bytes) = header.bytes().split_at(VNET_LEN);
            assert_eq!(vnet[..2], [1, 5]);
            let words: Vec<u16> = vnet[2..].chunks(2).map(|pair| u16::from_ne_bytes([pair[0], pair[1]])).collect();
            assert_eq!(words, [header_len as u16, 100, header_len as u16 - 8, 6]);
            assert_eq!(word(bytes, header_len - 4), 308);
            if header_len == 42 {
                assert!(verifies(&bytes[14..34]) && word(bytes, 16) == 328);
            } else {
                assert_eq!(word(bytes, 18), 308);
            }
            let (src, dst) = addresses(shape, bytes);
            assert_eq!(word(bytes, header_len - 2), fold(pseudo_header(&src, &dst, 308)));
        }
    }
}
