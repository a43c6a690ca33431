//! `relay capture`: packets as workers see them, as a pcapng file.
//!
//! The daemon hands over the workers' tap rings by descriptor; this process reads them itself and costs the relay nothing by
//! being slow: what it does not take in time is overwritten, counted and said. Must never believe a record before it is checked,
//! and always leaves a valid file.

use super::failure::Failure;
use super::output::count;
use super::pcapng::{File, comment};
use super::{Context, OK, Outcome, unexpected};
use crate::control::client::Client;
use crate::control::message::{CAPTURE_LEASE, Capture, CapturePort, CaptureRule, Point, Request, Response};
use crate::plan::tap::{MAX_SNAPLEN, Record, TapReader};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde::Serialize;
use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Between two renewals of the lease.
const RENEW: Duration = Duration::from_millis(500);
/// Least time between two questions for names.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// Sleep of a reader that found nothing (a ring holds more than 100 ms of what workers may write).
const NAP: u8 = 2;
/// Records taken from one ring before the next one's turn.
const TURN: usize = 4096;
/// How long rules may take to come to a worker.
const MOVE: Duration = Duration::from_secs(3);
/// Between two looks at them.
const LOOK: Duration = Duration::from_millis(20);
/// Turns after the end, at most (a ring holds fewer records than this).
const LAST_ROUNDS: usize = 16;

const _: () = assert!(RENEW.as_millis() * 3 < CAPTURE_LEASE.as_millis(), "a renewal may come late");

/// Capture packets inside the relay.
#[derive(Debug, clap::Args)]
pub(super) struct CaptureArgs {
    /// Only packets of this rule
    #[arg(long, value_name = "ID")]
    rule: Option<String>,
    /// Where to look, separated by commas: as packets come, as they leave, where they are dropped (all three if not said)
    #[arg(long, value_name = "ingress|egress|drop", value_delimiter = ',', value_parser = point)]
    at: Vec<Point>,
    /// Let a worker carry rules of the kernel path while they are captured, where their path is `auto`
    #[arg(long)]
    by_worker: bool,
    /// Stop after so many packets in the file
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Stop after this time
    #[arg(long, value_name = "DURATION", value_parser = super::values::period)]
    duration: Option<Duration>,
    /// Bytes kept of each packet
    #[arg(long, value_name = "BYTES", default_value_t = MAX_SNAPLEN, value_parser = clap::value_parser!(u32).range(14..=i64::from(MAX_SNAPLEN)))]
    snaplen: u32,
    /// The pcapng file; `-` is stdout
    #[arg(short = 'w', long = "write", value_name = "FILE")]
    file: PathBuf,
}

fn point(text: &str) -> Result<Point, String> {
    match text {
        "ingress" => Ok(Point::Ingress),
        "egress" => Ok(Point::Egress),
        "drop" => Ok(Point::Drop),
        _ => Err("must be ingress, egress or drop".into()),
    }
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct Summary {
    /// Where the packets are.
    file: String,
    /// Packets in it.
    packets: u64,
    /// Packets and records that workers left out, to spend no more time on the capture.
    left_out: u64,
    /// Records that were overwritten before they were read.
    overrun: u64,
    /// Records that made no sense.
    malformed: u64,
    /// Rules whose packets no worker sees (kernel path).
    unseen: u64,
}

/// Asks for the rings, opens the file, captures.
pub(super) fn run(args: &CaptureArgs, context: &Context) -> Outcome {
    let stop = Stop::new()?;
    let mut session = Session::begin(args, context)?;
    let mut file = File::create(open(&args.file)?, args.snaplen, session.title()).map_err(|error| written(&args.file, &error))?;
    let ended = session.capture(&mut file, &stop);
    let flushed = file.flush().map_err(End::from);
    session.summary(file.packets).tell(args, context)?;
    ended.and(flushed).or_else(|end| end.verdict(&args.file)).map(|()| OK)
}

/// Why a capture ended before it was told to.
#[derive(Debug)]
enum End {
    File(io::Error),
    Daemon(Failure),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::File(error)
    }
}

impl End {
    /// A reader that has gone (`relay capture -w - | head`) is an end like any other.
    fn verdict(self, path: &Path) -> Result<(), Failure> {
        match self {
            Self::File(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Self::File(error) => Err(written(path, &error)),
            Self::Daemon(failure) => Err(failure),
        }
    }
}

fn written(path: &Path, error: &io::Error) -> Failure {
    Failure::new(1, format!("{}: {error}", path.display())).field("-w")
}

fn open(path: &Path) -> Result<Box<dyn Write>, Failure> {
    if path.as_os_str() != "-" {
        let file = std::fs::File::create(path).map_err(|error| Failure { code: 2, ..written(path, &error) });
        return file.map(|file| Box::new(file) as Box<dyn Write>).map_err(|failure| failure.hint("name a file that you may write"));
    }
    if io::stdout().is_terminal() {
        let failure = Failure::bad_input("-w - writes a binary file, and stdout is a terminal").field("-w");
        return Err(failure.hint("name a file, or pipe it on: relay capture -w - | tshark -r -"));
    }
    Ok(Box::new(io::stdout()))
}

/// SIGINT and SIGTERM as something to look at.
struct Stop(SignalFd);

impl Stop {
    fn new() -> Result<Self, Failure> {
        let failed = |errno: nix::Error| Failure::new(1, format!("signals: {errno}"));
        let mut set = SigSet::empty();
        [Signal::SIGINT, Signal::SIGTERM].into_iter().for_each(|signal| set.add(signal));
        set.thread_block().map_err(failed)?;
        SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map(Self).map_err(failed)
    }

    /// Whether one has come; waits up to `milliseconds` for it.
    fn came(&self, milliseconds: u8) -> bool {
        poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], PollTimeout::from(milliseconds)).is_ok_and(|ready| ready > 0)
    }
}

/// What records are called.
#[derive(Debug, Default)]
struct Names {
    epoch: Option<u64>,
    ports: Vec<CapturePort>,
    /// Rules that were deleted stay: records of theirs may still come.
    rules: HashMap<(u32, u32), CaptureRule>,
}

impl Names {
    fn port(&self, number: u16) -> String {
        self.ports.get(usize::from(number)).map_or_else(|| format!("port{number}"), |port| port.name.clone())
    }
}

/// The daemon's end of a capture.
struct Link {
    client: Client,
    lease: u64,
    snaplen: u32,
    names: Names,
    asked_at: Instant,
    unseen: Vec<String>,
    unseen_count: u64,
    /// Rules are on their way to a worker.
    moving: bool,
    /// What is not seen is not said before they are there.
    patient: bool,
}

impl Link {
    /// Asks for the rings.
    fn open(args: &CaptureArgs, points: &[Point], socket: &Path) -> Result<(Self, Vec<Ring>), Failure> {
        let mut client = Client::connect(socket)?;
        let (rule, points, snaplen) = (args.rule.clone(), points.to_vec(), args.snaplen);
        let request = Request::Capture { lease: None, rule, points, snaplen, epoch: None, by_worker: args.by_worker };
        let (answer, rings) = match client.request_with(&request)? {
            (Response::Capture(answer), rings) => (*answer, rings),
            (Response::Error(body), _) => return Err(body.into()),
            (other, _) => return Err(unexpected(&other)),
        };
        let rings = open_rings(&answer.workers, rings)?;
        let (lease, asked_at) = (answer.lease, Instant::now());
        let (names, patient) = (Names::default(), args.by_worker);
        let mut link = Self { client, lease, snaplen, names, asked_at, unseen: Vec::new(), unseen_count: 0, moving: patient, patient };
        link.learn(answer);
        Ok((link, rings))
    }

    /// Goes on for another lease; brings names that have changed.
    fn renew(&mut self) -> Result<(), End> {
        self.asked_at = Instant::now();
        let (lease, snaplen, epoch) = (Some(self.lease), self.snaplen, self.names.epoch);
        let request = Request::Capture { lease, rule: None, points: Vec::new(), snaplen, epoch, by_worker: false };
        match self.client.request(&request).map_err(|error| End::Daemon(error.into()))? {
            Response::Capture(answer) => self.learn(*answer),
            Response::Error(body) => return Err(End::Daemon(body.into())),
            other => return Err(End::Daemon(unexpected(&other))),
        }
        Ok(())
    }

    /// Waits until a worker carries what is to be carried by one. What takes too long is named as unseen.
    fn await_moves(&mut self) -> Result<(), End> {
        if !self.patient {
            return Ok(());
        }
        let limit = Instant::now() + MOVE;
        while self.moving && Instant::now() < limit {
            std::thread::sleep(LOOK);
            self.renew()?;
        }
        self.patient = false;
        self.renew()
    }

    /// No more is wanted. A daemon that is gone wants nothing either.
    fn end(&mut self) {
        let _ = self.client.request(&Request::CaptureEnd { lease: self.lease });
    }

    /// Takes names; says which rules cannot be seen, whenever that changes.
    fn learn(&mut self, answer: Capture) {
        self.names.ports = answer.ports;
        if let Some(rules) = answer.rules {
            self.names.epoch = Some(answer.epoch);
            self.names.rules.extend(rules.into_iter().map(|rule| ((rule.slot, rule.serial), rule)));
        }
        (self.unseen_count, self.moving) = (answer.unseen_count, answer.moving);
        if self.patient {
            return;
        }
        if answer.unseen != self.unseen && !answer.unseen.is_empty() {
            let more = answer.unseen_count.saturating_sub(answer.unseen.len() as u64);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let names = answer.unseen.join(", ");
            say(&format!(
                "not seen, because on the kernel path: {names}{more}; --by-worker, or path=xsk or path=packet in a rule, shows its packets"
            ));
        }
        self.unseen = answer.unseen;
    }
}

/// One worker's tap ring.
struct Ring {
    worker: u32,
    reader: TapReader,
    /// Records lost so far, and how many of them the file does not say yet.
    lost: u64,
    untold: u64,
}

fn open_rings(workers: &[u32], rings: Vec<OwnedFd>) -> Result<Vec<Ring>, Failure> {
    let failed = |message: String| Failure::new(1, message).hint("use the relay of the same version as the daemon");
    if rings.len() != workers.len() {
        return Err(failed(format!("{} tap rings came for {} workers", rings.len(), workers.len())));
    }
    let open = |(worker, ring): (&u32, OwnedFd)| {
        let reader = TapReader::open(ring).map_err(|error| failed(format!("tap ring of worker {worker}: {error}")))?;
        Ok(Ring { worker: *worker, reader, lost: 0, untold: 0 })
    };
    workers.iter().zip(rings).map(open).collect()
}

struct Session<'a> {
    args: &'a CaptureArgs,
    points: Vec<Point>,
    link: Link,
    rings: Vec<Ring>,
}

impl<'a> Session<'a> {
    fn begin(args: &'a CaptureArgs, context: &Context) -> Result<Self, Failure> {
        let points = if args.at.is_empty() { Point::ALL.to_vec() } else { args.at.clone() };
        let (link, rings) = Link::open(args, &points, &context.global.socket)?;
        Ok(Self { args, points, link, rings })
    }

    /// What is captured, in words.
    fn title(&self) -> String {
        let names: Vec<String> = self.points.iter().map(|point| format!("{point:?}").to_lowercase()).collect();
        let rule = self.args.rule.as_ref().map_or_else(|| "all rules".to_owned(), |id| format!("rule {id}"));
        format!("{rule} at {}", names.join(", "))
    }

    /// From the first renewal to the end that was asked for.
    fn capture(&mut self, file: &mut File<Box<dyn Write>>, stop: &Stop) -> Result<(), End> {
        self.interfaces(file)?;
        file.flush()?;
        self.link.renew()?;
        self.link.await_moves()?;
        say(&format!("capturing {}; ^C ends it", self.title()));
        let until = self.args.duration.map(|duration| Instant::now() + duration);
        let mut nap = 0;
        while !self.is_full(file) && until.is_none_or(|until| Instant::now() < until) && !stop.came(nap) {
            if self.link.asked_at.elapsed() >= RENEW {
                self.link.renew()?;
            }
            nap = 0;
            if self.drain(file)? == 0 {
                file.flush()?;
                nap = NAP;
            }
        }
        self.link.end();
        // What was written until then is still taken; another capture may keep the workers writing, so not without end.
        let mut rounds = 0;
        while rounds < LAST_ROUNDS && self.drain(file)? > 0 {
            rounds += 1;
        }
        Ok(())
    }

    /// Blocks for the interfaces there are, so that a file without packets tells them too.
    fn interfaces(&self, file: &mut File<Box<dyn Write>>) -> Result<(), End> {
        for port in &self.link.names.ports {
            for point in &self.points {
                if if *point == Point::Egress { port.egress } else { port.ingress } {
                    file.interface(&port.name, *point)?;
                }
            }
        }
        Ok(())
    }

    fn is_full(&self, file: &File<Box<dyn Write>>) -> bool {
        self.args.count.is_some_and(|count| file.packets >= count)
    }

    /// Takes a turn of records from each ring. Returns how many there were.
    fn drain(&mut self, file: &mut File<Box<dyn Write>>) -> Result<usize, End> {
        let mut taken = 0;
        for Ring { worker, reader, lost, untold } in &mut self.rings {
            for _ in 0..TURN {
                if self.args.count.is_some_and(|count| file.packets >= count) {
                    break;
                }
                let Some(record) = reader.receive() else { break };
                taken += 1;
                let asked_for = self.points.contains(&record.sight.point);
                if asked_for && write(file, &mut self.link, *worker, &record, self.args.rule.as_deref(), *untold)? {
                    *untold = 0;
                }
            }
            let now = reader.lost();
            *untold = untold.saturating_add(now.saturating_sub(*lost));
            *lost = now;
        }
        Ok(taken)
    }

    /// The last word.
    fn summary(&mut self, packets: u64) -> Summary {
        let mut summary =
            Summary { file: self.args.file.display().to_string(), packets, unseen: self.link.unseen_count, ..Summary::default() };
        for Ring { reader, .. } in &mut self.rings {
            summary.left_out = summary.left_out.saturating_add(reader.left_out());
            summary.overrun = summary.overrun.saturating_add(reader.overrun());
            summary.malformed = summary.malformed.saturating_add(reader.malformed());
        }
        summary
    }
}

/// Writes a record with its names, unless it is of another rule than was asked for.
fn write(
    file: &mut File<Box<dyn Write>>,
    link: &mut Link,
    worker: u32,
    record: &Record<'_>,
    only: Option<&str>,
    missed: u64,
) -> Result<bool, End> {
    let is_new = record.sight.rule.is_some_and(|rule| !link.names.rules.contains_key(&rule));
    if is_new && link.asked_at.elapsed() >= ASK_AGAIN {
        link.renew()?;
    }
    let names = &link.names;
    let rule = record.sight.rule.and_then(|rule| names.rules.get(&rule));
    if only.is_some_and(|id| rule.is_none_or(|rule| rule.id != id)) {
        return Ok(false);
    }
    let port = names.port(record.sight.port);
    let interface = file.interface(&port, record.sight.point)?;
    let output = |index: u16| rule.and_then(|rule| rule.outputs.get(usize::from(index))).cloned().unwrap_or_default();
    let comment = comment(record, worker, rule.map(|rule| rule.id.as_str()), output);
    file.packet(interface, record, &comment, missed)?;
    Ok(true)
}

/// A line for the person at the terminal; a stderr that is gone cannot be complained to.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "capture: {text}");
}

impl Summary {
    fn text(&self) -> String {
        let mut text = format!("{} in {}", count(self.packets, "packet"), self.file);
        let missed = [
            (self.left_out, "left out by workers, which spend little time on a capture (--rule, --at and --snaplen make it cheaper)"),
            (self.overrun, "overwritten before they were read"),
            (self.malformed, "malformed: a worker writes what it should not"),
        ];
        for (number, why) in missed.into_iter().filter(|(number, _)| *number > 0) {
            text += &format!("; missed {number}: {why}");
        }
        text
    }

    /// Facts on stdout as JSON, in words on stderr: stdout may be the file.
    fn tell(&self, args: &CaptureArgs, context: &Context) -> Result<(), Failure> {
        if context.global.json && args.file.as_os_str() != "-" {
            return context.output.facts(self, |_| self.text());
        }
        let json = context.global.json.then(|| serde_json::to_string(self).ok()).flatten();
        json.map_or_else(|| say(&self.text()), |json| _ = writeln!(io::stderr(), "{json}"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_names_what_was_missed_and_why() {
        let whole = Summary { file: "a.pcapng".into(), packets: 1, ..Summary::default() };
        assert_eq!(whole.text(), "1 packet in a.pcapng");
        let less = Summary { left_out: 2, overrun: 3, malformed: 4, packets: 5, ..whole };
        let text = less.text();
        assert!(text.starts_with("5 packets in a.pcapng; missed 2: left out") && text.contains("missed 3: overwritten"), "{text}");
        assert!(text.contains("missed 4: malformed"), "{text}");
    }

    #[test]
    fn points_are_named_as_in_the_interface() {
        assert_eq!(["ingress", "egress", "drop"].map(point), [Ok(Point::Ingress), Ok(Point::Egress), Ok(Point::Drop)]);
        assert!(point("egres").is_err());
    }
}
