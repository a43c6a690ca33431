//! What a program before ours has counted: its maps as they are, and what it went on from itself.
//!
//! A predecessor's maps may still be counting for an instant after its program was swapped, so they are read whenever somebody
//! asks, and never copied while they are held. Must never write to them.

use super::kernel::Drops;
use super::{Counters, ProgramError, on};
use aya::maps::{Map, MapData, MapError, PerCpuArray, PerCpuHashMap};
use relay_common::kernel::DropKey;
use relay_common::{CounterValue, XdpCounter};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

/// The maps that count: what passes and is redirected; and the kernel path's.
pub(super) const COUNTERS: &str = "COUNTERS";
pub(super) const RULE_RX: &str = "RULE_RX";
pub(super) const OUTPUT_TX: &str = "OUTPUT_TX";
pub(super) const REFUSED: &str = "REFUSED";
pub(super) const KERNEL_DROPS: &str = "KERNEL_DROPS";

/// Packets and bytes.
type Pair = [u64; 2];

/// Sums as text for a successor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sums {
    /// By interface slot, in the order of the counters.
    pub interfaces: Vec<Vec<Pair>>,
    /// Taken by the kernel path, by rule slot.
    pub rules: BTreeMap<u32, Pair>,
    /// Sent by it, by output slot.
    pub outputs: BTreeMap<u32, Pair>,
    /// Refused by devices, by place.
    pub refused: BTreeMap<u32, u64>,
    /// Dropped by it: slot, serial, kind, reason; packets and bytes.
    pub drops: Vec<([u32; 4], Pair)>,
}

impl Sums {
    pub(super) fn with(self, interfaces: Vec<Vec<Pair>>) -> Self {
        Self { interfaces, ..self }
    }
}

/// A predecessor's counts.
#[derive(Default)]
pub(super) struct Before {
    sums: Sums,
    counters: Option<PerCpuArray<MapData, CounterValue>>,
    rules: Option<PerCpuArray<MapData, CounterValue>>,
    outputs: Option<PerCpuArray<MapData, CounterValue>>,
    refused: Option<PerCpuArray<MapData, u64>>,
    drops: Option<PerCpuHashMap<MapData, DropKey, CounterValue>>,
}

fn array<T: aya::Pod>(maps: &mut BTreeMap<String, OwnedFd>, name: &'static str) -> Result<Option<PerCpuArray<MapData, T>>, ProgramError> {
    let open = |fd| PerCpuArray::try_from(Map::PerCpuArray(MapData::from_fd(fd)?));
    maps.remove(name).map(open).transpose().map_err(on(name, "going on from another's"))
}

impl Before {
    pub(super) fn new(maps: Vec<(String, OwnedFd)>, sums: Sums) -> Result<Self, ProgramError> {
        let mut maps: BTreeMap<String, OwnedFd> = maps.into_iter().collect();
        let open = |fd| -> Result<_, MapError> { PerCpuHashMap::try_from(Map::PerCpuHashMap(MapData::from_fd(fd)?)) };
        let drops = maps.remove(KERNEL_DROPS).map(open).transpose().map_err(on(KERNEL_DROPS, "going on from another's"))?;
        Ok(Self {
            sums,
            counters: array(&mut maps, COUNTERS)?,
            rules: array(&mut maps, RULE_RX)?,
            outputs: array(&mut maps, OUTPUT_TX)?,
            refused: array(&mut maps, REFUSED)?,
            drops,
        })
    }

    pub(super) fn interface(&self, slot: u32) -> Counters {
        let mut sums = Counters::default();
        let known = self.sums.interfaces.get(slot as usize).map(Vec::as_slice).unwrap_or_default();
        for (sum, [packets, bytes]) in sums.iter_mut().zip(known) {
            *sum = CounterValue { packets: *packets, bytes: *bytes };
        }
        if let Some(map) = &self.counters {
            // A map that can't be read counts nothing.
            let _ = add_slot(&mut sums, map, slot);
        }
        sums
    }

    pub(super) fn rule(&self, slot: u32) -> CounterValue {
        both(self.sums.rules.get(&slot), self.rules.as_ref(), slot)
    }

    pub(super) fn output(&self, slot: u32) -> CounterValue {
        both(self.sums.outputs.get(&slot), self.outputs.as_ref(), slot)
    }

    pub(super) fn refused(&self, device: u32) -> u64 {
        let map = self.refused.as_ref().and_then(|map| map.get(&device, 0).ok());
        self.sums.refused.get(&device).copied().unwrap_or(0) + map.map_or(0, |values| values.iter().sum())
    }

    pub(super) fn drops(&self) -> Drops {
        let known = self.sums.drops.iter().map(|([slot, serial, kind, reason], pair)| {
            (DropKey { slot: *slot, serial: *serial, kind: *kind as u16, reason: *reason as u16 }, value(pair))
        });
        let mut drops: Drops = known.collect();
        for (key, values) in self.drops.iter().flat_map(|map| map.iter().flatten()) {
            let sum = drops.entry(key).or_default();
            *sum = plus(*sum, super::kernel::sum(&values));
        }
        drops
    }

    /// A rule slot counts from 0.
    pub(super) fn forget_rule(&mut self, slot: u32) {
        // The map can't be written without being somebody's: what it says is taken off.
        let map = self.rules.as_ref().map_or_else(CounterValue::default, |map| super::kernel::total(map, slot));
        self.sums.rules.insert(slot, [map.packets.wrapping_neg(), map.bytes.wrapping_neg()]);
    }

    /// An output slot counts from 0.
    pub(super) fn forget_output(&mut self, slot: u32) {
        let map = self.outputs.as_ref().map_or_else(CounterValue::default, |map| super::kernel::total(map, slot));
        self.sums.outputs.insert(slot, [map.packets.wrapping_neg(), map.bytes.wrapping_neg()]);
    }
}

fn value(pair: &Pair) -> CounterValue {
    CounterValue { packets: pair[0], bytes: pair[1] }
}

pub(super) fn plus(a: CounterValue, b: CounterValue) -> CounterValue {
    CounterValue { packets: a.packets.wrapping_add(b.packets), bytes: a.bytes.wrapping_add(b.bytes) }
}

fn both(known: Option<&Pair>, map: Option<&PerCpuArray<MapData, CounterValue>>, slot: u32) -> CounterValue {
    plus(known.map(value).unwrap_or_default(), map.map_or_else(CounterValue::default, |map| super::kernel::total(map, slot)))
}

/// Adds one interface's counters, summed over the CPUs.
pub(super) fn add_slot(sums: &mut Counters, map: &PerCpuArray<MapData, CounterValue>, slot: u32) -> Result<(), ProgramError> {
    for (sum, counter) in sums.iter_mut().zip(XdpCounter::ALL) {
        let index = slot * XdpCounter::COUNT + *counter as u32;
        for value in map.get(&index, 0).map_err(on(COUNTERS, "reading a counter"))?.iter() {
            sum.packets += value.packets;
            sum.bytes += value.bytes;
        }
    }
    Ok(())
}
