//! The Run state: recover → prime → turns with housekeeping → drain → halt, fused (one thread) or split (two).
//!
//! What needs calls that the box does not have (the egress thread, a CPU) is made before: the [`Crew`].
//!
//! Two spinning threads and fewer CPUs than they and their neighbours need: then a thread that has nothing to do, or that
//! has filled a ring for the other, gives its CPU away (sched_yield, one a turn at most). Waiting for the scheduler's slice
//! to end overflowed the egress ring; never where the worker has one thread or CPUs enough.
//!
//! Housekeeping happens when due, never per packet: new epoch, command, heartbeat, supervisor's death. Must never wait
//! without a bound.

use super::adopt::Adopted;
use super::ledger::Ledger;
use super::port::{AnyReceive, AnyTransmit};
use super::sandbox;
use super::snapshot;
use super::team::pin;
use super::wait::{self, Life, WaitPolicy};
use crate::datapath::egress::Egress;
use crate::datapath::ingress::Ingress;
use crate::datapath::table::Table;
use crate::nic::ReceiveCounters;
use crate::plan::counters::{Counter, output_zero, port_drop, rule_range};
use crate::plan::fate::DropReason;
use crate::plan::manifest::{COMMAND_DRAIN, COMMAND_RUN, Manifest, Orders, PortKind, PortManifest};
use crate::plan::records::{RecordsError, RulesSegment};
use crate::plan::status::{FrameStats, StatusPage};
use crate::ring::memory::{Heap, LINE_SIZE};
use crate::ring::{SleepFlag, Words};
use crate::shm::{Actor, HeaderError, State, Writer, coarse_now};
use crate::sys::SharedArray;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// Turns between two looks at the clock while packets flow.
const TURNS_PER_LOOK: u32 = 64;
/// Between two looks at the life socket.
const LIFE_PERIOD: Duration = Duration::from_millis(10);
/// Longest time a drain may take before what is left is given up (it stays in the rings for a successor).
const DRAIN_LIMIT: Duration = Duration::from_millis(500);
/// Longest sleep of an idle worker: the life socket is polled anyway, the heartbeat must not be late.
const MAX_SLEEP: Duration = Duration::from_millis(50);

/// A split worker with fewer CPUs than this shares them with whoever sends and receives.
const CROWDED_BELOW: usize = 3;

/// Why a worker gave up.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The rules segment can't be read.
    #[error(transparent)]
    Records(#[from] RecordsError),
    /// A CPU of the manifest can't be used.
    #[error("{0} (--cpus)")]
    Affinity(#[from] super::error::Error),
    /// The status segment does not permit what happens.
    #[error("status segment: {0}")]
    State(#[from] HeaderError),
    /// The egress thread could not be started, or panicked.
    #[error("egress thread: {0}")]
    Thread(String),
}

/// The threads of a worker, each on its CPU: what is made before its box closes.
pub struct Crew {
    mate: Option<Mate>,
    crowded: bool,
    boxed: bool,
}

impl Crew {
    /// Pins this thread, and starts the egress thread if there is to be one; it waits for its work.
    pub fn hire(manifest: &Manifest) -> Result<Self, RunError> {
        // Asked by a thread that is pinned already, the kernel would count one CPU.
        let crowded = is_crowded(manifest);
        manifest.cpus.first().map_or(Ok(()), |cpu| pin(*cpu))?;
        let mate = if manifest.split { Some(Mate::hire(manifest, crowded)?) } else { None };
        Ok(Self { mate, crowded, boxed: false })
    }

    /// What the worker is made of is known now, and no thread follows. A kernel without the filter is said, not fatal: the
    /// worker has no capability and no descriptor that it does not need.
    pub fn close_box(&mut self, manifest: &Manifest) {
        let is_packet = |port: &PortManifest| port.kind == PortKind::Packet;
        let parts = sandbox::Parts {
            split: manifest.split,
            packet: manifest.ports.iter().any(is_packet),
            coalesce: manifest.ports.iter().any(|port| port.coalesce_fd >= 0),
            spare: manifest.spare.is_some(),
            ports: manifest.ports.len(),
        };
        if !std::mem::replace(&mut self.boxed, true)
            && let Err(error) = sandbox::close(parts)
        {
            eprintln!("worker: not confined: {error}");
        }
    }
}

/// Runs an adopted worker to its end.
pub fn run(adopted: Adopted, crew: Crew) -> Result<(), RunError> {
    let status = adopted.status.clone();
    let result = Worker::start(adopted, crew).and_then(Worker::run);
    let end = if result.is_ok() { State::Halt } else { State::Fail };
    status.header.become_state(end, Actor::Worker).map_err(RunError::from).and(result)
}

/// What both threads of a split worker share.
#[derive(Default)]
struct Link {
    stop: AtomicBool,
    turns: AtomicU64,
}

/// The egress thread, from the ingress thread's side.
struct Mate {
    link: Arc<Link>,
    asleep: SleepFlag,
    thread: Thread,
    work: SyncSender<Egress<AnyTransmit>>,
    done: Receiver<Egress<AnyTransmit>>,
}

impl Mate {
    fn hire(manifest: &Manifest, crowded: bool) -> Result<Self, RunError> {
        let failed = |error: String| RunError::Thread(error);
        let memory = Arc::new(Heap::new(LINE_SIZE));
        let word = || Words::new(memory.clone(), 0, 1).ok_or_else(|| failed("no memory for the sleep flag".into()));
        let (asleep, sleeper) = (SleepFlag::waker(word()?), SleepFlag::sleeper(word()?));
        let link = Arc::<Link>::default();
        let (ours, cpu) = (Arc::clone(&link), manifest.cpus.get(1).copied());
        let policy = WaitPolicy::new(manifest.wait, MAX_SLEEP);
        let (started, ready) = sync_channel(1);
        let (work, given) = sync_channel(1);
        let (finished, done) = sync_channel(1);
        let thread = move || {
            // A CPU that can't be used was refused for the first thread already; here the inherited affinity is the fall-back.
            let _ = cpu.map(pin);
            // All receivers live as long as the process, unless the other thread has failed: then this one has no work left.
            let _ = started.send(());
            if let Ok(egress) = given.recv() {
                let _ = finished.send(egress_thread(egress, &ours, sleeper, policy, crowded));
            }
            // The end of a thread takes calls that the box does not have; the end of the process takes it along.
            loop {
                std::thread::park();
            }
        };
        let thread = std::thread::Builder::new().name("egress".into()).spawn(thread).map_err(|error| failed(error.to_string()))?;
        ready.recv().map_err(|_| failed("panicked".into()))?;
        Ok(Self { link, asleep, thread: thread.thread().clone(), work, done })
    }

    /// Gives it its half.
    fn begin(&self, egress: Egress<AnyTransmit>) -> Result<(), RunError> {
        self.work.send(egress).map_err(|_| RunError::Thread("panicked".into()))
    }

    /// Wakes the egress thread if it sleeps (ring/sleep.rs says why none is missed).
    fn wake(&mut self) {
        if self.asleep.must_ring() {
            self.thread.unpark();
        }
    }

    /// Lets it finish its turn and gives its half back.
    fn join(&mut self) -> Result<Egress<AnyTransmit>, RunError> {
        self.link.stop.store(true, Release);
        self.wake();
        self.done.recv().map_err(|_| RunError::Thread("panicked".into()))
    }
}

#[expect(clippy::large_enum_variant, reason = "one value a process; a box would cost every fused turn an indirection")]
enum Pipeline {
    Fused(Egress<AnyTransmit>),
    Split(Mate),
}

struct Worker {
    manifest: Manifest,
    orders: Orders,
    status: StatusPage,
    reports: Writer<FrameStats>,
    turns: u64,
    rules: RulesSegment,
    ingress: Ingress<AnyReceive>,
    pipeline: Pipeline,
    ledger: Ledger,
    life: OwnedFd,
    table: Table,
    policy: WaitPolicy,
    crowded: bool,
    next_beat: Instant,
    next_life: Instant,
    lot: Life,
    egress_turns: u64,
    port_counters: Vec<ReceiveCounters>,
}

impl Worker {
    fn start(adopted: Adopted, mut crew: Crew) -> Result<Self, RunError> {
        let Adopted { manifest, orders, status, reports, rules, table, mut ingress, mut egress, ledger, life, orphans } = adopted;
        manifest.cpus.iter().take(1).for_each(|cpu| status.set_cpu(*cpu));
        let orphans = orphans.without(&ingress.frames_in_hand());
        let egress_state = egress.recover();
        let (ingress_state, replayed) = ingress.recover(|epoch| snapshot::load(&rules, epoch).ok());
        let standing = egress.standing_frames();
        let reclaimed = ingress.reclaim(&standing) + orphans.bury(&mut ingress, &mut egress);
        status.recovered.store(ingress_state | egress_state << 8, Release);
        status.replayed.store(status.replayed.load(Acquire) + u64::from(replayed), Release);
        status.reclaimed.store(status.reclaimed.load(Acquire) + u64::from(reclaimed), Release);
        let table = match table.filter(|table| table.epoch() == rules.epoch()) {
            Some(table) => table,
            None => snapshot::load(&rules, rules.epoch())?,
        };
        ingress.prime();
        let period = Duration::from_millis(manifest.heartbeat_ms.max(1));
        let policy = WaitPolicy::new(manifest.wait, MAX_SLEEP.min(period / 2));
        let pipeline = match crew.mate.take() {
            Some(mate) => mate.begin(egress).map(|()| Pipeline::Split(mate))?,
            None => Pipeline::Fused(egress),
        };
        let now = Instant::now();
        let mut worker = Self {
            crowded: crew.crowded,
            turns: status.header.turns(),
            manifest,
            orders,
            status,
            reports,
            rules,
            ingress,
            pipeline,
            ledger,
            life,
            table: Table::default(),
            policy,
            next_beat: now,
            next_life: now,
            lot: Life::Alive,
            egress_turns: 0,
            port_counters: Vec::new(),
        };
        worker.port_counters = vec![ReceiveCounters::default(); worker.ingress.ports().len()];
        worker.adopt_table(table);
        worker.beat();
        crew.close_box(&worker.manifest);
        worker.status.commands.store(0, Release);
        worker.status.header.become_state(State::Run, Actor::Worker)?;
        wait::knock(&worker.life);
        Ok(worker)
    }

    /// Swaps the snapshot: counters of new rules start at 0, then the supervisor is told.
    fn adopt_table(&mut self, table: Table) {
        let page = &self.status;
        for rule in table.rules() {
            let zeros = || rule_range(rule.slot as usize).map(|index| (index, Counter::default()));
            zero_if_new(&page.rule_serials, rule.slot, rule.serial, zeros, &page.ingress);
            for output in &rule.outputs {
                let zeros = || output_zero(output.slot as usize, |index| page.egress.get(index));
                zero_if_new(&page.output_serials, output.slot, rule.serial, zeros, &page.ingress);
            }
        }
        let epoch = table.epoch();
        self.table = table;
        self.status.acked_epoch.store(epoch, Release);
    }

    /// Forwards to the end. The process ends next; what it owns is left to the kernel, which needs no call for it.
    fn run(mut self) -> Result<(), RunError> {
        let end = self.forward().and_then(|()| self.drain());
        std::mem::forget(self);
        end
    }

    fn forward(&mut self) -> Result<(), RunError> {
        let mut until_look = TURNS_PER_LOOK;
        let mut idle_since = None;
        while self.orders.command() == COMMAND_RUN && self.lot == Life::Alive {
            let moved = self.turn(true)?;
            until_look -= 1;
            if moved > 0 && until_look > 0 {
                idle_since = None;
                continue;
            }
            until_look = TURNS_PER_LOOK;
            let now = Instant::now();
            if now >= self.next_life {
                self.housekeeping(now);
            }
            // One that is to leave must not sleep first: nobody would wake it.
            if moved == 0 && self.lot == Life::Alive {
                let since = *idle_since.get_or_insert(now);
                self.sleep(now - since);
            } else {
                idle_since = None;
            }
        }
        Ok(())
    }

    /// One turn of the ingress side, and of the egress side where it is ours.
    fn turn(&mut self, receiving: bool) -> Result<usize, RunError> {
        let epoch = self.rules.epoch();
        if epoch != self.table.epoch() {
            self.reload(epoch)?;
        }
        self.ingress.want(self.rules.wanted());
        let taken = self.ingress.turn(&self.table, receiving);
        if taken > 0 {
            self.turns += 1;
            self.status.header.set_turns(self.turns);
        }
        Ok(match &mut self.pipeline {
            Pipeline::Fused(egress) => taken + egress.turn(),
            Pipeline::Split(mate) => {
                if taken > 0 {
                    mate.wake();
                    if self.crowded && self.ingress.is_pressed() {
                        std::thread::yield_now();
                    }
                }
                taken
            }
        })
    }

    fn reload(&mut self, epoch: u32) -> Result<(), RunError> {
        match snapshot::load(&self.rules, epoch) {
            Ok(table) => self.adopt_table(table),
            // Overtaken by the next epoch while reading: the next turn takes that one.
            Err(RecordsError::Stale(_)) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn housekeeping(&mut self, now: Instant) {
        self.next_life = now + LIFE_PERIOD;
        // Once told to leave, it leaves.
        if self.lot == Life::Alive {
            self.lot = wait::life(&self.life);
        }
        if now >= self.next_beat && self.pulse() {
            self.next_beat = now + Duration::from_millis(self.manifest.heartbeat_ms.max(1)) / 2;
            self.beat();
        }
    }

    /// Whether the egress thread has made a turn since the last beat (a hung thread must not hide behind the other).
    fn pulse(&mut self) -> bool {
        let Pipeline::Split(mate) = &self.pipeline else { return true };
        let turns = mate.link.turns.load(Acquire);
        std::mem::replace(&mut self.egress_turns, turns) != turns
    }

    fn beat(&mut self) {
        self.count_port_drops();
        self.reports.hold();
        self.ingress.hold_tap();
        if let Some(frames) = self.ledger.read() {
            // Without a gate a channel takes every message.
            let _ = self.reports.send(&frames);
        }
        self.status.header.beat(coarse_now());
    }

    /// Adds what the ports have dropped since the last beat to their counters.
    fn count_port_drops(&mut self) {
        let counters = &self.status.ingress;
        for (port, before) in self.ingress.ports_mut().iter_mut().zip(&mut self.port_counters) {
            let now = port.receive.housekeeping();
            let add = |reason, packets: u64| {
                let index = port_drop(port.number, reason) as usize;
                let counter = counters.get(index);
                counters.set(index, Counter { packets: counter.packets + packets, ..counter });
            };
            add(DropReason::TooBig, now.too_big - before.too_big);
            add(DropReason::InvalidDescriptor, now.invalid - before.invalid);
            add(DropReason::FillEmpty, now.kernel_dropped - before.kernel_dropped);
            add(DropReason::RxRingFull, now.ring_full - before.ring_full);
            *before = now;
        }
    }

    fn sleep(&mut self, idle: Duration) {
        let busy = match &mut self.pipeline {
            Pipeline::Fused(egress) => egress.is_busy(),
            Pipeline::Split(_) => false,
        };
        let Some(bound) = self.policy.sleep(idle, busy) else {
            if self.crowded {
                std::thread::yield_now();
            }
            return;
        };
        let mut fds: Vec<BorrowedFd<'_>> = self.ingress.ports().iter().filter_map(|port| port.receive.as_fd()).collect();
        fds.push(self.life.as_fd());
        wait::sleep(&fds, bound);
        self.next_life = self.next_life.min(Instant::now());
    }

    /// Takes what is left (on a planned replacement, and without a supervisor, only what would die with this process: the
    /// successor finds the rest in the RX ring or the socket) and sends what is in hand.
    fn drain(&mut self) -> Result<(), RunError> {
        let limit = Instant::now() + DRAIN_LIMIT;
        let replaced = self.orders.command() == COMMAND_DRAIN || self.lot != Life::Alive;
        self.status.commands.store(self.orders.stats().received as u32, Release);
        while !replaced && Instant::now() < limit && self.turn(true)? > 0 {}
        while replaced && Instant::now() < limit && !self.ingress.wind_up(&self.table) {
            self.turn(false)?;
        }
        if let Pipeline::Split(mate) = &mut self.pipeline {
            self.pipeline = Pipeline::Fused(mate.join()?);
        }
        while Instant::now() < limit {
            self.turn(false)?;
            let Pipeline::Fused(egress) = &mut self.pipeline else { break };
            if !egress.is_busy() {
                break;
            }
        }
        self.turn(false)?;
        self.beat();
        Ok(())
    }
}

/// Whether the threads of a split worker have to share their CPUs. Unknown counts as no.
fn is_crowded(manifest: &Manifest) -> bool {
    manifest.split
        && match manifest.cpus.as_slice() {
            [ingress, others @ ..] => others.iter().all(|cpu| cpu == ingress),
            [] => std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() < CROWDED_BELOW),
        }
}

fn zero_if_new<Z: IntoIterator<Item = (usize, Counter)>>(
    serials: &SharedArray<u32>,
    slot: u32,
    serial: u32,
    zeros: impl Fn() -> Z,
    counters: &SharedArray<Counter>,
) {
    if serials.get(slot as usize) != serial {
        for (index, zero) in zeros() {
            counters.set(index, zero);
        }
        serials.set(slot as usize, serial);
    }
}

fn egress_thread(
    mut egress: Egress<AnyTransmit>,
    link: &Link,
    mut sleeper: SleepFlag,
    policy: WaitPolicy,
    crowded: bool,
) -> Egress<AnyTransmit> {
    let mut idle_since = None;
    while !link.stop.load(Acquire) {
        link.turns.fetch_add(1, Release);
        if egress.turn() > 0 {
            idle_since = None;
            continue;
        }
        let now = Instant::now();
        let since = *idle_since.get_or_insert(now);
        let Some(bound) = policy.sleep(now - since, egress.is_busy()) else {
            if crowded {
                std::thread::yield_now();
            }
            continue;
        };
        sleeper.sleep_unless(|| egress.turn() > 0 || link.stop.load(Acquire), || std::thread::park_timeout(bound));
    }
    egress
}
