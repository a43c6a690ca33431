//! Heartbeats find hangs. (Crashes are found by the pidfd and by EOF, at once; never wait for a heartbeat to notice a crash.)
//!
//! The owner counts beats in its segment's header and stamps them with CLOCK_MONOTONIC_COARSE (vDSO, no system call). The observer
//! judges by *its own* clock when it last saw the count move, so a lying stamp gains nothing; the stamp is for display.
//! Must never act: [`Liveness`] is a pure policy with time as a parameter; who kills and restarts is the supervisor.

use super::header::{AT_BEATS, AT_STAMP, Header};
use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Now, on CLOCK_MONOTONIC_COARSE (ticks of 1–4 ms).
pub fn coarse_now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map(Duration::from).unwrap_or_default()
}

/// What an observer reads: a count and the time the owner gave it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beat {
    /// Beats so far.
    pub count: u64,
    /// When the last one was, on the owner's CLOCK_MONOTONIC_COARSE.
    pub at: Duration,
}

impl Beat {
    /// Age at `now`, for display; 0 if the stamp lies ahead.
    pub const fn age(self, now: Duration) -> Duration {
        now.saturating_sub(self.at)
    }
}

impl Header {
    /// Owner: one more beat.
    pub fn beat(&self, now: Duration) {
        self.set(AT_STAMP, u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
        self.set(AT_BEATS, self.get(AT_BEATS).wrapping_add(1));
    }

    /// Observer: the last beat.
    pub fn last_beat(&self) -> Beat {
        let count = self.get(AT_BEATS);
        Beat { count, at: Duration::from_nanos(self.get(AT_STAMP)) }
    }
}

/// What is to be thought of the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its count moved within the time-out.
    Alive,
    /// Its count stood still for this long.
    Hung(Duration),
}

/// The policy: hung is whose count has not moved for `timeout`, and what was granted it since.
#[derive(Clone, Copy, Debug)]
pub struct Liveness {
    timeout: Duration,
    grace: Duration,
    count: u64,
    moved_at: Duration,
}

impl Liveness {
    /// Starts the clock at `now`: a process that never beats is hung at `now + timeout`.
    pub const fn new(timeout: Duration, now: Duration) -> Self {
        Self { timeout, grace: Duration::ZERO, count: 0, moved_at: now }
    }

    /// The same for a successor, from `now`.
    #[must_use]
    pub const fn restarted(self, now: Duration) -> Self {
        Self::new(self.timeout, now)
    }

    /// More time, until the count moves.
    pub const fn grant(&mut self, more: Duration) {
        self.grace = self.grace.saturating_add(more);
    }

    /// For how long the count has not moved, as of the last observation at `now`.
    pub const fn silent(&self, now: Duration) -> Duration {
        now.saturating_sub(self.moved_at)
    }

    /// The time-out without grants.
    pub const fn timeout(&self) -> Duration {
        self.timeout
    }

    /// One observation.
    pub fn observe(&mut self, count: u64, now: Duration) -> Verdict {
        if count != self.count {
            (self.count, self.moved_at, self.grace) = (count, now, Duration::ZERO);
        }
        let silent = self.silent(now);
        if silent < self.timeout.saturating_add(self.grace) { Verdict::Alive } else { Verdict::Hung(silent) }
    }

    /// When to look again at the latest.
    pub const fn deadline(&self) -> Duration {
        self.moved_at.saturating_add(self.timeout).saturating_add(self.grace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    const fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    #[test]
    fn req_004_5_hung_after_the_timeout_and_not_before() {
        let mut liveness = Liveness::new(ms(300), ms(1000));
        assert_eq!(liveness.observe(0, ms(1299)), Verdict::Alive);
        assert_eq!(liveness.observe(0, ms(1300)), Verdict::Hung(ms(300)), "never beat at all");
        assert_eq!(liveness.observe(1, ms(1350)), Verdict::Alive);
        assert_eq!(liveness.deadline(), ms(1650));
        assert_eq!(liveness.observe(1, ms(1649)), Verdict::Alive);
        assert_eq!(liveness.observe(1, ms(1651)), Verdict::Hung(ms(301)));
        assert_eq!(liveness.observe(2, ms(1700)), Verdict::Alive, "came back");
        assert_eq!(liveness.observe(1, ms(2100)), Verdict::Alive, "a successor starts over: any change is a sign of life");
        assert_eq!(liveness.observe(1, ms(50)), Verdict::Alive, "a clock that runs backwards is no verdict");
    }

    #[test]
    fn a_grant_lasts_until_the_count_moves() {
        let mut liveness = Liveness::new(ms(250), ms(0));
        assert_eq!(liveness.observe(0, ms(250)), Verdict::Hung(ms(250)));
        liveness.grant(ms(50));
        assert_eq!((liveness.observe(0, ms(299)), liveness.deadline()), (Verdict::Alive, ms(300)));
        assert_eq!(liveness.observe(0, ms(300)), Verdict::Hung(ms(300)));
        assert_eq!(liveness.observe(1, ms(310)), Verdict::Alive);
        assert_eq!(liveness.deadline(), ms(560));
        assert_eq!(liveness.restarted(ms(1000)).deadline(), ms(1250));
    }

    #[test]
    fn beats_count_and_carry_a_coarse_stamp() {
        let header = Header::create(std::sync::Arc::new(crate::ring::memory::Heap::new(4096)), 0).unwrap();
        assert_eq!(header.last_beat(), Beat::default());
        let now = coarse_now();
        header.beat(now);
        header.beat(now);
        assert_eq!(header.last_beat(), Beat { count: 2, at: now });
        assert_eq!(header.last_beat().age(now + ms(5)), ms(5));
    }
}
