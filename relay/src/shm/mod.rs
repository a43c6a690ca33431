//! Shared memory: sealed segments, single-writer channels, heartbeats, and how a worker finds what it inherited.
//!
//! Must never know a NIC or a packet. Every shared word has one writer; whatever another process wrote is judged before use.

pub mod bell;
pub mod bytes;
pub mod channel;
pub mod discovery;
pub mod full;
pub mod header;
pub mod heartbeat;
pub mod patterns;
pub mod segment;
pub mod share;
pub mod state;

pub use bell::Bell;
pub use bytes::{ByteReader, ByteWriter};
pub use channel::{ChannelError, ChannelStats, Child, Parent, Reader, Writer};
pub use full::{OfferStats, OnFull, offer};
pub use header::{HEADER_SIZE, Header, HeaderError};
pub use heartbeat::{Beat, Liveness, Verdict, coarse_now};
pub use segment::{Access, Segment, SegmentError};
pub use state::{Actor, State};

#[cfg(test)]
mod tests;
