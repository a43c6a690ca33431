//! The production program: every packet of an ingress is redirected into a worker's socket, or carried by the kernel path
//! (module `kernel`), or passes, and is counted.
//!
//! Exactly one counter per packet. What no rule takes it must never drop: whatever is odd is the kernel's (invariant 7, fails
//! open).
#![expect(unsafe_code, reason = "exported names and sections; map values are borrowed from the kernel")]

use crate::{flow, kernel};
use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        xdp_action::{XDP_PASS, XDP_REDIRECT},
        xdp_md,
    },
    btf_maps::{HashMap, LpmTrie, PerCpuArray, XskMap, lpm_trie::Key},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use core::hint::black_box;
use relay_common::{
    COUNTER_SLOTS, IngressConfig, MAX_INTERFACES, MAX_MATCHES, MAX_QUEUES, MAX_SHAPES, MAX_SOURCES, META_MAGIC, MatchEntry, MatchKey,
    NO_CONFIG_SLOT, NO_SLOT, PORT_EXACT, RedirectMeta, SOURCE_KEY_BITS, Shape, SourceKey, SourceVerdict, TAG_EXACT, XdpCounter,
};
use relay_ebpf::{
    packet::{self, Packet},
    parse::{self, Flow},
};

#[btf_map]
static INGRESS: HashMap<u32, IngressConfig, { MAX_INTERFACES as usize }> = HashMap::new();
#[btf_map]
static MATCHES: HashMap<MatchKey, MatchEntry, { MAX_MATCHES as usize }> = HashMap::new();
#[btf_map]
static SOURCES: LpmTrie<SourceKey, SourceVerdict, { MAX_SOURCES as usize }> = LpmTrie::new();
#[btf_map]
static XSKS: XskMap<{ (MAX_INTERFACES * MAX_QUEUES) as usize }> = XskMap::new();
#[btf_map]
static COUNTERS: PerCpuArray<relay_common::CounterValue, { (COUNTER_SLOTS * XdpCounter::COUNT) as usize }> = PerCpuArray::new();

/// Parse, match, redirect, count.
#[xdp(frags)]
fn relay(ctx: XdpContext) -> u32 {
    flow::carry(&ctx).unwrap_or_else(|| relay_unknown(ctx.as_ptr().cast()))
}

/// Looked at by the verifier by itself.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn relay_unknown(md: *mut xdp_md) -> u32 {
    handle::<true>(&XdpContext::new(md))
}

/// The same without the kernel path, for a loader without CAP_PERFMON: the verifier refuses what the kernel path does then.
#[xdp(frags)]
fn relay_plain(ctx: XdpContext) -> u32 {
    handle::<false>(&ctx)
}

/// The same without the kernel path, for a kernel that refuses programs for packets in several buffers (before 5.18).
#[xdp]
fn relay_single(ctx: XdpContext) -> u32 {
    handle::<false>(&ctx)
}

#[inline(always)]
fn handle<const KERNEL: bool>(ctx: &XdpContext) -> u32 {
    let len = Packet::new(ctx).len();
    let ifindex = ctx.ingress_ifindex() as u32;
    // SAFETY: the supervisor writes an entry before it attaches and only replaces it as a whole; a torn read costs a PASS or a miss.
    let Some(config) = (unsafe { INGRESS.get(ifindex) }) else {
        count(NO_CONFIG_SLOT, XdpCounter::PassNoConfig, len);
        return XDP_PASS;
    };
    let (verdict, action) = decide::<KERNEL>(ctx, config, ifindex, len);
    count(config.slot, verdict, len);
    diagnose(ctx, ifindex, verdict);
    action
}

/// The counter of a packet and the action for it.
#[inline(always)]
fn decide<const KERNEL: bool>(ctx: &XdpContext, config: &IngressConfig, ifindex: u32, len: u32) -> (XdpCounter, u32) {
    let generation = if KERNEL { flow::generation() } else { 0 };
    let flow = match parse::flow(&Packet::new(ctx), len) {
        Ok(flow) => flow,
        Err(reason) => return (reason, XDP_PASS),
    };
    let rule = match find(config, &flow, ifindex) {
        Some(rule) => rule,
        None => return (XdpCounter::PassNoRule, XDP_PASS),
    };
    if rule.slot == NO_SLOT {
        return (XdpCounter::PassExcept, XDP_PASS);
    }
    if KERNEL
        && config.kernel != 0
        && let Some(plan) = kernel::plan(&rule)
    {
        let number = kernel::number(&rule);
        flow::remember(generation, config, ifindex, &flow, plan);
        return (XdpCounter::Kernel, kernel::carry(ctx, config, plan, number, len));
    }
    redirect(ctx, config.slot, rule)
}

/// The first shape that hits and names a rule, or an exception, decides.
///
/// Steps through the shapes by a constant, kept from the optimiser: indexing would add a number to the address, and
/// without CAP_PERFMON the verifier refuses that unless the number is the same each time; nor may the address ever
/// stand behind the last shape.
#[inline(always)]
fn find(config: &IngressConfig, flow: &Flow, ifindex: u32) -> Option<SourceVerdict> {
    let mut place = config.shapes.as_ptr();
    for index in 1..=MAX_SHAPES as u32 {
        if index > config.shape_count {
            return None;
        }
        // SAFETY: `place` is the address of shape `index - 1`, which is below MAX_SHAPES.
        if let Some(verdict) = probe(unsafe { *place }, flow, ifindex) {
            return Some(verdict);
        }
        if index < MAX_SHAPES as u32 {
            // SAFETY: shape `index` is below MAX_SHAPES.
            place = black_box(unsafe { place.add(1) });
        }
    }
    None
}

#[inline(always)]
fn probe(shape: Shape, flow: &Flow, ifindex: u32) -> Option<SourceVerdict> {
    if shape.family != flow.family {
        return None;
    }
    // SAFETY: an entry in use is never written in place (slots rest for two epochs), so a stale value is a valid one.
    by_source(unsafe { MATCHES.get(key(shape, flow, ifindex)) }?, flow)
}

#[inline(always)]
fn key(shape: Shape, flow: &Flow, ifindex: u32) -> MatchKey {
    let mut addr = [0; 16];
    for (index, word) in flow.dst.iter().enumerate() {
        let masked = (word & mask(shape.group_len, index as u32)).to_ne_bytes();
        addr[index * 4..index * 4 + 4].copy_from_slice(&masked);
    }
    let tag = if shape.tag_mode == TAG_EXACT { flow.tag } else { 0 };
    let port = if shape.port_mode == PORT_EXACT { flow.port } else { 0 };
    MatchKey { ifindex, tag, addr, port, zero: 0, shape }
}

/// The part of a prefix of `len` bits that falls into 32-bit word `index`, network order.
#[inline(always)]
fn mask(len: u8, index: u32) -> u32 {
    let bits = u32::from(len).saturating_sub(index * 32).min(32);
    ((u64::MAX << (32 - bits)) as u32).to_be()
}

/// `None`: this entry is not for that source, the next shape is asked.
#[inline(always)]
fn by_source(entry: &MatchEntry, flow: &Flow) -> Option<SourceVerdict> {
    if entry.source_set != 0 {
        let [a, b, c, d] = flow.src.map(u32::to_ne_bytes);
        let addr = [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]];
        let key = Key::new(SOURCE_KEY_BITS, SourceKey { set: entry.source_set.to_be_bytes(), addr });
        if let Some(verdict) = SOURCES.get(&key) {
            return Some(*verdict);
        }
    }
    (entry.slot != NO_SLOT).then_some(SourceVerdict { slot: entry.slot, serial: entry.serial })
}

/// Chooses the socket first (an empty slot leaves the packet as it came), then tells it the rule. Without room for
/// metadata the packet goes as it is, and user space matches again.
#[inline(always)]
fn redirect(ctx: &XdpContext, slot: u32, rule: SourceVerdict) -> (XdpCounter, u32) {
    let queue = ctx.rx_queue_index();
    if queue >= MAX_QUEUES || XSKS.redirect(slot * MAX_QUEUES + queue, u64::from(XDP_PASS)).is_err() {
        return (XdpCounter::PassNoSocket, XDP_PASS);
    }
    packet::put_metadata(ctx, RedirectMeta { magic: META_MAGIC, slot: rule.slot, serial: rule.serial, flags: 0 });
    (XdpCounter::Redirected, XDP_REDIRECT)
}

#[inline(always)]
fn count(slot: u32, counter: XdpCounter, len: u32) {
    count_all(slot, counter, 1, len);
}

#[inline(always)]
pub(crate) fn count_all(slot: u32, counter: XdpCounter, count: u32, len: u32) {
    packet::add_all(COUNTERS.get_ptr_mut(slot * XdpCounter::COUNT + counter as u32), count, len);
}

/// 1: [`diagnose`] logs. Written by the loader.
#[cfg(feature = "log")]
#[unsafe(no_mangle)]
static LOG: aya_ebpf::Global<u32> = aya_ebpf::Global::new(0);

/// One line for packets no healthy network sends. Never on the way of a good packet.
#[cfg(feature = "log")]
#[inline(always)]
fn diagnose(ctx: &XdpContext, ifindex: u32, verdict: XdpCounter) {
    if matches!(verdict, XdpCounter::PassMalformed | XdpCounter::PassTagDepth) && LOG.load() != 0 {
        let reason = if matches!(verdict, XdpCounter::PassMalformed) { "malformed" } else { "tag_depth" };
        aya_log_ebpf::info!(ctx, "passed a packet of interface {}: {}", ifindex, reason);
    }
}

#[cfg(not(feature = "log"))]
#[inline(always)]
fn diagnose(_ctx: &XdpContext, _ifindex: u32, _verdict: XdpCounter) {}

/// The kernel grants the helpers used here to GPL-compatible programs alone.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
