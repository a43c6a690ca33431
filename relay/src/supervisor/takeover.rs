//! `--takeover`: a new supervisor in the place of one that is dead or alive, without losing a packet.
//!
//! ```text
//! ask the keeper ─ check versions, options, interfaces; try to map everything; load the program ─── nothing has changed so far
//!  └▶ end the old supervisor (SIGKILL: death and upgrade are one path) ─ ask again ─ a keeper of our own ─ release the old one
//!      └▶ relieve the workers: each drains and has a successor on the same sockets, journal, counters
//!          └▶ the update of every start: rules published, sockets and tables filled, memberships made ─ program swapped in the links
//! ```
//! Where supervisor, keeper and workers are dead, a service manager may have the same table (`storing.rs`): everything is checked as above,
//! and the workers' successors start as after a death.
//! Must never change anything before everything that can be refused has been checked.

use super::engine::{self, Supervisor};
use super::error::RunError;
use super::fleet::Fleet;
use super::handover::{Handover, HandoverError};
use super::interfaces::{Interface, Interfaces};
use super::keeping::{Estate, Keeper};
use super::locks::Lock;
use super::options::Options;
use super::ports::{self, Ports};
use super::storing;
use crate::frame::Umem;
use crate::keeper::{self, Client, ClientError, Role, Store, Stored, Table, TableError};
use crate::nic::afxdp::program::{Mode, Program};
use crate::plan::records::{RulesSegment, Snapshot};
use crate::shm::{Access, Segment};
use crate::sys::process;
use nix::sys::signal::Signal;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// The end of a process that was killed, or asked to stop.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
/// A worker whose life line has ended leaves within 50 ms; it drains.
const LEAVES_WITHIN: Duration = Duration::from_secs(1);

/// What a successor begins with.
pub struct Inheritance {
    /// None where nobody but the service manager has what is left.
    keeper: Option<Client>,
    /// The supervisor before.
    from: u32,
    table: Table,
    handover: Handover,
    program: Loaded,
}

/// The program, or why there is none.
type Loaded = (Option<Program>, String);

/// Why there is nothing to go on with.
enum Unfit {
    /// To be reported; the running relay goes on.
    Refused(RunError),
    /// This option is another one there, with this value.
    Disagrees(String, String),
    /// Another build, or a world that has changed: a clean start can't do worse.
    Incompatible(String),
}

impl From<RunError> for Unfit {
    fn from(error: RunError) -> Self {
        Self::Refused(error)
    }
}

impl From<HandoverError> for Unfit {
    fn from(error: HandoverError) -> Self {
        Self::Incompatible(error.to_string())
    }
}

impl From<TableError> for Unfit {
    fn from(error: TableError) -> Self {
        Self::Incompatible(error.to_string())
    }
}

impl From<ClientError> for Unfit {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Table(error) => error.into(),
            other => Self::Refused(RunError::bad("--takeover", other, "run as root, or as the user of the running relay")),
        }
    }
}

/// Takes the relay with the same control socket over, if there is one: from its keeper, or, where nobody is left, from the service
/// manager's `store`. After this nothing of it supervises any more; its workers, if any, and its program forward on. `None`: there was
/// none, or it was ended since nothing can be gone on with.
pub fn begin(options: &Options, mut store: Option<&mut Store>) -> Result<Option<Inheritance>, RunError> {
    let bad_rules = engine::load(options).err();
    let stored = store.as_ref().map_or(0, |store| store.count());
    let taken = match (reach(options, stored > 0)?, &store) {
        (Some(keeper), _) => from_keeper(keeper, options, bad_rules)?,
        (None, Some(store)) if stored > 0 => from_store(store, options, bad_rules)?,
        (None, _) => {
            tracing::info!(socket = %options.socket.display(), "no relay to take over (one without --linger can't be): an ordinary start");
            bad_rules.map_or(Ok(None), Err)?
        }
    };
    if taken.is_none() {
        store.iter_mut().for_each(|store| storing::empty(store));
    }
    Ok(taken)
}

/// The keeper, if there is one. Where there is a store, one that is just ending is none.
fn reach(options: &Options, is_stored: bool) -> Result<Option<Client>, RunError> {
    let begin = Instant::now();
    loop {
        let connected = keeper::connect(&options.socket);
        let keeper = connected.map_err(|error| RunError::bad("--takeover", error, "name the socket of your own relay with --socket"))?;
        let is_ending = |keeper: &Client| matches!(keeper.table(), Err(ClientError::Silent | ClientError::System { .. }));
        if !is_stored || begin.elapsed() > ENDS_WITHIN || !keeper.as_ref().is_some_and(is_ending) {
            return Ok(keeper);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn from_keeper(keeper: Client, options: &Options, bad_rules: Option<RunError>) -> Result<Option<Inheritance>, RunError> {
    // Nothing is lost by refusing while a supervisor lives. Orphans would end with their time: they go on by the rules they have.
    if let Some(error) = bad_rules.clone().filter(|_| !is_orphaned(&keeper)) {
        return Err(error);
    }
    let prepared = keeper.table().map_err(Unfit::from).and_then(|table| prepare(table, options));
    match judge(prepared, bad_rules, true)? {
        Some(program) => seize(keeper, program).map(Some),
        None => end(keeper).map(|()| None),
    }
}

/// What the service manager has kept. Nobody works on it, so that whatever it is, refusing would not let it go on.
fn from_store(store: &Store, options: &Options, bad_rules: Option<RunError>) -> Result<Option<Inheritance>, RunError> {
    let nothing = TableError::Malformed("nothing is in the service manager's store");
    let stored = || store.table().and_then(|stored| stored.ok_or(nothing.clone()));
    let prepared = stored().map_err(Unfit::from).and_then(|Stored { mut table, supervisor }| {
        if !process::has_ended(table.take(Role::Supervisor, "")?.as_fd()) {
            let hint = format!("stop the relay of pid {supervisor} first");
            return Err(RunError::bad("--takeover", "the supervisor of what the service manager keeps is alive", hint).into());
        }
        prepare(table, options)
    });
    let program = judge(prepared, bad_rules, false)?;
    let left = stored();
    left.iter().try_for_each(|stored| end_workers(&stored.table))?;
    let Some(program) = program else { return Ok(None) };
    let Stored { mut table, supervisor } = left.map_err(RunError::failure)?;
    let handover = handover(&mut table)?;
    Ok(Some(Inheritance { keeper: None, from: supervisor, table, handover, program }))
}

/// The program to go on with; `None`: a clean start. `is_working`: something forwards that a refusal leaves alone.
fn judge(prepared: Result<Loaded, Unfit>, bad_rules: Option<RunError>, is_working: bool) -> Result<Option<Loaded>, RunError> {
    let why = match prepared {
        Ok(program) => return Ok(Some(program)),
        Err(Unfit::Refused(error)) => return Err(error),
        Err(Unfit::Disagrees(option, theirs)) if is_working => {
            let hint = format!("take over with {option} {theirs}; to change it, stop the relay and start another");
            return Err(RunError::bad(&option, format!("the running relay has {option} {theirs}"), hint));
        }
        Err(Unfit::Disagrees(option, theirs)) => format!("it had {option} {theirs}"),
        Err(Unfit::Incompatible(why)) => why,
    };
    if let Some(error) = bad_rules {
        return Err(error);
    }
    tracing::warn!(%why, "can't go on with the running relay: it is ended, and this one starts clean");
    Ok(None)
}

/// Whether nobody supervises the workers that are to be taken over.
fn is_orphaned(keeper: &Client) -> bool {
    let supervisor = keeper.table().ok().and_then(|mut table| table.take(Role::Supervisor, "").ok());
    supervisor.is_some_and(|pidfd| process::has_ended(pidfd.as_fd()))
}

/// Everything that can be refused. Changes nothing.
fn prepare(mut table: Table, options: &Options) -> Result<Loaded, Unfit> {
    let handover = Handover::read(table.take(Role::Blob, "")?)?;
    if let Some((option, theirs)) = handover.disagreement(options) {
        return Err(Unfit::Disagrees(option, theirs));
    }
    let known = known()?;
    if let Some(port) = handover.ports.iter().find(|port| !port.is_unchanged(&known)) {
        return Err(Unfit::Incompatible(format!("interface {} has gone or come since", port.name)));
    }
    let incompatible = |error: RunError| Unfit::Incompatible(error.to_string());
    let rules = table.take(Role::Rules, "")?;
    snapshots(rules.try_clone().map_err(RunError::failure)?).map_err(incompatible)?;
    Fleet::adopt(options, rules, &mut table, &handover.workers).map_err(incompatible)?;
    Ports::adopt(options, &mut table, &handover, &known).map_err(incompatible)?;
    Ok(engine::load_program(options))
}

fn known() -> Result<BTreeMap<String, Interface>, RunError> {
    let mut interfaces = Interfaces::open().map_err(|error| RunError::failure(format!("netlink: {error}")))?;
    ports::known(&mut interfaces)
}

/// Ends the old supervisor if it lives, and takes what its keeper has then.
fn seize(keeper: Client, program: Loaded) -> Result<Inheritance, RunError> {
    let failed = |error: ClientError| RunError::failure(error).with_hint("try again while the workers linger");
    let mut table = keeper.table().map_err(failed)?;
    let old = table.take(Role::Supervisor, "").map_err(RunError::failure)?;
    if !process::has_ended(old.as_fd()) {
        tracing::info!(pid = keeper.supervisor, "ending the supervisor; its workers forward on");
        process::signal(old.as_fd(), Signal::SIGKILL).map_err(|errno| RunError::failure(format!("ending the supervisor: {errno}")))?;
        wait_for("the supervisor did not end", || process::has_ended(old.as_fd()))?;
        table = keeper.table().map_err(failed)?;
    }
    let handover = handover(&mut table)?;
    Ok(Inheritance { from: keeper.supervisor, keeper: Some(keeper), table, handover, program })
}

fn handover(table: &mut Table) -> Result<Handover, RunError> {
    let blob = table.take(Role::Blob, "").map_err(RunError::failure)?;
    Handover::read(blob).map_err(RunError::failure)
}

/// Waits for the end of workers that have neither supervisor nor keeper any more: they leave by themselves, and are killed if not.
fn end_workers(table: &Table) -> Result<(), RunError> {
    for pidfd in table.of(Role::Process).filter(|pidfd| !process::ends_within(*pidfd, LEAVES_WITHIN)) {
        tracing::warn!("a worker of the relay before is left: killed");
        // ESRCH: it has left meanwhile.
        let _ = process::signal(pidfd, Signal::SIGKILL);
    }
    wait_for("a worker of the relay before did not end", || table.of(Role::Process).all(process::has_ended))
}

/// Ends the whole relay: as it ends by SIGTERM if it has a supervisor, else by its keeper's going.
fn end(keeper: Client) -> Result<(), RunError> {
    let unknown = |error: &dyn std::fmt::Display| {
        RunError::bad("--takeover", error, "stop the running relay, then start this one without --takeover")
    };
    let mut table = keeper.table().map_err(|error| unknown(&error))?;
    let old = table.take(Role::Supervisor, "").map_err(|error| unknown(&error))?;
    drop(table);
    if process::has_ended(old.as_fd()) {
        return keeper.release().map_err(RunError::failure);
    }
    process::signal(old.as_fd(), Signal::SIGTERM).map_err(|errno| RunError::failure(format!("stopping the running relay: {errno}")))?;
    wait_for("the running relay did not stop", || process::has_ended(old.as_fd()))
}

/// What a dead supervisor has left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Orphans {
    /// The supervisor that was.
    pub pid: u32,
    /// Interfaces with its XDP program.
    pub interfaces: Vec<String>,
    /// Rules in force.
    pub rules: usize,
    /// Workers and spares that live.
    pub workers: usize,
}

/// Process id of the dead supervisor of this control socket, where a keeper keeps what it has left.
pub fn orphans_of(socket: &Path) -> Option<u32> {
    keeper::connect(socket).ok().flatten().filter(is_orphaned).map(|keeper| keeper.supervisor)
}

/// Ends what a dead supervisor has left; `None` where there is nothing, or its supervisor lives.
pub fn end_orphans(socket: &Path) -> Result<Option<Orphans>, RunError> {
    let failed = |error: ClientError| RunError::bad("--socket", error, "run as root, or as the user of the relay");
    let Some(keeper) = keeper::connect(socket).map_err(failed)?.filter(is_orphaned) else { return Ok(None) };
    let mut table = keeper.table().map_err(failed)?;
    let handover = table.take(Role::Blob, "").ok().and_then(|blob| Handover::read(blob).ok());
    let workers: Vec<OwnedFd> = table.take_all(Role::Process).into_iter().map(|(_, pidfd)| pidfd).collect();
    let living = || workers.iter().filter(|pidfd| !process::has_ended(pidfd.as_fd())).count();
    let attached = handover.iter().flat_map(|handover| &handover.ports).filter(|port| port.attached && !port.retired);
    let orphans = Orphans {
        pid: keeper.supervisor,
        interfaces: attached.map(|port| port.name.clone()).collect(),
        rules: handover.as_ref().map_or(0, |handover| handover.rules.len()),
        workers: living(),
    };
    // With our duplicates, and the keeper's, everything goes.
    drop(table);
    keeper.release().map_err(RunError::failure)?;
    wait_for("the workers did not leave", || living() == 0)?;
    Ok(Some(orphans))
}

fn wait_for(what: &str, done: impl Fn() -> bool) -> Result<(), RunError> {
    let begin = Instant::now();
    while !done() {
        if begin.elapsed() > ENDS_WITHIN {
            return Err(RunError::failure(what));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// What stands in a predecessor's rules segment: the epoch in force, and the one before if it is still there (a journal may name it).
fn snapshots(fd: OwnedFd) -> Result<Vec<Snapshot>, RunError> {
    let segment = Segment::join(fd, Access::ReadOnly).and_then(|segment| segment.at_least(crate::plan::records::RULES_LEN));
    let (_, mapping) = segment.map_err(RunError::failure)?.into_parts();
    let segment = RulesSegment::join(&mapping).map_err(RunError::failure)?;
    let epoch = segment.epoch();
    let mut found: Vec<Snapshot> = segment.read(epoch.wrapping_sub(1)).into_iter().collect();
    found.push(segment.read(epoch).map_err(RunError::failure)?);
    Ok(found)
}

impl Inheritance {
    /// The workers with their memory.
    pub(super) fn fleet(&mut self, options: &Options, rules: OwnedFd) -> Result<(Fleet, Vec<Umem>), RunError> {
        Fleet::adopt(options, rules, &mut self.table, &self.handover.workers)
    }

    /// The program that was loaded for this.
    pub(super) fn program(&mut self) -> Loaded {
        std::mem::take(&mut self.program)
    }
}

impl Supervisor {
    /// Moves in: ports, rules, locks, counters, what else is left.
    pub(super) fn settle_in(&mut self, inheritance: Inheritance) -> Result<(), RunError> {
        let Inheritance { keeper, from, mut table, handover, program: _ } = inheritance;
        let missing = |error: TableError| RunError::failure(error);
        for snapshot in snapshots(table.take(Role::Rules, "").map_err(missing)?)? {
            self.segment.publish(&snapshot).map_err(RunError::failure)?;
            (self.epoch, self.published) = (snapshot.epoch, snapshot);
        }
        self.ports = Ports::adopt(&self.options, &mut table, &handover, &self.known)?;
        self.book.restore(&handover.rules, handover.next_slots)?;
        for (key, fd) in table.take_all(Role::Lock) {
            let ifindex = number(&key)?;
            self.locks
                .push((ifindex, Lock::adopt(fd).map_err(|errno| RunError::failure(format!("lock of interface {ifindex}: {errno}")))?));
        }
        for (key, fd) in table.take_all(Role::Holder) {
            let address: SocketAddr = key.parse().map_err(|_| RunError::failure(format!("{key} is no address")))?;
            self.holders.adopt(address, fd);
        }
        if let Some(program) = &mut self.program {
            program.go_on_counting(table.take_all(Role::Counters), handover.sums).map_err(RunError::failure)?;
            self.kernel_path.go_on_counting(handover.counted);
        }
        let links = table.take_all(Role::Link).into_iter().map(|(key, fd)| number(&key).map(|ifindex| (ifindex, fd)));
        let links: BTreeMap<u32, OwnedFd> = links.collect::<Result<_, _>>()?;
        self.retired = handover.retired;
        self.keeper = Keeper::new(&self.options, table.take(Role::Listener, "").ok())?;
        let by = if keeper.is_some() { "keeper" } else { "service manager" };
        tracing::info!(from, by, rules = handover.rules.len(), workers = handover.workers.len(), "relay taken over");
        self.estate = Estate { links, rest: table, until: None, keeper };
        Ok(())
    }

    /// Puts our program in the place of the predecessor's, interface by interface.
    pub(super) fn swap_program(&mut self) -> Result<(), RunError> {
        let Some(program) = self.program.as_mut() else { return Ok(()) };
        let mode = if self.options.xdp_mode == super::options::XdpMode::Generic { Mode::Generic } else { Mode::Native };
        while let Some((ifindex, link)) = self.estate.links.pop_first() {
            let attachment = program.take_over(ifindex, link, mode).map_err(RunError::failure)?;
            tracing::info!(ifindex, program = attachment.program_id, "XDP program swapped");
        }
        Ok(())
    }
}

fn number(key: &str) -> Result<u32, RunError> {
    key.parse().map_err(|_| RunError::failure(format!("{key} is no interface index")))
}
