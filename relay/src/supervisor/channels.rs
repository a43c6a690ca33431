//! `relay channels`: what stands in shared memory between the supervisor and its workers, and what moved through it.
//!
//! Rings count with free-running 32-bit indices; a [`Meter`] that looks at every turn of the loop makes 64-bit counts of
//! them and samples the depth. Reports and commands are channels and count themselves. Must never write a word of them.

use super::engine::Supervisor;
use super::fleet::Slot;
use crate::control::message::{ChannelInfo, Channels, SegmentInfo};
use crate::frame::RawDesc;
use crate::plan::counters::output_drop;
use crate::plan::fate::OutputDropReason;
use crate::plan::manifest::COMMANDS;
use crate::plan::records::RULES_LEN;
use crate::plan::work::WorkLayout;
use crate::ring::Layout;
use crate::ring::layout::{CONSUMER_AT, PRODUCER_AT};
use crate::sys::shared::OutOfMapping;
use crate::sys::{Mapping, SharedWord};
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

/// Counts of one SPSC ring, seen from outside.
#[derive(Debug)]
pub struct Meter {
    producer: SharedWord,
    consumer: SharedWord,
    capacity: u32,
    last: [u32; 2],
    /// Elements published since the meter was made.
    pub sent: u64,
    /// Elements released since then.
    pub received: u64,
    /// Elements in the ring at the last look.
    pub depth: u32,
    /// Most at any look.
    pub high_water: u32,
}

impl Meter {
    /// Watches the ring of `capacity` slots at `offset` from here on.
    pub fn new(mapping: &Arc<Mapping>, offset: usize, capacity: u32) -> Result<Self, OutOfMapping> {
        let (producer, consumer) = (SharedWord::new(mapping, offset + PRODUCER_AT)?, SharedWord::new(mapping, offset + CONSUMER_AT)?);
        let last = [producer.load(Acquire), consumer.load(Acquire)];
        Ok(Self { producer, consumer, capacity, last, sent: 0, received: 0, depth: 0, high_water: 0 })
    }

    /// One look. The consumer first: what it releases meanwhile must not make the ring look fuller than it can be.
    pub fn look(&mut self) {
        let (consumer, producer) = (self.consumer.load(Acquire), self.producer.load(Acquire));
        let [before_producer, before_consumer] = self.last;
        self.sent += u64::from(producer.wrapping_sub(before_producer));
        self.received += u64::from(consumer.wrapping_sub(before_consumer));
        self.depth = producer.wrapping_sub(consumer).min(self.capacity);
        self.high_water = self.high_water.max(self.depth);
        self.last = [producer, consumer];
    }

    fn info(&self, name: String, kind: &str, worker: u32, memory_bytes: usize, dropped: u64) -> ChannelInfo {
        ChannelInfo {
            name,
            kind: kind.into(),
            worker,
            memory_bytes: memory_bytes as u64,
            capacity: self.capacity.into(),
            depth: self.depth.into(),
            high_water: self.high_water.into(),
            sent: self.sent,
            received: self.received,
            dropped,
            overruns: 0,
        }
    }
}

impl Supervisor {
    /// `relay channels`.
    pub fn channels(&mut self) -> Channels {
        self.fleet.slots.iter_mut().for_each(Slot::watch);
        let slots = &self.fleet.slots;
        let rules = SegmentInfo { name: "relay-rules".into(), worker: None, memory_bytes: RULES_LEN as u64 };
        Channels {
            channels: slots.iter().flat_map(|slot| self.channels_of(slot)).collect(),
            segments: slots.iter().flat_map(Slot::segments).chain([rules]).collect(),
        }
    }

    fn channels_of(&self, slot: &Slot) -> Vec<ChannelInfo> {
        let layout = slot.layout();
        let mut rows = vec![control(slot), status(slot), self.rules(slot)];
        if let Some(meter) = slot.meters.first() {
            rows.push(meter.info("return".into(), "return", slot.id, Layout::<u64>::bytes(meter.capacity), 0));
        }
        let egress = slot.meters.iter().skip(1).zip(self.ports.list()).enumerate();
        for (number, (meter, port)) in egress.filter(|(_, (_, port))| port.egress) {
            let name = format!("egress {}", port.name);
            let bytes = Layout::<RawDesc>::bytes(layout.egress_capacity);
            rows.push(meter.info(name, "egress", slot.id, bytes, self.dropped(slot, number as u32)));
        }
        rows
    }

    /// Packets that found the egress ring of this port full.
    fn dropped(&self, slot: &Slot, port: u32) -> u64 {
        let page = &slot.status;
        let known = self.published.rules.iter().filter(|rule| page.rule_serials.get(rule.record.slot as usize) == rule.record.serial);
        let outputs = known.flat_map(|rule| &rule.outputs).filter(|output| output.port == port);
        outputs
            .map(|output| page.ingress.get(output_drop(output.slot as usize, OutputDropReason::EgressFull) as usize).packets)
            .fold(0, u64::saturating_add)
    }

    /// Epochs published, and the one the worker has taken.
    fn rules(&self, slot: &Slot) -> ChannelInfo {
        let (sent, received) = (u64::from(self.epoch), u64::from(slot.status.acked_epoch.load(Acquire)));
        let depth = sent.saturating_sub(received);
        ChannelInfo {
            name: "rules".into(),
            kind: "rules".into(),
            worker: slot.id,
            memory_bytes: RULES_LEN as u64,
            capacity: 2,
            depth,
            high_water: depth,
            sent,
            received,
            ..ChannelInfo::default()
        }
    }
}

fn control(slot: &Slot) -> ChannelInfo {
    let (sent, memory_bytes) = slot.control_stats();
    let received = u64::from(slot.status.commands.load(Acquire)).min(sent);
    ChannelInfo {
        name: "control".into(),
        kind: "control".into(),
        worker: slot.id,
        memory_bytes,
        capacity: COMMANDS.into(),
        depth: sent - received,
        high_water: sent - received,
        sent,
        received,
        ..ChannelInfo::default()
    }
}

fn status(slot: &Slot) -> ChannelInfo {
    let stats = slot.report_stats;
    ChannelInfo {
        name: "status".into(),
        kind: "status".into(),
        worker: slot.id,
        memory_bytes: stats.memory_bytes,
        capacity: crate::plan::status::REPORTS.into(),
        depth: stats.depth,
        high_water: stats.max_depth,
        sent: stats.sent,
        received: stats.received,
        dropped: stats.dropped,
        overruns: stats.overruns,
    }
}

impl Slot {
    /// Where everything lies in its work segment.
    pub fn layout(&self) -> WorkLayout {
        WorkLayout::new(self.frames, self.egress_capacity)
    }

    /// Meters for the return ring and for the egress rings of `ports` ports; those that are there go on.
    pub fn watch_rings(&mut self, ports: usize) -> Result<(), OutOfMapping> {
        let layout = self.layout();
        if self.meters.is_empty() {
            self.meters.push(Meter::new(&self.work_view, layout.return_ring, self.frames)?);
        }
        for port in self.meters.len() - 1..ports {
            self.meters.push(Meter::new(&self.work_view, layout.egress_ring(port), layout.egress_capacity)?);
        }
        Ok(())
    }

    /// Takes the reports that are there, and looks at the rings.
    pub fn watch(&mut self) {
        let stats = self.reports.stats();
        // A report is the whole truth, so the newest will do ([`Slot::frames`]); but it is taken, so that depth means something.
        for _ in 0..=stats.depth.min(u64::from(crate::plan::status::REPORTS)) {
            self.reports.receive();
        }
        self.report_stats = crate::shm::ChannelStats { max_depth: stats.max_depth, ..self.reports.stats() };
        self.meters.iter_mut().for_each(Meter::look);
    }

    fn segments(&self) -> [SegmentInfo; 5] {
        let segment = |name: &str, memory_bytes: u64| SegmentInfo { name: name.into(), worker: Some(self.id), memory_bytes };
        let umem = u64::from(self.frames) * u64::from(crate::frame::FRAME_SIZE);
        [
            segment("relay-control", self.control_stats().1),
            segment("relay-status", self.report_stats.memory_bytes),
            segment("relay-work", self.work_view.len() as u64),
            segment("relay-umem", umem),
            segment("relay-tap", self.tap.len() as u64),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::{Consumer, Producer, init_at};
    use crate::shm::Segment;

    #[test]
    fn req_003_8_a_meter_counts_over_the_wrap_of_the_indices() {
        let mapping = Segment::create("meter", Layout::<u64>::bytes(8)).unwrap().into_parts().1;
        init_at::<u64>(mapping.as_ref(), 0, 8, u32::MAX - 3).unwrap();
        let mut meter = Meter::new(&mapping, 0, 8).unwrap();
        let mut producer = Producer::<u64>::attach(mapping.clone(), 0).unwrap();
        let mut consumer = Consumer::<u64>::attach(mapping, 0).unwrap();
        (0..7).for_each(|value| producer.push(value).unwrap());
        meter.look();
        (0..5).for_each(|_| _ = consumer.pop());
        meter.look();
        assert_eq!((meter.sent, meter.received, meter.depth, meter.high_water), (7, 5, 2, 7));
    }
}
