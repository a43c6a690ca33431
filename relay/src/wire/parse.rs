//! Ethernet (up to two tags), IPv4 or IPv6, UDP: where the headers are and what they say, or why the packet is not ours.
//!
//! Takes the same decisions in the same order as the XDP program, so that one packet has the same verdict on all paths.
//! Must never look at the payload or at a checksum, and never panic whatever the bytes.

use relay_common::XdpCounter;

const TPID_8021Q: u16 = 0x8100;
const TPID_8021AD: u16 = 0x88a8;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Bytes of an Ethernet header without tags.
pub const ETHERNET_LEN: usize = 14;
/// Bytes of one VLAN tag.
pub const TAG_LEN: usize = 4;
/// Bytes of a UDP header.
pub const UDP_LEN: usize = 8;
/// Tags a packet may have.
pub const MAX_TAGS: u8 = 2;

/// Why a packet is no UDP packet a rule can take. XDP passes it under the counter of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParseVerdict {
    /// Neither IPv4 nor IPv6.
    NotIp,
    /// IGMP.
    Igmp,
    /// ICMP.
    Icmp,
    /// ICMPv6.
    Icmpv6,
    /// PIM.
    Pim,
    /// Another transport than UDP.
    NotUdp,
    /// A fragment, first or later.
    Fragment,
    /// IPv6 extension header before UDP.
    Extension,
    /// More than two VLAN tags.
    TagDepth,
    /// Shorter than its headers say, or lengths that contradict each other.
    Malformed,
}

impl ParseVerdict {
    /// The counter XDP uses for it.
    pub const fn counter(self) -> XdpCounter {
        match self {
            Self::NotIp => XdpCounter::PassNotIp,
            Self::Igmp => XdpCounter::PassIgmp,
            Self::Icmp => XdpCounter::PassIcmp,
            Self::Icmpv6 => XdpCounter::PassIcmpv6,
            Self::Pim => XdpCounter::PassPim,
            Self::NotUdp => XdpCounter::PassNotUdp,
            Self::Fragment => XdpCounter::PassFragment,
            Self::Extension => XdpCounter::PassExtension,
            Self::TagDepth => XdpCounter::PassTagDepth,
            Self::Malformed => XdpCounter::PassMalformed,
        }
    }
}

/// What the headers of a UDP packet say. Offsets count from the first byte of the Ethernet header. Numbers are in host
/// order, addresses in network order (IPv4 in the first 4 bytes, rest 0).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Headers {
    /// Source address.
    pub src: [u8; 16],
    /// Destination address.
    pub dst: [u8; 16],
    /// VLAN ids as in `MatchKey::tag`: `outer | inner << 16`; a lone priority tag is `TAG_NONE`.
    pub tag: u32,
    /// Length of the IP packet: total length, or 40 + payload length. What follows it is Ethernet padding.
    pub l3_len: u32,
    /// Where the IP header starts: 14, 18 or 22.
    pub l3_offset: u16,
    /// Where the UDP header starts.
    pub l4_offset: u16,
    /// UDP length, header included; at least 8, and within the IP packet.
    pub udp_len: u16,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// The UDP checksum field as it stands.
    pub udp_checksum: u16,
    /// 4 or 6.
    pub family: u8,
    /// Bytes of the IP header, options included.
    pub ip_header_len: u8,
    /// VLAN tags in the frame, priority tags included: 0–2.
    pub tag_count: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TOS or traffic class (DSCP in the upper six bits).
    pub traffic_class: u8,
}

/// Reads the headers. `first` is the first (linear) piece of the packet, `packet_len` the length of all pieces.
/// Every header must lie in `first`.
#[inline]
pub fn parse(first: &[u8], packet_len: usize) -> Result<Headers, ParseVerdict> {
    let mut headers = Headers::default();
    parse_into(first, packet_len, &mut headers)?;
    Ok(headers)
}

/// The same, where the headers are to stay: moved as a whole right after they were written one by one, they would be read before
/// they have left the store buffer. On an error `headers` says nothing.
#[inline]
pub fn parse_into(first: &[u8], packet_len: usize, headers: &mut Headers) -> Result<(), ParseVerdict> {
    let link = parse_link(first)?;
    let ip = first.get(link.l3_offset..).unwrap_or_default();
    let room = packet_len.saturating_sub(link.l3_offset);
    (headers.tag, headers.tag_count, headers.l3_offset) = (link.tag, link.tag_count, link.l3_offset as u16);
    match link.ethertype {
        ETHERTYPE_IPV4 => parse_ipv4(ip, room, headers)?,
        ETHERTYPE_IPV6 => parse_ipv6(ip, room, headers)?,
        _ => return Err(ParseVerdict::NotIp),
    }
    headers.l4_offset = headers.l3_offset + u16::from(headers.ip_header_len);
    Ok(())
}

struct Link {
    ethertype: u16,
    l3_offset: usize,
    tag: u32,
    tag_count: u8,
}

#[inline]
const fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, TPID_8021Q | TPID_8021AD)
}

#[inline]
fn parse_link(first: &[u8]) -> Result<Link, ParseVerdict> {
    let Some((ethernet, mut rest)) = first.split_first_chunk::<ETHERNET_LEN>() else { return Err(ParseVerdict::Malformed) };
    let mut link = Link { ethertype: be16([ethernet[12], ethernet[13]]), l3_offset: ETHERNET_LEN, tag: 0, tag_count: 0 };
    while is_tag(link.ethertype) {
        if link.tag_count == MAX_TAGS {
            return Err(ParseVerdict::TagDepth);
        }
        let Some((tag, behind)) = rest.split_first_chunk::<TAG_LEN>() else { return Err(ParseVerdict::Malformed) };
        link.tag |= u32::from(be16([tag[0], tag[1]]) & 0x0fff) << (16 * u32::from(link.tag_count));
        link.ethertype = be16([tag[2], tag[3]]);
        link.l3_offset += TAG_LEN;
        link.tag_count += 1;
        rest = behind;
    }
    Ok(link)
}

/// `ip`: from the IP header to the end of the linear piece; `room`: from there to the end of the packet.
#[inline]
fn parse_ipv4(ip: &[u8], room: usize, headers: &mut Headers) -> Result<(), ParseVerdict> {
    let header = ip.first_chunk::<20>().ok_or(ParseVerdict::Malformed)?;
    let header_len = usize::from(header[0] & 0x0f) * 4;
    let total_len = usize::from(be16([header[2], header[3]]));
    if header[0] >> 4 != 4 || header_len < 20 || header_len > ip.len() || total_len < header_len || total_len > room {
        return Err(ParseVerdict::Malformed);
    }
    match header[9] {
        17 => {}
        2 => return Err(ParseVerdict::Igmp),
        1 => return Err(ParseVerdict::Icmp),
        103 => return Err(ParseVerdict::Pim),
        _ => return Err(ParseVerdict::NotUdp),
    }
    // The "more fragments" bit and the 13 bits of the offset (RFC 791 §3.1).
    if be16([header[6], header[7]]) & 0x3fff != 0 {
        return Err(ParseVerdict::Fragment);
    }
    (headers.family, headers.ip_header_len, headers.l3_len) = (4, header_len as u8, total_len as u32);
    headers.traffic_class = header[1];
    headers.ttl = header[8];
    headers.src = ipv4_field([header[12], header[13], header[14], header[15]]);
    headers.dst = ipv4_field([header[16], header[17], header[18], header[19]]);
    parse_udp(ip.get(header_len..).unwrap_or_default(), total_len - header_len, headers)
}

#[inline]
fn parse_ipv6(ip: &[u8], room: usize, headers: &mut Headers) -> Result<(), ParseVerdict> {
    let (header, behind) = ip.split_first_chunk::<40>().ok_or(ParseVerdict::Malformed)?;
    let payload_len = usize::from(be16([header[4], header[5]]));
    if header[0] >> 4 != 6 || 40 + payload_len > room {
        return Err(ParseVerdict::Malformed);
    }
    match header[6] {
        17 => {}
        58 => return Err(ParseVerdict::Icmpv6),
        44 => return Err(ParseVerdict::Fragment),
        103 => return Err(ParseVerdict::Pim),
        0 | 43 | 60 | 51 | 135 | 139 | 140 => return Err(ParseVerdict::Extension),
        _ => return Err(ParseVerdict::NotUdp),
    }
    (headers.family, headers.ip_header_len, headers.l3_len) = (6, 40, 40 + payload_len as u32);
    headers.traffic_class = header[0] << 4 | header[1] >> 4;
    headers.ttl = header[7];
    headers.src.copy_from_slice(&header[8..24]);
    headers.dst.copy_from_slice(&header[24..40]);
    parse_udp(behind, payload_len, headers)
}

/// `room`: bytes of the IP packet behind the IP header.
#[inline]
fn parse_udp(udp: &[u8], room: usize, headers: &mut Headers) -> Result<(), ParseVerdict> {
    let Some(header) = udp.first_chunk::<UDP_LEN>() else { return Err(ParseVerdict::Malformed) };
    let udp_len = be16([header[4], header[5]]);
    if room < UDP_LEN || usize::from(udp_len) < UDP_LEN || usize::from(udp_len) > room {
        return Err(ParseVerdict::Malformed);
    }
    headers.sport = be16([header[0], header[1]]);
    headers.dport = be16([header[2], header[3]]);
    headers.udp_len = udp_len;
    headers.udp_checksum = be16([header[6], header[7]]);
    Ok(())
}

#[inline]
const fn be16(bytes: [u8; 2]) -> u16 {
    u16::from_be_bytes(bytes)
}

/// Four bytes in a 16-byte address field.
#[inline]
const fn ipv4_field([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
