//! Tables of the kernel path: what the XDP program does by itself with a rule's packets.
//!
//! ```text
//! RULE_PLANS[rule slot] ─▶ PLANS[plan] ─┬─ one ready output: it stands in the plan, and goes out by DEVICES[device]
//!                                       └─ several: BROADCASTS[plan], a devmap with an entry for each of them
//!                              PLANS[plan].first_output.. ─▶ OUTPUTS
//! ```
//! A plan and its outputs are written once and never changed: a change is another plan, and the word in `RULE_PLANS` is what
//! puts it in force. (Editing a live devmap loses or duplicates packets.)

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
/// Packets between arrival and the end of their copies' way through the egress program, rounded up (a NAPI turn has 64).
pub const ORDINAL_SLOTS: u32 = 256;
/// Entries of `KERNEL_DROPS`.
pub const MAX_DROP_KEYS: u32 = 65_536;

/// `KernelPlan::flags`: several ready outputs, through `BROADCASTS`.
pub const PLAN_SEVERAL: u32 = 1;
/// `KernelPlan::flags`: two ready outputs share a device, so its copies are told apart by their order.
pub const PLAN_SHARED_DEVICE: u32 = 2;
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

/// What becomes of a rule's packets. 112 bytes.
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

/// Which copies of a packet have found their output. 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ordinal {
    /// The packet's number.
    pub sequence: u64,
    /// Bit k: output `first_output + k` is taken.
    pub taken: u64,
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
    /// `TICKET_*`.
    pub flags: u8,
    /// The packet's number, low half.
    pub sequence: u32,
}

/// [`Ticket::mark`].
pub const TICKET_MARK: u8 = 0xff;
/// [`Ticket::flags`]: number of VLAN tags.
pub const TICKET_TAGS: u8 = 3;
/// [`Ticket::flags`]: IPv6.
pub const TICKET_IPV6: u8 = 4;
/// [`Ticket::flags`]: as [`PLAN_SHARED_DEVICE`].
pub const TICKET_SHARED_DEVICE: u8 = 8;

const _: () = {
    assert!(size_of::<KernelOutput>() == 80);
    assert!(size_of::<KernelPlan>() == 112);
    assert!(size_of::<PlanDevice>() == 8);
    assert!(size_of::<Ordinal>() == 16);
    assert!(size_of::<DropKey>() == 12);
    assert!(size_of::<Ticket>() == 12);
};
