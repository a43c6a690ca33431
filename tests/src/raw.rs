//! Frames as bytes: built here, sent and captured below any socket, so that a test can say exactly what is on the wire.
//!
//! Must never use the code it judges (`relay::wire`).

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnknownCmsg, recv, recvmsg, send};
use relay::lab::Namespace;
use relay::nic::afpacket::socket;
use std::io::IoSliceMut;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

/// The UDP checksum of a [`Datagram`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// As it must be.
    #[default]
    Right,
    /// 0: none.
    Zero,
    /// Off by one.
    Wrong,
    /// The folded sum of the pseudo header only, as a local sender leaves it to the hardware.
    Partial,
}

/// A UDP datagram in an Ethernet frame.
#[derive(Clone, Debug)]
pub struct Datagram {
    /// Source MAC.
    pub src_mac: [u8; 6],
    /// Destination MAC; else the group's, or everybody for unicast.
    pub dst_mac: Option<[u8; 6]>,
    /// Tags as (TPID, TCI), outermost first.
    pub tags: Vec<(u16, u16)>,
    /// Source.
    pub src: IpAddr,
    /// Destination, of the same family.
    pub dst: IpAddr,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TOS or traffic class.
    pub tos: u8,
    /// IPv4 options, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// IPv4 identification.
    pub id: u16,
    /// IPv6 flow label.
    pub flow: u32,
    /// IPv4 flags and fragment offset.
    pub fragment: u16,
    /// UDP checksum.
    pub checksum: Checksum,
    /// Payload.
    pub payload: Vec<u8>,
    /// Bytes of Ethernet padding behind the IP packet.
    pub padding: usize,
}

impl Datagram {
    /// From 10.0.0.1 or fd00::1, TTL 16, right in all.
    pub fn to(dst: &str, dport: u16, payload: &[u8]) -> Result<Self> {
        let dst: IpAddr = dst.parse().context("destination")?;
        let src = if dst.is_ipv4() { "10.0.0.1" } else { "fd00::1" };
        Ok(Self {
            src_mac: [2, 0, 0, 0, 0, 1],
            dst_mac: None,
            tags: Vec::new(),
            src: src.parse().context("source")?,
            dst,
            sport: 4_000,
            dport,
            ttl: 16,
            tos: 0,
            options: Vec::new(),
            id: 0x1234,
            flow: 0,
            fragment: 0x4000,
            checksum: Checksum::Right,
            payload: payload.to_vec(),
            padding: 0,
        })
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let udp = self.udp();
        let (ethertype, ip) = if self.dst.is_ipv4() { (0x0800_u16, self.ipv4(&udp)) } else { (0x86dd, self.ipv6(&udp)) };
        let mut frame = [self.dst_mac.unwrap_or_else(|| self.mac()), self.src_mac].concat();
        for (tpid, tci) in &self.tags {
            frame.extend([tpid.to_be_bytes(), tci.to_be_bytes()].concat());
        }
        frame.extend(ethertype.to_be_bytes());
        frame.extend(ip);
        frame.resize(frame.len() + self.padding, 0xee);
        frame
    }

    /// RFC 1112 §6.4, RFC 2464 §7; everybody for unicast.
    fn mac(&self) -> [u8; 6] {
        match self.dst {
            IpAddr::V4(v4) if v4.is_multicast() => [1, 0, 0x5e, v4.octets()[1] & 0x7f, v4.octets()[2], v4.octets()[3]],
            IpAddr::V6(v6) if v6.is_multicast() => [0x33, 0x33, v6.octets()[12], v6.octets()[13], v6.octets()[14], v6.octets()[15]],
            _ => [0xff; 6],
        }
    }

    fn udp(&self) -> Vec<u8> {
        let len = 8 + self.payload.len() as u16;
        let mut udp = [self.sport, self.dport, len, 0].map(u16::to_be_bytes).concat();
        udp.extend(&self.payload);
        let pseudo = sum(&[octets(self.src), octets(self.dst), vec![0, 17], len.to_be_bytes().to_vec()].concat(), 0);
        let right = match !sum(&udp, pseudo) {
            0 => 0xffff,
            right => right,
        };
        let sum = match self.checksum {
            Checksum::Right => right,
            Checksum::Zero => 0,
            Checksum::Wrong => right.wrapping_add(1).max(1),
            Checksum::Partial => pseudo,
        };
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        udp
    }

    fn ipv4(&self, udp: &[u8]) -> Vec<u8> {
        let header_len = 20 + self.options.len();
        let total = ((header_len + udp.len()) as u16).to_be_bytes();
        let ([a, b], [c, d]) = (self.id.to_be_bytes(), self.fragment.to_be_bytes());
        let mut ip = vec![0x40 + (header_len / 4) as u8, self.tos, total[0], total[1], a, b, c, d, self.ttl, 17, 0, 0];
        ip.extend([octets(self.src), octets(self.dst), self.options.clone()].concat());
        let right = (!sum(&ip, 0)).to_be_bytes();
        ip[10..12].copy_from_slice(&right);
        ip.extend(udp);
        ip
    }

    fn ipv6(&self, udp: &[u8]) -> Vec<u8> {
        let len = (udp.len() as u16).to_be_bytes();
        let [_, a, b, c] = self.flow.to_be_bytes();
        let mut ip = vec![0x60 | self.tos >> 4, self.tos << 4 | a & 0x0f, b, c, len[0], len[1], 17, self.ttl];
        ip.extend([octets(self.src), octets(self.dst), udp.to_vec()].concat());
        ip
    }
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// RFC 1071: the folded sum of 16-bit words, an odd byte padded.
pub fn sum(bytes: &[u8], start: u16) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum = words.sum::<u32>() + u32::from(start);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A socket that sends frames as they are.
#[derive(Debug)]
pub struct Injector(OwnedFd);

impl Injector {
    /// On an interface of a namespace.
    pub fn on(namespace: &Namespace, iface: &str) -> Result<Self> {
        let open = || Ok(socket::open_send(relay::lab::socket::ifindex(iface)?)?);
        namespace.run(open)?.map(Self)
    }

    /// Sends one frame. Those that the kernel itself refuses (shorter than an Ethernet header) are an error.
    pub fn send(&self, frame: &[u8]) -> Result<(), Errno> {
        loop {
            match send(self.0.as_raw_fd(), frame, MsgFlags::empty()) {
                Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR) => std::thread::sleep(std::time::Duration::from_millis(1)),
                other => return other.map(drop),
            }
        }
    }
}

/// What the packet socket puts before a frame (`struct virtio_net_hdr`).
const VNET_HEADER_LEN: usize = 10;

/// UDP to groups, and to the unicast addresses named, as it comes in by an interface; without its outermost tag, which the kernel
/// takes off.
#[derive(Debug)]
pub struct Capture(OwnedFd);

impl Capture {
    /// On an interface of a namespace.
    pub fn on(namespace: &Namespace, iface: &str, unicast: &[IpAddr]) -> Result<Self> {
        let open = || Ok(socket::open_receive(relay::lab::socket::ifindex(iface)?, unicast, None)?);
        namespace.run(open)?.map(Self)
    }

    /// The frames that have come, in order.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        let next = || {
            recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)
                .ok()
                .map(|len| buffer.get(VNET_HEADER_LEN..len).unwrap_or_default().to_vec())
        };
        std::iter::from_fn(next).collect()
    }

    /// The same with the outermost tag put back where it was on the wire.
    pub fn whole_frames(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.whole_frame()).collect()
    }

    fn whole_frame(&self) -> Option<Vec<u8>> {
        let (mut buffer, mut control) = (vec![0; 65_536], nix::cmsg_space!([u8; 64]));
        let mut pieces = [IoSliceMut::new(&mut buffer)];
        let message = recvmsg::<()>(self.0.as_raw_fd(), &mut pieces, Some(&mut control), MsgFlags::MSG_DONTWAIT).ok()?;
        let tag = message.cmsgs().ok()?.find_map(|one| if let ControlMessageOwned::Unknown(one) = one { tag(&one) } else { None });
        let len = message.bytes;
        let mut frame = buffer.get(VNET_HEADER_LEN..len)?.to_vec();
        frame.splice(12..12, tag.into_iter().flatten());
        Some(frame)
    }
}

/// The tag in a `struct tpacket_auxdata` (linux/if_packet.h): status, at 16 TCI and TPID, if the status calls them valid.
fn tag(message: &UnknownCmsg) -> Option<[u8; 4]> {
    let header = &message.cmsg_header;
    let valid = libc::TP_STATUS_VLAN_VALID | libc::TP_STATUS_VLAN_TPID_VALID;
    let half = |at: usize| Some(u16::from_ne_bytes(*message.data_bytes.get(at..at + 2)?.first_chunk()?).to_be_bytes());
    let status = u32::from_ne_bytes(*message.data_bytes.first_chunk()?);
    let ours = header.cmsg_level == libc::SOL_PACKET && header.cmsg_type == libc::PACKET_AUXDATA;
    let ([a, b], [c, d]) = (half(18)?, half(16)?);
    (ours && status & valid == valid).then_some([a, b, c, d])
}
