//! A worker whose heartbeat stands still: hung, or only denied a CPU?
//!
//! Replacing a worker that would run if it could helps nobody, and on the packet path it costs packets. The kernel tells the two
//! apart: a thread that is ready and does not run is waiting for a CPU. Must never excuse a worker for long.

use std::collections::BTreeMap;
use std::time::Duration;

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Thread {
    /// It runs or could.
    ready: bool,
    /// Time on a CPU so far.
    ran: Duration,
}

/// The threads of a process at one moment, by id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Threads(BTreeMap<u32, Thread>);

impl Threads {
    /// As /proc has them; none where it can't be read.
    pub(super) fn of(pid: u32) -> Self {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let ids = tasks.filter_map(|task| task.file_name().to_string_lossy().parse::<u32>().ok());
        Self(ids.filter_map(|id| Some((id, thread(pid, id)?))).collect())
    }

    /// Whether one of them has been ready for the `elapsed` time since `before`, and got less than a quarter of a CPU.
    pub(super) fn starved_since(&self, before: &Self, elapsed: Duration) -> bool {
        let starved = |(id, now): (&u32, &Thread)| {
            before.0.get(id).is_some_and(|then| then.ready && now.ready && now.ran.saturating_sub(then.ran) < elapsed / 4)
        };
        self.0.iter().any(starved)
    }
}

/// `stat` has the state behind the name, `schedstat` begins with the time on a CPU in ns (proc(5)).
fn thread(pid: u32, id: u32) -> Option<Thread> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/task/{id}/{name}")).ok();
    let (stat, schedstat) = (read("stat")?, read("schedstat")?);
    let state = stat.rsplit_once(") ")?.1;
    let ran = schedstat.split_whitespace().next()?.parse().ok()?;
    Some(Thread { ready: state.starts_with('R'), ran: Duration::from_nanos(ran) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threads(of: &[(bool, u64)]) -> Threads {
        let thread = |(ready, ms): &(bool, u64)| Thread { ready: *ready, ran: Duration::from_millis(*ms) };
        Threads((0..).zip(of.iter().map(thread)).collect())
    }

    #[test]
    fn who_is_ready_and_does_not_run_is_starved() {
        let elapsed = Duration::from_millis(100);
        let cases = [
            ("stopped, or asleep", vec![(false, 5)], vec![(false, 5)], false),
            ("an endless loop", vec![(true, 5)], vec![(true, 105)], false),
            ("an endless loop on half a CPU", vec![(true, 5)], vec![(true, 55)], false),
            ("ready, and never on a CPU", vec![(true, 5)], vec![(true, 5)], true),
            ("has just gone to sleep", vec![(true, 5)], vec![(false, 6)], false),
            ("one of two", vec![(false, 5), (true, 5)], vec![(false, 5), (true, 7)], true),
            ("no process", vec![], vec![], false),
            ("a thread that is new", vec![], vec![(true, 5)], false),
        ];
        for (what, before, now, starved) in cases {
            assert_eq!(threads(&now).starved_since(&threads(&before), elapsed), starved, "{what}");
        }
    }

    #[test]
    fn this_thread_runs() {
        let id = nix::unistd::gettid().as_raw().cast_unsigned();
        // The kernel adds the time up at its ticks.
        let begin = std::time::Instant::now();
        loop {
            let threads = Threads::of(std::process::id());
            let own = threads.0.get(&id).unwrap();
            if own.ready && own.ran > Duration::ZERO {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(10), "{threads:?}");
        }
    }
}
