//! From the rules segment to the data path's table.
//!
//! Runs between two batches, when the epoch has changed; may allocate. Must never write the segment.

use crate::datapath::table::{OutputPlan, RulePlan, Table};
use crate::plan::records::{OUTPUT_COALESCE, RecordsError, RulesSegment, Snapshot, SnapshotRule, prefix_from};
use crate::rule::compile::{CompileInput, Compiled, compile};
use crate::rule::{Match, TagMatch};

/// Reads the snapshot of an epoch and makes the table of it.
pub fn load(segment: &RulesSegment, epoch: u32) -> Result<Table, RecordsError> {
    segment.read(epoch).map(|snapshot| table(&snapshot))
}

fn table(snapshot: &Snapshot) -> Table {
    let matches: Vec<Match> = snapshot.rules.iter().map(matching).collect();
    let inputs: Vec<CompileInput<'_>> = snapshot
        .rules
        .iter()
        .zip(&matches)
        .map(|(rule, matching)| CompileInput { ifindex: rule.record.ifindex, slot: rule.record.slot, serial: rule.record.serial, matching })
        .collect();
    let plans = snapshot.rules.iter().map(plan).collect();
    let own = snapshot.own.iter().map(|own| (own.number, own.addr)).collect();
    // The supervisor has compiled the same set before it published it; a set that does not compile matches nothing here.
    let compiled = compile(&inputs, &Compiled::default()).unwrap_or_else(|_| Compiled::default());
    Table::new(snapshot.epoch, plans, compiled, own)
}

fn plan(rule: &SnapshotRule) -> RulePlan {
    let record = &rule.record;
    RulePlan {
        slot: record.slot,
        serial: record.serial,
        ifindex: record.ifindex,
        family: record.family as u8,
        group_len: record.group_len as u8,
        group: record.group,
        port: u16::try_from(record.port).ok(),
        tag: (record.tag_mode != 1).then_some(record.tag),
        outputs: rule
            .outputs
            .iter()
            .map(|output| OutputPlan {
                slot: output.slot,
                port: output.port,
                blocked: output.blocked(),
                coalesce: output.flags & OUTPUT_COALESCE != 0,
                edit: output.edit,
                gap: output.gap,
            })
            .collect(),
        shared: Vec::new(),
    }
}

fn matching(rule: &SnapshotRule) -> Match {
    let r = &rule.record;
    let (outer, inner) = (r.tag as u16, (r.tag >> 16) as u16);
    Match {
        tag: match r.tag_mode {
            0 => TagMatch::None,
            1 => TagMatch::Any,
            2 => TagMatch::Vlan(outer),
            _ => TagMatch::QinQ(outer, inner),
        },
        group: prefix_from(r.family, r.group, r.group_len),
        port: u16::try_from(r.port).ok(),
        source: (r.source_len <= 128).then(|| prefix_from(r.family, r.source, r.source_len)),
        except: rule.except.iter().map(|prefix| prefix_from(r.family, prefix.addr, prefix.number)).collect(),
    }
}
