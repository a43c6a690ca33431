//! The first 256 bytes of every segment of ours: what it is, who made it, and how its owner is.
//!
//! ```text
//! word  0  magic · 1 version · 2 layout hash · 3 size · 4 creator pid · 5 creator start time      (creator, once)
//! word 16  epoch · 17 owner pid · 18 state · 19 beats · 20 beat stamp ns · 21 turns               (owner: the one writer)
//! ```
//! All of it is untrusted until [`Header::open`] has checked it; the owner's line stays so for ever.
//! Must never hold what is not a word.

use super::state::{Actor, State};
use crate::ring::sync::Ordering;
use crate::ring::{Memory, Words};
use std::sync::Arc;

/// Bytes before a segment's content.
pub const HEADER_SIZE: usize = WORDS * 8;
const WORDS: usize = 32;
const MAGIC: u64 = u64::from_le_bytes(*b"RLYSEGM\0");
/// Counted up whenever the layout above changes.
pub const VERSION: u64 = 1;

const AT_LAYOUT: usize = 2;
const AT_CREATOR: usize = 4;
const AT_CREATOR_START: usize = 5;
const AT_EPOCH: usize = 16;
const AT_OWNER: usize = 17;
const AT_STATE: usize = 18;
pub(super) const AT_BEATS: usize = 19;
pub(super) const AT_STAMP: usize = 20;
const AT_TURNS: usize = 21;

/// Why a segment is not what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Smaller than a header.
    #[error("segment of {0} bytes is too small for a header")]
    TooSmall(usize),
    /// Not ours.
    #[error("segment has magic {0:#x}: not made by relay")]
    Magic(u64),
    /// Another version's.
    #[error("segment has layout version {0}, this program speaks {VERSION}")]
    Version(u64),
    /// Something else lies in it.
    #[error("segment holds another layout: hash {found:#x}, expected {expected:#x} (is the other side another build?)")]
    Layout {
        /// In the header.
        found: u64,
        /// What the reader speaks.
        expected: u64,
    },
    /// The header speaks of another size.
    #[error("segment says {said} bytes and has {len}")]
    Size {
        /// In the header.
        said: u64,
        /// By fstat.
        len: usize,
    },
    /// The header must be written and the mapping is read-only.
    #[error("segment is mapped read-only")]
    ReadOnly,
    /// The worker's state cannot go there from where it is.
    #[error("state may not go from {from} to {to}")]
    Edge {
        /// Where it is ("?" for a word that is no state).
        from: &'static str,
        /// Where it was to go.
        to: &'static str,
    },
}

/// A checked header.
#[derive(Debug)]
pub struct Header {
    words: Words,
}

impl Header {
    /// Writes the header of a new segment; state BOOT, epoch 0.
    pub fn create(memory: Arc<dyn Memory>, layout_hash: u64) -> Result<Self, HeaderError> {
        let len = memory.len();
        if !memory.writable() {
            return Err(HeaderError::ReadOnly);
        }
        let words = Words::new(memory, 0, WORDS).and_then(Words::cleared).ok_or(HeaderError::TooSmall(len))?;
        let pid = std::process::id();
        let start = process_start(pid).unwrap_or(0);
        for (word, value) in words.iter().zip([MAGIC, VERSION, layout_hash, len as u64, u64::from(pid), start]) {
            word.store(value, Ordering::Relaxed);
        }
        let header = Self { words };
        header.set(AT_STATE, State::Boot as u64);
        Ok(header)
    }

    /// Checks the header of a segment that somebody else made.
    pub fn open(memory: Arc<dyn Memory>, layout_hash: u64) -> Result<Self, HeaderError> {
        let len = memory.len();
        let words = Words::new(memory, 0, WORDS).ok_or(HeaderError::TooSmall(len))?;
        let header = Self { words };
        let [magic, version, layout, said] = core::array::from_fn(|index| header.get(index));
        match () {
            () if magic != MAGIC => Err(HeaderError::Magic(magic)),
            () if version != VERSION => Err(HeaderError::Version(version)),
            () if layout != layout_hash => Err(HeaderError::Layout { found: layout, expected: layout_hash }),
            () if said != len as u64 => Err(HeaderError::Size { said, len }),
            () => Ok(header),
        }
    }

    /// Process that made the segment: (pid, start time in clock ticks since boot; 0 if /proc was not readable).
    pub fn creator(&self) -> (u32, u64) {
        (self.get(AT_CREATOR) as u32, self.get(AT_CREATOR_START))
    }

    /// What the content is.
    pub fn layout_hash(&self) -> u64 {
        self.get(AT_LAYOUT)
    }

    /// Counted up by every new owner.
    pub fn epoch(&self) -> u64 {
        self.get(AT_EPOCH)
    }

    /// The process that writes the content; 0: nobody yet.
    pub fn owner(&self) -> u32 {
        self.get(AT_OWNER) as u32
    }

    /// Process `pid`, this one, takes over as the one writer (it holds the segment's lock). Returns the new epoch.
    pub fn own(&self, pid: u32) -> u64 {
        let epoch = self.epoch().wrapping_add(1);
        self.set(AT_EPOCH, epoch);
        self.set(AT_OWNER, u64::from(pid));
        epoch
    }

    /// The owner's state; `None` if the word is no state.
    pub fn state(&self) -> Option<State> {
        State::from_word(self.get(AT_STATE))
    }

    /// Takes an edge of the state machine.
    pub fn become_state(&self, to: State, actor: Actor) -> Result<(), HeaderError> {
        let from = self.state();
        // A word that is no state can only have been left by a corrupt worker: the supervisor may set it right.
        let permitted = from.map_or(actor == Actor::Supervisor, |from| from.may_become(to, actor));
        if !permitted {
            return Err(HeaderError::Edge { from: from.map_or("?", State::name), to: to.name() });
        }
        self.set(AT_STATE, to as u64);
        Ok(())
    }

    /// Turns that moved packets; what "reached RUN and processed a turn" (DECISIONS §9) is read from.
    pub fn turns(&self) -> u64 {
        self.get(AT_TURNS)
    }

    /// Owner: publishes its count of such turns, at housekeeping.
    pub fn set_turns(&self, turns: u64) {
        self.set(AT_TURNS, turns);
    }

    pub(super) fn get(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(Ordering::Acquire))
    }

    pub(super) fn set(&self, index: usize, value: u64) {
        debug_assert!(self.words.writable(), "a reader must not write the header");
        if let (Some(word), true) = (self.words.get(index), self.words.writable()) {
            word.store(value, Ordering::Release);
        }
    }
}

/// Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat): with the pid it names a process for ever.
pub fn process_start(pid: u32) -> Option<u64> {
    stat_field(pid, 22)?.parse().ok()
}

/// Parent of a process (field 4 of /proc/PID/stat).
pub fn parent_of(pid: u32) -> Option<u32> {
    stat_field(pid, 4)?.parse().ok()
}

fn stat_field(pid: u32, number: usize) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in parentheses, and may itself hold spaces and parentheses.
    let behind_command = stat.rsplit_once(')')?.1;
    behind_command.split_ascii_whitespace().nth(number - 3).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::memory::Heap;

    fn memory() -> Arc<dyn Memory> {
        Arc::new(Heap::new(4096))
    }

    #[test]
    fn req_002_13_a_header_is_what_it_says_or_refused() {
        let memory = memory();
        assert_eq!(Header::open(memory.clone(), 7).unwrap_err(), HeaderError::Magic(0));
        let header = Header::create(memory.clone(), 7).unwrap();
        assert_eq!(header.creator(), (std::process::id(), process_start(std::process::id()).unwrap()));
        assert!(Header::open(memory.clone(), 7).is_ok());
        assert_eq!(Header::open(memory.clone(), 8).unwrap_err(), HeaderError::Layout { found: 7, expected: 8 });
        header.set(3, 5);
        assert_eq!(Header::open(memory.clone(), 7).unwrap_err(), HeaderError::Size { said: 5, len: 4096 });
        header.set(1, 9);
        assert_eq!(Header::open(memory, 7).unwrap_err(), HeaderError::Version(9));
        assert_eq!(Header::open(Arc::new(Heap::new(128)), 7).unwrap_err(), HeaderError::TooSmall(128));
    }

    #[test]
    fn the_owner_walks_the_states_and_the_supervisor_buries_it() {
        let header = Header::create(memory(), 1).unwrap();
        assert_eq!((header.own(std::process::id()), header.owner(), header.epoch()), (1, std::process::id(), 1));
        assert!(header.become_state(State::Halt, Actor::Worker).is_err());
        header.become_state(State::Run, Actor::Worker).unwrap();
        assert!(header.become_state(State::Boot, Actor::Supervisor).is_err(), "alive");
        header.become_state(State::Fail, Actor::Supervisor).unwrap();
        header.become_state(State::Boot, Actor::Supervisor).unwrap();
        header.set(AT_STATE, 99);
        assert_eq!(header.become_state(State::Run, Actor::Worker).unwrap_err(), HeaderError::Edge { from: "?", to: "run" });
        header.become_state(State::Fail, Actor::Supervisor).unwrap();
    }
}
