//! The ring and the broadcast against the simplest possible models, over random programs, starting anywhere (above all near the wrap).
use super::memory::Heap;
use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::Arc;

#[derive(Clone, Debug)]
enum Step {
    Push(u32),
    InPlace(u32),
    Pop(u32),
    Peek(u32),
    NewProducer,
    NewConsumer,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let count = 0..40_u32;
    let step = prop_oneof![
        3 => count.clone().prop_map(Step::Push),
        3 => count.clone().prop_map(Step::InPlace),
        3 => count.clone().prop_map(Step::Pop),
        3 => count.prop_map(Step::Peek),
        1 => Just(Step::NewProducer),
        1 => Just(Step::NewConsumer),
    ];
    proptest::collection::vec(step, 0..120)
}

fn start() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (0..80_u32).prop_map(|back| u32::MAX - back), any::<u32>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn req_000_8_the_ring_is_a_queue_of_exactly_its_capacity(exponent in 0..6_u32, start in start(), steps in steps()) {
        let capacity = 1 << exponent;
        let memory: Arc<dyn Memory> = Arc::new(Heap::new(Layout::<u64>::bytes(capacity)));
        init_at::<u64>(&*memory, 0, capacity, start).unwrap();
        let mut producer = Producer::<u64>::attach(memory.clone(), 0).unwrap();
        let mut consumer = Consumer::<u64>::attach(memory.clone(), 0).unwrap();
        let mut model = VecDeque::new();
        let mut next = 0_u64;
        for step in steps {
            let room = capacity as usize - model.len();
            match step {
                Step::Push(count) => for _ in 0..count {
                    let accepted = producer.push(next).is_ok();
                    prop_assert_eq!(accepted, model.len() < capacity as usize);
                    if accepted { model.push_back(next) }
                    next += 1;
                },
                Step::InPlace(count) => {
                    let mut parts = producer.reserve(count);
                    let filled = parts.iter_mut().flat_map(|part| part.iter_mut()).map(|slot| { *slot = next; model.push_back(next); next += 1; }).count();
                    prop_assert_eq!(filled, room.min(count as usize));
                    producer.publish(filled as u32);
                }
                Step::Pop(count) => for _ in 0..count {
                    prop_assert_eq!(consumer.pop(), model.pop_front());
                },
                Step::Peek(count) => {
                    let seen: Vec<u64> = consumer.peek(count).into_iter().flatten().copied().collect();
                    prop_assert_eq!(&seen, &model.iter().copied().take(count as usize).collect::<Vec<_>>());
                    let keep = seen.len() / 2; // what is not released is seen again
                    consumer.release((seen.len() - keep) as u32);
                    model.drain(..seen.len() - keep);
                }
                Step::NewProducer => {
                    if producer.free() > 0 { producer.write(0, u64::MAX) }
                    producer = Producer::attach(memory.clone(), 0).unwrap();
                }
                Step::NewConsumer => consumer = Consumer::attach(memory.clone(), 0).unwrap(),
            }
            prop_assert_eq!(cursor::filled(producer.position(), consumer.position()) as usize, model.len());
        }
        prop_assert_eq!((producer.invalid_peer(), consumer.invalid_peer()), (0, 0));
    }

    #[test]
    fn cursor_arithmetic_holds_at_every_index(exponent in 0..31_u32, consumer in any::<u32>(), filled in any::<u32>()) {
        let size = 1 << exponent;
        let filled = filled % (size + 1);
        let producer = consumer.wrapping_add(filled);
        prop_assert_eq!(cursor::filled(producer, consumer), filled);
        prop_assert_eq!(cursor::free(size, producer, consumer), size - filled);
        prop_assert!(cursor::slot(producer, size) < size as usize);
        prop_assert_eq!(cursor::slot(producer.wrapping_add(size), size), cursor::slot(producer, size));
    }

    #[test]
    fn req_000_2_received_and_lost_and_waiting_are_all_that_was_sent(exponent in 0..6_u32, bursts in proptest::collection::vec((0..100_u64, 0..100_usize), 0..40)) {
        let capacity = 1 << exponent;
        let memory: Arc<dyn Memory> = Arc::new(Heap::new(broadcast::bytes::<[u8; 13]>(capacity)));
        broadcast::init::<[u8; 13]>(memory.clone(), 0, capacity).unwrap();
        let mut reader = Subscriber::<[u8; 13]>::attach(memory.clone(), 0, None).unwrap();
        let mut number = 0_u64;
        let mut expected = 1_u64;
        for (send, receive) in bursts {
            let mut publisher = Publisher::<[u8; 13]>::attach(memory.clone(), 0, None).unwrap();
            for _ in 0..send {
                number += 1;
                let mut message = [number as u8; 13];
                message[..8].copy_from_slice(&number.to_le_bytes());
                publisher.send(&message).unwrap();
            }
            for _ in 0..receive {
                match reader.receive() {
                    Received::Message(message) => {
                        prop_assert_eq!(u64::from_le_bytes(message[..8].try_into().unwrap()), expected);
                        prop_assert!(message[8..].iter().all(|byte| *byte == expected as u8), "the odd bytes behind the last whole word");
                        expected += 1;
                    }
                    Received::Overrun(lost) => expected += lost,
                    Received::Empty => break,
                }
            }
            prop_assert_eq!(reader.received() + reader.lost() + reader.depth(), number);
        }
    }
}
