//! The box a worker closes around itself before it forwards: what it may still ask of the kernel.
//!
//! | calls | for | checked arguments |
//! |---|---|---|
//! | sendto | wake-up of a TX ring; a knock on the life socket | no buffer, or at most one byte |
//! | recvfrom | life socket, wake-up of a fill ring | |
//! | poll | sleep (ppoll on other architectures than x86-64) | |
//! | write | standard error | at most 4 KiB |
//! | mmap, munmap, mremap, brk | the table of new rules | anonymous, never executable |
//! | clock_gettime | machines whose clock is not in the vDSO | |
//! | restart_syscall | a sleep that SIGSTOP has cut | |
//! | sigaltstack, exit_group | the end | |
//! | futex, sched_yield | split only: sleep and end of the egress thread, crowded CPUs | |
//! | fcntl | a spare only: the locks of what it is to write, once its worker is dead | F_OFD_SETLK |
//! | sendmmsg | ports that send super-frames | |
//! | getsockopt, io_uring_enter, io_uring_register, recvmmsg, sendmmsg | packet ports only | register: ENABLE_RINGS alone |
//!
//! 12 calls for AF_XDP ports, 14 when split, one more in a spare. Anything else kills the process (SECCOMP_RET_KILL_PROCESS); the supervisor sees
//! SIGSYS, counts a restart and starts a successor. tests/tests/syscalls.rs looks for calls nobody makes. Two it does not see made are kept,
//! since who makes them is not ours: the C library asks by clock_gettime where the kernel's clock source has no vDSO (some virtual
//! machines), and lets a large block grow by mremap. Must be closed after the last thread was started, and never be opened: the kernel
//! has no call for that.

use libc::{
    SYS_brk, SYS_clock_gettime, SYS_exit_group, SYS_fcntl, SYS_futex, SYS_getsockopt, SYS_io_uring_enter, SYS_io_uring_register, SYS_mmap,
    SYS_mremap, SYS_munmap, SYS_recvfrom, SYS_recvmmsg, SYS_restart_syscall, SYS_sched_yield, SYS_sendmmsg, SYS_sendto, SYS_sigaltstack,
    SYS_write,
};
use nix::sys::resource::{Resource, setrlimit};
use seccompiler::{BackendError, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompFilter, SeccompRule};
use std::collections::BTreeMap;

/// Longest text a worker writes at once.
const MAX_WRITE: u64 = 4096;
/// `IORING_REGISTER_ENABLE_RINGS`.
const ENABLE_RINGS: u64 = 12;

/// What the worker is made of; each part needs calls of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Two threads.
    pub split: bool,
    /// A port of the packet path.
    pub packet: bool,
    /// A port that sends super-frames.
    pub coalesce: bool,
    /// It waits to stand in for a worker.
    pub spare: bool,
    /// Ports (descriptors to poll).
    pub ports: usize,
}

/// Why the box could not be closed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The filter could not be made or was refused.
    #[error("system call filter: {0}")]
    Filter(#[from] seccompiler::Error),
    /// A limit was refused.
    #[error("resource limits: {0}")]
    Limits(#[from] nix::errno::Errno),
}

/// Closes the box around all threads of the process.
pub fn close(parts: Parts) -> Result<(), SandboxError> {
    // Other processes of the worker's user can't look into it, and it leaves no core with packets in it.
    nix::sys::prctl::set_dumpable(false)?;
    limit(parts)?;
    let program: seccompiler::BpfProgram = filter(parts)?;
    Ok(seccompiler::apply_filter_all_threads(&program)?)
}

fn limit(parts: Parts) -> Result<(), nix::errno::Errno> {
    // poll() refuses more descriptors than the process may open.
    let descriptors = parts.ports as u64 * 2 + 8;
    for (resource, value) in
        [(Resource::RLIMIT_NOFILE, descriptors), (Resource::RLIMIT_CORE, 0), (Resource::RLIMIT_NPROC, 0), (Resource::RLIMIT_FSIZE, 0)]
    {
        setrlimit(resource, value, value)?;
    }
    Ok(())
}

fn filter(parts: Parts) -> Result<seccompiler::BpfProgram, seccompiler::Error> {
    let arch = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules(parts)?, SeccompAction::KillProcess, SeccompAction::Allow, arch)?;
    Ok(filter.try_into()?)
}

/// Allowed calls and, where arguments are checked, the alternatives. An empty list allows any arguments.
fn rules(parts: Parts) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let anonymous = vec![
        SeccompCondition::new(2, Len::Qword, Op::MaskedEq(libc::PROT_EXEC as u64), 0)?,
        SeccompCondition::new(4, Len::Dword, Op::Eq, u64::from(u32::MAX))?,
    ];
    let mut rules = BTreeMap::from([
        (SYS_sendto, vec![one(1, Op::Eq, 0)?, one(2, Op::Le, 1)?]),
        (SYS_write, vec![one(2, Op::Le, MAX_WRITE)?]),
        (SYS_mmap, vec![SeccompRule::new(anonymous)?]),
    ]);
    let mut allow = vec![
        SYS_recvfrom,
        SYS_munmap,
        SYS_mremap,
        SYS_brk,
        SYS_clock_gettime,
        SYS_restart_syscall,
        SYS_sigaltstack,
        SYS_exit_group,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_poll,
        #[cfg(not(target_arch = "x86_64"))]
        libc::SYS_ppoll,
    ];
    if parts.split {
        allow.extend([SYS_futex, SYS_sched_yield]);
    }
    if parts.spare {
        rules.insert(SYS_fcntl, vec![one(1, Op::Eq, libc::F_OFD_SETLK as u64)?]);
    }
    if parts.coalesce {
        allow.push(SYS_sendmmsg);
    }
    if parts.packet {
        rules.insert(SYS_io_uring_register, vec![one(1, Op::Eq, ENABLE_RINGS)?]);
        allow.extend([SYS_getsockopt, SYS_io_uring_enter, SYS_recvmmsg, SYS_sendmmsg]);
    }
    rules.extend(allow.into_iter().map(|call| (call, Vec::new())));
    Ok(rules)
}

fn one(argument: u8, operator: Op, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, Len::Qword, operator, value)?])
}

/// Numbers of the calls on a worker's list.
#[cfg(test)]
pub(crate) fn calls(parts: Parts) -> Vec<i64> {
    rules(parts).unwrap().into_keys().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_are_short_and_have_no_way_out() {
        let xsk = rules(Parts { ports: 2, ..Parts::default() }).unwrap();
        let split = rules(Parts { split: true, ports: 2, ..Parts::default() }).unwrap();
        let spare = rules(Parts { split: true, ports: 2, spare: true, ..Parts::default() }).unwrap();
        assert_eq!((xsk.len(), split.len(), spare.len()), (12, 14, 15));
        for call in [
            libc::SYS_socket,
            libc::SYS_openat,
            libc::SYS_execveat,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_ptrace,
            libc::SYS_mprotect,
            libc::SYS_bpf,
        ] {
            assert!(!spare.contains_key(&call), "{call}");
        }
        assert!(filter(Parts { packet: true, split: true, coalesce: true, spare: true, ports: 2 }).is_ok());
    }
}
