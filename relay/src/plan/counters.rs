//! The counters of a worker in its status segment: which index counts what.
//!
//! A flat array of (packets, bytes) pairs; an index names exactly one thing. Counters live longer than workers: a
//! successor goes on counting in the same array. One writer: the ingress thread, or, in an array of its own, the egress
//! thread, which counts what the kernel refused of the packets that the ingress thread has counted as sent. So, per output,
//! sent = tx(ingress) − Σ drops(egress), and a reason's drops are those of both. Must never be reset by anybody but that writer.

use super::fate::{DropReason, OutputDropReason};
use bytemuck::{Pod, Zeroable};

/// Rule slots of one relay.
pub const MAX_RULES: usize = 16_384;
/// Output slots of one relay.
pub const MAX_OUTPUTS: usize = 32_768;
/// Ports of one worker.
pub const MAX_PORTS: usize = 64;
/// Outputs of one rule.
pub const MAX_RULE_OUTPUTS: usize = 64;

/// Packets and bytes, 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes from the Ethernet header on.
    pub bytes: u64,
}

impl Counter {
    /// The sum of two, wrapping (see [`output_zero`]).
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self { packets: self.packets.wrapping_add(other.packets), bytes: self.bytes.wrapping_add(other.bytes) }
    }

    /// The difference of two, not below 0: one array may be read before the other.
    #[must_use]
    pub const fn less(self, other: Self) -> Self {
        Self { packets: positive(self.packets.wrapping_sub(other.packets)), bytes: positive(self.bytes.wrapping_sub(other.bytes)) }
    }
}

const fn positive(value: u64) -> u64 {
    if value as i64 > 0 { value } else { 0 }
}

const PORT_STRIDE: usize = 1 + DropReason::COUNT;
const RULE_STRIDE: usize = 1 + DropReason::COUNT;
const OUTPUT_STRIDE: usize = 2 + OutputDropReason::COUNT;
const RULES: usize = MAX_PORTS * PORT_STRIDE;
const OUTPUTS: usize = RULES + MAX_RULES * RULE_STRIDE;

/// Counters in one array.
pub const COUNTER_COUNT: usize = OUTPUTS + MAX_OUTPUTS * OUTPUT_STRIDE;

/// Packets a port took in.
pub const fn port_rx(port: usize) -> u32 {
    (port * PORT_STRIDE) as u32
}

/// Packets of a port lost before any rule took them.
pub const fn port_drop(port: usize, reason: DropReason) -> u32 {
    port_rx(port) + 1 + reason as u32
}

/// Packets a rule took.
pub const fn rule_rx(slot: usize) -> u32 {
    (RULES + slot * RULE_STRIDE) as u32
}

/// Packets of a rule that no output got.
pub const fn rule_drop(slot: usize, reason: DropReason) -> u32 {
    rule_rx(slot) + 1 + reason as u32
}

/// Packets handed to the egress ring for an output (ingress array only).
pub const fn output_tx(slot: usize) -> u32 {
    (OUTPUTS + slot * OUTPUT_STRIDE) as u32
}

/// Packets an output did not get.
pub const fn output_drop(slot: usize, reason: OutputDropReason) -> u32 {
    output_tx(slot) + 1 + reason as u32
}

/// What makes an output's counters in both arrays come to nothing, by index; for the ingress array. The egress array goes on
/// with what it had counted for an earlier rule in the slot, so that is taken off here (sums wrap).
pub fn output_zero(slot: usize, egress: impl Fn(usize) -> Counter) -> Vec<(usize, Counter)> {
    let minus = |c: Counter| Counter { packets: c.packets.wrapping_neg(), bytes: c.bytes.wrapping_neg() };
    let drops: Vec<usize> = OutputDropReason::ALL.iter().map(|reason| output_drop(slot, *reason) as usize).collect();
    let refused = drops.iter().map(|index| egress(*index)).fold(Counter::default(), Counter::plus);
    let tx = (output_tx(slot) as usize, refused);
    let clock = (output_clock(slot) as usize, Counter::default());
    [tx, clock].into_iter().chain(drops.iter().map(|index| (*index, minus(egress(*index))))).collect()
}

/// The clock of an output's rate limit: `bytes` is when the next packet is due, in 1/64 ns of CLOCK_MONOTONIC. A counter, so that
/// the journal moves it exactly once.
pub const fn output_clock(slot: usize) -> u32 {
    output_tx(slot) + 1 + OutputDropReason::COUNT as u32
}

/// Range of all counters of a rule slot (to zero them for a new rule).
pub const fn rule_range(slot: usize) -> std::ops::Range<usize> {
    let first = RULES + slot * RULE_STRIDE;
    first..first + RULE_STRIDE
}

/// Range of all counters of an output slot.
pub const fn output_range(slot: usize) -> std::ops::Range<usize> {
    let first = OUTPUTS + slot * OUTPUT_STRIDE;
    first..first + OUTPUT_STRIDE
}
