//! The classic BPF prefilter of a receiving packet socket: what the worker never needs to see is dropped in the kernel.
//!
//! Accepts UDP over IPv4 and IPv6, behind up to two VLAN tags, to a multicast group or to one of the given unicast
//! addresses. It only saves work: the data path matches again. So whatever does not fit a program is accepted, never lost.
//! Pure: builds instructions, attaches nothing. Instruction set: Documentation/networking/filter.rst.

use libc::sock_filter;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;
const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERTYPE_IPV6: u32 = 0x86dd;
const TPIDS: [u32; 3] = [0x8100, 0x88a8, 0x9100];
const UDP: u32 = 17;

// linux/bpf_common.h, as combined here.
const LOAD_HALF: u16 = 0x28;
const LOAD_WORD_AT_X: u16 = 0x40;
const LOAD_BYTE_AT_X: u16 = 0x50;
const SET_X: u16 = 0x01;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const WHOLE_PACKET: u32 = u32::MAX;

/// The filter's program for the rules' unicast addresses.
pub(super) fn program(unicast: &[IpAddr]) -> Vec<sock_filter> {
    let (v4, v6) = split(unicast);
    let code = assemble(&v4, &v6);
    if code.len() <= MAX_INSTRUCTIONS { code } else { assemble_any() }
}

fn split(unicast: &[IpAddr]) -> (Vec<Ipv4Addr>, Vec<Ipv6Addr>) {
    let v4 = unicast.iter().filter_map(|address| if let IpAddr::V4(v4) = address { Some(*v4) } else { None });
    let v6 = unicast.iter().filter_map(|address| if let IpAddr::V6(v6) = address { Some(*v6) } else { None });
    (v4.collect(), v6.collect())
}

/// Multicast, or one of the addresses.
fn assemble(v4: &[Ipv4Addr], v6: &[Ipv6Addr]) -> Vec<sock_filter> {
    let mut four = vec![op(LOAD_WORD_AT_X, 16), op(AND, 0xf000_0000)];
    four.extend(accept_if_equal(0xe000_0000));
    four.push(op(LOAD_WORD_AT_X, 16));
    four.extend(v4.iter().flat_map(|address| accept_if_equal(address.to_bits())));
    let mut six = vec![op(LOAD_BYTE_AT_X, 24)];
    six.extend(accept_if_equal(0xff));
    six.extend(v6.iter().flat_map(|address| accept_if_v6(*address)));
    by_protocol(four, six)
}

/// Any destination: what more addresses than a program can hold come to.
fn assemble_any() -> Vec<sock_filter> {
    by_protocol(vec![op(RETURN, WHOLE_PACKET)], vec![op(RETURN, WHOLE_PACKET)])
}

/// Finds the IP header behind the tags (X = its offset), and runs `four` or `six` on UDP.
fn by_protocol(four: Vec<sock_filter>, six: Vec<sock_filter>) -> Vec<sock_filter> {
    let four = [udp_only(9), four, vec![op(RETURN, 0)]].concat();
    let six = [udp_only(6), six, vec![op(RETURN, 0)]].concat();
    let mut code = skip_tags();
    // Conditional jumps reach 255 instructions, JUMP reaches all.
    code.extend([jump_if_equal(ETHERTYPE_IPV4, 0, 1), op(JUMP, 2), jump_if_equal(ETHERTYPE_IPV6, 0, 2), op(JUMP, four.len() as u32 + 2)]);
    code.extend([op(JUMP, 1), op(RETURN, 0)]);
    code.extend(four);
    code.extend(six);
    code
}

/// A = EtherType, X = offset of what follows it, past at most two tags.
fn skip_tags() -> Vec<sock_filter> {
    let mut code = vec![op(LOAD_HALF, 12), op(SET_X, 14)];
    // Each tag's block: is A a TPID? If not, leave A and X and go past the remaining blocks.
    code.extend([jump_if_equal(TPIDS[0], 3, 0), jump_if_equal(TPIDS[1], 2, 0), jump_if_equal(TPIDS[2], 1, 0), op(JUMP, 8)]);
    code.extend([op(LOAD_HALF, 16), op(SET_X, 18)]);
    code.extend([jump_if_equal(TPIDS[0], 3, 0), jump_if_equal(TPIDS[1], 2, 0), jump_if_equal(TPIDS[2], 1, 0), op(JUMP, 2)]);
    code.extend([op(LOAD_HALF, 20), op(SET_X, 22)]);
    code
}

/// Drops what is not UDP by the protocol byte at X + `offset`.
fn udp_only(offset: u32) -> Vec<sock_filter> {
    vec![op(LOAD_BYTE_AT_X, offset), jump_if_equal(UDP, 1, 0), op(RETURN, 0)]
}

fn accept_if_equal(value: u32) -> [sock_filter; 2] {
    [jump_if_equal(value, 0, 1), op(RETURN, WHOLE_PACKET)]
}

fn accept_if_v6(address: Ipv6Addr) -> Vec<sock_filter> {
    let mut code = Vec::with_capacity(9);
    for (position, word) in address.octets().as_chunks::<4>().0.iter().enumerate() {
        let position = position as u8;
        code.push(op(LOAD_WORD_AT_X, 24 + u32::from(position) * 4));
        // A word that differs ends this address: past the other words and the RETURN.
        code.push(jump_if_equal(u32::from_be_bytes(*word), 0, (3 - position) * 2 + 1));
    }
    code.push(op(RETURN, WHOLE_PACKET));
    code
}

pub(super) const fn op(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

pub(super) const fn jump_if_equal(k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: JUMP_IF_EQUAL, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::super::socket::set_filter;
    use super::*;
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
    use std::os::fd::AsRawFd;

    fn ethernet(tpids: &[u16], ethertype: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 12];
        tpids.iter().for_each(|tpid| bytes.extend([tpid.to_be_bytes(), [0, 5]].concat()));
        bytes.extend(ethertype.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn ip(destination: &str, protocol: u8) -> (u16, Vec<u8>) {
        match destination.parse().unwrap() {
            IpAddr::V4(v4) => {
                let mut header = vec![0x45, 0, 0, 36, 0, 0, 0, 0, 8, protocol, 0, 0, 10, 0, 0, 1];
                header.extend(v4.octets());
                (0x0800, [header, vec![0; 16]].concat())
            }
            IpAddr::V6(v6) => {
                let mut header = vec![0x60, 0, 0, 0, 0, 16, protocol, 8];
                header.extend([0; 16]);
                header.extend(v6.octets());
                (0x86dd, [header, vec![0; 16]].concat())
            }
        }
    }

    /// What the kernel's own interpreter says: a filtered datagram does not reach the other end of a Unix socket pair.
    fn accepts(unicast: &[IpAddr], bytes: &[u8]) -> bool {
        let (from, to) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC).unwrap();
        set_filter(&to, unicast).unwrap();
        // Older kernels tell the sender (EPERM), newer ones drop silently.
        let _ = send(from.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT);
        recv(to.as_raw_fd(), &mut [0; 256], MsgFlags::MSG_DONTWAIT).is_ok_and(|len| len == bytes.len())
    }

    #[test]
    fn multicast_udp_passes_behind_up_to_two_tags() {
        for group in ["224.0.0.1", "239.255.255.255", "ff3e::8000:1"] {
            let (ethertype, packet) = ip(group, 17);
            for tags in [&[][..], &[0x8100], &[0x88a8], &[0x88a8, 0x8100], &[0x9100, 0x8100]] {
                assert!(accepts(&[], &ethernet(tags, ethertype, &packet)), "{group} {tags:x?}");
            }
            assert!(!accepts(&[], &ethernet(&[0x8100; 3], ethertype, &packet)), "three tags");
        }
    }

    #[test]
    fn other_protocols_and_addresses_stop() {
        for (destination, protocol) in
            [("239.1.1.1", 6), ("239.1.1.1", 2), ("ff02::1", 58), ("223.255.255.255", 17), ("240.0.0.1", 17), ("fe80::1", 17)]
        {
            let (ethertype, packet) = ip(destination, protocol);
            assert!(!accepts(&[], &ethernet(&[], ethertype, &packet)), "{destination} {protocol}");
        }
        assert!(!accepts(&[], &ethernet(&[], 0x0806, &[0; 46])), "ARP");
        assert!(!accepts(&[], &ethernet(&[], 0x0800, &[0x45])), "cut short");
    }

    #[test]
    fn unicast_passes_only_where_a_rule_wants_it() {
        let mine: Vec<IpAddr> = ["192.0.2.7", "2001:db8::7", "192.0.2.9", "2001:db8::9"].map(|address| address.parse().unwrap()).into();
        for (destination, expected) in [
            ("192.0.2.7", true),
            ("192.0.2.9", true),
            ("192.0.2.8", false),
            ("2001:db8::7", true),
            ("2001:db8::9", true),
            ("2001:db8::8", false),
            ("2001:db9::7", false),
            ("239.0.0.1", true),
        ] {
            let (ethertype, packet) = ip(destination, 17);
            assert_eq!(accepts(&mine, &ethernet(&[0x8100], ethertype, &packet)), expected, "{destination}");
        }
    }

    #[test]
    fn many_addresses_still_fit_or_fail_open() {
        for count in [300u32, 1900, 5000] {
            let many: Vec<IpAddr> = (0..count).map(|n| IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + n))).collect();
            let (ethertype, packet) = ip(&Ipv4Addr::from_bits(0x0a00_0000 + count - 1).to_string(), 17);
            assert!(accepts(&many, &ethernet(&[], ethertype, &packet)), "{count}: the last one");
            let (ethertype, packet) = ip("2001:db8::1", 17);
            assert_eq!(accepts(&many, &ethernet(&[], ethertype, &packet)), count == 5000, "{count}: IPv6");
        }
    }
}
