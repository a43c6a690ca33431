//! The short way of the kernel path: packets of a flow that the long way has carried before.
//!
//! The long way (`program`, `kernel`) parses anything, asks the tables, verifies and rewrites. What it found for an untagged IPv4
//! flow with one ready output is remembered by this CPU, and [`carry`] does the same to the next packet in one straight line:
//! no hash, no helper that copies, sums of the packet where it stands. Whatever is not just so (options, fragments, a checksum
//! that is wrong or not finished, a TTL at its end) changes nothing here and takes the long way, which has the counters for it.
//! What is remembered is of a generation; user space begins another one after each change of the tables, so that nothing is
//! carried by what was. Must never drop or pass a packet, nor write to one before all is decided.
#![expect(unsafe_code, reason = "this CPU's own map elements and packet memory are read and written by address")]

use crate::{kernel, outcome, program};
use aya_ebpf::{
    EbpfContext as _,
    bindings::xdp_md,
    btf_maps::{Array, PerCpuArray},
    helpers,
    macros::btf_map,
    programs::XdpContext,
};
use relay_common::edit::{SET_DPORT, SET_DSCP, SET_DST, SET_DST_MAC, SET_SPORT, SET_SRC, TTL_KEEP, TTL_SET, VLAN_SET};
use relay_common::kernel::{FLOW_SLOTS, KernelPlan, KnownFlow, Queued};
use relay_common::{IngressConfig, TAG_NONE, XdpCounter};
use relay_ebpf::packet::Packet;
use relay_ebpf::parse::Flow;
use relay_ebpf::sum::{fold, source_is_multicast, udp_sent};

/// Never 0, so that an empty place is of no generation.
#[btf_map]
static GENERATION: Array<u32, 1> = Array::new();
#[btf_map]
static FLOWS: PerCpuArray<KnownFlow, { FLOW_SLOTS as usize }> = PerCpuArray::new();

/// [`carry`]: the packet is as it was.
const NOT_CARRIED: u32 = u32::MAX;
const IPV4_AT: usize = 14;
const UDP_AT: usize = 34;
const UDP_LEN: u32 = 8;
/// A multiple of it is summed by the kernel's helper, what is left word by word.
const BLOCK: u32 = 128;
/// Longer than any datagram of the kernel path (`MAX_LINEAR_L3_LEN`), in blocks.
const MAX_BLOCKS: u32 = 28;
/// Ethertype IPv4, and UDP behind a TTL, as they stand in memory.
const IPV4: u16 = 0x0800_u16.to_be();
const UDP: u32 = 17 << 8;
/// "More fragments" and the offset, in the word that has the identification before them.
const FRAGMENT: u32 = 0xff3f_0000;

/// The generation, to be read before the tables are.
#[inline(always)]
pub(crate) fn generation() -> u32 {
    GENERATION.get(0).copied().unwrap_or(0)
}

#[inline(always)]
fn place(src: u32, dst: u32, port: u32) -> u32 {
    (dst ^ src.rotate_left(16) ^ port << 8).wrapping_mul(0x9e37_79b1) >> (32 - FLOW_SLOTS.ilog2())
}

/// Remembers what the long way has found, if [`carry`] can do it.
#[inline(always)]
pub(crate) fn remember(generation: u32, config: &IngressConfig, ifindex: u32, flow: &Flow, plan: &KernelPlan, number: u32) {
    if flow.family != 4 || flow.tag != TAG_NONE || plan.flags != 0 || plan.only.edit.vlan_mode == VLAN_SET {
        return;
    }
    let src = flow.src[0];
    if config.own4.contains(&src) || source_is_multicast(src, 4) {
        return;
    }
    let (dst, port) = (flow.dst[0], flow.port.to_be());
    if let Some(known) = FLOWS.get_ptr_mut(place(src, dst, u32::from(port))) {
        let port = u32::from(port);
        // SAFETY: a lookup that is not null is this CPU's own element; programs on one CPU don't interleave here.
        unsafe { *known = KnownFlow { generation, ifindex, src, dst, port, plan: number, interface: config.slot, zero: 0 } };
    }
}

/// Carries the packet, if it is of a flow that is known and nothing about it is odd: the XDP action.
#[inline(always)]
pub(crate) fn carry(ctx: &XdpContext) -> Option<u32> {
    let md: *mut xdp_md = ctx.as_ptr().cast();
    let action = relay_known(md);
    (action != NOT_CARRIED).then_some(action)
}

/// Looked at by the verifier by itself.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn relay_known(md: *mut xdp_md) -> u32 {
    known(&XdpContext::new(md)).unwrap_or(NOT_CARRIED)
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
        let datagram = UDP_LEN..=self.l3_len().saturating_sub(20);
        self.ethertype == IPV4
            && self.ip0 & 0xff == 0x45
            && self.ip1 & FRAGMENT == 0
            && self.ip2 & 0xff00 == UDP
            && self.l3_len() + IPV4_AT as u32 <= len
            && datagram.contains(&self.udp_len())
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
    fn port(&self) -> u32 {
        self.ports >> 16
    }
}

#[inline(always)]
fn known(ctx: &XdpContext) -> Option<u32> {
    let packet = Packet::new(ctx);
    let at = packet.place::<{ UDP_AT + 8 }>(0)?.cast::<Headers>();
    // SAFETY: `at` is 42 bytes within the packet, as many as there are headers; the type asks for no alignment.
    let old = unsafe { *at };
    let len = packet.len();
    if !packet.is_linear(len) || !old.is_plain(len) {
        return None;
    }
    let flow = FLOWS.get(place(old.src, old.dst, old.port()))?;
    let is_it = flow.src == old.src && flow.dst == old.dst && flow.port == old.port();
    if !is_it || flow.generation != generation() || flow.ifindex != ctx.ingress_ifindex() as u32 {
        return None;
    }
    let plan = kernel::plan_of(flow.plan)?;
    if (old.ip2 & 0xff) < plan.min_ttl || old.l3_len() > plan.max_l3_len {
        return None;
    }
    if old.checksum() != 0 && fold(old.pseudo() + datagram_sum(&packet, old.udp_len())?) != 0xffff {
        return None;
    }
    let output = &plan.only;
    let action = kernel::redirect(output)?;
    // SAFETY: as above; nothing has moved the packet.
    unsafe { *at = rewritten(&old, plan) };
    kernel::count_rule(plan.slot, len);
    program::count(flow.interface, XdpCounter::Kernel, len);
    outcome::entered(output.device, Queued { slot: output.slot, serial: plan.serial, len });
    Some(action)
}

/// The same bytes as `rewrite::rewrite` leaves there.
#[inline(always)]
fn rewritten(old: &Headers, plan: &KernelPlan) -> Headers {
    let edit = &plan.only.edit;
    let set = |flag: u16| edit.flags & flag != 0;
    let word = |bytes: &[u8; 16]| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let mut new = *old;
    if set(SET_SRC) {
        new.src = word(&edit.src);
    }
    if set(SET_DST) {
        new.dst = word(&edit.dst);
    }
    if set(SET_SPORT) {
        new.ports = new.ports & 0xffff_0000 | u32::from(edit.sport.to_be());
    }
    if set(SET_DPORT) {
        new.ports = new.ports & 0xffff | u32::from(edit.dport.to_be()) << 16;
    }
    if set(SET_DSCP) {
        new.ip0 = new.ip0 & 0xffff_03ff | u32::from(edit.dscp) << 10;
    }
    let ttl = match edit.ttl_mode {
        TTL_SET => edit.ttl.into(),
        TTL_KEEP => old.ip2 & 0xff,
        _ => (old.ip2 & 0xff) - 1,
    };
    new.ip2 = ttl | UDP;
    let sum = u64::from(new.ip0) + u64::from(new.ip1) + u64::from(new.ip2) + u64::from(new.src) + u64::from(new.dst);
    new.ip2 |= u32::from(!fold(sum)) << 16;
    if old.checksum() != 0 {
        let changed = change(old.src, new.src) + change(old.dst, new.dst) + change(old.ports, new.ports);
        let sum = udp_sent(!fold(u64::from(!old.checksum()) + changed));
        new.udp1 = old.udp1 & 0xffff | u32::from(sum) << 16;
    }
    let [d0, d1, d2, d3, d4, d5] = edit.dst_mac;
    let [s0, s1, s2, s3, s4, s5] = edit.src_mac;
    let fixed = u64::from_ne_bytes([d0, d1, d2, d3, d4, d5, s0, s1]);
    // 01:00:5e and the low 23 bits of the group.
    let group = 0x5e_0001 | u64::from(new.dst >> 8 & 0x00ff_ff7f) << 24 | fixed & 0xffff_0000_0000_0000;
    new.macs = if set(SET_DST_MAC) { fixed } else { group };
    new.mac_end = u32::from_ne_bytes([s2, s3, s4, s5]);
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
    if len >= MAX_BLOCKS * BLOCK {
        return None;
    }
    let mut sum = 0;
    for number in 0..MAX_BLOCKS {
        if (number + 1) * BLOCK > len {
            break;
        }
        let block = packet.place_at::<[u8; BLOCK as usize]>(UDP_AT + (number * BLOCK) as usize)?;
        // SAFETY: the block lies within the packet, and the helper only reads it.
        let more = unsafe { helpers::bpf_csum_diff(core::ptr::null_mut(), 0, block.cast(), BLOCK, 0) };
        if more < 0 {
            return None;
        }
        sum += more as u64;
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
