//! One process of a worker, as the supervisor holds it: pidfd, orders, life line, log.
//!
//! Must never wait for it, nor take more from it at a time than a bound.

use crate::plan::manifest::Control;
use crate::shm::share::receive_with;
use crate::sys::process::{self, Child};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, recv, send};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Bytes of one log line of a worker; the rest of a longer one is cut.
const MAX_LINE: usize = 1024;

/// How a line begins that the standard library writes when memory can't be had. The process then ends by abort(), which takes calls
/// that a worker's box does not have: all that its end would say is SIGSYS.
const NO_MEMORY: &[u8] = b"memory allocation of ";

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) child: Child,
    pub(super) listener: Listener,
    /// None of another supervisor's child.
    pub(super) control: Option<Control>,
    pub(super) life: Option<OwnedFd>,
    pub(super) log: Option<OwnedFd>,
    line: Vec<u8>,
    /// It has said that it has no memory.
    starved: bool,
}

/// What hangs up when a process has made its last step (sys/listener.rs).
#[derive(Debug)]
pub(super) enum Listener {
    /// It has none: another supervisor's child, a kernel that has none to give, or nobody who would wait for it.
    None,
    /// It sends it through this socket before it is executed.
    ToCome(OwnedFd),
    /// Here it is.
    Here(OwnedFd),
}

impl Listener {
    /// To be asked for when the process has run: what has not come by then does not come.
    fn get(&mut self) -> Option<BorrowedFd<'_>> {
        if let Self::ToCome(socket) = self {
            let message = receive_with(socket.as_fd(), &mut [0], MsgFlags::MSG_DONTWAIT);
            *self = message.ok().and_then(|(_, mut descriptors)| descriptors.pop()).map_or(Self::None, Self::Here);
        }
        if let Self::Here(listener) = &*self { Some(listener.as_fd()) } else { None }
    }
}

/// How a process ended.
pub(super) struct End {
    pub(super) words: String,
    /// As asked.
    pub(super) clean: bool,
}

impl Process {
    pub(super) const fn new(
        child: Child,
        listener: Listener,
        control: Option<Control>,
        life: Option<OwnedFd>,
        log: Option<OwnedFd>,
    ) -> Self {
        Self { child, listener, control, life, log, line: Vec::new(), starved: false }
    }

    /// What tells of its end: its pidfd, and earlier than that its listener, where it has sent one.
    pub(super) fn ends(&mut self) -> (BorrowedFd<'_>, Option<BorrowedFd<'_>>) {
        (self.child.pidfd.as_fd(), self.listener.get())
    }

    /// What to poll: pidfd, log pipe, life socket (a worker knocks when it forwards).
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let optional = [self.log.as_ref(), self.life.as_ref()].into_iter().flatten();
        optional.chain([&self.child.pidfd]).map(AsFd::as_fd)
    }

    /// Puts a byte on its life line; it wakes by it.
    pub(super) fn tell(&self, byte: u8) {
        let life = self.life.as_ref().map(AsRawFd::as_raw_fd);
        // A full line means that it will wake up anyway.
        let _ = life.map(|life| send(life, &[byte], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL));
    }

    /// Takes the knocks from the life socket; what they mean stands in the status page. Whether there were any. The socket of one that
    /// is dying is let go at its end: polled on, it would wake the supervisor without end, on the CPU that the process needs to be cleared away.
    pub(super) fn hear(&mut self) -> bool {
        let mut heard = false;
        let mut bytes = [0; 64];
        // Bounded: a worker that knocks without end can't hold the supervisor.
        for _ in 0..4 {
            let Some(life) = &self.life else { break };
            match recv(life.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => self.life = None,
                Ok(_) => heard = true,
                Err(_) => break,
            }
        }
        heard
    }

    pub(super) fn kill(&self) {
        // ESRCH: it is dead already, and end() will see it.
        let _ = process::signal(self.child.pidfd.as_fd(), Signal::SIGKILL);
    }

    /// How it ended, if it has. `halted`: whether it has said that it left as asked; to be read when it is dead.
    pub(super) fn end(&self, halted: impl Fn() -> bool) -> Option<End> {
        let (words, clean) = match waitpid(Pid::from_raw(self.child.pid as i32), Some(WaitPidFlag::WNOHANG)) {
            // Another supervisor's child: how it ended is known to nobody but its status segment.
            Err(Errno::ECHILD) if process::has_ended(self.child.pidfd.as_fd()) => {
                let halted = halted();
                (if halted { "made way" } else { "ended without a supervisor" }.into(), halted)
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return None,
            Ok(status) => describe(&status),
        };
        Some(End { words, clean })
    }

    /// The words of its end, once its log has been read: with what it has said itself.
    pub(super) fn explain(&self, words: String) -> String {
        if self.starved { format!("out of memory, {words}") } else { words }
    }

    /// Passes on what it has written to its stderr, and lets go of a pipe that has ended (as [`Self::hear`]).
    pub(super) fn read_log(&mut self, worker: u32) {
        let Some(log) = &self.log else { return };
        let mut bytes = [0; 4096];
        let Ok(mut pipe) = log.try_clone().map(std::fs::File::from) else { return };
        // Bounded, so that a worker that floods its log can't hold the supervisor.
        for _ in 0..16 {
            let len = match pipe.read(&mut bytes) {
                Ok(0) => {
                    self.log = None;
                    return;
                }
                Err(_) => return,
                Ok(len) => len,
            };
            for byte in bytes.iter().take(len) {
                match byte {
                    b'\n' => {
                        self.starved |= self.line.starts_with(NO_MEMORY);
                        tracing::info!(worker, "{}", String::from_utf8_lossy(&self.line));
                        self.line.clear();
                    }
                    _ if self.line.len() < MAX_LINE => self.line.push(*byte),
                    _ => {}
                }
            }
        }
    }
}

fn describe(status: &WaitStatus) -> (String, bool) {
    match status {
        WaitStatus::Exited(_, code) => (format!("exit status {code}"), *code == 0),
        WaitStatus::Signaled(_, signal, _) => (format!("killed by {signal}"), false),
        other => (format!("{other:?}"), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    /// Else they stay readable, and the supervisor turns without a pause until the process is cleared away.
    #[test]
    fn what_a_dying_process_has_closed_is_not_polled_again() {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (log, stderr) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let pid = std::process::id();
        let child = Child { pid, pidfd: process::pidfd(pid).unwrap() };
        let mut process = Process::new(child, Listener::None, None, Some(ours), Some(log));
        send(theirs.as_raw_fd(), &[1], MsgFlags::empty()).unwrap();
        assert!(process.hear());
        process.read_log(0);
        assert_eq!(process.descriptors().count(), 3);
        drop((theirs, stderr));
        assert!(!process.hear());
        process.read_log(0);
        assert_eq!(process.descriptors().count(), 1, "its pidfd");
    }
}
