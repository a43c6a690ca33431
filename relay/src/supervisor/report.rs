//! What the supervisor tells: status, counters, rules. Sums what workers have counted; names every drop.
//!
//! Must never change anything.

use super::book::Slots;
use super::capabilities;
use super::engine::Supervisor;
use super::error::RunError;
use super::loops::Sight;
use super::ports::{Port, Way};
use super::update::join_of;
use crate::control::message::{
    Changes, FrameStats, InterfaceInfo, InterfaceStats, OutputStats, RuleInfo, RuleStats, Stats, Status, SupervisorInfo, WorkerInfo,
    WorkerLatency,
};
use crate::nic::afpacket::Reason;
use crate::nic::afxdp::program::KernelTables;
use crate::nic::afxdp::program::kernel::Drops;
use crate::plan::counters::{Counter, output_drop, output_tx, port_drop, port_rx, rule_drop, rule_rx};
use crate::plan::fate::{DropReason, OutputDropReason};
use crate::plan::latency;
use crate::plan::planner::Path;
use crate::plan::records::SnapshotRule;
use crate::plan::status::{PORT_DOWN, PORT_GONE, PORT_SINGLES, RUNG_PLAIN, SendReport};
use crate::rule::set::{RuleSet, SetDiff};
use crate::rule::{EngineChoice, Output, Rule, Ttl};
use crate::sys::xdp;
use relay_common::kernel::{DROP_OF_OUTPUT, DROP_OF_RULE};
use relay_common::{CounterValue, XdpCounter};
use std::collections::BTreeMap;
use std::time::Instant;

/// What `apply` changes: whole rules, so that the lines can be read, compared and applied again.
pub fn changes(old: &RuleSet, change: &SetDiff) -> Changes {
    let gone = change.removed.iter().map(String::as_str).chain(change.changed.iter().map(|rule| rule.id.as_str()));
    let removed: Vec<String> = gone.filter_map(|id| old.get(id)).map(ToString::to_string).collect();
    let added = change.added.iter().chain(&change.changed).map(ToString::to_string).collect();
    let unchanged = (old.rules().len() - removed.len().min(old.rules().len())) as u64;
    Changes { added, removed, unchanged }
}

/// Destination of an output as rewritten, or `keep`.
pub fn destination(output: &Output) -> String {
    match (output.to, output.port) {
        (None, None) => "keep".into(),
        (None, Some(port)) => format!(":{port}"),
        (Some(to), None) => to.to_string(),
        (Some(to), Some(port)) => std::net::SocketAddr::new(to, port).to_string(),
    }
}

fn sum<'a>(counters: impl Iterator<Item = Counter> + 'a) -> Counter {
    counters.fold(Counter::default(), Counter::plus)
}

const fn of_kernel(value: CounterValue) -> Counter {
    Counter { packets: value.packets, bytes: value.bytes }
}

/// What a worker has counted is what stands in memory that it may write: no sum of it may overflow.
fn more(total: &mut u64, by: u64) {
    *total = total.saturating_add(by);
}

fn total(numbers: impl Iterator<Item = u64>) -> u64 {
    numbers.fold(0, u64::saturating_add)
}

fn add(map: &mut BTreeMap<String, u64>, name: &str, packets: u64) {
    if packets > 0 {
        more(map.entry(name.to_string()).or_default(), packets);
    }
}

impl Supervisor {
    /// `relay status`.
    pub fn status(&self) -> Status {
        let capabilities = capabilities::effective().map(|set| set.names()).unwrap_or_default();
        let keeper = self.keeper.as_ref().map_or(0, super::keeping::Keeper::pid);
        let stored = self.storing.as_ref().map_or(0, super::storing::Storing::count);
        let uptime_ms = self.started.elapsed().as_millis() as u64;
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            supervisor: SupervisorInfo { pid: std::process::id(), uptime_ms, capabilities, keeper, stored },
            interfaces: self.ports.list().iter().enumerate().map(|(number, port)| self.interface_info(number, port)).collect(),
            workers: self.workers(),
            rules: self.book.set.rules().len() as u64,
            epoch: u64::from(self.epoch),
        }
    }

    /// An interface with the rung its workers really run on, and what they say of its health.
    fn interface_info(&self, number: usize, port: &Port) -> InterfaceInfo {
        let pages = || self.fleet.slots.iter().map(|slot| &slot.status);
        let plain = pages().map(|page| page.rungs.get(number)).find(|rung| rung.rung == RUNG_PLAIN);
        let plain = plain.filter(|_| port.way == Way::Packet).map(|rung| Reason::from_raw(rung.errno));
        let sends: Vec<SendReport> = pages().map(|page| page.sends.get(number)).collect();
        let flags = sends.iter().fold(0, |flags, report| flags | report.flags);
        InterfaceInfo {
            name: port.name.clone(),
            backend: if plain.is_some() { "af_packet_plain" } else { port.backend }.into(),
            reason: plain.map_or_else(|| port.reason.clone(), |plain| format!("{}; {plain}", port.reason)),
            driver: port.facts.driver.clone().unwrap_or_default(),
            queues: port.sockets.len() as u32,
            ingress: port.ingress,
            egress: port.egress,
            sending: if flags & PORT_GONE != 0 {
                "gone"
            } else if flags & PORT_DOWN != 0 {
                "down"
            } else {
                "up"
            }
            .into(),
            refused: total(sends.iter().map(|report| report.refused)).saturating_add(self.refused_redirects(number)),
            kick_errors: total(sends.iter().map(|report| report.kick_errors)),
            link: match () {
                () if !port.is_live() => "missing",
                () if !port.facts.up => "down",
                () if !port.facts.carrier => "no_carrier",
                () => "up",
            }
            .into(),
            mtu: port.facts.mtu,
        }
    }

    /// Whether the device of an output has refused the rule's super-frames.
    fn is_refusing(&self, rule: &Rule, egress: &str) -> bool {
        let number = self.ports.egress(rule, egress).map(|(number, _)| number);
        let flags = |number| self.fleet.slots.iter().fold(0, |flags, slot| flags | slot.status.sends.get(number).flags);
        number.is_some_and(|number| flags(number) & PORT_SINGLES != 0)
    }

    /// Whether the workers drive the packet port with plain system calls.
    fn is_plain(&self, number: usize) -> bool {
        self.fleet.slots.iter().any(|slot| slot.status.rungs.get(number).rung == RUNG_PLAIN)
    }

    fn workers(&self) -> Vec<WorkerInfo> {
        let wait = format!("{:?}", self.options.wait).to_lowercase();
        let pipeline = if self.fleet.is_split() { "split" } else { "fused" };
        let info = |slot: &super::fleet::Slot| WorkerInfo {
            id: slot.id,
            pid: slot.pid(),
            state: slot.state().into(),
            cpu: slot.status.cpu(),
            restarts: slot.restarts,
            last_exit: slot.last_exit.clone(),
            heartbeat_age_ms: slot.heartbeat_age().as_millis() as u64,
            pipeline: pipeline.into(),
            wait: wait.clone(),
            uid: self.fleet.uid(),
            spare: self.fleet.has_spares().then(|| slot.spare_info()),
        };
        self.fleet.slots.iter().map(info).collect()
    }

    /// `relay rule list`.
    pub fn rule_list(&self) -> Vec<RuleInfo> {
        let published: BTreeMap<u32, &SnapshotRule> = self.published.rules.iter().map(|rule| (rule.record.slot, rule)).collect();
        self.book.set.rules().iter().map(|rule| self.rule_info(rule, &published)).collect()
    }

    fn rule_info(&self, rule: &Rule, published: &BTreeMap<u32, &SnapshotRule>) -> RuleInfo {
        let found = self.ports.ingress(rule).filter(|(_, port)| port.is_live());
        let decision = self.decisions.get(&rule.id);
        let (path, engine) = match (decision, found) {
            (Some(decision), Some((number, _))) if decision.path == Path::Packet && self.is_plain(number) => ("packet", "plain"),
            (Some(decision), Some(_)) => (decision.path.name(), decision.engine),
            _ => ("pending", ""),
        };
        let coalescing = rule.engine == EngineChoice::Coalesce && matches!(path, "xsk" | "packet");
        let refusing: Vec<&str> =
            rule.outputs.iter().map(|output| output.egress.as_str()).filter(|name| self.is_refusing(rule, name)).collect();
        let (engine, note) = match refusing.as_slice() {
            _ if !coalescing => (engine, String::new()),
            [] => ("coalesce", String::new()),
            names => (engine, format!("; no coalescing: {} takes no UDP super-frames", names.join(", "))),
        };
        let ifindex = found.map(|(_, port)| port.facts.ifindex);
        let joined = ifindex.and_then(|ifindex| join_of(rule, ifindex)).is_some_and(|join| self.joins.joined(&join));
        RuleInfo {
            id: rule.id.clone(),
            rule: rule.to_string(),
            path: path.into(),
            engine: engine.into(),
            reason: match (decision, found) {
                (Some(decision), Some(_)) => format!("{}{note}", decision.reason),
                _ => self.ports.why_not(&rule.ingress, &self.known).unwrap_or_else(|| "the rule is being put in force".into()),
            },
            joined,
            query_age_ms: ifindex
                .and_then(|ifindex| self.queries.last(ifindex, rule.matching.group.addr.is_ipv4()))
                .map(|heard| heard.elapsed().as_millis() as u64),
            pending: self.pending(rule, published),
            loop_suspected: self.loops.suspects(&rule.id, Instant::now()),
        }
    }

    /// What outputs of the rule wait for, in words.
    fn pending(&self, rule: &Rule, published: &BTreeMap<u32, &SnapshotRule>) -> Vec<String> {
        let published = self.book.slots(&rule.id).and_then(|slots| published.get(&slots.slot));
        let outputs = rule.outputs.iter().enumerate();
        let waits = outputs.filter_map(|(index, output)| {
            let reason = published?.outputs.get(index)?.blocked()?;
            let why = self.ports.why_not(&output.egress, &self.known);
            let why = why.unwrap_or_else(|| match reason {
                OutputDropReason::NoNeighbor => "the next hop has no link-layer address yet (no route, or no answer)".into(),
                _ => format!("interface {} is down, or has no address of this family yet", output.egress),
            });
            Some(format!("output {index}: {why}"))
        });
        waits.collect()
    }

    /// Rules some of whose packets expire while others go out.
    pub fn look_for_loops(&mut self, now: Instant) {
        let drops = self.kernel_drops();
        let sights: Vec<(String, Sight)> =
            self.book.set.rules().iter().filter_map(|rule| Some((rule.id.clone(), self.sight(rule, &drops)?))).collect();
        for (id, sight) in &sights {
            if self.loops.look(id, *sight, now) {
                tracing::warn!(rule = %id, expired = sight.expired, "packets expire by TTL while others go out: does another relay send them back?");
            }
        }
        let book = &self.book;
        self.loops.retain(|id| book.set.get(id).is_some());
    }

    fn sight(&self, rule: &Rule, drops: &Drops) -> Option<Sight> {
        let stats = self.rule_stats(rule, drops)?;
        let outputs = rule.outputs.iter().zip(&stats.outputs).filter(|(output, _)| output.ttl == Ttl::Dec);
        Some(outputs.fold(Sight::default(), |sum, (_, output)| Sight {
            sent: sum.sent.saturating_add(output.tx_packets),
            expired: sum.expired.saturating_add(output.drops.get(OutputDropReason::TtlExpired.name()).copied().unwrap_or(0)),
        }))
    }

    /// Sum of one counter over all workers whose slot holds this rule.
    fn rule_counter(&self, slots: &Slots, index: u32) -> Counter {
        let pages =
            self.fleet.slots.iter().map(|slot| &slot.status).filter(|page| page.rule_serials.get(slots.slot as usize) == slots.serial);
        sum(pages.map(|page| page.ingress.get(index as usize)))
    }

    /// The same of what egress threads have counted.
    fn refused_counter(&self, slots: &Slots, index: u32) -> Counter {
        let pages =
            self.fleet.slots.iter().map(|slot| &slot.status).filter(|page| page.rule_serials.get(slots.slot as usize) == slots.serial);
        sum(pages.map(|page| page.egress.get(index as usize)))
    }

    fn port_counter(&self, index: u32) -> u64 {
        sum(self.fleet.slots.iter().map(|slot| slot.status.ingress.get(index as usize))).packets
    }

    fn port_bytes(&self, index: u32) -> u64 {
        sum(self.fleet.slots.iter().map(|slot| slot.status.ingress.get(index as usize))).bytes
    }

    /// `relay stats`.
    pub fn stats(&self) -> Stats {
        let drops = self.kernel_drops();
        let rules: Vec<RuleStats> = self.book.set.rules().iter().filter_map(|rule| self.rule_stats(rule, &drops)).collect();
        let mut interfaces: BTreeMap<String, InterfaceStats> = BTreeMap::new();
        for (number, port) in self.ports.list().iter().enumerate() {
            let entry = interfaces
                .entry(port.name.clone())
                .or_insert_with(|| InterfaceStats { name: port.name.clone(), ..InterfaceStats::default() });
            self.add_port(entry, number, port);
        }
        for output in rules.iter().flat_map(|rule| &rule.outputs) {
            if let Some(entry) = interfaces.get_mut(&output.egress) {
                more(&mut entry.tx_packets, output.tx_packets);
                more(&mut entry.tx_bytes, output.tx_bytes);
            }
        }
        for (name, [rx_packets, _, tx_packets, tx_bytes]) in &self.retired {
            if let Some(entry) = interfaces.get_mut(name) {
                more(&mut entry.retired, *rx_packets);
                more(&mut entry.tx_packets, *tx_packets);
                more(&mut entry.tx_bytes, *tx_bytes);
            }
        }
        Stats { interfaces: interfaces.into_values().collect(), rules, frames: self.frames(), latency: self.latency() }
    }

    fn add_port(&self, entry: &mut InterfaceStats, number: usize, port: &Port) {
        let mut taken = self.port_counter(port_rx(number));
        let mut bytes = self.port_bytes(port_rx(number));
        for reason in DropReason::ALL {
            let packets = self.port_counter(port_drop(number, *reason));
            match reason {
                // Nobody's packet: XDP would have passed it, and the kernel's stack has got it as well.
                DropReason::NoRule => {
                    taken = taken.saturating_sub(packets);
                    bytes = bytes.saturating_sub(self.port_bytes(port_drop(number, *reason)));
                }
                // Never reached a worker, so the worker's own count lacks it.
                DropReason::FillEmpty | DropReason::RxRingFull | DropReason::TooBig => {
                    more(&mut taken, packets);
                    add(&mut entry.drops, reason.name(), packets);
                }
                _ => add(&mut entry.drops, reason.name(), packets),
            }
        }
        if port.way == Way::Xsk && port.ingress {
            for (reason, packets) in [DropReason::FillEmpty, DropReason::RxRingFull].into_iter().zip(port.past_drops) {
                add(&mut entry.drops, reason.name(), packets);
                more(&mut taken, packets);
            }
            for statistics in port.sockets.iter().filter(|_| !port.retired).filter_map(|sockets| xdp::statistics(&sockets.receive).ok()) {
                add(&mut entry.drops, DropReason::FillEmpty.name(), statistics.rx_dropped);
                add(&mut entry.drops, DropReason::RxRingFull.name(), statistics.rx_ring_full);
                more(&mut taken, statistics.rx_dropped + statistics.rx_ring_full);
            }
            let carried = self.add_passed(entry, number);
            more(&mut taken, carried.packets);
            more(&mut bytes, carried.bytes);
        }
        more(&mut entry.rx_packets, taken);
        more(&mut entry.rx_bytes, bytes);
    }

    /// Adds what XDP left to the kernel's stack; what the kernel path took.
    fn add_passed(&self, entry: &mut InterfaceStats, number: usize) -> Counter {
        let mut carried = Counter::default();
        let Some(counters) = self.program.as_ref().and_then(|program| program.counters(number as u32).ok()) else { return carried };
        for (counter, value) in XdpCounter::ALL.iter().zip(counters) {
            match counter {
                XdpCounter::Redirected => {}
                XdpCounter::Kernel => carried = of_kernel(value),
                _ => {
                    entry.passed += value.packets;
                    add(&mut entry.passed_by, counter.name(), value.packets);
                }
            }
        }
        carried
    }

    fn kernel_tables(&self) -> Option<&KernelTables> {
        self.program.as_ref()?.kernel().ok()
    }

    /// Packets of the kernel path that the interface would not take.
    fn refused_redirects(&self, number: usize) -> u64 {
        self.kernel_tables().map_or(0, |tables| tables.refused(number as u32))
    }

    fn kernel_drops(&self) -> Drops {
        self.kernel_tables().map(KernelTables::drops).unwrap_or_default()
    }

    fn rule_stats(&self, rule: &Rule, kernel_drops: &Drops) -> Option<RuleStats> {
        let slots = self.book.slots(&rule.id)?;
        let mut rx = self.rule_counter(slots, rule_rx(slots.slot as usize));
        let mut drops = BTreeMap::new();
        if let Some(tables) = self.kernel_tables().filter(|_| self.kernel_path.counts(slots.slot, slots.serial)) {
            rx = sum([rx, of_kernel(tables.rule_rx(slots.slot))].into_iter());
        }
        let dropped =
            kernel_drops.iter().filter(|(key, _)| key.kind == DROP_OF_RULE && (key.slot, key.serial) == (slots.slot, slots.serial));
        for (key, value) in dropped {
            let reason = DropReason::ALL.get(usize::from(key.reason)).map_or("unknown", |reason| reason.name());
            add(&mut drops, reason, value.packets);
        }
        for reason in DropReason::ALL {
            add(&mut drops, reason.name(), self.rule_counter(slots, rule_drop(slots.slot as usize, *reason)).packets);
        }
        let outputs = rule.outputs.iter().zip(&slots.outputs).enumerate();
        let outputs = outputs.map(|(index, (output, slot))| self.output_stats(slots, index, output, *slot, kernel_drops)).collect();
        Some(RuleStats { id: rule.id.clone(), rx_packets: rx.packets, rx_bytes: rx.bytes, drops, outputs })
    }

    fn output_stats(&self, slots: &Slots, index: usize, output: &Output, slot: u32, kernel_drops: &Drops) -> OutputStats {
        let mut drops = BTreeMap::new();
        let dropped = kernel_drops.iter().filter(|(key, _)| key.kind == DROP_OF_OUTPUT && (key.slot, key.serial) == (slot, slots.serial));
        for (key, value) in dropped {
            let reason = OutputDropReason::ALL.get(usize::from(key.reason)).map_or("unknown", |reason| reason.name());
            add(&mut drops, reason, value.packets);
        }
        let mut refused = Counter::default();
        for reason in OutputDropReason::ALL {
            let index = output_drop(slot as usize, *reason);
            let late = self.refused_counter(slots, index);
            refused = refused.plus(late);
            add(&mut drops, reason.name(), self.rule_counter(slots, index).plus(late).packets);
        }
        let mut tx = self.rule_counter(slots, output_tx(slot as usize)).less(refused);
        if let Some(tables) = self.kernel_tables().filter(|_| self.kernel_path.counts_output(slot, slots.slot, slots.serial)) {
            tx = tx.plus(of_kernel(tables.output_tx(slot)));
        }
        OutputStats {
            index: index as u32,
            egress: output.egress.clone(),
            to: destination(output),
            tx_packets: tx.packets,
            tx_bytes: tx.bytes,
            drops,
        }
    }

    fn frames(&self) -> FrameStats {
        let all = self.fleet.slots.iter().filter_map(|slot| slot.frames());
        all.fold(FrameStats::default(), |a, b| FrameStats {
            total: a.total.saturating_add(b.total),
            free: a.free.saturating_add(b.free),
            fill: a.fill.saturating_add(b.fill),
            rx: a.rx.saturating_add(b.rx),
            egress: a.egress.saturating_add(b.egress),
            returning: a.returning.saturating_add(b.returning),
            tx: a.tx.saturating_add(b.tx),
            completion: a.completion.saturating_add(b.completion),
            hand: a.hand.saturating_add(b.hand),
            kernel: a.kernel.saturating_add(b.kernel),
            lost_invalid: a.lost_invalid.saturating_add(b.lost_invalid),
        })
    }

    fn latency(&self) -> Vec<WorkerLatency> {
        let of = |slot: &super::fleet::Slot| {
            let mut words = [0; latency::WORDS];
            slot.status.latency.get_all(0, &mut words);
            let buckets = latency::buckets(&words);
            let [p50_ns, p99_ns, p999_ns] = [0.5, 0.99, 0.999].map(|share| latency::quantile(&buckets, share).unwrap_or(0));
            let packets = latency::total(&buckets);
            WorkerLatency { worker: slot.id, packets, sum_ns: words[latency::SUM], p50_ns, p99_ns, p999_ns, buckets }
        };
        self.fleet.slots.iter().map(of).collect()
    }

    /// Keeps the totals of rules that the next book does not have.
    pub fn retire(&mut self, next: &super::book::Book) {
        let gone: Vec<Rule> = self
            .book
            .set
            .rules()
            .iter()
            .filter(|rule| {
                self.book.slots(&rule.id).map(|slots| (slots.slot, slots.serial))
                    != next.slots(&rule.id).map(|slots| (slots.slot, slots.serial))
            })
            .cloned()
            .collect();
        let drops = self.kernel_drops();
        for rule in gone {
            let Some(stats) = self.rule_stats(&rule, &drops) else { continue };
            let entry = self.retired.entry(rule.ingress.clone()).or_default();
            more(&mut entry[0], stats.rx_packets);
            more(&mut entry[1], stats.rx_bytes);
            for output in stats.outputs {
                let entry = self.retired.entry(output.egress).or_default();
                more(&mut entry[2], output.tx_packets);
                more(&mut entry[3], output.tx_bytes);
            }
        }
    }

    /// `relay rule save`: atomically, to the file named or to `--config`.
    pub fn save(&self, file: Option<String>) -> Result<String, RunError> {
        let path = file.map(std::path::PathBuf::from).or_else(|| self.options.config.clone());
        let path = path.ok_or_else(|| RunError::bad("FILE", "no file named, and the relay runs without --config", "name a file"))?;
        let text = crate::config::write(self.book.set.rules());
        let failed = |error: std::io::Error| {
            RunError::bad("FILE", format!("{}: {error}", path.display()), "name a file in a directory the relay may write")
        };
        let temporary = path.with_extension("toml.new");
        std::fs::write(&temporary, text).map_err(failed)?;
        std::fs::rename(&temporary, &path).map_err(failed)?;
        Ok(path.display().to_string())
    }
}
