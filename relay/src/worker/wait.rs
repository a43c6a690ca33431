//! When an idle worker sleeps, and for how long: spin, adaptive, poll.
//!
//! The policy is pure (time is a parameter); the sleeping is one poll(). Must never sleep longer than the bound, whatever
//! wakes it.

use crate::plan::manifest::{RELIEVE, WaitMode};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

/// Idle time after which `adaptive` sleeps.
pub const SPIN: Duration = Duration::from_micros(50);
/// Longest sleep while frames are with the kernel for sending: nobody wakes us when they are done.
const BUSY_SLEEP: Duration = Duration::from_millis(1);

/// Whether to sleep, by how long nothing has moved.
#[derive(Clone, Copy, Debug)]
pub struct WaitPolicy {
    mode: WaitMode,
    idle_sleep: Duration,
}

impl WaitPolicy {
    /// A policy that never sleeps longer than `idle_sleep`.
    pub const fn new(mode: WaitMode, idle_sleep: Duration) -> Self {
        Self { mode, idle_sleep }
    }

    /// How long to sleep after `idle` without work; `None`: go on spinning.
    pub fn sleep(&self, idle: Duration, busy: bool) -> Option<Duration> {
        let bound = if busy { BUSY_SLEEP } else { self.idle_sleep };
        match self.mode {
            WaitMode::Spin => None,
            WaitMode::Adaptive => (idle >= SPIN).then_some(bound),
            WaitMode::Poll => Some(bound),
        }
    }
}

/// Sleeps until one of the descriptors is readable or the time is over. Errors (EINTR) are a short sleep.
pub fn sleep(fds: &[BorrowedFd<'_>], timeout: Duration) {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::ZERO);
    let _ = poll(&mut polled, timeout);
}

/// What the life socket says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Nothing new, or a doorbell that has been read.
    Alive,
    /// Nobody holds the other end any more: the supervisor is gone, and so is its keeper if it had one.
    Orphaned,
    /// A supervisor that has not started this process asks it to make way for a successor ([`RELIEVE`]).
    Relieved,
}

/// Packets read in one look; more are left to the next.
const PACKETS: usize = 16;

/// Reads the life socket without waiting.
pub fn life(fd: &OwnedFd) -> Life {
    use nix::sys::socket::{MsgFlags, recv};
    use std::os::fd::AsRawFd;
    let mut bytes = [0; 64];
    for _ in 0..PACKETS {
        match recv(fd.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Life::Orphaned,
            Ok(_) if bytes.first() == Some(&RELIEVE) => return Life::Relieved,
            Ok(_) => {}
            Err(_) => return Life::Alive,
        }
    }
    Life::Alive
}

/// Wakes the supervisor through the life socket; it looks at the status page then.
pub fn knock(fd: &OwnedFd) {
    use nix::sys::socket::{MsgFlags, send};
    use std::os::fd::AsRawFd;
    // A full socket means that it has been woken; a dead supervisor shows at the next reading.
    let _ = send(fd.as_raw_fd(), &[1], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_life_line_tells_a_doorbell_from_an_order_and_from_death() {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        assert_eq!(life(&theirs), Life::Alive);
        (0..3).for_each(|_| knock(&ours));
        assert_eq!(life(&theirs), Life::Alive);
        knock(&ours);
        nix::unistd::write(&ours, &[RELIEVE]).unwrap();
        assert_eq!(life(&theirs), Life::Relieved, "behind a doorbell");
        drop(ours);
        assert_eq!(life(&theirs), Life::Orphaned);
    }

    #[test]
    fn only_an_idle_worker_sleeps_and_never_beyond_its_bound() {
        let long = Duration::from_millis(100);
        let spin = WaitPolicy::new(WaitMode::Spin, long);
        assert_eq!(spin.sleep(Duration::from_secs(9), false), None);
        let adaptive = WaitPolicy::new(WaitMode::Adaptive, long);
        assert_eq!(adaptive.sleep(SPIN / 2, false), None);
        assert_eq!(adaptive.sleep(SPIN, false), Some(long));
        assert_eq!(adaptive.sleep(SPIN, true), Some(BUSY_SLEEP));
        assert_eq!(WaitPolicy::new(WaitMode::Poll, long).sleep(Duration::ZERO, false), Some(long));
    }
}
