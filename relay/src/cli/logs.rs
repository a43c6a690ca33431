//! Logs on stderr, or in the journal where stderr is journald's: levels by -v, directives by RUST_LOG, no colours outside a terminal.
//!
//! Who reads them may stop, go away, or have no room. Must never wait for that nor end over it: lines are lost then, and counted.

use super::failure::Failure;
use super::journal::{self, Journal};
use super::output::colours_wanted;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// What a pipe that is ready takes at once (PIPE_BUF).
const PIECE: usize = 4096;

static LOST: Losses = Losses::new();

/// Lines lost since the last one that was taken.
pub(super) struct Losses(AtomicU64);

impl Losses {
    pub(super) const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// A line, behind a word on those lost before it: `put` is called with their number, then with `None` for the line itself, and
    /// says whether that was taken. A line that was not is counted.
    pub(super) fn pass(&self, mut put: impl FnMut(Option<u64>) -> bool) {
        let lost = self.0.load(Ordering::Relaxed);
        let said = lost == 0 || put(Some(lost));
        if said {
            self.0.fetch_sub(lost, Ordering::Relaxed);
        }
        if !said || !put(None) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Starts logging. The daemon tells what it does; the other commands speak up only when something is wrong.
pub(super) fn init(verbose: u8, is_daemon: bool) -> Result<(), Failure> {
    let level = match (verbose, is_daemon) {
        (0, false) => "warn",
        (0, true) => "info",
        (1, _) => "debug",
        _ => "trace",
    };
    let directives = std::env::var("RUST_LOG").ok().filter(|directives| !directives.is_empty());
    let filter = EnvFilter::try_new(directives.as_deref().unwrap_or(level))
        .map_err(|error| Failure::bad_input(format!("RUST_LOG: {error}")).field("RUST_LOG").hint("for example RUST_LOG=relay=debug"))?;
    let colours = io::stderr().is_terminal() && colours_wanted();
    // A logger that is there already (a test's) stays. The daemon alone has the journal's descriptor: a worker may not send.
    let _ = match is_daemon.then(journal).flatten() {
        Some(journal) => tracing_subscriber::registry().with(filter).with(journal).try_init(),
        None => {
            let stderr = tracing_subscriber::fmt::layer().with_writer(|| Unhurried(io::stderr(), &LOST)).with_ansi(colours);
            tracing_subscriber::registry().with(filter).with(stderr).try_init()
        }
    };
    Ok(())
}

/// The journal, if stderr would end there anyway.
fn journal() -> Option<Journal> {
    let stderr = nix::sys::stat::fstat(io::stderr()).ok()?;
    journal::is_stderr(stderr.st_dev, stderr.st_ino).then(Journal::open)?.ok()
}

/// Writes each line only as far as it is taken at once. O_NONBLOCK would do the same, but to everybody who shares the terminal.
struct Unhurried<'a, W>(W, &'a Losses);

impl<W: Write + AsFd> Write for Unhurried<'_, W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.1.pass(|lost| match lost {
            Some(lost) => self.put(format!("relay: {lost} log lines lost: nobody read standard error, or it had no room\n").as_bytes()),
            None => self.put(line),
        });
        // An error would be told on stderr, by a macro that panics where it can't.
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<W: Write + AsFd> Unhurried<'_, W> {
    /// Whether all of it was taken.
    fn put(&mut self, text: &[u8]) -> bool {
        text.chunks(PIECE).all(|piece| self.is_ready() && self.0.write_all(piece).is_ok())
    }

    fn is_ready(&self) -> bool {
        let mut stderr = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        poll(&mut stderr, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    #[test]
    fn a_full_pipe_costs_lines_which_are_counted() {
        let (mut reader, writer) = io::pipe().unwrap();
        let lost = Losses::new();
        let mut log = Unhurried(File::from(OwnedFd::from(writer)), &lost);
        let line = [&[b'x'; 999][..], b"\n"].concat();
        let mut lines = 0;
        while lost.count() < 3 {
            log.write_all(&line).unwrap();
            lines += 1;
            assert!(lines < 100_000, "a pipe has no such room");
        }
        let mut taken = vec![0; (lines - 3) * line.len()];
        reader.read_exact(&mut taken).unwrap();
        log.write_all(b"on\n").unwrap();
        drop(log);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "relay: 3 log lines lost: nobody read standard error, or it had no room\non\n");
        assert_eq!(lost.count(), 0);
    }

    #[test]
    fn a_full_disk_is_no_error() {
        let lost = Losses::new();
        let full = File::options().write(true).open("/dev/full").unwrap();
        Unhurried(full, &lost).write_all(b"a line\n").unwrap();
        assert_eq!(lost.count(), 1);
    }
}
