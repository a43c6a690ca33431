//! Ordinary UDP sockets as the end of a bench: joined, read in batches by one thread, counted by their bytes.
//!
//! With UDP_GRO the kernel hands over what it has merged as one long datagram, which counts by its length all the same. Must never
//! look at what came: that is the work of `recv`.

use super::error::{LabError, Result};
use super::netns::Namespace;
use super::socket::{self, RecvBatch};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Datagrams per system call.
const BATCH: usize = 64;
/// Longest datagram without and with merging.
const SIZES: [usize; 2] = [2_048, 65_536];
/// Receive buffer of each socket: with many outputs there are many sockets.
const BUFFER: usize = 4 << 20;
/// How often the thread looks whether it is to stop, ms.
const TICK: u8 = 20;

/// The sockets and their reader; both end when dropped.
#[derive(Debug)]
pub struct Receivers {
    sockets: Arc<Vec<OwnedFd>>,
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Receivers {
    /// A socket for each group on `iface`. `merges`: with UDP_GRO.
    pub fn start(namespace: &Namespace, iface: &str, groups: &[SocketAddr], merges: bool) -> Result<Self> {
        let open = |group: &SocketAddr| open(iface, *group, merges);
        let sockets = Arc::new(namespace.run(|| groups.iter().map(open).collect::<Result<Vec<_>>>())??);
        let (stop, bytes) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let shared = (Arc::clone(&sockets), Arc::clone(&stop), Arc::clone(&bytes));
        let thread = std::thread::spawn(move || read(&shared.0, SIZES[usize::from(merges)], &shared.1, &shared.2));
        Ok(Self { sockets, stop, bytes, thread: Some(thread) })
    }

    /// Bytes of payload so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Datagrams that the sockets had no room for.
    pub fn drops(&self) -> u64 {
        self.sockets.iter().map(|socket| u64::from(socket::drops(socket.as_fd()))).sum()
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn open(iface: &str, group: SocketAddr, merges: bool) -> Result<OwnedFd> {
    let socket = socket::receiver(iface, None, group)?;
    setsockopt(&socket, sockopt::RcvBuf, &BUFFER).map_err(LabError::io("SO_RCVBUF"))?;
    if merges {
        setsockopt(&socket, sockopt::UdpGroSegment, &true).map_err(LabError::io("UDP_GRO"))?;
    }
    Ok(socket)
}

fn read(sockets: &[OwnedFd], size: usize, stop: &AtomicBool, bytes: &AtomicU64) {
    let mut batch = RecvBatch::new(size, BATCH);
    while !stop.load(Ordering::Relaxed) {
        let mut polled: Vec<PollFd<'_>> = sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        if poll(&mut polled, PollTimeout::from(TICK)).is_err() {
            continue;
        }
        let readable = sockets.iter().zip(&polled).filter(|(_, polled)| polled.any() == Some(true));
        for (socket, _) in readable {
            // Somebody has to have sent it: an error of the socket is no datagram.
            if batch.receive(socket.as_fd()).is_ok() {
                bytes.fetch_add(batch.datagrams().map(|(payload, _)| payload.len() as u64).sum(), Ordering::Relaxed);
            }
        }
    }
}
