//! Workers that another supervisor started: what is kept of them, and how they are taken over.
//!
//! Must never start a successor before the old process has made way; its status segment's lock is the fence if that fails.

use super::{Fleet, Memory, Phase, Slot};
use crate::frame::{FRAME_SIZE, Umem};
use crate::keeper::{Entry, Role, Table, TableError};
use crate::plan::manifest::RELIEVE;
use crate::plan::status::StatusPage;
use crate::plan::work::WorkLayout;
use crate::shm::{Access, Segment};
use crate::supervisor::error::RunError;
use crate::supervisor::options::Options;
use crate::sys::process::Child;
use nix::sys::socket::{MsgFlags, send};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

/// A worker, as a successor has to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptWorker {
    /// Its process, 0 if there is none.
    pub pid: u32,
    /// Processes that have been this worker.
    pub generation: u32,
    /// Unplanned replacements.
    pub restarts: u64,
    /// How the last one ended.
    pub last_exit: String,
}

impl Fleet {
    /// The workers of a table. They go on as they are until [`Self::relieve_all`].
    pub fn adopt(options: &Options, rules: OwnedFd, table: &mut Table, workers: &[KeptWorker]) -> Result<(Self, Vec<Umem>), RunError> {
        let mut fleet = Self::empty(options, rules)?;
        let mut umems = Vec::new();
        for (id, kept) in (0..).zip(workers) {
            let memory = fleet.left(id, table)?;
            let (mut slot, umem) = fleet.slot(id, memory)?;
            slot.inherit(kept, table).map_err(RunError::failure)?;
            fleet.slots.push(slot);
            umems.push(umem);
        }
        Ok((fleet, umems))
    }

    fn left(&self, id: u32, table: &mut Table) -> Result<Memory, RunError> {
        let mut take = |role| table.take(role, id).map_err(RunError::failure);
        let (umem, work, status) = (take(Role::Umem)?, take(Role::Work)?, take(Role::Status)?);
        let join = |fd, access, len| Segment::join(fd, access).and_then(|segment| segment.at_least(len)).map_err(RunError::failure);
        let umem = join(umem, Access::ReadWrite, self.frames as usize * FRAME_SIZE as usize)?.into_parts();
        let layout = WorkLayout::new(self.frames, super::egress_capacity(self.frames, self.split));
        let (work, _) = join(work, Access::ReadOnly, layout.len)?.into_parts();
        Ok(Memory { umem, work, status: StatusPage::join(status).map_err(RunError::failure)? })
    }

    /// Asks every worker to drain and leave; successors follow.
    pub fn relieve_all(&mut self) {
        let now = Instant::now();
        for slot in self.slots.iter_mut().filter(|slot| slot.child.is_some()) {
            let life = slot.life.as_ref().map(AsRawFd::as_raw_fd);
            // A full line, or none: it is killed a little later, and its successor finishes its work.
            let _ = life.map(|life| send(life, &[RELIEVE], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL));
            slot.phase = Phase::Draining(now, true);
        }
    }

    /// What the keeper is to hold.
    pub fn keep<'a>(&'a self, entries: &mut Vec<(Entry, BorrowedFd<'a>)>) {
        entries.push((Entry::new(Role::Rules, ""), self.rules.as_fd()));
        for slot in &self.slots {
            let optional = [
                (Role::Life, slot.life.as_ref()),
                (Role::Log, slot.log.as_ref()),
                (Role::Process, slot.child.as_ref().map(|child| &child.pidfd)),
            ];
            let fixed = [(Role::Umem, slot.umem.as_fd()), (Role::Work, slot.work.as_fd()), (Role::Status, slot.status_segment.as_fd())];
            let optional = optional.into_iter().filter_map(|(role, fd)| Some((role, fd?.as_fd())));
            entries.extend(fixed.into_iter().chain(optional).map(|(role, fd)| (Entry::new(role, slot.id), fd)));
        }
    }

    /// What a successor has to know.
    pub fn describe(&self) -> Vec<KeptWorker> {
        let describe = |slot: &Slot| KeptWorker {
            pid: slot.pid(),
            generation: slot.generation,
            restarts: slot.restarts,
            last_exit: slot.last_exit.clone(),
        };
        self.slots.iter().map(describe).collect()
    }
}

impl Slot {
    fn inherit(&mut self, kept: &KeptWorker, table: &mut Table) -> Result<(), TableError> {
        (self.generation, self.restarts, self.last_exit) = (kept.generation, kept.restarts, kept.last_exit.clone());
        self.turns_at_start = self.status.header.turns();
        if kept.pid != 0 {
            self.child = Some(Child { pid: kept.pid, pidfd: table.take(Role::Process, self.id)? });
            (self.life, self.log) = (table.take(Role::Life, self.id).ok(), table.take(Role::Log, self.id).ok());
            self.phase = Phase::Running;
        }
        Ok(())
    }
}
