//! Address prefixes: masking, containment, and the 16-byte form that the tables use. Pure arithmetic.

use super::Prefix;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address in 16 bytes, network order: IPv4 in the first 4, rest 0.
pub const fn to_bytes(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(addr) => {
            let [a, b, c, d] = addr.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(addr) => addr.octets(),
    }
}

/// The address of a 16-byte field; family 4 or 6.
pub const fn from_bytes(family: u8, bytes: [u8; 16]) -> IpAddr {
    match family {
        4 => IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
        _ => IpAddr::V6(Ipv6Addr::from_octets(bytes)),
    }
}

/// The first `len` bits of a 16-byte address, the rest 0.
#[inline]
pub const fn masked(addr: [u8; 16], len: u8) -> [u8; 16] {
    let keep = match len {
        0 => 0,
        1..=127 => u128::MAX << (128 - len as u32),
        _ => u128::MAX,
    };
    (u128::from_be_bytes(addr) & keep).to_be_bytes()
}

/// 4 or 6.
pub const fn family(addr: IpAddr) -> u8 {
    match addr {
        IpAddr::V4(_) => 4,
        IpAddr::V6(_) => 6,
    }
}

/// 32 or 128.
pub const fn full_len(addr: IpAddr) -> u8 {
    match addr {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

impl Prefix {
    /// The prefix of length `len` (cut to the family's) that `addr` lies in.
    pub fn new(addr: IpAddr, len: u8) -> Self {
        let len = len.min(full_len(addr));
        Self { addr: from_bytes(family(addr), masked(to_bytes(addr), len)), len }
    }

    /// One address.
    pub fn host(addr: IpAddr) -> Self {
        Self::new(addr, u8::MAX)
    }

    /// 4 or 6.
    pub const fn family(&self) -> u8 {
        family(self.addr)
    }

    /// Whether it is one address only.
    pub const fn is_host(&self) -> bool {
        self.len == full_len(self.addr)
    }

    /// The masked address in 16 bytes.
    pub const fn bytes(&self) -> [u8; 16] {
        to_bytes(self.addr)
    }

    /// Whether every address of `other` lies in this prefix.
    pub fn covers(&self, other: &Prefix) -> bool {
        self.family() == other.family() && self.len <= other.len && masked(other.bytes(), self.len) == self.bytes()
    }

    /// Whether some address lies in both.
    pub fn overlaps(&self, other: &Prefix) -> bool {
        self.covers(other) || other.covers(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(addr: &str, len: u8) -> Prefix {
        Prefix::new(addr.parse().unwrap(), len)
    }

    #[test]
    fn masks_at_every_length() {
        assert_eq!(prefix("239.255.255.255", 12).addr.to_string(), "239.240.0.0");
        assert_eq!(prefix("239.255.255.255", 0).addr.to_string(), "0.0.0.0");
        assert_eq!(prefix("ff3e:ffff::1", 128).addr.to_string(), "ff3e:ffff::1");
        assert_eq!(prefix("ff3e:ffff::1", 17).addr.to_string(), "ff3e:8000::");
        assert!(Prefix::host("10.0.0.1".parse().unwrap()).is_host());
    }

    #[test]
    fn covers_and_overlaps() {
        let (wide, narrow, other) = (prefix("10.0.0.0", 8), prefix("10.1.0.0", 16), prefix("11.0.0.0", 8));
        assert!(wide.covers(&narrow) && !narrow.covers(&wide) && narrow.overlaps(&wide));
        assert!(!wide.overlaps(&other) && prefix("0.0.0.0", 0).covers(&other) && !prefix("::", 0).covers(&other));
    }
}
