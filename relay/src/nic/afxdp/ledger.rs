//! Where the frames of a port are, read from its rings' indices by whoever maps them.
//!
//! Only reads. The user-owned indices (fill and TX producer, RX and completion consumer) give exact sums whatever the
//! kernel does meanwhile; the kernel-owned ones only say how such a sum divides (ADOPTION.md, Ledger).

use super::create::RingSizes;
use super::port::{AdoptError, RingIndices};
use super::rings::KernelRing;
use crate::frame::RawDesc;
use crate::ring::cursor::filled;
use crate::sys::xdp::{self, Ring};
use std::os::fd::{AsFd, OwnedFd};

/// A second, read-only look at a port's four rings.
#[derive(Debug)]
pub struct PortLedger {
    rx: KernelRing<RawDesc>,
    tx: KernelRing<RawDesc>,
    fill: KernelRing<u64>,
    completion: KernelRing<u64>,
}

/// Frames of a port by place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortFrames {
    /// In the fill ring.
    pub fill: u32,
    /// In the RX ring.
    pub rx: u32,
    /// In the TX ring.
    pub tx: u32,
    /// In the completion ring.
    pub completion: u32,
    /// With the kernel, in no ring.
    pub kernel: u32,
}

impl PortLedger {
    /// Maps the rings once more.
    pub fn open(fd: &OwnedFd, sizes: RingSizes) -> Result<Self, AdoptError> {
        let [rx, tx, fill, completion] = xdp::ring_offsets(&fd.as_fd()).map_err(AdoptError::Offsets)?;
        Ok(Self {
            rx: KernelRing::map(fd, Ring::Rx, sizes.rx, rx)?,
            tx: KernelRing::map(fd, Ring::Tx, sizes.tx, tx)?,
            fill: KernelRing::map(fd, Ring::Fill, sizes.fill, fill)?,
            completion: KernelRing::map(fd, Ring::Completion, sizes.completion, completion)?,
        })
    }

    /// The indices of fill/RX and of TX/completion.
    pub fn indices(&self) -> [RingIndices; 2] {
        [
            RingIndices {
                user: self.fill.producer(),
                kernel: self.fill.consumer(),
                back_kernel: self.rx.producer(),
                back_user: self.rx.consumer(),
            },
            RingIndices {
                user: self.tx.producer(),
                kernel: self.tx.consumer(),
                back_kernel: self.completion.producer(),
                back_user: self.completion.consumer(),
            },
        ]
    }

    /// UMEM addresses of all frames in the rings. For a socket whose interface is gone and whose worker is dead, so that nobody
    /// moves an index.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        let receive = waiting(&self.fill).map(|index| self.fill.get(index)).chain(waiting(&self.rx).map(|index| self.rx.get(index).addr));
        let send = waiting(&self.tx).map(|index| self.tx.get(index).addr);
        receive.chain(send).chain(waiting(&self.completion).map(|index| self.completion.get(index)))
    }

    /// Divides the frames of these indices by place.
    pub fn places([receive, send]: [RingIndices; 2]) -> PortFrames {
        let (fill, rx, in_receive) = divide(receive);
        let (tx, completion, in_send) = divide(send);
        PortFrames { fill, rx, tx, completion, kernel: in_receive + in_send }
    }
}

/// Indices of the elements between a ring's consumer and producer.
fn waiting<T: bytemuck::Pod>(ring: &KernelRing<T>) -> impl Iterator<Item = u32> + use<T> {
    let (first, count) = (ring.consumer(), filled(ring.producer(), ring.consumer()).min(ring.size()));
    (0..count).map(move |offset| first.wrapping_add(offset))
}

/// (waiting, coming back, in between) of a pair of rings; they sum to what user space has handed over and not got back.
fn divide(i: RingIndices) -> (u32, u32, u32) {
    let total = filled(i.user, i.back_user);
    let waiting = filled(i.user, i.kernel).min(total);
    let back = filled(i.back_kernel, i.back_user).min(total - waiting);
    (waiting, back, total - waiting - back)
}
