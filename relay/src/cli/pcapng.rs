//! A pcapng file of what `relay capture` sees: one interface block for each interface and tap, one packet block for each record,
//! whose comment says rule, output, fate and reason.
//!
//! Comments are `key=value` words in a fixed order, so that `frame.comment contains "reason=ttl_expired"` filters them. Must
//! never leave half a block behind: whole blocks go into the buffer, and the buffer is flushed before the file is closed.

use crate::plan::tap::{Fate, Point, Record};
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption};
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::pcapng::{PcapNgBlock, PcapNgWriter};
use pcap_file::{DataLink, Endianness, PcapError};
use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{self, BufWriter, Write};
use std::time::Duration;

/// Timestamps in nanoseconds (if_tsresol).
const NANOSECONDS: u8 = 9;
/// epb_flags: inbound, outbound.
const DIRECTION: [u32; 3] = [1, 2, 1];

/// The file being written.
pub(super) struct File<W: Write> {
    writer: PcapNgWriter<BufWriter<W>>,
    snaplen: u32,
    interfaces: HashMap<(String, Point), u32>,
    /// Packet blocks written.
    pub(super) packets: u64,
}

fn io_error(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other.to_string()),
    }
}

impl<W: Write> File<W> {
    /// Writes the section header; `comment` says what is captured.
    pub(super) fn create(to: W, snaplen: u32, comment: String) -> io::Result<Self> {
        let application = format!("relay {}", env!("CARGO_PKG_VERSION"));
        let section = SectionHeaderBlock {
            endianness: Endianness::native(),
            options: vec![SectionHeaderOption::Comment(comment.into()), SectionHeaderOption::UserApplication(application.into())],
            ..SectionHeaderBlock::default()
        };
        let writer = PcapNgWriter::with_section_header(BufWriter::new(to), section).map_err(io_error)?;
        Ok(Self { writer, snaplen, interfaces: HashMap::new(), packets: 0 })
    }

    /// The number of an interface as seen at a tap; its block is written the first time.
    pub(super) fn interface(&mut self, name: &str, point: Point) -> io::Result<u32> {
        if let Some(number) = self.interfaces.get(&(name.to_owned(), point)) {
            return Ok(*number);
        }
        let what = match point {
            Point::Ingress => "relay: as packets come, before any rewrite",
            Point::Egress => "relay: as packets leave, after the rewrite",
            Point::Drop => "relay: as packets came that were dropped",
        };
        let block = InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: self.snaplen,
            options: vec![
                InterfaceDescriptionOption::IfName(name.to_owned().into()),
                InterfaceDescriptionOption::IfDescription(what.into()),
                InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
            ],
        };
        self.writer.write_block(&block.into_block()).map_err(io_error)?;
        let number = self.interfaces.len() as u32;
        self.interfaces.insert((name.to_owned(), point), number);
        Ok(number)
    }

    /// Writes one packet. `missed`: records lost since the one before.
    pub(super) fn packet(&mut self, interface: u32, record: &Record<'_>, comment: &str, missed: u64) -> io::Result<()> {
        let flags = DIRECTION.get(record.sight.point as usize).copied().unwrap_or(0);
        let mut options = vec![EnhancedPacketOption::Comment(Cow::Borrowed(comment)), EnhancedPacketOption::Flags(flags)];
        if missed > 0 {
            options.push(EnhancedPacketOption::DropCount(missed));
        }
        let bytes = record.bytes.get(..self.snaplen as usize).unwrap_or(record.bytes);
        let block = EnhancedPacketBlock {
            interface_id: interface,
            timestamp: Duration::from_nanos(record.sight.at_ns),
            original_len: record.sight.len,
            data: Cow::Borrowed(bytes),
            options,
        };
        self.writer.write_block(&block.into_block()).map_err(io_error)?;
        self.packets += 1;
        Ok(())
    }

    /// Hands everything on to the file.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.writer.get_mut().flush()
    }
}

/// The comment of a packet. `rule` and `output` are names, where they are known.
pub(super) fn comment(record: &Record<'_>, worker: u32, rule: Option<&str>, output: impl Fn(u16) -> String) -> String {
    let rule = match (rule, record.sight.rule) {
        (Some(id), _) => format!("rule={id}"),
        (None, Some((slot, serial))) => format!("rule=? slot={slot} serial={serial}"),
        (None, None) => "rule=none".into(),
    };
    let fate = match record.sight.fate {
        Fate::Forwarded { sent: 0, of } => format!("fate=dropped outputs=0/{of}"),
        Fate::Forwarded { sent, of } => format!("fate=forwarded outputs={sent}/{of}"),
        Fate::Dropped(reason) => format!("fate=dropped reason={}", reason.name()),
        Fate::Sent { output: index } => format!("output={index} fate=forwarded to={}", output(index)),
        Fate::OutputDropped { output: index, reason } => {
            format!("output={index} fate=dropped reason={} to={}", reason.name(), output(index))
        }
    };
    // All records of one packet have the same two numbers.
    format!("{rule} {fate} worker={worker} packet={}", record.sight.packet as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::fate::{DropReason, OutputDropReason};
    use crate::plan::tap::Sight;
    use pcap_file::pcapng::{Block, PcapNgReader};

    fn sight(point: Point, fate: Fate) -> Sight {
        Sight { at_ns: 1_700_000_000_123_456_789, packet: 7, rule: Some((1, 2)), len: 60, port: 0, point, fate }
    }

    #[test]
    fn what_is_written_is_read_by_the_library() {
        let mut bytes = Vec::new();
        let mut file = File::create(&mut bytes, 10, "a test".into()).unwrap();
        let packet = [0xab; 60];
        for fate in [Fate::Sent { output: 0 }, Fate::Sent { output: 1 }] {
            let record = Record { sight: sight(Point::Egress, fate), bytes: &packet };
            let interface = file.interface("eth1", Point::Egress).unwrap();
            let text = comment(&record, 3, Some("a"), |index| format!("eth{index} keep"));
            file.packet(interface, &record, &text, u64::from(fate == Fate::Sent { output: 1 })).unwrap();
        }
        assert_eq!((file.interface("eth0", Point::Drop).unwrap(), file.interface("eth1", Point::Egress).unwrap(), file.packets), (1, 0, 2));
        file.flush().unwrap();
        drop(file);
        let mut reader = PcapNgReader::new(bytes.as_slice()).unwrap();
        let mut packets = Vec::new();
        let mut interfaces = 0;
        while let Some(block) = reader.next_block() {
            match block.unwrap() {
                Block::EnhancedPacket(block) => packets.push(block.into_owned()),
                Block::InterfaceDescription(block) => {
                    interfaces += 1;
                    assert_eq!((block.linktype, block.snaplen), (DataLink::ETHERNET, 10));
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((interfaces, packets.len()), (2, 2));
        assert_eq!((packets[0].data.as_ref(), packets[0].original_len), (&packet[..10], 60));
        assert_eq!(packets[0].timestamp.as_nanos(), 1_700_000_000_123_456_789);
        let options = &packets[1].options;
        assert!(
            options.contains(&EnhancedPacketOption::Comment("rule=a output=1 fate=forwarded to=eth1 keep worker=3 packet=7".into())),
            "{options:?}"
        );
        assert!(options.contains(&EnhancedPacketOption::DropCount(1)) && options.contains(&EnhancedPacketOption::Flags(2)));
    }

    #[test]
    fn comments_name_the_fate() {
        let of = |point, fate, rule| comment(&Record { sight: sight(point, fate), bytes: &[] }, 0, rule, |_| "eth1 keep".into());
        assert_eq!(
            of(Point::Ingress, Fate::Forwarded { sent: 1, of: 2 }, Some("a")),
            "rule=a fate=forwarded outputs=1/2 worker=0 packet=7"
        );
        assert_eq!(of(Point::Ingress, Fate::Forwarded { sent: 0, of: 1 }, Some("a")), "rule=a fate=dropped outputs=0/1 worker=0 packet=7");
        assert_eq!(
            of(Point::Drop, Fate::Dropped(DropReason::Malformed), None),
            "rule=? slot=1 serial=2 fate=dropped reason=malformed worker=0 packet=7"
        );
        let dropped = Fate::OutputDropped { output: 1, reason: OutputDropReason::TtlExpired };
        assert_eq!(of(Point::Drop, dropped, Some("a")), "rule=a output=1 fate=dropped reason=ttl_expired to=eth1 keep worker=0 packet=7");
    }
}
