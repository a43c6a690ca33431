//! Workers that another supervisor started: what is kept of them, and how they are taken over.
//!
//! Must never start a successor before the old process has made way; its status segment's lock is the fence if that fails.

use super::process::{Listener, Process};
use super::{Fleet, Memory, Phase, Slot};
use crate::frame::{FRAME_SIZE, Umem};
use crate::keeper::{Entry, Role, Table, TableError};
use crate::plan::status::StatusPage;
use crate::plan::work::WorkLayout;
use crate::shm::{Access, Segment};
use crate::supervisor::error::RunError;
use crate::supervisor::options::Options;
use crate::sys::process::Child;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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
    /// Its spare's process, 0 if there is none.
    pub spare: u32,
    /// Times that a spare has stood in.
    pub promotions: u64,
    /// Spares that died as such.
    pub spare_deaths: u64,
}

/// What the keeper is to hold of a process.
pub(super) fn keep_process<'a>(process: &'a Process, key: &str) -> Vec<(Entry, BorrowedFd<'a>)> {
    let parts = [(Role::Life, process.life.as_ref()), (Role::Log, process.log.as_ref()), (Role::Process, Some(&process.child.pidfd))];
    parts.into_iter().filter_map(|(role, fd)| Some((Entry::new(role, key), fd?.as_fd()))).collect()
}

/// A predecessor's process.
pub(super) fn take_process(pid: u32, key: &str, table: &mut Table) -> Result<Process, TableError> {
    let child = Child { pid, pidfd: table.take(Role::Process, key)? };
    Ok(Process::new(child, Listener::None, None, table.take(Role::Life, key).ok(), table.take(Role::Log, key).ok()))
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
        let (now, age) = (Instant::now(), self.age());
        self.slots.iter_mut().for_each(|slot| slot.relieve(now, age));
    }

    /// What the keeper is to hold.
    pub fn keep<'a>(&'a self, entries: &mut Vec<(Entry, BorrowedFd<'a>)>) {
        entries.push((Entry::new(Role::Rules, ""), self.rules.as_fd()));
        for slot in &self.slots {
            let fixed = [(Role::Umem, slot.umem.as_fd()), (Role::Work, slot.work.as_fd()), (Role::Status, slot.status_segment.as_fd())];
            entries.extend(fixed.map(|(role, fd)| (Entry::new(role, slot.id), fd)));
            entries.extend(slot.process.iter().flat_map(|process| keep_process(process, &slot.id.to_string())));
            slot.keep_spare(entries);
        }
    }

    /// What a successor has to know.
    pub fn describe(&self) -> Vec<KeptWorker> {
        let describe = |slot: &Slot| KeptWorker {
            pid: slot.pid(),
            generation: slot.generation,
            restarts: slot.restarts,
            last_exit: slot.last_exit.clone(),
            spare: slot.reserve.pid(),
            promotions: slot.reserve.promotions,
            spare_deaths: slot.reserve.deaths,
        };
        self.slots.iter().map(describe).collect()
    }
}

impl Slot {
    fn inherit(&mut self, kept: &KeptWorker, table: &mut Table) -> Result<(), TableError> {
        (self.generation, self.restarts, self.last_exit) = (kept.generation, kept.restarts, kept.last_exit.clone());
        // One that has turned before has proved itself: if it is dead already, its successor starts at once.
        self.turns_at_start = 0;
        (self.reserve.promotions, self.reserve.deaths) = (kept.promotions, kept.spare_deaths);
        if kept.pid != 0 {
            self.process = Some(take_process(kept.pid, &self.id.to_string(), table)?);
            self.phase = Phase::Running;
            self.inherit_spare(kept.spare, table)?;
        }
        Ok(())
    }
}
