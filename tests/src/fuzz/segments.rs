//! What another process can write where we map or receive: status and rules segment, AF_XDP descriptors, a keeper's table, a hand-over.
//!
//! Inputs for segments are edits of a right one: two bytes of place, eight bytes of value, again and again; it is put right afterwards.
//! Must never leave a descriptor open.

#![expect(clippy::panic, reason = "a target that cannot set up its world has failed")]

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, sendmsg, shutdown, socket};
use relay::frame::{FRAME_SIZE, RawDesc, Umem};
use relay::keeper;
use relay::plan::latency;
use relay::plan::records::{AddressRecord, OutputRecord, RULES_LEN, RuleRecord, RulesSegment, Snapshot, SnapshotRule};
use relay::plan::status::{FrameStats, StatusPage};
use relay::shm::channel::{Reader, duplicate};
use relay::shm::segment::Segment;
use relay::supervisor::handover::Handover;
use relay::sys::Mapping;
use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// An edit: place (u16), value (u64).
pub const EDIT_LEN: usize = 10;
/// Descriptors with one packet of a table at most.
const MAX_DESCRIPTORS: u8 = 8;
/// What edits can reach: everything that says where something else lies.
const REACH: usize = 1 << 16;

/// A segment that is damaged and put right again.
struct Damaged {
    file: File,
    right: Vec<u8>,
}

impl Damaged {
    fn of(fd: OwnedFd) -> Result<Self> {
        let (file, mut right) = (File::from(fd), vec![0; REACH + 8]);
        file.read_exact_at(&mut right, 0).context("a segment shorter than the edits reach")?;
        Ok(Self { file, right })
    }

    fn damage(&self, edits: &[u8]) -> Result<()> {
        for edit in edits.chunks_exact(EDIT_LEN) {
            let (place, value) = edit.split_at(2);
            self.file.write_all_at(value, u64::from(u16::from_le_bytes([place[0], place[1]])))?;
        }
        Ok(())
    }

    fn mend(&self, edits: &[u8]) -> Result<()> {
        for edit in edits.chunks_exact(EDIT_LEN) {
            let place = usize::from(u16::from_le_bytes([edit[0], edit[1]]));
            self.file.write_all_at(&self.right[place..place + 8], place as u64)?;
        }
        Ok(())
    }
}

/// A status segment, as a supervisor reads it.
struct StatusWorld {
    damaged: Damaged,
    segment: Arc<Segment>,
    page: StatusPage,
    reader: Reader<FrameStats>,
}

impl StatusWorld {
    fn new() -> Result<Self> {
        let (segment, page, reader) = StatusPage::create()?;
        Ok(Self { damaged: Damaged::of(duplicate(segment.as_fd())?)?, segment, page, reader })
    }

    fn look(&mut self) -> Result<bool> {
        let header = &self.page.header;
        let _ = (header.state(), header.owner(), header.turns(), header.epoch(), header.creator(), self.page.cpu());
        let mut words = [0; latency::WORDS];
        self.page.latency.get_all(0, &mut words);
        let buckets = latency::buckets(&words);
        let _ = (latency::total(&buckets), latency::quantile(&buckets, 0.99), latency::since(&buckets, &[]));
        // One that had it open before, and one that comes now.
        let _ = (self.reader.receive(), self.reader.latest(), self.reader.stats());
        let opened = StatusPage::of(&self.segment).is_ok();
        let Ok(mut reader) = Reader::<FrameStats>::open(duplicate(self.segment.as_fd())?) else { return Ok(false) };
        let _ = (reader.receive(), reader.latest(), reader.stats());
        Ok(opened)
    }
}

/// The rules of a worker, as it reads them at a new epoch.
struct RulesWorld {
    damaged: Damaged,
    mapping: Arc<Mapping>,
}

/// In the first half of the segment.
const EPOCH: u32 = 2;

impl RulesWorld {
    fn new() -> Result<Self> {
        let (fd, mapping) = Segment::create("rules-fuzz", RULES_LEN)?.into_parts();
        let rule = |slot: u32| SnapshotRule {
            record: RuleRecord {
                slot,
                serial: 1,
                ifindex: 2,
                family: if slot == 1 { 6 } else { 4 },
                port: 5_000 + slot,
                group_len: 32,
                source_len: if slot == 2 { 24 } else { u32::MAX },
                group: [239, 1, 1, slot as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                ..RuleRecord::default()
            },
            outputs: vec![OutputRecord { slot, port: 1, ..OutputRecord::default() }; 2],
            except: vec![AddressRecord { addr: [10; 16], number: 8 }],
            text: format!("rule {slot}"),
        };
        let snapshot = Snapshot { epoch: EPOCH, rules: (0..4).map(rule).collect(), own: vec![AddressRecord::default()] };
        RulesSegment::create(&mapping)?.publish(&snapshot)?;
        Ok(Self { damaged: Damaged::of(fd)?, mapping })
    }

    fn look(&self) -> bool {
        let Ok(segment) = RulesSegment::join(&self.mapping) else { return false };
        let _ = (segment.epoch(), segment.wanted());
        relay::worker::snapshot::load(&segment, EPOCH).is_ok_and(|table| !table.rules().is_empty())
    }
}

thread_local! {
    static STATUS: std::cell::RefCell<Option<StatusWorld>> = const { std::cell::RefCell::new(None) };
    static RULES: std::cell::RefCell<Option<RulesWorld>> = const { std::cell::RefCell::new(None) };
    static UMEM: std::cell::RefCell<Option<Umem>> = const { std::cell::RefCell::new(None) };
}

/// What its world makes of an input; the world is made at the first one.
fn within<W>(
    place: &'static std::thread::LocalKey<std::cell::RefCell<Option<W>>>,
    new: fn() -> Result<W>,
    look: impl FnOnce(&mut W) -> Result<bool>,
) -> bool {
    place.with_borrow_mut(|world| {
        let world = match world {
            Some(world) => world,
            None => world.insert(new().unwrap_or_else(|error| panic!("no world: {error:#}"))),
        };
        look(world).unwrap_or_else(|error| panic!("the world itself failed: {error:#}"))
    })
}

/// Edits of a status segment: whatever a worker writes, its supervisor reads on.
#[must_use]
pub fn status(data: &[u8]) -> bool {
    within(&STATUS, StatusWorld::new, |world| {
        world.damaged.damage(data)?;
        let taken = world.look();
        world.damaged.mend(data)?;
        taken
    })
}

/// Edits of a rules segment: it is refused, or a table comes of it.
#[must_use]
pub fn rules(data: &[u8]) -> bool {
    within(&RULES, RulesWorld::new, |world| {
        world.damaged.damage(data)?;
        let taken = world.look();
        world.damaged.mend(data)?;
        Ok(taken)
    })
}

/// Descriptors out of a ring: what is taken lies in one frame, and all others are refused.
#[must_use]
pub fn descriptors(data: &[u8]) -> bool {
    const FRAMES: u32 = 16;
    let new = || {
        let (fd, _) = Segment::create("umem-fuzz", (FRAMES * FRAME_SIZE) as usize)?.into_parts();
        Ok(Umem::new(Mapping::new(&fd, 0, (FRAMES * FRAME_SIZE) as usize, true, false)?))
    };
    within(&UMEM, new, |umem| {
        let mut taken = false;
        for bytes in data.chunks_exact(size_of::<RawDesc>()) {
            let desc: RawDesc = bytemuck::pod_read_unaligned(bytes);
            umem.prefetch(desc);
            let end = u128::from(desc.addr) + u128::from(desc.len);
            let whole = desc.addr < u64::from(FRAMES * FRAME_SIZE)
                && end <= u128::from(desc.addr / u64::from(FRAME_SIZE) + 1) * u128::from(FRAME_SIZE);
            let claimed = umem.claim(desc);
            assert_eq!(claimed.is_ok(), whole, "{desc:?}: {claimed:?}");
            if let Ok((mut frame, offset)) = claimed {
                assert_eq!(umem.bytes(&frame, offset, desc.len).len(), desc.len as usize);
                umem.bytes_mut(&mut frame, offset, desc.len).fill(0x55);
                assert!(umem.bytes(&frame, desc.options, u32::MAX).len() <= FRAME_SIZE as usize);
                taken = true;
            }
        }
        Ok(taken)
    })
}

/// Packets from a keeper, one a line: how many descriptors come along (a digit), then what it says. Whole tables are taken, and their
/// descriptors are as many as their entries.
#[must_use]
pub fn table(data: &[u8]) -> bool {
    received(data).unwrap_or_else(|error| panic!("the world itself failed: {error:#}"))
}

fn received(data: &[u8]) -> Result<bool> {
    // Each a name of its own: what was passed and not taken may keep the last one's for a while.
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let control = std::path::PathBuf::from(format!("/fuzz/{}/{}", std::process::id(), NUMBER.fetch_add(1, Relaxed)));
    let listener = keeper::listen(&control)?;
    let client = keeper::connect(&control)?.context("nobody listens")?;
    let keeper = relay::shm::share::accept(listener.as_fd())?;
    let spare = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    for line in data.split(|byte| *byte == b'\n').take(16) {
        let Some((count, text)) = line.split_first() else { continue };
        let descriptors = vec![spare.as_raw_fd(); usize::from(count.wrapping_sub(b'0') % MAX_DESCRIPTORS)];
        let along = [ControlMessage::ScmRights(&descriptors)];
        let along = if descriptors.is_empty() { &along[..0] } else { &along[..] };
        // Full, or longer than a packet can be: the client gets what went.
        let _ = sendmsg::<()>(keeper.as_raw_fd(), &[IoSlice::new(text)], along, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL, None);
    }
    shutdown(keeper.as_raw_fd(), Shutdown::Write)?;
    Ok(match client.table() {
        Ok(table) => {
            assert!(table.entries().all(|(entry, fd)| entry.key.len() <= 64 && nix::sys::stat::fstat(fd).is_ok()));
            true
        }
        Err(error) => {
            super::assert_one_line(&error.to_string());
            false
        }
    })
}

/// The text of a hand-over: what is taken is written and read back the same.
#[must_use]
pub fn handover(data: &[u8]) -> bool {
    handed(data).unwrap_or_else(|error| panic!("the world itself failed: {error:#}"))
}

fn handed(data: &[u8]) -> Result<bool> {
    let mut file = File::from(memfd_create("handover-fuzz", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(data)?;
    Ok(match Handover::read(file.into()) {
        Ok(handover) => {
            let again = Handover::read(handover.write()?);
            assert!(again.as_ref().is_ok_and(|again| *again == handover), "{handover:?} is read back as {again:?}");
            true
        }
        Err(error) => {
            super::assert_one_line(&error.to_string());
            false
        }
    })
}
