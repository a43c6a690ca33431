//! Checksums in the kernel: verified once at ingress, carried on incrementally (RFC 1071, RFC 1624).
//!
//! Sums are of 16-bit words as they stand in memory (the byte order does not matter to the sum, RFC 1071 §2 (B)). Must come to
//! the very bytes that `relay::datapath::rewrite` comes to. Must never hold a map.
#![expect(unsafe_code, reason = "the kernel's helpers sum and copy by address")]

use crate::packet::{self, Packet};
use aya_ebpf::{helpers, programs::XdpContext};
use relay_common::kernel::{BAD_IP_CHECKSUM, BAD_UDP_CHECKSUM, MAX_LINEAR_L3_LEN, MULTICAST_SOURCE, TOO_BIG};

/// Room for the longest datagram the kernel path takes.
pub const BUFFER_LEN: usize = 4096;
/// A copy of a datagram, to sum it. One for each CPU.
pub type Buffer = [u8; BUFFER_LEN];

const UDP_CHECKSUM_AT: u32 = 6;
/// Bytes that the kernel's helper sums at once: before 6.13 it refuses more.
const BLOCK: u32 = 512;

/// Adds the carries back until 16 bits are left.
#[inline(always)]
pub fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// A computed UDP checksum as it is sent: 0 would mean "none".
#[inline(always)]
pub fn udp_sent(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

/// What the kernel path needs of a packet, read once more from the packet itself: what the parser found would have the
/// verifier walk the tables once for every shape of header.
pub struct Header {
    /// Source, as in `Flow`.
    pub src: [u32; 4],
    /// TTL or hop limit.
    pub ttl: u32,
    /// Bytes from the IP header on, as it says.
    pub l3_len: u32,
    /// Sum of the pseudo-header, without the UDP length.
    pseudo: u64,
    /// Where the UDP header begins.
    l4: u32,
    /// The IPv4 header's checksum is right.
    intact: bool,
}

/// Reads the IPv4 header of a packet that the parser took for UDP; an error is the reason to drop it.
#[inline(always)]
pub fn ipv4<const L3: usize>(ctx: &XdpContext, buffer: *mut Buffer) -> Result<Header, u16> {
    let packet = Packet::new(ctx);
    let ip = packet.bytes::<20>(L3).ok_or(TOO_BIG)?;
    let (src, dst) = (word(&ip, 12), word(&ip, 16));
    let addresses = u64::from(src) + u64::from(dst);
    let sum = u64::from(word(&ip, 0)) + u64::from(word(&ip, 4)) + u64::from(word(&ip, 8)) + addresses;
    let header_len = u32::from(ip[0] & 0x0f) * 4;
    let options = header_len.wrapping_sub(20);
    let more = if options == 0 { 0 } else { datagram_sum(ctx, L3 as u32 + 20, options & 0x3c, buffer).ok_or(TOO_BIG)? };
    let l3_len = u32::from(u16::from_be_bytes([ip[2], ip[3]]));
    let pseudo = addresses + u64::from(17_u16.to_be());
    let intact = fold(sum + more) == 0xffff;
    Ok(Header { src: [src, 0, 0, 0], ttl: u32::from(ip[8]), l3_len, pseudo, l4: L3 as u32 + header_len, intact })
}

/// The same for IPv6, which has no checksum of its own.
#[inline(always)]
pub fn ipv6<const L3: usize>(ctx: &XdpContext) -> Result<Header, u16> {
    let ip = Packet::new(ctx).bytes::<40>(L3).ok_or(TOO_BIG)?;
    let src = [word(&ip, 8), word(&ip, 12), word(&ip, 16), word(&ip, 20)];
    let mut pseudo = u64::from(17_u16.to_be());
    for (at, src) in src.iter().enumerate() {
        pseudo += u64::from(*src) + u64::from(word(&ip, 24 + at * 4));
    }
    let l3_len = 40 + u32::from(u16::from_be_bytes([ip[4], ip[5]]));
    Ok(Header { src, ttl: u32::from(ip[7]), l3_len, pseudo, l4: L3 as u32 + 40, intact: true })
}

/// Verifies source and UDP checksum as `relay::datapath::rewrite::inspect` does, and writes the checksum of a packet that came
/// with the pseudo-header sum only. An error is the reason to drop it.
#[inline(always)]
pub fn inspect<const L3: usize>(ctx: &XdpContext, header: &Header, family: u8, len: u32, buffer: *mut Buffer) -> Result<(), u16> {
    let packet = Packet::new(ctx);
    if !packet.is_linear(len) || header.l3_len > MAX_LINEAR_L3_LEN {
        return Err(TOO_BIG);
    }
    if !header.intact {
        return Err(BAD_IP_CHECKSUM);
    }
    if source_is_multicast(header.src[0], family) {
        return Err(MULTICAST_SOURCE);
    }
    let fixed = if family == 4 { 20 } else { 40 };
    let udp = if header.l4 == L3 as u32 + fixed { packet.bytes::<8>(L3 + fixed as usize) } else { packet.bytes_at::<8>(header.l4) };
    let udp = udp.ok_or(TOO_BIG)?;
    let found = u16::from_ne_bytes([udp[6], udp[7]]);
    if found == 0 {
        return if family == 4 { Ok(()) } else { Err(BAD_UDP_CHECKSUM) };
    }
    let pseudo = header.pseudo + u64::from(u16::from_ne_bytes([udp[4], udp[5]]));
    let udp_len = u32::from(u16::from_be_bytes([udp[4], udp[5]]));
    let datagram = datagram_sum(ctx, header.l4, udp_len, buffer).ok_or(TOO_BIG)?;
    if fold(pseudo + datagram) == 0xffff {
        return Ok(());
    }
    if found != fold(pseudo) {
        return Err(BAD_UDP_CHECKSUM);
    }
    let right = udp_sent(!fold(pseudo + datagram + u64::from(!found)));
    if packet::store::<2>(ctx, header.l4 + UDP_CHECKSUM_AT, &right.to_ne_bytes(), 2) { Ok(()) } else { Err(TOO_BIG) }
}

#[inline(always)]
fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// A group or the limited broadcast address as source, by its first word.
#[inline(always)]
pub fn source_is_multicast(src: u32, family: u8) -> bool {
    let [first, ..] = src.to_ne_bytes();
    if family == 4 { first & 0xf0 == 0xe0 || src == u32::MAX } else { first == 0xff }
}

/// Sum of `len` bytes at `at`; `None` where they are not all there.
#[inline(always)]
fn datagram_sum(ctx: &XdpContext, at: u32, len: u32, buffer: *mut Buffer) -> Option<u64> {
    let words = len & 0xffc;
    let tail = len & 3;
    if words == 0 || len as usize >= BUFFER_LEN {
        return None;
    }
    // SAFETY: `words` is at most 4092, and the buffer has 4096 bytes.
    unsafe { packet::load(ctx, at, buffer.cast(), words) }.then_some(())?;
    let mut sum = 0;
    for number in 0..BUFFER_LEN as u32 / BLOCK {
        let at = number * BLOCK;
        if at >= words {
            break;
        }
        // SAFETY: as above; the helper reads them.
        let more = unsafe {
            helpers::bpf_csum_diff(core::ptr::null_mut(), 0, buffer.cast::<u8>().add(at as usize).cast(), (words - at).min(BLOCK), 0)
        };
        if more < 0 {
            return None;
        }
        sum += more as u64;
    }
    let mut last = [0_u8; 4];
    if tail != 0 {
        // SAFETY: `last` has 4 bytes, and `tail` is at most 3.
        unsafe { packet::load(ctx, at + words, last.as_mut_ptr(), tail) }.then_some(())?;
    }
    Some(sum + u64::from(u32::from_ne_bytes(last)))
}
