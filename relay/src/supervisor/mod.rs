//! The supervisor: owns every kernel object, never the data path.
//!
//! Must never block on a worker or touch a packet.

pub mod capabilities;
pub mod interfaces;
pub mod joins;
pub mod netlink;
pub mod next_hop;
pub mod backoff;
pub mod options;

mod kernel;
#[cfg(test)]
mod netns;
