//! What a worker is told at start: which descriptor is what, its ports, how to run. JSON in the control segment.
//!
//! ```text
//! control segment: 0 magic u64 · 8 version u32 · 12 manifest length u32 · 64 command u32 · 4096 manifest (JSON)
//! ```
//! Written by the supervisor before the exec, but for the command word. A worker's ports are fixed at exec (DECISIONS §3).

use crate::nic::afpacket::Engines;
use crate::nic::afxdp::create::RingSizes;
use crate::sys::shared::OutOfMapping;
use crate::sys::{Mapping, SharedArray, SharedWord, SharedWord64};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

/// "RLYCTRL" and a zero byte.
const MAGIC: u64 = u64::from_le_bytes(*b"RLYCTRL\0");
/// Counted up whenever a layout in this room changes.
pub const LAYOUT_VERSION: u32 = 2;
const COMMAND: usize = 64;
const MANIFEST: usize = 4096;
/// Bytes of a control segment.
pub const CONTROL_LEN: usize = 64 * 1024;

/// Go on.
pub const COMMAND_RUN: u32 = 0;
/// Planned replacement: stop receiving at once (arrivals wait in the RX ring), send what is in hand, exit with status 0.
pub const COMMAND_DRAIN: u32 = 1;
/// Stop: take what is left in the RX rings, send it, exit with status 0.
pub const COMMAND_STOP: u32 = 2;

/// How a port is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortKind {
    /// AF_XDP socket in `receive` (and `send`).
    Xsk,
    /// AF_PACKET sockets, driven by io_uring or, where the kernel refuses it, by recvmmsg and sendmmsg.
    Packet,
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
    /// Socket whose other end the supervisor holds: EOF is its death, a byte is "look at your segments".
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
    /// How long to forward on without a supervisor.
    pub linger_ms: u64,
    /// The ports, in numeric order.
    pub ports: Vec<PortManifest>,
}

/// Why a control segment was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Too small.
    #[error(transparent)]
    Layout(#[from] OutOfMapping),
    /// Not a control segment.
    #[error("no control segment: magic is {0:#x}")]
    Magic(u64),
    /// Of another build.
    #[error("control segment has layout version {0}, this program speaks {LAYOUT_VERSION}")]
    Version(u32),
    /// The manifest is longer than the segment, or no JSON of this shape.
    #[error("manifest: {0}")]
    Content(String),
}

/// A mapped control segment.
#[derive(Debug)]
pub struct Control {
    mapping: Arc<Mapping>,
    command: SharedWord,
}

impl Control {
    /// Writes a fresh control segment (supervisor).
    pub fn write(mapping: Arc<Mapping>, manifest: &Manifest) -> Result<Self, ManifestError> {
        let text = serde_json::to_vec(manifest).map_err(|error| ManifestError::Content(error.to_string()))?;
        let body = SharedArray::<u8>::new(&mapping, MANIFEST, text.len())?;
        body.set_all(0, &text);
        let command = SharedWord::new(&mapping, COMMAND)?;
        command.store(COMMAND_RUN, Release);
        SharedWord::new(&mapping, 8)?.store(LAYOUT_VERSION, Release);
        SharedWord::new(&mapping, 12)?.store(text.len() as u32, Release);
        SharedWord64::new(&mapping, 0)?.store(MAGIC, Release);
        Ok(Self { mapping, command })
    }

    /// Takes a control segment (worker).
    pub fn join(mapping: Arc<Mapping>) -> Result<Self, ManifestError> {
        let magic = SharedWord64::new(&mapping, 0)?.load(Acquire);
        if magic != MAGIC {
            return Err(ManifestError::Magic(magic));
        }
        let version = SharedWord::new(&mapping, 8)?.load(Acquire);
        if version != LAYOUT_VERSION {
            return Err(ManifestError::Version(version));
        }
        let command = SharedWord::new(&mapping, COMMAND)?;
        Ok(Self { mapping, command })
    }

    /// Reads the manifest.
    pub fn manifest(&self) -> Result<Manifest, ManifestError> {
        let len = SharedWord::new(&self.mapping, 12)?.load(Acquire) as usize;
        let body = SharedArray::<u8>::new(&self.mapping, MANIFEST, len)?;
        let mut text = vec![0; len];
        body.get_all(0, &mut text);
        serde_json::from_slice(&text).map_err(|error| ManifestError::Content(error.to_string()))
    }

    /// What the worker shall do.
    #[inline]
    pub fn command(&self) -> u32 {
        self.command.load(Acquire)
    }

    /// Tells the worker what to do (supervisor).
    pub fn set_command(&self, command: u32) {
        self.command.store(command, Release);
    }
}
