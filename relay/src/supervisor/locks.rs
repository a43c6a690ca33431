//! One relay per ingress interface of a network namespace: an abstract Unix socket is the lock.
//!
//! The kernel frees it with the last holder; workers inherit it and the keeper has it, so that living orphans block a start
//! too (004.4).
//! Must never leave anything in a file system.

use super::error::RunError;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket, sockopt::PeerCredentials,
};
use nix::unistd::Pid;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Workers of a dead relay leave within 40 ms (`--linger 0`), later on a machine without a free CPU; a start waits for so long.
const ORPHANS_LEAVE: Duration = Duration::from_millis(500);

/// The lock of one interface.
#[derive(Debug)]
pub struct Lock {
    /// The listening socket.
    pub fd: OwnedFd,
}

fn address(ifindex: u32) -> Result<UnixAddr, Errno> {
    UnixAddr::new_abstract(format!("relay-ingress-{ifindex}").as_bytes())
}

impl Lock {
    /// Takes a lock over; from now on it bears this process's credentials.
    pub fn adopt(fd: OwnedFd) -> Result<Self, Errno> {
        listen(&fd, Backlog::new(1)?)?;
        Ok(Self { fd })
    }
}

/// Takes the lock of an interface, or says who holds it.
pub fn take(ifindex: u32, name: &str) -> Result<Lock, RunError> {
    let begin = Instant::now();
    // Asked once: nobody accepts the connection that asks, and the queue for them is short.
    let mut asked = None;
    loop {
        match try_take(ifindex) {
            Ok(lock) => return Ok(lock),
            Err(Errno::EADDRINUSE) => {}
            Err(errno) => return Err(RunError::failure(format!("lock of interface {name}: {errno}"))),
        }
        let maker = *asked.get_or_insert_with(|| holder(ifindex).ok());
        let alive = maker.is_none_or(|pid| !matches!(kill(Pid::from_raw(pid), None), Err(Errno::ESRCH)));
        let maker = maker.map_or_else(|| "another relay".into(), |pid| format!("pid {pid}"));
        if alive {
            let hint = "stop that relay, or add the rule to it with `relay rule add`";
            return Err(RunError::bad("ingress", format!("interface {name} is served by {maker} already"), hint));
        }
        if begin.elapsed() >= ORPHANS_LEAVE {
            let hint = "use --takeover, or wait until its --linger is over";
            return Err(RunError::bad("ingress", format!("interface {name} is served by orphans of {maker}"), hint));
        }
        std::thread::sleep(ORPHANS_LEAVE / 50);
    }
}

fn try_take(ifindex: u32) -> Result<Lock, Errno> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), &address(ifindex)?)?;
    listen(&fd, Backlog::new(1)?)?;
    Ok(Lock { fd })
}

/// Process that made the lock (its credentials at listen()).
fn holder(ifindex: u32) -> Result<i32, Errno> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    connect(fd.as_raw_fd(), &address(ifindex)?)?;
    Ok(getsockopt(&fd, PeerCredentials)?.pid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn req_004_4_second_holder_is_refused_with_the_pid_of_the_first() {
        let first = take(4_000_000_001, "test0").unwrap();
        let refused = take(4_000_000_001, "test0").unwrap_err();
        assert!(refused.to_string().contains(&std::process::id().to_string()), "{refused}");
        assert_eq!(refused.exit_code(), 2);
        let heir = Lock::adopt(first.fd.try_clone().unwrap()).unwrap();
        drop(first);
        assert!(take(4_000_000_001, "test0").is_err(), "handed on");
        drop(heir);
        take(4_000_000_001, "test0").unwrap();
    }
}
