//! An ear on an interface: what arrives there and XDP leaves to the kernel, for a bounded time.
//!
//! What a running relay's XDP program redirects is not heard (nor does tcpdump see it); what it passes is, which is just what
//! `why` asks for. Must never join a group or set promiscuous mode: it hears what the host hears.

use crate::nic::afpacket::socket::open_listen;
use crate::wire::parse::{ETHERNET_LEN, Headers, ParseVerdict, TAG_LEN, parse};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// Bytes looked at of each packet: headers and a little more.
const SNAP: usize = 2048;
/// A listener goes after so many packets, however early.
const MAX_PACKETS: u64 = 200_000;
/// The longest silence between two looks at the clock.
const PATIENCE: i64 = 50;
/// `TP_STATUS_VLAN_VALID` and `TP_STATUS_VLAN_TPID_VALID` (linux/if_packet.h).
const VLAN_VALID: u32 = 1 << 4;
const TPID_VALID: u32 = 1 << 6;

/// Hands every packet (its first 2048 bytes, tags put back) and its whole length to `each` until that says stop, `limit` is over
/// or 200,000 packets were seen.
pub fn listen(ifindex: u32, limit: Duration, mut each: impl FnMut(&[u8], usize) -> bool) -> Result<(), String> {
    let socket = open_listen(ifindex).map_err(|error| error.to_string())?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(PATIENCE)).map_err(|errno| format!("SO_RCVTIMEO: {errno}"))?;
    let until = Instant::now() + limit;
    let mut buffer = vec![0u8; SNAP + TAG_LEN];
    let mut seen = 0;
    while Instant::now() < until && seen < MAX_PACKETS {
        let mut control = nix::cmsg_space!([u32; 5]);
        let body = buffer.get_mut(TAG_LEN..).unwrap_or_default();
        let mut pieces = [IoSliceMut::new(body)];
        let (len, tag) = match recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut control), MsgFlags::MSG_TRUNC) {
            Ok(message) => (message.bytes, message.cmsgs().ok().and_then(|mut all| all.find_map(|one| stripped_tag(&one)))),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => continue,
            Err(nix::Error::ENETDOWN) => return Err("the interface went down while listening".into()),
            Err(errno) => return Err(format!("recvmsg: {errno}")),
        };
        seen += 1;
        let kept = len.min(SNAP);
        let packet = put_back(&mut buffer, kept, tag);
        if !each(packet, len + tag.map_or(0, |_| TAG_LEN)) {
            break;
        }
    }
    Ok(())
}

/// Protocol and id of a tag that the kernel took off (`struct tpacket_auxdata`: status, lengths, offsets, tci at 16, tpid at 18).
fn stripped_tag(message: &ControlMessageOwned) -> Option<[u8; TAG_LEN]> {
    let ControlMessageOwned::Unknown(unknown) = message else { return None };
    let bytes = unknown.data_bytes.first_chunk::<20>()?;
    let status = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let tci = u16::from_ne_bytes([bytes[16], bytes[17]]).to_be_bytes();
    let tpid = if status & TPID_VALID != 0 { u16::from_ne_bytes([bytes[18], bytes[19]]) } else { 0x8100 }.to_be_bytes();
    (status & VLAN_VALID != 0).then_some([tpid[0], tpid[1], tci[0], tci[1]])
}

/// The packet stands behind 4 free bytes; a tag goes behind its addresses, which move to the front.
fn put_back(buffer: &mut [u8], len: usize, tag: Option<[u8; TAG_LEN]>) -> &[u8] {
    let Some(tag) = tag else { return buffer.get(TAG_LEN..TAG_LEN + len).unwrap_or_default() };
    let addresses = ETHERNET_LEN - 2;
    if len < addresses {
        return &[];
    }
    buffer.copy_within(TAG_LEN..TAG_LEN + addresses, 0);
    if let Some(place) = buffer.get_mut(addresses..addresses + TAG_LEN) {
        place.copy_from_slice(&tag);
    }
    buffer.get(..TAG_LEN + len).unwrap_or_default()
}

/// What an interface was heard to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Who sends IGMP queries.
    pub igmp_querier: Option<Ipv4Addr>,
    /// Who sends MLD queries.
    pub mld_querier: Option<Ipv6Addr>,
    /// Multicast UDP packets.
    pub udp: u64,
    /// Lowest TTL or hop limit of each group beyond the link-local ones.
    pub ttl: BTreeMap<IpAddr, u8>,
}

/// Listens for a while and sums up.
pub fn heard(ifindex: u32, limit: Duration) -> Result<Heard, String> {
    let mut heard = Heard::default();
    listen(ifindex, limit, |packet, len| {
        heard.take(packet, len);
        true
    })?;
    Ok(heard)
}

impl Heard {
    pub(super) fn take(&mut self, packet: &[u8], len: usize) {
        match parse(packet, len) {
            Ok(headers) => {
                let (_, group) = addresses(&headers);
                if group.is_multicast() && !is_link_local(group) {
                    self.udp += 1;
                    let ttl = self.ttl.entry(group).or_insert(headers.ttl);
                    *ttl = headers.ttl.min(*ttl);
                }
            }
            Err(ParseVerdict::Igmp) => self.igmp_querier = igmp_querier(packet).or(self.igmp_querier),
            Err(ParseVerdict::Icmpv6 | ParseVerdict::Extension) => self.mld_querier = mld_querier(packet).or(self.mld_querier),
            Err(_) => {}
        }
    }
}

/// Source and destination.
pub(super) fn addresses(headers: &Headers) -> (IpAddr, IpAddr) {
    let address = |bytes: &[u8; 16]| match (headers.family, bytes.first_chunk::<4>()) {
        (4, Some(v4)) => IpAddr::V4(Ipv4Addr::from(*v4)),
        _ => IpAddr::V6(Ipv6Addr::from(*bytes)),
    };
    (address(&headers.src), address(&headers.dst))
}

/// 224.0.0.0/24 and ff02::/16: never routed, TTL 1 is right there.
fn is_link_local(group: IpAddr) -> bool {
    match group {
        IpAddr::V4(v4) => matches!(v4.octets(), [224, 0, 0, _]),
        IpAddr::V6(v6) => v6.segments().first().is_some_and(|first| first & 0xff0f == 0xff02),
    }
}

/// Where the IP header starts, past up to two tags.
fn ip_header(packet: &[u8]) -> Option<&[u8]> {
    let tags = (0..2).take_while(|n| matches!(packet.get(12 + 4 * n..14 + 4 * n), Some([0x81, 0x00] | [0x88, 0xa8]))).count();
    packet.get(ETHERNET_LEN + TAG_LEN * tags..)
}

/// The sender of a membership query (type 0x11, RFC 3376 §4.1).
fn igmp_querier(packet: &[u8]) -> Option<Ipv4Addr> {
    let ip = ip_header(packet)?;
    let header_len = usize::from(ip.first()? & 0x0f) * 4;
    let source: [u8; 4] = ip.get(12..16)?.try_into().ok()?;
    (ip.get(header_len) == Some(&0x11)).then_some(source.into())
}

/// The sender of a multicast listener query (type 130 behind a hop-by-hop header, RFC 3810 §5.1).
fn mld_querier(packet: &[u8]) -> Option<Ipv6Addr> {
    let ip = ip_header(packet)?;
    let source: [u8; 16] = ip.get(8..24)?.try_into().ok()?;
    let icmp = match ip.get(6)? {
        0 if ip.get(40) == Some(&58) => 40 + 8 * (1 + usize::from(*ip.get(41)?)),
        58 => 40,
        _ => return None,
    };
    (ip.get(icmp) == Some(&130)).then_some(source.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(source: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0x01, 0, 0x5e, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0x08, 0x00];
        packet.extend([0x46, 0xc0, 0, 36, 0, 0, 0, 0, 1, 2, 0, 0]);
        packet.extend(source);
        packet.extend([224, 0, 0, 1, 0x94, 4, 0, 0, 0x11, 100, 0, 0, 0, 0, 0, 0, 2, 125, 0, 0]);
        packet
    }

    #[test]
    fn a_query_names_its_querier_tagged_or_not() {
        let mut heard = Heard::default();
        let packet = query([10, 0, 0, 9]);
        heard.take(&packet, packet.len());
        assert_eq!(heard.igmp_querier, Some([10, 0, 0, 9].into()));
        let mut buffer = vec![0; TAG_LEN];
        buffer.extend(query([10, 0, 0, 8]));
        let len = buffer.len() - TAG_LEN;
        let tagged = put_back(&mut buffer, len, Some([0x81, 0, 0, 7])).to_vec();
        heard.take(&tagged, tagged.len());
        assert_eq!(heard.igmp_querier, Some([10, 0, 0, 8].into()));
    }

    #[test]
    fn no_bytes_panic() {
        let whole = query([1, 2, 3, 4]);
        for len in 0..whole.len() {
            let mut heard = Heard::default();
            heard.take(&whole[..len], len);
            let _ = (igmp_querier(&whole[..len]), mld_querier(&whole[..len]));
        }
    }

    #[test]
    fn link_local_groups_are_left_out() {
        for (group, yes) in [("224.0.0.251", true), ("224.0.1.1", false), ("ff02::fb", true), ("ff12::1", true), ("ff05::1", false)] {
            assert_eq!(is_link_local(group.parse().unwrap()), yes, "{group}");
        }
    }
}
