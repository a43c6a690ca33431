//! The rule book: the set in force with slots and serials, and how a new set becomes a snapshot and tables.
//!
//! Pure but for what it is told about interfaces. A slot is not given out again before all others had their turn, so it is
//! never reused within two epochs (DECISIONS §5). Must never publish anything itself.

use super::error::RunError;
use crate::plan::counters::{MAX_OUTPUTS, MAX_RULE_OUTPUTS, MAX_RULES};
use crate::plan::fate::OutputDropReason;
use crate::plan::records::{AddressRecord, OutputRecord, RuleRecord, Snapshot, SnapshotRule, address_bytes};
use crate::rule::compile::{CompileInput, Compiled, compile};
use crate::rule::set::RuleSet;
use crate::rule::{Match, Prefix, Rule, TagMatch};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where a rule's counters are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Rule slot.
    pub slot: u32,
    /// Epoch at which it was installed.
    pub serial: u32,
    /// Output slots.
    pub outputs: Vec<u32>,
}

/// What the book has to know about the interfaces of a rule.
pub trait World {
    /// Index of a rule's ingress interface; `None` while it is missing.
    fn ifindex(&self, rule: &Rule) -> Option<u32>;
    /// Port number and edit of an output, or why it can't send.
    fn output(&mut self, rule: &Rule, index: usize) -> OutputRecord;
    /// The relay's own addresses on its ingress interfaces.
    fn own_addresses(&self) -> Vec<AddressRecord>;
    /// Whether XDP carries the rule (else user space matches it).
    fn in_xdp(&self, rule: &Rule) -> bool;
}

/// Gives out numbers below `size`, each as late as possible after it was given back.
#[derive(Clone, Debug)]
struct Allocator {
    used: Vec<bool>,
    next: usize,
}

impl Allocator {
    fn new(size: usize) -> Self {
        Self { used: vec![false; size], next: 0 }
    }

    fn take(&mut self) -> Option<u32> {
        let size = self.used.len();
        let found = (0..size).map(|step| (self.next + step) % size).find(|at| self.used.get(*at) == Some(&false))?;
        if let Some(used) = self.used.get_mut(found) {
            *used = true;
        }
        self.next = found + 1;
        Some(found as u32)
    }

    /// Takes this very number; false if it can't be had.
    fn mark(&mut self, number: u32) -> bool {
        self.used.get_mut(number as usize).is_some_and(|used| !std::mem::replace(used, true))
    }

    fn give_back(&mut self, number: u32) {
        if let Some(used) = self.used.get_mut(number as usize) {
            *used = false;
        }
    }
}

/// The set in force.
#[derive(Clone, Debug)]
pub struct Book {
    /// The rules.
    pub set: RuleSet,
    slots: BTreeMap<String, Slots>,
    rule_slots: Allocator,
    output_slots: Allocator,
}

impl Default for Book {
    fn default() -> Self {
        Self {
            set: RuleSet::default(),
            slots: BTreeMap::new(),
            rule_slots: Allocator::new(MAX_RULES),
            output_slots: Allocator::new(MAX_OUTPUTS),
        }
    }
}

fn full(what: &str, max: usize) -> RunError {
    RunError::bad("rules", format!("more than {max} {what}"), "use group prefixes, or a second relay")
}

/// A rule, as a successor of the supervisor has to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptRule {
    /// Its canonical text.
    pub text: String,
    /// Rule slot.
    pub slot: u32,
    /// Epoch at which it was installed.
    pub serial: u32,
    /// Output slots.
    pub outputs: Vec<u32>,
}

impl Book {
    /// All that a successor needs to go on: rules, and where the next slots are looked for.
    pub fn keep(&self) -> (Vec<KeptRule>, [usize; 2]) {
        let keep = |rule: &Rule| {
            let Slots { slot, serial, outputs } = self.slots.get(&rule.id)?.clone();
            Some(KeptRule { text: rule.to_string(), slot, serial, outputs })
        };
        (self.set.rules().iter().filter_map(keep).collect(), [self.rule_slots.next, self.output_slots.next])
    }

    /// Goes on where another book was.
    pub fn restore(&mut self, rules: &[KeptRule], next: [usize; 2]) -> Result<(), RunError> {
        let unreadable = |error: &dyn std::fmt::Display| RunError::failure(format!("a rule of the relay that is taken over: {error}"));
        let mut book = Self::default();
        let mut set = Vec::new();
        for kept in rules {
            let rule: Rule = kept.text.parse().map_err(|error| unreadable(&error))?;
            let new = book.rule_slots.mark(kept.slot) && kept.outputs.iter().all(|slot| book.output_slots.mark(*slot));
            if !new || kept.outputs.len() != rule.outputs.len() {
                return Err(unreadable(&format!("the slots of {} can't be right", rule.id)));
            }
            let slots = Slots { slot: kept.slot, serial: kept.serial, outputs: kept.outputs.clone() };
            book.slots.insert(rule.id.clone(), slots);
            set.push(rule);
        }
        book.set = RuleSet::new(set).map_err(|error| unreadable(&error))?;
        [book.rule_slots.next, book.output_slots.next] = [next[0].min(MAX_RULES), next[1].min(MAX_OUTPUTS)];
        *self = book;
        Ok(())
    }

    /// Slots of a rule.
    pub fn slots(&self, id: &str) -> Option<&Slots> {
        self.slots.get(id)
    }

    /// The book with another set: rules that say the same, or change only their outputs, keep their slot and serial.
    pub fn with(&self, set: RuleSet, epoch: u32) -> Result<Self, RunError> {
        let mut next = Self { set, ..self.clone() };
        let rules: Vec<Rule> = next.set.rules().to_vec();
        let kept = |rule: &Rule| {
            self.set.get(&rule.id).is_some_and(|old| old.ingress == rule.ingress && old.matching == rule.matching && old.path == rule.path)
        };
        let gone: Vec<String> = self.slots.keys().filter(|id| !next.set.get(id).is_some_and(kept)).cloned().collect();
        for id in gone {
            if let Some(slots) = next.slots.remove(&id) {
                next.rule_slots.give_back(slots.slot);
                slots.outputs.iter().for_each(|output| next.output_slots.give_back(*output));
            }
        }
        for rule in &rules {
            next.assign(rule, epoch)?;
        }
        Ok(next)
    }

    fn assign(&mut self, rule: &Rule, epoch: u32) -> Result<(), RunError> {
        if rule.outputs.len() > MAX_RULE_OUTPUTS {
            return Err(RunError::bad(
                "output",
                format!("rule {} has {} outputs, at most {MAX_RULE_OUTPUTS} are possible", rule.id, rule.outputs.len()),
                "split it",
            ));
        }
        let mut slots = match self.slots.remove(&rule.id) {
            Some(slots) => slots,
            None => {
                let slot = self.rule_slots.take().ok_or_else(|| full("rules", MAX_RULES))?;
                Slots { slot, serial: epoch, outputs: Vec::new() }
            }
        };
        while slots.outputs.len() > rule.outputs.len() {
            slots.outputs.pop().into_iter().for_each(|output| self.output_slots.give_back(output));
        }
        while slots.outputs.len() < rule.outputs.len() {
            slots.outputs.push(self.output_slots.take().ok_or_else(|| full("outputs", MAX_OUTPUTS))?);
        }
        self.slots.insert(rule.id.clone(), slots);
        Ok(())
    }

    /// The tables XDP shall have.
    pub fn compile(&self, world: &dyn World, old: &Compiled) -> Result<Compiled, RunError> {
        let inputs: Vec<CompileInput<'_>> = self
            .set
            .rules()
            .iter()
            .filter(|rule| world.in_xdp(rule))
            .filter_map(|rule| {
                let slots = self.slots.get(&rule.id)?;
                let ifindex = world.ifindex(rule)?;
                Some(CompileInput { ifindex, slot: slots.slot, serial: slots.serial, matching: &rule.matching })
            })
            .collect();
        compile(&inputs, old).map_err(|error| RunError::bad("rules", error, ""))
    }

    /// The snapshot for the workers: this book, and of `leaving` the rules this one does not have any more (packets of
    /// theirs may still stand in rings).
    pub fn snapshot(&self, epoch: u32, world: &mut dyn World, leaving: Option<&Self>) -> Snapshot {
        let mut rules: Vec<SnapshotRule> = self.set.rules().iter().filter_map(|rule| self.record(rule, world)).collect();
        if let Some(old) = leaving {
            for rule in old.set.rules() {
                if self.slots.get(&rule.id) != old.slots.get(&rule.id) && !self.same_slot(old, &rule.id) {
                    rules.extend(old.record(rule, world));
                }
            }
        }
        Snapshot { epoch, rules, own: world.own_addresses() }
    }

    fn same_slot(&self, old: &Self, id: &str) -> bool {
        let slot = |book: &Self| book.slots.get(id).map(|slots| (slots.slot, slots.serial));
        slot(self) == slot(old)
    }

    fn record(&self, rule: &Rule, world: &mut dyn World) -> Option<SnapshotRule> {
        let slots = self.slots.get(&rule.id)?;
        let ifindex = world.ifindex(rule)?;
        let outputs = slots.outputs.iter().enumerate().map(|(index, slot)| OutputRecord { slot: *slot, ..world.output(rule, index) });
        Some(SnapshotRule {
            record: RuleRecord { slot: slots.slot, serial: slots.serial, ifindex, ..match_record(&rule.matching) },
            outputs: outputs.collect(),
            except: rule.matching.except.iter().map(prefix_record).collect(),
            text: rule.to_string(),
        })
    }
}

fn prefix_record(prefix: &Prefix) -> AddressRecord {
    AddressRecord { addr: address_bytes(prefix.addr), number: u32::from(prefix.len) }
}

fn match_record(matching: &Match) -> RuleRecord {
    let (tag_mode, tag) = match matching.tag {
        TagMatch::None => (0, 0),
        TagMatch::Any => (1, 0),
        TagMatch::Vlan(id) => (2, u32::from(id)),
        TagMatch::QinQ(outer, inner) => (3, u32::from(outer) | u32::from(inner) << 16),
    };
    let source = matching.source.as_ref().map(prefix_record);
    RuleRecord {
        tag_mode,
        tag,
        port: matching.port.map_or(u32::MAX, u32::from),
        family: if matching.group.addr.is_ipv4() { 4 } else { 6 },
        group_len: u32::from(matching.group.len),
        group: address_bytes(matching.group.addr),
        source_len: source.map_or(u32::MAX, |source| source.number),
        source: source.map_or([0; 16], |source| source.addr),
        ..RuleRecord::default()
    }
}

/// An output that drops everything for a reason.
pub fn blocked(port: u32, reason: OutputDropReason) -> OutputRecord {
    OutputRecord { port, blocked: OutputRecord::block(Some(reason)), ..OutputRecord::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(lines: &[&str]) -> RuleSet {
        RuleSet::new(lines.iter().map(|line| line.parse().unwrap()).collect()).unwrap()
    }

    #[test]
    fn a_restored_book_goes_on_where_the_other_was() {
        let rules = ["a 239.1.1.1:5000 -> b; id=x", "a 239.1.1.2:5000 -> b, c ttl=keep", "a 239.1.1.3:5000 -> b"];
        let one = Book::default().with(set(&rules), 1).unwrap().with(set(&rules[1..]), 2).unwrap();
        let (kept, next) = one.keep();
        let mut two = Book::default();
        two.restore(&kept, next).unwrap();
        assert_eq!(two.keep(), (kept.clone(), next));
        let [one, two] = [one, two].map(|book| book.with(set(&rules), 3).unwrap().keep());
        assert_eq!(one, two, "the next rule gets the slots that it would have got");
        let twice = [kept.clone(), kept.clone()].concat();
        assert!(Book::default().restore(&twice, next).is_err());
        let beyond = KeptRule { slot: u32::MAX, ..kept[0].clone() };
        assert!(Book::default().restore(&[beyond], next).is_err());
        let short = KeptRule { outputs: vec![], ..kept[0].clone() };
        assert!(Book::default().restore(&[short], next).is_err());
        let odd = KeptRule { text: "a rule?".into(), ..kept[0].clone() };
        assert!(Book::default().restore(&[odd], [usize::MAX; 2]).is_err());
    }

    #[test]
    fn unchanged_rules_keep_their_slots_and_freed_slots_rest() {
        let one = Book::default().with(set(&["a 239.1.1.1:5000 -> b; id=x", "a 239.1.1.2:5000 -> b; id=y"]), 1).unwrap();
        let two = one.with(set(&["a 239.1.1.2:5000 -> b, c; id=y", "a 239.1.1.3:5000 -> b; id=z"]), 2).unwrap();
        assert_eq!(two.slots("y").map(|s| (s.slot, s.serial)), one.slots("y").map(|s| (s.slot, s.serial)));
        assert_eq!(two.slots("y").unwrap().outputs.len(), 2);
        assert_eq!(two.slots("x"), None);
        assert_ne!(two.slots("z").unwrap().slot, one.slots("x").unwrap().slot);
        assert_eq!(two.slots("z").unwrap().serial, 2);
    }
}
