//! `relay capture`, the supervisor's part: who captures, what workers are told, which names their records go by.
//!
//! A client gets the tap rings by descriptor, read-only, and reads them itself: no packet comes through this process. It
//! holds a lease and renews it; one that dies costs the workers three seconds of copying. A capture may ask for rules of the kernel
//! path to be carried by a worker: the planner is told so for as long as the lease lasts. Must never keep a tap wanted, or a rule
//! from its path, that nobody holds a lease for.

use super::engine::Supervisor;
use super::error::RunError;
use super::ports::Port;
use crate::control::message::{CAPTURE_LEASE, Capture, CapturePort, CaptureRule, UNSEEN_NAMED};
use crate::plan::planner::Path;
use crate::plan::tap::{Point, Wanted};
use crate::rule::{Output, Rule};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

/// Captures at once.
const MAX_CAPTURES: usize = 16;

/// What a client wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    /// Only this rule.
    pub(super) rule: Option<String>,
    /// Where.
    pub(super) points: Vec<Point>,
    /// Bytes of each packet.
    pub(super) snaplen: u32,
    /// A worker is to carry what the kernel path would.
    pub(super) by_worker: bool,
}

#[derive(Debug)]
struct Lease {
    wish: Wish,
    until: Instant,
    /// The client has opened the rings.
    is_armed: bool,
}

/// The captures under way.
#[derive(Debug, Default)]
pub(super) struct Captures {
    leases: BTreeMap<u64, Lease>,
    last: u64,
    word: u64,
    /// Rules that the planner knows to be borrowed (none: all of them).
    borrowed: BTreeSet<Option<String>>,
}

impl Captures {
    fn open(&mut self, wish: Wish, now: Instant) -> Option<u64> {
        if self.leases.len() >= MAX_CAPTURES {
            return None;
        }
        self.last += 1;
        self.leases.insert(self.last, Lease { wish, until: now + CAPTURE_LEASE, is_armed: false });
        Some(self.last)
    }

    fn renew(&mut self, lease: u64, now: Instant) -> Option<&Wish> {
        let lease = self.leases.get_mut(&lease)?;
        (lease.until, lease.is_armed) = (now + CAPTURE_LEASE, true);
        Some(&lease.wish)
    }

    /// What all of them want together. `slot` of a rule, if it is there: a capture of one that is not wants nothing meanwhile.
    fn wanted(&mut self, now: Instant, slot: impl Fn(&str) -> Option<u32>) -> Wanted {
        self.leases.retain(|_, lease| now < lease.until);
        let wish = |wish: &Wish| match &wish.rule {
            None => Wanted::new(&wish.points, wish.snaplen, None),
            Some(id) => slot(id).map_or_else(Wanted::default, |slot| Wanted::new(&wish.points, wish.snaplen, Some(slot))),
        };
        self.leases.values().filter(|lease| lease.is_armed).fold(Wanted::default(), |all, lease| all.or(wish(&lease.wish)))
    }

    fn borrowing(&self) -> impl Iterator<Item = &Option<String>> {
        self.leases.values().filter(|lease| lease.wish.by_worker).map(|lease| &lease.wish.rule)
    }

    /// Whether a worker is to carry this rule, for a capture to see it.
    pub(super) fn borrows(&self, id: &str) -> bool {
        self.borrowing().any(|rule| rule.as_ref().is_none_or(|rule| rule == id))
    }

    /// Whether that has changed since the last call.
    fn news(&mut self) -> bool {
        let now = self.borrowing().cloned().collect();
        std::mem::replace(&mut self.borrowed, now) != self.borrowed
    }
}

/// Another description of a tap ring that cannot be written through.
fn read_only(ring: impl AsFd) -> Result<OwnedFd, RunError> {
    let path = format!("/proc/self/fd/{}", ring.as_fd().as_raw_fd());
    open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| RunError::failure(format!("opening a tap ring: {errno}")))
}

impl Supervisor {
    /// Begins a capture; the tap rings of all workers go with the answer.
    pub(super) fn open_capture(&mut self, wish: Wish) -> Result<(Capture, Vec<OwnedFd>), RunError> {
        self.check_capture(&wish)?;
        let rings = self.fleet.slots.iter().map(|slot| read_only(&*slot.tap)).collect::<Result<Vec<_>, _>>()?;
        let lease = self
            .captures
            .open(wish.clone(), Instant::now())
            .ok_or_else(|| RunError::bad("capture", format!("{MAX_CAPTURES} captures are running already"), "end one of them"))?;
        Ok((self.capture(lease, &wish, None), rings))
    }

    /// Refuses what would show nothing, whatever comes.
    fn check_capture(&self, wish: &Wish) -> Result<(), RunError> {
        let insists = "let a worker carry it while you look: path=xsk or path=packet in the rule, and no --backend kernel";
        if self.fleet.slots.is_empty() {
            return Err(RunError::bad("--backend", "the relay runs without workers: the XDP program sends every packet, unseen", insists));
        }
        let Some(id) = &wish.rule else { return Ok(()) };
        let Some(rule) = self.book.set.get(id) else {
            return Err(RunError::bad("--rule", format!("no rule {id}"), "`relay rule list` names them"));
        };
        if self.is_unseen(id) && !(wish.by_worker && self.is_free(rule)) {
            let message = format!("rule {id} is on the kernel path: the XDP program sends its packets, and no worker sees them");
            let hint = if self.is_free(rule) { "--by-worker lets a worker carry it while you look" } else { insists };
            return Err(RunError::bad("--rule", message, hint));
        }
        Ok(())
    }

    /// By the planner's word, or still, until its word is in force.
    fn is_unseen(&self, id: &str) -> bool {
        let is_decided = self.decisions.get(id).is_some_and(|decision| decision.path == Path::Kernel);
        is_decided || self.book.slots(id).is_some_and(|slots| self.kernel_path.carries(slots.slot))
    }

    /// Goes on with a capture; from the first time on, packets are shown.
    pub(super) fn renew_capture(&mut self, lease: u64, epoch: Option<u64>) -> Result<Capture, RunError> {
        let now = Instant::now();
        let wish = self.captures.renew(lease, now).cloned();
        let wish = wish.ok_or_else(|| RunError::failure("the capture was not renewed in time").with_hint("start it again"))?;
        self.want_taps(now);
        Ok(self.capture(lease, &wish, epoch))
    }

    /// Ends a capture.
    pub(super) fn end_capture(&mut self, lease: u64) {
        self.captures.leases.remove(&lease);
        self.want_taps(Instant::now());
    }

    /// Tells the workers what is wanted now.
    pub(super) fn want_taps(&mut self, now: Instant) {
        let book = &self.book;
        let word = self.captures.wanted(now, |id| book.slots(id).map(|slots| slots.slot)).word();
        if word != self.captures.word {
            self.captures.word = word;
            self.segment.want(word);
        }
        if self.captures.news() {
            self.replan_at = Some(now);
        }
    }

    fn capture(&self, lease: u64, wish: &Wish, epoch: Option<u64>) -> Capture {
        let rules = || self.book.set.rules().iter().filter(|rule| wish.rule.as_ref().is_none_or(|id| *id == rule.id));
        let unseen: Vec<&Rule> = rules().filter(|rule| self.is_unseen(&rule.id)).collect();
        let now = u64::from(self.epoch);
        Capture {
            lease,
            epoch: now,
            workers: self.fleet.slots.iter().map(|slot| slot.id).collect(),
            ports: self.ports.list().iter().map(capture_port).collect(),
            rules: (epoch != Some(now)).then(|| rules().filter_map(|rule| self.capture_rule(rule)).collect()),
            unseen: unseen.iter().take(UNSEEN_NAMED).map(|rule| rule.id.clone()).collect(),
            unseen_count: unseen.len() as u64,
            moving: wish.by_worker && unseen.iter().any(|rule| self.is_free(rule)),
        }
    }

    fn capture_rule(&self, rule: &Rule) -> Option<CaptureRule> {
        let slots = self.book.slots(&rule.id)?;
        let outputs = rule.outputs.iter().map(output_name).collect();
        Some(CaptureRule { slot: slots.slot, serial: slots.serial, id: rule.id.clone(), outputs })
    }
}

fn capture_port(port: &Port) -> CapturePort {
    CapturePort { name: port.name.clone(), ingress: port.ingress, egress: port.egress }
}

/// `eth1 239.9.9.9:6000`.
fn output_name(output: &Output) -> String {
    format!("{} {}", output.egress, super::report::destination(output))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn wish(rule: Option<&str>) -> Wish {
        Wish { rule: rule.map(str::to_owned), points: vec![Point::Drop], snaplen: 96, by_worker: false }
    }

    #[test]
    fn taps_are_wanted_from_the_first_renewal_until_the_lease_runs_out() {
        let (mut captures, start) = (Captures::default(), Instant::now());
        let slot = |id: &str| (id == "a").then_some(4);
        let one = captures.open(wish(Some("a")), start).unwrap();
        assert!(captures.wanted(start, slot).is_nothing(), "the client has not opened the rings yet");
        assert_eq!(captures.renew(one, start), Some(&wish(Some("a"))));
        assert_eq!(captures.wanted(start, slot), Wanted::new(&[Point::Drop], 96, Some(4)));
        assert!(captures.wanted(start, |_| None).is_nothing(), "the rule is gone");
        let two = captures.open(wish(None), start + CAPTURE_LEASE / 2).unwrap();
        captures.renew(two, start + CAPTURE_LEASE / 2);
        assert_eq!(captures.wanted(start + CAPTURE_LEASE / 2, slot), Wanted::new(&[Point::Drop], 96, None));
        assert_eq!(captures.wanted(start + CAPTURE_LEASE, slot), Wanted::new(&[Point::Drop], 96, None));
        assert_eq!(captures.renew(one, start + CAPTURE_LEASE), None, "ran out");
        assert!(captures.wanted(start + CAPTURE_LEASE * 2, slot).is_nothing());
        assert_eq!(captures.renew(two, start + CAPTURE_LEASE + Duration::from_secs(9)), None);
    }

    #[test]
    fn a_rule_is_borrowed_as_long_as_the_lease_lasts() {
        let (mut captures, start) = (Captures::default(), Instant::now());
        captures.open(wish(Some("a")), start);
        assert!(!captures.news() && !captures.borrows("a"));
        captures.open(Wish { by_worker: true, ..wish(Some("b")) }, start);
        assert!(captures.news() && captures.borrows("b") && !captures.borrows("a") && !captures.news());
        captures.open(Wish { by_worker: true, ..wish(None) }, start + CAPTURE_LEASE);
        assert!(captures.news() && captures.borrows("a"));
        captures.wanted(start + CAPTURE_LEASE, |_| None);
        assert!(captures.news() && captures.borrows("b"), "by the other one");
        captures.wanted(start + CAPTURE_LEASE * 2, |_| None);
        assert!(captures.news() && !captures.borrows("b"));
    }

    #[test]
    fn there_are_not_too_many() {
        let mut captures = Captures::default();
        let opened = (0..MAX_CAPTURES + 1).filter_map(|_| captures.open(wish(None), Instant::now())).count();
        assert_eq!(opened, MAX_CAPTURES);
    }
}
