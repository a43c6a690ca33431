//! The supervisor: owns every kernel object, never the data path.
//!
//! Must never block on a worker or touch a packet.

pub mod backoff;
pub mod book;
pub mod capabilities;
mod capture;
pub mod channels;
pub mod engine;
pub mod error;
mod features;
pub mod fleet;
pub mod handover;
pub mod interfaces;
pub mod joins;
pub mod keeping;
mod kernel;
pub mod kernel_path;
pub mod locks;
pub mod loops;
pub mod netlink;
#[cfg(test)]
mod netns;
pub mod next_hop;
pub mod notify;
pub mod options;
mod planning;
pub mod ports;
pub mod queries;
pub mod report;
mod sandbox;
pub mod storing;
pub mod takeover;
pub mod update;
pub mod view;

pub use engine::run;
pub use error::RunError;
