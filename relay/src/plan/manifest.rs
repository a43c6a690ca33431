//! What a worker is told: at start its manifest (which descriptor is what, its ports, how to run), then commands.
//!
//! ```text
//! control segment: 0 channel of commands (shm/channel.rs) · 4096 manifest length u32 · 4160 manifest (JSON)
//! ```
//! One for each process, made and written by the supervisor before the exec and sealed: no other process can ever write it.
//! A worker's ports are fixed at exec (DECISIONS §3).

use crate::nic::afpacket::Engines;
use crate::nic::afxdp::create::RingSizes;
use crate::ring::Received;
use crate::shm::channel::channel_len;
use crate::shm::{ChannelError, ChannelStats, Reader, Segment, Writer};
use crate::sys::shared::OutOfMapping;
use crate::sys::{SharedArray, SharedWord};
use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::{Acquire, Release};

/// Counted up whenever a layout in this room changes.
pub const LAYOUT_VERSION: u32 = 11;
/// Commands that a worker may fall behind.
pub const COMMANDS: u32 = 16;
const MANIFEST_LEN: usize = 4096;
const MANIFEST: usize = MANIFEST_LEN + 64;
/// Bytes of a control segment.
const CONTROL_LEN: usize = 1024 * 1024;

const _: () = assert!(channel_len::<Command>(COMMANDS) <= MANIFEST_LEN, "the commands reach into the manifest");

/// What the supervisor tells a running worker. 4 bytes.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Command(u32);

/// Go on.
pub const COMMAND_RUN: Command = Command(0);
/// Planned replacement: stop receiving at once (arrivals wait in the RX ring), send what is in hand, exit with status 0.
pub const COMMAND_DRAIN: Command = Command(1);
/// Stop: take what is left in the RX rings, send it, exit with status 0.
pub const COMMAND_STOP: Command = Command(2);

/// On the life socket, from a supervisor that cannot write the control segment because another one made it: [`COMMAND_DRAIN`].
pub const RELIEVE: u8 = 2;

/// How a port is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortKind {
    /// AF_XDP socket in `receive` (and `send`).
    Xsk,
    /// AF_PACKET sockets, driven by io_uring or, where the kernel refuses it, by recvmmsg and sendmmsg.
    Packet,
    /// Nothing: the interface is missing, only the number is kept.
    Absent,
}

/// One port of the worker. Its number is its place in the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortManifest {
    /// Interface name, for messages.
    pub name: String,
    /// Interface.
    pub ifindex: u32,
    /// Queue.
    pub queue: u32,
    /// How it is driven.
    pub kind: PortKind,
    /// Whether rules take packets here.
    pub ingress: bool,
    /// Whether rules send here.
    pub egress: bool,
    /// The receiving (and on AF_XDP sending) socket.
    pub receive_fd: i32,
    /// The sending socket.
    pub send_fd: i32,
    /// The socket that takes super-frames, or -1.
    pub coalesce_fd: i32,
    /// Ring sizes (AF_XDP).
    pub sizes: RingSizes,
    /// Frames that shall stand with the kernel for receiving.
    pub depth: u32,
}

/// `--wait`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitMode {
    /// Never sleep.
    Spin,
    /// Spin for a while, then sleep.
    Adaptive,
    /// Sleep whenever idle.
    Poll,
}

/// Everything a worker is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`LAYOUT_VERSION`].
    pub version: u32,
    /// Worker number.
    pub worker: u32,
    /// Counts the processes that have been this worker.
    pub generation: u32,
    /// Frames of the UMEM (a power of two).
    pub frame_count: u32,
    /// Slots of each egress ring (a power of two).
    pub egress_capacity: u32,
    /// UMEM memfd.
    pub umem_fd: i32,
    /// Work segment.
    pub work_fd: i32,
    /// Rules segment (read-only).
    pub rules_fd: i32,
    /// Tap ring.
    pub tap_fd: i32,
    /// Socket whose other end the supervisor holds, and its keeper: EOF is their death, a byte is "look at your segments", or [`RELIEVE`].
    pub life_fd: i32,
    /// Two threads instead of one.
    pub split: bool,
    /// Whether packet ports may use io_uring.
    pub io_uring: Engines,
    /// Wait strategy.
    pub wait: WaitMode,
    /// CPUs to run on: one for each thread, or empty for the inherited affinity.
    pub cpus: Vec<usize>,
    /// Heartbeat period.
    pub heartbeat_ms: u64,
    /// The ports, in numeric order.
    pub ports: Vec<PortManifest>,
    /// Frames in rings of interfaces that are gone.
    pub orphans: OrphanList,
    /// Of a spare: whom it stands in for.
    pub spare: Option<SpareManifest>,
}

/// What a spare waits for (worker/spare.rs).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpareManifest {
    /// The worker it stands in for (pidfd).
    pub worker_fd: i32,
    /// What hangs up when that one has made its last step (sys/listener.rs), -1: nothing.
    pub listener_fd: i32,
    /// Socket with one packet in it, the baton: whoever takes it decides who is the worker next. The supervisor holds the same.
    pub baton_fd: i32,
}

/// Frames in rings that nobody can map any more, since their interface is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrphanList {
    /// A bit each, frame 0 the lowest of the first word.
    pub frames: Vec<u64>,
    /// Which burial this is; a worker that has taken them notes it, so that no successor does it again.
    pub serial: u32,
}

/// Why a control segment was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Its channel.
    #[error("control segment: {0}")]
    Channel(#[from] ChannelError),
    /// Too small.
    #[error("control segment: {0}")]
    Layout(#[from] OutOfMapping),
    /// The manifest is of another build.
    #[error("manifest has layout version {0}, this program speaks {LAYOUT_VERSION}")]
    Version(u32),
    /// The manifest is longer than the segment, or no JSON of this shape.
    #[error("manifest: {0}")]
    Content(String),
}

/// The supervisor's end of a control segment.
#[derive(Debug)]
pub struct Control(Writer<Command>);

impl Control {
    /// Makes the control segment of a process that is to start.
    pub fn create(manifest: &Manifest) -> Result<Self, ManifestError> {
        let text = serde_json::to_vec(manifest).map_err(|error| ManifestError::Content(error.to_string()))?;
        let segment = Segment::create_for_readers("relay-control", CONTROL_LEN).map_err(ChannelError::from)?;
        let body = SharedArray::<u8>::new(segment.mapping(), MANIFEST, text.len())?;
        body.set_all(0, &text);
        SharedWord::new(segment.mapping(), MANIFEST_LEN)?.store(text.len() as u32, Release);
        Ok(Self(Writer::create_in(segment, COMMANDS)?))
    }

    /// Tells the worker what to do.
    pub fn command(&mut self, command: Command) {
        // Without a gate a channel takes every message.
        let _ = self.0.send(&command);
    }

    /// Commands given.
    pub const fn sent(&self) -> u64 {
        self.0.sent()
    }

    /// Bytes of the segment.
    pub fn memory_bytes(&self) -> u64 {
        self.0.segment().len() as u64
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The worker's end.
#[derive(Debug)]
pub struct Orders {
    commands: Reader<Command>,
    last: Command,
}

impl Orders {
    /// Takes the reading end.
    pub const fn new(commands: Reader<Command>) -> Self {
        Self { commands, last: COMMAND_RUN }
    }

    /// Reads the manifest.
    pub fn manifest(&self) -> Result<Manifest, ManifestError> {
        let mapping = self.commands.segment().mapping();
        let len = SharedWord::new(mapping, MANIFEST_LEN)?.load(Acquire) as usize;
        let body = SharedArray::<u8>::new(mapping, MANIFEST, len)?;
        let mut text = vec![0; len];
        body.get_all(0, &mut text);
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| ManifestError::Content(error.to_string()))?;
        if manifest.version == LAYOUT_VERSION { Ok(manifest) } else { Err(ManifestError::Version(manifest.version)) }
    }

    /// What to do now: the newest command.
    #[inline]
    pub fn command(&mut self) -> Command {
        match self.commands.receive() {
            Received::Empty => {}
            Received::Message(command) => self.last = command,
            Received::Overrun(_) => self.last = self.commands.latest().unwrap_or(self.last),
        }
        self.last
    }

    /// What came.
    pub fn stats(&mut self) -> ChannelStats {
        self.commands.stats()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::channel::duplicate;

    fn manifest(version: u32) -> Manifest {
        Manifest {
            version,
            worker: 3,
            generation: 1,
            frame_count: 64,
            egress_capacity: 64,
            umem_fd: 3,
            work_fd: 4,
            rules_fd: 5,
            tap_fd: 7,
            life_fd: 6,
            split: false,
            io_uring: Engines::Best,
            wait: WaitMode::Poll,
            cpus: vec![],
            heartbeat_ms: 100,
            ports: vec![],
            orphans: OrphanList::default(),
            spare: Some(SpareManifest { worker_fd: 8, listener_fd: -1, baton_fd: 9 }),
        }
    }

    fn orders(control: &Control) -> Orders {
        Orders::new(Reader::open(duplicate(control.as_fd()).unwrap()).unwrap())
    }

    #[test]
    fn req_000_3_orders_go_down_and_the_worker_cannot_write_them() {
        let mut control = Control::create(&manifest(LAYOUT_VERSION)).unwrap();
        let mut orders = orders(&control);
        assert_eq!((orders.manifest().unwrap(), orders.command()), (manifest(LAYOUT_VERSION), COMMAND_RUN));
        control.command(COMMAND_DRAIN);
        assert_eq!((orders.command(), orders.command()), (COMMAND_DRAIN, COMMAND_DRAIN));
        (0..100).for_each(|_| control.command(COMMAND_STOP));
        assert_eq!((orders.command(), control.sent()), (COMMAND_STOP, 101), "behind, and told the newest");
        let sealed = Segment::join(duplicate(control.as_fd()).unwrap(), crate::shm::Access::ReadWrite);
        assert!(sealed.is_err(), "nobody but the maker maps it for writing");
        assert!(Writer::<Command>::adopt(duplicate(control.as_fd()).unwrap()).is_err());
    }

    #[test]
    fn a_manifest_of_another_build_is_refused() {
        let control = Control::create(&manifest(LAYOUT_VERSION + 1)).unwrap();
        assert_eq!(orders(&control).manifest(), Err(ManifestError::Version(LAYOUT_VERSION + 1)));
    }
}
