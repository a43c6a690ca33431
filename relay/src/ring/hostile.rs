//! A peer that writes anything anywhere: headers, indices, stamps. Nothing may panic, hang, leave the memory, or claim the impossible.
//!
//! Deterministic (xorshift), so a failure repeats. 200,000 inputs by default; RELAY_FUZZ_INPUTS asks for more.
use super::memory::Heap;
use super::*;
use std::sync::Arc;

pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Values that hurt: small, huge, powers of two and their neighbours, anything.
    pub(crate) fn value(&mut self) -> u64 {
        let any = self.next();
        match any % 6 {
            0 => any >> 60,
            1 => u64::MAX - (any >> 60),
            2 => 1 << (any >> 58),
            3 => (1_u64 << (any >> 58)).wrapping_sub(1),
            4 => u64::from(u32::MAX) - (any >> 60),
            _ => any,
        }
    }
}

pub(crate) fn inputs() -> u64 {
    std::env::var("RELAY_FUZZ_INPUTS").ok().and_then(|count| count.parse().ok()).unwrap_or(200_000)
}

/// Overwrites one to four words (or halves) within the first `reach` bytes.
fn mutate(random: &mut Random, words: &[super::sync::AtomicU64]) {
    for _ in 0..=random.next() % 4 {
        let word = &words[random.next() as usize % words.len()];
        let (value, old) = (random.value(), word.load(super::sync::Ordering::Relaxed));
        let mixed = match random.next() % 3 {
            0 => value,
            1 => old & !0xffff_ffff | value & 0xffff_ffff,
            _ => old ^ 1 << (value % 64),
        };
        word.store(mixed, super::sync::Ordering::Relaxed);
    }
}

#[test]
fn req_002_13_a_hostile_ring_is_refused_or_harmless() {
    let mut random = Random(0x5eed_1234_5678_9abc);
    let memory: Arc<dyn Memory> = Arc::new(Heap::new(Layout::<u64>::bytes(16)));
    let words = Words::new(memory.clone(), 0, 384 / 8).unwrap();
    let (mut attached, mut refused, mut invalid) = (0, 0, 0);
    for _ in 0..inputs() {
        init_at::<u64>(&*memory, 0, 16, random.value() as u32).unwrap();
        let (mut producer, mut consumer) =
            (Producer::<u64>::attach(memory.clone(), 0).unwrap(), Consumer::<u64>::attach(memory.clone(), 0).unwrap());
        (0..random.next() % 17).for_each(|value| producer.push(value).unwrap());
        mutate(&mut random, &words);
        assert!(producer.free() <= 16 && consumer.available() <= 16);
        let filled: usize = producer.reserve(16).iter().map(|part| part.len()).sum();
        producer.publish(filled as u32);
        let read: usize = consumer.peek(100).iter().map(|part| part.len()).sum();
        assert!(filled <= 16 && read <= 16);
        consumer.release(read as u32);
        while consumer.pop().is_some() {}
        invalid += producer.invalid_peer() + consumer.invalid_peer();
        mutate(&mut random, &words);
        match (Producer::<u64>::attach(memory.clone(), 0), Consumer::<u64>::attach(memory.clone(), 0)) {
            (Ok(mut producer), Ok(mut consumer)) => {
                attached += 1;
                assert!(producer.capacity() <= 16 && producer.free() <= 16 && consumer.available() <= 16);
                while producer.push(1).is_ok() {}
                while consumer.pop().is_some() {}
            }
            _ => refused += 1,
        }
    }
    assert!(
        attached > 0 && refused > 0 && invalid > 0,
        "{attached} attached, {refused} refused, {invalid} invalid indices: the fuzz reaches nothing"
    );
}

#[test]
fn req_002_13_a_hostile_broadcast_is_refused_or_harmless() {
    let mut random = Random(0xfeed_beef_cafe_f00d);
    let len = broadcast::bytes::<[u8; 13]>(8);
    let memory: Arc<dyn Memory> = Arc::new(Heap::new(len));
    let all = Words::new(memory.clone(), 0, len / 8).unwrap();
    let gate_memory: Arc<dyn Memory> = Arc::new(Heap::new(Gate::words(3) * 8));
    let gate_words = || Words::new(gate_memory.clone(), 0, Gate::words(3)).unwrap();
    let (mut attached, mut refused, mut overruns) = (0, 0, 0);
    for _ in 0..inputs() / 4 {
        broadcast::init::<[u8; 13]>(memory.clone(), 0, 8).unwrap();
        let mut gate = Gate::new(gate_words().cleared().unwrap(), 3).unwrap();
        gate.admit(random.next() as u32 % 4, 0);
        let mut publisher = Publisher::<[u8; 13]>::attach(memory.clone(), 0, Some(gate)).unwrap();
        let mut reader = Subscriber::<[u8; 13]>::attach(memory.clone(), 0, None).unwrap();
        (0..random.next() % 7).for_each(|value| publisher.send(&[value as u8; 13]).unwrap());
        mutate(&mut random, &all);
        mutate(&mut random, &gate_words());
        for value in 0..10 {
            let _refused = publisher.send(&[value; 13]);
            overruns += u64::from(matches!(reader.receive(), Received::Overrun(_)));
            reader.latest();
            reader.depth();
        }
        reader.rewind();
        match (Publisher::<[u8; 13]>::attach(memory.clone(), 0, None), Subscriber::<[u8; 13]>::attach(memory.clone(), 0, None)) {
            (Ok(mut publisher), Ok(mut reader)) => {
                attached += 1;
                let _sent = publisher.send(&[1; 13]);
                reader.receive();
            }
            _ => refused += 1,
        }
    }
    assert!(
        attached > 0 && refused > 0 && overruns > 0,
        "{attached} attached, {refused} refused, {overruns} overruns: the fuzz reaches nothing"
    );
}
