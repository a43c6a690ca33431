//! One writer, any number of readers: a ring of sequence-stamped slots that readers only ever read.
//!
//! ```text
//! word  0  magic · 1 version and capacity · 2 element size and align · 3 layout hash
//! word 16  published u64 · gate_closed u64 · dropped u64             (written by the publisher only)
//! word 32  slots: stamp, then the element in 64-bit words            (written by the publisher only)
//!
//! stamp of message n (counted from 1):  2n-1 being written ── 2n complete
//! reader expecting n sees:  < 2n nothing yet · = 2n before and after the copy: it is whole · > 2n lapped
//! ```
//! All words are atomics, so a torn read is detected, never undefined. A lapped reader jumps to the newer half and is told
//! exactly how many messages it lost; with a [`Gate`] the writer stops instead and names the slow reader.
//! Must never wait: what to do when the gate is closed is the caller's choice.

use super::gate::{Gate, GateLine};
use super::layout::{Layout, RingError, check_capacity};
use super::memory::{Memory, Words};
use super::sync::{AtomicU64, Ordering, fence};
use bytemuck::Pod;
use core::marker::PhantomData;
use std::sync::Arc;

const MAGIC: u64 = u64::from_le_bytes(*b"RLYCAST\0");
const VERSION: u32 = 1;
const PUBLISHED: usize = 16;
const GATE_CLOSED: usize = 17;
const DROPPED: usize = 18;
const SLOTS: usize = 32;
/// Attempts of [`Subscriber::latest`].
pub const LATEST_ATTEMPTS: u32 = if cfg!(loom) { 2 } else { 8 };

/// A gated reader that the writer would have lapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("reader {reader} is {messages} messages behind")]
pub struct Behind {
    /// Its number in the gate.
    pub reader: u32,
    /// Messages it has not consumed.
    pub messages: u64,
}

/// What a reader finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received<T> {
    /// The next message, whole.
    Message(T),
    /// Nothing new.
    Empty,
    /// The writer was faster: this many messages are gone; the next call goes on after them.
    Overrun(u64),
}

const fn stride<T>() -> usize {
    1 + size_of::<T>().div_ceil(8)
}

/// Bytes of a broadcast of `capacity` slots of `T`.
pub const fn bytes<T: Pod>(capacity: u32) -> usize {
    (SLOTS + capacity as usize * stride::<T>()) * size_of::<AtomicU64>()
}

/// Makes an empty broadcast at `offset` of `memory`. Nobody may be attached to it.
pub fn init<T: Pod>(memory: Arc<dyn Memory>, offset: usize, capacity: u32) -> Result<(), RingError> {
    let words = room::<T>(memory, offset, capacity, Words::cleared)?;
    head::<T>(&words, capacity);
    Ok(())
}

/// The same in memory that is known to be zero (a new memfd): its slots are not touched, so they take no memory yet.
pub fn init_zeroed<T: Pod>(memory: Arc<dyn Memory>, offset: usize, capacity: u32) -> Result<(), RingError> {
    let words = room::<T>(memory, offset, capacity, Some)?;
    head::<T>(&words, capacity);
    Ok(())
}

fn room<T: Pod>(
    memory: Arc<dyn Memory>,
    offset: usize,
    capacity: u32,
    made: impl FnOnce(Words) -> Option<Words>,
) -> Result<Words, RingError> {
    check_capacity(capacity)?;
    let needed = SLOTS + capacity as usize * stride::<T>();
    if !memory.writable() {
        return Err(RingError::ReadOnly);
    }
    let len = memory.len();
    let words = Words::new(memory, offset, needed).and_then(made);
    words.ok_or(RingError::DoesNotFit { offset, needed: needed * size_of::<AtomicU64>(), len })
}

fn head<T: Pod>(words: &Words, capacity: u32) {
    for (word, value) in words.iter().zip(header::<T>(capacity)) {
        word.store(value, Ordering::Release);
    }
}

fn header<T: Pod>(capacity: u32) -> [u64; 4] {
    let own = Layout::<T>::header(capacity);
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    [MAGIC, pair(VERSION, capacity), pair(own.element_size, own.element_align), own.layout_hash]
}

/// Reads the header and checks it once; the capacity is the copy that was checked.
fn attach<T: Pod>(memory: Arc<dyn Memory>, offset: usize) -> Result<(Words, u32), RingError> {
    let len = memory.len();
    let too_small = |needed: usize| RingError::DoesNotFit { offset, needed, len };
    let head = Words::new(memory.clone(), offset, SLOTS).ok_or(too_small(bytes::<T>(0)))?;
    let found: [u64; 4] = core::array::from_fn(|index| head.get(index).map_or(0, |word| word.load(Ordering::Acquire)));
    let [magic, version_capacity, size_align, hash] = found;
    if magic != MAGIC {
        return Err(RingError::Magic(magic));
    }
    if version_capacity as u32 != VERSION {
        return Err(RingError::Version(version_capacity as u32));
    }
    let capacity = (version_capacity >> 32) as u32;
    check_capacity(capacity)?;
    if found != header::<T>(capacity) {
        return Err(RingError::Element { size: size_align as u32, align: (size_align >> 32) as u32, hash });
    }
    let words = Words::new(memory, offset, SLOTS + capacity as usize * stride::<T>()).ok_or(too_small(bytes::<T>(capacity)))?;
    Ok((words, capacity))
}

#[inline]
fn slot<T>(words: &[AtomicU64], capacity: u32, number: u64) -> Option<(&AtomicU64, &[AtomicU64])> {
    let index = (number & u64::from(capacity - 1)) as usize;
    let start = SLOTS + index * stride::<T>();
    words.get(start..start + stride::<T>())?.split_first()
}

#[inline]
fn store<T: Pod>(words: &[AtomicU64], value: &T) {
    let mut chunks = bytemuck::bytes_of(value).chunks_exact(8);
    for (word, chunk) in words.iter().zip(&mut chunks) {
        word.store(bytemuck::pod_read_unaligned(chunk), Ordering::Relaxed);
    }
    let rest = chunks.remainder();
    if let (Some(word), false) = (words.last(), rest.is_empty()) {
        let mut last = [0; 8];
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        word.store(u64::from_ne_bytes(last), Ordering::Relaxed);
    }
}

#[inline]
fn load<T: Pod>(words: &[AtomicU64]) -> T {
    let mut value = T::zeroed();
    for (word, chunk) in words.iter().zip(bytemuck::bytes_of_mut(&mut value).chunks_mut(8)) {
        let bytes = word.load(Ordering::Relaxed).to_ne_bytes();
        chunk.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }
    value
}

/// The writing side. One for each broadcast: whoever attaches states that no other lives (the channel's lock sees to it).
#[derive(Debug)]
pub struct Publisher<T: Pod> {
    words: Words,
    capacity: u32,
    published: u64,
    gate: Option<Gate>,
    /// Up to this number the gate is known to be open.
    open_until: u64,
    element: PhantomData<fn(&T)>,
}

impl<T: Pod> Publisher<T> {
    /// Adopts the writing side: goes on after the last message that its predecessor completed.
    pub fn attach(memory: Arc<dyn Memory>, offset: usize, gate: Option<Gate>) -> Result<Self, RingError> {
        if !memory.writable() {
            return Err(RingError::ReadOnly);
        }
        let (words, capacity) = attach::<T>(memory, offset)?;
        let mut published = words.get(PUBLISHED).map_or(0, |word| word.load(Ordering::Acquire));
        // Killed between a message's last stamp and the count: readers may have it, so its number is used up.
        let next = published.wrapping_add(1);
        if slot::<T>(&words, capacity, next).is_some_and(|(stamp, _)| stamp.load(Ordering::Acquire) == next.wrapping_mul(2)) {
            published = next;
        }
        Ok(Self { words, capacity, published, gate, open_until: 0, element: PhantomData })
    }

    /// Messages sent so far, also by predecessors: the number of the last one.
    pub const fn position(&self) -> u64 {
        self.published
    }

    /// The last message, a predecessor's perhaps; `None` before the first. Nobody else may be sending.
    pub fn last(&self) -> Option<T> {
        let (stamp, words) = slot::<T>(&self.words, self.capacity, self.published)?;
        let whole = self.published > 0 && stamp.load(Ordering::Acquire) == self.published.wrapping_mul(2);
        whole.then(|| load(words))
    }

    /// Slots.
    pub const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The gate, to admit and evict readers.
    pub const fn gate(&mut self) -> Option<&mut Gate> {
        self.gate.as_mut()
    }

    /// Sends, unless an admitted reader would lose a message by it. Without a gate it always sends.
    #[inline]
    pub fn send(&mut self, value: &T) -> Result<(), Behind> {
        let number = self.published.wrapping_add(1);
        if self.gate.is_some() && number > self.open_until {
            self.ask_gate()?;
        }
        let Some((stamp, words)) = slot::<T>(&self.words, self.capacity, number) else { return Ok(()) };
        stamp.store(number.wrapping_mul(2).wrapping_sub(1), Ordering::Relaxed);
        fence(Ordering::Release);
        store(words, value);
        stamp.store(number.wrapping_mul(2), Ordering::Release);
        self.published = number;
        self.word(PUBLISHED, number);
        Ok(())
    }

    /// Counts a message that the caller gives up on because the gate is closed.
    pub fn count_dropped(&mut self) {
        if let Some(word) = self.words.get(DROPPED) {
            word.store(word.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }

    fn ask_gate(&mut self) -> Result<(), Behind> {
        let (published, capacity) = (self.published, u64::from(self.capacity));
        let Some(behind) = self.gate.as_mut().and_then(|gate| gate.slowest(published)) else { return Ok(()) };
        if behind.messages < capacity {
            self.open_until = (published - behind.messages).saturating_add(capacity);
            return Ok(());
        }
        let closed = self.words.get(GATE_CLOSED).map_or(0, |word| word.load(Ordering::Relaxed));
        self.word(GATE_CLOSED, closed.wrapping_add(1));
        Err(behind)
    }

    #[inline]
    fn word(&self, index: usize, value: u64) {
        if let Some(word) = self.words.get(index) {
            word.store(value, Ordering::Release);
        }
    }
}

/// A reading side. Any number of them; each has its own place.
#[derive(Debug)]
pub struct Subscriber<T: Pod> {
    words: Words,
    capacity: u32,
    next: u64,
    lost: u64,
    received: u64,
    line: Option<GateLine>,
    element: PhantomData<fn() -> T>,
}

impl<T: Pod> Subscriber<T> {
    /// Reads what is sent from now on; with a gate's line, from where that line begins.
    pub fn attach(memory: Arc<dyn Memory>, offset: usize, line: Option<GateLine>) -> Result<Self, RingError> {
        let (words, capacity) = attach::<T>(memory, offset)?;
        let mut subscriber = Self { words, capacity, next: 1, lost: 0, received: 0, line, element: PhantomData };
        let start = subscriber.line.as_ref().and_then(GateLine::start);
        subscriber.next = start.unwrap_or_else(|| subscriber.sent()).wrapping_add(1);
        Ok(subscriber)
    }

    /// Goes back to the oldest message that is still there.
    pub fn rewind(&mut self) {
        self.next = self.sent().saturating_sub(u64::from(self.capacity)).wrapping_add(1);
    }

    /// The next message.
    #[inline]
    pub fn receive(&mut self) -> Received<T> {
        let Some((stamp, words)) = slot::<T>(&self.words, self.capacity, self.next) else { return Received::Empty };
        let expected = self.next.wrapping_mul(2);
        let before = stamp.load(Ordering::Acquire);
        if before < expected {
            return Received::Empty;
        }
        let value = load(words);
        fence(Ordering::Acquire);
        if before != expected || stamp.load(Ordering::Relaxed) != expected {
            return self.overrun();
        }
        if let Some(line) = &self.line {
            line.consumed(self.next);
        }
        self.next = self.next.wrapping_add(1);
        self.received += 1;
        Received::Message(value)
    }

    /// The newest whole message, without moving. `None` if there is none yet, or none stood still for [`LATEST_ATTEMPTS`].
    pub fn latest(&self) -> Option<T> {
        (0..LATEST_ATTEMPTS).find_map(|_| {
            let number = self.sent();
            let (stamp, words) = slot::<T>(&self.words, self.capacity, number)?;
            let before = stamp.load(Ordering::Acquire);
            let value = load(words);
            fence(Ordering::Acquire);
            let whole = number > 0 && before == number.wrapping_mul(2) && stamp.load(Ordering::Relaxed) == before;
            whole.then_some(value)
        })
    }

    /// Messages sent so far, by all publishers of this broadcast.
    pub fn sent(&self) -> u64 {
        self.load_word(PUBLISHED)
    }

    /// Times the writer found the gate closed.
    pub fn gate_closed(&self) -> u64 {
        self.load_word(GATE_CLOSED)
    }

    /// Messages the writer gave up on.
    pub fn dropped(&self) -> u64 {
        self.load_word(DROPPED)
    }

    /// Messages received.
    pub const fn received(&self) -> u64 {
        self.received
    }

    /// Messages lost to overruns.
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Messages waiting (or already overwritten).
    pub fn depth(&self) -> u64 {
        self.sent().wrapping_add(1).saturating_sub(self.next)
    }

    /// Slots.
    pub const fn capacity(&self) -> u32 {
        self.capacity
    }

    #[cold]
    fn overrun(&mut self) -> Received<T> {
        let newer_half = self.sent().saturating_sub(u64::from(self.capacity / 2)).wrapping_add(1);
        let next = newer_half.max(self.next.wrapping_add(1));
        let lost = next.wrapping_sub(self.next);
        self.next = next;
        self.lost = self.lost.wrapping_add(lost);
        Received::Overrun(lost)
    }

    fn load_word(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(Ordering::Acquire))
    }
}
