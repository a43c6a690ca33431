//! What becomes of the kernel path's packets after the redirect: sent, or refused by the kernel (`send_failed`).
//!
//! The kernel gathers redirected packets in a queue for each device and CPU, and at the latest at the end of a NAPI turn hands
//! them to the driver (`bq_xmit_all`), which takes a prefix and says how long it was. It tells of that, and of packets that it
//! refuses before, by tracepoints on the same CPU; copies of a broadcast that it leaves out (a device gone or down, no memory)
//! it doesn't tell of, so they are counted here. Other programs' redirects come to the same tracepoints, in other NAPI turns:
//! then nothing of ours is on its way. Must never count a packet that did not come through [`entered`], [`passed`] or [`expect`].
#![expect(unsafe_code, reason = "this CPU's own map elements are written; a field of a kernel structure is read")]

use crate::kernel::{count_rule, counted, drop_for, output, refusal};
use crate::{flow, program};
use aya_ebpf::{
    Global,
    bindings::bpf_map_type::BPF_MAP_TYPE_DEVMAP,
    btf_maps::{HashMap, PerCpuArray},
    helpers::bpf_probe_read_kernel,
    macros::{btf_map, raw_tracepoint},
    programs::RawTracePointContext,
};
use relay_common::kernel::*;
use relay_common::{CounterValue, XdpCounter};
use relay_ebpf::packet;

/// Where `struct net_device` has its `ifindex`, from the kernel's BTF. Written by the loader.
#[unsafe(no_mangle)]
static IFINDEX_AT: Global<u32> = Global::new(0);

#[btf_map]
static OUTPUT_TX: PerCpuArray<CounterValue, { MAX_OUTPUT_SLOTS as usize }> = PerCpuArray::new();
/// Packets refused by device.
#[btf_map]
static REFUSED: PerCpuArray<u64, { MAX_DEVICES as usize }> = PerCpuArray::new();
/// The place in `DEVICES` by interface.
#[btf_map]
static DEVICE_OF: HashMap<u32, u32, { MAX_DEVICES as usize * 4 }> = HashMap::new();
/// Packets with one output on their way into a device. Those that took the short way are counted when they leave it: a batch of
/// packets that are alike costs what one does.
#[btf_map]
static QUEUES: PerCpuArray<Queue, { MAX_DEVICES as usize }> = PerCpuArray::new();
/// Packets that the egress program has passed since the last driver call.
#[btf_map]
static PASSED: PerCpuArray<Queue, 1> = PerCpuArray::new();
/// Packets that it has seen since then.
#[btf_map]
static RAN: PerCpuArray<u64, 1> = PerCpuArray::new();
#[btf_map]
static COPIES: PerCpuArray<Copies, { COPIES_SLOTS as usize }> = PerCpuArray::new();
#[btf_map]
static SPAN: PerCpuArray<Span, 1> = PerCpuArray::new();
/// Devices lately handed to their drivers, by the low bits of their addresses: asking the kernel and the table takes longer than
/// all the rest.
#[btf_map]
static LATELY: PerCpuArray<Lately, { LATELY_SLOTS as usize }> = PerCpuArray::new();

/// This CPU's own element: programs on one CPU don't interleave here, so it is borrowed by one of them at a time.
#[inline(always)]
fn own<T>(element: Option<*mut T>) -> Option<&'static mut T> {
    // SAFETY: as above; a lookup that is not null is an element of the map, which lives as long as the program.
    element.map(|element| unsafe { &mut *element })
}

#[inline(always)]
fn push(queue: &mut Queue, packet: Queued) {
    let last = &mut queue.batches[(queue.head.wrapping_sub(1) & (QUEUE_SLOTS - 1)) as usize];
    if last.count != 0 && last.packet == packet {
        last.count += 1;
        return;
    }
    queue.batches[(queue.head & (QUEUE_SLOTS - 1)) as usize] = Batch { packet, count: 1 };
    queue.head = queue.head.wrapping_add(1);
}

/// The next packet, and how many like it come with it: `most` at most.
#[inline(always)]
fn take(queue: &mut Queue, most: u32) -> Option<(Queued, u32)> {
    if queue.tail == queue.head {
        return None;
    }
    let batch = &mut queue.batches[(queue.tail & (QUEUE_SLOTS - 1)) as usize];
    let count = batch.count.min(most);
    batch.count -= count;
    if batch.count == 0 {
        queue.tail = queue.tail.wrapping_add(1);
    }
    Some((batch.packet, count))
}

/// A packet is redirected to a device.
#[inline(always)]
pub(crate) fn entered(device: u32, packet: Queued) {
    if let Some(queue) = own(QUEUES.get_ptr_mut(device)) {
        push(queue, packet);
    }
}

/// The egress program runs for a packet.
#[inline(always)]
pub(crate) fn ran() {
    if let Some(ran) = own(RAN.get_ptr_mut(0)) {
        *ran += 1;
    }
}

/// The egress program passes a copy.
#[inline(always)]
pub(crate) fn passed(packet: Queued) {
    if let Some(queue) = own(PASSED.get_ptr_mut(0)) {
        push(queue, packet);
    }
}

/// The egress program passes the next packet that [`entered`].
#[inline(always)]
pub(crate) fn passed_on(ifindex: u32) {
    if let Some(device) = device_of(ifindex)
        && let Some((packet, _)) = own(QUEUES.get_ptr_mut(device)).and_then(|queue| take(queue, 1))
    {
        passed(packet);
    }
}

#[inline(always)]
fn device_of(ifindex: u32) -> Option<u32> {
    // SAFETY: a word, written as a whole.
    unsafe { DEVICE_OF.get(ifindex) }.copied()
}

/// Counts packets that the kernel did not send.
#[inline(always)]
pub(crate) fn refused(device: u32, packet: &Queued, count: u32) {
    count_refused(device, packet.owner, packet.serial, packet.len, count);
}

/// Looked at by itself, as `kernel::look_at_each`: inlined, it made the loop over a queue cost the verifier 0.4 s a start.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn count_refused(device: u32, owner: u32, serial: u32, len: u32, count: u32) -> u32 {
    count_taken(owner, len, count);
    drop_for(owner & 0xffff, serial, u32::from(DROP_OF_OUTPUT) << 16 | u32::from(SEND_FAILED), count, len & 0xffff);
    if let Some(refused) = own(REFUSED.get_ptr_mut(device)) {
        *refused += u64::from(count);
    }
    0
}

/// Counts packets for their rule and their interface, if those have yet to count them.
#[inline(always)]
fn count_taken(owner: u32, len: u32, count: u32) {
    let rule = owner >> 16;
    if rule != NO_OWNER {
        count_rule(rule, count, len & 0xffff);
        program::count_all(len >> 16, XdpCounter::Kernel, count, len & 0xffff);
    }
}

/// A packet is about to go out to all ready outputs of its plan: its number.
#[inline(always)]
pub(crate) fn expect(plan: &KernelPlan, ttl: u32, l3_len: u32, len: u32) -> u32 {
    let Some(span) = own(SPAN.get_ptr_mut(0)) else { return 0 };
    if span.last.wrapping_sub(span.settled) >= COPIES_SLOTS {
        span.settled = span.settled.wrapping_add(1);
        settle_copies(span.settled);
    }
    span.last = span.last.wrapping_add(1);
    let sequence = span.last;
    if let Some(copies) = own(COPIES.get_ptr_mut(sequence & (COPIES_SLOTS - 1))) {
        let (first_output, serial) = (plan.first_output, plan.serial);
        *copies = Copies { ready: plan.ready, taken: 0, sequence, first_output, serial, len, ttl, l3_len };
    }
    sequence
}

/// The packet of that number, unless it has been settled without this copy.
#[inline(always)]
pub(crate) fn copies(sequence: u32) -> Option<&'static mut Copies> {
    own(COPIES.get_ptr_mut(sequence & (COPIES_SLOTS - 1))).filter(|copies| copies.sequence == sequence)
}

/// Counts the copies that never came to their device, but for those that were not meant to. Looked at by itself, as
/// `kernel::look_at_each`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn settle_copies(sequence: u32) -> u32 {
    let Some(copies) = own(COPIES.get_ptr_mut(sequence & (COPIES_SLOTS - 1))) else { return 0 };
    let missing = copies.ready & !copies.taken;
    for index in 0..MAX_OUTPUTS_OF_PLAN {
        if missing >> index & 1 == 0 {
            continue;
        }
        let Some(output) = output(copies.first_output + index) else { break };
        if refusal(output, copies.ttl, copies.l3_len).is_none() {
            refused(output.device, &counted(output, copies.serial, copies.len), 1);
        }
    }
    0
}

/// A NAPI turn is over: `napi_poll(napi, work, budget)`. No copy of this CPU is on its way any more.
#[raw_tracepoint(tracepoint = "napi_poll")]
fn relay_polled(_ctx: RawTracePointContext) -> i32 {
    let Some(span) = own(SPAN.get_ptr_mut(0)) else { return 0 };
    for _ in 0..COPIES_SLOTS {
        if span.settled == span.last {
            break;
        }
        span.settled = span.settled.wrapping_add(1);
        let whole = own(COPIES.get_ptr_mut(span.settled & (COPIES_SLOTS - 1))).is_some_and(|copies| copies.ready == copies.taken);
        if !whole {
            settle_copies(span.settled);
        }
    }
    0
}

/// A device's queue has been handed to its driver: `xdp_devmap_xmit(from_dev, to_dev, sent, drops, err)`. The driver has taken
/// the first `sent` of those that the egress program passed, or of `sent + drops` if none ran.
#[raw_tracepoint(tracepoint = "xdp_devmap_xmit")]
fn relay_flushed(ctx: RawTracePointContext) -> i32 {
    let (sent, drops): (u32, u32) = (ctx.arg(2), ctx.arg(3));
    let device = device_at(ctx.arg(1));
    let ran = own(RAN.get_ptr_mut(0)).map_or(0, core::mem::take);
    let queue = if ran != 0 { PASSED.get_ptr_mut(0) } else { device.and_then(|device| QUEUES.get_ptr_mut(device)) };
    if let Some(queue) = own(queue) {
        settle(queue, device.unwrap_or(MAX_DEVICES), sent, drops);
    }
    0
}

#[inline(always)]
fn settle(queue: &mut Queue, device: u32, mut sent: u32, mut drops: u32) {
    // One batch more than there are places: it may have been sent in part.
    for _ in 0..=QUEUE_SLOTS {
        let most = if sent != 0 { sent } else { drops };
        if most == 0 {
            break;
        }
        let Some((packet, count)) = take(queue, most) else { break };
        if sent != 0 {
            sent -= count;
            count_taken(packet.owner, packet.len, count);
            packet::add_all(OUTPUT_TX.get_ptr_mut(packet.owner & 0xffff), count, packet.len & 0xffff);
        } else {
            drops -= count;
            refused(device, &packet, count);
        }
    }
}

/// The place in `DEVICES` of a `struct net_device`. An address that has become another device's is still known by what it was until
/// the tables' next generation: a device that has gone takes no redirect, so nothing is on its way by its place.
#[inline(always)]
fn device_at(device: *const u8) -> Option<u32> {
    let address = device as u64;
    let generation = flow::generation();
    let lately = own(LATELY.get_ptr_mut((address >> LATELY_SHIFT) as u32 & (LATELY_SLOTS - 1)))?;
    if lately.address != address || lately.generation != generation {
        let place = device_of(ifindex(device)).unwrap_or(MAX_DEVICES);
        *lately = Lately { address, generation, place };
    }
    (lately.place != MAX_DEVICES).then_some(lately.place)
}

/// `ifindex` of a `struct net_device`; 0: none.
#[inline(always)]
fn ifindex(device: *const u8) -> u32 {
    let at = device.wrapping_add(IFINDEX_AT.load() as usize);
    // SAFETY: the helper checks the address, which is the kernel's word with the offset its BTF names.
    unsafe { bpf_probe_read_kernel(at.cast::<u32>()) }.unwrap_or(0)
}

/// The kernel would not take a redirected packet:
/// `xdp_redirect_err(dev, prog, tgt, err, map_type, map_id, index)`. It is the last one redirected; a broadcast is settled by
/// [`relay_polled`], and has an index that no device has.
#[raw_tracepoint(tracepoint = "xdp_redirect_err")]
fn relay_refused(ctx: RawTracePointContext) -> i32 {
    let (kind, index): (u32, u32) = (ctx.arg(4), ctx.arg(6));
    if kind != BPF_MAP_TYPE_DEVMAP {
        return 0;
    }
    let Some(queue) = own(QUEUES.get_ptr_mut(index)) else { return 0 };
    let last = &mut queue.batches[(queue.head.wrapping_sub(1) & (QUEUE_SLOTS - 1)) as usize];
    if last.count == 0 {
        return 0;
    }
    last.count -= 1;
    let packet = last.packet;
    if last.count == 0 {
        queue.head = queue.head.wrapping_sub(1);
    }
    refused(index, &packet, 1);
    0
}
