//! Recovery strategies as pure functions, for users of the library: retry and failover. Restart and the circuit breaker are
//! the supervisor's (`supervisor/backoff.rs`: back-off, and DEGRADED after five failures in ten seconds).
//!
//! ```
//! use relay::worker::recovery::{Retry, failover};
//! use std::time::Duration;
//!
//! let retry = Retry { attempts: 3, first_pause: Duration::from_millis(1), longest_pause: Duration::from_millis(4) };
//! let busy_once = |attempt| if attempt == 1 { Err("busy") } else { Ok("done") };
//! assert_eq!(retry.run(busy_once, |error| *error == "busy", std::thread::sleep), Ok("done"));
//! assert_eq!(failover(1, &[true, false, true]), Some(2));
//! ```
//!
//! Time is a parameter, waiting is the caller's. Must never retry without a bound.

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
}
