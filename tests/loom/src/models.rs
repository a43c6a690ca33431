//! The models: small enough to be explored exhaustively, large enough to fill, wrap, lap and fall asleep.

use crate::ring::memory::Heap;
use crate::ring::{
    Consumer, Gate, GateLine, Layout, Memory, Producer, Publisher, Received, SleepFlag, Subscriber, Words, broadcast, init_at,
};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use std::sync::Arc;

/// Explores every interleaving with at most three preemptions (LOOM_MAX_PREEMPTIONS overrides); all values that each relaxed or
/// acquire load may see are explored without bound.
fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(3));
    builder.check(model);
}

/// A ring of two slots whose indices are about to wrap.
fn ring() -> (Producer<u64>, Consumer<u64>) {
    let memory: Arc<dyn Memory> = Arc::new(Heap::new(Layout::<u64>::bytes(2)));
    init_at::<u64>(&*memory, 0, 2, u32::MAX).unwrap();
    (Producer::attach(memory.clone(), 0).unwrap(), Consumer::attach(memory, 0).unwrap())
}

fn push(producer: &mut Producer<u64>, value: u64) {
    while producer.push(value).is_err() {
        thread::yield_now();
    }
}

fn pop(consumer: &mut Consumer<u64>) -> u64 {
    loop {
        match consumer.pop() {
            Some(value) => return value,
            None => thread::yield_now(),
        }
    }
}

#[test]
fn req_002_2_elements_arrive_whole_in_order_and_once_over_full_empty_and_wrap() {
    explore(|| {
        let (mut producer, mut consumer) = ring();
        let writer = thread::spawn(move || (1..=3).for_each(|value| push(&mut producer, value)));
        (1..=3).for_each(|value| assert_eq!(pop(&mut consumer), value));
        assert_eq!(consumer.pop(), None);
        writer.join().unwrap();
    });
}

#[test]
fn req_002_2_a_batch_is_invisible_until_published_and_then_whole() {
    explore(|| {
        let (mut producer, mut consumer) = ring();
        let writer = thread::spawn(move || {
            producer.write(1, 11);
            producer.write(0, 10);
            producer.publish(2);
            while producer.free_for(2) < 2 {
                thread::yield_now();
            }
            producer.write(0, 12);
            producer.publish(1);
        });
        loop {
            match consumer.available_for(2) {
                2 => break,
                part => assert_eq!(part, 0, "half a batch is visible"),
            }
            thread::yield_now();
        }
        assert_eq!((consumer.read(0), consumer.read(1)), (10, 11));
        consumer.release(2);
        assert_eq!(pop(&mut consumer), 12);
        writer.join().unwrap();
    });
}

#[test]
fn req_002_8_a_successor_on_either_side_loses_and_repeats_nothing() {
    explore(|| {
        let memory: Arc<dyn Memory> = Arc::new(Heap::new(Layout::<u64>::bytes(2)));
        init_at::<u64>(&*memory, 0, 2, u32::MAX).unwrap();
        let mut consumer = Consumer::<u64>::attach(memory.clone(), 0).unwrap();
        let writer = thread::spawn(move || {
            for value in 1..=3 {
                let mut producer = Producer::<u64>::attach(memory.clone(), 0).unwrap();
                push(&mut producer, value);
                if producer.free_for(1) > 0 {
                    producer.write(0, 99); // dies before it publishes
                }
            }
        });
        (1..=3).for_each(|value| assert_eq!(pop(&mut consumer), value));
        assert_eq!(consumer.pop(), None);
        writer.join().unwrap();
    });
}

#[test]
fn req_001_5_the_sleeper_is_always_woken() {
    explore(|| {
        let (mut producer, mut consumer) = ring();
        let memory: Arc<dyn Memory> = Arc::new(Heap::new(4096));
        let word = || Words::new(memory.clone(), 0, 1).unwrap();
        drop(word().cleared());
        let (mut sleeper, mut waker) = (SleepFlag::sleeper(word()), SleepFlag::waker(word()));
        // A bell that stays rung until heard, as an eventfd does. Never rung and waited for: loom reports the deadlock.
        let bell = loom::sync::Arc::new((Mutex::new(false), Condvar::new()));
        let rung = bell.clone();
        let writer = thread::spawn(move || {
            for value in 1..=2 {
                producer.push(value).unwrap();
                if waker.must_ring() {
                    *rung.0.lock().unwrap() = true;
                    rung.1.notify_one();
                }
            }
        });
        let mut next = 1;
        while next <= 2 {
            while let Some(value) = consumer.pop() {
                assert_eq!(value, next);
                next += 1;
            }
            if next <= 2 {
                sleeper.sleep_unless(
                    || consumer.available_for(1) > 0,
                    || {
                        let mut heard = bell.0.lock().unwrap();
                        while !*heard {
                            heard = bell.1.wait(heard).unwrap();
                        }
                        *heard = false;
                    },
                );
            }
        }
        writer.join().unwrap();
    });
}

/// A broadcast of `capacity` slots of two words each.
fn broadcast(capacity: u32) -> Arc<dyn Memory> {
    let memory: Arc<dyn Memory> = Arc::new(Heap::new(broadcast::bytes::<[u64; 2]>(capacity)));
    broadcast::init::<[u64; 2]>(memory.clone(), 0, capacity).unwrap();
    memory
}

#[test]
fn req_000_2_a_reader_sees_whole_messages_and_exact_losses() {
    explore(|| {
        let memory = broadcast(1);
        let mut reader = Subscriber::<[u64; 2]>::attach(memory.clone(), 0, None).unwrap();
        let writer = thread::spawn(move || {
            let mut publisher = Publisher::<[u64; 2]>::attach(memory, 0, None).unwrap();
            (1..=2).for_each(|value| publisher.send(&[value, value]).unwrap());
        });
        let mut expected = 1;
        for _ in 0..2 {
            match reader.receive() {
                Received::Message(message) => {
                    assert_eq!(message, [expected; 2], "torn, skipped or repeated");
                    expected += 1;
                }
                Received::Overrun(lost) => expected += lost,
                Received::Empty => thread::yield_now(),
            }
        }
        writer.join().unwrap();
        assert_eq!(reader.received() + reader.lost() + reader.depth(), 2);
    });
}

#[test]
fn req_000_2_the_latest_message_is_whole() {
    explore(|| {
        let memory = broadcast(1);
        let reader = Subscriber::<[u64; 2]>::attach(memory.clone(), 0, None).unwrap();
        let mut publisher = Publisher::<[u64; 2]>::attach(memory, 0, None).unwrap();
        publisher.send(&[1, 1]).unwrap();
        let writer = thread::spawn(move || publisher.send(&[2, 2]).unwrap());
        if let Some(latest) = reader.latest() {
            assert_eq!(latest[0], latest[1], "torn");
        }
        writer.join().unwrap();
    });
}

#[test]
fn req_000_2_a_message_that_is_announced_is_there() {
    explore(|| {
        let memory = broadcast(2);
        let mut publisher = Publisher::<[u64; 2]>::attach(memory.clone(), 0, None).unwrap();
        // No yielding here: loom hides old values from a thread that has yielded.
        let reading = thread::spawn(move || {
            let mut reader = Subscriber::<[u64; 2]>::attach(memory, 0, None).unwrap();
            reader.rewind();
            match reader.receive() {
                Received::Message(message) => assert_eq!(message, [7, 7]),
                Received::Overrun(lost) => panic!("lost {lost} of 1"),
                Received::Empty => {}
            }
        });
        publisher.send(&[7, 7]).unwrap();
        reading.join().unwrap();
    });
}

#[test]
fn req_000_2_a_gated_reader_loses_nothing() {
    explore(|| {
        let memory = broadcast(1);
        let gate: Arc<dyn Memory> = Arc::new(Heap::new(Gate::words(1) * size_of::<loom::sync::atomic::AtomicU64>()));
        let words = || Words::new(gate.clone(), 0, Gate::words(1)).unwrap();
        drop(words().cleared());
        let mut doorkeeper = Gate::new(words(), 1).unwrap();
        doorkeeper.admit(0, 0);
        let mut publisher = Publisher::<[u64; 2]>::attach(memory.clone(), 0, Some(doorkeeper)).unwrap();
        let mut reader = Subscriber::<[u64; 2]>::attach(memory, 0, GateLine::new(words(), 1, 0)).unwrap();
        let writer = thread::spawn(move || {
            for value in 1..=2 {
                while let Err(behind) = publisher.send(&[value; 2]) {
                    assert_eq!((behind.reader, behind.messages), (0, 1));
                    thread::yield_now();
                }
            }
        });
        let mut expected = 1;
        while expected <= 2 {
            match reader.receive() {
                Received::Message(message) => {
                    assert_eq!(message, [expected; 2]);
                    expected += 1;
                }
                Received::Overrun(lost) => panic!("gated, and lost {lost}"),
                Received::Empty => thread::yield_now(),
            }
        }
        writer.join().unwrap();
    });
}
