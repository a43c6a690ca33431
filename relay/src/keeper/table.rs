//! The table of descriptors: role, key, descriptor; how it is sent, and put together again on the other side.
//!
//! Must never be changed in part: a table comes into force whole, or not at all.

use super::message::{self, MAX_LEN, Message, PROTOCOL};
use nix::sys::socket::{MsgFlags, SockType, getsockopt, sockopt};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Descriptors in one packet (the kernel takes 253).
const CHUNK: usize = 64;
/// Entries of a table.
pub(super) const MAX_ENTRIES: u32 = 65_536;
/// Bytes of a key.
pub(super) const MAX_KEY: usize = 64;

/// What a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// What a successor has to know besides the descriptors: a memfd.
    Blob,
    /// The supervisor (pidfd).
    Supervisor,
    /// Where successors connect.
    Listener,
    /// Lock of an ingress interface; key: its index.
    Lock,
    /// XDP link; key: the interface's index.
    Link,
    /// A map that counts; key: its name.
    Counters,
    /// A link of a program that counts; key: a number.
    Watch,
    /// Rules segment.
    Rules,
    /// Packet memory; key: the worker.
    Umem,
    /// Work segment; key: the worker.
    Work,
    /// Status segment; key: the worker.
    Status,
    /// The supervisor's end of the life line; key: the worker.
    Life,
    /// The reading end of its log; key: the worker.
    Log,
    /// The worker (pidfd); key: the worker.
    Process,
    /// Decides whether the spare stands in; key: the worker. Its life line, log and process have the key `spare N`.
    Baton,
    /// AF_XDP or receiving AF_PACKET socket; key: port/worker.
    Receive,
    /// Sending AF_PACKET socket; key: port/worker.
    Send,
    /// AF_PACKET socket for super-frames; key: port/worker.
    Coalesce,
    /// Membership socket; key: a number.
    Join,
    /// Socket that holds a port of a unicast rule; key: its address.
    Holder,
    /// There while the kernel path is to go on without an end, whatever the descriptor.
    Endless,
}

impl Role {
    /// How the kernel names such a descriptor in /proc/PID/fd, and of which type it is as a socket; where it is of use when every process
    /// is dead. What processes know each other's end by is not: somebody who held it for ever would hide that end.
    const fn outliving(self) -> Option<(&'static str, Option<SockType>)> {
        const SOCKET: &str = "socket:[";
        match self {
            Self::Blob | Self::Rules | Self::Umem | Self::Work | Self::Status => Some(("/memfd:relay-", None)),
            Self::Supervisor | Self::Process => Some(("anon_inode:[pidfd]", None)),
            Self::Link | Self::Watch => Some(("anon_inode:bpf_link", None)),
            Self::Counters => Some(("anon_inode:bpf-map", None)),
            Self::Lock => Some((SOCKET, Some(SockType::Stream))),
            Self::Receive | Self::Send | Self::Coalesce => Some((SOCKET, Some(SockType::Raw))),
            Self::Join | Self::Holder => Some((SOCKET, Some(SockType::Datagram))),
            Self::Listener | Self::Life | Self::Log | Self::Baton | Self::Endless => None,
        }
    }

    /// Whether it is of use when every process is dead.
    pub(super) const fn outlives_processes(self) -> bool {
        self.outliving().is_some()
    }

    /// Whether a descriptor may be such a one.
    pub(super) fn fits(self, fd: BorrowedFd<'_>) -> bool {
        let Some((kind, socket_type)) = self.outliving() else { return false };
        let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default();
        let is_of_type = || socket_type.is_none_or(|wanted| getsockopt(&fd, sockopt::SockType) == Ok(wanted));
        name.to_string_lossy().starts_with(kind) && is_of_type()
    }
}

/// Names a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What it is.
    pub role: Role,
    /// Which of them.
    pub key: String,
}

impl Entry {
    /// An entry.
    pub fn new(role: Role, key: impl ToString) -> Self {
        Self { role, key: key.to_string() }
    }
}

/// Why a table can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// It is of a build that speaks otherwise.
    #[error("the table is of version {0}, this program takes {PROTOCOL}")]
    Protocol(u32),
    /// Out of order, too long, or with too few descriptors.
    #[error("no table: {0}")]
    Malformed(&'static str),
    /// Something is not in it.
    #[error("{role:?} {key} is not in the table")]
    Missing {
        /// What.
        role: Role,
        /// Which.
        key: String,
    },
}

/// Descriptors by entry.
#[derive(Debug, Default)]
pub struct Table(BTreeMap<Entry, OwnedFd>);

impl Table {
    /// Puts a descriptor in; false: the entry is there already.
    pub(super) fn add(&mut self, entry: Entry, fd: OwnedFd) -> bool {
        self.0.insert(entry, fd).is_none()
    }

    /// Takes a descriptor out.
    pub fn take(&mut self, role: Role, key: impl ToString) -> Result<OwnedFd, TableError> {
        let entry = Entry::new(role, key);
        self.0.remove(&entry).ok_or(TableError::Missing { role, key: entry.key })
    }

    /// Takes all descriptors of a role out, by key.
    pub fn take_all(&mut self, role: Role) -> Vec<(String, OwnedFd)> {
        let found: Vec<(Entry, OwnedFd)> = self.0.extract_if(.., |entry, _| entry.role == role).collect();
        found.into_iter().map(|(entry, fd)| (entry.key, fd)).collect()
    }

    /// All that is in it.
    pub fn entries(&self) -> impl Iterator<Item = (&Entry, BorrowedFd<'_>)> {
        self.0.iter().map(|(entry, fd)| (entry, fd.as_fd()))
    }

    /// Those of a role.
    pub fn of(&self, role: Role) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.entries().filter(move |(entry, _)| entry.role == role).map(|(_, fd)| fd)
    }
}

/// Sends a table.
pub(super) fn send(socket: BorrowedFd<'_>, entries: &[(Entry, BorrowedFd<'_>)], flags: MsgFlags) -> nix::Result<()> {
    message::send(socket, &Message::Begin { protocol: PROTOCOL, count: entries.len() as u32 }, &[], flags)?;
    for chunk in entries.chunks(CHUNK) {
        let (names, descriptors): (Vec<Entry>, Vec<BorrowedFd<'_>>) = chunk.iter().map(|(entry, fd)| (entry.clone(), *fd)).unzip();
        message::send(socket, &Message::Entries(names), &descriptors, flags)?;
    }
    message::send(socket, &Message::Commit, &[], flags)
}

/// A table on its way.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    expected: Option<u32>,
    entries: BTreeMap<Entry, OwnedFd>,
}

impl Assembly {
    /// Takes a message; the table when it is whole. After an error the next table has to begin anew.
    pub(super) fn take(&mut self, message: Message, descriptors: Vec<OwnedFd>) -> Result<Option<Table>, TableError> {
        let result = self.step(message, descriptors);
        if result.is_err() {
            *self = Self::default();
        }
        result
    }

    fn step(&mut self, message: Message, descriptors: Vec<OwnedFd>) -> Result<Option<Table>, TableError> {
        match message {
            Message::Begin { protocol, .. } if protocol != PROTOCOL => Err(TableError::Protocol(protocol)),
            Message::Begin { count, .. } if count > MAX_ENTRIES => Err(TableError::Malformed("too many entries")),
            Message::Begin { count, .. } => {
                *self = Self { expected: Some(count), entries: BTreeMap::new() };
                Ok(None)
            }
            Message::Entries(names) => self.add(names, descriptors).map(|()| None),
            Message::Commit if self.expected == Some(self.entries.len() as u32) => Ok(Some(Table(std::mem::take(self).entries))),
            Message::Commit => Err(TableError::Malformed("not as many entries as announced")),
            Message::Take | Message::Release => Err(TableError::Malformed("a question in the middle of a table")),
        }
    }

    fn add(&mut self, names: Vec<Entry>, descriptors: Vec<OwnedFd>) -> Result<(), TableError> {
        let expected = self.expected.ok_or(TableError::Malformed("entries before the beginning"))?;
        if names.len() != descriptors.len() {
            return Err(TableError::Malformed("not one descriptor for each entry"));
        }
        if names.iter().any(|entry| entry.key.len() > MAX_KEY) {
            return Err(TableError::Malformed("a key is too long"));
        }
        for (entry, fd) in names.into_iter().zip(descriptors) {
            if self.entries.insert(entry, fd).is_some() {
                return Err(TableError::Malformed("an entry comes twice"));
            }
        }
        if self.entries.len() > expected as usize { Err(TableError::Malformed("more entries than announced")) } else { Ok(()) }
    }
}

const _: () = assert!(CHUNK * (MAX_KEY + 48) < MAX_LEN, "a full chunk must fit into a packet");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::message::Received;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    fn pump(assembly: &mut Assembly, socket: &OwnedFd) -> Result<Option<Table>, TableError> {
        let mut result = Ok(None);
        while let Received::Message(message, descriptors) = message::receive(socket.as_fd(), MsgFlags::MSG_DONTWAIT) {
            result = assembly.take(message, descriptors);
        }
        result
    }

    #[test]
    fn a_table_arrives_whole_and_replaces_the_one_before() {
        let (ours, theirs) = pair();
        let files: Vec<OwnedFd> = (0..150).map(|_| ours.try_clone().unwrap()).collect();
        let entries: Vec<(Entry, BorrowedFd<'_>)> =
            files.iter().enumerate().map(|(number, fd)| (Entry::new(Role::Join, number), fd.as_fd())).collect();
        let mut assembly = Assembly::default();
        send(ours.as_fd(), &entries, MsgFlags::MSG_DONTWAIT).unwrap();
        let mut table = pump(&mut assembly, &theirs).unwrap().expect("whole");
        assert_eq!(table.of(Role::Join).count(), 150);
        table.take(Role::Join, 149).unwrap();
        assert_eq!(table.take(Role::Join, 149).unwrap_err(), TableError::Missing { role: Role::Join, key: "149".into() });
        assert_eq!((table.take_all(Role::Join).len(), table.entries().count()), (149, 0));
        send(ours.as_fd(), &entries[..1], MsgFlags::MSG_DONTWAIT).unwrap();
        assert_eq!(pump(&mut assembly, &theirs).unwrap().expect("whole").entries().count(), 1);
    }

    #[test]
    fn half_a_table_is_none_and_the_next_one_begins_anew() {
        let (ours, theirs) = pair();
        let entry = Entry::new(Role::Link, 4);
        let send_one =
            |message: Message, fds: &[BorrowedFd<'_>]| message::send(ours.as_fd(), &message, fds, MsgFlags::MSG_DONTWAIT).unwrap();
        let mut assembly = Assembly::default();
        send_one(Message::Begin { protocol: PROTOCOL, count: 2 }, &[]);
        send_one(Message::Entries(vec![entry.clone()]), &[ours.as_fd()]);
        assert!(pump(&mut assembly, &theirs).unwrap().is_none());
        send(ours.as_fd(), &[(entry, ours.as_fd())], MsgFlags::MSG_DONTWAIT).unwrap();
        assert_eq!(pump(&mut assembly, &theirs).unwrap().expect("whole").entries().count(), 1);
    }

    #[test]
    fn hostile_tables_are_refused() {
        let begin = |count| Message::Begin { protocol: PROTOCOL, count };
        let entry = |key: &str| Entry::new(Role::Log, key);
        let fd = || pair().0;
        let refused = |messages: Vec<(Message, Vec<OwnedFd>)>| {
            let mut assembly = Assembly::default();
            let last = messages.into_iter().map(|(message, fds)| assembly.take(message, fds)).last().unwrap();
            assert!(assembly.entries.is_empty(), "nothing of it stays");
            last.unwrap_err()
        };
        assert_eq!(refused(vec![(Message::Begin { protocol: PROTOCOL + 1, count: 0 }, vec![])]), TableError::Protocol(PROTOCOL + 1));
        refused(vec![(begin(u32::MAX), vec![])]);
        refused(vec![(Message::Commit, vec![])]);
        refused(vec![(Message::Entries(vec![entry("1")]), vec![fd()])]);
        refused(vec![(begin(1), vec![]), (Message::Commit, vec![])]);
        refused(vec![(begin(1), vec![]), (Message::Entries(vec![entry("1")]), vec![])]);
        refused(vec![(begin(1), vec![]), (Message::Entries(vec![entry("1"), entry("2")]), vec![fd(), fd()])]);
        refused(vec![(begin(2), vec![]), (Message::Entries(vec![entry("1"), entry("1")]), vec![fd(), fd()])]);
        refused(vec![(begin(1), vec![]), (Message::Entries(vec![entry(&"x".repeat(65))]), vec![fd()])]);
        refused(vec![(begin(1), vec![]), (Message::Take, vec![])]);
    }

    #[test]
    fn what_is_no_message_is_malformed_never_followed() {
        let (ours, theirs) = pair();
        for text in ["", "{}", "\"Commitment\"", "{\"Begin\":{\"protocol\":1}}", "[[[[[[[["] {
            if !text.is_empty() {
                nix::unistd::write(&ours, text.as_bytes()).unwrap();
                assert!(matches!(message::receive(theirs.as_fd(), MsgFlags::MSG_DONTWAIT), Received::Malformed), "{text}");
            }
        }
        let many: Vec<BorrowedFd<'_>> = (0..200).map(|_| ours.as_fd()).collect();
        message::send(ours.as_fd(), &Message::Commit, &many, MsgFlags::MSG_DONTWAIT).unwrap();
        let received = message::receive(theirs.as_fd(), MsgFlags::MSG_DONTWAIT);
        assert!(matches!(&received, Received::Message(Message::Commit, descriptors) if descriptors.len() == 200), "seen, and closed");
        drop(received);
        drop(ours);
        assert!(matches!(message::receive(theirs.as_fd(), MsgFlags::MSG_DONTWAIT), Received::End));
    }
}
