//! A spare: a worker that has everything but its turn, in its box, waiting for the death of the one it stands in for.
//!
//! ```text
//! mapped ─ box closed ─ knock: ready ─▶ waits ── listener hung up, or pidfd readable ─ not drained ─ takes the baton ─▶ is the worker
//!                                        │  └─ rules changed: has them ready
//!                                        └── end of file, relieved, drained, no baton ─▶ leaves
//! ```
//! Nobody has to wake it, and nobody could be slow in doing so. Two workers can't meet: the baton is one packet in a socket that the
//! supervisor holds too, and the kernel gives it to one of them. A supervisor takes it before it starts another successor, drains
//! the worker or changes its ports; a spare, only after the kernel has told of the death (ADOPTION: a word does not fence). The kernel's lock on
//! the status segment is the second fence for one that waits for the pidfd alone; with a listener it is early, and takes the lock when that is free.
//! Must never read what its predecessor writes before the kernel has told, nor take part in anything before it.

use super::adopt::{self, BootError, Mapped};
use super::snapshot;
use super::wait::{self, Life};
use crate::plan::manifest::SpareManifest;
use crate::shm::State;
use crate::sys::listener::has_hung_up;
use crate::sys::process::has_ended;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// What it holds beside what every worker holds.
pub struct Watch {
    worker: OwnedFd,
    listener: Option<OwnedFd>,
    baton: OwnedFd,
}

impl Watch {
    /// Takes the inherited descriptors.
    pub fn open(manifest: SpareManifest) -> Result<Self, BootError> {
        Ok(Self {
            worker: adopt::inherited("pidfd of the worker", manifest.worker_fd)?,
            listener: (manifest.listener_fd >= 0).then(|| adopt::inherited("listener of the worker", manifest.listener_fd)).transpose()?,
            baton: adopt::inherited("baton", manifest.baton_fd)?,
        })
    }

    /// Waits until this process is the worker (true) or not wanted any more.
    pub fn wait(&self, mapped: &mut Mapped) -> bool {
        wait::knock(&mapped.life);
        loop {
            let ends = self.listener.as_ref().unwrap_or(&self.worker);
            let mut polled = [&self.worker, ends, &mapped.life].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
            // EINTR is a look at all.
            let _ = poll(&mut polled, PollTimeout::NONE);
            // First: where everybody dies, nobody stands in.
            if wait::life(&mapped.life) != Life::Alive {
                return false;
            }
            if has_ended(self.worker.as_fd()) || self.listener.as_ref().is_some_and(|listener| has_hung_up(listener.as_fd())) {
                return mapped.status.header.state() != Some(State::Halt) && self.take_baton();
            }
            refresh(mapped);
        }
    }

    fn take_baton(&self) -> bool {
        recv(self.baton.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT) == Ok(1)
    }
}

/// Has the rules in force ready. What can't be read now is read by the worker, and reported by it.
pub fn refresh(mapped: &mut Mapped) {
    let epoch = mapped.rules.epoch();
    if mapped.table.as_ref().is_none_or(|table| table.epoch() != epoch) {
        mapped.table = snapshot::load(&mapped.rules, epoch).ok();
    }
}
