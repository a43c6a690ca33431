//! The supervisor: owns every kernel object, never the data path.
//!
//! Must never block on a worker or touch a packet.

pub mod backoff;
pub mod options;
