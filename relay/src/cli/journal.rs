//! The log as journald takes it: one datagram for each entry, with fields (systemd's "Native Journal Protocol").
//!
//! Must never wait: a journal that takes nothing costs entries, which are counted and named by the next one that it takes. That is
//! why it is not the crate tracing-journald, whose socket blocks.

use super::logs::Losses;
use std::fmt::{Debug, Write};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Where journald listens.
const SOCKET: &str = "/run/systemd/journal/socket";

/// Whether standard error is what journald gave this process: `JOURNAL_STREAM` names the same device and inode (systemd.exec(5)).
pub(super) fn is_stderr(device: u64, inode: u64) -> bool {
    std::env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{device}:{inode}"))
}

/// Sends what is logged to journald.
pub(super) struct Journal {
    socket: UnixDatagram,
    to: PathBuf,
    lost: Losses,
}

impl Journal {
    /// The machine's journal.
    ///
    /// # Errors
    /// No socket can be made, or nobody listens.
    pub(super) fn open() -> io::Result<Self> {
        Self::to(Path::new(SOCKET))
    }

    fn to(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        // journald discards an empty datagram; one that nobody would take is an error.
        socket.send_to(&[], path)?;
        Ok(Self { socket, to: path.to_owned(), lost: Losses::new() })
    }

    fn log(&self, entry: Entry) {
        let entry = entry.finish();
        self.lost.pass(|lost| match lost {
            Some(lost) => self.put(&Entry::of_losses(lost).finish()),
            None => self.put(&entry),
        });
    }

    fn put(&self, entry: &[u8]) -> bool {
        self.socket.send_to(entry, &self.to).is_ok()
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let metadata = event.metadata();
        let mut entry = Entry::new(metadata.level(), metadata.target());
        if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
            entry.add("CODE_FILE", file);
            entry.add("CODE_LINE", &line.to_string());
        }
        event.record(&mut entry);
        self.log(entry);
    }
}

/// One entry in the making: its fields as journald reads them, and the line for people.
struct Entry {
    fields: Vec<u8>,
    message: String,
    /// ` name=value` of each field, for the end of the line.
    tail: String,
}

impl Entry {
    fn new(level: &Level, target: &str) -> Self {
        // syslog(3): error, warning, informational, debug.
        let priority = match *level {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            _ => "7",
        };
        let mut entry = Self { fields: Vec::with_capacity(512), message: String::new(), tail: String::new() };
        entry.add("PRIORITY", priority);
        entry.add("SYSLOG_IDENTIFIER", "relay");
        entry.add("RELAY_TARGET", target);
        entry
    }

    fn of_losses(lost: u64) -> Self {
        let mut entry = Self::new(&Level::WARN, module_path!());
        entry.message = format!("{lost} log lines lost: journald took none");
        entry.add("RELAY_LOST", &lost.to_string());
        entry
    }

    /// `NAME\n`, length as 64 bits little endian, value, `\n`: the form that takes any value.
    fn add(&mut self, name: &str, value: &str) {
        self.fields.extend_from_slice(name.as_bytes());
        self.fields.push(b'\n');
        self.fields.extend_from_slice(&(value.len() as u64).to_le_bytes());
        self.fields.extend_from_slice(value.as_bytes());
        self.fields.push(b'\n');
    }

    fn finish(mut self) -> Vec<u8> {
        let line = std::mem::take(&mut self.message) + &self.tail;
        self.add("MESSAGE", &line);
        self.fields
    }
}

impl Visit for Entry {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let value = format!("{value:?}");
        self.record_str(field, &value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
            return;
        }
        let name: String = field.name().chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
        self.add(&format!("RELAY_{name}"), value);
        let _ = write!(self.tail, " {}={value}", field.name());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::time::Duration;
    use tracing_subscriber::layer::SubscriberExt;

    /// Somebody who reads as journald does.
    struct Reader {
        socket: UnixDatagram,
        _directory: tempfile::TempDir,
    }

    impl Reader {
        fn new() -> (Self, Journal) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            let socket = UnixDatagram::bind(&path).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let journal = Journal::to(&path).unwrap();
            let reader = Self { socket, _directory: directory };
            assert_eq!(reader.next(), Some(BTreeMap::new()));
            (reader, journal)
        }

        fn next(&self) -> Option<BTreeMap<String, String>> {
            let mut buffer = [0; 4096];
            let len = self.socket.recv(&mut buffer).ok()?;
            let mut rest = &buffer[..len];
            let mut entry = BTreeMap::new();
            while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
                let name = String::from_utf8(rest[..end].to_vec()).unwrap();
                let (size, tail) = rest[end + 1..].split_at(8);
                let size = usize::try_from(u64::from_le_bytes(size.try_into().unwrap())).unwrap();
                assert_eq!(tail[size], b'\n');
                entry.insert(name, String::from_utf8(tail[..size].to_vec()).unwrap());
                rest = &tail[size + 1..];
            }
            Some(entry)
        }
    }

    #[test]
    fn an_entry_has_a_line_and_fields() {
        let (reader, journal) = Reader::new();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(journal), || {
            tracing::warn!(target: "relay::here", worker = 3, why = "a\nb", "worker gone");
        });
        let entry = reader.next().unwrap();
        let field = |name: &str| entry.get(name).map(String::as_str);
        assert_eq!(field("MESSAGE"), Some("worker gone worker=3 why=a\nb"));
        assert_eq!((field("PRIORITY"), field("SYSLOG_IDENTIFIER"), field("RELAY_TARGET")), (Some("4"), Some("relay"), Some("relay::here")));
        assert_eq!((field("RELAY_WORKER"), field("RELAY_WHY")), (Some("3"), Some("a\nb")));
        assert!(field("CODE_FILE").unwrap().ends_with("journal.rs") && entry.contains_key("CODE_LINE"));
    }

    #[test]
    fn a_journal_that_takes_nothing_costs_entries_which_are_counted() {
        let (reader, journal) = Reader::new();
        let log = |journal: &Journal| journal.log(Entry::new(&Level::INFO, "relay"));
        // A datagram socket's queue is a few hundred entries long.
        let mut tries = 0;
        while journal.lost.count() < 3 {
            log(&journal);
            tries += 1;
            assert!(tries < 1_000_000, "no queue has such room");
        }
        for _ in 0..tries - 3 {
            assert!(!reader.next().unwrap().contains_key("RELAY_LOST"));
        }
        log(&journal);
        assert_eq!(reader.next().unwrap()["RELAY_LOST"], "3");
        assert_eq!(reader.next().unwrap()["RELAY_TARGET"], "relay");
        assert_eq!(journal.lost.count(), 0);
    }

    #[test]
    fn nobody_there_is_an_error() {
        assert!(Journal::to(Path::new("/nonexistent/journal")).is_err());
    }
}
