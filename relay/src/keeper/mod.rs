//! The keeper: a small process that holds a duplicate of every descriptor of its supervisor, so that nothing the kernel counts
//! by descriptors (program, maps, sockets, memberships, locks, segments) ends with the supervisor's death.
//!
//! ```text
//! supervisor ── table (SCM_RIGHTS), whole, at each change ──▶ keeper ◀── connect ── successor (`relay run --takeover`)
//!     └─ dies: end of file ─▶ --linger runs ─▶ over: exits          └── table ──▶ successor ── released ──▶ exits
//! ```
//! `store.rs` gives the table to a service manager besides, for the case that keeper and supervisor are killed at once.
//!
//! The keeper has no capability, a user like the workers', and a box like theirs. Must never use a descriptor it keeps, but for asking whether
//! a worker has ended; never give them to anybody but root and its supervisor's user; never outlive the time it was given.

mod client;
mod given;
mod message;
mod process;
mod sandbox;
mod store;
mod table;

pub use client::{Client, ClientError, connect, listen};
pub use given::{Given, given};
pub use process::{LINGER_MS, LISTENER, SUPERVISOR, main};
pub use store::{Store, StoreError, Stored};
pub use table::{Entry, Role, Table, TableError};

use nix::sys::socket::MsgFlags;
use std::os::fd::BorrowedFd;

/// From the supervisor: replaces the table. Never waits; `EAGAIN` where the keeper is behind: to be sent again, whole.
pub fn send_table(keeper: BorrowedFd<'_>, entries: &[(Entry, BorrowedFd<'_>)]) -> nix::Result<()> {
    table::send(keeper, entries, MsgFlags::MSG_DONTWAIT)
}

/// From the supervisor: nothing is to be kept any more.
pub fn release(keeper: BorrowedFd<'_>) -> nix::Result<()> {
    message::send(keeper, &message::Message::Release, &[], MsgFlags::MSG_DONTWAIT)
}

/// Numbers of the calls on its list.
#[cfg(test)]
pub(crate) fn calls() -> Vec<i64> {
    sandbox::CALLS.to_vec()
}
