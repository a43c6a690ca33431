//! Recovery strategies as pure functions: retry, failover, circuit breaker. (Restart is `supervisor/backoff.rs`.)
//!
//! Time is a parameter, waiting is the caller's. Must never retry without a bound.

use std::ops::ControlFlow;
use std::time::Duration;

/// Retry: so many attempts, with doubling pauses between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Attempts in all, the first included.
    pub attempts: u32,
    /// Pause after the first.
    pub first_pause: Duration,
    /// Longest pause.
    pub longest_pause: Duration,
}

impl Retry {
    /// Calls `operation` until it succeeds, `is_transient` says no, or the attempts are used up; `wait` gets each pause.
    pub fn run<T, E>(
        self,
        mut operation: impl FnMut(u32) -> Result<T, E>,
        is_transient: impl Fn(&E) -> bool,
        mut wait: impl FnMut(Duration),
    ) -> Result<T, E> {
        let mut attempt = 1;
        loop {
            match operation(attempt) {
                Err(error) if attempt < self.attempts && is_transient(&error) => wait(self.pause(attempt)),
                outcome => return outcome,
            }
            attempt += 1;
        }
    }

    /// Pause after attempt number `attempt` (counted from 1).
    pub fn pause(self, attempt: u32) -> Duration {
        let doublings = attempt.saturating_sub(1).min(30);
        self.first_pause.saturating_mul(1 << doublings).min(self.longest_pause)
    }
}

/// Failover: `preferred` if it is healthy, else the next healthy one in turn; `None` if there is none.
pub fn failover(preferred: usize, healthy: &[bool]) -> Option<usize> {
    let turn = (0..healthy.len()).map(|step| (preferred % healthy.len() + step) % healthy.len());
    turn.into_iter().find(|candidate| healthy.get(*candidate).copied().unwrap_or(false))
}

/// The state of a circuit breaker.
///
/// ```text
///   Closed ── `limit` failures in a row ──▶ Open ── `cool_down` passed ──▶ HalfOpen (one trial)
///     ▲                                      ▲                              │      │
///     └────────────── success ───────────────┼──────────────────────────────┘      │
///                                            └───────────── failure ───────────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breaker {
    /// Calls go through; so many failed in a row.
    Closed(u32),
    /// Calls are refused until this time.
    Open(Duration),
    /// One call is out to see whether it works again.
    HalfOpen,
}

/// A circuit breaker.
#[derive(Clone, Copy, Debug)]
pub struct CircuitBreaker {
    /// Failures in a row that open it.
    pub limit: u32,
    /// How long it stays open.
    pub cool_down: Duration,
    /// Where it is.
    pub state: Breaker,
}

impl CircuitBreaker {
    /// A closed one.
    pub const fn new(limit: u32, cool_down: Duration) -> Self {
        Self { limit, cool_down, state: Breaker::Closed(0) }
    }

    /// Whether a call may be made at `now`: Continue, or Break with the time to wait.
    pub fn ask(&mut self, now: Duration) -> ControlFlow<Duration> {
        match self.state {
            Breaker::Closed(_) => ControlFlow::Continue(()),
            Breaker::Open(until) if now >= until => {
                self.state = Breaker::HalfOpen;
                ControlFlow::Continue(())
            }
            Breaker::Open(until) => ControlFlow::Break(until - now),
            Breaker::HalfOpen => ControlFlow::Break(Duration::ZERO),
        }
    }

    /// How the call ended.
    pub fn report(&mut self, success: bool, now: Duration) {
        let opened = Breaker::Open(now.saturating_add(self.cool_down));
        self.state = match self.state {
            _ if success => Breaker::Closed(0),
            Breaker::Closed(failures) if failures + 1 < self.limit => Breaker::Closed(failures + 1),
            _ => opened,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    const fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    #[test]
    fn req_003_10_retry_stops_at_success_at_a_lasting_error_and_at_the_bound() {
        let retry = Retry { attempts: 5, first_pause: ms(10), longest_pause: ms(35) };
        let mut pauses = Vec::new();
        let succeeds_third = |attempt| if attempt == 3 { Ok(attempt) } else { Err("busy") };
        assert_eq!(retry.run(succeeds_third, |error| *error == "busy", |pause| pauses.push(pause)), Ok(3));
        assert_eq!(pauses, [ms(10), ms(20)]);
        pauses.clear();
        assert_eq!(retry.run(|_| Err::<(), _>("busy"), |error| *error == "busy", |pause| pauses.push(pause)), Err("busy"));
        assert_eq!(pauses, [ms(10), ms(20), ms(35), ms(35)]);
        let mut calls = 0;
        assert_eq!(
            retry.run(
                |_| {
                    calls += 1;
                    Err::<(), _>("broken")
                },
                |error| *error == "busy",
                |_| ()
            ),
            Err("broken")
        );
        assert_eq!(calls, 1);
    }

    #[test]
    fn req_003_10_failover_takes_the_next_healthy_one() {
        assert_eq!(failover(1, &[true, true, true]), Some(1));
        assert_eq!(failover(1, &[true, false, true]), Some(2));
        assert_eq!(failover(2, &[true, false, false]), Some(0));
        assert_eq!(failover(5, &[false, false, true]), Some(2));
        assert_eq!(failover(0, &[false, false]), None);
        assert_eq!(failover(3, &[]), None);
    }

    #[test]
    fn req_003_10_the_breaker_opens_after_n_failures_tries_once_and_closes_on_success() {
        let mut breaker = CircuitBreaker::new(3, ms(100));
        for now in 0..3 {
            assert_eq!(breaker.ask(ms(now)), ControlFlow::Continue(()));
            breaker.report(false, ms(now));
        }
        assert_eq!(breaker.ask(ms(50)), ControlFlow::Break(ms(52)));
        assert_eq!(breaker.ask(ms(102)), ControlFlow::Continue(()), "the trial");
        assert_eq!(breaker.ask(ms(102)), ControlFlow::Break(ms(0)), "only one");
        breaker.report(false, ms(103));
        assert_eq!(breaker.state, Breaker::Open(ms(203)));
        assert_eq!(breaker.ask(ms(203)), ControlFlow::Continue(()));
        breaker.report(true, ms(204));
        assert_eq!(breaker.state, Breaker::Closed(0));
        breaker.report(false, ms(205));
        breaker.report(true, ms(206));
        breaker.report(false, ms(207));
        assert_eq!(breaker.state, Breaker::Closed(1), "a success in between forgets");
    }
}
