//! Captures as files, pcap and pcapng: bytes → Ethernet frames with their times. Pure.
//!
//! Reads what is defined, skips blocks and options it has no use for, and refuses the rest by name and place. A file is read to
//! its end before a frame of it is used. Must never panic on any bytes, and never guess at a frame that is not there in full.

use std::time::Duration;

/// Most bytes of a frame: beyond every MTU, and short of what a damaged length would ask for.
const MAX_FRAME: u32 = 262_144;
/// Link type of Ethernet.
const ETHERNET: u32 = 1;
/// Bytes of an Ethernet header.
const ETHERNET_LEN: usize = 14;
/// Block types of pcapng.
const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const OLD_PACKET: u32 = 2;
const SIMPLE_PACKET: u32 = 3;
const PACKET: u32 = 6;
/// Options of an interface block.
const TIME_RESOLUTION: u16 = 9;
const TIME_OFFSET: u16 = 14;

/// One frame of a capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// When it was seen, since 1970.
    pub at: Duration,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
}

/// All frames of a file, in its order; else what is wrong with it, and where.
pub fn read(file: &[u8]) -> Result<Vec<Frame>, String> {
    let first = file.first_chunk::<4>().ok_or("it is shorter than any capture")?;
    let frames = match *first {
        [0xa1, 0xb2, 0xc3, 0xd4] => pcap(Input::new(file, true), 1_000)?,
        [0xd4, 0xc3, 0xb2, 0xa1] => pcap(Input::new(file, false), 1_000)?,
        [0xa1, 0xb2, 0x3c, 0x4d] => pcap(Input::new(file, true), 1)?,
        [0x4d, 0x3c, 0xb2, 0xa1] => pcap(Input::new(file, false), 1)?,
        [0x0a, 0x0d, 0x0d, 0x0a] => pcapng(file)?,
        _ => return Err("it is neither pcap nor pcapng".into()),
    };
    if frames.is_empty() { Err("it holds no packet".into()) } else { Ok(frames) }
}

/// What is left of a file or a block.
#[derive(Clone, Copy)]
struct Input<'a> {
    rest: &'a [u8],
    at: usize,
    big: bool,
}

impl<'a> Input<'a> {
    const fn new(rest: &'a [u8], big: bool) -> Self {
        Self { rest, at: 0, big }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let Some((taken, rest)) = self.rest.split_at_checked(len) else {
            return Err(format!("it ends in the middle of something: {len} bytes were to follow byte {}", self.at));
        };
        (self.rest, self.at) = (rest, self.at + len);
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, String> {
        let bytes = self.take(2)?.first_chunk().copied().unwrap_or_default();
        Ok(if self.big { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    }

    fn u32(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?.first_chunk().copied().unwrap_or_default();
        Ok(if self.big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    }

    /// The next `len` bytes as an input of their own.
    fn part(&mut self, len: usize) -> Result<Self, String> {
        let at = self.at;
        Ok(Self { rest: self.take(len)?, at, big: self.big })
    }
}

/// A frame after its lengths: `kept` bytes in the file, of `whole` on the wire.
fn frame(input: &mut Input<'_>, number: usize, kept: u32, whole: u32, at: Duration) -> Result<Frame, String> {
    if kept > MAX_FRAME {
        return Err(format!("packet {number}: a length of {kept} bytes is no packet's"));
    }
    if kept < whole {
        return Err(format!("packet {number} was cut to {kept} of {whole} bytes: capture whole packets (tcpdump -s 0)"));
    }
    let bytes = input.take(kept as usize)?.to_vec();
    if bytes.len() < ETHERNET_LEN {
        return Err(format!("packet {number} is shorter than an Ethernet header"));
    }
    Ok(Frame { at, bytes })
}

fn ethernet(link: u32) -> Result<(), String> {
    if link == ETHERNET { Ok(()) } else { Err(format!("its link type is {link}, and only Ethernet ({ETHERNET}) can be sent")) }
}

/// `tick_ns`: 1000 or 1, by the magic number.
fn pcap(mut input: Input<'_>, tick_ns: u32) -> Result<Vec<Frame>, String> {
    input.take(20)?;
    // Above the link type: how long the frame check sequence is, if it is there.
    ethernet(input.u32()? & 0xffff)?;
    let mut frames = Vec::new();
    while !input.rest.is_empty() {
        let at = Duration::from_secs(input.u32()?.into()) + Duration::from_nanos(u64::from(input.u32()?) * u64::from(tick_ns));
        let (kept, whole) = (input.u32()?, input.u32()?);
        frames.push(frame(&mut input, frames.len() + 1, kept, whole, at)?);
    }
    Ok(frames)
}

/// How an interface of a section counts time.
#[derive(Clone, Copy)]
struct Clock {
    link: u32,
    /// if_tsresol: a power of ten, or of two with the highest bit set.
    resolution: u8,
    offset_s: i64,
}

impl Clock {
    fn time(self, ticks: u64) -> Duration {
        const SECOND: u128 = 1_000_000_000;
        let (ticks, power) = (u128::from(ticks), u32::from(self.resolution & 0x7f));
        let ns = match self.resolution & 0x80 {
            0 if power <= 9 => ticks * 10u128.pow(9 - power),
            0 => ticks / 10u128.checked_pow(power - 9).unwrap_or(u128::MAX),
            _ => (ticks * SECOND).checked_shr(power).unwrap_or(0),
        };
        let ns = ns.saturating_add_signed(i128::from(self.offset_s) * SECOND as i128);
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

fn pcapng(file: &[u8]) -> Result<Vec<Frame>, String> {
    let (mut input, mut clocks, mut frames) = (Input::new(file, false), Vec::new(), Vec::new());
    while !input.rest.is_empty() {
        let (kind, mut body) = block(&mut input)?;
        match kind {
            SECTION => clocks.clear(),
            INTERFACE => clocks.push(interface(body)?),
            PACKET | OLD_PACKET => frames.push(packet(&mut body, kind, frames.len() + 1, &clocks)?),
            SIMPLE_PACKET => return Err(format!("packet {} has no time (a simple packet block)", frames.len() + 1)),
            _ => {}
        }
    }
    Ok(frames)
}

/// Type and body of the next block. A section says by its own magic number how everything up to the next one is written.
fn block<'a>(input: &mut Input<'a>) -> Result<(u32, Input<'a>), String> {
    let begin = input.at;
    let kind = input.u32()?;
    if kind == SECTION {
        input.big = match input.rest.get(4..8) {
            Some([0x1a, 0x2b, 0x3c, 0x4d]) => true,
            Some([0x4d, 0x3c, 0x2b, 0x1a]) => false,
            _ => return Err(format!("the section at byte {begin} has no byte order")),
        };
    }
    let len = input.u32()?;
    let Some(inside) = len.checked_sub(12).filter(|_| len % 4 == 0) else {
        return Err(format!("the block at byte {begin} has an impossible length of {len}"));
    };
    let body = input.part(inside as usize)?;
    if input.u32()? != len {
        return Err(format!("the block at byte {begin} says two different lengths"));
    }
    Ok((kind, body))
}

fn interface(mut body: Input<'_>) -> Result<Clock, String> {
    let mut clock = Clock { link: body.u16()?.into(), resolution: 6, offset_s: 0 };
    body.take(6)?;
    while body.rest.len() >= 4 {
        let (code, len) = (body.u16()?, body.u16()?);
        let mut value = body.part(len.into())?;
        match (code, len) {
            (0, _) => break,
            (TIME_RESOLUTION, 1) => clock.resolution = value.take(1)?.first().copied().unwrap_or(6),
            (TIME_OFFSET, 8) => {
                let (a, b) = (value.u32()?, value.u32()?);
                let (high, low) = if body.big { (a, b) } else { (b, a) };
                clock.offset_s = (u64::from(high) << 32 | u64::from(low)).cast_signed();
            }
            _ => {}
        }
        // Padded to 4; the last one of a block may lack it.
        body.take(usize::from(len.wrapping_neg() % 4).min(body.rest.len()))?;
    }
    Ok(clock)
}

fn packet(body: &mut Input<'_>, kind: u32, number: usize, clocks: &[Clock]) -> Result<Frame, String> {
    let interface = if kind == PACKET {
        body.u32()?
    } else {
        let interface = body.u16()?;
        body.u16()?;
        interface.into()
    };
    let clock =
        clocks.get(interface as usize).ok_or_else(|| format!("packet {number} is of interface {interface}, which is not described"))?;
    ethernet(clock.link)?;
    let ticks = u64::from(body.u32()?) << 32 | u64::from(body.u32()?);
    let (kept, whole) = (body.u32()?, body.u32()?);
    frame(body, number, kept, whole, clock.time(ticks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
    use pcap_file::pcapng::PcapNgWriter;
    use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
    use pcap_file::pcapng::blocks::interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption};
    use pcap_file::{DataLink, Endianness, TsResolution};
    use proptest::prelude::*;

    const BYTES: [u8; 60] = [7; 60];

    fn classic(endianness: Endianness, ts_resolution: TsResolution, datalink: DataLink) -> Vec<u8> {
        let header = PcapHeader { endianness, ts_resolution, datalink, ..PcapHeader::default() };
        let mut writer = PcapWriter::with_header(Vec::new(), header).unwrap();
        for n in 0..3 {
            writer.write_packet(&PcapPacket::new(Duration::from_millis(1_000 + n), 60, &BYTES)).unwrap();
        }
        writer.into_writer()
    }

    /// Three packets a millisecond apart by a clock of this resolution, in ticks.
    fn modern(endianness: Endianness, resolution: Option<u8>, ticks: &[u64], datalink: DataLink) -> Vec<u8> {
        let mut writer = PcapNgWriter::with_endianness(Vec::new(), endianness).unwrap();
        let options = resolution.map(InterfaceDescriptionOption::IfTsResol).into_iter().collect();
        writer.write_pcapng_block(InterfaceDescriptionBlock { linktype: datalink, snaplen: 0, options }).unwrap();
        for ticks in ticks {
            let timestamp = Duration::from_nanos(*ticks);
            let block = EnhancedPacketBlock { interface_id: 0, timestamp, original_len: 60, data: BYTES[..].into(), options: vec![] };
            writer.write_pcapng_block(block).unwrap();
        }
        writer.into_inner()
    }

    fn times(file: &[u8]) -> Vec<u128> {
        let frames = read(file).unwrap();
        assert!(frames.iter().all(|frame| frame.bytes == BYTES));
        frames.iter().map(|frame| (frame.at - frames[0].at).as_micros()).collect()
    }

    /// The files are written by the crate `pcap-file`, which shares no line with this reader.
    #[test]
    fn both_formats_both_orders_and_every_clock_say_the_same_times() {
        for endianness in [Endianness::Big, Endianness::Little] {
            for resolution in [TsResolution::MicroSecond, TsResolution::NanoSecond] {
                assert_eq!(times(&classic(endianness, resolution, DataLink::ETHERNET)), [0, 1_000, 2_000]);
            }
            for (resolution, ticks) in [
                (None, [5_000_000, 5_001_000, 5_002_000]),
                (Some(3), [1, 2, 3]),
                (Some(9), [0, 1_000_000, 2_000_000]),
                (Some(12), [7, 1_000_000_007, 2_000_000_007]),
                (Some(0x80 | 10), [0, 1, 2]),
            ] {
                let expected = if resolution == Some(0x8a) { [0, 976, 1_953] } else { [0, 1_000, 2_000] };
                assert_eq!(times(&modern(endianness, resolution, &ticks, DataLink::ETHERNET)), expected, "{resolution:?}");
            }
        }
    }

    #[test]
    fn what_cannot_be_sent_is_refused_by_name() {
        let whole = modern(Endianness::Little, None, &[1, 2, 3], DataLink::ETHERNET);
        let mut cut = whole.clone();
        let at = cut.windows(8).position(|bytes| bytes == [60, 0, 0, 0, 60, 0, 0, 0]).unwrap();
        cut[at + 4] = 200;
        for (file, words) in [
            (b"#!/bin/sh\n".to_vec(), "neither pcap nor pcapng"),
            (vec![1], "shorter than any capture"),
            (classic(Endianness::Big, TsResolution::MicroSecond, DataLink::RAW), "only Ethernet"),
            (modern(Endianness::Big, None, &[1, 2, 3], DataLink::RAW), "only Ethernet"),
            (whole[..whole.len() - 4].to_vec(), "ends in the middle"),
            (cut, "packet 1 was cut to 60 of 200 bytes"),
            (classic(Endianness::Little, TsResolution::MicroSecond, DataLink::ETHERNET)[..24].to_vec(), "holds no packet"),
        ] {
            let error = read(&file).unwrap_err();
            assert!(error.contains(words), "wanted `{words}`, got `{error}`");
        }
    }

    /// if_tzone (4 bytes), which some readers refuse, an unknown option, and a clock that is set off.
    #[test]
    fn options_of_no_use_are_skipped() {
        let mut file = modern(Endianness::Little, None, &[], DataLink::ETHERNET);
        let options = [10, 0, 4, 0, 1, 0, 0, 0, 0x77, 0x77, 3, 0, 1, 2, 3, 0, 14, 0, 8, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let block = |kind: u32, body: &[u8]| {
            let len = (body.len() as u32 + 12).to_le_bytes();
            [&kind.to_le_bytes()[..], &len, body, &len].concat()
        };
        file.truncate(file.len() - 20);
        file.extend(block(INTERFACE, &[&[1, 0, 0, 0, 0, 0, 0, 0][..], &options].concat()));
        file.extend(block(0x4242, &[0; 8]));
        file.extend(block(PACKET, &[&[0u8; 4][..], &[0, 0, 0, 0, 9, 0, 0, 0, 60, 0, 0, 0, 60, 0, 0, 0], &BYTES].concat()));
        assert_eq!(read(&file).unwrap()[0].at, Duration::from_micros(5_000_009));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(flips in proptest::collection::vec((0usize..400, any::<u8>()), 0..6), cut in 0usize..400, big: bool) {
            let endianness = if big { Endianness::Big } else { Endianness::Little };
            for mut file in [modern(endianness, Some(9), &[1, 2, 3], DataLink::ETHERNET), classic(endianness, TsResolution::NanoSecond, DataLink::ETHERNET)] {
                for (at, value) in &flips {
                    if let Some(byte) = file.get_mut(*at) {
                        *byte = *value;
                    }
                }
                file.truncate(file.len().min(cut + 24));
                let _ = read(&file);
            }
        }
    }
}
