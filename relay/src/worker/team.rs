//! Workers as threads: the shared-nothing library on which lifecycle, errors, order and scaling are tested without a NIC.
//!
//! Each worker owns its state (made in its own thread, never shared) and the consuming end of one ring; the team owns the
//! producing ends. Nothing else is shared: no lock, no counter. The relay's own workers are processes with the same hooks
//! (adopt → prime → turn → drain); this is library API, and what `relay bench workers` measures scaling with.
//!
//! ```
//! use relay::worker::team::{Hooks, Team};
//! use std::time::Duration;
//!
//! struct Sum(u64);
//! impl Hooks<u64> for Sum {
//!     fn handle(&mut self, message: u64) {
//!         self.0 += message;
//!     }
//!     fn shutdown(self) -> u64 {
//!         self.0
//!     }
//! }
//! let mut team = Team::new(1, 64)?;
//! let worker = team.add(None, || Sum(0))?;
//! (1..=10).try_for_each(|message| team.send(worker, message))?;
//! assert_eq!(team.stop(worker, Duration::from_secs(1))?.result, 55);
//! # Ok::<(), relay::worker::error::Error>(())
//! ```
//! Must never wait without a bound.

use super::error::Error;
use crate::ring::{Consumer, Producer, heap};
use bytemuck::Pod;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most messages a worker takes in one turn.
pub const BATCH: u32 = 64;
const NAP: Duration = Duration::from_micros(50);

/// The hooks of a worker; all of them run in its own thread.
pub trait Hooks<T: Pod>: 'static {
    /// Before the first message.
    fn init(&mut self) {}
    /// One message.
    fn handle(&mut self, message: T);
    /// After the last message; what it returns is the worker's result.
    fn shutdown(self) -> u64;
}

#[derive(Debug)]
struct Running<T: Pod> {
    ring: Producer<T>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
    sent: u64,
}

/// What a worker did, counted by the sending side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Messages sent to it.
    pub sent: u64,
    /// What its `shutdown` returned.
    pub result: u64,
}

/// A fixed number of places for workers.
#[derive(Debug)]
pub struct Team<T: Pod + Send> {
    places: Vec<Option<Running<T>>>,
    ring_size: u32,
}

impl<T: Pod + Send> Team<T> {
    /// `size` places, rings of `ring_size` slots.
    pub fn new(size: u32, ring_size: u32) -> Result<Self, Error> {
        match (size, ring_size.is_power_of_two()) {
            (0, _) => Err(Error::InvalidConfig { field: "workers", problem: "0: at least one is needed" }),
            (_, false) => Err(Error::InvalidConfig { field: "ring size", problem: "not a power of two" }),
            _ => Ok(Self { places: (0..size).map(|_| None).collect(), ring_size }),
        }
    }

    /// Starts a worker in the first free place; says which.
    pub fn add<H: Hooks<T>>(&mut self, cpu: Option<usize>, make: impl FnOnce() -> H + Send + 'static) -> Result<u32, Error> {
        let free = self.places.iter().position(Option::is_none).ok_or(Error::PoolFull(self.places.len() as u32))?;
        self.start(free as u32, cpu, make)?;
        Ok(free as u32)
    }

    /// Starts worker `id`, on `cpu` if given. `make` runs in its thread, so its state need not be `Send`.
    pub fn start<H: Hooks<T>>(&mut self, id: u32, cpu: Option<usize>, make: impl FnOnce() -> H + Send + 'static) -> Result<(), Error> {
        let ring_size = self.ring_size;
        let place = self.places.get_mut(id as usize).ok_or(Error::WorkerNotFound(id))?;
        if place.is_some() {
            return Err(Error::WorkerAlreadyRunning(id));
        }
        check_cpu(cpu)?;
        let (ring, consumer) = heap::<T>(ring_size).map_err(|error| Error::Other(error.to_string()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let body = move || {
            cpu.map_or(Ok(()), pin)?;
            Ok(run(make(), consumer, &stopped))
        };
        let body = move || body().unwrap_or_else(|error: Error| std::panic::resume_unwind(Box::new(error.to_string())));
        let thread =
            std::thread::Builder::new().name(format!("worker-{id}")).spawn(body).map_err(|error| Error::Other(error.to_string()))?;
        *place = Some(Running { ring, stop, thread, sent: 0 });
        Ok(())
    }

    /// Sends to worker `id`; never waits.
    pub fn send(&mut self, id: u32, message: T) -> Result<(), Error> {
        let running = self.running(id)?;
        if running.thread.is_finished() {
            return Err(Error::ReceiveError(id));
        }
        running.ring.push(message).map_err(|_| Error::SendError(id))?;
        running.sent += 1;
        Ok(())
    }

    /// Lets worker `id` drain its ring and leave, at most `limit`; its place is free then. After a time-out it may be asked again.
    pub fn stop(&mut self, id: u32, limit: Duration) -> Result<Finished, Error> {
        let running = self.running(id)?;
        running.stop.store(true, Ordering::Release);
        let start = Instant::now();
        while !running.thread.is_finished() {
            if start.elapsed() >= limit {
                return Err(Error::Timeout { id, limit });
            }
            std::thread::sleep(NAP);
        }
        let running = self.places.get_mut(id as usize).and_then(Option::take).ok_or(Error::WorkerNotRunning(id))?;
        let sent = running.sent;
        running.thread.join().map(|result| Finished { sent, result }).map_err(|panic| Error::WorkerPanicked { id, message: said(&*panic) })
    }

    fn running(&mut self, id: u32) -> Result<&mut Running<T>, Error> {
        self.places.get_mut(id as usize).ok_or(Error::WorkerNotFound(id))?.as_mut().ok_or(Error::WorkerNotRunning(id))
    }
}

/// init → turns → drain → shutdown.
fn run<T: Pod, H: Hooks<T>>(mut hooks: H, mut ring: Consumer<T>, stop: &AtomicBool) -> u64 {
    hooks.init();
    loop {
        // Read before the ring: whatever was sent before the stop is seen below.
        let stopping = stop.load(Ordering::Acquire);
        let count = ring.available().min(BATCH);
        for offset in 0..count {
            hooks.handle(ring.read(offset));
        }
        ring.release(count);
        if count == 0 {
            if stopping {
                return hooks.shutdown();
            }
            std::thread::sleep(NAP);
        }
    }
}

fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

fn check_cpu(cpu: Option<usize>) -> Result<(), Error> {
    let Some(cpu) = cpu else { return Ok(()) };
    let allowed = sched_getaffinity(Pid::from_raw(0)).map_err(|errno| Error::Other(format!("sched_getaffinity: {errno}")))?;
    let is_allowed = allowed.is_set(cpu).unwrap_or(false);
    if is_allowed { Ok(()) } else { Err(Error::InvalidConfig { field: "--cpus", problem: "names a CPU that this process may not use" }) }
}

/// Pins the calling thread to one CPU and reads it back.
pub fn pin(cpu: usize) -> Result<(), Error> {
    let wrong = |errno| Error::Other(format!("sched_setaffinity to CPU {cpu}: {errno}"));
    let mut set = CpuSet::new();
    set.set(cpu).map_err(wrong)?;
    sched_setaffinity(Pid::from_raw(0), &set).map_err(wrong)?;
    let now = sched_getaffinity(Pid::from_raw(0)).map_err(wrong)?;
    if now == set { Ok(()) } else { Err(Error::Other(format!("pinned to CPU {cpu}, but the kernel says otherwise"))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    const LONG: Duration = Duration::from_secs(20);

    /// Sums what it gets; checks the order; panics or sleeps if told to.
    struct Sum(u64, u64);

    impl Hooks<u64> for Sum {
        fn init(&mut self) {
            self.0 = 0;
        }

        fn handle(&mut self, message: u64) {
            match message {
                u64::MAX => panic!("as told"),
                1_000_000.. => std::thread::sleep(Duration::from_nanos(message)),
                _ => {
                    assert!(message >= self.1, "out of order");
                    self.1 = message;
                    self.0 += message;
                }
            }
        }

        fn shutdown(self) -> u64 {
            self.0
        }
    }

    const fn sum() -> Sum {
        Sum(77, 0)
    }

    /// 003.12: shutdown sequences.
    #[test]
    fn req_003_6_shutdown_drains_in_order_and_bounded() {
        let mut team = Team::new(2, 128).unwrap();
        assert_eq!((team.add(None, sum), team.add(None, sum)), (Ok(0), Ok(1)));
        for message in 1..=100 {
            team.send(0, message).unwrap();
        }
        assert_eq!(team.stop(0, LONG), Ok(Finished { sent: 100, result: 5050 }));
        assert_eq!(team.stop(1, LONG), Ok(Finished { sent: 0, result: 0 }));
    }

    #[test]
    fn req_003_9_every_error_is_produced() {
        assert!(matches!(Team::<u64>::new(0, 8), Err(Error::InvalidConfig { field: "workers", .. })));
        assert!(matches!(Team::<u64>::new(1, 7), Err(Error::InvalidConfig { field: "ring size", .. })));
        assert!(Team::<u64>::new(1, 1 << 31).is_ok());
        let mut huge = Team::<u64>::new(1, 1 << 31).unwrap();
        assert!(matches!(huge.add(None, sum), Err(Error::Other(_))), "the ring says no");
        assert!(matches!(crate::worker::partition::Partitioner::new(Default::default(), 0), Err(Error::PartitionError(_))));
        let mut team = Team::new(1, 2).unwrap();
        assert_eq!(team.send(0, 1), Err(Error::WorkerNotRunning(0)));
        assert_eq!(team.send(9, 1), Err(Error::WorkerNotFound(9)));
        team.start(0, None, sum).unwrap();
        assert_eq!(team.start(0, None, sum), Err(Error::WorkerAlreadyRunning(0)));
        assert_eq!(team.add(None, sum), Err(Error::PoolFull(1)));
        team.send(0, 300_000_000).unwrap(); // sleeps 300 ms over it
        let full = (0..10).find_map(|_| team.send(0, 1).err());
        assert_eq!(full, Some(Error::SendError(0)));
        let short = Duration::from_millis(1);
        assert_eq!(team.stop(0, short), Err(Error::Timeout { id: 0, limit: short }));
        team.stop(0, LONG).unwrap();
        team.start(0, None, sum).unwrap();
        team.send(0, u64::MAX).unwrap();
        let start = Instant::now();
        while team.send(0, 1) != Err(Error::ReceiveError(0)) {
            assert!(start.elapsed() < LONG);
        }
        assert_eq!(team.stop(0, LONG), Err(Error::WorkerPanicked { id: 0, message: "as told".into() }));
        assert!(Error::Timeout { id: 0, limit: short }.exit_code() == 1 && Error::WorkerNotFound(1).exit_code() == 2);
    }

    #[test]
    fn req_003_1_a_panic_in_one_worker_changes_nothing_for_the_other() {
        let mut team = Team::new(2, 64).unwrap();
        (0..2).for_each(|id| team.start(id, None, sum).unwrap());
        team.send(0, u64::MAX).unwrap();
        (1..=60).for_each(|message| team.send(1, message).unwrap());
        assert!(matches!(team.stop(0, LONG), Err(Error::WorkerPanicked { id: 0, .. })));
        assert_eq!(team.stop(1, LONG), Ok(Finished { sent: 60, result: 1830 }));
        team.start(0, None, sum).unwrap();
        team.send(0, 5).unwrap();
        assert_eq!(team.stop(0, LONG), Ok(Finished { sent: 1, result: 5 }), "restarted");
    }

    #[test]
    fn req_003_7_affinity_is_set_read_back_and_refused_with_a_remedy() {
        let mut team = Team::new(2, 8).unwrap();
        let allowed = (0..CpuSet::count()).find(|cpu| check_cpu(Some(*cpu)).is_ok()).unwrap();
        team.start(0, Some(allowed), sum).unwrap();
        assert!(team.stop(0, LONG).is_ok());
        let forbidden = (0..CpuSet::count()).find(|cpu| check_cpu(Some(*cpu)).is_err()).unwrap();
        assert!(matches!(team.start(1, Some(forbidden), sum), Err(Error::InvalidConfig { field: "--cpus", .. })));
        std::thread::spawn(move || pin(allowed).unwrap()).join().unwrap();
    }
}
