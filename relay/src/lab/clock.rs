//! Time, CPU affinity and context switches of the calling thread. Must never sleep.

use super::error::{LabError, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// CLOCK_MONOTONIC in ns: the same for all processes and namespaces of a host.
pub fn monotonic_ns() -> u64 {
    read_ns(ClockId::CLOCK_MONOTONIC)
}

/// CLOCK_REALTIME in ns, the clock of the kernel's receive time stamps.
pub fn realtime_ns() -> u64 {
    read_ns(ClockId::CLOCK_REALTIME)
}

fn read_ns(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |t| t.tv_sec().unsigned_abs() * 1_000_000_000 + t.tv_nsec().unsigned_abs())
}

/// Binds the calling thread to one CPU.
pub fn pin_thread(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).map_err(LabError::io(format!("CPU {cpu}")))?;
    sched_setaffinity(Pid::from_raw(0), &set).map_err(LabError::io(format!("binding to CPU {cpu}")))
}

/// CPUs the calling thread may use.
pub fn allowed_cpus() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return vec![0] };
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}

/// Involuntary context switches of all threads of a process so far; 0 when it is gone.
pub fn involuntary_switches(pid: u32) -> u64 {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    tasks.flatten().map(|task| switches_of(&task.path().join("status"))).sum()
}

/// Involuntary context switches of the calling thread so far.
pub fn own_involuntary_switches() -> u64 {
    switches_of("/proc/thread-self/status".as_ref())
}

fn switches_of(status: &std::path::Path) -> u64 {
    let text = std::fs::read_to_string(status).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:")).and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}
