//! When to restart a worker that died (DECISIONS §9). Pure: time is a parameter, nothing is started here.
//!
//! ```text
//!   died after RUN and a processed turn ──▶ restart at once, all failures forgotten
//!   died before that ──▶ wait 100 ms, 200, 400 … 10 s, each ±20 % ──▶ 5 in 10 s: DEGRADED, retry every 10 s
//! ```
//! Must never give up: DEGRADED goes on trying, and the first worker that proves itself ends it.

use std::time::Duration;

/// First delay.
pub const FIRST: Duration = Duration::from_millis(100);
/// Longest delay, and the period of retries while DEGRADED.
pub const LONGEST: Duration = Duration::from_secs(10);
/// So many unproven deaths …
pub const BREAKER_COUNT: usize = 5;
/// … within this are DEGRADED.
pub const BREAKER_WINDOW: Duration = Duration::from_secs(10);

/// What to do about a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// How long to wait first.
    pub after: Duration,
    /// Whether the worker counts as DEGRADED until it proves itself.
    pub degraded: bool,
}

/// One worker's record of failures.
#[derive(Clone, Debug)]
pub struct Backoff {
    /// Times of the last unproven deaths, oldest first.
    deaths: arrayvec::ArrayVec<Duration, BREAKER_COUNT>,
    streak: u32,
    degraded: bool,
    random: u64,
}

impl Backoff {
    /// `seed` decorrelates the jitter of several workers (its number and the time will do).
    pub const fn new(seed: u64) -> Self {
        Self { deaths: arrayvec::ArrayVec::new_const(), streak: 0, degraded: false, random: seed | 1 }
    }

    /// A worker died at `now`. `proved`: it had reached RUN and processed a turn.
    pub fn died(&mut self, now: Duration, proved: bool) -> Restart {
        if proved {
            self.proved();
            return Restart { after: Duration::ZERO, degraded: false };
        }
        if self.deaths.is_full() {
            self.deaths.remove(0);
        }
        self.deaths.push(now);
        self.degraded |= self.deaths.is_full() && self.deaths.first().is_some_and(|first| now.saturating_sub(*first) <= BREAKER_WINDOW);
        let delay = FIRST.saturating_mul(1 << self.streak.min(16)).min(LONGEST);
        self.streak = self.streak.saturating_add(1);
        if self.degraded { Restart { after: LONGEST, degraded: true } } else { Restart { after: self.jittered(delay), degraded: false } }
    }

    /// A worker has reached RUN and processed a turn: everything before is forgotten.
    pub fn proved(&mut self) {
        self.deaths.clear();
        self.streak = 0;
        self.degraded = false;
    }

    /// Whether the breaker is open.
    pub const fn degraded(&self) -> bool {
        self.degraded
    }

    /// ±20 %, from xorshift64 (Marsaglia 2003).
    fn jittered(&mut self, delay: Duration) -> Duration {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        delay.mul_f64(0.8 + 0.4 * (self.random % 1001) as f64 / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    const fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    #[test]
    fn req_003_10_a_proven_worker_is_restarted_at_once_however_often() {
        let mut backoff = Backoff::new(1);
        for death in 0..100 {
            assert_eq!(backoff.died(ms(death), true), Restart { after: Duration::ZERO, degraded: false });
        }
    }

    #[test]
    fn req_003_10_the_breaker_opens_at_the_fifth_death_in_ten_seconds_and_closes_on_proof() {
        let mut backoff = Backoff::new(7);
        for (death, expected) in [100.0, 200.0, 400.0, 800.0].into_iter().enumerate() {
            let restart = backoff.died(ms(1000 * death as u64), false);
            let ratio = restart.after.as_secs_f64() * 1000.0 / expected;
            assert!((0.8..=1.2).contains(&ratio) && !restart.degraded, "death {death}: {restart:?}");
        }
        assert_eq!(backoff.died(ms(10_000), false), Restart { after: LONGEST, degraded: true });
        assert_eq!(backoff.died(ms(25_000), false), Restart { after: LONGEST, degraded: true }, "stays open");
        backoff.proved();
        assert!(!backoff.degraded() && backoff.died(ms(26_000), false).after <= ms(120));
    }

    #[test]
    fn slow_deaths_back_off_to_ten_seconds_without_degrading() {
        let mut backoff = Backoff::new(3);
        for death in 0..200 {
            let restart = backoff.died(ms(11_000 * death), false);
            assert!(!restart.degraded && restart.after <= LONGEST.mul_f64(1.2) && restart.after >= FIRST.mul_f64(0.8), "{restart:?}");
        }
    }

    #[test]
    fn jitter_spreads_over_the_whole_forty_percent() {
        let delays: Vec<f64> = (0..1000).map(|seed| Backoff::new(seed * 7919 + 12345).died(ms(0), false).after.as_secs_f64()).collect();
        let (min, max) = delays.iter().fold((f64::MAX, 0.0_f64), |(min, max), delay| (min.min(*delay), max.max(*delay)));
        assert!((0.08..0.085).contains(&min) && (0.115..=0.12001).contains(&max), "{min} {max}");
    }
}
