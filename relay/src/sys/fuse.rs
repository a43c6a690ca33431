//! A fuse for the crash tests: kills the worker under test after its N-th store to shared memory.
//!
//! Outside the tests of this crate it is nothing at all. Must never be burnt by a read.

/// One store to shared memory has been made.
#[cfg(not(test))]
#[inline]
pub const fn stored() {}

#[cfg(test)]
pub use test::{Killed, arm, disarm, stored};

#[cfg(test)]
mod test {
    use std::cell::Cell;

    thread_local!(static LEFT: Cell<Option<u64>> = const { Cell::new(None) });

    /// What a burnt fuse unwinds with.
    #[derive(Debug)]
    pub struct Killed;

    /// The store after the next `stores` ones is the last.
    pub fn arm(stores: u64) {
        LEFT.set(Some(stores));
    }

    /// No kill; says whether the fuse was still intact.
    pub fn disarm() -> bool {
        LEFT.take().is_some()
    }

    /// One store to shared memory has been made.
    pub fn stored() {
        match LEFT.get() {
            Some(0) => {
                LEFT.set(None);
                // Not panic!: no hook, no message.
                std::panic::resume_unwind(Box::new(Killed));
            }
            Some(left) => LEFT.set(Some(left - 1)),
            None => {}
        }
    }
}
