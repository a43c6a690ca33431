//! The supervisor's side of the keeper (`keeper/`): starts it, and gives it the table of descriptors at each change.
//!
//! Only with `--linger` or `--keep-kernel-path`. Must never wait for the keeper, but for its end when the relay stops; never let a relay fail for want of one.

use super::engine::Supervisor;
use super::error::RunError;
use super::fleet::Fleet;
use super::handover::{self, Handover};
use super::options::Options;
use super::storing::Storing;
use crate::keeper::{self, Client, Entry, Role, Table};
use crate::plan::manifest::LAYOUT_VERSION;
use crate::sys::process::{self, Child};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Between two starts of a keeper.
const RESTART: Duration = Duration::from_secs(1);
/// A keeper that was let go and is still there after this time is killed.
const GOES_WITHIN: Duration = Duration::from_millis(200);

/// The keeper and what it has been told.
#[derive(Debug)]
pub struct Keeper {
    linger: Duration,
    listener: OwnedFd,
    supervisor: OwnedFd,
    process: Option<(Child, OwnedFd)>,
    start_at: Instant,
    /// The table is another one than it has.
    due: bool,
}

/// What a taken-over relay left that is not ours yet.
#[derive(Debug, Default)]
pub struct Estate {
    /// Its links: our program is not attached yet.
    pub links: BTreeMap<u32, OwnedFd>,
    /// Memberships, and programs that count what the old program has sent: to stay until the first update is done.
    pub rest: Table,
    /// When that may go.
    pub until: Option<Instant>,
    /// Its keeper.
    pub keeper: Option<Client>,
}

impl Keeper {
    /// None without `--linger` and `--keep-kernel-path`. `listener`: a predecessor's.
    pub fn new(options: &Options, listener: Option<OwnedFd>) -> Result<Option<Self>, RunError> {
        let (linger, control) = (options.linger, options.socket.as_path());
        if linger.is_zero() && !options.keep_kernel_path {
            return Ok(None);
        }
        let failed = |errno: nix::errno::Errno| match keeper::connect(control) {
            Ok(Some(other)) => {
                let problem = format!("{} is kept for the relay of pid {}, or its orphans", control.display(), other.supervisor);
                RunError::bad("--socket", problem, "use --takeover, or another --socket")
            }
            _ => RunError::failure(format!("listening for successors: {errno}")),
        };
        let listener = match listener {
            // Once more, so that it bears this process's credentials.
            Some(fd) => nix::sys::socket::listen(&fd, nix::sys::socket::Backlog::MAXALLOWABLE).map(|()| fd),
            None => keeper::listen(control),
        }
        .map_err(failed)?;
        let supervisor = process::pidfd(std::process::id()).map_err(|errno| RunError::failure(format!("pidfd_open: {errno}")))?;
        Ok(Some(Self { linger, listener, supervisor, process: None, start_at: Instant::now(), due: true }))
    }

    /// Its process id, 0 if there is none.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, |(child, _)| child.pid)
    }

    /// Takes note of its end, and starts one if there is none.
    fn ensure(&mut self, fleet: &Fleet, now: Instant) {
        if let Some((child, _)) = &self.process {
            match waitpid(Pid::from_raw(child.pid as i32), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(status) => tracing::warn!(?status, "the keeper died: another one is started"),
            }
            (self.process, self.due) = (None, true);
        }
        if now < self.start_at {
            return;
        }
        self.start_at = now + RESTART;
        match self.start(fleet) {
            Ok(started) => {
                tracing::info!(pid = started.0.pid, linger = ?self.linger, "keeper started");
                self.process = Some(started);
            }
            Err(errno) => tracing::error!(%errno, "no keeper: the workers would leave with this process"),
        }
    }

    fn start(&self, fleet: &Fleet) -> nix::Result<(Child, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let fd = |fd: &OwnedFd| format!("fd:{}", fd.as_raw_fd());
        let linger = u64::try_from(self.linger.as_millis()).unwrap_or(u64::MAX);
        let environment =
            [(keeper::SUPERVISOR, fd(&theirs)), (keeper::LISTENER, fd(&self.listener)), (keeper::LINGER_MS, linger.to_string())];
        let child = fleet.start_keeper(&environment, &[theirs.as_raw_fd(), self.listener.as_raw_fd()])?;
        Ok((child, ours))
    }

    /// Lets it go, before what it keeps is torn down. Bounded.
    fn release(&mut self) {
        let Some((child, socket)) = self.process.take() else { return };
        let _ = keeper::release(socket.as_fd());
        if !process::ends_within(child.pidfd.as_fd(), GOES_WITHIN) {
            // ESRCH: it went meanwhile.
            let _ = process::signal(child.pidfd.as_fd(), Signal::SIGKILL);
        }
        // Blocking: it has ended, or SIGKILL is on its way.
        let _ = waitpid(Pid::from_raw(child.pid as i32), None);
    }
}

impl Supervisor {
    /// The keeper, and the service manager, are to be told anew.
    pub(super) fn changed(&mut self) {
        if let Some(keeper) = &mut self.keeper {
            keeper.due = true;
        }
        self.storing.iter_mut().for_each(Storing::changed);
    }

    /// The first update is done: what a predecessor left may go when no packet of its program is on its way any more.
    pub(super) fn leave_estate(&mut self, now: Instant) {
        if self.estate.until.is_some_and(|until| now >= until) {
            (self.estate.rest, self.estate.until) = (Table::default(), None);
            self.changed();
        }
    }

    /// Gives the keeper the table if it is another one; a keeper that is behind gets it at the next turn.
    pub(super) fn keep(&mut self, now: Instant) {
        if let Some(mut keeper) = self.keeper.take() {
            keeper.ensure(&self.fleet, now);
            if keeper.due && keeper.process.is_some() {
                keeper.due = !self.tell(&keeper);
            }
            self.keeper = Some(keeper);
        }
        if self.keeper.as_ref().is_none_or(|keeper| !keeper.due)
            && let Some(predecessor) = self.estate.keeper.take()
            && let Err(error) = predecessor.release()
        {
            tracing::warn!(%error, "the keeper before this one");
        }
    }

    /// Whether rules of the kernel path are to outlive this process without an end.
    pub(super) fn keeps_kernel_path(&self) -> bool {
        // Links that are not ours yet: nothing is known of what a predecessor's program carries.
        self.options.keep_kernel_path && !(self.kernel_path.target().is_empty() && self.estate.links.is_empty())
    }

    fn tell(&self, keeper: &Keeper) -> bool {
        let Some((_, socket)) = &keeper.process else { return false };
        let blob = match self.handover().write() {
            Ok(blob) => blob,
            Err(error) => {
                tracing::error!(%error, "writing down what a successor has to know");
                return false;
            }
        };
        let mut entries = self.entries(&blob, &keeper.supervisor);
        entries.push((Entry::new(Role::Listener, ""), keeper.listener.as_fd()));
        if self.keeps_kernel_path() {
            entries.push((Entry::new(Role::Endless, ""), keeper.supervisor.as_fd()));
        }
        let told = keeper::send_table(socket.as_fd(), &entries);
        tracing::debug!(entries = entries.len(), ?told, "keeper");
        told.is_ok()
    }

    /// What every table has: what a successor has to know, this process, and everything that is to outlive it.
    pub(super) fn entries<'a>(&'a self, blob: &'a OwnedFd, supervisor: &'a OwnedFd) -> Vec<(Entry, BorrowedFd<'a>)> {
        let mut entries = vec![(Entry::new(Role::Blob, ""), blob.as_fd()), (Entry::new(Role::Supervisor, ""), supervisor.as_fd())];
        entries.extend(self.locks.iter().map(|(ifindex, lock)| (Entry::new(Role::Lock, ifindex), lock.fd.as_fd())));
        entries.extend(self.estate.links.iter().map(|(ifindex, fd)| (Entry::new(Role::Link, ifindex), fd.as_fd())));
        if let Some(program) = &self.program {
            entries.extend(program.links().map(|(ifindex, fd)| (Entry::new(Role::Link, ifindex), fd)));
            entries.extend(program.watching().enumerate().map(|(number, fd)| (Entry::new(Role::Watch, number), fd)));
            entries.extend(program.counting().map(|(name, fd)| (Entry::new(Role::Counters, name), fd)));
        }
        self.fleet.keep(&mut entries);
        self.ports.keep(&mut entries);
        entries.extend(self.joins.sockets().map(|(number, fd)| (Entry::new(Role::Join, number), fd)));
        entries.extend(self.holders.sockets().map(|(address, fd)| (Entry::new(Role::Holder, address), fd)));
        // A predecessor's, under names of their own.
        for role in [Role::Join, Role::Watch] {
            let left = self.estate.rest.of(role).enumerate();
            entries.extend(left.map(|(number, fd)| (Entry::new(role, format!("before {number}")), fd)));
        }
        entries
    }

    pub(super) fn handover(&self) -> Handover {
        let (rules, next_slots) = self.book.keep();
        let (ports, burials) = self.ports.describe();
        let counted = self.kernel_path.counted().clone();
        let sums = self.program.as_ref().map(|program| program.past(ports.len(), &counted)).unwrap_or_default();
        Handover {
            version: handover::VERSION,
            layout: LAYOUT_VERSION,
            build: env!("CARGO_PKG_VERSION").into(),
            options: handover::options(&self.options),
            sums,
            counted,
            ports,
            burials,
            rules,
            next_slots,
            workers: self.fleet.describe(),
            retired: self.retired.clone(),
        }
    }

    /// Before the end: nothing is kept any more.
    pub(super) fn release_keeper(&mut self) {
        if let Some(keeper) = &mut self.keeper {
            keeper.release();
        }
        self.keeper = None;
        // Of an end in the middle of a take-over.
        if let Some(predecessor) = self.estate.keeper.take() {
            let _ = predecessor.release();
        }
        self.estate = Estate::default();
    }
}
