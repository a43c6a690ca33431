//! Shared memory: sealed segments, single-writer channels, heartbeats, and how a worker finds what it inherited.
//!
//! | the relay runs on | library API for programs that use the crate |
//! |---|---|
//! | [`segment`], [`header`], [`state`], [`heartbeat`], [`channel`], [`discovery`], [`bell`] | [`patterns`] (many producers), [`bytes`] (any length), [`share`] (readers that are no children), [`full`] (what to do when there is no room) |
//!
//! ```
//! use relay::ring::Received;
//! use relay::shm::{Reader, Writer, channel::duplicate};
//! use std::os::fd::AsFd;
//!
//! let mut writer = Writer::<u64>::create("example", 8)?;
//! let mut reader = Reader::<u64>::open(duplicate(writer.as_fd())?)?;
//! writer.send(&7).expect("not gated: it never waits");
//! assert_eq!(reader.receive(), Received::Message(7));
//! assert!(Writer::<u64>::adopt(duplicate(writer.as_fd())?).is_err(), "a channel has one writer");
//! # Ok::<(), relay::shm::ChannelError>(())
//! ```
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
pub use bytes::{ByteClaim, ByteReader, ByteWriter};
pub use channel::{ChannelError, ChannelStats, Child, Claim, Parent, Reader, Writer};
pub use full::{OfferStats, OnFull, offer};
pub use header::{HEADER_SIZE, Header, HeaderError};
pub use heartbeat::{Beat, Liveness, Verdict, coarse_now};
pub use segment::{Access, Segment, SegmentError};
pub use state::{Actor, State};

#[cfg(test)]
mod crash;
#[cfg(test)]
mod tests;
