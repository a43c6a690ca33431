//! The supervisor's own list of system calls, closed when the relay is set up: what it may still ask of the kernel, and what the
//! processes that it starts need before they close their own, shorter list (a filter is inherited; all of them must agree).
//!
//! | calls | for | checked arguments |
//! |---|---|---|
//! | openat … getdents64 | configuration, control socket's path, /proc, segments | ioctl: the four that are used |
//! | socket … shutdown | control socket, netlink, memberships, AF_PACKET and AF_XDP of ports that come | socket: six families |
//! | poll … sched_yield | sleep | |
//! | mmap … brk | memory | executable memory: files only; never made executable |
//! | bpf | maps, links of the programs it has | no program, no type, nothing pinned, nobody else's object |
//! | kcmp | which descriptors the service manager's store has already | duplicates only |
//! | clone … pidfd_send_signal | workers and the keeper, threads | clone: no namespace; execveat: by descriptor |
//! | prctl … setresuid | what a child gives up | prctl: names, privileges given up |
//! | io_uring_* … | what workers do behind their own filter | |
//!
//! Anything else fails with ENOSYS, as on a kernel that does not have it: the C library then takes an older call (`clone` for `clone3`),
//! and where there is none, the supervisor reports an error and its workers forward on. Killing it would end the relay for a
//! call that nobody has thought of, and stop no attack that a refusal does not. Must never be a list of what is forbidden.

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;

/// Calls with any arguments.
const CALLS: &[i64] = &[
    // Files and descriptors.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_mkdirat,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_memfd_create,
    // Sockets.
    libc::SYS_socketpair,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Waiting, time.
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Processes and threads.
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_prlimit64,
    libc::SYS_getrandom,
    libc::SYS_uname,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getattr,
    libc::SYS_sched_setattr,
    // What a child gives up.
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_seccomp,
    // What workers do.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// Older names of the same that this architecture's C library still uses.
#[cfg(target_arch = "x86_64")]
const OLDER: &[i64] = &[
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_stat,
    libc::SYS_access,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_mkdir,
    libc::SYS_readlink,
    libc::SYS_chmod,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[i64] = &[];

const FAMILIES: [i32; 6] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET, libc::AF_XDP];

/// `SIOCETHTOOL`.
const ETHTOOL: u64 = 0x8946;

const IOCTLS: [u64; 4] = [ETHTOOL, libc::FIONBIO, libc::FIOCLEX, libc::TCGETS];

const PRCTLS: [i32; 7] = [
    libc::PR_SET_NAME,
    libc::PR_SET_DUMPABLE,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_GET_NO_NEW_PRIVS,
    libc::PR_CAPBSET_READ,
    libc::PR_CAPBSET_DROP,
    libc::PR_CAP_AMBIENT,
];

/// `enum bpf_cmd`: maps are made, read, written and frozen (0–4, 22, 24–27), somebody else's program is asked for its name (11, 13, 15),
/// links are made, updated and taken away (17, 28, 29, 34).
const BPF: [u64; 17] = [0, 1, 2, 3, 4, 11, 13, 15, 17, 22, 24, 25, 26, 27, 28, 29, 34];

/// Whether two descriptors are duplicates.
const KCMP_FILE: u64 = 0;

/// Flags of `clone` that make a namespace.
const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// Closes the list for all threads of the process, those to come, and its children. There is no way back.
pub(super) fn close() -> Result<(), seccompiler::Error> {
    let arch = std::env::consts::ARCH.try_into()?;
    let refuse = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let program: BpfProgram = SeccompFilter::new(rules()?, refuse, SeccompAction::Allow, arch)?.try_into()?;
    seccompiler::apply_filter_all_threads(&program)
}

/// Allowed calls and, where arguments are checked, the alternatives. An empty list allows any arguments.
fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let no_exec = || SeccompCondition::new(2, Len::Qword, Op::MaskedEq(libc::PROT_EXEC as u64), 0);
    let a_file = SeccompCondition::new(4, Len::Dword, Op::Ne, u64::from(u32::MAX))?;
    let no_namespace = SeccompCondition::new(0, Len::Qword, Op::MaskedEq(u64::from(NAMESPACES.cast_unsigned())), 0)?;
    let by_descriptor = SeccompCondition::new(4, Len::Dword, Op::Eq, libc::AT_EMPTY_PATH as u64)?;
    let mut rules = BTreeMap::from([
        (libc::SYS_mmap, vec![SeccompRule::new(vec![no_exec()?])?, SeccompRule::new(vec![a_file])?]),
        (libc::SYS_mprotect, vec![SeccompRule::new(vec![no_exec()?])?]),
        (libc::SYS_clone, vec![SeccompRule::new(vec![no_namespace])?]),
        (libc::SYS_execveat, vec![SeccompRule::new(vec![by_descriptor])?]),
        (libc::SYS_socket, any_of(0, FAMILIES.map(i64::from).map(i64::cast_unsigned))?),
        (libc::SYS_ioctl, any_of(1, IOCTLS)?),
        (libc::SYS_prctl, any_of(0, PRCTLS.map(i64::from).map(i64::cast_unsigned))?),
        (libc::SYS_bpf, any_of(0, BPF)?),
        (libc::SYS_kcmp, any_of(2, [KCMP_FILE])?),
    ]);
    rules.extend(CALLS.iter().chain(OLDER).map(|call| (*call, Vec::new())));
    Ok(rules)
}

/// One rule for each value of an argument.
fn any_of<const N: usize>(argument: u8, values: [u64; N]) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |value| SeccompRule::new(vec![SeccompCondition::new(argument, Len::Dword, Op::Eq, value)?]);
    values.into_iter().map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::sandbox::{self, Parts};

    /// Filters add up: what a worker's or the keeper's own list allows must be in this one, or they die of an error.
    #[test]
    fn children_find_their_calls_in_the_list() {
        let rules = rules().unwrap();
        for (split, packet, coalesce) in [(false, false, false), (true, false, true), (false, true, true), (true, true, false)] {
            let parts = Parts { split, packet, coalesce, spare: true, ports: 2 };
            let missing: Vec<i64> = sandbox::calls(parts).into_iter().filter(|call| !rules.contains_key(call)).collect();
            assert!(missing.is_empty(), "{parts:?}: {missing:?}");
        }
        let missing: Vec<i64> = crate::keeper::calls().into_iter().filter(|call| !rules.contains_key(call)).collect();
        assert!(missing.is_empty(), "keeper: {missing:?}");
    }

    #[test]
    fn the_list_has_no_way_out() {
        let rules = rules().unwrap();
        for call in [
            libc::SYS_execve,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_clone3,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_kexec_load,
            libc::SYS_reboot,
            libc::SYS_perf_event_open,
            libc::SYS_keyctl,
            libc::SYS_kill,
        ] {
            assert!(!rules.contains_key(&call), "{call}");
        }
        // BPF_PROG_LOAD, BPF_OBJ_PIN, BPF_BTF_LOAD
        assert!([5, 6, 18].iter().all(|command| !BPF.contains(command)));
    }
}
