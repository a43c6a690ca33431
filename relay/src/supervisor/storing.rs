//! The supervisor's side of the service manager's descriptor store (`keeper/store.rs`): whether there is one for us, and the table for it
//! at each change.
//!
//! Only with `--takeover`: what nobody would go on with is not left there. Must never wait for the manager, but for a moment before what
//! it keeps is torn down or made anew; never let a relay fail for want of it.

use super::engine::Supervisor;
use super::notify;
use super::options::Options;
pub use crate::keeper::Given;
use crate::keeper::{self, Store};
use crate::sys::process;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How many descriptors the manager keeps for this service: set by systemd 254 and newer.
const LIMIT: &str = "FDSTORE";
/// A manager that has not taken everything after this time is left alone.
const PATIENCE: Duration = Duration::from_millis(500);

/// The store and what it has been told.
#[derive(Debug)]
pub struct Storing {
    store: Store,
    supervisor: OwnedFd,
    /// The table is another one than it has.
    due: bool,
    /// It has no room for the table: it has nothing.
    given_up: bool,
}

/// What the service manager passed to this process. To be asked before anything is opened.
pub fn given() -> Given {
    keeper::given(|variable| std::env::var_os(variable))
}

/// The store, where a table put into it finds somebody who takes it over. Where it doesn't, nothing of ours stays there.
pub fn open(options: &Options, given: Given) -> Option<Store> {
    let given = given.unwrap_or_else(|error| {
        tracing::warn!(%error, "what the service manager passed on can't be used");
        Vec::new()
    });
    let limit = std::env::var(LIMIT).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let is_wanted = options.takeover && limit > 0;
    if !is_wanted && given.is_empty() {
        return None;
    }
    let manager = notify::manager()?;
    // Each membership socket is one descriptor; it is held here and for the store, and twice more while it is taken over.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    match Store::new(manager, limit, given) {
        Ok(store) if is_wanted => Some(store),
        Ok(mut store) => {
            empty(&mut store);
            None
        }
        Err(error) => {
            tracing::warn!(%error, "the service manager's descriptor store is not used");
            None
        }
    }
}

/// Has the manager close everything, as far as it does so in time.
pub(super) fn empty(store: &mut Store) {
    let begin = Instant::now();
    store.clear();
    while !matches!(store.flush(), Ok(true) | Err(_)) && begin.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Storing {
    /// What is in there already keeps its place as far as it is in the next table.
    pub fn new(store: Store) -> io::Result<Self> {
        Ok(Self { store, supervisor: process::pidfd(std::process::id())?, due: true, given_up: false })
    }

    /// Descriptors that the manager keeps.
    pub fn count(&self) -> usize {
        self.store.count()
    }

    /// The table has changed.
    pub const fn changed(&mut self) {
        self.due = !self.given_up;
    }

    /// Whether the manager has not taken everything yet.
    pub fn is_behind(&self) -> bool {
        !self.store.is_idle()
    }
}

impl Supervisor {
    /// Gives the manager the table if it is another one; a manager that is behind gets it bit by bit.
    pub(super) fn store(&mut self) {
        let Some(mut storing) = self.storing.take() else { return };
        if storing.due && storing.store.is_idle() {
            storing.due = false;
            if let Err(error) = self.order(&mut storing) {
                tracing::warn!(%error, "the service manager does not keep what a successor needs when every process is killed at once");
                storing.store.clear();
                storing.given_up = true;
            }
        }
        match storing.store.flush() {
            Ok(_) => self.storing = Some(storing),
            Err(error) => tracing::warn!(%error, "the service manager's descriptor store can't be reached: it is not used any more"),
        }
    }

    fn order(&self, storing: &mut Storing) -> Result<(), keeper::StoreError> {
        let blob = self.handover().write()?;
        let entries = self.entries(&blob, &storing.supervisor);
        storing.store.put(&entries)?;
        tracing::debug!(entries = entries.len(), stored = storing.count(), "descriptor store");
        Ok(())
    }

    /// Before the end: nothing is kept any more.
    pub(super) fn empty_store(&mut self) {
        if let Some(mut storing) = self.storing.take() {
            empty(&mut storing.store);
        }
    }
}
