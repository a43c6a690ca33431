//! The workers: their memory, their processes, what becomes of them.
//!
//! ```text
//!            spawn                 RUN seen
//!  Waiting ────────▶ Starting ───────────────▶ Running
//!     ▲                  │ died                  │ died · hung: SIGKILL
//!     │ back-off over    ▼                       ▼
//!     └───────────── Dead (pidfd readable) ◀─────┤
//!                        ▲        drained, 0     │ replace, stop
//!                        └──────────────────── Draining
//! ```
//! A successor starts only after the pidfd of its predecessor is readable (ADOPTION.md: a word does not fence); so does a spare
//! that stands in (`spare.rs`), which the supervisor finds in Starting. Nothing here waits. Must never trust a status segment beyond its bounds.

mod adopt;
mod process;
mod silence;
mod spare;

pub use adopt::KeptWorker;

use self::process::{End, Listener, Process};
use self::silence::Threads;
use self::spare::{Baton, Reserve};
use super::backoff::Backoff;
use super::channels::Meter;
use super::error::RunError;
use super::locks::Lock;
use super::options::{BackendChoice, Options, PipelineChoice, WaitChoice};
use super::ports::{Ports, egress_capacity};
use crate::frame::{FRAME_SIZE, Umem};
use crate::nic::afpacket::Engines;
use crate::plan::manifest::{COMMAND_DRAIN, COMMAND_STOP, Command, Control, LAYOUT_VERSION, Manifest, SpareManifest, WaitMode};
use crate::plan::status::{FrameStats, StatusPage};
use crate::plan::work::WorkLayout;
use crate::shm::{Access, Actor, ChannelStats, HeaderError, Liveness, Reader, Segment, State, Verdict, coarse_now, discovery};
use crate::sys::Mapping;
use crate::sys::process::{Child, Spawn, spawn};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;
use std::time::{Duration, Instant};

/// A worker that shows no heartbeat for so long is replaced: five beats of the default period, which come twice as often as
/// asked for. With the look that finds it, 300 ms at most.
const HUNG_AFTER: Duration = Duration::from_millis(250);
/// The same in periods, for slower heartbeats.
const HUNG_PERIODS: u32 = 2;
/// One that waits for a CPU is given so much more at a time …
const GRANT: Duration = Duration::from_millis(50);
/// … and is replaced after so long all the same.
const HUNG_ANYWAY: Duration = Duration::from_secs(1);
/// A worker that does not reach RUN within this time is replaced.
const START_LIMIT: Duration = Duration::from_secs(10);

/// "Look at your segments", on a life line.
const DOORBELL: u8 = 1;

/// What a worker is doing, as far as the supervisor knows.
#[derive(Debug)]
pub enum Phase {
    /// No process; one starts at this time.
    Waiting(Instant),
    /// Started at this time, not in RUN yet.
    Starting(Instant),
    /// Forwarding.
    Running,
    /// Killed; its pidfd will tell.
    Killed,
    /// Told to drain and exit, at this time; `true`: and to come back.
    Draining(Instant, bool),
    /// Ended for good.
    Ended,
}

/// One worker: the memory that stays, and the process that comes and goes.
#[derive(Debug)]
pub struct Slot {
    /// Number.
    pub id: u32,
    work: OwnedFd,
    umem: OwnedFd,
    pub(super) tap: Arc<Segment>,
    status_segment: Arc<Segment>,
    /// What it reports.
    pub status: StatusPage,
    /// Where its frames are, beat by beat.
    pub(super) reports: Reader<FrameStats>,
    pub(super) report_stats: ChannelStats,
    pub(super) work_view: Arc<Mapping>,
    pub(super) meters: Vec<Meter>,
    pub(super) frames: u32,
    pub(super) egress_capacity: u32,
    liveness: Liveness,
    /// Its threads, and when, once it has been silent for half the time-out.
    doubted: Option<(Duration, Threads)>,
    /// What it does.
    pub phase: Phase,
    process: Option<Process>,
    /// Of a process that was a spare, until it is known to have taken over.
    baton: Option<Baton>,
    reserve: Reserve,
    generation: u32,
    turns_at_start: u64,
    /// Unplanned replacements.
    pub restarts: u64,
    /// How the last process ended.
    pub last_exit: String,
    backoff: Backoff,
}

/// Memory of a worker, new or another supervisor's.
struct Memory {
    umem: (OwnedFd, Arc<Mapping>),
    work: OwnedFd,
    status: (Arc<Segment>, StatusPage, Reader<FrameStats>),
}

/// All workers.
pub struct Fleet {
    /// By number.
    pub slots: Vec<Slot>,
    executable: OwnedFd,
    null: OwnedFd,
    rules: OwnedFd,
    user: Option<(u32, u32)>,
    split: bool,
    io_uring: Engines,
    wait: WaitMode,
    heartbeat: Duration,
    cpus: Vec<usize>,
    frames: u32,
    spares: bool,
    start: Instant,
}

fn failed(what: &'static str) -> impl Fn(nix::errno::Errno) -> RunError {
    move |errno| RunError::failure(format!("{what}: {errno}"))
}

/// Who workers run as: `--worker-user`, else `relay-worker`, else 65534; `None` in a user namespace with one uid.
fn worker_user(asked: Option<&str>) -> Result<Option<(u32, u32)>, RunError> {
    use nix::unistd::User;
    let known = |name: &str| User::from_name(name).ok().flatten().map(|user| (user.uid.as_raw(), user.gid.as_raw()));
    if let Some(name) = asked {
        let number = name.parse::<u32>().ok().map(|uid| (uid, uid));
        let hint = "name an existing user, or a numeric uid";
        return known(name).or(number).map(Some).ok_or_else(|| RunError::bad("--worker-user", format!("no user {name}"), hint));
    }
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let uids: u64 = map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum();
    if uids <= 1 || !nix::unistd::geteuid().is_root() {
        return Ok(None);
    }
    Ok(Some(known("relay-worker").unwrap_or((65_534, 65_534))))
}

impl Fleet {
    /// Memory for all workers; returns it with the UMEMs, which only the maker of sockets needs.
    pub fn new(options: &Options, rules: OwnedFd) -> Result<(Self, Vec<Umem>), RunError> {
        let mut fleet = Self::empty(options, rules)?;
        let mut umems = Vec::new();
        // The kernel path alone needs no process.
        let workers = if options.backend == BackendChoice::Kernel { 0 } else { options.workers };
        for id in 0..workers {
            let (slot, umem) = fleet.slot(id, fleet.memory()?)?;
            fleet.slots.push(slot);
            umems.push(umem);
        }
        Ok((fleet, umems))
    }

    fn empty(options: &Options, rules: OwnedFd) -> Result<Self, RunError> {
        use nix::fcntl::{OFlag, open};
        use nix::sys::stat::Mode;
        let executable =
            open("/proc/self/exe", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed("opening the executable"))?;
        let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed("/dev/null"))?;
        Ok(Self {
            slots: Vec::new(),
            executable,
            null,
            rules,
            user: worker_user(options.worker_user.as_deref())?,
            split: splits(options),
            wait: match options.wait {
                WaitChoice::Spin => WaitMode::Spin,
                WaitChoice::Adaptive => WaitMode::Adaptive,
                WaitChoice::Poll => WaitMode::Poll,
            },
            io_uring: options.io_uring,
            heartbeat: options.heartbeat,
            cpus: options.cpus.clone().unwrap_or_default(),
            frames: options.frames,
            spares: options.spare,
            start: Instant::now(),
        })
    }

    fn memory(&self) -> Result<Memory, RunError> {
        let create = |name: &str, len| Segment::create(name, len).map(Segment::into_parts).map_err(RunError::failure);
        let umem = create("relay-umem", self.frames as usize * FRAME_SIZE as usize)?;
        let (work, _) = create("relay-work", WorkLayout::new(self.frames, egress_capacity(self.frames, self.split)).len)?;
        Ok(Memory { umem, work, status: StatusPage::create().map_err(RunError::failure)? })
    }

    fn slot(&self, id: u32, memory: Memory) -> Result<(Slot, Umem), RunError> {
        let Memory { umem: (umem, umem_mapping), work, status: (status_segment, status, reports) } = memory;
        let egress_capacity = egress_capacity(self.frames, self.split);
        let (work, work_view) = Segment::join(work, Access::ReadOnly).map_err(RunError::failure)?.into_parts();
        let tap = crate::plan::tap::create().map_err(RunError::failure)?;
        let mapping = Arc::into_inner(umem_mapping).ok_or_else(|| RunError::failure("UMEM mapped twice"))?;
        let slot = Slot {
            id,
            work,
            umem,
            tap,
            status_segment,
            status,
            reports,
            report_stats: ChannelStats::default(),
            work_view,
            meters: Vec::new(),
            frames: self.frames,
            egress_capacity,
            liveness: Liveness::new(HUNG_AFTER.max(self.heartbeat * HUNG_PERIODS), Duration::ZERO),
            doubted: None,
            phase: Phase::Waiting(Instant::now()),
            process: None,
            baton: None,
            reserve: Reserve::new(),
            generation: 0,
            turns_at_start: 0,
            restarts: 0,
            last_exit: String::new(),
            backoff: Backoff::new(u64::from(std::process::id()) ^ u64::from(id)),
        };
        Ok((slot, Umem::new(mapping)))
    }

    /// Whether workers run two threads.
    pub const fn is_split(&self) -> bool {
        self.split
    }

    /// Uid of the workers.
    pub fn uid(&self) -> u32 {
        self.user.map_or_else(|| nix::unistd::geteuid().as_raw(), |(uid, _)| uid)
    }

    /// CPUs of a worker's threads.
    fn cpus_of(&self, id: u32) -> Vec<usize> {
        let threads = if self.split { 2 } else { 1 };
        let first = id as usize * threads;
        let count = self.cpus.len();
        (0..threads).filter_map(|thread| self.cpus.get((first + thread) % count.max(1)).copied()).collect()
    }

    /// Starts the processes whose time has come. They inherit the locks: while one of them lives, nobody else serves the
    /// interfaces. Returns whether there were any.
    pub fn start_due(&mut self, now: Instant, ports: &Ports, locks: &[(u32, Lock)]) -> Result<bool, RunError> {
        let mut any = self.start_spares(now, ports, locks);
        for index in 0..self.slots.len() {
            let is_due = |slot: &Slot| matches!(slot.phase, Phase::Waiting(at) if now >= at) && !slot.reserve.is_leaving();
            if self.slots.get(index).is_some_and(is_due) {
                self.spawn(index, ports, locks)?;
                any = true;
            }
        }
        Ok(any)
    }

    /// Starts a keeper, as the workers' user.
    pub fn start_keeper(&self, environment: &[(&str, String)], inherit: &[i32]) -> nix::Result<Child> {
        let environment: Vec<CString> = environment.iter().map(|(name, value)| c_string(format!("{name}={value}"))).collect();
        spawn(&Spawn {
            executable: self.executable.as_fd(),
            arguments: &[c_string("relay-keeper".into())],
            environment: &environment,
            user: self.user,
            stderr: self.null.as_fd(),
            inherit,
            null: self.null.as_fd(),
            listener: None,
        })
    }

    /// When the next process is to start, or to be given up as hung.
    pub fn next_deadline(&self) -> Option<Instant> {
        let deadline = |slot: &Slot| match slot.phase {
            Phase::Waiting(at) => Some(at),
            Phase::Running => Some(self.start + slot.liveness.deadline()).into_iter().chain(slot.spare_due()).min(),
            _ => None,
        };
        self.slots.iter().filter_map(deadline).min()
    }

    /// A cold start.
    fn spawn(&mut self, index: usize, ports: &Ports, locks: &[(u32, Lock)]) -> Result<(), RunError> {
        let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
        slot.prepare().map_err(RunError::failure)?;
        let process = self.launch(index, None, ports, locks)?;
        let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
        tracing::info!(worker = slot.id, pid = process.child.pid, generation = slot.generation, "worker started");
        slot.process = Some(process);
        slot.phase = Phase::Starting(Instant::now());
        Ok(())
    }

    /// Starts a process; with a baton, one that waits for the death of the present one.
    fn launch(&mut self, index: usize, baton: Option<&Baton>, ports: &Ports, locks: &[(u32, Lock)]) -> Result<Process, RunError> {
        use nix::fcntl::OFlag;
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
        let gone = || RunError::failure(format!("no worker {index}"));
        let cpus = self.slots.get(index).map(|slot| self.cpus_of(slot.id)).ok_or_else(gone)?;
        let pair = || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).map_err(failed("socketpair"));
        let (life, theirs) = pair()?;
        let listener = self.spares.then(pair).transpose()?;
        let (log, stderr) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(failed("pipe"))?;
        let slot = self.slots.get_mut(index).ok_or_else(gone)?;
        slot.generation += 1;
        let waits_for = baton.and_then(|baton| Some((slot.process.as_mut()?.ends(), baton.as_fd())));
        let manifest = Manifest {
            version: LAYOUT_VERSION,
            worker: slot.id,
            generation: slot.generation,
            frame_count: self.frames,
            egress_capacity: slot.egress_capacity,
            umem_fd: slot.umem.as_raw_fd(),
            work_fd: slot.work.as_raw_fd(),
            rules_fd: self.rules.as_raw_fd(),
            tap_fd: slot.tap.as_fd().as_raw_fd(),
            life_fd: theirs.as_raw_fd(),
            split: self.split,
            io_uring: self.io_uring,
            wait: self.wait,
            cpus,
            heartbeat_ms: self.heartbeat.as_millis() as u64,
            ports: ports.manifest(index, self.frames),
            orphans: ports.orphans(index, self.frames),
            spare: waits_for.map(|((worker, listener), baton)| SpareManifest {
                worker_fd: worker.as_raw_fd(),
                listener_fd: listener.map_or(-1, |listener| listener.as_raw_fd()),
                baton_fd: baton.as_raw_fd(),
            }),
        };
        let control = Control::create(&manifest).map_err(RunError::failure)?;
        let segments = [control.as_fd(), slot.status_segment.as_fd(), slot.umem.as_fd(), slot.work.as_fd(), slot.tap.as_fd()];
        let watched = waits_for.map(|((worker, listener), baton)| [Some(worker), listener, Some(baton)]).into_iter().flatten().flatten();
        let fixed = segments.into_iter().chain([self.rules.as_fd(), theirs.as_fd()]).chain(watched);
        let locks = locks.iter().map(|(_, lock)| lock.fd.as_raw_fd());
        let inherit: Vec<i32> = fixed.map(|fd| fd.as_raw_fd()).chain(ports.descriptors(index)).chain(locks).collect();
        slot.watch_rings(manifest.ports.len()).map_err(RunError::failure)?;
        let environment =
            discovery::variables(slot.id, &control, &*slot.status_segment).map(|(name, value)| c_string(format!("{name}={value}")));
        let child = spawn(&Spawn {
            executable: self.executable.as_fd(),
            arguments: &[c_string(format!("relay-worker-{}", slot.id))],
            environment: &environment,
            user: self.user,
            stderr: stderr.as_fd(),
            inherit: &inherit,
            null: self.null.as_fd(),
            listener: listener.as_ref().map(|(_, theirs)| theirs.as_fd()),
        })
        .map_err(failed("starting a worker"))?;
        let listener = listener.map_or(Listener::None, |(ours, _)| Listener::ToCome(ours));
        Ok(Process::new(child, listener, Some(control), Some(life), Some(log)))
    }

    /// Time since the fleet was made.
    fn age(&self) -> Duration {
        self.start.elapsed()
    }

    /// Looks at every process: dead, in RUN, hung. Returns whether anything changed.
    pub fn look(&mut self, now: Instant) -> bool {
        let age = self.age();
        let mut changed = false;
        for slot in &mut self.slots {
            changed |= slot.look(now, age);
        }
        changed
    }

    /// Whether every worker forwards, but for those in a crash loop (they would hold everybody up).
    pub fn settled(&self) -> bool {
        let settled = |slot: &Slot| match slot.phase {
            Phase::Running => true,
            Phase::Waiting(_) => slot.backoff.degraded(),
            _ => false,
        };
        self.slots.iter().all(settled)
    }

    /// Whether every worker that forwards uses this epoch (one that does not forward takes it at its start).
    pub fn all_acked(&self, epoch: u32) -> bool {
        self.slots.iter().all(|slot| !matches!(slot.phase, Phase::Running) || slot.status.acked_epoch.load(Acquire) == epoch)
    }

    /// Kills the workers that have not acknowledged the epoch.
    pub fn kill_laggards(&mut self, epoch: u32) {
        for slot in &mut self.slots {
            if matches!(slot.phase, Phase::Running) && slot.status.acked_epoch.load(Acquire) != epoch {
                tracing::warn!(worker = slot.id, epoch, "worker does not take the new rules: replaced");
                slot.kill();
                slot.phase = Phase::Killed;
            }
        }
    }

    /// Wakes sleeping workers.
    pub fn ring(&self) {
        self.slots.iter().flat_map(Slot::processes).for_each(|process| process.tell(DOORBELL));
    }

    /// Planned replacement of every worker: drain, exit, successor with the present ports.
    pub fn replace_all(&mut self) {
        self.command(COMMAND_DRAIN, true);
    }

    /// Drains and ends every worker.
    pub fn stop_all(&mut self) {
        self.command(COMMAND_STOP, false);
    }

    fn command(&mut self, command: Command, back: bool) {
        let (now, age) = (Instant::now(), self.age());
        for slot in &mut self.slots {
            slot.dismiss_spare(now, age);
            let Some(process) = &mut slot.process else {
                slot.phase = if back { Phase::Waiting(now) } else { Phase::Ended };
                continue;
            };
            if let Some(control) = &mut process.control {
                control.command(command);
            }
            slot.phase = Phase::Draining(now, back);
        }
        self.ring();
    }

    /// Whether no process is left.
    pub fn all_ended(&self) -> bool {
        self.slots.iter().all(|slot| slot.processes().next().is_none())
    }

    /// Ends what is left at once.
    pub fn kill_all(&mut self) {
        self.slots.iter().flat_map(Slot::processes).for_each(Process::kill);
    }

    /// What to poll.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.slots.iter().flat_map(Slot::processes).flat_map(Process::descriptors)
    }

    /// Passes on what workers have written to their stderr.
    pub fn read_logs(&mut self) {
        for slot in &mut self.slots {
            let id = slot.id;
            slot.process.iter_mut().chain(slot.reserve.processes_mut()).for_each(|process| process.read_log(id));
        }
    }
}

/// Whether workers run two threads.
pub fn splits(options: &Options) -> bool {
    options.pipeline == PipelineChoice::Split || (options.pipeline == PipelineChoice::Auto && allowed_cpus(options) >= 3)
}

fn allowed_cpus(options: &Options) -> usize {
    match &options.cpus {
        Some(cpus) => cpus.len(),
        None => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
    }
}

fn c_string(text: String) -> CString {
    CString::new(text).unwrap_or_default()
}

impl Slot {
    /// Process id, 0 between two processes.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, |process| process.child.pid)
    }

    /// Its process, its spare, and one that leaves.
    fn processes(&self) -> impl Iterator<Item = &Process> {
        self.process.iter().chain(self.reserve.processes())
    }

    /// Name of the state in `status`.
    pub fn state(&self) -> &'static str {
        match self.phase {
            Phase::Waiting(_) if self.backoff.degraded() => "degraded",
            Phase::Waiting(_) | Phase::Starting(_) => "boot",
            Phase::Running => "run",
            Phase::Killed => "fail",
            Phase::Draining(..) | Phase::Ended => "halt",
        }
    }

    /// Age of the last heartbeat, by the worker's own stamp.
    pub fn heartbeat_age(&self) -> Duration {
        self.status.header.last_beat().age(coarse_now())
    }

    /// Where its frames were at its last beat.
    pub fn frames(&self) -> Option<FrameStats> {
        self.reports.latest()
    }

    /// Commands given to the process, and bytes of its control segment.
    pub fn control_stats(&self) -> (u64, u64) {
        let control = self.process.as_ref().and_then(|process| process.control.as_ref());
        control.map_or((0, 0), |control| (control.sent(), control.memory_bytes()))
    }

    /// The segment for a successor: back to BOOT.
    fn prepare(&mut self) -> Result<(), HeaderError> {
        self.turns_at_start = self.status.header.turns();
        if self.status.header.state() == Some(State::Boot) {
            return Ok(());
        }
        self.status.header.become_state(State::Boot, Actor::Supervisor)
    }

    /// Whether its heartbeat has stood still for too long, and not for want of a CPU.
    fn silent(&mut self, age: Duration) -> Option<Duration> {
        let verdict = self.liveness.observe(self.status.header.last_beat().count, age);
        if self.liveness.silent(age) < self.liveness.timeout() / 2 {
            self.doubted = None;
            return None;
        }
        let pid = self.pid();
        let (since, before) = self.doubted.get_or_insert_with(|| (age, Threads::of(pid)));
        let Verdict::Hung(silent) = verdict else { return None };
        let doubted_for = age.saturating_sub(*since);
        // Seen for the first time: the supervisor was away itself, or all the machine was.
        let too_soon = doubted_for < GRANT / 2;
        if silent < HUNG_ANYWAY && (too_soon || Threads::of(pid).starved_since(before, doubted_for)) {
            self.liveness.grant(GRANT);
            return None;
        }
        Some(silent)
    }

    /// Whether its process, and not one before it, says that it forwards.
    fn runs(&self) -> bool {
        self.status.header.state() == Some(State::Run) && self.status.header.owner() == self.pid()
    }

    fn kill(&self) {
        self.process.iter().for_each(Process::kill);
    }

    fn look(&mut self, now: Instant, age: Duration) -> bool {
        self.watch();
        if self.reap(now, age) {
            return true;
        }
        self.look_at_spare(now);
        self.process.iter_mut().for_each(|process| _ = process.hear());
        let pending = self.is_pending();
        match self.phase {
            Phase::Starting(since) if pending => {
                if Self::stands_in_too_late(since) {
                    tracing::warn!(worker = self.id, "the spare does not stand in: killed");
                    self.kill();
                    self.phase = Phase::Killed;
                }
                false
            }
            Phase::Starting(since) if self.runs() => {
                tracing::info!(worker = self.id, pid = self.pid(), took = ?since.elapsed(), recovered = self.status.recovered.load(Acquire), "worker forwards");
                self.phase = Phase::Running;
                self.reserve.worker_runs(now);
                self.liveness = self.liveness.restarted(age);
                self.doubted = None;
                true
            }
            Phase::Starting(since) if since.elapsed() > START_LIMIT => {
                tracing::warn!(worker = self.id, "worker does not come up: killed");
                self.kill();
                self.phase = Phase::Killed;
                false
            }
            Phase::Running => {
                if let Some(silent) = self.silent(age) {
                    tracing::warn!(worker = self.id, ?silent, "worker hangs: killed");
                    self.kill();
                    self.phase = Phase::Killed;
                }
                false
            }
            Phase::Draining(since, _) if since.elapsed() > Duration::from_millis(800) => {
                self.kill();
                false
            }
            _ => false,
        }
    }

    /// Notes the end of the process, if it has ended. A spare, if there is one, is the worker then.
    fn reap(&mut self, now: Instant, age: Duration) -> bool {
        let header = Arc::clone(&self.status.header);
        let has_halted = || header.state() == Some(State::Halt);
        let Some(End { words, clean }) = self.process.as_ref().and_then(|process| process.end(has_halted)) else { return false };
        let halted = has_halted();
        let asked = matches!(self.phase, Phase::Draining(..));
        let spare = if asked || halted { None } else { self.reserve.take() };
        if !halted && spare.is_none() {
            // From any state, and from a word that is none; so it cannot be refused.
            let _ = self.status.header.become_state(State::Fail, Actor::Supervisor);
        }
        self.process.iter_mut().for_each(|process| process.read_log(self.id));
        let words = self.process.iter().fold(words, |words, process| process.explain(words));
        // Counts it, if it was a spare that has stood in and is gone before anybody looked.
        self.is_pending();
        (self.process, self.baton) = (None, None);
        if halted {
            // It left without being asked: no spare stands in for that.
            self.dismiss_spare(now, age);
        }
        self.phase = match self.phase {
            Phase::Draining(_, false) => Phase::Ended,
            Phase::Draining(_, true) if clean => Phase::Waiting(now),
            _ => {
                self.restarts += 1;
                self.last_exit = words.clone();
                let proved = self.status.header.turns() != self.turns_at_start;
                let restart = self.backoff.died(age, proved);
                tracing::warn!(worker = self.id, exit = %words, after = ?restart.after, degraded = restart.degraded, "worker died");
                spare.map_or(Phase::Waiting(now + restart.after), |spare| self.stand_in(spare, now))
            }
        };
        true
    }
}
