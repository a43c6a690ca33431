//! The set of rules of one relay: what must hold between rules, and how one set becomes another.
//!
//! A set that breaks a promise can't be built: every change is checked as a whole and made as a whole, or not at all.

use super::check;
use super::error::nearest;
use super::{Prefix, Rule, TagMatch, cycle};
use relay_common::{MAX_SHAPES, PORT_ANY, PORT_EXACT, Shape, TAG_ANY, TAG_EXACT};
use std::collections::{HashMap, HashSet};
use thiserror::Error;

/// Why a set of rules is refused. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SetError {
    /// Two rules take the same packets with the same precedence.
    #[error("match: rules {first} and {second} both take {text} (change a running rule with `relay apply`, which replaces it)")]
    SameMatch {
        /// Id of the rule that was there first.
        first: String,
        /// Id of the other.
        second: String,
        /// Ingress and match of both.
        text: String,
    },
    /// Two rules have one name.
    #[error("id: two rules are called {id}: {first} and {second} (give one of them another id)")]
    SameId {
        /// The name.
        id: String,
        /// Ingress and match of the rule that was there first.
        first: String,
        /// Ingress and match of the other.
        second: String,
    },
    /// Rules feed each other in a circle.
    #[error(
        "output: rules {} feed each other in a circle (send to another group, or use src=ADDR there and except=ADDR on the next rule)",
        .ids.join(" -> ")
    )]
    Cycle {
        /// Their ids in order, the first again at the end.
        ids: Vec<String>,
    },
    /// An ingress needs more lookups per packet than there may be.
    #[error(
        "match: the rules of {ingress} have {count} combinations of tag mode, prefix length and port mode, at most {MAX_SHAPES} are possible (use fewer different prefix lengths)"
    )]
    TooManyShapes {
        /// The ingress.
        ingress: String,
        /// Combinations of its rules.
        count: usize,
    },
    /// A rule contradicts itself.
    #[error("rule {id}: {field}: {problem} ({hint})")]
    Invalid {
        /// Its id.
        id: String,
        /// The field at fault.
        field: &'static str,
        /// What is wrong.
        problem: String,
        /// What to write instead.
        hint: String,
    },
    /// No rule has this name.
    #[error("id: no rule {id} ({hint})")]
    UnknownId {
        /// The name.
        id: String,
        /// The nearest one there is.
        hint: String,
    },
}

impl SetError {
    /// The field at fault.
    pub const fn field(&self) -> &'static str {
        match self {
            Self::SameMatch { .. } | Self::TooManyShapes { .. } => "match",
            Self::SameId { .. } | Self::UnknownId { .. } => "id",
            Self::Cycle { .. } => "output",
            Self::Invalid { field, .. } => field,
        }
    }

    /// The last of `rules` (those that were refused) that it speaks of, as an index.
    pub fn culprit(&self, rules: &[Rule]) -> Option<usize> {
        let concerned = |rule: &Rule| match self {
            Self::SameMatch { second: id, .. } | Self::SameId { id, .. } | Self::Invalid { id, .. } | Self::UnknownId { id, .. } => {
                rule.id == *id
            }
            Self::TooManyShapes { ingress, .. } => rule.ingress == *ingress,
            Self::Cycle { ids } => ids.contains(&rule.id),
        };
        rules.iter().rposition(concerned)
    }
}

/// What makes a set out of another, by id, in the order of the sets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetDiff {
    /// Rules of new ids.
    pub added: Vec<Rule>,
    /// Ids that are no more.
    pub removed: Vec<String>,
    /// Rules that say something else under the same id.
    pub changed: Vec<Rule>,
}

impl SetDiff {
    /// Whether both sets say the same.
    pub const fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.changed.is_empty()
    }
}

/// Rules in the order in which they were written, all promises between them kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSet {
    rules: Vec<Rule>,
    /// Where the rule of an id stands.
    by_id: HashMap<String, usize>,
}

impl RuleSet {
    /// A set of these rules.
    pub fn new(rules: Vec<Rule>) -> Result<Self, SetError> {
        validate(&rules)?;
        Ok(Self { by_id: index(&rules), rules })
    }

    /// The rules in order.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The rule of that name.
    pub fn get(&self, id: &str) -> Option<&Rule> {
        self.by_id.get(id).and_then(|at| self.rules.get(*at))
    }

    /// Adds one rule at the end. Checks only what the new rule can break.
    pub fn add(&mut self, rule: Rule) -> Result<(), SetError> {
        check_rule(&rule)?;
        self.check_against(&rule)?;
        self.by_id.insert(rule.id.clone(), self.rules.len());
        self.rules.push(rule);
        let result = self.check_last();
        if result.is_err()
            && let Some(rule) = self.rules.pop()
        {
            self.by_id.remove(&rule.id);
        }
        result
    }

    /// Matches and ids differ from the new rule's.
    fn check_against(&self, rule: &Rule) -> Result<(), SetError> {
        let key = precedence_key(rule);
        if let Some(first) = self.rules.iter().find(|first| precedence_key(first) == key) {
            return Err(SetError::SameMatch { first: first.id.clone(), second: rule.id.clone(), text: place_text(rule) });
        }
        match self.get(&rule.id) {
            Some(first) => Err(SetError::SameId { id: rule.id.clone(), first: place_text(first), second: place_text(rule) }),
            None => Ok(()),
        }
    }

    /// Shapes and circles with the last rule. A circle through it enters and leaves it by interfaces that others use as well.
    fn check_last(&self) -> Result<(), SetError> {
        let Some((last, others)) = self.rules.split_last() else { return Ok(()) };
        check_shapes(self.rules.iter().filter(|rule| rule.ingress == last.ingress))?;
        let entered = others.iter().any(|rule| rule.outputs.iter().any(|output| output.egress == last.ingress));
        let left = others.iter().any(|rule| last.outputs.iter().any(|output| output.egress == rule.ingress));
        if entered && left { check_circles(&self.rules) } else { Ok(()) }
    }

    /// Takes one rule out.
    pub fn remove(&mut self, id: &str) -> Result<Rule, SetError> {
        let unknown = || {
            let hint = nearest(id, self.rules.iter().map(|rule| rule.id.as_str()));
            let hint = hint.map_or_else(|| "see `relay rule list`".to_owned(), |id| format!("did you mean {id}?"));
            SetError::UnknownId { id: id.to_owned(), hint }
        };
        let at = self.by_id.get(id).copied().ok_or_else(unknown)?;
        let rule = self.rules.remove(at);
        self.by_id.remove(id);
        self.by_id.values_mut().filter(|other| **other > at).for_each(|other| *other -= 1);
        Ok(rule)
    }

    /// Becomes the set of these rules and says what that changed.
    pub fn replace_all(&mut self, rules: Vec<Rule>) -> Result<SetDiff, SetError> {
        let new = Self::new(rules)?;
        let diff = self.diff(&new);
        *self = new;
        Ok(diff)
    }

    /// What would make `new` out of this set. The order of the rules means nothing and is no difference.
    pub fn diff(&self, new: &Self) -> SetDiff {
        let old: HashMap<&str, &Rule> = self.rules.iter().map(|rule| (rule.id.as_str(), rule)).collect();
        let kept: HashSet<&str> = new.rules.iter().map(|rule| rule.id.as_str()).collect();
        let gone = self.rules.iter().filter(|rule| !kept.contains(rule.id.as_str()));
        let mut diff = SetDiff { removed: gone.map(|rule| rule.id.clone()).collect(), ..SetDiff::default() };
        for rule in &new.rules {
            match old.get(rule.id.as_str()) {
                None => diff.added.push(rule.clone()),
                Some(old) if *old != rule => diff.changed.push(rule.clone()),
                Some(_) => {}
            }
        }
        diff
    }
}

/// Everything that must hold for and between rules, in the order in which a person would want to hear of it.
pub fn validate(rules: &[Rule]) -> Result<(), SetError> {
    rules.iter().try_for_each(check_rule)?;
    check_matches(rules)?;
    check_ids(rules)?;
    check_shapes(rules.iter())?;
    check_circles(rules)
}

fn index(rules: &[Rule]) -> HashMap<String, usize> {
    rules.iter().enumerate().map(|(at, rule)| (rule.id.clone(), at)).collect()
}

fn check_circles(rules: &[Rule]) -> Result<(), SetError> {
    cycle::find(rules).map_or(Ok(()), |circle| Err(circle_error(rules, &circle)))
}

fn check_rule(rule: &Rule) -> Result<(), SetError> {
    check::check(rule).map_err(|(_, fault)| SetError::Invalid {
        id: rule.id.clone(),
        field: fault.field,
        problem: fault.problem,
        hint: fault.hint,
    })
}

/// What decides about precedence, `except` apart. Two rules that are equal in tag mode, group length, port mode and
/// source length and have a packet in common are equal in all of this, for prefixes of one length are equal or disjoint.
fn precedence_key(rule: &Rule) -> (&str, TagMatch, Prefix, Option<u16>, Option<Prefix>) {
    let matching = &rule.matching;
    (&rule.ingress, matching.tag, matching.group, matching.port, matching.source.filter(|source| source.len > 0))
}

fn place_text(rule: &Rule) -> String {
    match rule.matching.tag {
        TagMatch::None => format!("{} {}", rule.ingress, rule.matching),
        tag => format!("{} {} tag={tag}", rule.ingress, rule.matching),
    }
}

fn check_matches(rules: &[Rule]) -> Result<(), SetError> {
    let mut seen = HashMap::with_capacity(rules.len());
    rules.iter().try_for_each(|rule| match seen.insert(precedence_key(rule), rule) {
        Some(first) => Err(SetError::SameMatch { first: first.id.clone(), second: rule.id.clone(), text: place_text(rule) }),
        None => Ok(()),
    })
}

fn check_ids(rules: &[Rule]) -> Result<(), SetError> {
    let mut seen = HashMap::with_capacity(rules.len());
    rules.iter().try_for_each(|rule| match seen.insert(rule.id.as_str(), rule) {
        Some(first) => Err(SetError::SameId { id: rule.id.clone(), first: place_text(first), second: place_text(rule) }),
        None => Ok(()),
    })
}

/// The shape under which a rule stands in the match table.
pub fn shape(matching: &super::Match) -> Shape {
    Shape {
        family: matching.group.family(),
        tag_mode: if matching.tag == TagMatch::Any { TAG_ANY } else { TAG_EXACT },
        group_len: matching.group.len,
        port_mode: if matching.port.is_some() { PORT_EXACT } else { PORT_ANY },
    }
}

fn check_shapes<'a>(rules: impl Iterator<Item = &'a Rule>) -> Result<(), SetError> {
    let mut shapes: HashMap<&str, HashSet<Shape>> = HashMap::new();
    for rule in rules {
        shapes.entry(&rule.ingress).or_default().insert(shape(&rule.matching));
    }
    let mut over: Vec<_> = shapes.into_iter().filter(|(_, shapes)| shapes.len() > MAX_SHAPES).collect();
    over.sort_by_key(|(ingress, _)| *ingress);
    match over.first() {
        Some((ingress, shapes)) => Err(SetError::TooManyShapes { ingress: (*ingress).to_owned(), count: shapes.len() }),
        None => Ok(()),
    }
}

fn circle_error(rules: &[Rule], circle: &[usize]) -> SetError {
    let around = circle.iter().chain(circle.first()).filter_map(|at| rules.get(*at));
    SetError::Cycle { ids: around.map(|rule| rule.id.clone()).collect() }
}

#[cfg(test)]
mod tests;
