//! From bytes to a [`Flow`], or to the counter that says why the packet is the kernel's.
//!
//! Guard clauses in packet order: Ethernet, tags, IP, UDP. Must never look at a map. `relay::wire` is the same
//! decision in user space; the two are compared packet by packet in the tests.

use crate::packet::Packet;
use relay_common::{
    TAG_NONE,
    XdpCounter::{self, *},
};

const ETHERNET_LEN: usize = 14;
const TAG_LEN: usize = 4;
const IPV4_LEN: u32 = 20;
const IPV6_LEN: u32 = 40;
const UDP_LEN: u32 = 8;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_TAG: u16 = 0x8100;
const ETHERTYPE_SERVICE_TAG: u16 = 0x88a8;

/// More fragments, and every bit of the offset: anything but an IPv4 packet in one piece.
const IPV4_FRAGMENT: u16 = 0x3fff;

/// What the rules are asked about. Addresses in network order, IPv4 in the first word, rest 0.
pub struct Flow {
    /// 4 or 6.
    pub family: u8,
    /// `outer | inner << 16` VLAN ids, or [`TAG_NONE`].
    pub tag: u32,
    /// Destination.
    pub dst: [u32; 4],
    /// Source.
    pub src: [u32; 4],
    /// UDP destination port, host order.
    pub port: u16,
}

/// Reads up to two tags and both headers. `len`: bytes of the whole packet.
#[inline(always)]
pub fn flow(packet: &Packet, len: u32) -> Result<Flow, XdpCounter> {
    let ethernet: [u8; ETHERNET_LEN] = packet.bytes(0).ok_or(PassMalformed)?;
    let ethertype = be16(ethernet[12], ethernet[13]);
    if !is_tag(ethertype) {
        return network::<ETHERNET_LEN>(packet, len, ethertype, TAG_NONE);
    }
    // A priority tag has VLAN id 0, which is TAG_NONE.
    let (outer, ethertype) = tag::<ETHERNET_LEN>(packet)?;
    if !is_tag(ethertype) {
        return network::<{ ETHERNET_LEN + TAG_LEN }>(packet, len, ethertype, outer);
    }
    let (inner, ethertype) = tag::<{ ETHERNET_LEN + TAG_LEN }>(packet)?;
    if is_tag(ethertype) {
        return Err(PassTagDepth);
    }
    network::<{ ETHERNET_LEN + 2 * TAG_LEN }>(packet, len, ethertype, outer | inner << 16)
}

#[inline(always)]
fn is_tag(ethertype: u16) -> bool {
    ethertype == ETHERTYPE_TAG || ethertype == ETHERTYPE_SERVICE_TAG
}

/// VLAN id and the ethertype behind the tag (IEEE 802.1Q: 3 bits priority, 1 bit DEI, 12 bits id).
#[inline(always)]
fn tag<const AT: usize>(packet: &Packet) -> Result<(u32, u16), XdpCounter> {
    let tag: [u8; TAG_LEN] = packet.bytes(AT).ok_or(PassMalformed)?;
    Ok((u32::from(be16(tag[0], tag[1]) & 0x0fff), be16(tag[2], tag[3])))
}

#[inline(always)]
fn network<const AT: usize>(packet: &Packet, len: u32, ethertype: u16, tag: u32) -> Result<Flow, XdpCounter> {
    match ethertype {
        ETHERTYPE_IPV4 => ipv4::<AT>(packet, len, tag),
        ETHERTYPE_IPV6 => ipv6::<AT>(packet, len, tag),
        _ => Err(PassNotIp),
    }
}

/// RFC 791. Options are stepped over.
#[inline(always)]
fn ipv4<const AT: usize>(packet: &Packet, len: u32, tag: u32) -> Result<Flow, XdpCounter> {
    let ip: [u8; IPV4_LEN as usize] = packet.bytes(AT).ok_or(PassMalformed)?;
    let header_len = u32::from(ip[0] & 0x0f) * 4;
    let total_len = u32::from(be16(ip[2], ip[3]));
    if ip[0] >> 4 != 4 || header_len < IPV4_LEN || total_len < header_len || AT as u32 + total_len > len {
        return Err(PassMalformed);
    }
    match ip[9] {
        17 => {}
        1 => return Err(PassIcmp),
        2 => return Err(PassIgmp),
        103 => return Err(PassPim),
        _ => return Err(PassNotUdp),
    }
    if be16(ip[6], ip[7]) & IPV4_FRAGMENT != 0 {
        return Err(PassFragment);
    }
    let room = total_len - header_len;
    let udp = if header_len == IPV4_LEN { packet.bytes(AT + IPV4_LEN as usize) } else { packet.bytes_at(AT as u32 + header_len) };
    let port = port(udp, room)?;
    Ok(Flow { family: 4, tag, dst: [word(&ip, 16), 0, 0, 0], src: [word(&ip, 12), 0, 0, 0], port })
}

/// RFC 8200. No extension header is stepped over.
#[inline(always)]
fn ipv6<const AT: usize>(packet: &Packet, len: u32, tag: u32) -> Result<Flow, XdpCounter> {
    let ip: [u8; IPV6_LEN as usize] = packet.bytes(AT).ok_or(PassMalformed)?;
    let payload_len = u32::from(be16(ip[4], ip[5]));
    if ip[0] >> 4 != 6 || AT as u32 + IPV6_LEN + payload_len > len {
        return Err(PassMalformed);
    }
    match ip[6] {
        17 => {}
        58 => return Err(PassIcmpv6),
        44 => return Err(PassFragment),
        103 => return Err(PassPim),
        // Hop-by-hop, routing, authentication, destination options, mobility, HIP, shim6.
        0 | 43 | 51 | 60 | 135 | 139 | 140 => return Err(PassExtension),
        _ => return Err(PassNotUdp),
    }
    let port = port(packet.bytes(AT + IPV6_LEN as usize), payload_len)?;
    let dst = [word(&ip, 24), word(&ip, 28), word(&ip, 32), word(&ip, 36)];
    let src = [word(&ip, 8), word(&ip, 12), word(&ip, 16), word(&ip, 20)];
    Ok(Flow { family: 6, tag, dst, src, port })
}

/// RFC 768: the destination port of a datagram that has `room` bytes in its IP packet. A room smaller than the header
/// needs no guard of its own: no length is both 8 at least and within it.
#[inline(always)]
fn port(udp: Option<[u8; UDP_LEN as usize]>, room: u32) -> Result<u16, XdpCounter> {
    let udp = udp.ok_or(PassMalformed)?;
    let udp_len = u32::from(be16(udp[4], udp[5]));
    if udp_len < UDP_LEN || udp_len > room {
        return Err(PassMalformed);
    }
    Ok(be16(udp[2], udp[3]))
}

#[inline(always)]
fn be16(high: u8, low: u8) -> u16 {
    u16::from_be_bytes([high, low])
}

/// Four bytes as they stand.
#[inline(always)]
fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
