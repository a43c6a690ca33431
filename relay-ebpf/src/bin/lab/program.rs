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
    lab::{CATCH_UP_NS, FLOW_STEP, LAB_SLOTS, Pace, SILENCE_NS, SILENCES, Silence, TEMPLATE_LEN, Template, VARY_GROUP},
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

#[btf_map]
static LAB_SILENCES: Array<Silence, { SILENCES as usize }> = Array::new();
/// The flow of each CPU's last packet.
#[btf_map]
static LAB_FLOW: PerCpuArray<u32, 1> = PerCpuArray::new();

/// Counts and drops: the ceiling of a generator.
#[xdp(frags)]
fn lab_drop(ctx: XdpContext) -> u32 {
    count(&ctx);
    XDP_DROP
}

/// Counts and drops, and notes for how long nothing came. For a device with one queue: its packets come one after the other.
#[xdp(frags)]
fn lab_silence(ctx: XdpContext) -> u32 {
    count(&ctx);
    // SAFETY: the helper has no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: a non-null lookup in an array is its element; no other program writes it meanwhile.
    let Some(last) = LAB_SILENCES.get_ptr_mut(0).map(|last| unsafe { &mut *last }) else { return XDP_DROP };
    let silence = Silence { begin_ns: last.begin_ns, len_ns: now - last.begin_ns };
    if last.begin_ns != 0 && silence.len_ns > SILENCE_NS {
        last.len_ns += 1;
        if let Some(place) = LAB_SILENCES.get_ptr_mut(last.len_ns as u32) {
            // SAFETY: as above.
            unsafe { *place = silence };
        }
    }
    last.begin_ns = now;
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
    let mut sum = 0;
    if template.sequence_offset != 0 {
        sum += number(ctx, template.sequence_offset, next_sequence()?)?;
    }
    if template.stamp_offset != 0 {
        sum += number(ctx, template.stamp_offset, stamp()?)?;
    }
    if template.flows > 1 {
        sum += flow(ctx, template)?;
    }
    if template.checksum_offset == 0 {
        return Some(());
    }
    let checksum = adjusted(template.checksum as u16, sum).to_be_bytes();
    packet::store::<2>(ctx, template.checksum_offset, &checksum, 2).then_some(())
}

/// Writes it over eight zero bytes; the sum of its words.
#[inline(always)]
fn number(ctx: &XdpContext, offset: u32, value: u64) -> Option<u64> {
    packet::store::<8>(ctx, offset, &value.to_be_bytes(), 8).then_some(())?;
    Some((value & 0xffff) + (value >> 16 & 0xffff) + (value >> 32 & 0xffff) + (value >> 48))
}

/// Makes the packet the next flow's; what that adds to its UDP checksum's sum.
#[inline(always)]
fn flow(ctx: &XdpContext, template: &Template) -> Option<u64> {
    let last = LAB_FLOW.get_ptr_mut(0)?;
    // SAFETY: a non-null lookup in a per-CPU array is this CPU's own element.
    let last = unsafe { &mut *last };
    *last = last.wrapping_add(FLOW_STEP).checked_rem(template.flows)?;
    let packet = &template.bytes;
    if template.vary != VARY_GROUP {
        let old = u16::from_be_bytes([packet[34], packet[35]]);
        let new = old.wrapping_add(*last as u16);
        packet::store::<2>(ctx, 34, &new.to_be_bytes(), 2).then_some(())?;
        return Some(u64::from(!old) + u64::from(new));
    }
    let old = u32::from_be_bytes([packet[30], packet[31], packet[32], packet[33]]);
    let new = old.wrapping_add(*last);
    let change = u64::from(!(old >> 16) as u16) + u64::from(!old as u16) + u64::from(new >> 16) + u64::from(new & 0xffff);
    let [_, b, c, d] = new.to_be_bytes();
    packet::store::<4>(ctx, 30, &new.to_be_bytes(), 4).then_some(())?;
    packet::store::<3>(ctx, 3, &[b & 0x7f, c, d], 3).then_some(())?;
    let header = adjusted(u16::from_be_bytes([packet[24], packet[25]]), change).to_be_bytes();
    packet::store::<2>(ctx, 24, &header, 2).then_some(())?;
    Some(change)
}

/// The time, as the last thing before it is written.
#[inline(always)]
fn stamp() -> Option<u64> {
    let clock = LAB_PACE.get(0)?.clock_ns;
    // SAFETY: the helper has no arguments.
    Some(unsafe { bpf_ktime_get_ns() }.wrapping_add(clock))
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

/// RFC 1624: the checksum after zero bytes at even offsets became words of this sum. 0 is sent as 0xffff (RFC 768).
#[inline(always)]
fn adjusted(checksum: u16, words: u64) -> u16 {
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
