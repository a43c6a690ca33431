//! The supervisor's side of AF_XDP: register a UMEM, make the rings, bind to (interface, queue).
//!
//! Must never read or write a ring: from the bind on, the rings belong to the worker.

use crate::frame::{FRAME_SIZE, UMEM_HEADROOM, Umem};
use crate::sys::xdp::{self, BindFlags, Ring};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Sizes of a port's rings; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingSizes {
    /// RX ring.
    pub rx: u32,
    /// Fill ring.
    pub fill: u32,
    /// TX ring.
    pub tx: u32,
    /// Completion ring.
    pub completion: u32,
}

/// What to bind to.
#[derive(Clone, Copy, Debug)]
pub struct SocketSpec {
    /// Interface.
    pub ifindex: u32,
    /// Queue.
    pub queue: u32,
    /// Ring sizes.
    pub sizes: RingSizes,
    /// Zero copy and multi-buffer, for the first socket of a UMEM.
    pub flags: BindFlags,
}

/// Why a port could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// A step failed.
    #[error("AF_XDP socket on interface {ifindex} queue {queue}: {step}: {errno}")]
    Step {
        /// Interface.
        ifindex: u32,
        /// Queue.
        queue: u32,
        /// The call.
        step: &'static str,
        /// Its error.
        errno: Errno,
    },
}

/// A bound AF_XDP socket.
#[derive(Debug)]
pub struct PortSocket {
    /// The socket.
    pub fd: OwnedFd,
    /// Whether it runs in zero-copy mode.
    pub zero_copy: bool,
}

/// bind answers EBUSY while a dying process still maps the queue's old socket (ADOPTION.md): so long it is asked again.
const BUSY_RETRIES: u32 = 20;
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// Makes and binds one socket. `first` is the socket that registered the UMEM; `None` registers it.
pub fn create(umem: &Umem, spec: SocketSpec, first: Option<&OwnedFd>) -> Result<PortSocket, PortError> {
    let SocketSpec { ifindex, queue, sizes, flags } = spec;
    let failed = |step: &'static str| move |errno: Errno| PortError::Step { ifindex, queue, step, errno };
    let fd = xdp::socket().map_err(failed("socket"))?;
    if first.is_none() {
        xdp::register_umem(&fd, umem.as_ptr(), umem.len(), FRAME_SIZE, UMEM_HEADROOM)
            .map_err(failed("register the UMEM (RLIMIT_MEMLOCK, CAP_IPC_LOCK)"))?;
    }
    for (ring, size) in [(Ring::Fill, sizes.fill), (Ring::Completion, sizes.completion), (Ring::Rx, sizes.rx), (Ring::Tx, sizes.tx)] {
        xdp::create_ring(&fd, ring, size).map_err(failed("make a ring"))?;
    }
    bind(&fd, spec, flags, first).map_err(failed("bind"))?;
    // Older kernels lack the option; then a send takes 32 descriptors and the worker calls again.
    let _ = xdp::set_tx_budget(&fd, sizes.tx);
    let zero_copy = xdp::is_zero_copy(&fd).map_err(failed("read the mode"))?;
    Ok(PortSocket { fd, zero_copy })
}

fn bind(fd: &OwnedFd, spec: SocketSpec, flags: BindFlags, first: Option<&OwnedFd>) -> Result<(), Errno> {
    for _ in 0..BUSY_RETRIES {
        match xdp::bind(fd, spec.ifindex, spec.queue, flags, first) {
            Err(Errno::EBUSY) => std::thread::sleep(BUSY_PAUSE),
            other => return other,
        }
    }
    Err(Errno::EBUSY)
}
