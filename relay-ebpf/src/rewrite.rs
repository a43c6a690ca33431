//! An output's edit applied to a packet in the driver: the same bytes as `relay::datapath::rewrite` writes.
//!
//! The packet's checksums are right when this begins, and right when it ends. Must never hold a map or count.
#![expect(unsafe_code, reason = "packet memory is written by address, and every access is compared with the packet's end")]

use crate::packet::{self, Packet};
use crate::sum::{fold, udp_sent};
use aya_ebpf::programs::XdpContext;
use relay_common::edit::{Edit, SET_DPORT, SET_DSCP, SET_DST, SET_DST_MAC, SET_SPORT, SET_SRC, TTL_KEEP, TTL_SET, VLAN_KEEP, VLAN_NONE};

/// Ethernet header; a tag.
pub const LINK_LEN: usize = 14;
const TAG_LEN: usize = 4;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;

/// Rewrites a packet with `L3 - 14` bytes of tags. False: the packet is not what it was said to be, or has no room for a tag.
#[inline(always)]
pub fn rewrite<const L3: usize, const FAMILY: u8>(ctx: &XdpContext, edit: &Edit) -> bool {
    let group = if FAMILY == 4 { ipv4::<L3>(ctx, edit) } else { ipv6::<L3>(ctx, edit) };
    match group {
        Some(group_mac) => link::<L3>(ctx, edit, if edit.flags & SET_DST_MAC != 0 { edit.dst_mac } else { group_mac }),
        None => false,
    }
}

#[inline(always)]
fn set(edit: &Edit, flag: u16) -> bool {
    edit.flags & flag != 0
}

/// The caller has looked at the TTL before: it does not become 0.
#[inline(always)]
fn new_ttl(old: u8, edit: &Edit) -> u8 {
    match edit.ttl_mode {
        TTL_SET => edit.ttl,
        TTL_KEEP => old,
        _ => old.wrapping_sub(1),
    }
}

#[inline(always)]
fn traffic_class(old: u8, edit: &Edit) -> u8 {
    if set(edit, SET_DSCP) { edit.dscp << 2 | old & 3 } else { old }
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// What a word's change adds to a sum (RFC 1624 eqn. 3).
#[inline(always)]
fn change(old: u32, new: u32) -> u64 {
    u64::from(!old) + u64::from(new)
}

/// Writes the IPv4 and UDP headers; the MAC of the packet's new group.
#[inline(always)]
fn ipv4<const L3: usize>(ctx: &XdpContext, edit: &Edit) -> Option<[u8; 6]> {
    let packet = Packet::new(ctx);
    let place = packet.place::<IPV4_LEN>(L3)?;
    // SAFETY: `place` is 20 bytes within the packet.
    let mut ip = unsafe { *place };
    let (src, dst) = (word(&ip, 12), word(&ip, 16));
    let new_src = if set(edit, SET_SRC) { word(&edit.src, 0) } else { src };
    let new_dst = if set(edit, SET_DST) { word(&edit.dst, 0) } else { dst };
    let addresses = change(src, new_src) + change(dst, new_dst);
    let before = (word(&ip, 0), word(&ip, 8) & u32::from_ne_bytes([0xff, 0xff, 0, 0]));
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    ip[1] = traffic_class(ip[1], edit);
    ip[8] = new_ttl(ip[8], edit);
    let after = (word(&ip, 0), word(&ip, 8) & u32::from_ne_bytes([0xff, 0xff, 0, 0]));
    let old = u16::from_ne_bytes([ip[10], ip[11]]);
    let sum = !fold(u64::from(!old) + addresses + change(before.0, after.0) + change(before.1, after.1));
    [ip[10], ip[11]] = sum.to_ne_bytes();
    [ip[12], ip[13], ip[14], ip[15]] = new_src.to_ne_bytes();
    let [a, b, c, d] = new_dst.to_ne_bytes();
    [ip[16], ip[17], ip[18], ip[19]] = [a, b, c, d];
    // SAFETY: as above; nothing has moved the packet.
    unsafe { *place = ip };
    if header_len == IPV4_LEN {
        let place = packet.place::<8>(L3 + IPV4_LEN)?;
        // SAFETY: `place` is 8 bytes within the packet.
        unsafe { *place = udp(*place, edit, addresses, true) };
    } else {
        let at = (L3 + header_len) as u32;
        let old = packet.bytes_at::<8>(at)?;
        packet::store::<8>(ctx, at, &udp(old, edit, addresses, true), 8).then_some(())?;
    }
    Some([0x01, 0x00, 0x5e, b & 0x7f, c, d])
}

/// Writes the IPv6 and UDP headers; the MAC of the packet's new group.
#[inline(always)]
fn ipv6<const L3: usize>(ctx: &XdpContext, edit: &Edit) -> Option<[u8; 6]> {
    let packet = Packet::new(ctx);
    let place = packet.place::<IPV6_LEN>(L3)?;
    // SAFETY: `place` is 40 bytes within the packet.
    let mut ip = unsafe { *place };
    let class = traffic_class(ip[0] << 4 | ip[1] >> 4, edit);
    ip[0] = 0x60 | class >> 4;
    ip[1] = class << 4 | ip[1] & 0x0f;
    ip[7] = new_ttl(ip[7], edit);
    let mut addresses = 0;
    for at in 0..4 {
        let (src, dst) = (word(&ip, 8 + at * 4), word(&ip, 24 + at * 4));
        let new_src = if set(edit, SET_SRC) { word(&edit.src, at * 4) } else { src };
        let new_dst = if set(edit, SET_DST) { word(&edit.dst, at * 4) } else { dst };
        addresses += change(src, new_src) + change(dst, new_dst);
        ip[8 + at * 4..12 + at * 4].copy_from_slice(&new_src.to_ne_bytes());
        ip[24 + at * 4..28 + at * 4].copy_from_slice(&new_dst.to_ne_bytes());
    }
    // SAFETY: as above; nothing has moved the packet.
    unsafe { *place = ip };
    let at = packet.place::<8>(L3 + IPV6_LEN)?;
    // SAFETY: `at` is 8 bytes within the packet.
    unsafe { *at = udp(*at, edit, addresses, false) };
    Some([0x33, 0x33, ip[36], ip[37], ip[38], ip[39]])
}

/// The UDP header with new ports and checksum. `optional`: a checksum of 0 means none, and stays (IPv4).
#[inline(always)]
fn udp(mut udp: [u8; 8], edit: &Edit, addresses: u64, optional: bool) -> [u8; 8] {
    let ports = word(&udp, 0);
    if set(edit, SET_SPORT) {
        [udp[0], udp[1]] = edit.sport.to_be_bytes();
    }
    if set(edit, SET_DPORT) {
        [udp[2], udp[3]] = edit.dport.to_be_bytes();
    }
    let old = u16::from_ne_bytes([udp[6], udp[7]]);
    if !optional || old != 0 {
        let sum = udp_sent(!fold(u64::from(!old) + addresses + change(ports, word(&udp, 0))));
        [udp[6], udp[7]] = sum.to_ne_bytes();
    }
    udp
}

/// MAC addresses always; tags as the edit says. The EtherType before the IP header stays where it is, so only the bytes in
/// front of it move.
#[inline(always)]
fn link<const L3: usize>(ctx: &XdpContext, edit: &Edit, dst_mac: [u8; 6]) -> bool {
    let tags = ((L3 - LINK_LEN) / TAG_LEN) as i32;
    let wanted = match edit.vlan_mode {
        VLAN_KEEP => tags,
        VLAN_NONE => 0,
        _ => 1,
    };
    if wanted != tags && !packet::move_head(ctx, (tags - wanted) * TAG_LEN as i32) {
        return false;
    }
    let packet = Packet::new(ctx);
    let Some(place) = packet.place::<12>(0) else { return false };
    let (d, s) = (dst_mac, edit.src_mac);
    // SAFETY: `place` is 12 bytes within the packet.
    unsafe { *place = [d[0], d[1], d[2], d[3], d[4], d[5], s[0], s[1], s[2], s[3], s[4], s[5]] };
    if edit.vlan_mode == VLAN_KEEP || edit.vlan_mode == VLAN_NONE {
        return true;
    }
    let Some(place) = packet.place::<4>(12) else { return false };
    let [high, low] = (edit.vlan & 0x0fff).to_be_bytes();
    // SAFETY: `place` is 4 bytes within the packet.
    unsafe { *place = [0x81, 0x00, high, low] };
    true
}
