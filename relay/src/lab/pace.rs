//! The sender's schedule: absolute, so that one late batch does not shift the rest. Pure; time is a parameter.

/// What to do at a given time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send so many datagrams now; the last of them was due `late_ns` ago.
    Send {
        /// At most the batch size.
        count: u32,
        /// Behind the schedule.
        late_ns: u64,
    },
    /// Nothing is due for so long.
    Wait(u64),
    /// All has been sent, or the time is up.
    Done,
}

/// A schedule of `rate` datagrams a second in batches.
#[derive(Clone, Debug)]
pub struct Pacer {
    start_ns: u64,
    rate: u64,
    total: u64,
    end_ns: u64,
    min_batch: u64,
    max_batch: u64,
    sent: u64,
}

impl Pacer {
    /// `rate` 0: as fast as possible. Ends after `total` datagrams or at `end_ns`, whichever comes first.
    pub fn new(start_ns: u64, rate: u64, total: u64, end_ns: u64, max_batch: u32) -> Self {
        let max_batch = u64::from(max_batch.max(1));
        // 50 µs between batches: fine enough for the receivers' buffers, coarse enough for one system call each.
        let min_batch = (rate / 20_000).clamp(1, max_batch);
        Self { start_ns, rate, total, end_ns, min_batch, max_batch, sent: 0 }
    }

    /// What is due at `now_ns`. `Send` must be answered by [`Pacer::sent`].
    pub fn step(&self, now_ns: u64) -> Step {
        let left = self.total.saturating_sub(self.sent);
        if left == 0 || now_ns >= self.end_ns {
            return Step::Done;
        }
        if self.rate == 0 {
            return Step::Send { count: narrow(left.min(self.max_batch)), late_ns: 0 };
        }
        let batch = self.min_batch.min(left);
        let due_ns = self.due_ns(self.sent + batch - 1);
        if now_ns < due_ns {
            return Step::Wait(due_ns - now_ns);
        }
        let due_count = self.due_count(now_ns).saturating_sub(self.sent);
        let count = due_count.clamp(batch, self.max_batch.min(left));
        Step::Send { count: narrow(count), late_ns: now_ns - due_ns }
    }

    /// Advances by what was sent.
    pub fn sent(&mut self, count: u32) {
        self.sent += u64::from(count);
    }

    /// When datagram `index` is due.
    fn due_ns(&self, index: u64) -> u64 {
        self.start_ns + wide_ratio(index, 1_000_000_000, self.rate)
    }

    /// Datagrams due up to `now_ns`.
    fn due_count(&self, now_ns: u64) -> u64 {
        wide_ratio(now_ns.saturating_sub(self.start_ns), self.rate, 1_000_000_000) + 1
    }
}

/// `a * b / c` without overflow on the way; saturates.
fn wide_ratio(a: u64, b: u64, c: u64) -> u64 {
    let wide = u128::from(a) * u128::from(b) / u128::from(c.max(1));
    u64::try_from(wide).unwrap_or(u64::MAX)
}

fn narrow(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a schedule on a clock that moves by `tick` ns; returns what was sent and when it ended.
    fn run(mut pacer: Pacer, tick: u64) -> (u64, u64) {
        let (mut now, mut sent) = (0, 0u64);
        loop {
            match pacer.step(now) {
                Step::Done => return (sent, now),
                Step::Wait(_) => {}
                Step::Send { count, .. } => {
                    assert!(count > 0 && count <= 64);
                    pacer.sent(count);
                    sent += u64::from(count);
                }
            }
            now += tick;
        }
    }

    #[test]
    fn the_rate_holds_over_a_second() {
        for rate in [10, 999, 50_000, 123_457, 500_000] {
            let (sent, _) = run(Pacer::new(0, rate, u64::MAX, 1_000_000_000, 64), 1_000);
            assert!(sent.abs_diff(rate) <= rate / 1_000 + 64, "{sent} of {rate}");
        }
    }

    #[test]
    fn a_stall_is_caught_up_with() {
        let mut pacer = Pacer::new(0, 100_000, u64::MAX, u64::MAX, 64);
        assert_eq!(pacer.step(20_000_000), Step::Send { count: 64, late_ns: 20_000_000 - 40_000 });
        pacer.sent(64);
        assert!(matches!(pacer.step(20_000_000), Step::Send { count: 64, .. }));
    }

    #[test]
    fn the_count_is_exact() {
        assert_eq!(run(Pacer::new(0, 100_000, 1_003, u64::MAX, 64), 500).0, 1_003);
        assert_eq!(run(Pacer::new(0, 0, 1_003, u64::MAX, 64), 500).0, 1_003);
    }
}
