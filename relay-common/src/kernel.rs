//! Tables of the kernel path: what the XDP program does by itself with a rule's packets.
//!
//! ```text
//! RULE_PLANS[rule slot] ─▶ PLANS[plan] ─┬─ one ready output: it stands in the plan, and goes out by DEVICES[device]
//!                                       └─ several: BROADCASTS[plan], a devmap with an entry for each of them
//!                              PLANS[plan].first_output.. ─▶ OUTPUTS
//! ```
//! A plan and its outputs are written once and never changed: a change is another plan, and the word in `RULE_PLANS` is what
//! puts it in force. (Editing a live devmap loses or duplicates packets.)
//!
//! A redirect is not yet a packet sent. What becomes of it is learnt from the kernel's tracepoints, on the CPU it came in on and
//! before its NAPI turn is over:
//! ```text
//! one output:  QUEUES[device] ──────────────────────────▶ xdp_devmap_xmit(sent, drops): the first are sent, the rest refused
//! several:     COPIES[packet] ─▶ egress program: PASSED ─▶ the same
//!                     └─────────▶ napi_poll: copies that have come to no device are refused
//! ```

use crate::edit::Edit;

/// Rule slots (`RULE_PLANS`, `RULE_RX`).
pub const MAX_RULE_SLOTS: u32 = 16_384;
/// Output slots (`OUTPUT_TX`).
pub const MAX_OUTPUT_SLOTS: u32 = 32_768;
/// Plans: one for every rule slot, and room for those about to take their place.
pub const MAX_PLANS: u32 = 20_480;
/// Outputs of all plans.
pub const MAX_PLAN_OUTPUTS: u32 = 40_960;
/// Outputs of one plan.
pub const MAX_OUTPUTS_OF_PLAN: u32 = 64;
/// Devices (`DEVICES`).
pub const MAX_DEVICES: u32 = crate::MAX_INTERFACES;
/// Longest packet from the IP header on that the kernel path takes: packets up to this are in one linear buffer, and a copy
/// of one fits a page with its headroom (`xdpf_clone`).
pub const MAX_LINEAR_L3_LEN: u32 = 3400;
/// Packets that go out several times in one NAPI turn (64), and more than enough.
pub const COPIES_SLOTS: u32 = 256;
/// Packets on their way into one device from one CPU: the kernel's bulk queue (16) and the one that makes it overflow,
/// rounded up to a power of two.
pub const QUEUE_SLOTS: u32 = 32;
/// The index of a redirect to all devices of a map, which looks at none: no index of `DEVICES`.
pub const EVERY_DEVICE: u32 = u32::MAX;
/// Places of a bucket of `FLOWS`.
pub const FLOW_WAYS: usize = 2;
/// Buckets of `FLOWS` on each CPU, a power of two; fewer where there are many CPUs (global `FLOW_BUCKETS`).
pub const MAX_FLOW_BUCKETS: u32 = 16_384;
/// Devices remembered by their addresses on each CPU, a power of two.
pub const LATELY_SLOTS: u32 = 16;
/// Low bits of a device's address that say nothing: it begins with a page, and takes some.
pub const LATELY_SHIFT: u32 = 12;
/// Entries of `KERNEL_DROPS`.
pub const MAX_DROP_KEYS: u32 = 65_536;

/// `KernelPlan::flags`: several ready outputs, through `BROADCASTS`.
pub const PLAN_SEVERAL: u32 = 1;
/// `KernelPlan::flags`: some output can't send; every packet is counted for it.
pub const PLAN_BLOCKED: u32 = 4;
/// `KernelPlan::flags`: no output can send.
pub const PLAN_NONE_READY: u32 = 8;

/// An output of a plan. 80 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelOutput {
    /// Header edits.
    pub edit: Edit,
    /// Slot of its counters.
    pub slot: u32,
    /// Egress interface.
    pub ifindex: u32,
    /// Its place in `DEVICES`.
    pub device: u32,
    /// 0: ready; else 1 + the reason it drops everything.
    pub blocked: u32,
}

/// What becomes of a rule's packets. 120 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelPlan {
    /// Slot of the rule's counters.
    pub slot: u32,
    /// Epoch at which the rule was installed.
    pub serial: u32,
    /// `PLAN_*`.
    pub flags: u32,
    /// First of its outputs in `OUTPUTS`.
    pub first_output: u32,
    /// Its outputs, at most [`MAX_OUTPUTS_OF_PLAN`].
    pub output_count: u32,
    /// Longest packet (from the IP header on) that every output takes.
    pub max_l3_len: u32,
    /// A packet with less TTL is looked at output by output.
    pub min_ttl: u32,
    /// 4 or 6.
    pub family: u32,
    /// Bit k: output `first_output + k` is ready.
    pub ready: u64,
    /// The only ready output, unless [`PLAN_SEVERAL`].
    pub only: KernelOutput,
}

/// Key of map `PLAN_DEVICES` (hash): which outputs of a plan go out of a device. Value: u64, bit k for output
/// `first_output + k`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlanDevice {
    /// [`KernelPlan::first_output`].
    pub first_output: u32,
    /// The device.
    pub ifindex: u32,
}

/// A packet that goes out several times, and which of its copies have come to their device. 40 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copies {
    /// Bit k: output `first_output + k` gets a copy.
    pub ready: u64,
    /// Bit k: that copy has come.
    pub taken: u64,
    /// The packet's number.
    pub sequence: u32,
    /// [`KernelPlan::first_output`].
    pub first_output: u32,
    /// [`KernelPlan::serial`].
    pub serial: u32,
    /// Bytes of the whole packet.
    pub len: u32,
    /// Its TTL or hop limit.
    pub ttl: u32,
    /// Bytes from the IP header on.
    pub l3_len: u32,
}

/// The packets of [`Copies`] on one CPU: those up to `settled` have no copy on its way any more. 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// The last number given out.
    pub last: u32,
    /// The last number looked at.
    pub settled: u32,
}

/// A flow whose packets the XDP program has carried, untagged IPv4: all that the next packet takes, in one cache line.
/// Addresses and what is written as they stand in memory, as far as not said otherwise. 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KnownFlow {
    /// The tables' generation that this was found in (word `GENERATION`); 0: an empty place.
    pub generation: u32,
    /// Ingress interface.
    pub ifindex: u32,
    /// Source.
    pub src: u32,
    /// Destination.
    pub dst: u32,
    /// The source written.
    pub new_src: u32,
    /// The destination written.
    pub new_dst: u32,
    /// The destination's MAC address and the first two bytes of the source's.
    pub macs: u64,
    /// The rest of that.
    pub mac_end: u32,
    /// Destination port.
    pub port: u16,
    /// Longest packet from the IP header on, host order.
    pub max_l3_len: u16,
    /// Both ports written.
    pub new_ports: u32,
    /// [`Queued::owner`].
    pub owner: u32,
    /// [`Queued::serial`].
    pub serial: u32,
    /// What the addresses' change adds to a checksum's sum.
    pub change: u16,
    /// Bits of the source port that stay.
    pub keep_port: u16,
    /// [`KernelPlan::min_ttl`].
    pub min_ttl: u8,
    /// Bits of the TTL that stay before `less_ttl` is taken off.
    pub keep_ttl: u8,
    /// Taken off the TTL, which wraps.
    pub less_ttl: u8,
    /// Bits of the traffic class that stay.
    pub keep_class: u8,
    /// Bits of the traffic class that are set.
    pub set_class: u8,
    /// [`KernelOutput::device`].
    pub device: u8,
    /// [`crate::IngressConfig::slot`].
    pub interface: u8,
    /// Always 0.
    pub zero: u8,
}

/// The flows of one bucket. 128 bytes.
pub type FlowBucket = [KnownFlow; FLOW_WAYS];

/// A packet on its way into a device. 12 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queued {
    /// Slot of its output's counters; in the high half the rule's, if the rule has yet to count it, else [`NO_OWNER`].
    pub owner: u32,
    /// Serial of its rule.
    pub serial: u32,
    /// Bytes to send; in the high half the interface's slot, if that has yet to count it.
    pub len: u32,
}

/// In the high half of [`Queued::owner`]: rule and interface have counted the packet.
pub const NO_OWNER: u32 = 0xffff;

/// Packets that are alike, one after the other. 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Each of them.
    pub packet: Queued,
    /// How many; 0: none are left.
    pub count: u32,
}

/// Packets on their way, in order: batches `tail..head`, each in the place of its low bits. 520 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// The next to be written.
    pub head: u32,
    /// The next to be settled.
    pub tail: u32,
    /// The batches.
    pub batches: [Batch; QUEUE_SLOTS as usize],
}

/// A device whose queue was handed to its driver. 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lately {
    /// The kernel's address of it.
    pub address: u64,
    /// The tables' generation in which its place was looked up; 0: an empty slot.
    pub generation: u32,
    /// Its place in `DEVICES`, or [`MAX_DEVICES`].
    pub place: u32,
}

/// [`DropKey::kind`]: `slot` is a rule's, `reason` a `DropReason`.
pub const DROP_OF_RULE: u16 = 0;
/// [`DropKey::kind`]: `slot` is an output's, `reason` an `OutputDropReason`.
pub const DROP_OF_OUTPUT: u16 = 1;

/// Key of map `KERNEL_DROPS` (per-CPU hash, value `CounterValue`). 12 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DropKey {
    /// Slot of the rule or output.
    pub slot: u32,
    /// Serial of the rule.
    pub serial: u32,
    /// `DROP_OF_*`.
    pub kind: u16,
    /// The reason's place in its enum.
    pub reason: u16,
}

/// `DropReason::MulticastSource`.
pub const MULTICAST_SOURCE: u16 = 2;
/// `DropReason::OwnSource`.
pub const OWN_SOURCE: u16 = 3;
/// `DropReason::BadIpChecksum`.
pub const BAD_IP_CHECKSUM: u16 = 4;
/// `DropReason::BadUdpChecksum`.
pub const BAD_UDP_CHECKSUM: u16 = 5;
/// `DropReason::TooBig`.
pub const TOO_BIG: u16 = 6;
/// `OutputDropReason::TtlExpired`.
pub const TTL_EXPIRED: u16 = 0;
/// `OutputDropReason::OutputDown`.
pub const OUTPUT_DOWN: u16 = 4;
/// `OutputDropReason::MtuExceeded`.
pub const MTU_EXCEEDED: u16 = 5;
/// `OutputDropReason::NoHeadroom`.
pub const NO_HEADROOM: u16 = 7;
/// `OutputDropReason::SendFailed`.
pub const SEND_FAILED: u16 = 8;

/// What the ingress program writes over the MAC addresses of a packet that goes out several times; every copy's egress
/// program writes the real ones over it. 12 bytes, network order is not asked for: both sides are on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ticket {
    /// [`KernelPlan::first_output`].
    pub first_output: u32,
    /// Always 0.
    pub zero: u16,
    /// [`TICKET_MARK`]: where a source MAC stands, this bit pattern is none (the group bit is set).
    pub mark: u8,
    /// [`TICKET_TAGS`].
    pub flags: u8,
    /// [`Copies::sequence`].
    pub sequence: u32,
}

/// [`Ticket::mark`].
pub const TICKET_MARK: u8 = 0xff;
/// [`Ticket::flags`]: number of VLAN tags.
pub const TICKET_TAGS: u8 = 3;

const _: () = {
    assert!(size_of::<KernelOutput>() == 80);
    assert!(size_of::<KernelPlan>() == 120);
    assert!(size_of::<PlanDevice>() == 8);
    assert!(size_of::<Copies>() == 40);
    assert!(size_of::<Span>() == 8);
    assert!(size_of::<KnownFlow>() == 64);
    assert!(size_of::<Queued>() == 12);
    assert!(size_of::<Batch>() == 16);
    assert!(size_of::<Queue>() == 520);
    assert!(size_of::<Lately>() == 16);
    assert!(MAX_OUTPUT_SLOTS <= NO_OWNER && MAX_RULE_SLOTS <= NO_OWNER);
    assert!(MAX_LINEAR_L3_LEN < 0xffff && MAX_DEVICES <= 0xff);
    assert!(size_of::<DropKey>() == 12);
    assert!(size_of::<Ticket>() == 12);
};
