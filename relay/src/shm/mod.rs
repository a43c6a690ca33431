//! Shared memory: sealed segments, single-writer channels, heartbeats, and how a worker finds what it inherited.
//!
//! Must never know a NIC or a packet. Every shared word has one writer; whatever another process wrote is judged before use.

pub mod segment;

pub use segment::{Access, Segment, SegmentError};
