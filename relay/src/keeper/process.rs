//! The keeper's process: a loop over its supervisor, its listener, one successor, and the orphans.
//!
//! ```text
//! Kept ── end of file of the supervisor ─▶ Orphaned ── time over · every worker dead ─▶ exits
//!  │                                          └── the table has [`Role::Endless`]: time over ─▶ lets the workers go, and stays
//!  └───────────────── Release, by the supervisor, a successor or `relay stop` ─▶ exits
//! ```
//! Must never hold more than two tables, nor wait for a successor longer than [`PATIENCE`].

use super::message::{self, Message, Received};
use super::sandbox;
use super::table::{self, Assembly, Entry, Role, Table};
use crate::shm::discovery::{Place, parse_place, take_fd};
use crate::shm::{ChannelError, share};
use crate::sys::process::has_ended;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::sockopt::{PeerCredentials, SendTimeout};
use nix::sys::socket::{MsgFlags, getsockopt, setsockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Variable that makes a process a keeper: its end of the socket to the supervisor, `fd:N`.
pub const SUPERVISOR: &str = "RELAY_KEEPER";
/// Where successors connect, `fd:N`.
pub const LISTENER: &str = "RELAY_KEEPER_LISTENER";
/// How long to keep everything without a supervisor, in milliseconds.
pub const LINGER_MS: &str = "RELAY_KEEPER_LINGER_MS";

/// A successor has to take a packet within this time.
const PATIENCE: Duration = Duration::from_secs(1);

/// Entry of the process; [`SUPERVISOR`] is set. It says nothing: what it would have to say shows in its being there.
pub fn main() -> ExitCode {
    match Keeper::from_environment() {
        Ok(mut keeper) => {
            if sandbox::close().is_err() {
                return ExitCode::FAILURE;
            }
            while keeper.turn() {}
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::from(2),
    }
}

fn inherited(variable: &'static str) -> Result<OwnedFd, ChannelError> {
    match parse_place(variable, std::env::var_os(variable))? {
        Place::Fd(number) => take_fd(variable, number),
        Place::Path(_) => Err(ChannelError::Environment { variable, problem: "a keeper takes fd:N only" }),
    }
}

struct Keeper {
    supervisor: Option<OwnedFd>,
    /// The supervisor's user.
    uid: u32,
    listener: OwnedFd,
    successor: Option<OwnedFd>,
    table: Table,
    incoming: Assembly,
    linger: Duration,
    until: Option<Instant>,
}

impl Keeper {
    fn from_environment() -> Result<Self, ChannelError> {
        let linger = std::env::var(LINGER_MS).ok().and_then(|text| text.parse().ok());
        let linger = linger.ok_or(ChannelError::Environment { variable: LINGER_MS, problem: "not a number of milliseconds" })?;
        let (supervisor, listener) = (inherited(SUPERVISOR)?, inherited(LISTENER)?);
        let maker = getsockopt(&supervisor, PeerCredentials).map_err(|errno| ChannelError::System("SO_PEERCRED", errno))?;
        // Each membership socket is one descriptor, and there are two tables at a change.
        if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        }
        Ok(Self {
            supervisor: Some(supervisor),
            uid: maker.uid(),
            listener,
            successor: None,
            table: Table::default(),
            incoming: Assembly::default(),
            linger: Duration::from_millis(linger),
            until: None,
        })
    }

    /// One look at everybody; false when it is time to go.
    fn turn(&mut self) -> bool {
        self.sleep();
        // The supervisor first: a successor gets the last table that a dead one has sent.
        if !self.hear_supervisor() || self.is_over(Instant::now()) {
            return false;
        }
        self.accept();
        self.serve()
    }

    fn sleep(&self) {
        // One successor at a time; the next waits in the queue.
        let always = [self.supervisor.as_ref(), self.successor.as_ref().or(Some(&self.listener))];
        // A dead worker would be readable for ever: one look a time will do.
        let alive = self.workers().into_iter().filter(|pidfd| self.until.is_some() && !has_ended(*pidfd));
        let fds = always.into_iter().flatten().map(AsFd::as_fd).chain(alive);
        let mut polled: Vec<PollFd<'_>> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        // Longer than poll can wait is asked again.
        let timeout = left.map_or(PollTimeout::NONE, |left| PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        let _ = poll(&mut polled, timeout);
    }

    fn workers(&self) -> Vec<BorrowedFd<'_>> {
        self.table.of(Role::Process).collect()
    }

    /// False: released.
    fn hear_supervisor(&mut self) -> bool {
        while let Some(socket) = &self.supervisor {
            match message::receive(socket.as_fd(), MsgFlags::MSG_DONTWAIT) {
                Received::Nothing => return true,
                Received::Message(Message::Release, _) => return false,
                Received::Message(message, descriptors) => {
                    // A table that is none leaves the one before.
                    if let Ok(Some(table)) = self.incoming.take(message, descriptors) {
                        self.table = table;
                    }
                }
                Received::Malformed => {}
                Received::End => {
                    self.supervisor = None;
                    self.until = Instant::now().checked_add(self.linger);
                    // Nothing was ever kept.
                    return self.table.entries().next().is_some();
                }
            }
        }
        true
    }

    /// Whether nobody needs what is kept any more. A relay that had no workers forwards without them.
    fn is_over(&mut self, now: Instant) -> bool {
        if self.supervisor.is_some() {
            return false;
        }
        let late = self.until.is_some_and(|until| now >= until);
        if self.table.of(Role::Endless).next().is_some() {
            if late {
                // Their end of file: they leave, and what they hold on to is kept for their successors.
                self.table.take_all(Role::Life);
                self.until = None;
            }
            return false;
        }
        let workers = self.workers();
        late || (!workers.is_empty() && workers.iter().all(|pidfd| has_ended(*pidfd)))
    }

    fn accept(&mut self) {
        if self.successor.is_some() {
            return;
        }
        let Ok(socket) = share::accept(self.listener.as_fd()) else { return };
        let permitted = getsockopt(&socket, PeerCredentials).is_ok_and(|peer| peer.uid() == 0 || peer.uid() == self.uid);
        let bounded = setsockopt(&socket, SendTimeout, &TimeVal::seconds(PATIENCE.as_secs() as i64)).is_ok();
        if permitted && bounded {
            self.successor = Some(socket);
        }
    }

    /// False: released.
    fn serve(&mut self) -> bool {
        let Some(socket) = &self.successor else { return true };
        match message::receive(socket.as_fd(), MsgFlags::MSG_DONTWAIT) {
            Received::Nothing => {}
            Received::Message(Message::Release, _) => return false,
            Received::Message(Message::Take, _) => {
                let entries: Vec<(Entry, BorrowedFd<'_>)> = self.table.entries().map(|(entry, fd)| (entry.clone(), fd)).collect();
                if table::send(socket.as_fd(), &entries, MsgFlags::MSG_NOSIGNAL).is_err() {
                    self.successor = None;
                }
            }
            Received::Message(..) | Received::Malformed | Received::End => self.successor = None,
        }
        true
    }
}
