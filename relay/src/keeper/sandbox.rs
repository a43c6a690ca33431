//! The box of the keeper: sockets it has, memory, time, the end. It can open nothing, make nothing, signal nobody.
//!
//! Anything outside the list kills it (SECCOMP_RET_KILL_PROCESS); the supervisor starts another.

use nix::sys::resource::{Resource, setrlimit};
use seccompiler::{SeccompAction, SeccompFilter};
use std::collections::BTreeMap;

pub(super) const CALLS: [i64; 19] = [
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_close,
    // The standard library checks a descriptor before it closes it, in builds with assertions.
    libc::SYS_fcntl,
    libc::SYS_ppoll,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Closes the box.
pub(super) fn close() -> Result<(), seccompiler::Error> {
    // Refusals leave what there is: the filter is the wall.
    let _ = nix::sys::prctl::set_dumpable(false);
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let mut rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>> = CALLS.into_iter().map(|call| (call, Vec::new())).collect();
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_poll, Vec::new());
    let arch = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch)?;
    let program: seccompiler::BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)
}
