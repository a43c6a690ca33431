//! The link-layer address of a group. Pure arithmetic; must never look anything up.

/// An Ethernet address, in the order of transmission.
pub type Mac = [u8; 6];

/// The Ethernet address of an IPv4 group: `01:00:5e` and the low 23 bits of the group (RFC 1112 §6.4).
pub const fn ipv4_group(group: [u8; 4]) -> Mac {
    [0x01, 0x00, 0x5e, group[1] & 0x7f, group[2], group[3]]
}

/// The Ethernet address of an IPv6 group: `33:33` and the low 32 bits of the group (RFC 2464 §7).
pub const fn ipv6_group(group: [u8; 16]) -> Mac {
    [0x33, 0x33, group[12], group[13], group[14], group[15]]
}

/// The Ethernet address of a group of either family (4 or 6), IPv4 in the first 4 bytes of `group`.
pub const fn group(family: u8, group: &[u8; 16]) -> Mac {
    match family {
        4 => ipv4_group([group[0], group[1], group[2], group[3]]),
        _ => ipv6_group(*group),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_drops_the_ninth_bit() {
        assert_eq!(ipv4_group([239, 129, 2, 3]), [0x01, 0x00, 0x5e, 0x01, 2, 3]);
        assert_eq!(ipv4_group([224, 0, 0, 251]), [0x01, 0x00, 0x5e, 0, 0, 251]);
    }

    #[test]
    fn ipv6_takes_the_last_four_bytes() {
        let mut addr = [0; 16];
        addr[0] = 0xff;
        addr[12..].copy_from_slice(&[1, 2, 3, 4]);
        assert_eq!(group(6, &addr), [0x33, 0x33, 1, 2, 3, 4]);
    }
}
