//! The states of a worker, and who may take each edge.
//!
//! ```text
//!            worker: first turn                 worker: asked to stop
//!   BOOT ───────────────────────▶ RUN ───────────────────────▶ HALT
//!    │                             │                             │
//!    │ worker: impossible          │ worker: impossible          │ worker: drain failed
//!    ▼                             ▼                             ▼
//!   FAIL ◀────────────────────────────────────────────────────── ┘
//!
//!   any ──▶ FAIL    supervisor, and only after the worker's pidfd was readable (dead without saying so)
//!   HALT, FAIL ──▶ BOOT    supervisor, when it prepares the segment for the successor
//!   BOOT, RUN, FAIL ──▶ BOOT    spare, once it stands in for a worker that died (it has seen the pidfd, and has the baton)
//! ```
//! The word has one writer at any time: the living worker, else its spare if it has one, else the supervisor. Must never skip a state: a worker that is told
//! to stop in BOOT goes to FAIL (it never ran), so "reached RUN" can be read off the history.

/// What a worker says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum State {
    /// Adopting its ports and priming its rings.
    Boot = 1,
    /// Forwarding.
    Run = 2,
    /// Drained and left as asked.
    Halt = 3,
    /// Met the impossible, or died.
    Fail = 4,
}

/// Who takes an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    /// The living worker.
    Worker,
    /// The supervisor, the worker being dead.
    Supervisor,
    /// The spare that is the worker now.
    Spare,
}

impl State {
    /// The state of a raw word; `None` if it is none.
    pub const fn from_word(word: u64) -> Option<Self> {
        match word {
            1 => Some(Self::Boot),
            2 => Some(Self::Run),
            3 => Some(Self::Halt),
            4 => Some(Self::Fail),
            _ => None,
        }
    }

    /// Whether `actor` may go from here to `to`.
    pub const fn may_become(self, to: Self, actor: Actor) -> bool {
        match actor {
            Actor::Worker => {
                matches!((self, to), (Self::Boot, Self::Run) | (Self::Run, Self::Halt) | (Self::Boot | Self::Run | Self::Halt, Self::Fail))
            }
            Actor::Supervisor => matches!((self, to), (_, Self::Fail) | (Self::Halt | Self::Fail, Self::Boot)),
            Actor::Spare => matches!((self, to), (Self::Boot | Self::Run | Self::Fail, Self::Boot)),
        }
    }

    /// The word of status and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Run => "run",
            Self::Halt => "halt",
            Self::Fail => "fail",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_edge_has_exactly_the_drawn_takers() {
        const ALL: [State; 4] = [State::Boot, State::Run, State::Halt, State::Fail];
        let edges = |actor| {
            let pairs = ALL.into_iter().flat_map(|from| ALL.map(|to| (from, to)));
            pairs
                .filter(|(from, to)| from.may_become(*to, actor))
                .map(|(from, to)| format!("{}-{}", from.name(), to.name()))
                .collect::<Vec<_>>()
        };
        assert_eq!(edges(Actor::Worker), ["boot-run", "boot-fail", "run-halt", "run-fail", "halt-fail"]);
        assert_eq!(edges(Actor::Supervisor), ["boot-fail", "run-fail", "halt-boot", "halt-fail", "fail-boot", "fail-fail"]);
        assert_eq!(edges(Actor::Spare), ["boot-boot", "run-boot", "fail-boot"]);
        assert_eq!(State::from_word(0), None);
        assert!(ALL.into_iter().all(|state| State::from_word(state as u64) == Some(state)));
    }
}
