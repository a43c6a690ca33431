//! The kernel path: a rule's packets sent on from here, without any process (`relay_common::kernel` has the tables).
//!
//! A plan with one ready output: the packet is rewritten at once and redirected. With several: it goes to all of them by one
//! broadcast, and [`relay_egress`] rewrites each copy on its way into the device's queue. Everything that an output drops is
//! decided and counted at ingress; the egress program repeats the decision. All devmap entries carry the same egress program
//! or none, since a device's bulk queue keeps the first packet's. What is sent is counted by module `outcome`, which is told
//! of every redirect. Must never pass a packet of a rule it takes.
#![expect(unsafe_code, reason = "map values are borrowed from the kernel, packet memory is written by address")]

use crate::outcome;
use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_BROADCAST, BPF_NOEXIST, xdp_action::*, xdp_md},
    btf_maps::{Array, ArrayOfMaps, DevMap, HashMap, PerCpuArray, PerCpuHashMap},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use relay_common::edit::{Edit, TTL_KEEP, TTL_SET};
use relay_common::kernel::*;
use relay_common::{CounterValue, IngressConfig, SourceVerdict};
use relay_ebpf::packet::{self, Packet};
use relay_ebpf::rewrite::rewrite;
use relay_ebpf::sum::{self, Buffer, Header};

/// 1 + the plan in force for a rule slot; 0: the rule's packets are a socket's. Per CPU, since the kernel writes the words of
/// such a map as a whole.
#[btf_map]
static RULE_PLANS: PerCpuArray<u64, { MAX_RULE_SLOTS as usize }> = PerCpuArray::new();
#[btf_map]
static PLANS: Array<KernelPlan, { MAX_PLANS as usize }> = Array::new();
#[btf_map]
static OUTPUTS: Array<KernelOutput, { MAX_PLAN_OUTPUTS as usize }> = Array::new();
/// The inner map's size here is only an example: each plan's has an entry for each ready output.
#[btf_map]
static BROADCASTS: ArrayOfMaps<DevMap<1>, { MAX_PLANS as usize }> = ArrayOfMaps::new();
#[btf_map]
static DEVICES: DevMap<{ MAX_DEVICES as usize }> = DevMap::new();
#[btf_map]
static PLAN_DEVICES: HashMap<PlanDevice, u64, { MAX_PLAN_OUTPUTS as usize }> = HashMap::new();
#[btf_map]
static RULE_RX: PerCpuArray<CounterValue, { MAX_RULE_SLOTS as usize }> = PerCpuArray::new();
/// `BPF_F_NO_PREALLOC`: drops are rare.
#[btf_map]
static KERNEL_DROPS: PerCpuHashMap<DropKey, CounterValue, { MAX_DROP_KEYS as usize }, 1> = PerCpuHashMap::new();
#[btf_map]
static SUM_BUFFER: PerCpuArray<Buffer, 1> = PerCpuArray::new();
/// What a counter starts with. (A value on the stack would be cleared byte by byte.)
static NOTHING: CounterValue = CounterValue { packets: 0, bytes: 0 };

/// Why a rule's packet goes nowhere (`DropReason`), or nothing: its outputs have it, or have counted it.
type Fate = Result<u32, u16>;

/// The plan of a rule, if the kernel path carries it.
#[inline(always)]
pub(crate) fn plan(rule: &SourceVerdict) -> Option<&'static KernelPlan> {
    // SAFETY: this CPU's word, written by user space as a whole.
    let number = unsafe { *RULE_PLANS.get_ptr(rule.slot)? };
    if number == 0 {
        return None;
    }
    // A plan is written before the word that names it, and not again before every program that has seen the word has ended.
    let plan = PLANS.get(number as u32 - 1)?;
    (plan.slot == rule.slot && plan.serial == rule.serial).then_some(plan)
}

/// Chooses an output's device, if there is one: the XDP action.
#[inline(always)]
pub(crate) fn redirect(device: u32) -> Option<u32> {
    DEVICES.redirect(device, u64::from(XDP_DROP)).ok()
}

/// A rule has taken packets.
#[inline(always)]
pub(crate) fn count_rule(slot: u32, count: u32, len: u32) {
    packet::add_all(RULE_RX.get_ptr_mut(slot), count, len);
}

/// Carries a packet: the XDP action.
#[inline(always)]
pub(crate) fn carry(ctx: &XdpContext, config: &IngressConfig, plan: &KernelPlan, number: u32, len: u32) -> u32 {
    count_rule(plan.slot, 1, len);
    let packet = Packet::new(ctx);
    let fate = if !is_tag(&packet, 12) {
        send::<14>(ctx, config, plan, number, len)
    } else if !is_tag(&packet, 16) {
        send::<18>(ctx, config, plan, number, len)
    } else {
        send::<22>(ctx, config, plan, number, len)
    };
    fate.unwrap_or_else(|reason| {
        drop_for_rule(plan, reason, len);
        XDP_DROP
    })
}

/// The number of a plan found by [`plan`].
#[inline(always)]
pub(crate) fn number(rule: &SourceVerdict) -> u32 {
    // SAFETY: as in `plan`.
    RULE_PLANS.get_ptr(rule.slot).map_or(0, |word| unsafe { *word } as u32).wrapping_sub(1)
}

#[inline(always)]
fn is_tag(packet: &Packet, at: usize) -> bool {
    matches!(packet.bytes::<2>(at), Some([0x81, 0x00] | [0x88, 0xa8]))
}

#[inline(always)]
fn send<const L3: usize>(ctx: &XdpContext, config: &IngressConfig, plan: &KernelPlan, number: u32, len: u32) -> Fate {
    if plan.family == 4 { send_as::<L3, 4>(ctx, config, plan, number, len) } else { send_as::<L3, 6>(ctx, config, plan, number, len) }
}

#[inline(always)]
fn send_as<const L3: usize, const FAMILY: u8>(ctx: &XdpContext, config: &IngressConfig, plan: &KernelPlan, number: u32, len: u32) -> Fate {
    let buffer = SUM_BUFFER.get_ptr_mut(0).ok_or(TOO_BIG)?;
    let header = if FAMILY == 4 { sum::ipv4::<L3>(ctx, buffer)? } else { sum::ipv6::<L3>(ctx)? };
    if is_own::<FAMILY>(config, &header) {
        return Err(OWN_SOURCE);
    }
    sum::inspect::<L3>(ctx, &header, FAMILY, len, buffer)?;
    if plan.flags & PLAN_BLOCKED != 0 || header.ttl < plan.min_ttl || header.l3_len > plan.max_l3_len {
        if look_at_each(number, header.ttl, header.l3_len, len, 0) == 0 {
            return Ok(XDP_DROP);
        }
    }
    if plan.flags & PLAN_SEVERAL != 0 {
        return Ok(broadcast::<L3, FAMILY>(ctx, plan, number, &header, len));
    }
    Ok(send_only::<L3, FAMILY>(ctx, plan, &plan.only, len))
}

/// A packet from one of the interface's own addresses has come round in a loop.
#[inline(always)]
fn is_own<const FAMILY: u8>(config: &IngressConfig, header: &Header) -> bool {
    if FAMILY == 4 {
        return config.own4.iter().any(|own| *own == header.src[0]) && header.src[0] != 0;
    }
    config.own6.iter().any(|own| *own == header.src) && header.src[0] != 0
}

/// Why an output does not get a packet, as far as that is known before it is copied.
#[inline(always)]
pub(crate) fn refusal(output: &KernelOutput, ttl: u32, l3_len: u32) -> Option<u16> {
    if output.blocked != 0 {
        return Some(output.blocked as u16 - 1);
    }
    let left = match output.edit.ttl_mode {
        TTL_SET => 1,
        TTL_KEEP => ttl,
        _ => ttl.saturating_sub(1),
    };
    if left == 0 {
        return Some(TTL_EXPIRED);
    }
    (output.edit.mtu != 0 && l3_len > output.edit.mtu).then_some(MTU_EXCEEDED)
}

/// Counts the packet for every output that does not get it; how many get it. `lost`: not even those do.
///
/// A function that the verifier looks at by itself (it is exported, and takes numbers alone): its loop would else be walked
/// once for every way to it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn look_at_each(number: u32, ttl: u32, l3_len: u32, len: u32, lost: u32) -> u32 {
    let Some(plan) = PLANS.get(number) else { return 0 };
    let mut sent = 0;
    for index in 0..MAX_OUTPUTS_OF_PLAN {
        if index >= plan.output_count {
            break;
        }
        let Some(output) = OUTPUTS.get(plan.first_output + index) else { break };
        let _ = match refusal(output, ttl, l3_len) {
            Some(reason) => drop_for_output(output.slot, plan.serial, reason, len),
            None if lost != 0 => drop_for_output(output.slot, plan.serial, SEND_FAILED, len),
            None => {
                sent += 1;
                0
            }
        };
    }
    sent
}

/// Rewrites the packet and sends it. The device first: where there is none, nothing has been changed.
#[inline(always)]
fn send_only<const L3: usize, const FAMILY: u8>(ctx: &XdpContext, plan: &KernelPlan, output: &KernelOutput, len: u32) -> u32 {
    let Some(action) = redirect(output.device) else {
        outcome::refused(output.device, &counted(output, plan.serial, len), 1);
        return XDP_DROP;
    };
    if !rewrite::<L3, FAMILY>(ctx, &output.edit) {
        drop_for_output(output.slot, plan.serial, NO_HEADROOM, len);
        return XDP_DROP;
    }
    outcome::entered(output.device, counted(output, plan.serial, sent_len(ctx)));
    action
}

/// A packet for an output that its rule and its interface have counted.
#[inline(always)]
pub(crate) fn counted(output: &KernelOutput, serial: u32, len: u32) -> Queued {
    Queued { owner: output.slot | NO_OWNER << 16, serial, len }
}

#[inline(always)]
fn sent_len(ctx: &XdpContext) -> u32 {
    (ctx.data_end() - ctx.data()) as u32
}

/// Writes the ticket and sends the packet to every ready output.
#[inline(always)]
fn broadcast<const L3: usize, const FAMILY: u8>(ctx: &XdpContext, plan: &KernelPlan, number: u32, header: &Header, len: u32) -> u32 {
    let Some(devices) = BROADCASTS.get(number) else { return lose_all(number, header, len) };
    let Some(place) = Packet::new(ctx).place::<26>(0) else { return lose_all(number, header, len) };
    if devices.redirect(EVERY_DEVICE, u64::from(BPF_F_BROADCAST)).is_err() {
        return lose_all(number, header, len);
    }
    let flags = ((L3 - 14) / 4) as u8;
    let sequence = outcome::expect(plan, header.ttl, header.l3_len, len);
    let ticket = Ticket { first_output: plan.first_output, zero: 0, mark: TICKET_MARK, flags, sequence };
    // SAFETY: `place` is 26 bytes within the packet, and a ticket has 12.
    unsafe { place.cast::<Ticket>().write_unaligned(ticket) };
    XDP_REDIRECT
}

/// No output of a broadcast can be reached: each counts it. Those that would not have got the packet anyway have counted it
/// before where they had to.
#[inline(always)]
fn lose_all(number: u32, header: &Header, len: u32) -> u32 {
    look_at_each(number, header.ttl, header.l3_len, len, 1);
    XDP_DROP
}

#[inline(always)]
fn drop_for_rule(plan: &KernelPlan, reason: u16, len: u32) {
    drop_for(plan.slot, plan.serial, u32::from(DROP_OF_RULE) << 16 | u32::from(reason), 1, len);
}

#[inline(always)]
fn drop_for_output(slot: u32, serial: u32, reason: u16, len: u32) -> u32 {
    drop_for(slot, serial, u32::from(DROP_OF_OUTPUT) << 16 | u32::from(reason), 1, len)
}

/// Counts drops; `why`: kind and reason. Looked at by itself, as [`look_at_each`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn drop_for(slot: u32, serial: u32, why: u32, count: u32, len: u32) -> u32 {
    let key = DropKey { slot, serial, kind: (why >> 16) as u16, reason: why as u16 };
    if KERNEL_DROPS.get_ptr(&key).is_none() {
        // Somebody else may have been first; full is full, and then the sums show it.
        let _ = KERNEL_DROPS.insert(&key, &NOTHING, u64::from(BPF_NOEXIST));
    }
    packet::add_all(KERNEL_DROPS.get_ptr_mut(&key), count, len);
    0
}

/// An output of a plan.
#[inline(always)]
pub(crate) fn output(number: u32) -> Option<&'static KernelOutput> {
    OUTPUTS.get(number)
}

/// Runs on every packet that enters a device's queue through an entry that carries it: rewrites copies, passes what
/// [`send_only`] has rewritten already.
#[xdp(frags, map = "devmap")]
fn relay_egress(ctx: XdpContext) -> u32 {
    outcome::ran();
    let md: *mut xdp_md = ctx.as_ptr().cast();
    // SAFETY: the context this program was called with.
    let ifindex = unsafe { (*md).egress_ifindex };
    let Some(place) = Packet::new(&ctx).place::<12>(0) else { return XDP_DROP };
    // SAFETY: `place` is 12 bytes within the packet.
    let ticket = unsafe { place.cast::<Ticket>().read_unaligned() };
    if ticket.mark != TICKET_MARK {
        outcome::passed_on(ifindex);
        return XDP_PASS;
    }
    // Not redeemed: found at the end of the NAPI turn.
    let Some((output, serial)) = redeem(&ticket, ifindex) else { return XDP_DROP };
    match ticket.flags & TICKET_TAGS {
        0 => finish::<14>(&ctx, output, serial),
        1 => finish::<18>(&ctx, output, serial),
        _ => finish::<22>(&ctx, output, serial),
    }
}

/// The output a copy is for, the first on this device that no other copy of the packet has taken; and its rule's serial.
#[inline(always)]
fn redeem(ticket: &Ticket, ifindex: u32) -> Option<(&'static KernelOutput, u32)> {
    let key = PlanDevice { first_output: ticket.first_output, ifindex };
    // SAFETY: an entry is written before its plan and removed long after.
    let mask = *unsafe { PLAN_DEVICES.get(key) }?;
    let copies = outcome::copies(ticket.sequence)?;
    let left = mask & !copies.taken;
    if left == 0 {
        return None;
    }
    copies.taken |= left & left.wrapping_neg();
    Some((OUTPUTS.get(ticket.first_output + lowest_bit(left))?, copies.serial))
}

/// Place of the lowest bit; BPF has no instruction for it.
#[inline(always)]
fn lowest_bit(bits: u64) -> u32 {
    let bit = bits & bits.wrapping_neg();
    let mut place = 0;
    for (step, mask) in [
        (32, 0xffff_ffff_0000_0000_u64),
        (16, 0xffff_0000_ffff_0000),
        (8, 0xff00_ff00_ff00_ff00),
        (4, 0xf0f0_f0f0_f0f0_f0f0),
        (2, 0xcccc_cccc_cccc_cccc),
        (1, 0xaaaa_aaaa_aaaa_aaaa),
    ] {
        if bit & mask != 0 {
            place += step;
        }
    }
    place
}

#[inline(always)]
fn finish<const L3: usize>(ctx: &XdpContext, output: &KernelOutput, serial: u32) -> u32 {
    let before = sent_len(ctx);
    let Some((ttl, l3_len)) = ttl_and_len::<L3>(ctx, &output.edit) else { return unwritten(output, serial, before) };
    // Counted at ingress already.
    if refusal(output, ttl, l3_len).is_some() {
        return XDP_DROP;
    }
    let written = if output.edit.family == 4 { rewrite::<L3, 4>(ctx, &output.edit) } else { rewrite::<L3, 6>(ctx, &output.edit) };
    if !written {
        return unwritten(output, serial, before);
    }
    outcome::passed(counted(output, serial, sent_len(ctx)));
    XDP_PASS
}

#[inline(always)]
fn unwritten(output: &KernelOutput, serial: u32, len: u32) -> u32 {
    drop_for_output(output.slot, serial, NO_HEADROOM, len);
    XDP_DROP
}

#[inline(always)]
fn ttl_and_len<const L3: usize>(ctx: &XdpContext, edit: &Edit) -> Option<(u32, u32)> {
    let ip = Packet::new(ctx).bytes::<10>(L3)?;
    let length = |at: usize| u32::from(u16::from_be_bytes([ip[at], ip[at + 1]]));
    if edit.family == 4 { Some((u32::from(ip[8]), length(2))) } else { Some((u32::from(ip[7]), 40 + length(4))) }
}
