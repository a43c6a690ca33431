//! What an output does to a packet, resolved to bytes: the plan of one output as worker and XDP program read it.
//!
//! Defined where both sides of the kernel boundary see it; must never hold anything of its own.

pub use relay_common::edit::*;
