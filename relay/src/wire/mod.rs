//! Bytes ↔ meaning: Ethernet, VLAN, IPv4, IPv6 and UDP headers, checksums, group MAC addresses.
//!
//! Pure: must never know a rule, a frame, a socket or a clock. Network byte order ends here.

pub mod checksum;
pub mod mac;
pub mod parse;

pub use parse::{Headers, ParseVerdict, parse};
