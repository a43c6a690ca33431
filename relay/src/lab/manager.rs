//! A service manager for tests: the descriptor store of systemd, as its manual describes it (sd_notify(3), sd_listen_fds(3)).
//!
//! Keeps what a service stores until it is removed by name, or dropped with the manager. Must never close a descriptor by itself:
//! everything comes with FDPOLL=0.

use crate::shm::share::receive_with;
use crate::sys::process::are_duplicates;
use nix::sys::socket::MsgFlags;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// The manager's end of `NOTIFY_SOCKET`, and what it keeps.
#[derive(Debug)]
pub struct Manager {
    socket: UnixDatagram,
    stored: Vec<(String, OwnedFd)>,
}

impl Manager {
    /// Listens at a path, which is for `NOTIFY_SOCKET`.
    pub fn listen(path: &Path) -> io::Result<Self> {
        Ok(Self { socket: UnixDatagram::bind(path)?, stored: Vec::new() })
    }

    /// Takes at most `limit` of the messages that are there; how many there were.
    pub fn hear(&mut self, limit: usize) -> usize {
        (0..limit).take_while(|_| self.take_message()).count()
    }

    /// Names and descriptors, the last one first, as systemd passes them on.
    pub fn stored(&self) -> impl Iterator<Item = &(String, OwnedFd)> {
        self.stored.iter().rev()
    }

    fn take_message(&mut self) -> bool {
        let mut buffer = [0; 4096];
        let Ok((len, descriptors)) = receive_with(self.socket.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) else { return false };
        let text = String::from_utf8_lossy(buffer.get(..len).unwrap_or_default()).into_owned();
        let is_said = |line: &str| text.lines().any(|said| said == line);
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
        if is_said("FDSTOREREMOVE=1") {
            self.stored.retain(|(kept, _)| kept != name);
        } else if is_said("FDSTORE=1") && is_said("FDPOLL=0") {
            for fd in descriptors {
                let is_kept = |(_, kept): &(String, OwnedFd)| are_duplicates(kept.as_fd(), fd.as_fd()).unwrap_or(false);
                if !self.stored.iter().any(is_kept) {
                    self.stored.push((name.to_owned(), fd));
                }
            }
        }
        true
    }
}
