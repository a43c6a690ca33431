//! The NIC through AF_PACKET: where AF_XDP can't be had, the same contract over packet sockets.
//!
//! Two engines: io_uring (`uring_*`), and recvmmsg/sendmmsg (`plain`) where io_uring is refused. [`PacketReceive`] and
//! [`PacketTransmit`] are one half each over either; [`Reason`] says why it is the lower one. Sockets come from the supervisor
//! ([`socket`]), the ring is the worker's own, made before its seccomp filter closes.
//! System calls after that: io_uring_enter, io_uring_register (once a half, ENABLE_RINGS), getsockopt; plain: recvmmsg,
//! sendmmsg, getsockopt (ppoll in `wait`, which no worker calls: it has a poll of its own). The packet path has no journal position: the rings die with the worker, so
//! [`Held`] marks the frames that were with them. Must never know a rule or the data path.

mod adaptive;
mod coalesce;
pub mod fanout;
mod filter;
mod layout;
mod outbox;
mod plain;
mod receive;
mod runs;
pub mod socket;
mod transmit;
mod uring;
mod uring_receive;
mod uring_transmit;
mod wakeup;

pub use receive::PacketReceive;
pub use transmit::PacketTransmit;

use crate::sys::SharedArray;
use nix::errno::Errno;

/// Frames that stand with the kernel by default, and descriptors in flight by default.
pub const DEFAULT_DEPTH: u16 = 256;

/// Where it is written down which frames are with a kernel object that dies with this process. A successor finds there what
/// stands in no ring. Set before a frame is given to the kernel, cleared before it is given to anyone else.
pub trait Held {
    /// One plain store.
    fn set(&self, frame: u32, held: bool);
}

impl Held for SharedArray<u8> {
    fn set(&self, frame: u32, held: bool) {
        SharedArray::set(self, frame as usize, u8::from(held));
    }
}

impl<H: Held + ?Sized> Held for &H {
    fn set(&self, frame: u32, held: bool) {
        H::set(self, frame, held);
    }
}

/// Which engines may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engines {
    /// io_uring where the kernel has it.
    #[default]
    Best,
    /// recvmmsg and sendmmsg only.
    PlainOnly,
}

/// Why a half is on the plain engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The kernel said no.
    #[error("io_uring refused ({0}): see sysctl kernel.io_uring_disabled")]
    Refused(Errno),
    /// It was told not to.
    #[error("--io-uring off")]
    NotWanted,
}

impl Reason {
    /// From an errno, 0 for none.
    pub fn from_raw(errno: i32) -> Self {
        if errno == 0 { Self::NotWanted } else { Self::Refused(Errno::from_raw(errno)) }
    }
}

/// The engine a half is on, and why it is the lower one.
#[derive(Debug)]
enum Rung<U, P> {
    Uring(U),
    Plain(P, Reason),
}

impl<U, P> Rung<U, P> {
    const fn backend(&self) -> &'static str {
        match self {
            Self::Uring(_) => "af_packet",
            Self::Plain(..) => "af_packet_plain",
        }
    }

    const fn reason(&self) -> Option<Reason> {
        match self {
            Self::Uring(_) => None,
            Self::Plain(_, reason) => Some(*reason),
        }
    }
}
