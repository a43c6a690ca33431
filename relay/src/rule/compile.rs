//! Rules made into tables: shapes per ingress, one exact-match entry per (tag, group, port), source sets behind them.
//! And how the tables of the running program become new ones while packets flow.
//!
//! The tables are the XDP program's maps and, in [`super::lookup`], the packet path's. Must never number a source set
//! again while anybody may still read it: a set is never edited, it is replaced by one of another number.

use super::prefix::masked;
use super::set::shape;
use super::{Match, Prefix, TagMatch};
use foldhash::fast::FixedState;
use relay_common::{MAX_MATCHES, MAX_SHAPES, MAX_SOURCES, MatchEntry, MatchKey, NO_SLOT, Shape, SourceKey, SourceVerdict, TAG_NONE};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use thiserror::Error;

/// One rule as the tables see it.
#[derive(Clone, Copy, Debug)]
pub struct CompileInput<'a> {
    /// Ingress interface.
    pub ifindex: u32,
    /// The rule's slot.
    pub slot: u32,
    /// Epoch at which that slot's rule was installed.
    pub serial: u32,
    /// What it takes.
    pub matching: &'a Match,
}

/// Why rules don't fit the tables.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CompileError {
    /// More shapes than one ingress may have.
    #[error("match: interface {ifindex} needs {count} shapes, at most {MAX_SHAPES} are possible (use fewer different prefix lengths)")]
    Shapes {
        /// The ingress.
        ifindex: u32,
        /// Shapes it needs.
        count: usize,
    },
    /// More (tag, group, port) than the match table has room for.
    #[error("match: {0} different matches, at most {MAX_MATCHES} are possible (use group prefixes)")]
    Matches(usize),
    /// More source prefixes than the source table has room for.
    #[error("except: {0} source prefixes, at most {MAX_SOURCES} are possible (use wider source prefixes)")]
    Sources(usize),
    /// Two rules with the same match.
    #[error("match: slots {0} and {1} have the same match")]
    Same(u32, u32),
}

/// A prefix of a source set: masked address in 16 bytes, and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourcePrefix {
    /// Length in bits of the address, 0–128.
    pub len: u8,
    /// Address, IPv4 in the first 4 bytes.
    pub addr: [u8; 16],
}

/// One source set: longest prefix wins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceSet {
    /// Lengths that occur, longest first.
    pub lens: Vec<u8>,
    /// What each prefix means.
    pub prefixes: HashMap<SourcePrefix, SourceVerdict, FixedState>,
}

/// The tables of one relay.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// Shapes of each ingress, in order of precedence.
    pub ingresses: BTreeMap<u32, Vec<Shape>>,
    /// The match table.
    pub entries: HashMap<MatchKey, MatchEntry, FixedState>,
    /// The source sets by number.
    pub sets: HashMap<u32, SourceSet, FixedState>,
    /// A number that no source set has had so far.
    pub next_set: u32,
}

/// Compiles `inputs`. A source set that stands in `old` under the same key with the same content keeps its number; every
/// other one gets a number that `old` and its predecessors never used.
pub fn compile(inputs: &[CompileInput<'_>], old: &Compiled) -> Result<Compiled, CompileError> {
    let mut groups: BTreeMap<MatchKey, Vec<&CompileInput<'_>>> = BTreeMap::new();
    for input in inputs {
        groups.entry(match_key(input)).or_default().push(input);
    }
    let mut new = Compiled { ingresses: shapes(groups.keys())?, next_set: old.next_set.max(1), ..Compiled::default() };
    for (key, rules) in &groups {
        let entry = compile_entry(key, rules, old, &mut new)?;
        new.entries.insert(*key, entry);
    }
    let sources = new.sets.values().map(|set| set.prefixes.len()).sum();
    match (new.entries.len(), sources) {
        (count, _) if count > MAX_MATCHES as usize => Err(CompileError::Matches(count)),
        (_, count) if count > MAX_SOURCES as usize => Err(CompileError::Sources(count)),
        _ => Ok(new),
    }
}

fn match_key(input: &CompileInput<'_>) -> MatchKey {
    let tag = match input.matching.tag {
        TagMatch::None | TagMatch::Any => TAG_NONE,
        TagMatch::Vlan(id) => u32::from(id),
        TagMatch::QinQ(outer, inner) => u32::from(outer) | u32::from(inner) << 16,
    };
    let port = input.matching.port.unwrap_or(0);
    MatchKey { ifindex: input.ifindex, tag, addr: input.matching.group.bytes(), port, zero: 0, shape: shape(input.matching) }
}

/// Precedence of a shape, less first: exact tag over any, longer group prefix, port over any. Families never compete.
pub(super) fn precedence(shape: &Shape) -> (u8, std::cmp::Reverse<u8>, u8, u8) {
    (shape.tag_mode, std::cmp::Reverse(shape.group_len), shape.port_mode, shape.family)
}

fn shapes<'a>(keys: impl Iterator<Item = &'a MatchKey>) -> Result<BTreeMap<u32, Vec<Shape>>, CompileError> {
    let mut found: BTreeMap<u32, BTreeSet<Shape>> = BTreeMap::new();
    for key in keys {
        found.entry(key.ifindex).or_default().insert(key.shape);
    }
    if let Some((ifindex, shapes)) = found.iter().find(|(_, shapes)| shapes.len() > MAX_SHAPES) {
        return Err(CompileError::Shapes { ifindex: *ifindex, count: shapes.len() });
    }
    Ok(found.into_iter().map(|(ifindex, shapes)| (ifindex, sorted(shapes))).collect())
}

fn sorted(shapes: BTreeSet<Shape>) -> Vec<Shape> {
    let mut shapes: Vec<Shape> = shapes.into_iter().collect();
    shapes.sort_by_key(precedence);
    shapes
}

/// A rule's source; a source of length 0 is any source.
fn source_of(rule: &CompileInput<'_>) -> Option<Prefix> {
    rule.matching.source.filter(|source| source.len > 0)
}

/// The entry of one (tag, group, port): its rules differ in their sources only.
fn compile_entry(key: &MatchKey, rules: &[&CompileInput<'_>], old: &Compiled, new: &mut Compiled) -> Result<MatchEntry, CompileError> {
    let mut by_source: BTreeMap<Option<Prefix>, &CompileInput<'_>> = BTreeMap::new();
    for rule in rules {
        if let Some(first) = by_source.insert(source_of(rule), rule) {
            return Err(CompileError::Same(first.slot, rule.slot));
        }
    }
    let set = source_set(&by_source);
    let any = by_source.get(&None);
    let (slot, serial) = any.map_or((NO_SLOT, 0), |rule| (rule.slot, rule.serial));
    if set.prefixes.is_empty() {
        return Ok(MatchEntry { slot, serial, source_set: 0, zero: 0 });
    }
    let source_set = old_number(key, &set, old).unwrap_or_else(|| fresh_number(new));
    new.sets.insert(source_set, set);
    Ok(MatchEntry { slot, serial, source_set, zero: 0 })
}

/// The number under which the very same set stands now.
fn old_number(key: &MatchKey, set: &SourceSet, old: &Compiled) -> Option<u32> {
    let number = old.entries.get(key)?.source_set;
    (old.sets.get(&number)? == set).then_some(number)
}

const fn fresh_number(new: &mut Compiled) -> u32 {
    let number = new.next_set;
    new.next_set = number.wrapping_add(1);
    number
}

/// The set in which plain longest-prefix match gives: the rule with the longest source wins, and its `except` passes.
///
/// For every prefix P that a source or an `except` names, the winner is the rule with the longest source that covers P
/// (the rule without source, if no other). All addresses whose longest named prefix is P have that winner, and the
/// same excepts, since any source or except that held one of them but not all of P would be a longer named prefix.
fn source_set(rules: &BTreeMap<Option<Prefix>, &CompileInput<'_>>) -> SourceSet {
    let sources = rules.keys().flatten();
    let excepts = rules.values().flat_map(|rule| &rule.matching.except);
    let named: BTreeSet<Prefix> = sources.chain(excepts).copied().collect();
    let mut set = SourceSet::default();
    for prefix in named {
        if let Some(verdict) = verdict_of(&prefix, rules) {
            set.prefixes.insert(SourcePrefix { len: prefix.len, addr: prefix.bytes() }, verdict);
        }
    }
    let lens: BTreeSet<u8> = set.prefixes.keys().map(|prefix| prefix.len).collect();
    set.lens = lens.into_iter().rev().collect();
    set
}

/// What a named prefix means; `None`: no rule takes it.
fn verdict_of(prefix: &Prefix, rules: &BTreeMap<Option<Prefix>, &CompileInput<'_>>) -> Option<SourceVerdict> {
    let covering = |len: u8| rules.get(&Some(Prefix::new(prefix.addr, len)));
    let winner = (1..=prefix.len).rev().find_map(covering).or_else(|| rules.get(&None))?;
    let excepted = winner.matching.except.iter().any(|except| except.covers(prefix));
    Some(match excepted {
        true => SourceVerdict { slot: NO_SLOT, serial: 0 },
        false => SourceVerdict { slot: winner.slot, serial: winner.serial },
    })
}

/// One step from the running tables to the next ones, as a map operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapChange {
    /// Insert into `SOURCES`; prefix length of the whole key (32 bits of set number and the address's).
    SourcePut(u32, SourceKey, SourceVerdict),
    /// Insert into or replace in `MATCHES`.
    EntryPut(MatchKey, MatchEntry),
    /// Insert or replace the shapes of an interface in `INGRESS`.
    IngressPut(u32, Vec<Shape>),
    /// Delete an interface from `INGRESS`.
    IngressDelete(u32),
    /// Delete from `MATCHES`.
    EntryDelete(MatchKey),
    /// Wait until no packet that began before is still in the program (an RCU grace period; `membarrier(GLOBAL)` does).
    Settle,
    /// Delete from `SOURCES`.
    SourceDelete(u32, SourceKey),
}

/// The steps from `old` to `new` in an order in which every packet has exactly one fate at any moment: where rules are only
/// added, only removed, or replaced under the same match, the old or the new one and never a third rule's.
///
/// 1. New source sets, which nobody reads yet.
/// 2. Shape lists widened to both generations: a shape without entries just misses.
/// 3. Entries that take more than before, most specific first: no packet falls to a new wide rule while its own is on the way.
/// 4. Entries that take less or nothing, least specific first, for the same reason.
/// 5. Shape lists of the new tables (before 4 where both generations' shapes are too many for one list).
/// 6. After a grace period, the source sets that nobody can find any more.
///
/// What is equal in both generations is not touched.
pub fn diff(old: &Compiled, new: &Compiled) -> Vec<MapChange> {
    let mut changes = Vec::new();
    changes.extend(set_steps(new, old).map(|(len, key, verdict)| MapChange::SourcePut(len, key, verdict)));
    let widened = widened(old, new);
    ingress_steps(&old.ingresses, &widened, &mut changes);
    changes.extend(entry_grows(old, new));
    let complete = completed(&widened, new);
    ingress_steps(&widened, &complete, &mut changes);
    changes.extend(entry_shrinks(old, new));
    ingress_steps(&complete, &new.ingresses, &mut changes);
    let stale: Vec<MapChange> = set_steps(old, new).map(|(len, key, _)| MapChange::SourceDelete(len, key)).collect();
    if !stale.is_empty() {
        changes.push(MapChange::Settle);
        changes.extend(stale);
    }
    changes
}

/// The content of the sets that `here` has and `there` has not, in order of their numbers.
fn set_steps<'a>(here: &'a Compiled, there: &'a Compiled) -> impl Iterator<Item = (u32, SourceKey, SourceVerdict)> + 'a {
    let mut numbers: Vec<&u32> = here.sets.keys().filter(|number| !there.sets.contains_key(number)).collect();
    numbers.sort_unstable();
    numbers.into_iter().filter_map(|number| Some((number, here.sets.get(number)?))).flat_map(|(number, set)| {
        let mut prefixes: Vec<_> = set.prefixes.iter().collect();
        prefixes.sort_unstable_by_key(|(prefix, _)| **prefix);
        let step = move |(prefix, verdict): (&SourcePrefix, &SourceVerdict)| {
            (32 + u32::from(prefix.len), SourceKey { set: number.to_be_bytes(), addr: prefix.addr }, *verdict)
        };
        prefixes.into_iter().map(step)
    })
}

/// The shapes of both generations per ingress; where those are too many, the old ones.
fn widened(old: &Compiled, new: &Compiled) -> BTreeMap<u32, Vec<Shape>> {
    let mut all = old.ingresses.clone();
    for (ifindex, shapes) in &new.ingresses {
        let both: BTreeSet<Shape> = all.get(ifindex).into_iter().flatten().chain(shapes).copied().collect();
        if both.len() <= MAX_SHAPES {
            all.insert(*ifindex, sorted(both));
        }
    }
    all
}

/// The widened lists, or the new ones where a widened list lacks some of theirs.
fn completed(widened: &BTreeMap<u32, Vec<Shape>>, new: &Compiled) -> BTreeMap<u32, Vec<Shape>> {
    let mut all = widened.clone();
    for (ifindex, shapes) in &new.ingresses {
        let list = all.entry(*ifindex).or_default();
        if !shapes.iter().all(|shape| list.contains(shape)) {
            list.clone_from(shapes);
        }
    }
    all
}

fn ingress_steps(from: &BTreeMap<u32, Vec<Shape>>, to: &BTreeMap<u32, Vec<Shape>>, changes: &mut Vec<MapChange>) {
    let changed = to.iter().filter(|(ifindex, shapes)| from.get(ifindex) != Some(shapes));
    changes.extend(changed.map(|(ifindex, shapes)| MapChange::IngressPut(*ifindex, shapes.clone())));
    changes.extend(from.keys().filter(|ifindex| !to.contains_key(ifindex)).map(|ifindex| MapChange::IngressDelete(*ifindex)));
}

/// New and changed entries that take all that they took before.
fn entry_grows(old: &Compiled, new: &Compiled) -> impl Iterator<Item = MapChange> {
    let changed = new.entries.iter().filter(|(key, entry)| old.entries.get(key) != Some(entry));
    let mut puts: Vec<_> = changed.filter(|(key, _)| !narrows(key, old, new)).collect();
    puts.sort_unstable_by_key(|(key, _)| (precedence(&key.shape), **key));
    puts.into_iter().map(|(key, entry)| MapChange::EntryPut(*key, *entry))
}

/// Entries that are no more, or no longer take all that they took.
fn entry_shrinks(old: &Compiled, new: &Compiled) -> impl Iterator<Item = MapChange> {
    let mut keys: Vec<&MatchKey> = old.entries.keys().filter(|key| narrows(key, old, new)).collect();
    keys.sort_unstable_by_key(|key| std::cmp::Reverse((precedence(&key.shape), **key)));
    keys.into_iter().map(|key| match new.entries.get(key) {
        Some(entry) => MapChange::EntryPut(*key, *entry),
        None => MapChange::EntryDelete(*key),
    })
}

/// Whether some source that `old` takes at this key goes on to the next shape in `new`.
fn narrows(key: &MatchKey, old: &Compiled, new: &Compiled) -> bool {
    let Some(before) = old.entries.get(key) else { return false };
    let Some(after) = new.entries.get(key) else { return true };
    let (was, is) = (old.sets.get(&before.source_set), new.sets.get(&after.source_set));
    let taken = |prefix: &SourcePrefix| is.is_some_and(|set| set.covers(prefix));
    match (before.slot, after.slot) {
        (_, slot) if slot != NO_SLOT => false,
        (NO_SLOT, _) => was.is_some_and(|set| !set.prefixes.keys().all(taken)),
        _ => true,
    }
}

impl SourceSet {
    /// Whether one of the set's prefixes holds all of `prefix`.
    fn covers(&self, prefix: &SourcePrefix) -> bool {
        let wider = self.lens.iter().filter(|len| **len <= prefix.len);
        wider.copied().any(|len| self.prefixes.contains_key(&SourcePrefix { len, addr: masked(prefix.addr, len) }))
    }

    /// The verdict of the longest prefix that holds `addr`.
    #[inline]
    pub fn lookup(&self, addr: [u8; 16]) -> Option<SourceVerdict> {
        self.lens.iter().find_map(|len| self.prefixes.get(&SourcePrefix { len: *len, addr: masked(addr, *len) }).copied())
    }
}

#[cfg(test)]
mod tests;
