//! What the planner has to know, found out; and what the kernel path shall carry by its word.
//!
//! Must never choose by itself: that is `plan::planner`.

use super::book::Book;
use super::engine::Supervisor;
use super::error::RunError;
use super::interfaces::Interface;
use super::kernel_path::{Target, wanted};
use super::options::{BackendChoice, XdpMode};
use super::ports::Way;
use crate::plan::fate::OutputDropReason;
use crate::plan::planner::{Decision, Drive, EgressFacts, Facts, IngressFacts, Path, Wish, choose};
use crate::plan::records::{OutputRecord, SnapshotRule};
use crate::rule::{PathChoice, Rule};
use relay_common::{IngressConfig, MAX_OWN, Shape};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Between two looks at what no notice tells: whether egress interfaces take redirected packets.
const LOOK_PERIOD: Duration = Duration::from_millis(100);

/// The planner's words by rule id.
pub(super) type Decisions = BTreeMap<String, Decision>;
/// Whether interfaces take redirected packets, by index.
pub(super) type Redirectable = BTreeMap<u32, Option<bool>>;

impl Supervisor {
    /// The planner's word on every rule.
    pub(super) fn decide(&self, rules: &[Rule]) -> Decisions {
        let redirectable = self.redirectable(rules);
        rules.iter().map(|rule| (rule.id.clone(), choose(rule, &self.facts(rule, &redirectable)))).collect()
    }

    fn redirectable(&self, rules: &[Rule]) -> Redirectable {
        let outputs = rules.iter().flat_map(|rule| &rule.outputs);
        let indices = outputs.filter_map(|output| self.known.get(&output.egress)).map(|interface| interface.ifindex);
        let indices: std::collections::BTreeSet<u32> = indices.collect();
        let takes = |ifindex: u32| self.features.as_ref().and_then(|features| features.takes_redirected(ifindex));
        indices.into_iter().map(|ifindex| (ifindex, takes(ifindex))).collect()
    }

    fn facts(&self, rule: &Rule, redirectable: &Redirectable) -> Facts {
        let no_kernel = match &self.program {
            Some(program) => program.kernel().err().map(str::to_owned),
            None => Some(self.no_program.clone()),
        };
        let egress = rule.outputs.iter().map(|output| {
            let interface = self.known.get(&output.egress);
            EgressFacts {
                name: output.egress.clone(),
                kind: interface.and_then(|interface| interface.kind.clone()).unwrap_or_default(),
                takes_redirected: interface.and_then(|interface| redirectable.get(&interface.ifindex).copied().flatten()),
                present: interface.is_some(),
            }
        });
        let (wish, ingress, is_captured) = (self.wish(rule), self.ingress_facts(rule), self.captures.borrows(&rule.id));
        Facts { wish, no_kernel, ingress, egress: egress.collect(), is_captured }
    }

    fn wish(&self, rule: &Rule) -> Wish {
        match (rule.path, self.options.backend) {
            (PathChoice::Kernel, _) | (PathChoice::Auto, BackendChoice::Kernel) => Wish::Kernel,
            (PathChoice::Packet, _) | (PathChoice::Auto, BackendChoice::Packet) => Wish::Packet,
            (PathChoice::Xsk, _) | (PathChoice::Auto, BackendChoice::Xsk) => Wish::Xsk,
            (PathChoice::Auto, BackendChoice::Auto) => Wish::Auto,
        }
    }

    /// Whether the path of a rule is the relay's own choice.
    pub(super) fn is_free(&self, rule: &Rule) -> bool {
        self.wish(rule) == Wish::Auto
    }

    fn ingress_facts(&self, rule: &Rule) -> Option<IngressFacts> {
        let (_, port) = self.ports.ingress(rule).filter(|(_, port)| port.is_live())?;
        let interface = self.known.get(&rule.ingress)?;
        let own4 = interface.addresses.iter().filter(|own| own.address.is_ipv4()).count();
        let drive = match port.way {
            Way::Packet => Drive::Packet(port.reason.clone()),
            Way::Xsk if self.options.xdp_mode == XdpMode::Generic => Drive::Generic,
            Way::Xsk => Drive::Native,
        };
        let own6 = interface.addresses.len() - own4;
        Some(IngressFacts { drive, mtu: interface.mtu, own4, own6, reason: port.reason.clone() })
    }

    /// What the kernel path shall carry of the book in force.
    pub(super) fn kernel_target(&self, rules: &[SnapshotRule], decisions: &Decisions) -> Target {
        self.kernel_target_of(rules, &self.book, decisions)
    }

    /// The same of any book. A rule that insists on the path and can't have it is blocked there.
    pub(super) fn kernel_target_of(&self, rules: &[SnapshotRule], book: &Book, decisions: &Decisions) -> Target {
        let slots: BTreeMap<u32, &Decision> = decisions
            .iter()
            .filter(|(_, decision)| decision.path == Path::Kernel)
            .filter_map(|(id, decision)| Some((book.slots(id)?.slot, decision)))
            .collect();
        let down = OutputRecord::block(Some(OutputDropReason::OutputDown));
        let mut target = Target::new();
        for rule in rules {
            let Some(decision) = slots.get(&rule.record.slot) else { continue };
            let (slot, mut wanted) = wanted(rule, |port| (self.port_ifindex(port), port));
            if decision.unmet.is_some() {
                wanted.outputs.iter_mut().filter(|output| output.blocked == 0).for_each(|output| output.blocked = down);
            }
            target.insert(slot, wanted);
        }
        target
    }

    fn port_ifindex(&self, port: u32) -> u32 {
        let Some(port) = self.ports.list().get(port as usize) else { return 0 };
        self.known.get(&port.name).map_or(port.facts.ifindex, |interface| interface.ifindex)
    }

    /// Takes the kernel path further; true when its target is in force.
    pub(super) fn kernel_turn(&mut self) -> Result<bool, RunError> {
        let Some(program) = self.program.as_mut() else { return Ok(true) };
        program.watch_kernel(self.kernel_path.is_used(Instant::now())).map_err(RunError::failure)?;
        let Some(tables) = program.kernel_mut() else { return Ok(true) };
        self.kernel_path.turn(tables, Instant::now())
    }

    /// Looks at what no notice tells.
    pub(super) fn look_at_features(&mut self, now: Instant) -> bool {
        if now < self.look_at || self.decisions.values().all(|decision| decision.path == Path::Packet) {
            return false;
        }
        self.look_at = now + LOOK_PERIOD;
        let found = self.redirectable(self.book.set.rules());
        let changed = found != self.redirectable;
        self.redirectable = found;
        changed
    }

    /// An ingress interface's configuration.
    pub(super) fn ingress_config(&self, ifindex: u32, shapes: &[Shape]) -> IngressConfig {
        let slot = self.ports.list().iter().position(|port| port.way == Way::Xsk && port.facts.ifindex == ifindex);
        let mut config =
            IngressConfig { slot: slot.unwrap_or(0) as u32, shape_count: shapes.len() as u32, kernel: 1, ..IngressConfig::default() };
        config.shapes.iter_mut().zip(shapes).for_each(|(to, from)| *to = *from);
        if let Some(interface) = self.known.values().find(|interface| interface.ifindex == ifindex) {
            set_own(&mut config, interface);
        }
        config
    }
}

/// The first addresses of each family; the planner keeps rules of interfaces with more off the kernel path.
fn set_own(config: &mut IngressConfig, interface: &Interface) {
    let addresses = || interface.addresses.iter().map(|own| own.address);
    let v4 = addresses().filter_map(|own| if let IpAddr::V4(own) = own { Some(u32::from_ne_bytes(own.octets())) } else { None });
    config.own4.iter_mut().zip(v4.take(MAX_OWN)).for_each(|(to, from)| *to = from);
    let words = |own: std::net::Ipv6Addr| {
        let bytes = own.octets();
        let mut words = [0; 4];
        words.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(word, bytes)| *word = u32::from_ne_bytes(*bytes));
        words
    };
    let v6 = addresses().filter_map(|own| if let IpAddr::V6(own) = own { Some(words(own)) } else { None });
    config.own6.iter_mut().zip(v6.take(MAX_OWN)).for_each(|(to, from)| *to = from);
}
