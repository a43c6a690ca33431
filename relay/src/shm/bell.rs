//! The bell of a sleep flag: an eventfd, rung only while the other side says it sleeps.
//!
//! Must never wait without a bound.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// An eventfd that can be inherited, polled beside sockets, rung and silenced.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl From<OwnedFd> for Bell {
    /// An inherited or received bell; a descriptor that is none fails when rung or waited for.
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl Bell {
    /// A silent bell, non-blocking, close-on-exec.
    pub fn new() -> nix::Result<Self> {
        EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).map(|bell| Self(bell.into()))
    }

    /// Wakes the sleeper. A bell that is ringing already (counter at its end) needs nothing more.
    pub fn ring(&self) -> nix::Result<()> {
        match nix::unistd::write(&self.0, &1_u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Sleeps until rung, at most `timeout`; says whether it rang. A signal counts as "did not ring".
    pub fn wait(&self, timeout: Duration) -> nix::Result<bool> {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::from(u16::MAX));
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) | Err(Errno::EINTR) => Ok(false),
            Ok(_) => self.silence(),
            Err(errno) => Err(errno),
        }
    }

    /// Takes the ringing away; says whether there was any.
    pub fn silence(&self) -> nix::Result<bool> {
        match nix::unistd::read(&self.0, &mut [0; 8]) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno),
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
