//! Parse, match and rewrite of user space: the functions that a worker calls, on packets in memory.
//!
//! Must never measure a packet that its rule does not take: each row checks its first.

use super::Row;
use super::program::{PORT, Rewrite, SHAPE, STEP, edit, frame, group, wide};
use anyhow::{Context, Result};
use relay::datapath::rewrite::{inspect, rewrite};
use relay::datapath::table::{RulePlan, Table};
use relay::lab::ringbench::measure::Place;
use relay::rule::compile::Compiled;
use relay::wire::parse;
use relay_common::{MatchEntry, MatchKey, TAG_NONE};
use std::hint::black_box;
use std::time::Instant;

const IFINDEX: u32 = 7;
/// Bytes before a packet in its frame.
const HEADROOM: usize = 256;

/// One step of a packet's way, and how many packets it is done to at once.
struct Step<'a> {
    name: String,
    packets: u32,
    call: Box<dyn FnMut() + 'a>,
}

impl<'a> Step<'a> {
    fn new(name: impl Into<String>, packets: u32, call: impl FnMut() + 'a) -> Self {
        Self { name: name.into(), packets, call: Box::new(call) }
    }
}

/// All of them.
fn steps<'a>() -> Result<Vec<Step<'a>>> {
    let packet = frame(group(0), 64)?;
    let mut steps = vec![Step::new("parse", 1, parse_once(packet.clone())?)];
    for rules in [1, 100, 10_000] {
        steps.push(Step::new(format!("match, {rules} rules"), 1, match_once(rules)?));
    }
    for payload in [64, 1400] {
        steps.push(Step::new(format!("verify checksums, payload {payload}"), 1, inspect_once(frame(group(0), payload)?)?));
    }
    steps.push(Step::new("rewrite, MACs and TTL", 1, rewrite_once(packet.clone(), Rewrite::Link, 1)?));
    for outputs in [1, 4, 16] {
        let name = format!("rewrite in full and copy, {outputs} outputs");
        steps.push(Step::new(name, outputs, rewrite_once(packet.clone(), Rewrite::Full, outputs)?));
    }
    Ok(steps)
}

/// The rows, on a core of their own.
pub(super) fn rows<'a>(repeat: u32) -> Result<Vec<Row<'a>>> {
    let place = Place::choose(false, false)?;
    place.enter(place.receiver)?;
    Ok(steps()?.into_iter().map(|Step { name, packets, call }| (name, timed(repeat / packets, call))).collect())
}

/// For an instruction counter (`cargo xtask instructions`): one row's step `calls` times, and nothing else; without a name, the
/// names.
pub(super) fn count(name: &str, calls: u32) -> Result<()> {
    let mut steps = steps()?;
    if name.is_empty() {
        steps.iter().for_each(|step| println!("{}", step.name));
        return Ok(());
    }
    let step = steps.iter_mut().find(|step| step.name == name).with_context(|| format!("no row `{name}`"))?;
    (0..calls).for_each(|_| (step.call)());
    Ok(())
}

/// Nanoseconds a call over `repeat` calls.
fn timed<'a>(repeat: u32, mut call: Box<dyn FnMut() + 'a>) -> Box<dyn FnMut() -> Result<f64> + 'a> {
    Box::new(move || {
        let begin = Instant::now();
        (0..repeat).for_each(|_| call());
        Ok(begin.elapsed().as_nanos() as f64 / f64::from(repeat))
    })
}

fn parse_once(packet: Vec<u8>) -> Result<impl FnMut()> {
    parse(&packet, packet.len()).ok().context("the packet is right")?;
    Ok(move || {
        let packet = black_box(packet.as_slice());
        let _ = black_box(parse(packet, packet.len()));
    })
}

/// A packet for each rule, in an order that no cache can guess.
fn match_once(rules: u32) -> Result<impl FnMut()> {
    let mut compiled = Compiled { ingresses: [(IFINDEX, vec![SHAPE])].into(), ..Compiled::default() };
    let mut plans = Vec::new();
    let mut packets = Vec::new();
    for slot in 0..rules {
        let group_of = wide(group(slot));
        let key = MatchKey { ifindex: IFINDEX, tag: TAG_NONE, addr: group_of, port: PORT, zero: 0, shape: SHAPE };
        compiled.entries.extend([(key, MatchEntry { slot, serial: 1, source_set: 0, zero: 0 })]);
        let (tag, port) = (Some(TAG_NONE), Some(PORT));
        plans.push(RulePlan {
            slot,
            serial: 1,
            ifindex: IFINDEX,
            family: 4,
            group_len: 32,
            group: group_of,
            port,
            tag,
            outputs: Vec::new(),
            shared: Vec::new(),
        });
        let bytes = frame(group(slot), 64)?;
        packets.push(parse(&bytes, bytes.len()).ok().context("the packet is right")?);
    }
    let table = Table::new(1, plans, compiled, Vec::new());
    let first = packets.first().context("a rule")?;
    table.find(IFINDEX, first).context("the first packet has a rule")?;
    let mut next = 0;
    Ok(move || {
        next = (next + STEP) % rules;
        if let Some(headers) = packets.get(next as usize) {
            black_box(table.find(IFINDEX, black_box(headers)));
        }
    })
}

fn inspect_once(packet: Vec<u8>) -> Result<impl FnMut()> {
    let headers = parse(&packet, packet.len()).ok().context("the packet is right")?;
    inspect(&headers, &[&packet]).ok().context("its checksums too")?;
    Ok(move || {
        let _ = black_box(inspect(black_box(&headers), &[black_box(packet.as_slice())]));
    })
}

/// One copy of the packet into another frame and one rewrite an output, as a fan-out does.
fn rewrite_once(packet: Vec<u8>, how: Rewrite, outputs: u32) -> Result<impl FnMut()> {
    let headers = parse(&packet, packet.len()).ok().context("the packet is right")?;
    let checked = inspect(&headers, &[&packet]).ok().context("its checksums too")?;
    let edits: Vec<_> = (0..outputs).map(|output| edit(how, group(output + 1))).collect();
    let mut frames = vec![vec![0_u8; 2048]; outputs as usize];
    Ok(move || {
        for (edit, frame) in edits.iter().zip(&mut frames) {
            if let Some(place) = frame.get_mut(HEADROOM..HEADROOM + packet.len()) {
                place.copy_from_slice(black_box(&packet));
            }
            let (mut offset, mut len) = (HEADROOM as u32, packet.len() as u32);
            let _ = black_box(rewrite(frame, &mut offset, &mut len, &headers, checked, edit));
        }
    })
}
