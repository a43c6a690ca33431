//! The supervisor's loop: one thread, one poll, no waiting anywhere else.
//!
//! Owns every kernel object of the relay. Signals, control requests, netlink news, ends of workers and timers come in
//! here; what they mean is in the rooms beside it. Must never block on a worker, a client or the kernel.

use super::book::Book;
use super::capabilities::{self, Set};
use super::capture::{Captures, Wish};
use super::error::RunError;
use super::features::Features;
use super::fleet::Fleet;
use super::interfaces::{Interface, Interfaces};
use super::joins::{Holders, Joins};
use super::keeping::{Estate, Keeper};
use super::kernel_path::KernelPath;
use super::locks::Lock;
use super::loops::Loops;
use super::netlink::{Event, Watch};
use super::notify::Notify;
use super::options::{BackendChoice, Options};
use super::planning::{Decisions, Redirectable};
use super::ports::{self, Ports, Way};
use super::queries::Queries;
use super::sandbox;
use super::storing::Storing;
use super::takeover::Inheritance;
use super::update::Update;
use super::view::View;
use crate::control::message::{Request, Response};
use crate::control::server::{ClientToken, Server};
use crate::frame::Umem;
use crate::keeper::Store;
use crate::nic::afxdp::program::{LoadOptions, Program};
use crate::plan::records::{RULES_LEN, RulesSegment, Snapshot};
use crate::rule::Rule;
use crate::rule::compile::{Compiled, MapChange};
use crate::rule::set::RuleSet;
use crate::shm::Segment;
use crate::sys::process;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Between two looks at the workers' heartbeats when nothing happens.
const LOOK_PERIOD: Duration = Duration::from_millis(50);
/// The same while an update or a stop is under way.
const BUSY_PERIOD: Duration = Duration::from_millis(1);
/// Between two looks for packets that come round.
const LOOPS_PERIOD: Duration = Duration::from_secs(1);
/// A stop takes no longer than this; what is left is killed.
const STOP_LIMIT: Duration = Duration::from_millis(900);
/// News of the kernel are gathered for so long before the rules are planned again.
const NEWS_DELAY: Duration = Duration::from_millis(5);
/// Scheduler slice of the supervisor and, inherited, of its workers: they share CPUs with what they serve, and a successor
/// that waits for a slice of 3 ms at each of its three wake-ups is what the receiver hears as silence.
const SLICE: Duration = Duration::from_micros(100);

/// Everything the supervisor owns.
pub struct Supervisor {
    pub(super) options: Options,
    pub(super) server: Server,
    pub(super) interfaces: Interfaces,
    watch: Watch,
    pub(super) known: BTreeMap<String, Interface>,
    pub(super) locks: Vec<(u32, Lock)>,
    pub(super) joins: Joins,
    pub(super) holders: Holders,
    pub(super) queries: Queries,
    pub(super) program: Option<Program>,
    pub(super) no_program: String,
    pub(super) kernel_path: KernelPath,
    pub(super) features: Option<Features>,
    pub(super) redirectable: Redirectable,
    pub(super) look_at: Instant,
    pub(super) decisions: Decisions,
    pub(super) umems: Vec<Umem>,
    pub(super) ports: Ports,
    pub(super) fleet: Fleet,
    pub(super) segment: RulesSegment,
    pub(super) published: Snapshot,
    pub(super) epoch: u32,
    pub(super) book: Book,
    pub(super) compiled: Compiled,
    pub(super) update: Option<Update>,
    queue: VecDeque<(ClientToken, Request)>,
    pub(super) deferred: Vec<(Instant, Vec<MapChange>)>,
    /// Packets and bytes counted by deleted rules, by interface: taken in, sent out.
    pub(super) retired: BTreeMap<String, [u64; 4]>,
    pub(super) started: Instant,
    pub(super) live: bool,
    pub(super) announced: bool,
    pub(super) fatal: Option<RunError>,
    pub(super) replan_at: Option<Instant>,
    /// Indices of interfaces that the kernel has said are gone, since the last look.
    pub(super) gone: BTreeSet<u32>,
    /// SIGHUP came.
    reload_due: bool,
    pub(super) captures: Captures,
    pub(super) loops: Loops,
    loops_at: Instant,
    stopping: bool,
    signals: SignalFd,
    notify: Notify,
    pub(super) keeper: Option<Keeper>,
    pub(super) storing: Option<Storing>,
    pub(super) estate: Estate,
}

fn failed<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> RunError {
    move |error| RunError::failure(format!("{what}: {error}"))
}

/// Runs the relay until it is told to stop. With an inheritance ([`super::takeover::begin`]) the rules in force stay in force. `store`:
/// where to leave one for the next, besides the keeper.
pub fn run(options: Options, inheritance: Option<Inheritance>, store: Option<Store>) -> Result<(), RunError> {
    let given = load(&options);
    if let Err(error) = process::short_slice(SLICE) {
        tracing::debug!(%error, "scheduler slice kept");
    }
    let mut supervisor = if inheritance.is_some() {
        let mut supervisor = Supervisor::set_up(options, inheritance)?;
        supervisor.resume(given)?;
        supervisor
    } else {
        let set = given?;
        let mut supervisor = Supervisor::set_up(options, None)?;
        supervisor.begin(set, None, Response::Done(String::new()))?;
        supervisor
    };
    supervisor.storing = store.map(Storing::new).transpose().map_err(failed("pidfd_open"))?;
    drop_privileges()?;
    supervisor.forward()
}

/// Rules of the config file and of `--rule`.
pub(super) fn load(options: &Options) -> Result<RuleSet, RunError> {
    let mut rules: Vec<Rule> = match &options.config {
        Some(path) => {
            let name = path.display().to_string();
            let source = std::fs::read_to_string(path)
                .map_err(|error| RunError::bad("--config", format!("{name}: {error}"), "name a readable file"))?;
            crate::config::parse(&name, &source).map_err(|error| RunError::bad("--config", error, ""))?
        }
        None => Vec::new(),
    };
    rules.extend(options.rules.iter().cloned());
    RuleSet::new(rules).map_err(|error| RunError::bad(error.field(), &error, ""))
}

/// Keeps the capabilities of DECISIONS §6 and the system calls of a relay that is set up, and lets nothing be gained again.
fn drop_privileges() -> Result<(), RunError> {
    if let Err(error) = capabilities::empty_bounding() {
        tracing::debug!(%error, "bounding set kept");
    }
    capabilities::clear_ambient().map_err(failed("ambient capabilities"))?;
    capabilities::retain(Set::SUPERVISOR).map_err(failed("capabilities"))?;
    sandbox::close().map_err(failed("system call filter"))
}

pub(super) fn load_program(options: &Options) -> (Option<Program>, String) {
    if options.backend == BackendChoice::Packet {
        return (None, "--backend packet".into());
    }
    match Program::load(&LoadOptions::default()) {
        Ok(program) => (Some(program), String::new()),
        Err(error) => (None, error.to_string()),
    }
}

fn signals() -> Result<SignalFd, RunError> {
    let mut set = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().for_each(|signal| set.add(signal));
    set.thread_block().map_err(failed("blocking signals"))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map_err(failed("signalfd"))
}

fn rules_segment() -> Result<(OwnedFd, RulesSegment), RunError> {
    let rules = Segment::create_for_readers("relay-rules", RULES_LEN).map_err(failed("rules segment"))?;
    let (fd, mapping) = rules.into_parts();
    Ok((fd, RulesSegment::create(&mapping).map_err(failed("rules segment"))?))
}

impl Supervisor {
    fn set_up(options: Options, mut inheritance: Option<Inheritance>) -> Result<Self, RunError> {
        let signals = signals()?;
        let server = Server::bind(&options.socket).map_err(|error| RunError::bad("--socket", &error, error.hint()))?;
        let mut interfaces = Interfaces::open().map_err(failed("netlink"))?;
        let watch = Watch::open().map_err(failed("netlink"))?;
        let known = ports::known(&mut interfaces)?;
        let (rules_fd, segment) = rules_segment()?;
        let (fleet, umems) = match &mut inheritance {
            Some(inheritance) => inheritance.fleet(&options, rules_fd)?,
            None => Fleet::new(&options, rules_fd)?,
        };
        let (program, no_program) = inheritance.as_mut().map_or_else(|| load_program(&options), Inheritance::program);
        let mut supervisor = Self {
            options,
            server,
            interfaces,
            watch,
            known,
            locks: Vec::new(),
            joins: Joins::new(),
            holders: Holders::new(),
            queries: Queries::open().map_err(failed("raw socket for membership queries"))?,
            program,
            no_program,
            kernel_path: KernelPath::default(),
            features: Features::open().inspect_err(|error| tracing::debug!(%error, "no netdev family")).ok(),
            redirectable: Redirectable::new(),
            look_at: Instant::now(),
            decisions: Decisions::new(),
            umems,
            ports: Ports::default(),
            fleet,
            segment,
            published: Snapshot::default(),
            epoch: 0,
            book: Book::default(),
            compiled: Compiled::default(),
            update: None,
            queue: VecDeque::new(),
            deferred: Vec::new(),
            retired: BTreeMap::new(),
            started: Instant::now(),
            live: false,
            announced: false,
            fatal: None,
            replan_at: None,
            gone: BTreeSet::new(),
            reload_due: false,
            captures: Captures::default(),
            loops: Loops::default(),
            loops_at: Instant::now(),
            stopping: false,
            signals,
            notify: Notify::from_environment(),
            keeper: None,
            storing: None,
            estate: Estate::default(),
        };
        supervisor.settle(inheritance).map(|()| supervisor)
    }

    /// In what another one left, or with nothing there yet.
    fn settle(&mut self, inheritance: Option<Inheritance>) -> Result<(), RunError> {
        if let Some(inheritance) = inheritance {
            return self.settle_in(inheritance);
        }
        self.segment.publish(&Snapshot::default()).map_err(failed("rules segment"))?;
        self.keeper = Keeper::new(&self.options, None)?;
        Ok(())
    }

    /// The loop.
    fn forward(&mut self) -> Result<(), RunError> {
        while !self.stopping {
            let now = Instant::now();
            if self.fleet.start_due(now, &self.ports, &self.locks)? {
                self.changed();
            }
            self.leave_estate(now);
            self.keep(now);
            self.store();
            self.wait(now);
            self.signals();
            self.reload();
            self.serve();
            self.news();
            self.fleet.read_logs();
            self.fleet.look(Instant::now());
            self.advance();
            self.run_deferred(Instant::now());
            self.replan();
            self.carry_on();
            self.want_taps(Instant::now());
            if now >= self.loops_at {
                self.loops_at = now + LOOPS_PERIOD;
                self.look_for_loops(now);
            }
            self.notify.turn(Instant::now(), self.announced && self.update.is_none() && !self.reload_due);
            if let Some(error) = self.fatal.take() {
                self.stop();
                return Err(error);
            }
        }
        self.stop();
        Ok(())
    }

    fn wait(&self, now: Instant) {
        let is_busy = self.update.is_some() || self.kernel_path.is_busy() || self.storing.as_ref().is_some_and(Storing::is_behind);
        let mut bound = if is_busy { BUSY_PERIOD } else { LOOK_PERIOD };
        for at in [self.fleet.next_deadline(), self.server.next_deadline(), self.replan_at].into_iter().flatten() {
            bound = bound.min(at.saturating_duration_since(now));
        }
        let fixed: [BorrowedFd<'_>; 3] = [self.signals.as_fd(), self.server.as_fd(), self.watch.as_fd()];
        let mut polled: Vec<PollFd<'_>> = fixed
            .into_iter()
            .chain(self.queries.descriptors())
            .chain(self.fleet.descriptors())
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        // EINTR is a short wait.
        let _ = poll(&mut polled, PollTimeout::try_from(bound).unwrap_or(PollTimeout::ZERO));
    }

    fn signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match Signal::try_from(signal.ssi_signo as i32) {
                Ok(Signal::SIGHUP) => self.reload_due = true,
                Ok(signal) => {
                    tracing::info!(%signal, "stopping");
                    self.stopping = true;
                }
                Err(_) => {}
            }
        }
    }

    /// Makes the running set equal to the config file and `--rule` (SIGHUP), once no other change is under way.
    fn reload(&mut self) {
        if !self.reload_due || self.update.is_some() || !self.announced {
            return;
        }
        self.reload_due = false;
        self.notify.reloading();
        let loaded = load(&self.options);
        let outcome = loaded.and_then(|set| {
            let change = self.book.set.diff(&set);
            tracing::info!(added = change.added.len(), changed = change.changed.len(), removed = ?change.removed, "configuration read again");
            if change.is_empty() { Ok(()) } else { self.begin(set, None, Response::Done(String::new())) }
        });
        if let Err(error) = outcome {
            tracing::error!(%error, "configuration refused, nothing changed");
            self.notify.status(&format!("configuration refused: {error}"));
        } else {
            self.notify.status("forwarding");
        }
    }

    fn serve(&mut self) {
        let mut requests = Vec::new();
        self.server.turn(Instant::now(), &mut |client, request| {
            requests.push((client, request));
            None
        });
        self.queue.extend(requests);
        // Requests that only read are answered at once; those that change wait for the update under way.
        for _ in 0..self.queue.len() {
            let Some((client, request)) = self.queue.pop_front() else { break };
            if self.update.is_some() && changes(&request) {
                self.queue.push_back((client, request));
                continue;
            }
            let answer = self.handle(client, request).unwrap_or_else(|error| Some(Response::Error(error.body())));
            if let Some(response) = answer {
                self.server.reply(client, &response);
            }
        }
    }

    /// Answers a request; `None` where the answer comes when the update is done.
    fn handle(&mut self, client: ClientToken, request: Request) -> Result<Option<Response>, RunError> {
        let set_error = |error: crate::rule::set::SetError| RunError::bad(error.field(), &error, "");
        match request {
            Request::Status => Ok(Some(Response::Status(Box::new(self.status())))),
            Request::Stats => Ok(Some(Response::Stats(Box::new(self.stats())))),
            Request::Channels => Ok(Some(Response::Channels(Box::new(self.channels())))),
            Request::RuleList => Ok(Some(Response::Rules(self.rule_list()))),
            Request::Capture { lease: None, rule, points, snaplen, by_worker, .. } => {
                let (answer, rings) = self.open_capture(Wish { rule, points, snaplen, by_worker })?;
                self.server.reply_with(client, &Response::Capture(Box::new(answer)), rings);
                Ok(None)
            }
            Request::Capture { lease: Some(lease), epoch, .. } => {
                self.renew_capture(lease, epoch).map(|answer| Some(Response::Capture(Box::new(answer))))
            }
            Request::CaptureEnd { lease } => {
                self.end_capture(lease);
                Ok(Some(Response::Done("ended".into())))
            }
            Request::Shutdown => {
                self.stopping = true;
                Ok(Some(Response::Done("stopping".into())))
            }
            Request::RuleAdd { rule } => {
                let rule = parse(&rule)?;
                let id = rule.id.clone();
                let mut set = self.book.set.clone();
                set.add(rule).map_err(set_error)?;
                self.begin(set, Some(client), Response::Done(id)).map(|()| None)
            }
            Request::RuleDel { id } => {
                let mut set = self.book.set.clone();
                set.remove(&id).map_err(set_error)?;
                self.begin(set, Some(client), Response::Done(id)).map(|()| None)
            }
            Request::Apply { rules, dry_run } => {
                let rules = rules.iter().map(|line| parse(line)).collect::<Result<Vec<Rule>, _>>()?;
                let mut set = self.book.set.clone();
                let change = set.replace_all(rules).map_err(set_error)?;
                let answer = Response::Changes(super::report::changes(&self.book.set, &change));
                if dry_run || change.is_empty() {
                    return Ok(Some(answer));
                }
                self.begin(set, Some(client), answer).map(|()| None)
            }
            Request::RuleSave { file } => self.save(file).map(|path| Some(Response::Done(path))),
        }
    }

    fn news(&mut self) {
        self.queries.drain(Instant::now());
        let events = self.watch.drain();
        self.gone.extend(events.iter().filter_map(|event| match event {
            Event::LinkGone { ifindex, .. } => Some(*ifindex),
            _ => None,
        }));
        if !events.is_empty() || self.look_at_features(Instant::now()) {
            self.replan_at.get_or_insert_with(|| Instant::now() + NEWS_DELAY);
        }
    }

    /// Plans again after news of the kernel; publishes only if something is different.
    fn replan(&mut self) {
        if self.update.is_some() || !self.announced || self.replan_at.is_none_or(|at| Instant::now() < at) {
            return;
        }
        self.replan_at = None;
        if !self.fleet.settled() || !self.fleet.all_acked(self.epoch) {
            self.replan_at = Some(Instant::now() + NEWS_DELAY);
            return;
        }
        let Ok(known) = ports::known(&mut self.interfaces) else { return };
        self.known = known;
        let needs = ports::needs(self.book.set.rules(), &self.options);
        let followed = match self.ports.differ(&needs, &self.known, &self.gone, Instant::now()) {
            true => self.follow_interfaces(),
            false => self.replan_outputs(),
        };
        self.gone.clear();
        if let Err(error) = followed {
            tracing::error!(%error, "planning again");
            self.replan_at = Some(Instant::now() + ports::REFUSED_RETRY);
        }
        if self.update.is_none() {
            self.replan_paths();
        }
        self.replan_at = match (self.replan_at, self.ports.next_retry()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }

    /// Interfaces are the ones they were; addresses, states, neighbours may be others.
    pub(super) fn replan_outputs(&mut self) -> Result<(), RunError> {
        self.ports.refresh(&self.known);
        self.set_ingresses();
        let mut view = View::new(&self.ports, &self.known, &mut self.interfaces);
        let snapshot = self.book.snapshot(self.epoch + 1, &mut view, None);
        let set = self.book.set.clone();
        self.set_joins(set.rules());
        if snapshot.rules == self.published.rules && snapshot.own == self.published.own {
            return Ok(());
        }
        tracing::info!(epoch = snapshot.epoch, "interfaces or neighbours changed: outputs planned again");
        self.put_in_force(snapshot)
    }

    /// The planner's word again: a rule that leaves the kernel path is its worker's from the next packet on, and the other way
    /// round.
    fn replan_paths(&mut self) {
        let decisions = self.decide(self.book.set.rules());
        for (id, decision) in &decisions {
            if self.decisions.get(id).is_some_and(|before| before.path != decision.path || before.unmet != decision.unmet) {
                tracing::info!(rule = %id, path = decision.path.name(), reason = %decision.reason, "planned again");
            }
        }
        let target = self.kernel_target(&self.published.rules, &decisions);
        self.decisions = decisions;
        let kept = self.keeps_kernel_path();
        self.kernel_path.want(target);
        if kept != self.keeps_kernel_path() {
            self.changed();
        }
    }

    /// Outside of an update, the kernel path goes on to what it was told last.
    fn carry_on(&mut self) {
        if self.update.is_none()
            && let Err(error) = self.kernel_turn()
        {
            tracing::error!(%error, "kernel path");
        }
    }

    /// Detach, drain, stop, join (every wait bounded).
    fn stop(&mut self) {
        self.notify.stopping();
        self.release_keeper();
        self.empty_store();
        if let Some(program) = self.program.as_mut() {
            for (number, port) in self.ports.list().iter().enumerate().filter(|(_, port)| port.way == Way::Xsk && port.attached) {
                ports::go_dark(program, number, port);
                if let Err(error) = program.detach(port.facts.ifindex) {
                    tracing::warn!(interface = %port.name, %error, "detaching");
                }
            }
        }
        self.fleet.stop_all();
        let limit = Instant::now() + STOP_LIMIT;
        while !self.fleet.all_ended() {
            if Instant::now() >= limit {
                self.fleet.kill_all();
            }
            let mut polled: Vec<PollFd<'_>> = self.fleet.descriptors().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            let _ = poll(&mut polled, PollTimeout::from(5u8));
            self.fleet.read_logs();
            self.fleet.look(Instant::now());
        }
        tracing::info!("stopped");
    }
}

const fn changes(request: &Request) -> bool {
    matches!(request, Request::RuleAdd { .. } | Request::RuleDel { .. } | Request::Apply { .. })
}

fn parse(line: &str) -> Result<Rule, RunError> {
    line.parse::<Rule>().map_err(|error| RunError::bad(error.field, &error, &error.hint))
}
