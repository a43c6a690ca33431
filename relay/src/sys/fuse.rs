//! A fuse for the crash tests: kills the worker under test after its N-th store to shared memory, or whenever it comes to a
//! packet of a certain kind.
//!
//! Outside the tests of this crate it is nothing at all. Must never be burnt by a read.

/// One store to shared memory has been made.
#[cfg(not(test))]
#[inline]
pub const fn stored() {}

/// A packet with this header comes next.
#[cfg(not(test))]
#[inline]
pub const fn reached(_header: &[u8]) {}

#[cfg(test)]
pub use test::{Killed, arm, disarm, mine, reached, stored};

#[cfg(test)]
mod test {
    use std::cell::{Cell, RefCell};

    thread_local!(static LEFT: Cell<Option<u64>> = const { Cell::new(None) });
    thread_local!(static MINES: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) });

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

    /// Packets that begin so kill whoever comes to them, from now on.
    pub fn mine(headers: Vec<Vec<u8>>) {
        MINES.set(headers);
    }

    /// A packet with this header comes next.
    pub fn reached(header: &[u8]) {
        if MINES.with_borrow(|mines| mines.iter().any(|mine| header.starts_with(mine))) {
            kill();
        }
    }

    fn kill() -> ! {
        // Not panic!: no hook, no message.
        std::panic::resume_unwind(Box::new(Killed))
    }

    /// One store to shared memory has been made.
    pub fn stored() {
        match LEFT.get() {
            Some(0) => {
                LEFT.set(None);
                kill();
            }
            Some(left) => LEFT.set(Some(left - 1)),
            None => {}
        }
    }
}
