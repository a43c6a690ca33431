//! `relay channels`: the shared-memory channels between the supervisor and its workers, and the memory they lie in.

use super::output::{self, lines, number, text};
use super::{Context, OK, Outcome, unexpected};
use crate::control::message::{ChannelInfo, Channels, Request, Response, SegmentInfo};

/// Asks and prints.
pub(super) fn run(context: &Context) -> Outcome {
    match context.ask(&Request::Channels)? {
        Response::Channels(channels) => context.output.facts(&channels, |_| page(&channels)).map(|()| OK),
        other => Err(unexpected(&other)),
    }
}

fn page(channels: &Channels) -> String {
    [table(&channels.channels), segments(&channels.segments)].join("\n")
}

fn table(channels: &[ChannelInfo]) -> String {
    let mut table = output::table(&["WORKER", "CHANNEL", "MEMORY", "SLOTS", "DEPTH", "HIGH", "SENT", "RECEIVED", "DROPPED", "OVERRUNS"]);
    for channel in channels {
        let counts =
            [channel.capacity, channel.depth, channel.high_water, channel.sent, channel.received, channel.dropped, channel.overruns];
        let first = [number(channel.worker), text(&channel.name), text(&kib(channel.memory_bytes))];
        table.add_row(first.into_iter().chain(counts.map(number)));
    }
    lines(&mut table)
}

fn segments(segments: &[SegmentInfo]) -> String {
    let mut table = output::table(&["WORKER", "SEGMENT", "MEMORY"]);
    for segment in segments {
        let worker = segment.worker.map_or_else(|| text("all"), number);
        table.add_row([worker, text(&segment.name), text(&kib(segment.memory_bytes))]);
    }
    lines(&mut table) + &format!("total {}\n", kib(segments.iter().map(|segment| segment.memory_bytes).sum()))
}

/// Address space; what is touched takes memory.
fn kib(bytes: u64) -> String {
    format!("{} KiB", bytes.div_ceil(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_as_tables() {
        let egress = ChannelInfo {
            name: "egress eth1".into(),
            kind: "egress".into(),
            memory_bytes: 33_152,
            capacity: 2048,
            depth: 3,
            high_water: 64,
            sent: 100,
            received: 97,
            ..ChannelInfo::default()
        };
        let segments = vec![SegmentInfo { name: "relay-rules".into(), worker: None, memory_bytes: 4096 }];
        let page = page(&Channels { channels: vec![egress], segments });
        assert_eq!(
            page,
            "WORKER  CHANNEL      MEMORY  SLOTS  DEPTH  HIGH  SENT  RECEIVED  DROPPED  OVERRUNS\n\
             \u{20}    0  egress eth1  33 KiB   2048      3    64   100        97        0         0\n\
             \n\
             WORKER  SEGMENT      MEMORY\n\
             all     relay-rules  4 KiB\n\
             total 4 KiB\n"
        );
    }
}
