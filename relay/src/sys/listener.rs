//! A descriptor that hangs up when a process has made its last step: the listener of a system call filter (seccomp_unotify(2)).
//!
//! A pidfd tells of a death when the kernel has cleared the process away, milliseconds later where it had much memory. A filter is
//! given back before that, by each thread when it can't come back to its own code any more (Linux 6.11 and later, `do_exit()`; older
//! kernels do it after the pidfd), and with the last of them the listener hangs up. No process can take its filter off, so
//! nothing else makes it hang up. The filter allows everything: the kernel knows that from its first look on and doesn't run it.
//! Must never answer for a system call, nor be relied on: a kernel without it, or a process that has a listener already (some
//! containers'), is watched by its pidfd alone.
#![expect(unsafe_code, reason = "seccomp, and a message of plain memory between fork and exec")]

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{BorrowedFd, RawFd};

/// A message's control part with one descriptor: `struct cmsghdr` and the descriptor, aligned and filled up (cmsg(3)).
#[repr(C, align(8))]
struct Rights {
    header: libc::cmsghdr,
    fd: RawFd,
    fill: i32,
}

/// Gives this process the filter, and sends its listener through a socket: one byte with one descriptor, or nothing. Allocates nothing. The
/// descriptor that is left here is closed by exec.
pub(super) fn send_through(socket: RawFd) {
    let mut allow = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
    let program = libc::sock_fprog { len: 1, filter: &raw mut allow };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    // SAFETY: the kernel copies the program of one instruction, which lives through the call.
    let listener = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if listener >= 0 {
        send(socket, listener as RawFd);
    }
}

fn send(socket: RawFd, fd: RawFd) {
    let header = libc::cmsghdr {
        cmsg_len: (size_of::<libc::cmsghdr>() + size_of::<RawFd>()) as _,
        cmsg_level: libc::SOL_SOCKET,
        cmsg_type: libc::SCM_RIGHTS,
    };
    let mut rights = Rights { header, fd, fill: 0 };
    let mut byte = 0_u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: a structure of numbers and pointers, for which zeros are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    (message.msg_control, message.msg_controllen) = ((&raw mut rights).cast(), size_of::<Rights>() as _);
    // SAFETY: all that the message points to lives through the call.
    unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
}

/// Whether the process of a listener has made its last step. POLLHUP alone says so: a look that a signal cut short is POLLERR.
pub fn has_hung_up(listener: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(listener, PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).is_ok() && polled.iter().any(|fd| fd.revents().is_some_and(|is| is.contains(PollFlags::POLLHUP)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::{Spawn, signal, spawn};
    use nix::sys::signal::Signal;
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    #[test]
    fn it_hangs_up_when_the_process_ends_and_not_before() {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (sleep, null) = (File::open("/bin/sleep").unwrap(), File::open("/dev/null").unwrap());
        let child = spawn(&Spawn {
            executable: sleep.as_fd(),
            arguments: &[c"sleep".into(), c"20".into()],
            environment: &[],
            user: None,
            stderr: null.as_fd(),
            inherit: &[],
            null: null.as_fd(),
            listener: Some(theirs.as_fd()),
        })
        .unwrap();
        drop(theirs);
        let (_, descriptors) = crate::shm::share::receive_with(ours.as_fd(), &mut [0], MsgFlags::empty()).unwrap();
        let listener = descriptors.first();
        let hung_up_before = listener.map(|listener| has_hung_up(listener.as_fd()));
        signal(child.pidfd.as_fd(), Signal::SIGKILL).unwrap();
        let begin = Instant::now();
        while listener.is_some_and(|listener| !has_hung_up(listener.as_fd())) && begin.elapsed() < Duration::from_secs(10) {
            // A kernel before 6.11 gives the filter back when the process is reaped.
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child.pid as i32), Some(nix::sys::wait::WaitPidFlag::WNOHANG));
            std::thread::sleep(Duration::from_millis(1));
        }
        match listener {
            None => println!("SKIPPED: this process has a listener already, or the kernel has none to give"),
            Some(listener) => assert_eq!((hung_up_before, has_hung_up(listener.as_fd())), (Some(false), true)),
        }
    }
}
