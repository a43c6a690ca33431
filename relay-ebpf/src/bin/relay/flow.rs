//! The short way of the kernel path: packets of a flow that the long way has carried before.
//!
//! The long way (`program`, `kernel`) parses anything, asks the tables, verifies and rewrites. What it found for an untagged IPv4
//! flow with one ready output is remembered by this CPU, and [`carry`] does the same to the next packet in one straight line:
//! one cache line of tables, no helper that copies, sums of the packet where it stands. Whatever is not just so (options, fragments, a checksum
//! that is wrong or not finished, a TTL at its end) changes nothing here and takes the long way, which has the counters for it.
//! What is remembered is of a generation; user space begins another one after each change of the tables, so that nothing is
//! carried by what was. Must never drop or pass a packet, nor write to one before all is decided.
#![expect(unsafe_code, reason = "this CPU's own map elements and packet memory are read and written by address")]

use crate::{kernel, outcome};
use aya_ebpf::{Global, btf_maps::Array, helpers, macros::btf_map, programs::XdpContext};
use relay_common::edit::{Edit, SET_DPORT, SET_DSCP, SET_DST, SET_DST_MAC, SET_SPORT, SET_SRC, TTL_KEEP, TTL_SET, VLAN_SET};
use relay_common::kernel::{FlowBucket, KernelPlan, KnownFlow, MAX_FLOW_BUCKETS, Queued};
use relay_common::{IngressConfig, TAG_NONE};
use relay_ebpf::packet::Packet;
use relay_ebpf::parse::Flow;
use relay_ebpf::sum::{fold, source_is_multicast, udp_sent};

/// `BPF_F_MMAPABLE`: nobody maps them, but the elements of such a map begin with a page, and so with a cache line each.
const ALIGNED: usize = 1 << 10;

/// Never 0 once the loader has written it, so that an empty place is of no generation. The only word of the section `.bss`, which
/// is a map to user space and an address here: no look-up.
#[unsafe(no_mangle)]
static mut GENERATION: u32 = 0;
/// Each CPU's buckets, one CPU after the other: an element of a per-CPU map is found by an address that is a miss of its own, and
/// begins anywhere in a cache line. The loader knows how many CPUs there are.
#[btf_map]
static FLOWS: Array<FlowBucket, { MAX_FLOW_BUCKETS as usize }, ALIGNED> = Array::new();
/// Buckets that a CPU has in `FLOWS`, a power of two. Written by the loader.
#[unsafe(no_mangle)]
static FLOW_BUCKETS: Global<u32> = Global::new(MAX_FLOW_BUCKETS);

const IPV4_AT: usize = 14;
const UDP_AT: usize = 34;
const UDP_LEN: u32 = 8;
/// Multiples of these are summed by the kernel's helper (before 6.13 it takes no more at once), what is left word by word.
const LARGE: u32 = 512;
const BLOCK: u32 = 128;
/// Longer than any datagram of the kernel path (`MAX_LINEAR_L3_LEN`).
const TOO_LONG: u32 = 4096;
/// Ethertype IPv4, and UDP behind a TTL, as they stand in memory.
const IPV4: u16 = 0x0800_u16.to_be();
const UDP: u32 = 17 << 8;
/// "More fragments" and the offset, in the word that has the identification before them.
const FRAGMENT: u32 = 0xff3f_0000;

/// The generation, to be read before the tables are.
#[inline(always)]
pub(crate) fn generation() -> u32 {
    // SAFETY: a word that user space writes as a whole.
    unsafe { core::ptr::read_volatile(&raw const GENERATION) }
}

/// The flows that one is looked for among. Neighbouring groups of a source stand in neighbouring buckets, so that a range of them
/// has a bucket each.
#[inline(always)]
fn bucket(src: u32, dst: u32, port: u16) -> Option<*mut FlowBucket> {
    let group = u32::from_be(dst);
    let others = u64::from(src) << 32 ^ u64::from(group >> MAX_FLOW_BUCKETS.ilog2()) << 16 ^ u64::from(port);
    let hash = (others.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u32;
    // SAFETY: the helper has no arguments.
    let cpu = unsafe { helpers::bpf_get_smp_processor_id() };
    let buckets = FLOW_BUCKETS.load();
    FLOWS.get_ptr_mut(cpu * buckets + ((group ^ hash) & (buckets - 1)))
}

/// Remembers what the long way has found, if [`carry`] can do it.
#[inline(always)]
pub(crate) fn remember(generation: u32, config: &IngressConfig, ifindex: u32, flow: &Flow, plan: &KernelPlan) {
    if flow.family != 4 || flow.tag != TAG_NONE || plan.flags != 0 || plan.only.edit.vlan_mode == VLAN_SET {
        return;
    }
    let (src, dst, port) = (flow.src[0], flow.dst[0], flow.port.to_be());
    if config.own4.contains(&src) || source_is_multicast(src, 4) {
        return;
    }
    let Some(bucket) = bucket(src, dst, port) else { return };
    // SAFETY: a lookup that is not null is this CPU's own element; programs on one CPU don't interleave here.
    let [first, second] = unsafe { &mut *bucket };
    let other = first.generation == generation && !is_of(first, ifindex, src, dst, port);
    let place = if !other {
        first
    } else if second.generation != generation || is_of(second, ifindex, src, dst, port) || is_unlucky() {
        second
    } else {
        return;
    };
    *place = entry(&plan.only.edit, src, dst, port);
    place.ifindex = ifindex;
    place.max_l3_len = plan.max_l3_len as u16;
    place.owner = plan.only.slot | plan.slot << 16;
    place.serial = plan.serial;
    place.min_ttl = plan.min_ttl as u8;
    place.device = plan.only.device as u8;
    place.interface = config.slot as u8;
    place.generation = generation;
}

/// Seldom: a flow takes the place of another, which may be over or not. Of flows that are too many for a bucket most keep theirs.
#[inline(always)]
fn is_unlucky() -> bool {
    // SAFETY: the helper has no arguments.
    unsafe { helpers::bpf_get_prandom_u32() & 15 == 0 }
}

#[inline(always)]
fn is_of(known: &KnownFlow, ifindex: u32, src: u32, dst: u32, port: u16) -> bool {
    known.src == src && known.dst == dst && known.port == port && known.ifindex == ifindex
}

/// What an output's edit writes into the packets of a flow.
#[inline(always)]
fn entry(edit: &Edit, src: u32, dst: u32, port: u16) -> KnownFlow {
    let set = |flag: u16| edit.flags & flag != 0;
    let word = |bytes: &[u8; 16]| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let mut known = KnownFlow { src, dst, port, new_src: src, new_dst: dst, ..KnownFlow::default() };
    if set(SET_SRC) {
        known.new_src = word(&edit.src);
    }
    if set(SET_DST) {
        known.new_dst = word(&edit.dst);
    }
    known.change = fold(change(src, known.new_src) + change(dst, known.new_dst));
    known.keep_port = if set(SET_SPORT) { 0 } else { u16::MAX };
    let sport = if set(SET_SPORT) { edit.sport.to_be() } else { 0 };
    let dport = if set(SET_DPORT) { edit.dport.to_be() } else { port };
    known.new_ports = u32::from(sport) | u32::from(dport) << 16;
    (known.keep_class, known.set_class) = if set(SET_DSCP) { (3, edit.dscp << 2) } else { (u8::MAX, 0) };
    (known.keep_ttl, known.less_ttl) = match edit.ttl_mode {
        TTL_SET => (0, edit.ttl.wrapping_neg()),
        TTL_KEEP => (u8::MAX, 0),
        _ => (u8::MAX, 1),
    };
    let [d0, d1, d2, d3, d4, d5] = edit.dst_mac;
    let [s0, s1, s2, s3, s4, s5] = edit.src_mac;
    let fixed = u64::from_ne_bytes([d0, d1, d2, d3, d4, d5, s0, s1]);
    // 01:00:5e and the low 23 bits of the group.
    let group = 0x5e_0001 | u64::from(known.new_dst >> 8 & 0x00ff_ff7f) << 24 | fixed & 0xffff_0000_0000_0000;
    known.macs = if set(SET_DST_MAC) { fixed } else { group };
    known.mac_end = u32::from_ne_bytes([s2, s3, s4, s5]);
    known
}

/// The headers of an untagged IPv4 packet without options, as they stand in memory.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Headers {
    /// The destination's MAC address and the first two bytes of the source's.
    macs: u64,
    /// The rest of that.
    mac_end: u32,
    ethertype: u16,
    /// Version, length, traffic class, total length.
    ip0: u32,
    /// Identification, flags, offset.
    ip1: u32,
    /// TTL, protocol, checksum.
    ip2: u32,
    src: u32,
    dst: u32,
    ports: u32,
    /// UDP length, checksum.
    udp1: u32,
}

const _: () = assert!(size_of::<Headers>() == UDP_AT + UDP_LEN as usize);

impl Headers {
    /// An untagged UDP datagram in one piece, whose header is right and whose lengths lie within `len` bytes.
    #[inline(always)]
    fn is_plain(&self, len: u32) -> bool {
        let sum = u64::from(self.ip0) + u64::from(self.ip1) + u64::from(self.ip2) + u64::from(self.src) + u64::from(self.dst);
        self.ethertype == IPV4
            && self.ip0 & 0xff == 0x45
            && self.ip1 & FRAGMENT == 0
            && self.ip2 & 0xff00 == UDP
            && self.l3_len() + IPV4_AT as u32 <= len
            && self.udp_len() >= UDP_LEN
            && self.udp_len() + 20 <= self.l3_len()
            && fold(sum) == 0xffff
    }

    #[inline(always)]
    fn l3_len(&self) -> u32 {
        ((self.ip0 >> 16) as u16).swap_bytes().into()
    }

    #[inline(always)]
    fn udp_len(&self) -> u32 {
        (self.udp1 as u16).swap_bytes().into()
    }

    /// The UDP checksum found; 0: none.
    #[inline(always)]
    fn checksum(&self) -> u16 {
        (self.udp1 >> 16) as u16
    }

    /// Sum of the pseudo-header.
    #[inline(always)]
    fn pseudo(&self) -> u64 {
        u64::from(self.src) + u64::from(self.dst) + u64::from(17_u16.to_be()) + u64::from(self.udp1 & 0xffff)
    }

    #[inline(always)]
    fn port(&self) -> u16 {
        (self.ports >> 16) as u16
    }
}

/// Carries the packet, if it is of a flow that is known and nothing about it is odd: the XDP action.
#[inline(always)]
pub(crate) fn carry(ctx: &XdpContext) -> Option<u32> {
    let packet = Packet::new(ctx);
    let at = packet.place::<{ UDP_AT + 8 }>(0)?.cast::<Headers>();
    let len = packet.len();
    if !packet.is_linear(len) {
        return None;
    }
    // Read anew after each helper: else the compiler keeps all of it on the stack meanwhile.
    // SAFETY: `at` is 42 bytes within the packet, as many as there are headers; the type asks for no alignment.
    let headers = || unsafe { *at };
    if !headers().is_plain(len) {
        return None;
    }
    let old = headers();
    // SAFETY: as in `remember`.
    let bucket = unsafe { &*bucket(old.src, old.dst, old.port())? };
    let old = headers();
    let known = find(bucket, &old, ctx.ingress_ifindex() as u32)?;
    if (old.ip2 & 0xff) < known.min_ttl.into() || old.l3_len() > known.max_l3_len.into() {
        return None;
    }
    if old.checksum() != 0 && fold(old.pseudo() + datagram_sum(&packet, old.udp_len())?) != 0xffff {
        return None;
    }
    let action = kernel::redirect(known.device.into())?;
    let new = rewritten(&headers(), known);
    // SAFETY: as above; nothing has moved the packet.
    unsafe { *at = new };
    let len = len | u32::from(known.interface) << 16;
    outcome::entered(known.device.into(), Queued { owner: known.owner, serial: known.serial, len });
    Some(action)
}

#[inline(always)]
fn find<'a>([first, second]: &'a FlowBucket, headers: &Headers, ifindex: u32) -> Option<&'a KnownFlow> {
    let is = |known: &KnownFlow| is_of(known, ifindex, headers.src, headers.dst, headers.port());
    let known = if is(first) { first } else { second };
    (is(known) && known.generation == generation()).then_some(known)
}

/// The same bytes as `rewrite::rewrite` leaves there.
#[inline(always)]
fn rewritten(old: &Headers, known: &KnownFlow) -> Headers {
    let mut new = *old;
    (new.macs, new.mac_end, new.src, new.dst) = (known.macs, known.mac_end, known.new_src, known.new_dst);
    new.ip0 = old.ip0 & (0xffff_00ff | u32::from(known.keep_class) << 8) | u32::from(known.set_class) << 8;
    let ttl = (old.ip2 & u32::from(known.keep_ttl)).wrapping_sub(known.less_ttl.into()) & 0xff;
    let changed = u64::from(known.change) + change(old.ip0, new.ip0) + change(old.ip2 & 0xffff, ttl | UDP);
    new.ip2 = ttl | UDP | u32::from(!fold(u64::from(!(old.ip2 >> 16) as u16) + changed)) << 16;
    new.ports = old.ports & u32::from(known.keep_port) | known.new_ports;
    if old.checksum() != 0 {
        let changed = u64::from(known.change) + change(old.ports, new.ports);
        let sum = udp_sent(!fold(u64::from(!old.checksum()) + changed));
        new.udp1 = old.udp1 & 0xffff | u32::from(sum) << 16;
    }
    new
}

/// What a word's change adds to a sum (RFC 1624 eqn. 3).
#[inline(always)]
fn change(old: u32, new: u32) -> u64 {
    u64::from(!old) + u64::from(new)
}

/// Sum of the `len` bytes from the UDP header on; `None` where they are not all there, or too many. Every place is reckoned from
/// `len` alone: a place that grew step by step would have the verifier walk each way there is to it.
#[inline(always)]
fn datagram_sum(packet: &Packet, len: u32) -> Option<u64> {
    if len >= TOO_LONG {
        return None;
    }
    let mut sum = 0;
    for number in 0..TOO_LONG / LARGE - 1 {
        if (number + 1) * LARGE > len {
            break;
        }
        sum += block_sum::<{ LARGE as usize }>(packet, number * LARGE)?;
    }
    for number in 0..LARGE / BLOCK - 1 {
        if (number + 1) * BLOCK > len & (LARGE - 1) {
            break;
        }
        sum += block_sum::<{ BLOCK as usize }>(packet, (len & (TOO_LONG - LARGE)) + number * BLOCK)?;
    }
    sum += tail::<[u32; 16]>(packet, len)?.map_or(0, |words| total(&words));
    sum += tail::<[u32; 8]>(packet, len)?.map_or(0, |words| total(&words));
    sum += tail::<[u32; 4]>(packet, len)?.map_or(0, |words| total(&words));
    sum += tail::<[u32; 2]>(packet, len)?.map_or(0, |words| total(&words));
    sum += tail::<u32>(packet, len)?.map_or(0, u64::from);
    sum += tail::<u16>(packet, len)?.map_or(0, u64::from);
    sum += tail::<u8>(packet, len)?.map_or(0, u64::from);
    Some(sum)
}

/// Sum of `N` bytes, `at` bytes behind the UDP header's beginning.
#[inline(always)]
fn block_sum<const N: usize>(packet: &Packet, at: u32) -> Option<u64> {
    let block = packet.place_at::<[u8; N]>(UDP_AT + at as usize)?;
    // SAFETY: the block lies within the packet, and the helper only reads it.
    let sum = unsafe { helpers::bpf_csum_diff(core::ptr::null_mut(), 0, block.cast(), N as u32, 0) };
    if sum < 0 { None } else { Some(sum as u64) }
}

/// The `T` that `len` bytes have behind their parts of more than its size, a power of two, if they have one.
#[inline(always)]
fn tail<T: Copy>(packet: &Packet, len: u32) -> Option<Option<T>> {
    let size = size_of::<T>() as u32;
    if len & size == 0 {
        return Some(None);
    }
    let at = UDP_AT + (len & 0xfff & !(2 * size - 1)) as usize;
    // SAFETY: the bytes lie within the packet, and are read without alignment; the types asked for have no invalid values.
    Some(Some(unsafe { packet.place_at::<T>(at)?.read_unaligned() }))
}

#[inline(always)]
fn total<const N: usize>(words: &[u32; N]) -> u64 {
    words.iter().map(|word| u64::from(*word)).sum()
}
