//! How figures are taken: two pinned threads, a start line, a clock, and what disturbed them.
//!
//! Must never report a figure without the disturbances of its own run.

use super::queues::{Ends, Patience, Receives, Sends};
use crate::ring::memory::{Heap, Memory, Words};
use crate::worker::team::pin;
use anyhow::{Context, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Where and how the two sides run.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// CPU of the sending side.
    pub sender: usize,
    /// CPU of the receiving side.
    pub receiver: usize,
    /// Run SCHED_FIFO priority 1.
    pub fifo: bool,
}

impl Place {
    /// The first two CPUs this process may use (the first twice if `same_core`).
    pub fn choose(same_core: bool, fifo: bool) -> Result<Self> {
        let set = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).context("sched_getaffinity")?;
        let mut allowed = (0..nix::sched::CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false));
        let sender = allowed.next().context("no CPU is allowed")?;
        let receiver = if same_core { Some(sender) } else { allowed.next() };
        let receiver = receiver.context("--same-core is needed: this process may use one CPU only")?;
        Ok(Self { sender, receiver, fifo })
    }

    /// Whether the two sides share a CPU, so that waiting means yielding.
    pub const fn same_core(self) -> bool {
        self.sender == self.receiver
    }

    /// Pins the calling thread to `cpu`.
    pub fn enter(self, cpu: usize) -> Result<()> {
        pin(cpu)?;
        if self.fifo { super::fifo::enter().context("SCHED_FIFO (needs CAP_SYS_NICE)") } else { Ok(()) }
    }
}

/// Involuntary context switches of the calling thread so far.
pub fn preemptions() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.involuntary_context_switches())
}

/// One round: nanoseconds a message, and preemptions of both sides.
pub fn throughput(ends: Ends, place: Place, count: u64, batch: u32) -> Result<(f64, i64)> {
    let (mut sender, mut receiver) = ends;
    let start_line = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let entered = place.enter(place.sender);
            let before = preemptions();
            start_line.wait();
            entered.and_then(|()| sender.send_all(count, batch, place.same_core())).map(|()| preemptions() - before)
        });
        let receiving = scope.spawn(|| {
            let entered = place.enter(place.receiver);
            let before = preemptions();
            start_line.wait();
            let start = Instant::now();
            let outcome = entered.and_then(|()| receiver.receive_all(count, batch, place.same_core()));
            outcome.map(|()| (start.elapsed(), preemptions() - before))
        });
        let (elapsed, received) = receiving.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
        let sent = sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok((elapsed.as_nanos() as f64 / count as f64, sent + received))
    })
}

/// Round trips of one message through a pair of queues: sorted nanoseconds.
pub fn round_trips(there: Ends, back: Ends, place: Place, count: u64) -> Result<Vec<u64>> {
    let ((mut ask, mut hear), (mut answer, mut listen)) = (there, back);
    std::thread::scope(|scope| {
        let echo = scope.spawn(move || {
            place.enter(place.receiver)?;
            echo_all(&mut *hear, &mut *answer, count, place.same_core())
        });
        let asking = scope.spawn(move || {
            place.enter(place.sender)?;
            ask_all(&mut *ask, &mut *listen, count, place.same_core())
        });
        let times = asking.join().map_err(|_| anyhow::anyhow!("the asking side panicked"))?;
        echo.join().map_err(|_| anyhow::anyhow!("the echo panicked"))??;
        times
    })
}

/// Sends one message, waits for its echo, `count` times.
pub fn ask_all(ask: &mut dyn Sends, listen: &mut dyn Receives, count: u64, same_core: bool) -> Result<Vec<u64>> {
    let mut times = Vec::with_capacity(count as usize);
    let mut patience = Patience::new(same_core);
    let mut before = Instant::now();
    for number in 0..count {
        patience.until(|| ask.send(number, 1))?;
        let mut echoed = 0;
        patience.until(|| listen.receive(1, &mut echoed))?;
        ensure!(echoed == number, "asked {number}, heard {echoed}");
        let now = Instant::now();
        times.push((now - before).as_nanos() as u64);
        before = now;
    }
    times.sort_unstable();
    Ok(times)
}

/// Sends back what comes, `count` times.
pub fn echo_all(hear: &mut dyn Receives, answer: &mut dyn Sends, count: u64, same_core: bool) -> Result<()> {
    let mut patience = Patience::new(same_core);
    for _ in 0..count {
        let mut number = 0;
        patience.until(|| hear.receive(1, &mut number))?;
        patience.until(|| answer.send(number, 1))?;
    }
    Ok(())
}

/// Round trips of two bare cache lines: what no ring can beat.
pub fn ping_pong(place: Place, count: u64) -> Result<Vec<u64>> {
    let memory: Arc<dyn Memory> = Arc::new(Heap::new(512));
    let words = Words::new(memory, 0, 64).context("memory too small")?;
    let (ping, pong) = (words.get(16).context("no word")?, words.get(48).context("no word")?);
    std::thread::scope(|scope| {
        let echo = scope.spawn(move || {
            place.enter(place.receiver)?;
            let mut patience = Patience::new(place.same_core());
            for number in 1..=count {
                patience.until(|| u32::from(ping.load(Ordering::Acquire) == number))?;
                pong.store(number, Ordering::Release);
            }
            anyhow::Ok(())
        });
        let asking = scope.spawn(move || {
            place.enter(place.sender)?;
            let mut times = Vec::with_capacity(count as usize);
            let mut patience = Patience::new(place.same_core());
            let mut before = Instant::now();
            for number in 1..=count {
                ping.store(number, Ordering::Release);
                patience.until(|| u32::from(pong.load(Ordering::Acquire) == number))?;
                let now = Instant::now();
                times.push((now - before).as_nanos() as u64);
                before = now;
            }
            times.sort_unstable();
            anyhow::Ok(times)
        });
        let times = asking.join().map_err(|_| anyhow::anyhow!("the asking side panicked"))?;
        echo.join().map_err(|_| anyhow::anyhow!("the echo panicked"))??;
        times
    })
}

/// The value below which `part` (0–1) of the sorted values lie.
pub fn percentile(sorted: &[u64], part: f64) -> u64 {
    let index = ((sorted.len() as f64 * part) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or(0)
}

/// Median, best and worst of the rounds.
pub fn summary(rounds: &mut [f64]) -> (f64, f64, f64) {
    rounds.sort_by(f64::total_cmp);
    let at = |index: usize| rounds.get(index).copied().unwrap_or(0.0);
    (at(rounds.len() / 2), at(0), at(rounds.len().saturating_sub(1)))
}
