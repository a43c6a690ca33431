//! The ring on one thread and on two, and what a hostile peer can do to it.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]
use super::*;
use std::sync::Arc;

fn near_the_wrap(capacity: u32) -> (Producer<u64>, Consumer<u64>, Arc<dyn Memory>) {
    let memory: Arc<dyn Memory> = Arc::new(memory::Heap::new(Layout::<u64>::bytes(capacity)));
    init_at::<u64>(&*memory, 0, capacity, u32::MAX - 1).unwrap();
    (Producer::attach(memory.clone(), 0).unwrap(), Consumer::attach(memory.clone(), 0).unwrap(), memory)
}

/// Plays the peer that writes nonsense: sets a published index directly.
fn forge(memory: &Arc<dyn Memory>, at: usize, value: u32) {
    let segment = memory.as_ptr();
    crate::ring::spsc::forge_index(segment, at, value);
}

/// 002.15: overflow. The indices run over 2^32 in the middle of it.
#[test]
fn req_002_12_exactly_capacity_elements_fit_across_the_wrap() {
    let (mut producer, mut consumer, _memory) = near_the_wrap(8);
    for round in 0..5 {
        for value in 0..8 {
            producer.push(round * 8 + value).unwrap();
        }
        assert_eq!(producer.push(99), Err(Full(99)));
        for value in 0..8 {
            assert_eq!(consumer.pop(), Some(round * 8 + value));
        }
        assert_eq!(consumer.pop(), None);
    }
}

#[test]
fn successors_continue_where_the_dead_stopped() {
    let (mut producer, mut consumer, memory) = near_the_wrap(8);
    for value in 0..6 {
        producer.push(value).unwrap();
    }
    assert_eq!(consumer.pop(), Some(0));
    producer.write(0, 1000); // never published: never happened
    drop((producer, consumer));
    let (mut producer, mut consumer) = (Producer::<u64>::attach(memory.clone(), 0).unwrap(), Consumer::<u64>::attach(memory, 0).unwrap());
    assert_eq!((producer.free(), consumer.available()), (3, 5));
    producer.push(6).unwrap();
    let left: Vec<u64> = std::iter::from_fn(|| consumer.pop()).collect();
    assert_eq!(left, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn slices_in_place_cross_the_wrap() {
    let (mut producer, mut consumer, _memory) = near_the_wrap(8);
    producer.reserve(5).into_iter().flatten().zip(10..).for_each(|(slot, value)| *slot = value);
    assert_eq!(consumer.available(), 0, "reserved is not published");
    producer.publish(5);
    let seen: Vec<u64> = consumer.peek(64).into_iter().flatten().copied().collect();
    assert_eq!(seen, [10, 11, 12, 13, 14]);
    consumer.release(5);
    assert_eq!(producer.reserve(64).map(|part| part.len()).iter().sum::<usize>(), 8);
}

#[test]
fn req_002_17_an_impossible_peer_index_is_counted_and_ignored() {
    let (mut producer, mut consumer, memory) = near_the_wrap(8);
    producer.push(1).unwrap();
    assert_eq!(consumer.available(), 1);
    forge(&memory, 256, 77);
    assert_eq!((producer.free(), producer.invalid_peer()), (7, 1));
    forge(&memory, 128, 1_000_000);
    assert_eq!((consumer.available(), consumer.invalid_peer()), (1, 1), "the element seen before was honest");
    consumer.release(1);
    assert_eq!((consumer.available(), consumer.invalid_peer()), (0, 2));
    assert!(matches!(Producer::<u64>::attach(memory, 0), Err(RingError::Indices { .. })));
}

#[test]
fn req_002_13_attach_refuses_what_it_does_not_know() {
    let (_producer, _consumer, memory) = near_the_wrap(8);
    assert!(matches!(Consumer::<u32>::attach(memory.clone(), 0), Err(RingError::Element { .. })));
    assert!(matches!(Consumer::<i64>::attach(memory.clone(), 0), Err(RingError::Element { .. })), "same size, other type");
    assert!(matches!(Consumer::<u64>::attach(memory.clone(), 128), Err(RingError::Magic(_))), "a line further");
    assert!(matches!(Consumer::<u64>::attach(memory.clone(), 256), Err(RingError::DoesNotFit { .. })));
    assert!(matches!(Consumer::<u64>::attach(memory.clone(), 8), Err(RingError::DoesNotFit { .. })));
    assert!(matches!(init::<u64>(&*memory, 0, 32), Err(RingError::DoesNotFit { .. })));
    assert!(matches!(init::<u64>(&*memory, 0, 6), Err(RingError::Capacity(6))));
    let blank: Arc<dyn Memory> = Arc::new(memory::Heap::new(4096));
    assert!(matches!(Consumer::<u64>::attach(blank, 0), Err(RingError::Magic(0))));
}

/// Offsets as in `layout.rs`, and no two words that different sides write within 128 bytes (the adjacent-line prefetcher
/// pulls pairs).
#[test]
fn req_002_10_each_index_has_a_line_of_its_own() {
    let memory: Arc<dyn Memory> = Arc::new(memory::Heap::new(Layout::<u64>::bytes(8)));
    init::<u64>(&*memory, 0, 8).unwrap();
    let mut producer = Producer::<u64>::attach(memory.clone(), 0).unwrap();
    let mut consumer = Consumer::<u64>::attach(memory.clone(), 0).unwrap();
    let bytes =
        || (0..memory.len()).map(|at| Words::new(memory.clone(), at & !7, 1).unwrap()[0].load(sync::Ordering::Relaxed)).collect::<Vec<_>>();
    let changed = |before: &[u64], after: &[u64]| before.iter().zip(after).position(|(a, b)| a != b).map(|at| at / memory::LINE_SIZE);
    let before = bytes();
    producer.publish(1);
    let published = bytes();
    consumer.available();
    consumer.release(1);
    let released = bytes();
    assert_eq!((changed(&before, &published), changed(&published, &released)), (Some(1), Some(2)));
    assert_eq!((layout::PRODUCER_AT, layout::CONSUMER_AT), (memory::LINE_SIZE, 2 * memory::LINE_SIZE));
}

/// 002.1: one producer, one consumer, atomic indices. 002.15: nothing is reordered.
#[test]
fn req_002_7_a_million_elements_between_two_threads() {
    const COUNT: u64 = 1_000_000;
    let (mut producer, mut consumer) = heap::<u64>(256).unwrap();
    let writer = std::thread::spawn(move || {
        let mut next = 0;
        while next < COUNT {
            let batch = producer.free().min(32).min((COUNT - next) as u32);
            for offset in 0..batch {
                producer.write(offset, next + u64::from(offset));
            }
            producer.publish(batch);
            next += u64::from(batch);
            if batch == 0 {
                std::thread::yield_now();
            }
        }
    });
    let mut expected = 0;
    while expected < COUNT {
        let batch = consumer.available().min(32);
        for offset in 0..batch {
            assert_eq!(consumer.read(offset), expected);
            expected += 1;
        }
        consumer.release(batch);
        if batch == 0 {
            std::thread::yield_now();
        }
    }
    writer.join().unwrap();
}
