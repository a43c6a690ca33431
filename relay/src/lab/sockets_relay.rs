//! The baseline anyone would write first: join, recvmmsg, sendmmsg. No rewriting but the destination; blocking; one thread.
//!
//! Reported beside every figure of the relay (LIMITS: "always report this baseline too"). Must stay as plain as it is.

use super::error::{LabError, Result};
use super::netns::Namespace;
use super::socket::{self, RecvBatch};
use super::{clock, recv::Subscription};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Datagrams per system call.
const BATCH: usize = 64;
/// Largest datagram relayed.
const SIZE: usize = 2_048;

/// From where to where.
#[derive(Clone, Debug)]
pub struct Route {
    /// Interface to join on.
    pub ingress: String,
    /// What to join.
    pub from: Subscription,
    /// Interface to send from.
    pub egress: String,
    /// New destination.
    pub to: SocketAddr,
    /// TTL of what is sent.
    pub ttl: u8,
    /// CPU to run on.
    pub cpu: Option<usize>,
}

/// A running plain-socket relay; stops when dropped.
#[derive(Debug)]
pub struct SocketsRelay {
    stop: Arc<AtomicBool>,
    relayed: Arc<AtomicU64>,
    task: Arc<AtomicI32>,
    thread: Option<JoinHandle<()>>,
}

impl SocketsRelay {
    /// Joined and running when this returns.
    pub fn start(namespace: &Namespace, route: &Route) -> Result<Self> {
        let (receiver, sender) = namespace.run(|| open(route))??;
        let (stop, relayed, task) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default(), Arc::<AtomicI32>::default());
        let (to, cpu) = (route.to, route.cpu);
        let shared = (Arc::clone(&stop), Arc::clone(&relayed), Arc::clone(&task));
        let thread = std::thread::spawn(move || {
            // An unpinned baseline is still a baseline; the bench checks the CPUs before.
            let _ = cpu.map(clock::pin_thread);
            shared.2.store(nix::unistd::gettid().as_raw(), Ordering::Relaxed);
            forward(&receiver, &sender, to, &shared.0, &shared.1);
        });
        Ok(Self { stop, relayed, task, thread: Some(thread) })
    }

    /// Datagrams sent on so far.
    pub fn relayed(&self) -> u64 {
        self.relayed.load(Ordering::Relaxed)
    }

    /// Involuntary context switches of its thread so far.
    pub fn preemptions(&self) -> u64 {
        clock::thread_switches(self.task.load(Ordering::Relaxed))
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for SocketsRelay {
    fn drop(&mut self) {
        self.join();
    }
}

fn open(route: &Route) -> Result<(OwnedFd, OwnedFd)> {
    let receiver = socket::receiver(&route.ingress, route.from.source, route.from.group)?;
    setsockopt(&receiver, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20)).map_err(LabError::io("SO_RCVTIMEO"))?;
    let sender = socket::sender(&route.egress, route.to, None, route.ttl, 0)?;
    Ok((receiver, sender))
}

/// The whole relay.
fn forward(receiver: &OwnedFd, sender: &OwnedFd, to: SocketAddr, stop: &AtomicBool, relayed: &AtomicU64) {
    let mut batch = RecvBatch::new(SIZE, BATCH);
    while !stop.load(Ordering::Relaxed) {
        if batch.receive(receiver.as_fd()).is_ok() {
            let sent = batch.forward(sender.as_fd(), to).unwrap_or(0);
            relayed.fetch_add(sent as u64, Ordering::Relaxed);
        }
    }
}
