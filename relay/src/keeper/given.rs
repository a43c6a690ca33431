//! What a service manager passes on when it starts a process: descriptors with names (sd_listen_fds(3)).
//!
//! To be taken before the process opens anything of its own: then whatever is open at these numbers was passed on. Must never leave one of
//! them for a child to inherit.

use super::table::MAX_ENTRIES;
use crate::shm::ChannelError;
use crate::shm::discovery::take_fd;
use std::ffi::OsString;
use std::os::fd::{OwnedFd, RawFd};

/// Names and descriptors in their order; names need not be different, and where nothing is open there is none.
pub type Given = Result<Vec<(String, Option<OwnedFd>)>, ChannelError>;

const PID: &str = "LISTEN_PID";
const COUNT: &str = "LISTEN_FDS";
const NAMES: &str = "LISTEN_FDNAMES";
/// The first one's number.
const FIRST: RawFd = 3;

/// Takes them, close-on-exec. Nothing, if they are for another process.
pub fn given(lookup: impl Fn(&str) -> Option<OsString>) -> Given {
    let text = |variable| lookup(variable).and_then(|value| value.into_string().ok());
    let is_ours = text(PID).and_then(|pid| pid.parse().ok()) == Some(std::process::id());
    let Some(count) = text(COUNT).filter(|_| is_ours) else { return Ok(Vec::new()) };
    let wrong = |variable, problem| ChannelError::Environment { variable, problem };
    let count = count.parse::<u32>().ok().filter(|count| *count <= MAX_ENTRIES).ok_or(wrong(COUNT, "not a number of descriptors"))?;
    // Before anything that can be wrong: what is taken is closed.
    let taken: Vec<Option<OwnedFd>> = (FIRST..).take(count as usize).map(|number| take_fd(COUNT, number).ok()).collect();
    let names = text(NAMES).unwrap_or_default();
    let names: Vec<&str> = if count == 0 { Vec::new() } else { names.split(':').collect() };
    if names.len() != taken.len() {
        return Err(wrong(NAMES, "not one name for each descriptor"));
    }
    Ok(names.into_iter().map(str::to_owned).zip(taken).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pid: &str, count: &str, names: Option<&str>) -> Given {
        given(|variable| match variable {
            PID => Some(pid.into()),
            COUNT => Some(count.into()),
            _ => names.map(OsString::from),
        })
    }

    /// Counts above what there can be here, so that no descriptor of this test program is taken.
    #[test]
    fn what_is_not_for_us_or_makes_no_sense_is_not_taken() {
        let us = std::process::id().to_string();
        assert!(environment("1", "7", Some("a")).unwrap().is_empty(), "another process's");
        assert!(environment("", "7", None).unwrap().is_empty());
        assert!(given(|_| None).unwrap().is_empty());
        for count in ["", "-1", "x", "3 ", "65537", "4294967296"] {
            assert!(matches!(environment(&us, count, None), Err(ChannelError::Environment { variable: COUNT, .. })), "{count}");
        }
        assert!(environment(&us, "0", Some("")).unwrap().is_empty());
    }
}
