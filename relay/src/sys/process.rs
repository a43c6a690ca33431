//! Starting and watching processes: pidfds, exec of a held descriptor as another user, signals; which descriptors are duplicates.
//!
//! Must never decide who runs as whom. The supervisor may have another thread when it forks (the metrics endpoint), so the child
//! makes plain system calls until exec; it allocates nothing and takes no lock.
#![expect(unsafe_code, reason = "fork, execveat, prctl, capset, pidfd_open")]

use super::listener;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// What the child becomes.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// Executable, opened O_PATH (or a sealed memfd).
    pub executable: BorrowedFd<'a>,
    /// argv.
    pub arguments: &'a [CString],
    /// The whole environment.
    pub environment: &'a [CString],
    /// User and group to become; `None`: stay (a user namespace with one uid).
    pub user: Option<(u32, u32)>,
    /// Standard error of the child.
    pub stderr: BorrowedFd<'a>,
    /// Descriptors the child keeps, under the same numbers.
    pub inherit: &'a [RawFd],
    /// Where stdin and stdout point.
    pub null: BorrowedFd<'a>,
    /// Packet socket through which the child sends what hangs up when it ends ([`listener`]); it does not keep it.
    pub listener: Option<BorrowedFd<'a>>,
}

/// A child process.
#[derive(Debug)]
pub struct Child {
    /// Process id.
    pub pid: u32,
    /// Readable once it is dead.
    pub pidfd: OwnedFd,
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain(std::iter::once(std::ptr::null())).collect()
}

/// Forks and executes. The error of a failed exec shows as exit status 127 with a line on the child's stderr.
pub fn spawn(spawn: &Spawn<'_>) -> Result<Child, Errno> {
    let argv = pointers(spawn.arguments);
    let envp = pointers(spawn.environment);
    // SAFETY: the child only makes system calls until it execs or exits, so a lock that another thread holds stops nothing.
    let pid = Errno::result(unsafe { libc::fork() })?;
    if pid == 0 {
        become_child(spawn, &argv, &envp);
    }
    Ok(Child { pid: pid as u32, pidfd: pidfd(pid as u32)? })
}

/// A descriptor of a process, close-on-exec.
pub fn pidfd(pid: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open has no memory arguments.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let pidfd = Errno::result(raw as i32)?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// `KCMP_FILE` (linux/kcmp.h).
const SAME_FILE: i32 = 0;

/// Whether two descriptors of this process are duplicates of each other: one open file description (kcmp(2)). To compare its own a
/// process needs no privilege, but a kernel with CONFIG_KCMP.
pub fn are_duplicates(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> Result<bool, Errno> {
    let pid = std::process::id();
    let (one, other) = (one.as_raw_fd() as libc::c_ulong, other.as_raw_fd() as libc::c_ulong);
    // SAFETY: kcmp has no memory arguments.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, SAME_FILE, one, other) };
    Errno::result(order as i32).map(|order| order == 0)
}

/// Whether the process of a pidfd has ended, ours or not.
pub fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(pidfd, PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Waits until it has; false: not within this time.
pub fn ends_within(pidfd: BorrowedFd<'_>, limit: Duration) -> bool {
    let begin = Instant::now();
    while !has_ended(pidfd) {
        if begin.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// `struct __user_cap_header_struct` and two empty `__user_cap_data_struct` (version 3).
fn clear_capabilities() -> i64 {
    let header: [u32; 2] = [0x2008_0522, 0];
    let data = [0u32; 6];
    // SAFETY: both arrays have the kernel's layout and live through the call.
    unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }
}

fn change_user(uid: u32, gid: u32) -> bool {
    // SAFETY: an empty group list needs no memory.
    let groups = unsafe { libc::setgroups(0, std::ptr::null()) };
    // SAFETY: no memory arguments.
    let group = unsafe { libc::setresgid(gid, gid, gid) };
    // SAFETY: no memory arguments.
    let user = unsafe { libc::setresuid(uid, uid, uid) };
    groups == 0 && group == 0 && user == 0
}

fn keep_open(fd: RawFd) -> bool {
    // SAFETY: fcntl(F_SETFD) has no memory arguments.
    unsafe { libc::fcntl(fd, libc::F_SETFD, 0) == 0 }
}

fn standard(fd: RawFd, target: RawFd) -> bool {
    // SAFETY: dup2 has no memory arguments.
    unsafe { libc::dup2(fd, target) == target }
}

fn no_new_privileges() -> bool {
    // SAFETY: prctl with integer arguments only.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 }
}

fn unblock_signals() {
    let set = nix::sys::signal::SigSet::empty();
    // A child inherits the supervisor's blocked signals (it uses a signalfd); failing leaves them blocked, which only delays SIGTERM.
    let _ = nix::sys::signal::sigprocmask(nix::sys::signal::SigmaskHow::SIG_SETMASK, Some(&set), None);
}

fn become_child(spawn: &Spawn<'_>, argv: &[*const libc::c_char], envp: &[*const libc::c_char]) -> ! {
    unblock_signals();
    let null = spawn.null.as_raw_fd();
    let ready = standard(null, 0)
        && standard(null, 1)
        && standard(spawn.stderr.as_raw_fd(), 2)
        && spawn.inherit.iter().all(|fd| keep_open(*fd))
        && spawn.user.is_none_or(|(uid, gid)| change_user(uid, gid))
        && clear_capabilities() == 0
        && no_new_privileges();
    if ready {
        if let Some(socket) = spawn.listener {
            listener::send_through(socket.as_raw_fd());
        }
        exec(spawn.executable.as_raw_fd(), argv, envp);
    }
    fail(c"worker: could not be set up or executed\n");
}

fn exec(fd: RawFd, argv: &[*const libc::c_char], envp: &[*const libc::c_char]) {
    // SAFETY: argv and envp are null-terminated arrays of C strings that live until exec replaces them.
    unsafe { libc::syscall(libc::SYS_execveat, fd, c"".as_ptr(), argv.as_ptr(), envp.as_ptr(), libc::AT_EMPTY_PATH) };
}

fn fail(message: &CStr) -> ! {
    // SAFETY: the message is valid for its length.
    unsafe { libc::write(2, message.as_ptr().cast(), message.count_bytes()) };
    // SAFETY: ends the process at once, without running destructors of the parent's state.
    unsafe { libc::_exit(127) }
}

/// `struct sched_attr`, first version (48 bytes), as sched_setattr(2) describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct SchedulingAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Asks for a short scheduler slice (EEVDF, Linux 6.12 and later: `sched_runtime` of an ordinary thread, clamped by the kernel
/// to 0.1–100 ms): the thread gets no more of a contended CPU, but gets it sooner when it wakes. Children inherit it. An
/// older kernel ignores it. Needs no privilege.
pub fn short_slice(slice: std::time::Duration) -> Result<(), Errno> {
    let mut attributes = SchedulingAttributes { size: 48, ..SchedulingAttributes::default() };
    // SAFETY: the kernel writes at most `size` bytes of the structure that it is given.
    let read = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, 48, 0) };
    Errno::result(read as i32)?;
    if attributes.policy != libc::SCHED_OTHER as u32 {
        return Ok(());
    }
    attributes.runtime = slice.as_nanos() as u64;
    // SAFETY: the kernel reads `size` bytes of the structure that it is given.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    Errno::result(set as i32).map(drop)
}

/// Sends a signal through a pidfd (no reuse of process ids).
pub fn signal(pidfd: BorrowedFd<'_>, signal: Signal) -> Result<(), Errno> {
    // SAFETY: no memory is passed (siginfo is null).
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as i32, std::ptr::null::<u8>(), 0) };
    Errno::result(result as i32).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn duplicates_are_told_from_descriptors_of_the_same_kind() {
        let (one, other) = (pidfd(std::process::id()).unwrap(), pidfd(std::process::id()).unwrap());
        let copy = one.try_clone().unwrap();
        assert_eq!(are_duplicates(one.as_fd(), copy.as_fd()), Ok(true));
        assert_eq!(are_duplicates(one.as_fd(), other.as_fd()), Ok(false));
    }
}
