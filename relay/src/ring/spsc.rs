//! The single-producer single-consumer ring.
//!
//! Indices run free (u32, wrapping); `producer - consumer` is the number of filled slots, so all slots are usable.
//! Each side keeps its own index and a copy of the peer's in private memory and touches the peer's line only when the copy
//! looks short. Elements become visible by one Release store of [`Producer::publish`], slots free by one of
//! [`Consumer::release`]; what a dead side had not published or released never happened, and its successor
//! ([`Producer::attach`]) goes on from the indices in memory.
//!
//! A consumer that has nothing asks for the next slot's line together with the index's, so that a message that arrives costs
//! one trip between the caches and not two after each other: a round trip took 480 ns instead of 575, against 310 of two bare
//! lines. (Asking for the producer's next lines to write them lost: batches of one took three times as long.)
//!
//! The peer is untrusted: an index that claims more than `capacity` filled slots is counted (`invalid_peer`) and ignored.
//! Must never wait, allocate or make a system call.
#![expect(
    unsafe_code,
    reason = "slots lie in memory shared with another thread or process; ownership of each follows from the two indices"
)]

use super::cursor;
use super::layout::{Head, Header, Layout, RingError, check_capacity};
use super::memory::{Heap, Memory};
use super::sync::{AtomicU32, Ordering, UnsafeCell};
use bytemuck::Pod;
use core::marker::PhantomData;
use std::sync::Arc;

/// [`Producer::free`] and [`Consumer::available`] look at the peer's line unless they know of this many already (two batches).
pub const REFRESH_BELOW: u32 = 64;

/// A ring of `capacity` elements in this process's heap.
pub fn heap<T: Pod>(capacity: u32) -> Result<(Producer<T>, Consumer<T>), RingError> {
    check_capacity(capacity)?;
    let memory: Arc<dyn Memory> = Arc::new(Heap::new(Layout::<T>::bytes(capacity)));
    init::<T>(&*memory, 0, capacity)?;
    Ok((Producer::attach(memory.clone(), 0)?, Consumer::attach(memory, 0)?))
}

/// Makes an empty ring at `offset` of `memory`. Nobody may be attached to it.
pub fn init<T: Pod>(memory: &dyn Memory, offset: usize, capacity: u32) -> Result<(), RingError> {
    init_at::<T>(memory, offset, capacity, 0)
}

/// [`init`], with both indices at `start` (tests begin just before the wrap).
pub fn init_at<T: Pod>(memory: &dyn Memory, offset: usize, capacity: u32, start: u32) -> Result<(), RingError> {
    check_capacity(capacity)?;
    Layout::<T>::fits(memory.as_ptr().addr(), memory.len(), offset, capacity)?;
    check_writable(memory)?;
    // SAFETY: fits() has checked that the ring, so its first byte too, lies inside the memory.
    let first = unsafe { memory.as_ptr().add(offset) };
    for index in 0..capacity as usize {
        // SAFETY: fits() covers capacity slots behind the head.
        let slot = unsafe { first.add(Layout::<T>::SLOTS_AT + index * Layout::<T>::SLOT_SIZE) };
        // SAFETY: in bounds as said, and aligned: the head is whole lines and T needs at most a line.
        unsafe { slot.cast::<UnsafeCell<T>>().write(UnsafeCell::new(T::zeroed())) };
    }
    let side = || super::layout::Side { index: AtomicU32::new(start) };
    let head = Head { header: Layout::<T>::header(capacity), producer: side(), consumer: side() };
    // SAFETY: in bounds and line-aligned by fits(); nobody else is attached yet, as the caller states.
    unsafe { first.cast::<Head>().write(head) };
    Ok(())
}

fn check_writable(memory: &dyn Memory) -> Result<(), RingError> {
    if memory.writable() { Ok(()) } else { Err(RingError::ReadOnly) }
}

/// A checked ring in memory: addresses and capacity, copied out once.
struct View<T> {
    /// Keeps the address range alive.
    memory: Arc<dyn Memory>,
    head: *const Head,
    slots: *const UnsafeCell<T>,
    capacity: u32,
    element: PhantomData<T>,
}

// SAFETY: the addresses stay valid wherever the value goes, because `memory` goes along, and T is plain data.
unsafe impl<T: Pod> Send for View<T> {}

impl<T: Pod> View<T> {
    fn attach(memory: Arc<dyn Memory>, offset: usize) -> Result<Self, RingError> {
        check_writable(&*memory)?;
        // The head has to be inside before the capacity in it can be read.
        Layout::<T>::fits(memory.as_ptr().addr(), memory.len(), offset, 0)?;
        // SAFETY: the head lies inside the memory, as just checked.
        let first = unsafe { memory.as_ptr().add(offset) };
        // SAFETY: in bounds and aligned as checked; volatile, because a peer may write it meanwhile: we judge the one copy.
        let header = unsafe { first.cast::<Header>().read_volatile() };
        Layout::<T>::check(&header)?;
        Layout::<T>::fits(memory.as_ptr().addr(), memory.len(), offset, header.capacity)?;
        // SAFETY: the slots lie inside the memory: fits() of the capacity that is kept below.
        let slots = unsafe { first.add(Layout::<T>::SLOTS_AT) };
        Ok(Self { head: first.cast(), slots: slots.cast(), capacity: header.capacity, element: PhantomData, memory })
    }

    #[inline]
    fn producer(&self) -> &AtomicU32 {
        // SAFETY: head points into `memory`, which self keeps alive; this word is only ever reached as an atomic.
        unsafe { &(*self.head).producer.index }
    }

    #[inline]
    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as in producer().
        unsafe { &(*self.head).consumer.index }
    }

    /// The cell of a free-running index.
    #[inline]
    fn cell(&self, index: u32) -> &UnsafeCell<T> {
        // SAFETY: cursor::slot() is below capacity, and attach() has checked that all slots lie inside `memory`.
        let cell = unsafe { self.slots.add(cursor::slot(index, self.capacity)) };
        // SAFETY: in bounds as just said, aligned by attach(), and `memory` keeps it alive as long as self.
        unsafe { &*cell }
    }

    /// Both indices as memory has them; refused if they cannot be.
    fn indices(&self) -> Result<(u32, u32), RingError> {
        let (producer, consumer) = (self.producer().load(Ordering::Acquire), self.consumer().load(Ordering::Acquire));
        if cursor::filled(producer, consumer) <= self.capacity {
            return Ok((producer, consumer));
        }
        Err(RingError::Indices { producer, consumer, capacity: self.capacity })
    }

    /// Asks for the line of a slot that may still be the producer's: what comes back is never looked at.
    #[inline]
    fn prefetch(&self, index: u32) {
        #[cfg(all(target_arch = "x86_64", not(loom)))]
        self.cell(index).with(|slot| {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a prefetch is a hint; it loads into no register and faults on no address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(slot.cast()) }
        });
        #[cfg(not(all(target_arch = "x86_64", not(loom))))]
        let _ = index;
    }

    /// `len` slots from `index` on as (address, length) of the part before the array's end and the part after it.
    #[cfg(not(loom))]
    #[inline]
    fn runs(&self, index: u32, len: u32) -> [(*mut T, usize); 2] {
        let first = cursor::slot(index, self.capacity);
        let before_end = (len as usize).min(self.capacity as usize - first);
        let start = self.cell(index).with_mut(|slot| slot);
        [(start, before_end), (self.slots.cast::<T>().cast_mut(), len as usize - before_end)]
    }
}

impl<T> core::fmt::Debug for View<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("View").field("capacity", &self.capacity).field("memory_len", &self.memory.len()).finish()
    }
}

/// What did not fit, handed back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ring is full")]
pub struct Full<T>(pub T);

/// The writing side. One for each ring: whoever attaches states that no other producer lives.
#[derive(Debug)]
pub struct Producer<T: Pod> {
    view: View<T>,
    /// Our index; memory holds the same.
    published: u32,
    /// The consumer's index as last seen and believed.
    cached_consumer: u32,
    invalid_peer: u64,
    max_depth: u32,
}

impl<T: Pod> Producer<T> {
    /// Adopts the writing side of the ring at `offset` of `memory`, from where the last producer published.
    pub fn attach(memory: Arc<dyn Memory>, offset: usize) -> Result<Self, RingError> {
        let view = View::attach(memory, offset)?;
        let (published, cached_consumer) = view.indices()?;
        Ok(Self { view, published, cached_consumer, invalid_peer: 0, max_depth: 0 })
    }

    /// Slots in the ring.
    pub const fn capacity(&self) -> u32 {
        self.view.capacity
    }

    /// Index up to which everything is published. Free-running.
    #[inline]
    pub const fn position(&self) -> u32 {
        self.published
    }

    /// Slots known to be free. Asks the peer's line only if fewer than [`REFRESH_BELOW`] are known.
    #[inline]
    pub fn free(&mut self) -> u32 {
        self.free_for(REFRESH_BELOW)
    }

    /// Slots known to be free; asks the peer's line only if fewer than `wanted` are known.
    #[inline]
    pub fn free_for(&mut self, wanted: u32) -> u32 {
        if self.known_free() < wanted {
            self.refresh();
        }
        self.known_free()
    }

    /// Puts `value` into the slot `offset` behind the published index, invisible until [`Self::publish`].
    /// `offset` must be below [`Self::free`]; beyond it nothing is written.
    #[inline]
    pub fn write(&mut self, offset: u32, value: T) {
        debug_assert!(offset < self.known_free(), "write beyond the free slots");
        if offset < self.known_free() {
            // SAFETY: the slot is free (the consumer released it, Acquire in refresh()) and only we write free slots.
            self.view.cell(self.published.wrapping_add(offset)).with_mut(|slot| unsafe { slot.write(value) });
        }
    }

    /// Makes the next `count` slots visible to the consumer; at most the free ones.
    #[inline]
    pub fn publish(&mut self, count: u32) {
        debug_assert!(count <= self.known_free(), "publish beyond the free slots");
        self.published = self.published.wrapping_add(count.min(self.known_free()));
        self.view.producer().store(self.published, Ordering::Release);
    }

    /// Copy of the element published `back` places ago (1: the newest), as long as it has not been overwritten since.
    #[cfg(not(loom))]
    pub fn published(&self, back: u32) -> T {
        // SAFETY: only the producer writes slots, and it is borrowed here; the consumer only reads them.
        self.view.cell(self.published.wrapping_sub(back)).with(|slot| unsafe { slot.read() })
    }

    /// Writes and publishes one element.
    #[inline]
    pub fn push(&mut self, value: T) -> Result<(), Full<T>> {
        if self.free_for(1) == 0 {
            return Err(Full(value));
        }
        self.write(0, value);
        self.publish(1);
        Ok(())
    }

    /// Up to `wanted` free slots to fill in place, in ring order (the second slice is the part behind the wrap).
    /// Nothing is visible until [`Self::publish`].
    #[cfg(not(loom))]
    #[inline]
    pub fn reserve(&mut self, wanted: u32) -> [&mut [T]; 2] {
        let len = self.free_for(wanted).min(wanted);
        // SAFETY: runs() stays inside the slots; these are free, so nobody else touches them until we publish, and the two
        // parts do not overlap because len <= capacity. The borrow of self keeps us from publishing meanwhile.
        self.view.runs(self.published, len).map(|(start, len)| unsafe { core::slice::from_raw_parts_mut(start, len) })
    }

    /// Times the peer's index could not be true.
    pub const fn invalid_peer(&self) -> u64 {
        self.invalid_peer
    }

    /// Most slots seen filled, sampled whenever the peer's line is read.
    pub const fn max_depth(&self) -> u32 {
        self.max_depth
    }

    #[inline]
    const fn known_free(&self) -> u32 {
        cursor::free(self.view.capacity, self.published, self.cached_consumer)
    }

    fn refresh(&mut self) {
        let consumer = self.view.consumer().load(Ordering::Acquire);
        let depth = cursor::filled(self.published, consumer);
        if depth > self.view.capacity {
            self.invalid_peer += 1;
            return;
        }
        self.max_depth = self.max_depth.max(depth);
        self.cached_consumer = consumer;
    }
}

/// The reading side. One for each ring: whoever attaches states that no other consumer lives.
#[derive(Debug)]
pub struct Consumer<T: Pod> {
    view: View<T>,
    /// Our index; memory holds the same.
    released: u32,
    /// The producer's index as last seen and believed.
    cached_producer: u32,
    invalid_peer: u64,
}

impl<T: Pod> Consumer<T> {
    /// Adopts the reading side of the ring at `offset` of `memory`, from what the last consumer released.
    pub fn attach(memory: Arc<dyn Memory>, offset: usize) -> Result<Self, RingError> {
        let view = View::attach(memory, offset)?;
        let (cached_producer, released) = view.indices()?;
        Ok(Self { view, released, cached_producer, invalid_peer: 0 })
    }

    /// Slots in the ring.
    pub const fn capacity(&self) -> u32 {
        self.view.capacity
    }

    /// Index up to which everything is released. Free-running.
    #[inline]
    pub const fn position(&self) -> u32 {
        self.released
    }

    /// Elements known to be there. Asks the peer's line only if fewer than [`REFRESH_BELOW`] are known.
    #[inline]
    pub fn available(&mut self) -> u32 {
        self.available_for(REFRESH_BELOW)
    }

    /// Elements known to be there; asks the peer's line only if fewer than `wanted` are known.
    #[inline]
    pub fn available_for(&mut self, wanted: u32) -> u32 {
        if self.known() < wanted {
            self.refresh();
        }
        self.known()
    }

    /// Copy of the element `offset` behind the released index. `offset` must be below [`Self::available`]; beyond it: zeroes.
    #[inline]
    pub fn read(&self, offset: u32) -> T {
        debug_assert!(offset < self.known(), "read beyond the available elements");
        if offset >= self.known() {
            return T::zeroed();
        }
        // SAFETY: the slot is published (Acquire in refresh()) and the producer does not write it before we release it; a
        // peer that does nevertheless changes plain data of a copy that the caller validates.
        self.view.cell(self.released.wrapping_add(offset)).with(|slot| unsafe { slot.read() })
    }

    /// Gives the oldest `count` slots back to the producer; at most the available ones.
    #[inline]
    pub fn release(&mut self, count: u32) {
        debug_assert!(count <= self.known(), "release beyond the available elements");
        self.released = self.released.wrapping_add(count.min(self.known()));
        self.view.consumer().store(self.released, Ordering::Release);
    }

    /// Takes the oldest element.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        if self.available_for(1) == 0 {
            return None;
        }
        let value = self.read(0);
        self.release(1);
        Some(value)
    }

    /// Up to `wanted` elements in place, in ring order (the second slice is the part behind the wrap). They stay until
    /// [`Self::release`]. Between processes only for peers that keep to the protocol: others can change them under the reader.
    #[cfg(not(loom))]
    #[inline]
    pub fn peek(&mut self, wanted: u32) -> [&[T]; 2] {
        let len = self.available_for(wanted).min(wanted);
        // SAFETY: runs() stays inside the slots; these are published and not yet released, so the producer leaves them alone,
        // and the borrow of self keeps us from releasing meanwhile.
        self.view.runs(self.released, len).map(|(start, len)| unsafe { core::slice::from_raw_parts(start.cast_const(), len) })
    }

    /// Times the peer's index could not be true.
    pub const fn invalid_peer(&self) -> u64 {
        self.invalid_peer
    }

    #[inline]
    const fn known(&self) -> u32 {
        cursor::filled(self.cached_producer, self.released)
    }

    fn refresh(&mut self) {
        if self.known() == 0 {
            self.view.prefetch(self.released);
        }
        let producer = self.view.producer().load(Ordering::Acquire);
        if cursor::filled(producer, self.released) > self.view.capacity {
            self.invalid_peer += 1;
            return;
        }
        self.cached_producer = producer;
    }
}

/// Overwrites an index at `at` bytes of a ring, as a hostile peer would.
#[cfg(all(test, not(loom)))]
pub(super) fn forge_index(first: *mut u8, at: usize, value: u32) {
    // SAFETY: tests pass the start of a live ring and the offset of one of its two index words.
    let word = unsafe { first.add(at) };
    // SAFETY: as above.
    let word = unsafe { AtomicU32::from_ptr(word.cast()) };
    word.store(value, Ordering::SeqCst);
}
