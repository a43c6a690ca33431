//! The spares, with `--spare`: a second process for each worker, which stands in for it by itself (worker/spare.rs).
//!
//! ```text
//!          worker has run and moved packets         worker dead
//!  None ─────────────────────────────────▶ Spare ─────────────────▶ the worker's process, Starting until it has taken the baton
//!   ▲                                        │ died: again after 1 s       │ has not within 1 s: killed, and a cold start
//!   └──────── dead ◀── dismissed: baton withdrawn, SIGKILL ◀── ports change, drain, stop, take-over
//! ```
//! Only for a worker that has proved itself: its death would be answered at once anyway (DECISIONS §9), so no crash loop becomes
//! hotter by a spare. Must never let a worker be started, drained or given other ports while a baton lies there.

use super::process::Process;
use super::{Fleet, Phase, Slot};
use crate::control::message::SpareInfo;
use crate::keeper::{Entry, Role, Table};
use crate::plan::manifest::RELIEVE;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// A new worker has the CPU for itself so long: it has to catch up.
const AFTER: Duration = Duration::from_millis(20);
/// Between the death of a spare and the next one.
const AGAIN: Duration = Duration::from_secs(1);
/// A spare has to take the baton of a dead worker within this time. It takes a millisecond; what holds it up longer is a machine that
/// has no CPU for it, which a cold start would meet too.
const STANDS_IN_WITHIN: Duration = Duration::from_secs(1);

/// One packet in a socket: who takes it decides who is the worker next.
#[derive(Debug)]
pub(super) struct Baton(OwnedFd);

impl Baton {
    pub(super) fn new() -> nix::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        send(ours.as_raw_fd(), &[1], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?;
        Ok(Self(theirs))
    }

    /// Whether it lies there.
    fn lies(&self) -> bool {
        recv(self.0.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK) == Ok(1)
    }

    /// Takes it. False: somebody has.
    fn withdraw(&self) -> bool {
        recv(self.0.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT) == Ok(1)
    }
}

impl AsFd for Baton {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A process that waits.
#[derive(Debug)]
pub(super) struct Spare {
    pub(super) process: Process,
    pub(super) baton: Baton,
    /// It has said that it has everything.
    ready: bool,
}

/// The spare of a worker, and what became of those before.
#[derive(Debug)]
pub(super) struct Reserve {
    spare: Option<Spare>,
    /// Without a baton, and killed.
    dismissed: Option<Process>,
    /// None is started before this time.
    at: Instant,
    /// Times that one has stood in.
    pub(super) promotions: u64,
    /// Spares that died as such.
    pub(super) deaths: u64,
}

impl Reserve {
    pub(super) fn new() -> Self {
        Self { spare: None, dismissed: None, at: Instant::now(), promotions: 0, deaths: 0 }
    }

    pub(super) fn processes(&self) -> impl Iterator<Item = &Process> {
        self.spare.as_ref().map(|spare| &spare.process).into_iter().chain(&self.dismissed)
    }

    pub(super) fn processes_mut(&mut self) -> impl Iterator<Item = &mut Process> {
        self.spare.as_mut().map(|spare| &mut spare.process).into_iter().chain(&mut self.dismissed)
    }

    /// Whether a dismissed one still has the ports mapped.
    pub(super) const fn is_leaving(&self) -> bool {
        self.dismissed.is_some()
    }

    /// The worker forwards from now on.
    pub(super) fn worker_runs(&mut self, now: Instant) {
        self.at = self.at.max(now + AFTER);
    }

    pub(super) const fn take(&mut self) -> Option<Spare> {
        self.spare.take()
    }

    /// Process id of the spare, 0 if there is none.
    pub(super) fn pid(&self) -> u32 {
        self.spare.as_ref().map_or(0, |spare| spare.process.child.pid)
    }
}

impl Fleet {
    /// Starts the spares whose time has come. One that can't be started costs what it is for. Whether there were any.
    pub(super) fn start_spares(&mut self, now: Instant, ports: &super::Ports, locks: &[(u32, super::Lock)]) -> bool {
        let mut any = false;
        for index in 0..if self.spares { self.slots.len() } else { 0 } {
            let due = self.slots.get(index).is_some_and(|slot| slot.wants_spare() && now >= slot.reserve.at);
            if due && let Err(error) = self.start_spare(index, ports, locks) {
                tracing::warn!(worker = index, %error, "no spare");
                self.slots.get_mut(index).into_iter().for_each(|slot| slot.reserve.at = now + AGAIN);
            }
            any |= due;
        }
        any
    }

    fn start_spare(&mut self, index: usize, ports: &super::Ports, locks: &[(u32, super::Lock)]) -> Result<(), super::RunError> {
        let baton = Baton::new().map_err(super::failed("socketpair"))?;
        let process = self.launch(index, Some(&baton), ports, locks)?;
        if let Some(slot) = self.slots.get_mut(index) {
            tracing::info!(worker = slot.id, pid = process.child.pid, "spare started");
            slot.reserve.spare = Some(Spare { process, baton, ready: false });
        }
        Ok(())
    }

    /// Whether workers have spares.
    pub const fn has_spares(&self) -> bool {
        self.spares
    }
}

impl Slot {
    fn wants_spare(&self) -> bool {
        let proved = self.status.header.turns() != self.turns_at_start;
        matches!(self.phase, Phase::Running) && proved && self.reserve.processes().next().is_none()
    }

    /// When one is to be started, if that is known.
    pub(super) fn spare_due(&self) -> Option<Instant> {
        (self.wants_spare() && self.reserve.at > Instant::now()).then_some(self.reserve.at)
    }

    /// The worker is dead: the spare is its process from now on, whether it has noticed by itself yet or not.
    pub(super) fn stand_in(&mut self, Spare { process, baton, .. }: Spare, now: Instant) -> Phase {
        tracing::info!(worker = self.id, pid = process.child.pid, "the spare stands in");
        self.turns_at_start = self.status.header.turns();
        (self.process, self.baton) = (Some(process), Some(baton));
        Phase::Starting(now)
    }

    /// Whether its process is a spare that has not taken over yet, though its worker is dead.
    pub(super) fn is_pending(&mut self) -> bool {
        if self.baton.as_ref().is_some_and(Baton::lies) {
            return true;
        }
        self.reserve.promotions += u64::from(self.baton.take().is_some());
        false
    }

    /// Whether such a process takes too long.
    pub(super) fn stands_in_too_late(since: Instant) -> bool {
        since.elapsed() > STANDS_IN_WITHIN
    }

    /// From here on no spare stands in: it is without a baton. If it has stood in already, it is the worker.
    pub(super) fn dismiss_spare(&mut self, now: Instant, age: Duration) {
        let Some(spare) = &self.reserve.spare else { return };
        // No baton there: taken, so that the worker is dead, or withdrawn by a supervisor before this one.
        if !spare.baton.withdraw() && self.reap(now, age) {
            return;
        }
        if let Some(Spare { process, .. }) = self.reserve.take() {
            process.kill();
            self.reserve.dismissed = Some(process);
        }
    }

    /// Takes note of what spares say, and of their ends.
    pub(super) fn look_at_spare(&mut self, now: Instant) {
        if self.reserve.dismissed.as_ref().is_some_and(|process| process.end(|| false).is_some()) {
            self.reserve.dismissed = None;
        }
        let Some(spare) = &mut self.reserve.spare else { return };
        spare.ready |= spare.process.hear();
        if let Some(end) = spare.process.end(|| false) {
            tracing::warn!(worker = self.id, exit = %end.words, "the spare died");
            spare.process.read_log(self.id);
            self.reserve.deaths += 1;
            (self.reserve.spare, self.reserve.at) = (None, now + AGAIN);
        }
    }

    /// For `relay status`.
    pub fn spare_info(&self) -> SpareInfo {
        let Reserve { spare, promotions, deaths, .. } = &self.reserve;
        let state = match spare {
            None => "none",
            Some(spare) if spare.ready => "ready",
            Some(_) => "boot",
        };
        SpareInfo { pid: self.reserve.pid(), state: state.into(), promotions: *promotions, deaths: *deaths }
    }

    /// Spares end with their worker's relief.
    pub(super) fn relieve(&mut self, now: Instant, age: Duration) {
        self.dismiss_spare(now, age);
        if let Some(process) = &self.process {
            // A full line, or none: it is killed a little later, and its successor finishes its work.
            process.tell(RELIEVE);
            self.phase = Phase::Draining(now, true);
        }
    }

    /// What the keeper is to hold of it.
    pub(super) fn keep_spare<'a>(&'a self, entries: &mut Vec<(Entry, BorrowedFd<'a>)>) {
        let spare = self.reserve.spare.as_ref();
        let key = format!("spare {}", self.id);
        entries.extend(spare.into_iter().flat_map(|spare| super::adopt::keep_process(&spare.process, &key)));
        let baton = spare.map_or(self.baton.as_ref(), |spare| Some(&spare.baton));
        entries.extend(baton.map(|baton| (Entry::new(Role::Baton, self.id), baton.as_fd())));
    }

    /// A predecessor's spare. Whether it has stood in by now shows when it is dismissed.
    pub(super) fn inherit_spare(&mut self, pid: u32, table: &mut Table) -> Result<(), crate::keeper::TableError> {
        let Ok(baton) = table.take(Role::Baton, self.id).map(Baton) else { return Ok(()) };
        if pid == 0 {
            // Its worker was dead already.
            (self.baton, self.phase) = (Some(baton), Phase::Starting(Instant::now()));
            return Ok(());
        }
        let process = super::adopt::take_process(pid, &format!("spare {}", self.id), table)?;
        self.reserve.spare = Some(Spare { process, baton, ready: true });
        Ok(())
    }
}
