//! The kernel path's tables brought to what the rules want, without losing a packet of a rule that stays.
//!
//! ```text
//! want(target) ─▶ turn: new plans, outputs and devmaps written ─▶ (the kernel waits for a grace period) ─▶ the rules' words
//!                 changed ─▶ what was in force before rests, then its places are free again
//! ```
//! Nothing waits here: the loop calls [`KernelPath::turn`] until it says that the target is in force. Must never write what is
//! in force.

use super::error::RunError;
use crate::nic::afxdp::program::{Counted, KernelTables, ProgramError, kernel::Install};
use crate::plan::edit::{TTL_DEC, TTL_KEEP};
use crate::plan::records::SnapshotRule;
use relay_common::kernel::{
    KernelOutput, KernelPlan, MAX_LINEAR_L3_LEN, MAX_PLAN_OUTPUTS, MAX_PLANS, PLAN_BLOCKED, PLAN_NONE_READY, PLAN_SEVERAL, PlanDevice,
};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Between taking a plan out of force and writing its places again: longer than any packet stays in a program.
const REST: Duration = Duration::from_millis(200);

/// The tables are out of use after so long without a rule: putting them in use again soon after would wait for the kernel.
const UNUSED: Duration = Duration::from_secs(2);

/// What one rule wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Epoch at which its slot was given out.
    pub serial: u32,
    /// 4 or 6.
    pub family: u32,
    /// Its outputs.
    pub outputs: Vec<KernelOutput>,
}

/// What all rules of the kernel path want, by rule slot.
pub type Target = BTreeMap<u32, Wanted>;

/// A plan in the tables.
#[derive(Clone, Debug)]
struct Placed {
    wanted: Wanted,
    number: u32,
    first_output: u32,
}

/// Changes whose tables are written and whose words are not.
struct Change {
    new: Vec<(u32, Placed)>,
    gone: Vec<u32>,
    install: Option<Install>,
}

/// Free numbers as ranges: first number, count.
#[derive(Debug)]
struct Ranges(BTreeMap<u32, u32>);

impl Ranges {
    fn new(count: u32) -> Self {
        Self(BTreeMap::from([(0, count)]))
    }

    fn take(&mut self, count: u32) -> Option<u32> {
        let (first, len) = self.0.iter().find(|(_, len)| **len >= count).map(|(first, len)| (*first, *len))?;
        self.0.remove(&first);
        if len > count {
            self.0.insert(first + count, len - count);
        }
        Some(first)
    }

    fn give_back(&mut self, mut first: u32, mut count: u32) {
        if let Some(len) = self.0.remove(&(first + count)) {
            count += len;
        }
        if let Some((before, len)) = self.0.range(..first).next_back().map(|(before, len)| (*before, *len))
            && before + len == first
        {
            (first, count) = (before, count + len);
        }
        self.0.insert(first, count);
    }
}

/// The kernel path.
pub struct KernelPath {
    target: Target,
    current: BTreeMap<u32, Placed>,
    change: Option<Change>,
    resting: Vec<(Instant, Placed)>,
    used_at: Option<Instant>,
    plans: Ranges,
    outputs: Ranges,
    /// Devices by place: interface, and whether entries carry the egress program.
    devices: BTreeMap<u32, (u32, bool)>,
    counted: Counted,
}

impl Default for KernelPath {
    fn default() -> Self {
        Self {
            target: Target::new(),
            current: BTreeMap::new(),
            change: None,
            resting: Vec::new(),
            used_at: None,
            plans: Ranges::new(MAX_PLANS),
            outputs: Ranges::new(MAX_PLAN_OUTPUTS),
            devices: BTreeMap::new(),
            counted: Counted::default(),
        }
    }
}

/// What a rule of a snapshot wants; `device`: interface and place in the device table by port number.
pub fn wanted(rule: &SnapshotRule, device: impl Fn(u32) -> (u32, u32)) -> (u32, Wanted) {
    let output = |record: &crate::plan::records::OutputRecord| {
        let (ifindex, device) = device(record.port);
        KernelOutput { edit: record.edit, slot: record.slot, ifindex, device, blocked: record.blocked }
    };
    let wanted = Wanted { serial: rule.record.serial, family: rule.record.family, outputs: rule.outputs.iter().map(output).collect() };
    (rule.record.slot, wanted)
}

/// The plan of a rule, but for the places of its outputs.
fn plan(slot: u32, wanted: &Wanted, first_output: u32) -> KernelPlan {
    let ready = || wanted.outputs.iter().filter(|output| output.blocked == 0);
    let mut flags = 0;
    let count = ready().count();
    flags |= if count > 1 { PLAN_SEVERAL } else { 0 };
    flags |= if count < wanted.outputs.len() { PLAN_BLOCKED } else { 0 };
    flags |= if count == 0 { PLAN_NONE_READY | PLAN_BLOCKED } else { 0 };
    let mtu = |output: &KernelOutput| if output.edit.mtu == 0 { u32::MAX } else { output.edit.mtu };
    let least_ttl = |output: &KernelOutput| match output.edit.ttl_mode {
        TTL_DEC => 2,
        TTL_KEEP => 1,
        _ => 0,
    };
    KernelPlan {
        slot,
        serial: wanted.serial,
        flags,
        first_output,
        output_count: wanted.outputs.len() as u32,
        max_l3_len: ready().map(mtu).min().unwrap_or(MAX_LINEAR_L3_LEN).min(MAX_LINEAR_L3_LEN),
        min_ttl: ready().map(least_ttl).max().unwrap_or(0),
        family: wanted.family,
        ready: by_device(wanted).into_values().fold(0, |all, mask| all | mask),
        only: ready().next().copied().unwrap_or_default(),
    }
}

/// Which outputs go out of which device.
fn by_device(wanted: &Wanted) -> BTreeMap<u32, u64> {
    let mut masks = BTreeMap::new();
    for (index, output) in wanted.outputs.iter().enumerate().filter(|(_, output)| output.blocked == 0) {
        *masks.entry(output.ifindex).or_default() |= 1_u64 << index;
    }
    masks
}

fn is_several(wanted: &Wanted) -> bool {
    wanted.outputs.iter().filter(|output| output.blocked == 0).count() > 1
}

impl KernelPath {
    /// Sets the target; [`Self::turn`] goes there.
    pub fn want(&mut self, target: Target) {
        self.target = target;
    }

    /// Whose numbers stand in the counters.
    pub fn counted(&self) -> &Counted {
        &self.counted
    }

    /// Goes on with the numbers of another's counters.
    pub fn go_on_counting(&mut self, counted: Counted) {
        self.counted = counted;
    }

    /// What is wanted now.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Whether the loop has to look here often.
    pub fn is_busy(&self) -> bool {
        self.change.is_some()
    }

    /// Whether packets may be on their way by these tables, or were a moment ago.
    pub fn is_used(&mut self, now: Instant) -> bool {
        if !(self.target.is_empty() && self.current.is_empty() && self.resting.is_empty()) {
            self.used_at = Some(now);
        }
        self.used_at.is_some_and(|at| now < at + UNUSED)
    }

    /// Goes on; true when the target is in force.
    pub fn turn(&mut self, tables: &mut KernelTables, now: Instant) -> Result<bool, RunError> {
        self.rest_over(tables, now);
        loop {
            if self.change.as_ref().and_then(|change| change.install.as_ref()).is_some_and(|install| !install.is_done()) {
                return Ok(false);
            }
            if let Some(change) = self.change.take() {
                self.commit(tables, change, now).map_err(RunError::failure)?;
            }
            if self.is_there() {
                return Ok(true);
            }
            self.change = Some(self.stage(tables).map_err(RunError::failure)?);
        }
    }

    fn is_there(&self) -> bool {
        self.current.len() == self.target.len() && self.target.iter().all(|(slot, wanted)| self.has(*slot, wanted))
    }

    fn has(&self, slot: u32, wanted: &Wanted) -> bool {
        self.current.get(&slot).is_some_and(|placed| placed.wanted == *wanted)
    }

    /// Writes what is new, where nobody reads it yet.
    fn stage(&mut self, tables: &mut KernelTables) -> Result<Change, ProgramError> {
        let changed: Vec<(u32, Wanted)> =
            self.target.iter().filter(|(slot, wanted)| !self.has(**slot, wanted)).map(|(slot, wanted)| (*slot, wanted.clone())).collect();
        let gone = self.current.keys().filter(|slot| !self.target.contains_key(slot)).copied().collect();
        self.set_devices(tables, &changed)?;
        let (mut new, mut broadcasts) = (Vec::new(), Vec::new());
        for (slot, wanted) in changed {
            self.reset_counters(tables, slot, &wanted)?;
            let placed = self.place(wanted)?;
            let plan = plan(slot, &placed.wanted, placed.first_output);
            tables.write_plan(placed.number, &plan, &placed.wanted.outputs)?;
            if is_several(&placed.wanted) {
                for (ifindex, mask) in by_device(&placed.wanted) {
                    tables.set_plan_device(PlanDevice { first_output: placed.first_output, ifindex }, mask)?;
                }
                let ready: Vec<u32> =
                    placed.wanted.outputs.iter().filter(|output| output.blocked == 0).map(|output| output.ifindex).collect();
                broadcasts.push((placed.number, tables.broadcast(&ready)?));
            }
            new.push((slot, placed));
        }
        let install = if broadcasts.is_empty() { None } else { Some(tables.install(broadcasts)?) };
        Ok(Change { new, gone, install })
    }

    fn place(&mut self, wanted: Wanted) -> Result<Placed, ProgramError> {
        let full = || ProgramError::Diagnostics("the kernel path's tables are full".into());
        let first_output = self.outputs.take(wanted.outputs.len().max(1) as u32).ok_or_else(full)?;
        let number = self.plans.take(1).ok_or_else(full)?;
        Ok(Placed { wanted, number, first_output })
    }

    /// A device's queue keeps the program of its first packet, so before the first broadcast to a device the single entries
    /// for it get the egress program too. The grace period of the broadcast's own table comes after.
    fn set_devices(&mut self, tables: &mut KernelTables, changed: &[(u32, Wanted)]) -> Result<(), ProgramError> {
        let outputs = changed.iter().flat_map(|(_, wanted)| wanted.outputs.iter().map(|output| (is_several(wanted), output)));
        for (several, output) in outputs.filter(|(_, output)| output.blocked == 0) {
            let before = self.devices.get(&output.device).copied();
            let egress = several || before.is_some_and(|(ifindex, egress)| egress && ifindex == output.ifindex);
            if before != Some((output.ifindex, egress)) {
                tables.set_device(output.device, output.ifindex, egress, before.map(|(ifindex, _)| ifindex))?;
                self.devices.insert(output.device, (output.ifindex, egress));
            }
        }
        Ok(())
    }

    fn reset_counters(&mut self, tables: &mut KernelTables, slot: u32, wanted: &Wanted) -> Result<(), ProgramError> {
        if self.counted.rules.insert(slot, wanted.serial) != Some(wanted.serial) {
            tables.reset_rule(slot)?;
            tables.forget_drops(|key| key.serial != wanted.serial && key.slot == slot);
        }
        for output in &wanted.outputs {
            if self.counted.outputs.insert(output.slot, (slot, wanted.serial)) != Some((slot, wanted.serial)) {
                tables.reset_output(output.slot)?;
            }
        }
        Ok(())
    }

    /// Changes the rules' words; what they named before rests.
    fn commit(&mut self, tables: &mut KernelTables, change: Change, now: Instant) -> Result<(), ProgramError> {
        if let Some(install) = change.install {
            install.finish()?;
        }
        for (slot, placed) in change.new {
            tables.set_rule(slot, Some(placed.number))?;
            let before = self.current.insert(slot, placed);
            self.resting.extend(before.map(|before| (now + REST, before)));
        }
        for slot in change.gone {
            tables.set_rule(slot, None)?;
            let before = self.current.remove(&slot);
            self.resting.extend(before.map(|before| (now + REST, before)));
        }
        Ok(())
    }

    fn rest_over(&mut self, tables: &mut KernelTables, now: Instant) {
        let (over, resting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.resting).into_iter().partition(|(at, _)| *at <= now);
        self.resting = resting;
        // Where stores may be seen in another order than they were made, a flow can have been remembered by a plan that was no longer
        // in force, under the generation that came after: it ends here, before the plan's place is another's.
        if !over.is_empty()
            && let Err(error) = tables.forget_flows()
        {
            tracing::warn!(%error, "forgetting flows");
            self.resting.extend(over);
            return;
        }
        for (_, placed) in over {
            if is_several(&placed.wanted) {
                for ifindex in by_device(&placed.wanted).into_keys() {
                    if let Err(error) = tables.set_plan_device(PlanDevice { first_output: placed.first_output, ifindex }, 0) {
                        tracing::warn!(%error, "forgetting a plan");
                    }
                }
            }
            self.plans.give_back(placed.number, 1);
            self.outputs.give_back(placed.first_output, placed.wanted.outputs.len().max(1) as u32);
        }
    }

    /// Whether the program sends the packets of a rule slot.
    pub fn carries(&self, slot: u32) -> bool {
        self.current.contains_key(&slot)
    }

    /// Whether a rule slot's counters are this rule's.
    pub fn counts(&self, slot: u32, serial: u32) -> bool {
        self.counted.rules.get(&slot) == Some(&serial)
    }

    /// Whether an output slot's counters are this rule's.
    pub fn counts_output(&self, output: u32, slot: u32, serial: u32) -> bool {
        self.counted.outputs.get(&output) == Some(&(slot, serial))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::edit::{Edit, TTL_SET};
    use proptest::prelude::*;

    fn output(ifindex: u32, ttl_mode: u8, mtu: u32, blocked: u32) -> KernelOutput {
        KernelOutput { edit: Edit { ttl_mode, mtu, ..Edit::default() }, ifindex, blocked, ..KernelOutput::default() }
    }

    fn rule(outputs: Vec<KernelOutput>) -> Wanted {
        Wanted { serial: 7, family: 4, outputs }
    }

    #[test]
    fn plans_say_when_to_look_closer() {
        let one = plan(3, &rule(vec![output(9, TTL_SET, 1500, 0)]), 40);
        assert_eq!((one.flags, one.min_ttl, one.max_l3_len, one.only.ifindex, one.first_output), (0, 0, 1500, 9, 40));
        let two = plan(3, &rule(vec![output(9, TTL_KEEP, 1500, 0), output(9, TTL_DEC, 600, 0)]), 0);
        assert_eq!((two.flags, two.min_ttl, two.max_l3_len), (PLAN_SEVERAL, 2, 600));
        assert_eq!((one.ready, two.ready), (0b1, 0b11));
        let half = plan(3, &rule(vec![output(9, TTL_KEEP, 0, 1), output(8, TTL_KEEP, 0, 0)]), 0);
        assert_eq!((half.flags, half.only.ifindex, half.max_l3_len), (PLAN_BLOCKED, 8, MAX_LINEAR_L3_LEN));
        let none = plan(3, &rule(vec![output(9, TTL_KEEP, 0, 1)]), 0);
        assert_eq!((none.flags, none.ready, half.ready), (PLAN_BLOCKED | PLAN_NONE_READY, 0, 0b10));
    }

    #[test]
    fn masks_name_the_ready_outputs_of_a_device() {
        let wanted = rule(vec![output(9, 0, 0, 0), output(8, 0, 0, 0), output(9, 0, 0, 4), output(9, 0, 0, 0)]);
        assert_eq!(by_device(&wanted), BTreeMap::from([(8, 0b0010), (9, 0b1001)]));
    }

    proptest! {
        #[test]
        fn ranges_give_out_nothing_twice_and_take_everything_back(sizes in prop::collection::vec((1_u32..9, any::<bool>()), 1..60)) {
            let mut ranges = Ranges::new(128);
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (size, back) in sizes {
                if back && let Some((first, count)) = held.pop() {
                    ranges.give_back(first, count);
                } else if let Some(first) = ranges.take(size) {
                    prop_assert!(held.iter().all(|(other, count)| first + size <= *other || other + count <= first));
                    prop_assert!(first + size <= 128);
                    held.push((first, size));
                }
            }
            held.into_iter().for_each(|(first, count)| ranges.give_back(first, count));
            prop_assert_eq!(ranges.0, BTreeMap::from([(0, 128)]));
        }
    }
}
