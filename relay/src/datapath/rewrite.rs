//! What happens to a packet's bytes: [`inspect`] once per packet, [`rewrite`] once per output.
//!
//! Must never allocate, panic, make a system call or emit a checksum it has not verified or computed. A rewrite that
//! fails has written nothing.

use super::edit::{Edit, SET_DPORT, SET_DSCP, SET_DST, SET_DST_MAC, SET_SPORT, SET_SRC, TTL_KEEP, TTL_SET, VLAN_NONE, VLAN_SET};
use super::fate::{DropReason, OutputDropReason};
use crate::wire::checksum::{Delta, Sum, fold, pseudo_header, udp_sent, verifies};
use crate::wire::mac;
use crate::wire::parse::{ETHERNET_LEN, Headers, TAG_LEN, UDP_LEN};

/// What [`inspect`] found out: the part of a packet's checksums that is the same for all outputs.
/// One word, which stays in a register: as separate fields it was written in parts and read as a whole before they had left the
/// store buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked(u32);

/// Bits of a [`Checked`] above the checksum.
const HAS_CHECKSUM: u32 = 1 << 16;
const FINISHED: u32 = 1 << 17;

impl Checked {
    /// The sender sent no checksum (IPv4 only), and neither do we.
    pub const NONE: Self = Self(0);

    /// The right UDP checksum of the packet as it came; `finished`: by [`inspect`].
    #[inline]
    const fn right(checksum: u16, finished: bool) -> Self {
        Self(HAS_CHECKSUM | checksum as u32 | if finished { FINISHED } else { 0 })
    }

    /// The right UDP checksum of the packet as it came; `None`: it has none.
    #[inline]
    pub const fn udp_checksum(self) -> Option<u16> {
        if self.0 & HAS_CHECKSUM != 0 { Some(self.0 as u16) } else { None }
    }

    /// The packet came with the pseudo-header sum only (CHECKSUM_PARTIAL), and [`inspect`] finished it.
    #[inline]
    pub const fn finished(self) -> bool {
        self.0 & FINISHED != 0
    }
}

/// Verifies source and checksums of a packet. `fragments`: all its pieces in order, the first as it was parsed.
#[inline]
pub fn inspect(headers: &Headers, fragments: &[&[u8]]) -> Result<Checked, DropReason> {
    let first = fragments.first().ok_or(DropReason::Malformed)?;
    if headers.family == 4 {
        let header = first.get(usize::from(headers.l3_offset)..usize::from(headers.l4_offset)).ok_or(DropReason::Malformed)?;
        if !verifies(header) {
            return Err(DropReason::BadIpChecksum);
        }
    }
    if source_is_multicast(headers) {
        return Err(DropReason::MulticastSource);
    }
    match (headers.udp_checksum, headers.family) {
        (0, 4) => Ok(Checked::NONE),
        (0, _) => Err(DropReason::BadUdpChecksum),
        (found, _) => check_udp(headers, fragments, found),
    }
}

/// A group or the limited broadcast address as source.
#[inline]
const fn source_is_multicast(headers: &Headers) -> bool {
    match headers.family {
        4 => headers.src[0] & 0xf0 == 0xe0 || matches!(headers.src, [255, 255, 255, 255, ..]),
        _ => headers.src[0] == 0xff,
    }
}

/// Computes the checksum once: it is either the one found, or the one to be sent in place of the pseudo-header sum.
#[inline]
fn check_udp(headers: &Headers, fragments: &[&[u8]], found: u16) -> Result<Checked, DropReason> {
    let pseudo = pseudo_header(&headers.src, &headers.dst, headers.udp_len);
    // `found` is part of the bytes: taking it out again is adding its complement.
    let mut sum = Sum::starting_with(pseudo + u64::from(!found));
    add_udp(&mut sum, headers, fragments).ok_or(DropReason::Malformed)?;
    let right = udp_sent(!sum.folded());
    match found {
        found if found == right => Ok(Checked::right(right, false)),
        found if found == fold(pseudo) => Ok(Checked::right(right, true)),
        _ => Err(DropReason::BadUdpChecksum),
    }
}

/// Adds exactly the UDP length's bytes, without Ethernet padding; `None` if there are fewer.
#[inline]
fn add_udp(sum: &mut Sum, headers: &Headers, fragments: &[&[u8]]) -> Option<()> {
    let (first, more) = fragments.split_first()?;
    let mut left = usize::from(headers.udp_len);
    let mut piece = first.get(usize::from(headers.l4_offset)..)?;
    let mut more = more.iter();
    while left > piece.len() {
        sum.add(piece);
        left -= piece.len();
        piece = more.next()?;
    }
    sum.add(piece.get(..left)?);
    Some(())
}

/// Applies `edit` to the packet whose first piece is `frame[offset..offset + len]`, and moves `offset` and `len` along
/// where tags come or go. `frame` is the whole frame, headroom included; other pieces need no change. The bytes from the
/// Ethernet header to the UDP header must be as they were parsed. On an error nothing has been written.
#[inline]
pub fn rewrite(
    frame: &mut [u8],
    offset: &mut u32,
    len: &mut u32,
    headers: &Headers,
    checked: Checked,
    edit: &Edit,
) -> Result<(), OutputDropReason> {
    let ttl = admits(headers, edit)?;
    let l3 = *offset as usize + usize::from(headers.l3_offset);
    let link_len = ETHERNET_LEN + TAG_LEN * new_tags(headers, edit);
    let start = l3.checked_sub(link_len).ok_or(OutputDropReason::NoHeadroom)?;
    let piece = frame.get_mut(start..*offset as usize + *len as usize).ok_or(OutputDropReason::NoHeadroom)?;
    let new_len = piece.len() as u32;
    let new = New::of(headers, edit, ttl);
    let written = match headers.family {
        4 => Views::<20>::split(piece, link_len, headers).map(|views| write_ipv4(views, headers, checked, edit, &new)),
        _ => Views::<40>::split(piece, link_len, headers).map(|views| write_ipv6(views, headers, checked, edit, &new)),
    };
    written.ok_or(OutputDropReason::NoHeadroom)?;
    (*offset, *len) = (start as u32, new_len);
    Ok(())
}

/// Whether an output takes the packet at all: its new TTL, or why not.
#[inline]
pub const fn admits(headers: &Headers, edit: &Edit) -> Result<u8, OutputDropReason> {
    match new_ttl(headers.ttl, edit) {
        Ok(_) if edit.mtu != 0 && headers.l3_len > edit.mtu => Err(OutputDropReason::MtuExceeded),
        ttl => ttl,
    }
}

#[inline]
const fn new_ttl(ttl: u8, edit: &Edit) -> Result<u8, OutputDropReason> {
    let new = match edit.ttl_mode {
        TTL_SET => edit.ttl,
        TTL_KEEP => ttl,
        _ => ttl.saturating_sub(1),
    };
    if new == 0 { Err(OutputDropReason::TtlExpired) } else { Ok(new) }
}

#[inline]
const fn new_tags(headers: &Headers, edit: &Edit) -> usize {
    match edit.vlan_mode {
        VLAN_NONE => 0,
        VLAN_SET => 1,
        _ => headers.tag_count as usize,
    }
}

/// The values after the edit, whether changed or not.
struct New {
    src: [u8; 16],
    dst: [u8; 16],
    sport: u16,
    dport: u16,
    traffic_class: u8,
    ttl: u8,
}

impl New {
    #[inline]
    fn of(headers: &Headers, edit: &Edit, ttl: u8) -> Self {
        let set = |flag: u16| edit.flags & flag != 0;
        Self {
            src: if set(SET_SRC) { edit.src } else { headers.src },
            dst: if set(SET_DST) { edit.dst } else { headers.dst },
            sport: if set(SET_SPORT) { edit.sport } else { headers.sport },
            dport: if set(SET_DPORT) { edit.dport } else { headers.dport },
            traffic_class: if set(SET_DSCP) { edit.dscp << 2 | headers.traffic_class & 3 } else { headers.traffic_class },
            ttl,
        }
    }

    /// What changes in the UDP checksum by the ports.
    #[inline]
    fn ports(&self, headers: &Headers) -> Delta {
        let mut delta = Delta::default();
        delta.word(headers.sport, self.sport);
        delta.word(headers.dport, self.dport);
        delta
    }

    /// What changes in the checksums of IPv6: addresses and ports in that of UDP.
    #[inline]
    fn deltas6(&self, headers: &Headers) -> Deltas {
        let mut udp = self.ports(headers);
        add_address(&mut udp, &headers.src, &self.src);
        add_address(&mut udp, &headers.dst, &self.dst);
        Deltas { ip: Delta::default(), udp }
    }

    /// The same of IPv4, and addresses, traffic class and TTL in its own.
    #[inline]
    fn deltas4(&self, headers: &Headers) -> Deltas {
        let mut addresses = Delta::default();
        addresses.long(low32(&headers.src), low32(&self.src));
        addresses.long(low32(&headers.dst), low32(&self.dst));
        let mut ip = addresses;
        ip.word(u16::from(headers.traffic_class), u16::from(self.traffic_class));
        ip.word(u16::from(headers.ttl) << 8, u16::from(self.ttl) << 8);
        Deltas { ip, udp: addresses.and(self.ports(headers)) }
    }
}

/// The parts of a packet that an edit writes, all of them there before the first byte is written. `IP` is the length of
/// the fixed IP header.
struct Views<'a, const IP: usize> {
    macs: &'a mut [u8; 12],
    /// The last tag and the EtherType behind it; present where the new packet has a tag or more.
    tag: Option<&'a mut [u8; 6]>,
    ip: &'a mut [u8; IP],
    udp: &'a mut [u8; UDP_LEN],
}

impl<'a, const IP: usize> Views<'a, IP> {
    #[inline]
    fn split(piece: &'a mut [u8], link_len: usize, headers: &Headers) -> Option<Self> {
        let (link, l3) = piece.split_at_mut_checked(link_len)?;
        let (macs, link) = link.split_first_chunk_mut::<12>()?;
        let (ip, l4) = l3.split_at_mut_checked(usize::from(headers.ip_header_len))?;
        Some(Self { macs, tag: link.last_chunk_mut::<6>(), ip: ip.first_chunk_mut::<IP>()?, udp: l4.first_chunk_mut::<UDP_LEN>()? })
    }
}

/// What an edit does to a flow's checksums: the same for all its packets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Deltas {
    ip: Delta,
    udp: Delta,
}

impl Deltas {
    /// Of a packet whose new TTL is `ttl` ([`admits`]).
    #[inline]
    pub fn of(headers: &Headers, edit: &Edit, ttl: u8) -> Self {
        let new = New::of(headers, edit, ttl);
        if headers.family == 4 { new.deltas4(headers) } else { new.deltas6(headers) }
    }
}

/// Makes a header that [`rewrite`] wrote for a packet that of the next one, which differs in nothing but identification and
/// checksums. Both are `original.len()` bytes: untagged, without options, up to the payload.
#[inline]
pub fn renew(header: &mut [u8], original: &[u8], checked: Checked, deltas: &Deltas) {
    let udp = checked.udp_checksum().map_or(0, |sum| udp_sent(deltas.udp.apply(sum)));
    if let (Some(ip), Some(from)) = (header.get_mut(18..26), original.get(18..26).filter(|_| original.len() == 42)) {
        let sum = deltas.ip.apply(u16::from_be_bytes([from[6], from[7]])).to_be_bytes();
        [ip[0], ip[1], ip[6], ip[7]] = [from[0], from[1], sum[0], sum[1]];
    }
    if let Some(to) = header.last_chunk_mut::<2>() {
        *to = udp.to_be_bytes();
    }
}

#[inline]
fn write_ipv4(views: Views<'_, 20>, headers: &Headers, checked: Checked, edit: &Edit, new: &New) {
    write_link(views.macs, views.tag, edit, mac::group(4, &new.dst), [0x08, 0x00]);
    let ip = views.ip;
    let deltas = new.deltas4(headers);
    let sum = deltas.ip.apply(u16::from_be_bytes([ip[10], ip[11]])).to_be_bytes();
    ip[1] = new.traffic_class;
    ip[8] = new.ttl;
    [ip[10], ip[11]] = sum;
    [ip[12], ip[13], ip[14], ip[15]] = low32(&new.src).to_be_bytes();
    [ip[16], ip[17], ip[18], ip[19]] = low32(&new.dst).to_be_bytes();
    write_udp(views.udp, checked, new, deltas.udp);
}

#[inline]
fn write_ipv6(views: Views<'_, 40>, headers: &Headers, checked: Checked, edit: &Edit, new: &New) {
    write_link(views.macs, views.tag, edit, mac::group(6, &new.dst), [0x86, 0xdd]);
    let udp = new.deltas6(headers).udp;
    let ip = views.ip;
    ip[0] = 0x60 | new.traffic_class >> 4;
    ip[1] = new.traffic_class << 4 | ip[1] & 0x0f;
    ip[7] = new.ttl;
    if let Some(addresses) = ip.last_chunk_mut::<32>() {
        let (src, dst) = addresses.split_at_mut(16);
        src.copy_from_slice(&new.src);
        dst.copy_from_slice(&new.dst);
    }
    write_udp(views.udp, checked, new, udp);
}

/// MAC addresses always, that of the group unless the edit sets one; the tag (802.1Q, priority 0) where the edit sets one. The
/// EtherType before the IP header stays.
#[inline]
fn write_link(macs: &mut [u8; 12], tag: Option<&mut [u8; 6]>, edit: &Edit, group: mac::Mac, ethertype: [u8; 2]) {
    let (d, s) = (if edit.flags & SET_DST_MAC != 0 { edit.dst_mac } else { group }, edit.src_mac);
    *macs = [d[0], d[1], d[2], d[3], d[4], d[5], s[0], s[1], s[2], s[3], s[4], s[5]];
    if let (VLAN_SET, Some(tag)) = (edit.vlan_mode, tag) {
        let id = (edit.vlan & 0x0fff).to_be_bytes();
        *tag = [0x81, 0x00, id[0], id[1], ethertype[0], ethertype[1]];
    }
}

#[inline]
fn write_udp(udp: &mut [u8; UDP_LEN], checked: Checked, new: &New, delta: Delta) {
    let sum = checked.udp_checksum().map_or(0, |sum| udp_sent(delta.apply(sum)));
    [udp[0], udp[1]] = new.sport.to_be_bytes();
    [udp[2], udp[3]] = new.dport.to_be_bytes();
    [udp[6], udp[7]] = sum.to_be_bytes();
}

/// An IPv4 address of a 16-byte field.
#[inline]
const fn low32(addr: &[u8; 16]) -> u32 {
    u32::from_be_bytes([addr[0], addr[1], addr[2], addr[3]])
}

#[inline]
fn add_address(delta: &mut Delta, old: &[u8; 16], new: &[u8; 16]) {
    for (old, new) in old.as_chunks::<4>().0.iter().zip(new.as_chunks::<4>().0) {
        delta.long(u32::from_be_bytes(*old), u32::from_be_bytes(*new));
    }
}

#[cfg(test)]
mod tests;
