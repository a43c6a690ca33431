//! From the set in force to the next one, without losing a packet of a rule that stays (DECISIONS §5).
//!
//! ```text
//! Replacing ─ all workers forward, with the new ports ─▶ publish E+1 (old ∪ new) ─▶ Publishing
//! Publishing ─ all have acknowledged E+1 ─▶ joins, XDP tables ─▶ publish E+2 (new) if rules leave ─▶ Clearing
//! Clearing ─ all have acknowledged E+2 ─▶ done: the answer goes out
//! ```
//! Nothing waits here: the loop calls [`Supervisor::advance`] until the update is done. Must never leave half an update:
//! everything that can be refused is checked before the first change.

use super::book::Book;
use super::engine::Supervisor;
use super::error::RunError;
use super::joins::Join;
use super::planning::Decisions;
use super::ports::{self, Maker, Ports, Way};
use super::view::View;
use crate::control::message::Response;
use crate::control::server::ClientToken;
use crate::nic::afpacket::socket::set_filter;
use crate::nic::afxdp::program::{Program, ProgramError};
use crate::plan::records::{RulesSegment, Snapshot};
use crate::rule::Rule;
use crate::rule::compile::{Compiled, MapChange, diff};
use crate::rule::set::RuleSet;
use relay_common::IngressConfig;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// A worker that has not taken an epoch after this time is replaced.
const ACK_LIMIT: Duration = Duration::from_millis(500);
/// Between taking a source set out of use and deleting it: longer than any packet stays in the XDP program.
const GRACE: Duration = Duration::from_millis(100);

/// How far an update has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Workers are being replaced (or started).
    Replacing,
    /// Waiting for the acknowledgement of old ∪ new.
    Publishing,
    /// Waiting for the acknowledgement of new.
    Clearing,
}

/// An update under way.
pub struct Update {
    book: Book,
    compiled: Compiled,
    stage: Stage,
    since: Instant,
    client: Option<ClientToken>,
    answer: Response,
    decisions: Decisions,
    /// The kernel path has been told what it shall carry.
    told: bool,
}

impl Supervisor {
    /// Checks a new set and starts to bring it in force. Nothing has changed if this fails.
    pub fn begin(&mut self, set: RuleSet, client: Option<ClientToken>, answer: Response) -> Result<(), RunError> {
        self.known = ports::known(&mut self.interfaces)?;
        ports::check_supported(set.rules(), &self.options)?;
        self.tell_of_missing(&set);
        self.start_update(set, client, answer, true)
    }

    /// Interfaces went away or came back: lets go of the ports of those, makes ports for these, the rules stay as they are.
    pub(super) fn follow_interfaces(&mut self) -> Result<(), RunError> {
        let gone = std::mem::take(&mut self.gone);
        let known = self.known.clone();
        let (mut maker, ports) = self.maker();
        maker.retire(ports, &known, &gone);
        self.locks.retain(|(ifindex, _)| !gone.contains(ifindex) && known.values().any(|interface| interface.ifindex == *ifindex));
        self.start_update(self.book.set.clone(), None, Response::Done(String::new()), false)
    }

    /// After a take-over: the rules in force stay in force, by this supervisor's program, memberships and workers. `given`: those of
    /// the command line, which wait for SIGHUP, or for somebody who mends them.
    pub(super) fn resume(&mut self, given: Result<RuleSet, RunError>) -> Result<(), RunError> {
        match given {
            Err(error) => tracing::error!(%error, "configuration refused: the rules of the running relay stay"),
            Ok(given) if !self.book.set.diff(&given).is_empty() => {
                tracing::info!("the rules of the running relay stay; those of the command line are others: SIGHUP brings them in force");
            }
            Ok(_) => {}
        }
        let set = self.book.set.clone();
        let locks = self.locks_for(set.rules())?;
        self.locks.extend(locks);
        let (book, compiled, decisions, _) = self.prepare(set, false)?;
        self.fleet.relieve_all();
        let (client, answer) = (None, Response::Done(String::new()));
        self.update =
            Some(Update { book, compiled, stage: Stage::Replacing, since: Instant::now(), client, answer, decisions, told: false });
        self.advance();
        Ok(())
    }

    /// `strict`: what can't be opened is an error, not something to wait for.
    fn start_update(&mut self, set: RuleSet, client: Option<ClientToken>, answer: Response, strict: bool) -> Result<(), RunError> {
        let locks = self.locks_for(set.rules())?;
        let mark = self.ports.mark();
        let (book, compiled, decisions, changed) = match self.prepare(set, strict) {
            Ok(prepared) => prepared,
            Err(error) => {
                let (mut maker, ports) = self.maker();
                maker.roll_back(ports, &mark);
                return Err(error);
            }
        };
        self.locks.extend(locks);
        if !strict && !changed {
            return self.replan_outputs();
        }
        let update = Update { book, compiled, stage: Stage::Replacing, since: Instant::now(), client, answer, decisions, told: false };
        if changed && self.live {
            self.fleet.replace_all();
        }
        self.update = Some(update);
        self.advance();
        Ok(())
    }

    /// The ports, book and tables of a new set, and whether workers have to be replaced for it.
    fn prepare(&mut self, set: RuleSet, strict: bool) -> Result<(Book, Compiled, Decisions, bool), RunError> {
        let needs = ports::needs(set.rules(), &self.options);
        let known = self.known.clone();
        let (mut maker, ports) = self.maker();
        let changed = maker.ensure(ports, &needs, &known, strict)?;
        ports.forget_refused(&needs, &known);
        let book = self.book.with(set, self.epoch + 1)?;
        let mut view = View::new(&self.ports, &self.known, &mut self.interfaces);
        let compiled = book.compile(&view, &self.compiled)?;
        RulesSegment::check(&book.snapshot(self.epoch + 1, &mut view, Some(&self.book)))
            .map_err(|error| RunError::bad("rules", error, ""))?;
        let decisions = self.decide(book.set.rules());
        let there = |id: &String| book.set.get(id).is_some_and(|rule| ports::missing(std::slice::from_ref(rule), &self.known).is_empty());
        let mut unmet = decisions.iter().filter_map(|(id, decision)| Some((id, decision.unmet.as_ref()?)));
        if let Some((id, why)) = unmet.find(|(id, _)| strict && there(id)) {
            return Err(RunError::bad("path", format!("rule {id} can't take the kernel path: {why}"), "use path=auto"));
        }
        Ok((book, compiled, decisions, changed))
    }

    /// A rule whose interface is missing waits for it; said once, when it comes into the set.
    fn tell_of_missing(&self, set: &RuleSet) {
        for (interface, rule) in ports::missing(set.rules(), &self.known) {
            if self.book.set.get(rule).is_none() {
                let hint = crate::rule::error::nearest(interface, self.known.keys().map(String::as_str));
                let hint = hint.map_or_else(|| "see `ip link`".to_owned(), |name| format!("did you mean {name}?"));
                tracing::warn!(rule, interface, hint, "no such interface (yet): what needs it is pending");
            }
        }
    }

    fn maker(&mut self) -> (Maker<'_>, &mut Ports) {
        let (options, program) = (&self.options, self.program.as_mut());
        (Maker { options, program, no_program: &self.no_program, umems: &self.umems }, &mut self.ports)
    }

    /// Locks of ingress interfaces that are not held yet.
    fn locks_for(&self, rules: &[Rule]) -> Result<Vec<(u32, super::locks::Lock)>, RunError> {
        let wanted: BTreeSet<(u32, &str)> = rules
            .iter()
            .filter_map(|rule| self.known.get(&rule.ingress))
            .map(|interface| (interface.ifindex, interface.name.as_str()))
            .collect();
        let missing = wanted.into_iter().filter(|(ifindex, _)| !self.locks.iter().any(|(held, _)| held == ifindex));
        missing.map(|(ifindex, name)| super::locks::take(ifindex, name).map(|lock| (ifindex, lock))).collect()
    }

    /// Takes the update under way as far as it goes now.
    pub fn advance(&mut self) {
        let Some(mut update) = self.update.take() else { return };
        match self.step(&mut update) {
            Ok(true) => self.finish(update),
            Ok(false) => self.update = Some(update),
            Err(error) => self.abandon(update, &error),
        }
    }

    /// One step; true when the update is done.
    fn step(&mut self, update: &mut Update) -> Result<bool, RunError> {
        match update.stage {
            Stage::Replacing => self.step_replacing(update),
            Stage::Publishing => self.step_publishing(update),
            Stage::Clearing => Ok(self.acked(update)),
        }
    }

    fn step_replacing(&mut self, update: &mut Update) -> Result<bool, RunError> {
        if self.fleet.settled() {
            self.live = true;
            self.publish(&update.book, true)?;
            (update.stage, update.since) = (Stage::Publishing, Instant::now());
        }
        Ok(false)
    }

    fn step_publishing(&mut self, update: &mut Update) -> Result<bool, RunError> {
        if !self.acked(update) {
            return Ok(false);
        }
        if !self.prepare_kernel(update)? {
            return Ok(false);
        }
        self.take_live()?;
        self.set_joins(update.book.set.rules());
        self.admit_unicast(update.book.set.rules())?;
        let steps = diff(&self.compiled, &update.compiled);
        self.apply_tables(steps)?;
        self.compiled = update.compiled.clone();
        self.swap_program()?;
        self.release_kernel(update)?;
        if !self.leaves(&update.book) {
            return Ok(true);
        }
        self.publish(&update.book, false)?;
        (update.stage, update.since) = (Stage::Clearing, Instant::now());
        Ok(false)
    }

    /// Old ∪ new on the kernel path, before any table names a new rule.
    fn prepare_kernel(&mut self, update: &mut Update) -> Result<bool, RunError> {
        if !update.told {
            let mut target = self.kernel_path.target().clone();
            target.extend(self.kernel_target_of(&self.published.rules, &update.book, &update.decisions));
            self.kernel_path.want(target);
            update.told = true;
        }
        self.kernel_turn()
    }

    /// New alone, once the tables name no rule that leaves: a slot rests, so nothing is missed by not waiting for packets.
    fn release_kernel(&mut self, update: &Update) -> Result<(), RunError> {
        let target = self.kernel_target_of(&self.published.rules, &update.book, &update.decisions);
        self.kernel_path.want(target);
        self.kernel_turn().map(drop)
    }

    fn acked(&mut self, update: &mut Update) -> bool {
        let acked = self.fleet.settled() && self.fleet.all_acked(self.epoch);
        if !acked && update.since.elapsed() > ACK_LIMIT {
            self.fleet.kill_laggards(self.epoch);
            update.since = Instant::now();
        }
        acked
    }

    /// Whether rules of the book in force are not in the next one.
    fn leaves(&self, next: &Book) -> bool {
        self.book.set.rules().iter().any(|rule| {
            let slot = |book: &Book| book.slots(&rule.id).map(|slots| (slots.slot, slots.serial));
            slot(&self.book) != slot(next)
        })
    }

    /// Writes the snapshot of a book (with the rules in force that it leaves out, if asked) and puts it in force.
    fn publish(&mut self, book: &Book, with_leaving: bool) -> Result<(), RunError> {
        let mut view = View::new(&self.ports, &self.known, &mut self.interfaces);
        let snapshot = book.snapshot(self.epoch + 1, &mut view, with_leaving.then_some(&self.book));
        self.put_in_force(snapshot)
    }

    pub(super) fn put_in_force(&mut self, snapshot: Snapshot) -> Result<(), RunError> {
        self.segment.publish(&snapshot).map_err(|error| RunError::failure(format!("publishing the rules: {error}")))?;
        self.epoch = snapshot.epoch;
        self.published = snapshot;
        self.fleet.ring();
        Ok(())
    }

    /// Hands every AF_XDP ingress port's queues to its sockets.
    fn take_live(&mut self) -> Result<(), RunError> {
        let Some(program) = self.program.as_mut() else { return Ok(()) };
        let live = |port: &ports::Port| port.ingress && port.way == Way::Xsk && port.is_live();
        for (number, port) in self.ports.list().iter().enumerate().filter(|(_, port)| live(port)) {
            ports::go_live(program, number, port).map_err(RunError::failure)?;
        }
        Ok(())
    }

    pub(super) fn set_joins(&mut self, rules: &[Rule]) {
        let ifindex = |rule: &Rule| self.ports.ingress(rule).filter(|(_, port)| port.is_live()).map(|(_, port)| port.facts.ifindex);
        let wanted: BTreeSet<Join> = rules.iter().filter_map(|rule| join_of(rule, ifindex(rule)?)).collect();
        let refused = self.joins.set(&wanted);
        if refused.is_empty() {
            return;
        }
        for (join, error) in refused.iter().filter(|(join, _)| !self.joins.asked_before(join)) {
            tracing::warn!(group = %join.group, ifindex = join.ifindex, %error, "join refused; tried again every second");
        }
        let again = Instant::now() + ports::REFUSED_RETRY;
        self.replan_at = Some(self.replan_at.map_or(again, |at| at.min(again)));
    }

    /// Unicast rules on the packet path: their addresses through the sockets' filters, their ports held (DECISIONS §11).
    fn admit_unicast(&mut self, rules: &[Rule]) -> Result<(), RunError> {
        let mut filters: BTreeMap<usize, BTreeSet<IpAddr>> = BTreeMap::new();
        let mut held = BTreeSet::new();
        for rule in rules {
            let group = rule.matching.group.addr;
            let Some((number, _)) = self.ports.ingress(rule).filter(|(_, port)| port.way == Way::Packet && port.is_live()) else {
                continue;
            };
            let addresses = filters.entry(number).or_default();
            if !group.is_multicast() {
                addresses.insert(group);
                held.extend(rule.matching.port.map(|port| SocketAddr::new(group, port)));
            }
        }
        for (number, addresses) in &filters {
            let addresses: Vec<IpAddr> = addresses.iter().copied().collect();
            for sockets in self.ports.list().get(*number).into_iter().flat_map(|port| &port.sockets) {
                set_filter(&sockets.receive, &addresses).map_err(|error| RunError::failure(format!("SO_ATTACH_FILTER: {error}")))?;
            }
        }
        for (address, error) in self.holders.set(&held) {
            // Not an address of this host, or somebody receives there: no ICMP is to be feared.
            tracing::debug!(%address, %error, "port not held");
        }
        Ok(())
    }

    fn config_of(&self, step: &MapChange) -> Option<IngressConfig> {
        let MapChange::IngressPut(ifindex, shapes) = step else { return None };
        Some(self.ingress_config(*ifindex, shapes))
    }

    /// Addresses of ingress interfaces may be new.
    pub(super) fn set_ingresses(&mut self) {
        let configs: Vec<(u32, IngressConfig)> =
            self.compiled.ingresses.iter().map(|(ifindex, shapes)| (*ifindex, self.ingress_config(*ifindex, shapes))).collect();
        let Some(program) = self.program.as_mut() else { return };
        for (ifindex, config) in configs {
            if let Err(error) = program.set_ingress(ifindex, &config) {
                tracing::warn!(ifindex, %error, "telling the program an interface's addresses");
            }
        }
    }

    fn apply_tables(&mut self, steps: Vec<MapChange>) -> Result<(), RunError> {
        let mut steps = steps.into_iter();
        for step in steps.by_ref() {
            if step == MapChange::Settle {
                break;
            }
            let config = self.config_of(&step);
            let Some(program) = self.program.as_mut() else { return Ok(()) };
            apply(program, config.as_ref(), &step).map_err(RunError::failure)?;
        }
        let later: Vec<MapChange> = steps.collect();
        if !later.is_empty() {
            self.deferred.push((Instant::now() + GRACE, later));
        }
        Ok(())
    }

    /// Deletes what nobody reads any more.
    pub fn run_deferred(&mut self, now: Instant) {
        let Some(program) = self.program.as_mut() else { return };
        let (due, later) = std::mem::take(&mut self.deferred).into_iter().partition(|(at, _)| now >= *at);
        self.deferred = later;
        let due: Vec<(Instant, Vec<MapChange>)> = due;
        for step in due.iter().flat_map(|(_, steps)| steps) {
            if let Err(error) = apply(program, None, step) {
                tracing::warn!(%error, "deleting an unused source set");
            }
        }
    }

    fn finish(&mut self, update: Update) {
        self.retire(&update.book);
        self.estate.until.get_or_insert_with(|| Instant::now() + GRACE);
        self.changed();
        self.book = update.book;
        self.decisions = update.decisions;
        if self.ports.bury() {
            // The second half of a change of interfaces: those that came back.
            self.replan_at.get_or_insert_with(Instant::now);
        }
        tracing::info!(rules = self.book.set.rules().len(), epoch = self.epoch, "rules in force");
        if let Some(client) = update.client {
            self.server.reply(client, &update.answer);
        }
        if !self.announced {
            self.announced = true;
            tracing::info!(socket = %self.server.path().display(), "relay forwards");
        }
    }

    /// An update that failed half-way: the tables and rules in force before are put back.
    fn abandon(&mut self, update: Update, error: &RunError) {
        tracing::error!(%error, "update failed: going back to the rules before");
        self.changed();
        let steps = diff(&update.compiled, &self.compiled);
        for step in &steps {
            let config = self.config_of(step);
            if let Some(program) = self.program.as_mut() {
                // Entries that were never made can't be deleted; that is all that may fail here.
                let _ = apply(program, config.as_ref(), step);
            }
        }
        let book = self.book.clone();
        if let Err(error) = self.publish(&book, false) {
            tracing::error!(%error, "putting the rules before back");
        }
        let target = self.kernel_target_of(&self.published.rules, &self.book, &self.decisions);
        self.kernel_path.want(target);
        if let Some(client) = update.client {
            self.server.reply(client, &Response::Error(error.body()));
        }
        if !self.announced {
            self.fatal = Some(error.clone());
        }
    }
}

/// The membership a rule needs, if it needs one.
pub fn join_of(rule: &Rule, ifindex: u32) -> Option<Join> {
    let group = rule.matching.group;
    let single = group.len == if group.addr.is_ipv4() { 32 } else { 128 };
    let source = rule.matching.source.filter(|source| source.len == if source.addr.is_ipv4() { 32 } else { 128 });
    (rule.join && single && group.addr.is_multicast()).then_some(Join {
        ifindex,
        group: group.addr,
        source: source.map(|source| source.addr),
    })
}

fn apply(program: &mut Program, config: Option<&IngressConfig>, step: &MapChange) -> Result<(), ProgramError> {
    match step {
        MapChange::SourcePut(len, key, verdict) => program.insert_source(key, *len, verdict),
        MapChange::EntryPut(key, entry) => program.insert_match(key, entry),
        MapChange::IngressPut(ifindex, _) => config.map_or(Ok(()), |config| program.set_ingress(*ifindex, config)),
        MapChange::IngressDelete(ifindex) => program.remove_ingress(*ifindex),
        MapChange::EntryDelete(key) => program.remove_match(key),
        MapChange::Settle => Ok(()),
        MapChange::SourceDelete(len, key) => program.remove_source(key, *len),
    }
}
