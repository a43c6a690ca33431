//! Our ring against rtrb, gil and crossbeam, so that anybody can check the claim: `cargo bench -p relay --bench rings`.
//!
//! 16-byte descriptors, two pinned cores, 1024 slots, rounds interleaved; a ratio above 1 means that we are faster.
//! RELAY_BENCH_ITERS and RELAY_BENCH_ROUNDS change messages a round (4,000,000) and rounds (9). Run it on a quiet machine.
#![expect(unsafe_code, reason = "gil commits a filled buffer by an unsafe function")]

use anyhow::{Context, Result};
use relay::lab::ringbench::measure::{Place, percentile, ping_pong, summary, throughput};
use relay::lab::ringbench::queues::{self, CAPACITY, Ends, Message, Receives, Sends};
use std::num::NonZeroUsize;

type Descriptor = [u64; 2];

struct Rtrb<E>(E);

impl Sends for Rtrb<rtrb::Producer<Descriptor>> {
    fn send(&mut self, first: u64, count: u32) -> u32 {
        if count == 1 {
            return u32::from(self.0.push(Descriptor::numbered(first)).is_ok());
        }
        let count = (count as usize).min(self.0.slots());
        let Ok(chunk) = self.0.write_chunk_uninit(count) else { return 0 };
        chunk.fill_from_iter((first..first + count as u64).map(Descriptor::numbered)) as u32
    }
}

impl Receives for Rtrb<rtrb::Consumer<Descriptor>> {
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32 {
        if count == 1 {
            let Ok(message) = self.0.pop() else { return 0 };
            *sum = sum.wrapping_add(message.number());
            return 1;
        }
        let count = (count as usize).min(self.0.slots());
        let Ok(chunk) = self.0.read_chunk(count) else { return 0 };
        let (first, second) = chunk.as_slices();
        *sum = first.iter().chain(second).fold(*sum, |sum, message| sum.wrapping_add(message.number()));
        chunk.commit_all();
        count as u32
    }
}

struct Gil<E>(E);

impl Sends for Gil<gil::spsc::Sender<Descriptor>> {
    fn send(&mut self, first: u64, count: u32) -> u32 {
        if count == 1 {
            return u32::from(self.0.try_send(Descriptor::numbered(first)).is_ok());
        }
        let mut done = 0;
        for slot in self.0.write_buffer().iter_mut().take(count as usize) {
            slot.write(Descriptor::numbered(first + done));
            done += 1;
        }
        // SAFETY: exactly the first `done` elements of the write buffer were just initialised.
        unsafe { self.0.commit(done as usize) };
        done as u32
    }
}

impl Receives for Gil<gil::spsc::Receiver<Descriptor>> {
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32 {
        if count == 1 {
            let Some(message) = self.0.try_recv() else { return 0 };
            *sum = sum.wrapping_add(message.number());
            return 1;
        }
        let mut guard = self.0.read_guard();
        let taken = guard.as_slice().iter().take(count as usize);
        let done = taken.len();
        *sum = taken.fold(*sum, |sum, message| sum.wrapping_add(message.number()));
        guard.advance(done);
        done as u32
    }
}

struct Crossbeam<E>(E);

impl Sends for Crossbeam<crossbeam_channel::Sender<Descriptor>> {
    fn send(&mut self, first: u64, count: u32) -> u32 {
        (first..first + u64::from(count)).take_while(|number| self.0.try_send(Descriptor::numbered(*number)).is_ok()).count() as u32
    }
}

impl Receives for Crossbeam<crossbeam_channel::Receiver<Descriptor>> {
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32 {
        for done in 0..count {
            let Ok(message) = self.0.try_recv() else { return done };
            *sum = sum.wrapping_add(message.number());
        }
        count
    }
}

fn rtrb_ends() -> Result<Ends> {
    let (producer, consumer) = rtrb::RingBuffer::new(CAPACITY as usize);
    Ok((Box::new(Rtrb(producer)), Box::new(Rtrb(consumer))))
}

fn gil_ends() -> Result<Ends> {
    let (sender, receiver) = gil::spsc::channel(NonZeroUsize::new(CAPACITY as usize).context("no capacity")?);
    Ok((Box::new(Gil(sender)), Box::new(Gil(receiver))))
}

fn crossbeam_ends() -> Result<Ends> {
    let (sender, receiver) = crossbeam_channel::bounded(CAPACITY as usize);
    Ok((Box::new(Crossbeam(sender)), Box::new(Crossbeam(receiver))))
}

type Arm = (&'static str, fn() -> Result<Ends>);
const ARMS: [Arm; 6] = [
    ("relay", queues::lockfree::<Descriptor>),
    ("relay in place", queues::in_place::<Descriptor>),
    ("relay broadcast", queues::broadcasting::<Descriptor>),
    ("rtrb", rtrb_ends),
    ("gil", gil_ends),
    ("crossbeam-channel", crossbeam_ends),
];

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn main() -> Result<()> {
    let (iters, rounds) = (number("RELAY_BENCH_ITERS", 4_000_000), number("RELAY_BENCH_ROUNDS", 9));
    let place = Place::choose(false, false)?;
    let lines = ping_pong(place, 100_000)?;
    println!("two-line ping-pong: {} ns p50, {} ns p99", percentile(&lines, 0.5), percentile(&lines, 0.99));
    for batch in [1, 32] {
        let mut found = ARMS.map(|_| (Vec::new(), 0));
        for _ in 0..rounds {
            for ((_, make), (times, preempted)) in ARMS.iter().zip(&mut found) {
                let (ns, preemptions) = throughput(make()?, place, iters, batch)?;
                times.push(ns);
                *preempted += preemptions;
            }
        }
        let medians: Vec<_> = found.iter_mut().map(|(times, preempted)| (summary(times), *preempted)).collect();
        let ours = medians.first().map_or(1.0, |((median, ..), _)| *median);
        for ((name, _), ((median, min, max), preempted)) in ARMS.iter().zip(medians) {
            println!(
                "batch {batch:2}  {name:18} {median:7.2} ns  ({min:.2}–{max:.2})  ÷ relay {:.2}  preempted {preempted}",
                median / ours
            );
        }
    }
    Ok(())
}
