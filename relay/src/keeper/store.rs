//! The table in a service manager's descriptor store (systemd.service(5), FileDescriptorStoreMax=): what is there outlives every process
//! of the relay, and is passed to the next one ([`super::given()`]).
//!
//! ```text
//! a change:  what is new, each under a name of its own ─▶ list N: which names are which entries ─▶ list N-1 goes ─▶ what N doesn't name
//! ```
//! The manager answers nothing and takes messages in the order they are sent. The table is the last list whose names are all there;
//! so, wherever its sender dies, it is the one before the change or the one after it. A name is never used twice, and a descriptor that
//! is there already keeps its name: the manager would not take it again. Must never wait for the manager, nor hand it what processes
//! know each other's end by.

use super::message::PROTOCOL;
use super::table::{Entry, MAX_ENTRIES, MAX_KEY, Table, TableError};
use crate::shm::share::send_with;
use crate::sys::{memo, process};
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Begins every name.
const PREFIX: &str = "relay-";
/// Ends the name of a list.
const LIST: &str = "list";
/// Longest list.
const MAX_LIST_LEN: u64 = 32 << 20;
/// Names of a higher number are none of ours.
const MAX_SERIAL: u64 = 1 << 60;

/// Why a table is not in the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No room.
    #[error("{needed} descriptors, and the service manager keeps {limit} (FileDescriptorStoreMax=)")]
    TooMany {
        /// With those that were to leave after this change.
        needed: usize,
        /// Its limit.
        limit: usize,
    },
    /// A call failed.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Which names are the table.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    protocol: u32,
    supervisor: u32,
    entries: Vec<(String, Entry)>,
}

/// A table that was in the store.
#[derive(Debug)]
pub struct Stored {
    /// Duplicates of its descriptors.
    pub table: Table,
    /// Process that put it there.
    pub supervisor: u32,
}

/// A descriptor in the store, or ordered to be.
#[derive(Debug)]
struct Kept {
    fd: OwnedFd,
    /// Device and inode: duplicates have the same.
    inode: (u64, u64),
}

impl Kept {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { inode: inode(fd.as_fd())?, fd })
    }
}

#[derive(Debug)]
enum Order {
    /// What has this name is to be kept.
    Add(String),
    Remove(String),
}

/// The manager's store, as it is when it has taken all orders.
#[derive(Debug)]
pub struct Store {
    socket: UnixDatagram,
    address: SocketAddr,
    limit: usize,
    kept: BTreeMap<String, Kept>,
    orders: VecDeque<Order>,
    serial: u64,
}

fn inode(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let stat = fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Number of a name of ours, and what it was given for.
fn parse(name: &str) -> Option<(u64, &str)> {
    let (serial, what) = name.strip_prefix(PREFIX)?.split_once('-')?;
    Some((serial.parse().ok().filter(|serial| *serial < MAX_SERIAL)?, what))
}

fn serial_of_list(name: &str) -> Option<u64> {
    parse(name).filter(|(_, what)| *what == LIST).map(|(serial, _)| serial)
}

impl Store {
    /// The store of the manager that listens at `address` and keeps `limit` descriptors; `given`: what it has of ours, and others'.
    /// An error where this kernel can't tell duplicates.
    pub fn new(address: SocketAddr, limit: usize, given: Vec<(String, Option<OwnedFd>)>) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        process::are_duplicates(socket.as_fd(), socket.as_fd())?;
        let mut store = Self { socket, address, limit, kept: BTreeMap::new(), orders: VecDeque::new(), serial: 0 };
        // Two of one name, or none: nobody knows what is meant.
        let mut unclear = BTreeSet::new();
        for (name, fd) in given {
            let Some((serial, _)) = parse(&name) else { continue };
            store.serial = store.serial.max(serial);
            let before = fd.map(Kept::new).transpose()?.map(|kept| store.kept.insert(name.clone(), kept));
            if !matches!(before, Some(None)) {
                unclear.insert(name);
            }
        }
        for name in unclear {
            store.kept.remove(&name);
            store.orders.push_back(Order::Remove(name));
        }
        Ok(store)
    }

    /// Descriptors in it, lists included.
    pub fn count(&self) -> usize {
        self.kept.len()
    }

    /// Whether the manager has taken everything.
    pub fn is_idle(&self) -> bool {
        self.orders.is_empty()
    }

    /// The table in it: the last one that is whole. `None` in an empty store.
    pub fn table(&self) -> Result<Option<Stored>, TableError> {
        let mut lists: Vec<(u64, &Kept)> = self.kept.iter().filter_map(|(name, kept)| Some((serial_of_list(name)?, kept))).collect();
        lists.sort_by_key(|(serial, _)| Reverse(*serial));
        let mut problem = TableError::Malformed("the service manager's store has no list of what is in it");
        for (index, (_, kept)) in lists.into_iter().enumerate() {
            match self.read(kept) {
                Ok(stored) => return Ok(Some(stored)),
                Err(error) if index == 0 => problem = error,
                Err(_) => {}
            }
        }
        if self.kept.is_empty() { Ok(None) } else { Err(problem) }
    }

    fn read(&self, list: &Kept) -> Result<Stored, TableError> {
        let unreadable = || TableError::Malformed("the list of what is in the service manager's store can't be read");
        let text = list.fd.try_clone().and_then(|fd| memo::read(fd, MAX_LIST_LEN)).map_err(|_| unreadable())?;
        let List { protocol, supervisor, entries } = serde_json::from_slice(&text).map_err(|_| unreadable())?;
        if protocol != PROTOCOL {
            return Err(TableError::Protocol(protocol));
        }
        if entries.len() > MAX_ENTRIES as usize {
            return Err(TableError::Malformed("too many entries"));
        }
        let mut table = Table::default();
        for (name, entry) in entries {
            let kept = self.kept.get(&name).ok_or(TableError::Malformed("something of its list is not in the service manager's store"))?;
            if entry.key.len() > MAX_KEY || !entry.role.fits(kept.fd.as_fd()) {
                return Err(TableError::Malformed("something in the service manager's store is not what its list says"));
            }
            if !table.add(entry, kept.fd.try_clone().map_err(|_| unreadable())?) {
                return Err(TableError::Malformed("an entry comes twice"));
            }
        }
        Ok(Stored { table, supervisor })
    }

    /// Orders this table in the place of the one before. To be called when [`Self::is_idle`], so that a change is whole before the next
    /// begins.
    pub fn put(&mut self, entries: &[(Entry, BorrowedFd<'_>)]) -> Result<(), StoreError> {
        let mut named = Vec::new();
        for (entry, fd) in entries.iter().filter(|(entry, _)| entry.role.outlives_processes()) {
            let name = match self.find(*fd)? {
                Some(name) => name,
                None => self.add(&format!("{:?}-{}", entry.role, entry.key).to_lowercase(), fd.try_clone_to_owned()?)?,
            };
            named.push((name, entry.clone()));
        }
        let list = List { protocol: PROTOCOL, supervisor: std::process::id(), entries: named };
        let text = serde_json::to_vec(&list).map_err(io::Error::from)?;
        let mut wanted: BTreeSet<String> = list.entries.into_iter().map(|(name, _)| name).collect();
        wanted.insert(self.add(LIST, memo::write("relay-list", &text)?)?);
        if self.count() > self.limit {
            return Err(StoreError::TooMany { needed: self.count(), limit: self.limit });
        }
        self.remove(|name| !wanted.contains(name));
        Ok(())
    }

    /// Orders that nothing of ours is kept any more.
    pub fn clear(&mut self) {
        self.remove(|_| true);
    }

    /// The name of a descriptor that is there already.
    fn find(&self, fd: BorrowedFd<'_>) -> io::Result<Option<String>> {
        let inode = inode(fd)?;
        for (name, kept) in self.kept.iter().filter(|(_, kept)| kept.inode == inode) {
            if process::are_duplicates(kept.fd.as_fd(), fd)? {
                return Ok(Some(name.clone()));
            }
        }
        Ok(None)
    }

    fn add(&mut self, what: &str, fd: OwnedFd) -> io::Result<String> {
        self.serial += 1;
        // ASCII without colons and control characters (FDNAME= in sd_notify(3)); a key is at most MAX_KEY.
        let plain = |c: char| if c.is_ascii_graphic() && c != ':' { c } else { '_' };
        let name: String = format!("{PREFIX}{}-{what}", self.serial).chars().map(plain).collect();
        self.kept.insert(name.clone(), Kept::new(fd)?);
        self.orders.push_back(Order::Add(name.clone()));
        Ok(name)
    }

    fn remove(&mut self, gone: impl Fn(&str) -> bool) {
        let mut names: Vec<String> = self.kept.keys().filter(|name| gone(name)).cloned().collect();
        // A list before what it names. Locks last: when they are free for a clean start, the rest is.
        names.sort_by_key(|name| match parse(name) {
            Some((_, LIST)) => 0,
            Some((_, what)) if what.starts_with("lock-") => 2,
            _ => 1,
        });
        for name in names {
            self.kept.remove(&name);
            self.orders.push_back(Order::Remove(name));
        }
    }

    /// Sends what is ordered, as far as the manager takes it now: whether that was all.
    pub fn flush(&mut self) -> io::Result<bool> {
        if !self.orders.is_empty() {
            self.socket.connect_addr(&self.address)?;
        }
        while let Some(order) = self.orders.front() {
            match self.send(order) {
                Ok(_) => drop(self.orders.pop_front()),
                // Its queue is full, or too many descriptors are under way.
                Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ETOOMANYREFS | Errno::EINTR) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(true)
    }

    fn send(&self, order: &Order) -> nix::Result<usize> {
        let (text, fd) = match order {
            // FDPOLL=0: else the manager drops what a dead peer or process makes readable.
            Order::Add(name) => match self.kept.get(name) {
                Some(kept) => (format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), Some(kept.fd.as_fd())),
                None => return Ok(0),
            },
            Order::Remove(name) => (format!("FDSTOREREMOVE=1\nFDNAME={name}"), None),
        };
        send_with(self.socket.as_fd(), text.as_bytes(), fd.as_slice(), MsgFlags::MSG_DONTWAIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::Role;
    use crate::lab::manager::Manager;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

    struct World {
        manager: Manager,
        address: SocketAddr,
        _folder: tempfile::TempDir,
    }

    impl World {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("notify");
            let manager = Manager::listen(&path).unwrap();
            Self { manager, address: SocketAddr::from_pathname(path).unwrap(), _folder: folder }
        }

        /// A supervisor that was given what the manager has.
        fn store(&self) -> Store {
            self.store_with(Vec::new())
        }

        fn store_with(&self, more: Vec<(String, OwnedFd)>) -> Store {
            let has = self.manager.stored().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap()));
            Store::new(self.address.clone(), 100, has.chain(more).map(|(name, fd)| (name, Some(fd))).collect()).unwrap()
        }

        /// All that is ordered, and how many messages that were.
        fn deliver(&mut self, store: &mut Store) -> usize {
            let mut heard = 0;
            while !store.flush().unwrap() {
                heard += self.manager.hear(usize::MAX);
            }
            heard + self.manager.hear(usize::MAX)
        }
    }

    fn memory(text: &str) -> OwnedFd {
        memo::write("relay-test", text.as_bytes()).unwrap()
    }

    fn udp() -> OwnedFd {
        socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).unwrap()
    }

    fn own_pidfd() -> OwnedFd {
        process::pidfd(std::process::id()).unwrap()
    }

    type Owned = Vec<(Entry, OwnedFd)>;

    fn borrow(entries: &Owned) -> Vec<(Entry, BorrowedFd<'_>)> {
        entries.iter().map(|(entry, fd)| (entry.clone(), fd.as_fd())).collect()
    }

    /// The table that a supervisor would find.
    fn found(world: &World) -> Option<Vec<(Entry, (u64, u64))>> {
        let table = world.store().table().unwrap()?.table;
        Some(table.entries().map(|(entry, fd)| (entry.clone(), inode(fd).unwrap())).collect())
    }

    fn as_found(entries: &Owned) -> Option<Vec<(Entry, (u64, u64))>> {
        let mut all: Vec<(Entry, (u64, u64))> = entries.iter().map(|(entry, fd)| (entry.clone(), inode(fd.as_fd()).unwrap())).collect();
        all.sort();
        Some(all)
    }

    #[test]
    fn a_successor_finds_the_table_but_what_a_living_process_is_known_by() {
        let mut world = World::new();
        let (life, _peer) = UnixDatagram::pair().unwrap();
        let mut entries = vec![
            (Entry::new(Role::Blob, ""), memory("blob")),
            (Entry::new(Role::Process, 0), own_pidfd()),
            (Entry::new(Role::Holder, "[2001:db8::1]:7"), udp()),
            (Entry::new(Role::Life, 0), life.into()),
        ];
        let mut store = world.store();
        assert!(store.table().unwrap().is_none(), "empty");
        store.put(&borrow(&entries)).unwrap();
        world.deliver(&mut store);
        entries.pop();
        assert_eq!(found(&world), as_found(&entries));
        let stored = world.store().table().unwrap().unwrap();
        assert_eq!(stored.supervisor, std::process::id());
        assert!(world.manager.stored().all(|(name, _)| name.is_ascii() && !name.contains(':')));
        // Once more the same: a list for a list, and nothing else.
        store.put(&borrow(&entries)).unwrap();
        assert_eq!(world.deliver(&mut store), 2);
        // A successor goes on with what is there, under the same names, also where entries are called otherwise.
        let mut heir = world.store();
        entries[2].0 = Entry::new(Role::Holder, "before 1");
        heir.put(&borrow(&entries)).unwrap();
        assert_eq!(world.deliver(&mut heir), 2);
        assert_eq!(found(&world), as_found(&entries));
        // One of them is not open, where its number says: it is as if it were not there, and not wanted there.
        let given = world.manager.stored().map(|(name, fd)| (name.clone(), fd.try_clone().ok().filter(|_| !name.contains("blob"))));
        let mut other = Store::new(world.address.clone(), 100, given.collect()).unwrap();
        assert!(other.table().is_err());
        other.clear();
        assert_eq!(world.deliver(&mut other), 4);
        assert_eq!((world.manager.stored().count(), other.count()), (0, 0));
    }

    #[test]
    fn wherever_a_change_ends_the_table_is_the_one_before_or_the_one_after() {
        let before: Owned = vec![
            (Entry::new(Role::Blob, ""), memory("before")),
            (Entry::new(Role::Join, 0), udp()),
            (Entry::new(Role::Join, 1), udp()),
            (Entry::new(Role::Process, 0), own_pidfd()),
        ];
        let stays = before[1].1.try_clone().unwrap();
        let after: Owned = vec![
            (Entry::new(Role::Blob, ""), memory("after")),
            (Entry::new(Role::Join, 1), stays),
            (Entry::new(Role::Join, 2), udp()),
            (Entry::new(Role::Process, 0), own_pidfd()),
        ];
        let mut seen = Vec::new();
        for messages in 0.. {
            let mut world = World::new();
            let mut store = world.store();
            store.put(&borrow(&before)).unwrap();
            world.deliver(&mut store);
            store.put(&borrow(&after)).unwrap();
            assert!(store.orders.len() <= 10, "or the queue would have to be emptied on the way");
            store.flush().unwrap();
            world.manager.hear(messages);
            let table = found(&world);
            assert!(table == as_found(&before) || table == as_found(&after), "{messages}: {table:?}");
            seen.push(table == as_found(&after));
            if world.manager.hear(usize::MAX) == 0 {
                assert_eq!(world.manager.stored().count(), 5, "what left is gone");
                break;
            }
        }
        assert!(seen.is_sorted() && !seen[0] && *seen.last().unwrap(), "{seen:?}");
        // The first of all tables is none until it is whole.
        let mut world = World::new();
        let mut store = world.store();
        store.put(&borrow(&after)).unwrap();
        store.flush().unwrap();
        world.manager.hear(4);
        assert!(world.store().table().is_err());
        world.manager.hear(1);
        assert_eq!(found(&world), as_found(&after));
    }

    #[test]
    fn a_manager_that_is_behind_is_not_waited_for() {
        let mut world = World::new();
        let many: Owned = (0..60).map(|number| (Entry::new(Role::Join, number), udp())).collect();
        let mut store = world.store();
        store.put(&borrow(&many)).unwrap();
        if store.flush().unwrap() {
            println!("SKIPPED: this kernel takes 60 datagrams (net.unix.max_dgram_qlen)");
        }
        world.deliver(&mut store);
        assert!(store.is_idle());
        assert_eq!(found(&world).unwrap().len(), 60);
        let more: Owned = (0..120).map(|number| (Entry::new(Role::Join, number), udp())).collect();
        assert!(matches!(store.put(&borrow(&more)), Err(StoreError::TooMany { limit: 100, .. })));
        store.clear();
        world.deliver(&mut store);
        assert_eq!(world.manager.stored().count(), 0);
        drop(world.manager);
        store.put(&[]).unwrap();
        assert!(store.flush().is_err(), "nobody there");
    }

    #[test]
    fn what_makes_no_sense_is_no_table() {
        let list = |entries: &[(&str, Entry)], protocol| {
            let entries = entries.iter().map(|(name, entry)| ((*name).to_owned(), entry.clone())).collect();
            memory(&serde_json::to_string(&List { protocol, supervisor: 1, entries }).unwrap())
        };
        let blob = Entry::new(Role::Blob, "");
        let table = |given: Vec<(&str, OwnedFd)>| {
            let world = World::new();
            let store = world.store_with(given.into_iter().map(|(name, fd)| (name.to_owned(), fd)).collect());
            store.table().map(|stored| stored.map(|stored| stored.table.entries().count()))
        };
        let good = || list(&[("relay-1-blob", blob.clone())], PROTOCOL);
        let read = |list: OwnedFd, fd: OwnedFd| table(vec![("relay-1-blob", fd), ("relay-2-list", list)]);
        assert_eq!(read(good(), memory("")), Ok(Some(1)));
        let high = format!("relay-{}-list", u64::MAX);
        assert_eq!(table(vec![("http", udp()), ("relay-x-list", udp()), (&high, udp())]), Ok(None), "others'");
        assert!(table(vec![("relay-1-blob", memory(""))]).is_err(), "no list");
        assert!(table(vec![("relay-2-list", good())]).is_err(), "a name is missing");
        let two = vec![("relay-1-blob", memory("")), ("relay-1-blob", memory("")), ("relay-2-list", good())];
        assert!(table(two).is_err(), "of one name");
        assert!(read(good(), udp()).is_err(), "of another kind");
        assert!(read(good(), std::fs::File::open("/dev/zero").unwrap().into()).is_err());
        assert_eq!(read(list(&[], PROTOCOL + 1), memory("")), Err(TableError::Protocol(PROTOCOL + 1)));
        let twice = [("relay-1-blob", blob.clone()), ("relay-1-blob", blob.clone())];
        assert!(read(list(&twice, PROTOCOL), memory("")).is_err());
        assert!(read(list(&[("relay-1-blob", Entry::new(Role::Umem, "x".repeat(65)))], PROTOCOL), memory("")).is_err());
        assert!(read(list(&[("relay-1-blob", Entry::new(Role::Life, 0))], PROTOCOL), memory("")).is_err(), "a role that is never there");
        for text in ["", "[]", "{}", &"[".repeat(100_000)] {
            assert!(read(memory(text), memory("")).is_err());
        }
        assert!(read(udp(), memory("")).is_err(), "a list that is none");
        // A whole list behind a broken one is the table still.
        let (older, fd) = (good(), memory(""));
        assert_eq!(table(vec![("relay-1-blob", fd), ("relay-2-list", older), ("relay-3-list", memory("{}"))]), Ok(Some(1)));
    }
}
