//! The kernel path's tables from user space: plans, outputs, devmaps, counters (layouts in `relay_common::kernel`).
//!
//! Calls that wait for an RCU grace period (filling a place of the map of maps) run on a thread of their own. Must never write
//! a plan that is in force, nor an entry of a devmap that is in use for a broadcast.

use super::before::{Before, KERNEL_DROPS, OUTPUT_TX, REFUSED, RULE_RX, Sums, plus};
use super::outcome::{self, Watch};
use super::{ProgramError, map, on, xdp};
use aya::Ebpf;
use aya::maps::{Array, ArrayOfMaps, DevMap, HashMap, Map, MapData, PerCpuArray, PerCpuHashMap, PerCpuValues};
use aya::programs::ProgramFd;
use relay_common::CounterValue;
use relay_common::kernel::{DropKey, KernelOutput, KernelPlan, MAX_DEVICES, MAX_FLOW_BUCKETS, PlanDevice};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// `BPF_MAP_TYPE_DEVMAP` and the sizes of its key and value (linux/bpf.h: `struct bpf_devmap_val`).
const DEVMAP: u32 = 14;
const DEVMAP_KEY_LEN: u32 = 4;
const DEVMAP_VALUE_LEN: u32 = 8;
const EGRESS_PROGRAM: &str = "relay_egress";

/// A devmap for one plan: an entry for each ready output.
pub type Broadcast = DevMap<MapData>;
/// Drops of the kernel path by key.
pub type Drops = BTreeMap<DropKey, CounterValue>;

/// Buckets of flows that all CPUs have together, at most: 64 MiB.
const ALL_FLOW_BUCKETS: u32 = 1 << 19;
/// The map with the only word that the program and user space share without a look-up.
const WORDS: &str = ".bss";

/// The power of two of buckets that each of so many CPUs has for its flows, and how many that makes.
pub(super) fn flow_buckets(cpus: u32) -> (u32, u32) {
    let share = (ALL_FLOW_BUCKETS / cpus.max(1)).max(1);
    let buckets = (1 << share.ilog2()).min(MAX_FLOW_BUCKETS);
    (buckets, cpus.max(1) * buckets)
}

/// Devmaps on their way into the map of maps.
#[derive(Debug)]
pub struct Install(JoinHandle<Result<(), ProgramError>>);

impl Install {
    /// Whether the kernel is done with it.
    pub fn is_done(&self) -> bool {
        self.0.is_finished()
    }

    /// What became of it.
    pub fn finish(self) -> Result<(), ProgramError> {
        self.0.join().unwrap_or_else(|_| Err(ProgramError::Diagnostics("the thread that fills the broadcast table died".into())))
    }
}

/// Whose numbers stand in a slot's counters: serial by rule slot, (rule slot, serial) by output slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counted {
    /// Rules.
    pub rules: BTreeMap<u32, u32>,
    /// Outputs.
    pub outputs: BTreeMap<u32, (u32, u32)>,
}

/// The tables.
pub struct KernelTables {
    before: Before,
    watch: Watch,
    egress: ProgramFd,
    cpus: usize,
    /// The word `GENERATION`, and what stands in it.
    generation: (Array<MapData, u32>, u32),
    rule_plans: PerCpuArray<MapData, u64>,
    plans: Array<MapData, KernelPlan>,
    outputs: Array<MapData, KernelOutput>,
    broadcasts: Arc<Mutex<ArrayOfMaps<MapData, Broadcast>>>,
    devices: DevMap<MapData>,
    device_of: HashMap<MapData, u32, u32>,
    plan_devices: HashMap<MapData, PlanDevice, u64>,
    rule_rx: PerCpuArray<MapData, CounterValue>,
    output_tx: PerCpuArray<MapData, CounterValue>,
    refused: PerCpuArray<MapData, u64>,
    drops: PerCpuHashMap<MapData, DropKey, CounterValue>,
}

impl KernelTables {
    /// Has the kernel verify the other programs and takes the maps. The error is why there is no kernel path.
    pub(super) fn load(ebpf: &mut Ebpf) -> Result<Self, ProgramError> {
        let program = xdp(ebpf, EGRESS_PROGRAM)?;
        program.load().map_err(|error| ProgramError::load(EGRESS_PROGRAM, error))?;
        let egress = {
            let fd = program.fd().map_err(|error| ProgramError::Diagnostics(error.to_string()))?;
            fd.try_clone().map_err(|error| ProgramError::Diagnostics(error.to_string()))?
        };
        let cpus = aya::util::nr_cpus().map_err(|(what, error)| ProgramError::Diagnostics(format!("{what}: {error}")))?;
        let mut tables = Self {
            before: Before::default(),
            watch: outcome::load(ebpf)?,
            egress,
            cpus,
            generation: (map(ebpf, WORDS)?, 0),
            rule_plans: map(ebpf, "RULE_PLANS")?,
            plans: map(ebpf, "PLANS")?,
            outputs: map(ebpf, "OUTPUTS")?,
            broadcasts: Arc::new(Mutex::new(map(ebpf, "BROADCASTS")?)),
            devices: map(ebpf, "DEVICES")?,
            device_of: map(ebpf, "DEVICE_OF")?,
            plan_devices: map(ebpf, "PLAN_DEVICES")?,
            rule_rx: map(ebpf, RULE_RX)?,
            output_tx: map(ebpf, OUTPUT_TX)?,
            refused: map(ebpf, REFUSED)?,
            drops: map(ebpf, KERNEL_DROPS)?,
        };
        tables.forget_flows()?;
        Ok(tables)
    }

    /// From now on no packet is carried by what a table said before this call. To come after each change of a table that a
    /// packet is matched by, or a device found in; plans and outputs in force don't change.
    pub fn forget_flows(&mut self) -> Result<(), ProgramError> {
        let (map, number) = &mut self.generation;
        *number = number.checked_add(1).unwrap_or(1);
        map.set(0, *number, 0).map_err(on("GENERATION", "beginning another"))
    }

    /// Attaches or detaches the programs that count what is sent.
    pub(super) fn watch(&mut self, ebpf: &mut Ebpf, on: bool) -> Result<(), ProgramError> {
        self.watch.set(ebpf, on)
    }

    /// The attachments of those programs.
    pub(super) fn watching(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.watch.descriptors()
    }

    /// Adds what another program has counted, and what that one went on from.
    pub(super) fn go_on_counting(&mut self, maps: Vec<(String, OwnedFd)>, sums: Sums) -> Result<(), ProgramError> {
        self.before = Before::new(maps, sums)?;
        Ok(())
    }

    /// What programs before this one have counted.
    pub(super) fn past(&self, counted: &Counted) -> Sums {
        let pair = |value: CounterValue| [value.packets, value.bytes];
        let drops = self.before.drops().into_iter();
        Sums {
            interfaces: Vec::new(),
            rules: counted.rules.keys().map(|slot| (*slot, pair(self.before.rule(*slot)))).collect(),
            outputs: counted.outputs.keys().map(|slot| (*slot, pair(self.before.output(*slot)))).collect(),
            refused: (0..MAX_DEVICES).map(|device| (device, self.before.refused(device))).filter(|(_, count)| *count > 0).collect(),
            drops: drops.map(|(key, value)| ([key.slot, key.serial, key.kind.into(), key.reason.into()], pair(value))).collect(),
        }
    }

    fn everywhere<T: aya::Pod>(&self, value: T) -> Result<PerCpuValues<T>, ProgramError> {
        PerCpuValues::try_from(vec![value; self.cpus]).map_err(|error| ProgramError::Diagnostics(error.to_string()))
    }

    /// Puts a plan in force for a rule slot, or takes the rule off the kernel path.
    pub fn set_rule(&mut self, slot: u32, plan: Option<u32>) -> Result<(), ProgramError> {
        let words = self.everywhere(plan.map_or(0, |plan| u64::from(plan) + 1))?;
        self.rule_plans.set(slot, words, 0).map_err(on("RULE_PLANS", "setting a rule's plan"))?;
        self.forget_flows()
    }

    /// Writes a plan that no rule has.
    pub fn write_plan(&mut self, number: u32, plan: &KernelPlan, outputs: &[KernelOutput]) -> Result<(), ProgramError> {
        for (index, output) in (plan.first_output..).zip(outputs) {
            self.outputs.set(index, output, 0).map_err(on("OUTPUTS", "writing an output"))?;
        }
        self.plans.set(number, plan, 0).map_err(on("PLANS", "writing a plan"))
    }

    /// Says which outputs of a plan go out of a device; 0: forgets it.
    pub fn set_plan_device(&mut self, key: PlanDevice, outputs: u64) -> Result<(), ProgramError> {
        if outputs == 0 {
            return self.plan_devices.remove(&key).map_err(on("PLAN_DEVICES", "removing a device"));
        }
        self.plan_devices.insert(key, outputs, 0).map_err(on("PLAN_DEVICES", "adding a device"))
    }

    /// Where plans with one ready output send; `egress`: through the egress program, as any broadcast to that device does.
    /// `before`: the interface that had this place.
    pub fn set_device(&mut self, device: u32, ifindex: u32, egress: bool, before: Option<u32>) -> Result<(), ProgramError> {
        self.device_of.insert(ifindex, device, 0).map_err(on("DEVICE_OF", "adding a device"))?;
        if let Some(before) = before.filter(|before| *before != ifindex) {
            // It is gone; what the kernel still has for it is counted by nobody's queue.
            let _ = self.device_of.remove(&before);
        }
        self.forget_flows()?;
        let program = egress.then_some(&self.egress);
        self.devices.set(device, ifindex, program, 0).map_err(|error| ProgramError::Diagnostics(format!("map DEVICES: {error}")))
    }

    /// A devmap with these devices.
    pub fn broadcast(&self, devices: &[u32]) -> Result<Broadcast, ProgramError> {
        let shape = aya_obj::Map::new_from_params(DEVMAP, DEVMAP_KEY_LEN, DEVMAP_VALUE_LEN, devices.len().max(1) as u32, 0);
        let data = MapData::create(shape, "broadcast", None).map_err(on("BROADCASTS", "creating a devmap"))?;
        let mut devmap = DevMap::try_from(Map::DevMap(data)).map_err(on("BROADCASTS", "creating a devmap"))?;
        for (index, ifindex) in (0..).zip(devices) {
            let set = devmap.set(index, *ifindex, Some(&self.egress), 0);
            set.map_err(|error| ProgramError::Diagnostics(format!("a broadcast's devmap: {error}")))?;
        }
        Ok(devmap)
    }

    /// Puts devmaps into the places of their plans. The kernel waits for a grace period at each.
    pub fn install(&self, broadcasts: Vec<(u32, Broadcast)>) -> Result<Install, ProgramError> {
        let table = Arc::clone(&self.broadcasts);
        let work = move || {
            let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
            broadcasts
                .iter()
                .try_for_each(|(plan, devmap)| table.set(*plan, devmap, 0).map_err(on("BROADCASTS", "setting a plan's devmap")))
        };
        let thread = std::thread::Builder::new().name("broadcasts".into()).spawn(work);
        thread.map(Install).map_err(|error| ProgramError::Diagnostics(format!("starting a thread: {error}")))
    }

    /// Packets a rule took on this path.
    pub fn rule_rx(&self, slot: u32) -> CounterValue {
        plus(total(&self.rule_rx, slot), self.before.rule(slot))
    }

    /// Packets sent for an output.
    pub fn output_tx(&self, slot: u32) -> CounterValue {
        plus(total(&self.output_tx, slot), self.before.output(slot))
    }

    /// Packets that a device would not take.
    pub fn refused(&self, device: u32) -> u64 {
        self.refused.get(&device, 0).map(|values| values.iter().sum()).unwrap_or(0) + self.before.refused(device)
    }

    /// A rule slot counts from 0.
    pub fn reset_rule(&mut self, slot: u32) -> Result<(), ProgramError> {
        let zeros = self.everywhere(CounterValue::default())?;
        self.before.forget_rule(slot);
        self.rule_rx.set(slot, zeros, 0).map_err(on("RULE_RX", "resetting a counter"))
    }

    /// An output slot counts from 0.
    pub fn reset_output(&mut self, slot: u32) -> Result<(), ProgramError> {
        let zeros = self.everywhere(CounterValue::default())?;
        self.before.forget_output(slot);
        self.output_tx.set(slot, zeros, 0).map_err(on("OUTPUT_TX", "resetting a counter"))
    }

    /// All drops.
    pub fn drops(&self) -> Drops {
        let mut drops = self.before.drops();
        for (key, values) in self.drops.iter().flatten() {
            let so_far = drops.entry(key).or_default();
            *so_far = plus(*so_far, sum(&values));
        }
        drops
    }

    /// Forgets drops of rules that are no more.
    pub fn forget_drops(&mut self, gone: impl Fn(&DropKey) -> bool) {
        let keys: Vec<DropKey> = self.drops.keys().flatten().filter(gone).collect();
        for key in keys {
            // It may have gone already; either way it is forgotten.
            let _ = self.drops.remove(&key);
        }
    }
}

pub(super) fn sum(values: &PerCpuValues<CounterValue>) -> CounterValue {
    values
        .iter()
        .fold(CounterValue::default(), |sum, one| CounterValue { packets: sum.packets + one.packets, bytes: sum.bytes + one.bytes })
}

pub(super) fn total(map: &PerCpuArray<MapData, CounterValue>, index: u32) -> CounterValue {
    map.get(&index, 0).map(|values| sum(&values)).unwrap_or_default()
}
