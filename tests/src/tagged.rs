//! Numbered streams under a VLAN tag, sent and received at packet sockets: kernels without 802.1Q interfaces show them to nobody else.
//!
//! The report is that of `relay recv`. Must never judge: tests do.

use crate::fuzz::assert_sums;
use crate::raw::{Capture, Datagram, Injector};
use anyhow::{Context, Result};
use relay::lab::recv::Report;
use relay::lab::tally::Tally;
use relay::lab::{Namespace, clock, payload};
use relay::wire::parse;
use std::collections::BTreeMap;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes of a payload, as `relay send` has them by default in tests.
const SIZE: usize = 64;
/// Ends when nothing has come for so long.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Looks for duplicates for so long once everything is there.
const LINGER: Duration = Duration::from_millis(100);

/// Sends `count` numbered datagrams under tag `id`, `rate` a second, in a thread of its own; how many went out.
pub fn send(namespace: &Namespace, iface: &str, id: u16, to: (&str, u16), pace: (u64, u64)) -> Result<JoinHandle<Result<u64>>> {
    let injector = Injector::on(namespace, iface)?;
    let ((group, port), (rate, count)) = (to, pace);
    let datagram = Datagram { tags: vec![(0x8100, id)], ..Datagram::to(group, port, &[0; SIZE])? };
    Ok(std::thread::spawn(move || {
        let (begin, mut datagram) = (Instant::now(), datagram);
        for sequence in 0..count {
            payload::write(&mut datagram.payload, sequence, clock::monotonic_ns());
            injector.send(&datagram.bytes())?;
            std::thread::sleep(
                (begin + Duration::from_micros(1_000_000 * (sequence + 1) / rate)).saturating_duration_since(Instant::now()),
            );
        }
        Ok(count)
    }))
}

/// What has come to a port.
#[derive(Debug)]
struct Stream {
    tally: Tally,
    report: Report,
}

/// Receives what comes under one tag.
#[derive(Debug)]
pub struct Listener(JoinHandle<Result<BTreeMap<u16, Report>>>);

impl Listener {
    /// Expects `count` datagrams under tag `id` at each of these ports.
    pub fn on(namespace: &Namespace, iface: &str, id: u32, ports: &[u16], count: u64) -> Result<Self> {
        let capture = Capture::on(namespace, iface, &[])?;
        let new = |port: &u16| Ok((*port, Stream { tally: Tally::new()?, report: Report::default() }));
        let streams = ports.iter().map(new).collect::<Result<_>>()?;
        Ok(Self(std::thread::spawn(move || receive(&capture, id, streams, count))))
    }

    /// The account of each port.
    pub fn wait(self) -> Result<BTreeMap<u16, Report>> {
        self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn receive(capture: &Capture, id: u32, mut streams: BTreeMap<u16, Stream>, count: u64) -> Result<BTreeMap<u16, Report>> {
    let mut news = Instant::now();
    loop {
        let frames = capture.whole_frames();
        if !frames.is_empty() {
            news = Instant::now();
        }
        frames.iter().try_for_each(|frame| take(frame, id, &mut streams))?;
        let complete = streams.values().all(|stream| stream.tally.distinct >= count);
        if news.elapsed() > if complete { LINGER } else { TIMEOUT } {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let close = |(port, Stream { tally, report }): (u16, Stream)| {
        let Report { ttls, dscps, sources, .. } = report;
        (port, Report { ttls, dscps, sources, ..Report::new(&tally, Some(count), 0, 0) })
    };
    Ok(streams.into_iter().map(close).collect())
}

/// Frames of other tags, and none, are others'.
fn take(frame: &[u8], id: u32, streams: &mut BTreeMap<u16, Stream>) -> Result<()> {
    let Some(headers) = parse(frame, frame.len()).ok().filter(|headers| headers.tag == id) else { return Ok(()) };
    let Some(stream) = streams.get_mut(&headers.dport) else { return Ok(()) };
    assert_sums(frame, &headers, false);
    let (start, end) = (usize::from(headers.l4_offset) + 8, usize::from(headers.l4_offset) + usize::from(headers.udp_len));
    stream.tally.record(frame.get(start..end).context("a datagram that ends before it ends")?, clock::monotonic_ns());
    stream.report.ttls.insert(headers.ttl);
    stream.report.dscps.insert(headers.traffic_class >> 2);
    stream.report.sources.insert(format!("{:?} {}", headers.src, headers.sport));
    Ok(())
}
