//! Time, CPU affinity, and what disturbs a measurement: context switches, the backlog, the machine's slow state. Must never sleep.

use super::error::{LabError, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicU64, Ordering};

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

/// Involuntary context switches of one thread of this process so far.
pub fn thread_switches(tid: i32) -> u64 {
    switches_of(format!("/proc/self/task/{tid}/status").as_ref())
}

fn switches_of(status: &std::path::Path) -> u64 {
    let text = std::fs::read_to_string(status).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:")).and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

/// Packets that the kernel dropped between interface and stack, all CPUs and namespaces (second column of softnet_stat).
pub fn softnet_drops() -> u64 {
    let text = std::fs::read_to_string("/proc/net/softnet_stat").unwrap_or_default();
    text.lines().filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok()).sum()
}

/// Round trip of one cache line between two CPUs, ns: tells the machine's fast state from its slow one (LIMITS, rule 4).
pub fn ping_pong_ns(first: usize, second: usize) -> Result<f64> {
    const ROUNDS: u64 = 50_000;
    let ball = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| {
            pin_thread(second)?;
            (0..ROUNDS).for_each(|round| pass(&ball, 2 * round + 1));
            Ok(())
        });
        let serve = scope.spawn(|| {
            pin_thread(first)?;
            pass(&ball, 0);
            let begin = monotonic_ns();
            (1..ROUNDS).for_each(|round| pass(&ball, 2 * round));
            Ok((monotonic_ns() - begin) as f64 / ROUNDS as f64)
        });
        answer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        serve.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Waits until the ball is at `from` and plays it on. Yields now and then, lest two players on one CPU wait a time slice each.
fn pass(ball: &AtomicU64, from: u64) {
    let mut spins = 0u32;
    while ball.compare_exchange(from, from + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        spins = spins.wrapping_add(1);
        if spins.is_multiple_of(4096) {
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
}
