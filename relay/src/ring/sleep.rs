//! The sleep flag: a consumer that goes to sleep says so, looks once more, and only then sleeps; a producer rings only if it is said.
//!
//! ```text
//! sleeper: announce (odd) ─ SeqCst fence ─ recheck ─┬─ something there: withdraw (even), go on
//!                                                   └─ nothing: sleep on the bell ─ withdraw (even)
//! waker:   publish ─ SeqCst fence ─ flag odd and not yet rung for it? ring the bell
//! ```
//! The two fences make it impossible that the recheck misses the publication *and* the waker misses the flag. While both
//! sides run there is no system call. Must never ring or sleep itself: the bell belongs to the caller.

use super::memory::Words;
use super::sync::{Ordering, fence};

/// One side's view of the flag word. The sleeper alone writes it.
#[derive(Debug)]
pub struct SleepFlag {
    word: Words,
    /// Sleeper: what we wrote last. Waker: the value we last rang for.
    last: u64,
}

impl SleepFlag {
    /// The sleeping side (the consumer); goes on from the number its predecessor left.
    pub fn sleeper(word: Words) -> Self {
        let last = word.first().map_or(0, |word| word.load(Ordering::Relaxed)) | 1;
        let mut flag = Self { word, last };
        flag.withdraw();
        flag
    }

    /// The waking side (the producer).
    pub const fn waker(word: Words) -> Self {
        Self { word, last: 0 }
    }

    /// Sleeper: "I am about to sleep". The caller must recheck for work before it does.
    pub fn announce(&mut self) {
        self.set((self.last | 1).wrapping_add(2));
        fence(Ordering::SeqCst);
    }

    /// Sleeper: "I am awake".
    pub fn withdraw(&mut self) {
        self.set(self.last & !1);
    }

    /// Sleeper: the whole dance. `sleep` is called only if `has_work` still says no after the announcement, and must be bounded.
    pub fn sleep_unless(&mut self, has_work: impl FnOnce() -> bool, sleep: impl FnOnce()) {
        self.announce();
        if !has_work() {
            sleep();
        }
        self.withdraw();
    }

    /// Waker, after it published: whether to ring the bell. True once for each time the sleeper announces.
    pub fn must_ring(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let seen = self.word.first().map_or(0, |word| word.load(Ordering::Relaxed));
        let asleep = seen & 1 == 1 && seen != self.last;
        if asleep {
            self.last = seen;
        }
        asleep
    }

    fn set(&mut self, value: u64) {
        self.last = value;
        if let Some(word) = self.word.first() {
            word.store(value, Ordering::Relaxed);
        }
    }
}
