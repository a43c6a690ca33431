//! The heart: packets in, packets out. Ingress turn, batch, rewrite, fan-out, egress turn, fates.
//!
//! Must never make a system call outside the port contract, take a lock, allocate per packet, log, panic on input, or
//! know which kernel interface is behind a port.

pub mod counters;
pub mod edit;
pub mod fate;
pub mod journal;
pub mod rewrite;
