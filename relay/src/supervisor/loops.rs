//! Whether packets of a rule seem to come round again through another relay: some expire by TTL while others go out.
//!
//! A circle within one relay is refused at load and a packet with our own source is dropped, but a second relay that sends our
//! packets back can only be told by TTLs running down. Senders that use a TTL of 1 beside others look the same, so this is a
//! suspicion, never an action.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A suspicion stands so long after it was last confirmed; the log repeats it no sooner.
const STANDS: Duration = Duration::from_secs(60);

/// What a rule's outputs with `ttl=dec` have counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// Packets that went out.
    pub sent: u64,
    /// Packets that expired.
    pub expired: u64,
}

/// The rules' last sights and the suspicions.
#[derive(Debug, Default)]
pub struct Loops {
    seen: BTreeMap<String, Sight>,
    suspected: BTreeMap<String, Instant>,
}

impl Loops {
    /// Compares with the sight before. True when the rule has just become suspect.
    pub fn look(&mut self, id: &str, now: Sight, at: Instant) -> bool {
        let before = match self.seen.get_mut(id) {
            Some(before) => std::mem::replace(before, now),
            None => {
                self.seen.insert(id.to_owned(), now);
                Sight::default()
            }
        };
        if now.expired <= before.expired || now.sent <= before.sent {
            return false;
        }
        self.suspected.insert(id.to_owned(), at).is_none_or(|last| at > last + STANDS)
    }

    /// Whether a rule is suspect.
    pub fn suspects(&self, id: &str, at: Instant) -> bool {
        self.suspected.get(id).is_some_and(|last| at <= *last + STANDS)
    }

    /// Forgets rules that are no more.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.seen.retain(|id, _| exists(id));
        self.suspected.retain(|id, _| exists(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expiring_beside_sending_is_suspect_either_alone_is_not() {
        let (mut loops, at) = (Loops::default(), Instant::now());
        let sight = |sent, expired| Sight { sent, expired };
        assert!(!loops.look("a", sight(100, 0), at), "sending");
        assert!(!loops.look("a", sight(100, 10), at), "a sender with TTL 1");
        assert!(!loops.suspects("a", at));
        assert!(loops.look("a", sight(150, 20), at));
        assert!(!loops.look("a", sight(200, 30), at), "said once");
        assert!(loops.suspects("a", at) && !loops.suspects("b", at));
        let later = at + STANDS + Duration::from_secs(1);
        assert!(!loops.suspects("a", later) && loops.look("a", sight(300, 40), later));
        loops.retain(|_| false);
        assert!(!loops.suspects("a", later));
    }
}
