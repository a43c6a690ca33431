//! Time, CPU affinity, and what disturbs a measurement: context switches, the backlog, the machine's slow state, the times a CPU
//! stands still. Must never sleep.

use super::error::{LabError, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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

/// What a CPU's own machine takes of it: the times that a thread which only looks at the clock stood still.
#[derive(Clone, Debug, Default)]
pub struct Stops {
    /// Each of them, ns.
    stops: Vec<u64>,
    watched_ns: u64,
}

/// Shorter ones are the look at the clock itself.
const SHORTEST_STOP_NS: u64 = 1_000;
/// Most that are kept.
const MAX_STOPS: usize = 1 << 20;

impl Stops {
    /// Looks at the clock on `cpu` and does nothing else: interrupts, other threads and the host of a virtual machine show as steps.
    pub fn watch(cpu: usize, length: Duration) -> Result<Self> {
        pin_thread(cpu)?;
        let mut stops = Vec::with_capacity(MAX_STOPS);
        let begin = monotonic_ns();
        let mut last = begin;
        while u128::from(last - begin) < length.as_nanos() {
            let now = monotonic_ns();
            if now - last >= SHORTEST_STOP_NS && stops.len() < MAX_STOPS {
                stops.push(now - last);
            }
            last = now;
        }
        Ok(Self { stops, watched_ns: last - begin })
    }

    /// Both together.
    pub fn add(&mut self, other: &Self) {
        self.stops.extend_from_slice(&other.stops);
        self.watched_ns += other.watched_ns;
    }

    /// Share of the time.
    pub fn share(&self) -> f64 {
        self.stops.iter().sum::<u64>() as f64 / self.watched_ns.max(1) as f64
    }

    /// How long at most, ns, such a share of packets that arrive evenly would have to wait for that CPU if it took no time for them.
    pub fn wait_ns(&self, share: f64) -> f64 {
        let mut longest_first = self.stops.clone();
        longest_first.sort_unstable_by(|a, b| b.cmp(a));
        // Longer than x waits who arrives in a stop of length s > x, more than x before its end.
        let late_ns = (1.0 - share) * self.watched_ns as f64;
        let (mut sum, mut wait) = (0.0, 0.0f64);
        for (number, stop) in longest_first.iter().enumerate() {
            if wait >= *stop as f64 {
                break;
            }
            sum += *stop as f64;
            wait = ((sum - late_ns) / (number + 1) as f64).max(0.0);
        }
        wait
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_arrives_in_a_stop_waits_for_its_end() {
        // 1 s with a stop of 10 ms and one of 2 ms: late are 1.2 %, half of a percent by more than 5 ms.
        let stops = Stops { stops: vec![2_000_000, 10_000_000], watched_ns: 1_000_000_000 };
        assert!((stops.share() - 0.012).abs() < 1e-9);
        let near = |share: f64, wanted: f64| assert!((stops.wait_ns(share) - wanted).abs() < 1.0, "{share}: {}", stops.wait_ns(share));
        near(0.5, 0.0);
        near(0.99, 1_000_000.0);
        near(0.995, 5_000_000.0);
        near(0.999, 9_000_000.0);
        near(1.0, 10_000_000.0);
        let mut twice = stops.clone();
        twice.add(&stops);
        assert!((twice.share() - stops.share()).abs() < 1e-9 && (twice.wait_ns(0.99) - stops.wait_ns(0.99)).abs() < 1.0);
        assert_eq!(Stops::default().wait_ns(0.99), 0.0);
    }

    #[test]
    fn a_cpu_that_two_threads_want_stands_still() {
        let cpu = allowed_cpus()[0];
        let stop = std::sync::atomic::AtomicBool::new(false);
        let share = std::thread::scope(|scope| {
            scope.spawn(|| {
                pin_thread(cpu).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop()
                }
            });
            let stops = scope.spawn(|| Stops::watch(cpu, Duration::from_millis(100))).join().unwrap();
            stop.store(true, Ordering::Relaxed);
            stops.unwrap().share()
        });
        assert!((0.1..=1.0).contains(&share), "{share}");
    }
}
