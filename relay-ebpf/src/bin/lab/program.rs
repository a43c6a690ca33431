//! The programs of benchmarks and tests: counted drop and pass, bare redirects, a packet generator.
//!
//! Must never be attached by the relay itself.
#![expect(unsafe_code, reason = "exported names and sections; map values are borrowed from the kernel")]

use aya_ebpf::{
    bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX},
    btf_maps::{Array, DevMap, PerCpuArray, XskMap},
    helpers::bpf_ktime_get_ns,
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use relay_common::{
    CounterValue,
    lab::{CATCH_UP_NS, LAB_SLOTS, Pace, TEMPLATE_LEN, Template},
};
use relay_ebpf::{
    packet::{self, Packet},
    parse,
};

/// Packets and bytes that any program of this object has handled.
#[btf_map]
static LAB_COUNT: PerCpuArray<CounterValue, 1> = PerCpuArray::new();
#[btf_map]
static LAB_DEVICES: DevMap<{ LAB_SLOTS as usize }> = DevMap::new();
#[btf_map]
static LAB_XSKS: XskMap<{ LAB_SLOTS as usize }> = XskMap::new();
#[btf_map]
static LAB_TEMPLATE: Array<Template, 1> = Array::new();
#[btf_map]
static LAB_PACE: Array<Pace, 1> = Array::new();
/// Next sequence number of each CPU.
#[btf_map]
static LAB_SEQUENCE: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Counts and drops: the ceiling of a generator.
#[xdp(frags)]
fn lab_drop(ctx: XdpContext) -> u32 {
    count(&ctx);
    XDP_DROP
}

/// Counts and passes: what the kernel makes of it costs nothing extra.
#[xdp(frags)]
fn lab_count_pass(ctx: XdpContext) -> u32 {
    count(&ctx);
    XDP_PASS
}

/// Sends every packet out of device 0 as it is; passes it where no device is set.
#[xdp(frags)]
fn lab_redirect(ctx: XdpContext) -> u32 {
    count(&ctx);
    LAB_DEVICES.redirect(0, u64::from(XDP_PASS)).unwrap_or_else(|action| action)
}

/// Hands every UDP packet to the socket of its queue: the bare AF_XDP loop.
#[xdp(frags)]
fn lab_xsk(ctx: XdpContext) -> u32 {
    let packet = Packet::new(&ctx);
    let len = packet.len();
    if parse::flow(&packet, len).is_err() {
        return XDP_PASS;
    }
    packet::add(LAB_COUNT.get_ptr_mut(0), len);
    LAB_XSKS.redirect(ctx.rx_queue_index(), u64::from(XDP_PASS)).unwrap_or_else(|action| action)
}

/// Writes the template over the (recycled) packet of a test run, with the next sequence number, and sends it, if one is due.
#[xdp(frags)]
fn lab_generate(ctx: XdpContext) -> u32 {
    if !is_due() {
        return XDP_DROP;
    }
    if generate(&ctx).is_none() {
        return XDP_ABORTED;
    }
    count(&ctx);
    XDP_TX
}

/// One packet every interval; one thread generates at a time.
#[inline(always)]
fn is_due() -> bool {
    let Some(pace) = LAB_PACE.get_ptr_mut(0) else { return false };
    // SAFETY: a non-null lookup in an array is its element; no other program writes it while a test run does.
    let pace = unsafe { &mut *pace };
    if pace.interval_ns == 0 {
        return true;
    }
    // SAFETY: the helper has no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    if now < pace.next_ns || now >= pace.until_ns {
        return false;
    }
    let late = now - pace.next_ns > CATCH_UP_NS;
    pace.next_ns = if late { now } else { pace.next_ns } + pace.interval_ns;
    true
}

#[inline(always)]
fn generate(ctx: &XdpContext) -> Option<()> {
    let template = LAB_TEMPLATE.get(0)?;
    packet::store::<TEMPLATE_LEN>(ctx, 0, &template.bytes, template.len).then_some(())?;
    if template.sequence_offset == 0 {
        return Some(());
    }
    let sequence = next_sequence()?;
    packet::store::<8>(ctx, template.sequence_offset, &sequence.to_be_bytes(), 8).then_some(())?;
    if template.checksum_offset == 0 {
        return Some(());
    }
    let checksum = adjusted(template.checksum as u16, sequence).to_be_bytes();
    packet::store::<2>(ctx, template.checksum_offset, &checksum, 2).then_some(())
}

#[inline(always)]
fn next_sequence() -> Option<u64> {
    let next = LAB_SEQUENCE.get_ptr_mut(0)?;
    // SAFETY: a non-null lookup in a per-CPU array is this CPU's own element.
    let next = unsafe { &mut *next };
    let sequence = *next;
    *next += 1;
    Some(sequence)
}

/// RFC 1624: the checksum after eight zero bytes at an even offset became `sequence`. 0 is sent as 0xffff (RFC 768).
#[inline(always)]
fn adjusted(checksum: u16, sequence: u64) -> u16 {
    let words = (sequence & 0xffff) + (sequence >> 16 & 0xffff) + (sequence >> 32 & 0xffff) + (sequence >> 48);
    let sum = u64::from(!checksum) + words;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    match !(sum as u16) {
        0 => 0xffff,
        checksum => checksum,
    }
}

#[inline(always)]
fn count(ctx: &XdpContext) {
    packet::add(LAB_COUNT.get_ptr_mut(0), Packet::new(ctx).len());
}

/// The kernel grants the helpers used here to GPL-compatible programs alone.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
