//! The contestants: each carries numbered messages of a fixed size from one side to the other.
//!
//! Ours: the ring and the broadcast. The others show the price of what ours leaves out: a lock, shared lines, a second producer,
//! a system call. Must never be used outside the bench.

use crate::ring::memory::Heap;
use crate::ring::{Consumer, Gate, GateLine, Memory, Producer, Publisher, Received, Subscriber, Words, broadcast, heap};
use anyhow::{Context, Result, ensure};
use bytemuck::Pod;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Slots of every queue.
pub const CAPACITY: u32 = 1024;
/// Largest batch.
pub const MAX_BATCH: u32 = 64;

/// A message: its number, and as many words more as its size has.
pub trait Message: Pod + Send {
    /// The message with this number.
    fn numbered(number: u64) -> Self;
    /// Its number.
    fn number(&self) -> u64;
}

macro_rules! message {
    ($words:literal) => {
        impl Message for [u64; $words] {
            #[inline]
            fn numbered(number: u64) -> Self {
                [number; $words]
            }

            #[inline]
            fn number(&self) -> u64 {
                self.iter().copied().fold(0, |a, b| a | b)
            }
        }
    };
}
message!(1);
message!(2);
message!(8);

/// Longest that one measurement may take.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Waiting with a bound, without looking at the clock each time.
#[derive(Debug)]
pub struct Patience {
    same_core: bool,
    tries: u32,
    start: Instant,
}

impl Patience {
    /// Spins, or yields the CPU if the other side needs it.
    pub fn new(same_core: bool) -> Self {
        Self { same_core, tries: 0, start: Instant::now() }
    }

    /// Waits a moment; an error once the measurement has taken [`LIMIT`].
    #[inline]
    pub fn wait(&mut self) -> Result<()> {
        if self.same_core {
            std::thread::yield_now()
        } else {
            core::hint::spin_loop()
        }
        self.tries = self.tries.wrapping_add(1);
        ensure!(self.tries & 0xfff != 0 || self.start.elapsed() < LIMIT, "not done within {LIMIT:?}: ask for fewer --iters");
        Ok(())
    }

    /// Waits until `attempt` has moved something.
    #[inline]
    pub fn until(&mut self, mut attempt: impl FnMut() -> u32) -> Result<()> {
        while attempt() == 0 {
            self.wait()?;
        }
        Ok(())
    }
}

/// The sending side.
pub trait Sends: Send {
    /// Sends up to `count` messages numbered from `first`; says how many went.
    fn send(&mut self, first: u64, count: u32) -> u32;

    /// Sends `count` messages. Gives up after [`LIMIT`]. (Here, so that each kind has a loop of its own.)
    fn send_all(&mut self, count: u64, batch: u32, same_core: bool) -> Result<()> {
        let mut patience = Patience::new(same_core);
        let mut number = 0;
        while number < count {
            let sent = self.send(number, batch.min((count - number).min(u64::from(u32::MAX)) as u32));
            number += u64::from(sent);
            if sent == 0 {
                patience.wait().with_context(|| format!("the receiver takes no more: {number} of {count} sent"))?;
            }
        }
        Ok(())
    }
}

/// The receiving side.
pub trait Receives: Send {
    /// Receives up to `count` messages, adds their numbers to `sum`; says how many came.
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32;

    /// Receives `count` messages and checks the sum of their numbers. Gives up after [`LIMIT`].
    fn receive_all(&mut self, count: u64, batch: u32, same_core: bool) -> Result<()> {
        let mut patience = Patience::new(same_core);
        let (mut got, mut sum) = (0, 0);
        while got < count {
            let came = self.receive(batch.min((count - got).min(u64::from(u32::MAX)) as u32), &mut sum);
            got += u64::from(came);
            if came == 0 {
                patience.wait().with_context(|| format!("nothing more comes: {got} of {count} received"))?;
            }
        }
        let expected = (0..count).fold(0, u64::wrapping_add);
        ensure!(sum == expected, "messages were lost, repeated or torn: their numbers sum to {sum}, not {expected}");
        Ok(())
    }
}

/// Both ends of a queue.
pub type Ends = (Box<dyn Sends>, Box<dyn Receives>);

// Ours, copying.

struct Copying<E>(E);

impl<T: Message> Sends for Copying<Producer<T>> {
    fn send(&mut self, first: u64, count: u32) -> u32 {
        let count = self.0.free_for(count).min(count);
        for offset in 0..count {
            self.0.write(offset, T::numbered(first + u64::from(offset)));
        }
        self.0.publish(count);
        count
    }
}

impl<T: Message> Receives for Copying<Consumer<T>> {
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32 {
        let count = self.0.available_for(1).min(count);
        for offset in 0..count {
            *sum = sum.wrapping_add(self.0.read(offset).number());
        }
        self.0.release(count);
        count
    }
}

/// Our ring.
pub fn lockfree<T: Message>() -> Result<Ends> {
    let (producer, consumer) = heap::<T>(CAPACITY)?;
    Ok(ring_ends(producer, consumer))
}

/// Our ring's ends, wherever it lies.
pub fn ring_ends<T: Message>(producer: Producer<T>, consumer: Consumer<T>) -> Ends {
    (Box::new(Copying(producer)), Box::new(Copying(consumer)))
}

/// One end of our ring.
pub fn ring_sender<T: Message>(producer: Producer<T>) -> Box<dyn Sends> {
    Box::new(Copying(producer))
}

/// The other.
pub fn ring_receiver<T: Message>(consumer: Consumer<T>) -> Box<dyn Receives> {
    Box::new(Copying(consumer))
}

// Ours, in place.

struct InPlace<E>(E);

impl<T: Message> Sends for InPlace<Producer<T>> {
    fn send(&mut self, first: u64, count: u32) -> u32 {
        let mut number = first;
        for part in self.0.reserve(count) {
            for slot in part {
                *slot = T::numbered(number);
                number += 1;
            }
        }
        let count = (number - first) as u32;
        self.0.publish(count);
        count
    }
}

impl<T: Message> Receives for InPlace<Consumer<T>> {
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32 {
        let count = self.0.available_for(1).min(count);
        let parts = self.0.peek(count);
        *sum = parts.into_iter().flatten().fold(*sum, |sum, message| sum.wrapping_add(message.number()));
        self.0.release(count);
        count
    }
}

/// Our ring, filled and read in place.
pub fn in_place<T: Message>() -> Result<Ends> {
    let (producer, consumer) = heap::<T>(CAPACITY)?;
    Ok((Box::new(InPlace(producer)), Box::new(InPlace(consumer))))
}

// Our broadcast, gated, so that nothing is lost.

impl<T: Message> Sends for Publisher<T> {
    fn send(&mut self, first: u64, count: u32) -> u32 {
        (0..count).take_while(|offset| Self::send(self, &T::numbered(first + u64::from(*offset))).is_ok()).count() as u32
    }
}

impl<T: Message> Receives for Subscriber<T> {
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32 {
        for done in 0..count {
            let Received::Message(message) = Self::receive(self) else { return done };
            *sum = sum.wrapping_add(message.number());
        }
        count
    }
}

/// Memory of a broadcast and its gate, for `reader_count` readers.
pub const fn broadcast_bytes<T: Pod>(reader_count: u32) -> usize {
    broadcast::bytes::<T>(CAPACITY).next_multiple_of(128) + Gate::words(reader_count) * 8
}

/// Makes a gated broadcast in `memory` and its writing end; readers attach with [`subscriber`].
pub fn publisher<T: Message>(memory: &Arc<dyn Memory>, offset: usize, reader_count: u32) -> Result<Publisher<T>> {
    broadcast::init::<T>(memory.clone(), offset, CAPACITY)?;
    let words = gate_words::<T>(memory, offset, reader_count).and_then(Words::cleared);
    let mut gate = words.and_then(|words| Gate::new(words, reader_count)).context("gate does not fit")?;
    (0..reader_count).for_each(|reader| gate.admit(reader, 0));
    Ok(Publisher::attach(memory.clone(), offset, Some(gate))?)
}

/// Writing end of a gated broadcast that another process made.
pub fn adopted_publisher<T: Message>(memory: &Arc<dyn Memory>, offset: usize, reader_count: u32) -> Result<Publisher<T>> {
    let gate = gate_words::<T>(memory, offset, reader_count).and_then(|words| Gate::new(words, reader_count));
    Ok(Publisher::attach(memory.clone(), offset, Some(gate.context("gate does not fit")?))?)
}

/// Reader number `reader` of a gated broadcast.
pub fn subscriber<T: Message>(memory: &Arc<dyn Memory>, offset: usize, reader_count: u32, reader: u32) -> Result<Subscriber<T>> {
    let words = gate_words::<T>(memory, offset, reader_count).context("gate does not fit")?;
    Ok(Subscriber::attach(memory.clone(), offset, GateLine::new(words, reader_count, reader))?)
}

fn gate_words<T: Pod>(memory: &Arc<dyn Memory>, offset: usize, reader_count: u32) -> Option<Words> {
    let at = offset + broadcast::bytes::<T>(CAPACITY).next_multiple_of(128);
    Words::new(memory.clone(), at, Gate::words(reader_count))
}

/// Our broadcast with one reader.
pub fn broadcasting<T: Message>() -> Result<Ends> {
    let memory: Arc<dyn Memory> = Arc::new(Heap::new(broadcast_bytes::<T>(1)));
    let publisher = publisher::<T>(&memory, 0, 1)?;
    Ok((Box::new(publisher), Box::new(subscriber::<T>(&memory, 0, 1, 0)?)))
}

// A lock.

struct Locked<T>(Arc<Mutex<VecDeque<T>>>);

impl<T> Locked<T> {
    fn queue(&self) -> std::sync::MutexGuard<'_, VecDeque<T>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl<T: Message> Sends for Locked<T> {
    fn send(&mut self, first: u64, count: u32) -> u32 {
        let mut queue = self.queue();
        let count = count.min((CAPACITY as usize - queue.len()) as u32);
        queue.extend((0..count).map(|offset| T::numbered(first + u64::from(offset))));
        count
    }
}

impl<T: Message> Receives for Locked<T> {
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32 {
        let mut queue = self.queue();
        let count = count.min(queue.len() as u32);
        *sum = queue.drain(..count as usize).fold(*sum, |sum, message| sum.wrapping_add(message.number()));
        count
    }
}

/// A mutex round a bounded VecDeque.
pub fn mutex<T: Message>() -> Result<Ends> {
    let queue = Arc::new(Mutex::new(VecDeque::with_capacity(CAPACITY as usize)));
    Ok((Box::new(Locked::<T>(queue.clone())), Box::new(Locked::<T>(queue))))
}

// What one writes first: both indices on one line, nothing cached, sequential consistency, published one by one.

struct Naive<T> {
    words: Words,
    element: core::marker::PhantomData<fn() -> T>,
}

const fn words_of<T>() -> usize {
    size_of::<T>() / 8
}

impl<T: Message> Naive<T> {
    fn new(memory: &Arc<dyn Memory>) -> Result<Self> {
        let words = Words::new(memory.clone(), 0, 2 + CAPACITY as usize * words_of::<T>()).context("memory too small")?;
        Ok(Self { words, element: core::marker::PhantomData })
    }

    fn slot(&self, index: u64) -> &[std::sync::atomic::AtomicU64] {
        let start = 2 + (index % u64::from(CAPACITY)) as usize * words_of::<T>();
        self.words.get(start..start + words_of::<T>()).unwrap_or_default()
    }

    fn indices(&self) -> Option<(&std::sync::atomic::AtomicU64, &std::sync::atomic::AtomicU64)> {
        Some((self.words.first()?, self.words.get(1)?))
    }
}

impl<T: Message> Sends for Naive<T> {
    fn send(&mut self, first: u64, count: u32) -> u32 {
        let Some((head, tail)) = self.indices() else { return 0 };
        for done in 0..count {
            let at = tail.load(Ordering::SeqCst);
            if at - head.load(Ordering::SeqCst) == u64::from(CAPACITY) {
                return done;
            }
            self.slot(at).iter().for_each(|word| word.store(first + u64::from(done), Ordering::Relaxed));
            tail.store(at + 1, Ordering::SeqCst);
        }
        count
    }
}

impl<T: Message> Receives for Naive<T> {
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32 {
        let Some((head, tail)) = self.indices() else { return 0 };
        for done in 0..count {
            let at = head.load(Ordering::SeqCst);
            if at == tail.load(Ordering::SeqCst) {
                return done;
            }
            let number = self.slot(at).iter().fold(0, |all, word| all | word.load(Ordering::Relaxed));
            *sum = sum.wrapping_add(number);
            head.store(at + 1, Ordering::SeqCst);
        }
        count
    }
}

/// The naive ring.
pub fn naive<T: Message>() -> Result<Ends> {
    let memory: Arc<dyn Memory> = Arc::new(Heap::new((2 + CAPACITY as usize * words_of::<T>()) * 8));
    Ok((Box::new(Naive::<T>::new(&memory)?), Box::new(Naive::<T>::new(&memory)?)))
}

// What many producers cost even if there is one: Vyukov's bounded queue (a compare-and-swap and a stamp a message).

struct Mpmc<T> {
    words: Words,
    element: core::marker::PhantomData<fn() -> T>,
}

const MPMC_HEAD: usize = 0;
const MPMC_TAIL: usize = 16;
const MPMC_SLOTS: usize = 32;

impl<T: Message> Mpmc<T> {
    fn new(memory: &Arc<dyn Memory>) -> Result<Self> {
        let words = Words::new(memory.clone(), 0, Self::len()).context("memory too small")?;
        let queue = Self { words, element: core::marker::PhantomData };
        for index in 0..u64::from(CAPACITY) {
            if let Some((stamp, _)) = queue.slot(index) {
                stamp.store(index, Ordering::Relaxed);
            }
        }
        Ok(queue)
    }

    const fn len() -> usize {
        MPMC_SLOTS + CAPACITY as usize * (1 + words_of::<T>())
    }

    fn slot(&self, index: u64) -> Option<(&std::sync::atomic::AtomicU64, &[std::sync::atomic::AtomicU64])> {
        let stride = 1 + words_of::<T>();
        let start = MPMC_SLOTS + (index % u64::from(CAPACITY)) as usize * stride;
        self.words.get(start..start + stride)?.split_first()
    }

    /// Takes the place at `counter` whose stamp is `offset` past it; `None` if it is not ready.
    fn take(&self, counter: usize, offset: u64) -> Option<u64> {
        let counter = self.words.get(counter)?;
        let mut at = counter.load(Ordering::Relaxed);
        loop {
            let stamp = self.slot(at)?.0.load(Ordering::Acquire);
            if stamp != at + offset {
                let now = counter.load(Ordering::Relaxed);
                if now == at {
                    return None;
                }
                at = now;
                continue;
            }
            match counter.compare_exchange_weak(at, at + 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(at),
                Err(now) => at = now,
            }
        }
    }
}

impl<T: Message> Sends for Mpmc<T> {
    fn send(&mut self, first: u64, count: u32) -> u32 {
        for done in 0..count {
            let Some(at) = self.take(MPMC_TAIL, 0) else { return done };
            let Some((stamp, words)) = self.slot(at) else { return done };
            words.iter().for_each(|word| word.store(first + u64::from(done), Ordering::Relaxed));
            stamp.store(at + 1, Ordering::Release);
        }
        count
    }
}

impl<T: Message> Receives for Mpmc<T> {
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32 {
        for done in 0..count {
            let Some(at) = self.take(MPMC_HEAD, 1) else { return done };
            let Some((stamp, words)) = self.slot(at) else { return done };
            *sum = sum.wrapping_add(words.iter().fold(0, |all, word| all | word.load(Ordering::Relaxed)));
            stamp.store(at + u64::from(CAPACITY), Ordering::Release);
        }
        count
    }
}

/// Vyukov's queue.
pub fn mpmc<T: Message>() -> Result<Ends> {
    let memory: Arc<dyn Memory> = Arc::new(Heap::new(Mpmc::<T>::len() * 8));
    let sender = Mpmc::<T>::new(&memory)?;
    let words = Words::new(memory, 0, Mpmc::<T>::len()).context("memory too small")?;
    Ok((Box::new(sender), Box::new(Mpmc::<T> { words, element: core::marker::PhantomData })))
}

// The kernel: a pipe or a stream socket. A batch is one write (at most 4096 bytes, so it is never split) and one read.

/// A byte stream whose writes of up to 4096 bytes are whole.
pub struct Stream<S, T> {
    stream: S,
    buffer: Vec<u8>,
    /// Bytes of a message whose rest has not come yet.
    partial: usize,
    element: core::marker::PhantomData<fn() -> T>,
}

impl<S, T: Message> Stream<S, T> {
    /// Over `stream`, which must block.
    pub fn new(stream: S) -> Self {
        Self { stream, buffer: vec![0; MAX_BATCH as usize * size_of::<T>()], partial: 0, element: core::marker::PhantomData }
    }
}

/// The sending side of a stream.
pub struct StreamSender<S, T>(pub Stream<S, T>);
/// The receiving side of a stream.
pub struct StreamReceiver<S, T>(pub Stream<S, T>);

impl<S: Write + Send, T: Message> Sends for StreamSender<S, T> {
    fn send(&mut self, first: u64, count: u32) -> u32 {
        let size = size_of::<T>();
        let count = count.min(MAX_BATCH);
        for (offset, slot) in self.0.buffer.chunks_exact_mut(size).take(count as usize).enumerate() {
            slot.copy_from_slice(bytemuck::bytes_of(&T::numbered(first + offset as u64)));
        }
        let bytes = self.0.buffer.get(..count as usize * size).unwrap_or_default();
        if self.0.stream.write_all(bytes).is_ok() { count } else { 0 }
    }
}

impl<S: Read + Send, T: Message> Receives for StreamReceiver<S, T> {
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32 {
        let size = size_of::<T>();
        let Stream { stream, buffer, partial, .. } = &mut self.0;
        let room = buffer.get_mut(*partial..count.min(MAX_BATCH) as usize * size).unwrap_or_default();
        let filled = *partial + stream.read(room).unwrap_or(0);
        let whole = filled / size;
        for message in buffer.chunks_exact(size).take(whole) {
            *sum = sum.wrapping_add(bytemuck::pod_read_unaligned::<T>(message).number());
        }
        buffer.copy_within(whole * size..filled, 0);
        *partial = filled % size;
        whole as u32
    }
}

/// A pipe.
pub fn pipe<T: Message>() -> Result<Ends> {
    let (reader, writer) = std::io::pipe()?;
    Ok((Box::new(StreamSender(Stream::<_, T>::new(writer))), Box::new(StreamReceiver(Stream::<_, T>::new(reader)))))
}
