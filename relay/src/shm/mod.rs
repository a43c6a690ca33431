//! Shared memory: sealed segments, single-writer channels, heartbeats, and how a worker finds what it inherited.
//!
//! Must never know a NIC or a packet. Every shared word has one writer; whatever another process wrote is judged before use.

pub mod header;
pub mod heartbeat;
pub mod segment;
pub mod state;

pub use header::{HEADER_SIZE, Header, HeaderError};
pub use heartbeat::{Beat, Liveness, Verdict, coarse_now};
pub use segment::{Access, Segment, SegmentError};
pub use state::{Actor, State};
