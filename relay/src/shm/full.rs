//! What to do when there is no room: the caller's choice, always with a bound.
//!
//! Must never wait longer than it was told, and never lose a message uncounted: sent = accepted + dropped + refused.

use crate::ring::{Full, Producer};
use bytemuck::Pod;
use std::time::{Duration, Instant};

/// The choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// Look again and again, at most this long.
    Spin(Duration),
    /// Sleep between looks, at most this long.
    Block(Duration),
    /// Drop the message and count it.
    Drop,
    /// Hand it back at once.
    Error,
}

/// What happened to the messages offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct OfferStats {
    /// Messages that went in.
    pub sent: u64,
    /// Messages that met a full ring (counted once each).
    pub full: u64,
    /// Messages dropped by choice.
    pub dropped: u64,
    /// Messages handed back: at once, or after the time-out.
    pub refused: u64,
}

/// Pauses of [`OnFull::Block`].
const NAP: Duration = Duration::from_micros(50);

/// Offers `value`, doing as `choice` says while there is no room. `Ok` also for a message that was dropped by choice.
pub fn offer<T: Pod>(ring: &mut Producer<T>, value: T, choice: OnFull, stats: &mut OfferStats) -> Result<(), Full<T>> {
    let mut outcome = ring.push(value);
    if outcome.is_err() {
        stats.full += 1;
        outcome = match choice {
            OnFull::Error => outcome,
            OnFull::Drop => {
                stats.dropped += 1;
                return Ok(());
            }
            OnFull::Spin(limit) => retry(ring, value, limit, core::hint::spin_loop),
            OnFull::Block(limit) => retry(ring, value, limit, || std::thread::sleep(NAP)),
        };
    }
    *if outcome.is_ok() { &mut stats.sent } else { &mut stats.refused } += 1;
    outcome
}

fn retry<T: Pod>(ring: &mut Producer<T>, value: T, limit: Duration, pause: impl Fn()) -> Result<(), Full<T>> {
    let start = Instant::now();
    loop {
        let outcome = ring.push(value);
        if outcome.is_ok() || start.elapsed() >= limit {
            return outcome;
        }
        pause();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn req_002_11_every_choice_is_bounded_and_every_message_is_counted() {
        let (mut producer, mut consumer) = crate::ring::heap::<u64>(4).unwrap();
        let mut stats = OfferStats::default();
        let short = Duration::from_millis(2);
        let choices = [OnFull::Drop, OnFull::Error, OnFull::Spin(short), OnFull::Block(short)];
        for value in 0..100_u64 {
            let choice = choices[(value % 4) as usize];
            let outcome = offer(&mut producer, value, choice, &mut stats);
            assert!(outcome.is_ok() || outcome == Err(Full(value)) && choice != OnFull::Drop);
            if value % 7 == 0 {
                consumer.pop();
            }
        }
        assert_eq!(stats.sent + stats.dropped + stats.refused, 100);
        assert!(stats.full >= stats.dropped + stats.refused && stats.dropped > 0 && stats.refused > 0, "{stats:?}");
    }

    #[test]
    fn req_002_11_spin_and_block_get_in_when_the_reader_moves() {
        for choice in [OnFull::Spin(Duration::from_secs(5)), OnFull::Block(Duration::from_secs(5))] {
            let (mut producer, mut consumer) = crate::ring::heap::<u64>(1).unwrap();
            let reader = std::thread::spawn(move || {
                let mut seen = Vec::new();
                while seen.len() < 50 {
                    seen.extend(consumer.pop());
                    std::thread::yield_now();
                }
                seen
            });
            let mut stats = OfferStats::default();
            (0..50).for_each(|value| offer(&mut producer, value, choice, &mut stats).unwrap());
            assert_eq!(reader.join().unwrap(), (0..50).collect::<Vec<_>>());
            assert_eq!((stats.sent, stats.dropped, stats.refused), (50, 0, 0));
        }
    }
}
