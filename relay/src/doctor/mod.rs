//! What stands between a rule and its packets on this machine: `relay doctor` before the relay runs, `relay why` while it does.
//!
//! Each stage probes one thing and answers with a verdict, one line and the exact remedy. Needs no daemon; what a stage cannot
//! see without privileges it says. Must never change anything: no program is attached, no group joined, no setting written.

mod egress;
mod group;
mod host;
mod link;
pub mod listen;
pub mod why;

use crate::control::message::{RuleInfo, Status};
use crate::rule::Rule;
use crate::supervisor::capabilities::{self, Set};
use crate::supervisor::interfaces::{Interface, Interfaces};
use listen::Heard;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How a stage ended; the worst of all is the report's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing to do.
    Ok,
    /// Could not be seen from here; the reason says why.
    Skip,
    /// Works, but not as well, or not for long.
    Warn,
    /// Packets will not move.
    Fail,
}

impl Verdict {
    /// As in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Skip => "skip",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// What one stage found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the stage.
    pub stage: &'static str,
    /// The interface, or empty where the whole host is meant.
    pub interface: String,
    /// Verdict.
    pub verdict: Verdict,
    /// One line.
    pub reason: String,
    /// What to type, or empty.
    pub remedy: String,
}

impl Finding {
    fn new(verdict: Verdict, stage: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { stage, interface: String::new(), verdict, reason: reason.into(), remedy: remedy.into() }
    }

    fn ok(stage: &'static str, reason: impl Into<String>) -> Self {
        Self::new(Verdict::Ok, stage, reason, "")
    }

    fn skip(stage: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Verdict::Skip, stage, reason, remedy)
    }

    fn warn(stage: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Verdict::Warn, stage, reason, remedy)
    }

    fn fail(stage: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Verdict::Fail, stage, reason, remedy)
    }
}

/// All findings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The worst one; a stage that saw nothing counts as ok.
    pub verdict: Verdict,
    /// In the order of the stages.
    pub findings: Vec<Finding>,
}

/// What to examine.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// Interfaces named by the user; empty: those of the rules, else all that are up.
    pub interfaces: Vec<String>,
    /// Rules that run, or are to run.
    pub rules: Vec<Rule>,
    /// Workers that run, or are to run.
    pub workers: u32,
    /// Frames of each.
    pub frames: u32,
    /// How long to listen for queriers and TTLs; 0: not at all.
    pub listen: Duration,
    /// What a running relay says of itself.
    pub daemon: Option<Daemon>,
}

/// A running relay.
#[derive(Clone, Debug, Default)]
pub struct Daemon {
    /// `relay status`.
    pub status: Status,
    /// `relay rule list`.
    pub rules: Vec<RuleInfo>,
}

impl Daemon {
    /// The rung an interface runs on, or empty.
    fn backend(&self, interface: &str) -> &str {
        let info = self.status.interfaces.iter().find(|info| info.name == interface);
        info.map(|info| info.backend.as_str()).unwrap_or_default()
    }
}

/// What the stages look at.
pub(crate) struct Scene {
    question: Question,
    netlink: Interfaces,
    known: BTreeMap<String, Interface>,
    capabilities: Set,
    heard: BTreeMap<String, Result<Heard, String>>,
}

/// How the rules use an interface. Without rules it may be either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Role {
    ingress: bool,
    egress: bool,
}

impl Scene {
    fn new(question: Question) -> Result<Self, String> {
        let mut netlink = Interfaces::open().map_err(|error| error.to_string())?;
        let known = netlink.snapshot().map_err(|error| error.to_string())?;
        let capabilities = capabilities::effective().map_err(|error| format!("capget: {error}"))?;
        Ok(Self { question, netlink, known, capabilities, heard: BTreeMap::new() })
    }

    fn role(&self, interface: &str) -> Role {
        let ingress = self.question.rules.iter().any(|rule| rule.ingress == interface);
        let egress = self.question.rules.iter().any(|rule| rule.outputs.iter().any(|output| output.egress == interface));
        if ingress || egress { Role { ingress, egress } } else { Role { ingress: true, egress: true } }
    }

    /// Rules that take packets at an interface.
    fn taking<'a>(&'a self, interface: &'a str) -> impl Iterator<Item = &'a Rule> {
        self.question.rules.iter().filter(move |rule| rule.ingress == interface)
    }

    fn subjects(&self) -> Vec<String> {
        if !self.question.interfaces.is_empty() {
            return self.question.interfaces.clone();
        }
        let of_rules: BTreeSet<&String> = self
            .question
            .rules
            .iter()
            .flat_map(|rule| std::iter::once(&rule.ingress).chain(rule.outputs.iter().map(|output| &output.egress)))
            .collect();
        if !of_rules.is_empty() {
            return of_rules.into_iter().cloned().collect();
        }
        self.known.values().filter(|interface| interface.up && !interface.loopback).map(|interface| interface.name.clone()).collect()
    }
}

/// Runs every stage. The error is a kernel that does not answer netlink at all.
pub fn examine(question: Question) -> Result<Report, String> {
    let mut scene = Scene::new(question)?;
    let subjects = scene.subjects();
    listen_on_all(&mut scene, &subjects);
    let mut findings = host::stages(&scene);
    for name in &subjects {
        let Some(interface) = scene.known.get(name).cloned() else {
            findings.push(on(name, unknown(&scene, name)));
            continue;
        };
        let mut found = link::stages(&mut scene, &interface);
        found.extend(group::stages(&scene, &interface));
        findings.extend(found.into_iter().map(|finding| on(name, finding)));
    }
    findings.extend(egress::stages(&mut scene));
    let verdict = findings.iter().map(|finding| finding.verdict).filter(|verdict| *verdict != Verdict::Skip).max().unwrap_or(Verdict::Ok);
    Ok(Report { verdict, findings })
}

fn on(interface: &str, finding: Finding) -> Finding {
    Finding { interface: interface.into(), ..finding }
}

fn unknown(scene: &Scene, name: &str) -> Finding {
    let names: Vec<&str> = scene.known.keys().map(String::as_str).collect();
    Finding::fail("link", format!("there is no interface {name}"), format!("name one of {} (`ip link`)", names.join(", ")))
}

/// All interfaces at the same time, each for the whole time.
fn listen_on_all(scene: &mut Scene, subjects: &[String]) {
    let limit = scene.question.listen;
    if limit.is_zero() {
        return;
    }
    let ears: Vec<(String, u32)> = subjects
        .iter()
        .filter(|name| scene.role(name).ingress)
        .filter_map(|name| scene.known.get(name).filter(|interface| interface.up).map(|interface| (name.clone(), interface.ifindex)))
        .collect();
    scene.heard = std::thread::scope(|scope| {
        let threads: Vec<_> = ears.iter().map(|(name, ifindex)| (name, scope.spawn(|| listen::heard(*ifindex, limit)))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Heard, String>>| {
            thread.join().unwrap_or_else(|_| Err("the listening thread ended early".into()))
        };
        threads.into_iter().map(|(name, thread)| (name.clone(), join(thread))).collect()
    });
}

/// A file of /proc as this thread's network namespace shows it; trimmed. `None` where there is none or it may not be read.
fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// A sysctl, with slashes.
fn sysctl(key: &str) -> Option<i64> {
    read(&format!("/proc/sys/{key}"))?.parse().ok()
}

/// A table of `/proc/net`.
fn table(name: &str) -> String {
    read(&format!("/proc/thread-self/net/{name}")).unwrap_or_default()
}
