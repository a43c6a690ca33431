//! The heart: packets in, packets out. Ingress turn, batch, rewrite, fan-out, egress turn, fates.
//!
//! Must never make a system call outside the port contract, take a lock, allocate per packet, log, panic on input, or
//! know which kernel interface is behind a port.

mod copy;
#[cfg(test)]
mod crash;
pub mod egress;
pub mod ingress;
pub mod journal;
pub mod latency;
pub mod recover;
pub mod rewrite;
pub mod table;
pub mod tally;
pub mod tap;

pub use crate::plan::{edit, fate};
