//! Progress of what takes longer than two seconds: one line on stderr, drawn over itself and taken away at the end.
//!
//! Only in a process that has called [`show`], and only where stderr is a terminal: a pipe, a log, `--json` and tests never see a
//! byte of it. Must never be called for a packet: a comparison a batch is what it costs.

use super::clock;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// What is over before needs no progress.
const PATIENCE_NS: u64 = 2_000_000_000;
/// Between two drawings.
const PERIOD_NS: u64 = 250_000_000;
/// To the first column, and what stands there away.
const CLEAR: &str = "\r\x1b[K";

/// There is a line to draw on, and nobody draws on it.
static FREE: AtomicBool = AtomicBool::new(false);

/// From now on this process draws progress, if somebody sees it.
pub fn show() {
    FREE.store(std::io::stderr().is_terminal(), Ordering::Relaxed);
}

/// The line; given back, and empty, when dropped. What goes on inside something that has it already draws nothing.
#[derive(Debug)]
struct Line {
    is_ours: bool,
    is_drawn: bool,
}

impl Line {
    fn take() -> Self {
        Self { is_ours: FREE.swap(false, Ordering::Relaxed), is_drawn: false }
    }

    /// A terminal that is gone has nobody to tell.
    fn draw(&mut self, text: &str) {
        self.is_drawn = true;
        let _ = write!(std::io::stderr(), "{CLEAR}{text}");
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.is_drawn {
            // As above.
            let _ = write!(std::io::stderr(), "{CLEAR}");
        }
        if self.is_ours {
            FREE.store(true, Ordering::Relaxed);
        }
    }
}

/// Something that is counted.
#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    total: Option<u64>,
    begin_ns: u64,
    next_ns: u64,
    line: Line,
}

impl Progress {
    /// Begins now. `total`: how many there will be, if that is known.
    pub fn new(what: &'static str, total: Option<u64>) -> Self {
        let (begin_ns, line) = (clock::monotonic_ns(), Line::take());
        Self { what, total, begin_ns, next_ns: if line.is_ours { begin_ns + PATIENCE_NS } else { u64::MAX }, line }
    }

    /// `done` so far; drawn if it is time.
    pub fn at(&mut self, now_ns: u64, done: u64) {
        if now_ns >= self.next_ns {
            self.next_ns = now_ns + PERIOD_NS;
            self.line.draw(&self.text(now_ns, done));
        }
    }

    fn text(&self, now_ns: u64, done: u64) -> String {
        let seconds = now_ns.saturating_sub(self.begin_ns) / 1_000_000_000;
        let of = self.total.map(|total| format!(" of {total} ({} %)", u128::from(done) * 100 / u128::from(total.max(1))));
        format!("{} {done}{}, {seconds} s", self.what, of.unwrap_or_default())
    }
}

/// One thing after the other, each known to take its time.
#[derive(Debug)]
pub struct Steps {
    total: Option<usize>,
    done: usize,
    line: Line,
}

impl Steps {
    /// `total`: how many there will be, if that is known.
    pub fn new(total: Option<usize>) -> Self {
        Self { total, done: 0, line: Line::take() }
    }

    /// The next one begins.
    pub fn next(&mut self, what: &str) {
        self.done += 1;
        if self.line.is_ours {
            self.line.draw(&self.text(what));
        }
    }

    fn text(&self, what: &str) -> String {
        self.total.map_or_else(|| what.to_owned(), |total| format!("{} of {total}: {what}", self.done))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_how_far_and_how_long() {
        let text = |total, done| Progress { begin_ns: 1_000_000_000, ..Progress::new("sent", total) }.text(4_999_999_999, done);
        assert_eq!(text(Some(2_048), 512), "sent 512 of 2048 (25 %), 3 s");
        assert_eq!(text(Some(u64::MAX), u64::MAX), "sent 18446744073709551615 of 18446744073709551615 (100 %), 3 s");
        assert_eq!((text(Some(0), 0).as_str(), text(None, 7).as_str()), ("sent 0 of 0 (0 %), 3 s", "sent 7, 3 s"));
        let steps = |total| Steps { done: 2, ..Steps::new(total) }.text("xsk");
        assert_eq!((steps(Some(9)).as_str(), steps(None).as_str()), ("2 of 9: xsk", "xsk"));
    }

    /// The process that runs tests has not asked for it, terminal or not.
    #[test]
    fn nothing_is_drawn_unasked() {
        let (mut progress, mut steps) = (Progress::new("sent", None), Steps::new(None));
        progress.at(u64::MAX - 1, 5);
        steps.next("one");
        assert!(!progress.line.is_drawn && !steps.line.is_drawn);
    }
}
