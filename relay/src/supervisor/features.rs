//! Whether interfaces take redirected packets: the `netdev` family of generic netlink (Documentation/netlink/specs/netdev.yaml).
//!
//! From kernel 6.3 on; before, nobody says. Needs no privilege. Must never change anything.

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};
use std::io;

/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, `CTRL_ATTR_FAMILY_ID`, `CTRL_ATTR_FAMILY_NAME` (linux/genetlink.h).
const CONTROL: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// `NETDEV_CMD_DEV_GET`, `NETDEV_A_DEV_IFINDEX`, `NETDEV_A_DEV_XDP_FEATURES`, `NETDEV_XDP_ACT_NDO_XMIT` (linux/netdev.h).
const DEV_GET: u8 = 1;
const IFINDEX: u16 = 1;
const XDP_FEATURES: u16 = 3;
const NDO_XMIT: u64 = 1 << 2;
/// `NLM_F_REQUEST`, `NLMSG_ERROR`, bytes of `struct nlmsghdr` and with `struct genlmsghdr`.
const REQUEST: u16 = 1;
const ERROR: u16 = 2;
const HEADER_LEN: usize = 16;
const BODY_AT: usize = 20;

/// Asks the kernel of the network namespace it was opened in.
#[derive(Debug)]
pub(super) struct Features {
    socket: Socket,
    family: u16,
}

impl Features {
    /// Opens the socket; an error where the kernel has no such family.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let answer = ask(&socket, CONTROL, GET_FAMILY, FAMILY_NAME, b"netdev\0")?;
        let family = attribute::<2>(&answer, FAMILY_ID).map(u16::from_ne_bytes).ok_or(io::ErrorKind::Unsupported)?;
        Ok(Self { socket, family })
    }

    /// Whether an interface takes redirected packets; `None`: not known.
    pub(super) fn takes_redirected(&self, ifindex: u32) -> Option<bool> {
        let answer = ask(&self.socket, self.family, DEV_GET, IFINDEX, &ifindex.to_ne_bytes()).ok()?;
        let features = attribute::<8>(&answer, XDP_FEATURES).map(u64::from_ne_bytes)?;
        Some(features & NDO_XMIT != 0)
    }
}

/// One request with one attribute; the answer's message. The kernel answers before `send` returns.
fn ask(socket: &Socket, family: u16, command: u8, kind: u16, value: &[u8]) -> io::Result<Vec<u8>> {
    socket.send(&request(family, command, kind, value), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    match answer.get(4..6) {
        Some(kind) if kind == ERROR.to_ne_bytes() => {
            let errno =
                answer.get(HEADER_LEN..HEADER_LEN + 4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map_or(0, i32::from_ne_bytes);
            Err(io::Error::from_raw_os_error(-errno))
        }
        Some(_) => Ok(answer),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn request(family: u16, command: u8, kind: u16, value: &[u8]) -> Vec<u8> {
    let attribute_len = 4 + value.len();
    let len = BODY_AT + attribute_len.next_multiple_of(4);
    let mut bytes = Vec::with_capacity(len);
    bytes.extend((len as u32).to_ne_bytes());
    bytes.extend(family.to_ne_bytes());
    bytes.extend(REQUEST.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([command, 1, 0, 0]);
    bytes.extend((attribute_len as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(len, 0);
    bytes
}

/// The value of an attribute of `N` bytes, in a message with a generic netlink header.
fn attribute<const N: usize>(message: &[u8], wanted: u16) -> Option<[u8; N]> {
    let mut rest = message.get(BODY_AT..)?;
    loop {
        let (header, _) = rest.split_first_chunk::<4>()?;
        let [a, b, c, d] = *header;
        let (len, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]) & 0x3fff);
        if kind == wanted {
            return rest.get(4..len)?.try_into().ok();
        }
        rest = rest.get(len.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::super::netns::{in_netns, ip};
    use super::*;

    #[test]
    fn an_attribute_is_found_behind_others_and_garbage_is_none() {
        let mut message = request(7, DEV_GET, 9, &[1, 2, 3]);
        message.extend(request(7, DEV_GET, XDP_FEATURES, &0x67_u64.to_ne_bytes()).split_off(BODY_AT));
        assert_eq!(attribute::<8>(&message, XDP_FEATURES).map(u64::from_ne_bytes), Some(0x67));
        for len in 0..message.len() {
            let _ = attribute::<8>(&message[..len], 4711);
        }
        assert_eq!(attribute::<4>(&[0; 64], 5), None);
    }

    #[test]
    fn a_veth_takes_packets_once_its_peer_has_gro() {
        in_netns(|| {
            ip("link add op-a type veth peer name op-b");
            ip("link set op-a up");
            ip("link set op-b up");
            let Ok(features) = Features::open() else { return println!("SKIPPED: this kernel has no netdev family") };
            let ifindex = nix::net::if_::if_nametoindex("op-a").unwrap();
            assert_eq!(features.takes_redirected(ifindex), Some(false));
            match std::process::Command::new("ethtool").args(["-K", "op-b", "gro", "on"]).status() {
                Ok(status) if status.success() => assert_eq!(features.takes_redirected(ifindex), Some(true)),
                other => println!("SKIPPED: ethtool -K: {other:?}"),
            }
            assert_eq!(features.takes_redirected(4711), None);
        });
    }
}
