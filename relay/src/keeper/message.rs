//! What supervisor, keeper and successor say to each other: one JSON value in each packet of a SOCK_SEQPACKET, descriptors along.
//!
//! ```text
//! table: Begin ─ Entries (with as many descriptors) … ─ Commit        questions: Take · Release
//! ```
//! Must never take memory by a length that comes from outside: a packet is at most [`MAX_LEN`].

use super::table::Entry;
use crate::shm::share::{receive_with, send_with};
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use serde::{Deserialize, Serialize};
use std::os::fd::{BorrowedFd, OwnedFd};

/// Counted up whenever a message changes.
pub(super) const PROTOCOL: u32 = 1;
/// Longest packet.
pub(super) const MAX_LEN: usize = 16 * 1024;

/// A packet.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) enum Message {
    /// A table follows.
    Begin {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Its entries.
        count: u32,
    },
    /// Some of them, each with a descriptor.
    Entries(Vec<Entry>),
    /// That was all.
    Commit,
    /// A successor asks for the table.
    Take,
    /// Nothing is to be kept any more.
    Release,
}

/// What one look at a socket brings.
#[derive(Debug)]
pub(super) enum Received {
    /// Nothing yet.
    Nothing,
    /// The other side is gone.
    End,
    /// A message, with the descriptors that came along.
    Message(Message, Vec<OwnedFd>),
    /// No message of ours.
    Malformed,
}

/// Sends one packet.
pub(super) fn send(socket: BorrowedFd<'_>, message: &Message, descriptors: &[BorrowedFd<'_>], flags: MsgFlags) -> nix::Result<()> {
    let text = serde_json::to_vec(message).map_err(|_| Errno::EINVAL)?;
    send_with(socket, &text, descriptors, flags).map(drop)
}

/// Takes one packet.
pub(super) fn receive(socket: BorrowedFd<'_>, flags: MsgFlags) -> Received {
    let mut buffer = [0; MAX_LEN];
    match receive_with(socket, &mut buffer, flags) {
        Ok((0, _)) => Received::End,
        Ok((len, descriptors)) => match serde_json::from_slice(buffer.get(..len).unwrap_or_default()) {
            Ok(message) => Received::Message(message, descriptors),
            Err(_) => Received::Malformed,
        },
        Err(Errno::EAGAIN | Errno::EINTR) => Received::Nothing,
        Err(_) => Received::End,
    }
}
