//! `relay bench ipc`: two processes, and everything they could talk through.
//!
//! The parent makes the objects, starts `relay bench-peer` with their descriptors, sends, then measures round trips. Must leave
//! nothing behind: no object has a name, and the child is waited for (or killed) before the row is reported.

use super::measure::{Place, ask_all, percentile, ping_pong, preemptions};
use super::peer::DESCRIPTORS;
use super::queues::{self, CAPACITY, Message, Receives, Sends, Stream, StreamReceiver, StreamSender};
use super::ring::{Conditions, check, row};
use super::{BadInput, Report};
use crate::lab::progress::Steps;
use crate::ring::{Consumer, Layout, Memory, Producer, init};
use crate::shm::discovery::take_fd;
use crate::shm::{Access, Bell, Segment};
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::io::{BufRead, BufReader, Lines, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the two processes talk through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Our ring in a sealed memfd
    Ring,
    /// Our broadcast in a sealed memfd, gated
    Broadcast,
    /// Our ring, and an eventfd written for every batch whether anybody sleeps or not
    Eventfd,
    /// Kernel pipes
    Pipe,
    /// A Unix stream socket
    UnixSocket,
}

/// Arguments of `relay bench ipc`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Messages in each round
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    pub iters: u64,
    /// What to measure (repeat, or separate by commas)
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["ring", "broadcast", "eventfd", "pipe", "unix-socket"])]
    pub mode: Vec<Kind>,
    /// Messages handed over at once, 1 to 64
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32], value_name = "N")]
    pub batch: Vec<u32>,
    /// Bytes of a message: 8, 16 or 64
    #[arg(long, value_delimiter = ',', default_values_t = [16], value_name = "BYTES")]
    pub size: Vec<usize>,
    /// Rounds of each; the modes take turns
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub rounds: u32,
    /// Both processes on one CPU
    #[arg(long)]
    pub same_core: bool,
}

/// One process's ends of a two-way connection.
pub(super) struct Side {
    pub(super) send: Box<dyn Sends>,
    pub(super) receive: Box<dyn Receives>,
}

/// The two directions of a segment: the parent's, then the child's, each `stride` bytes.
struct Halves {
    memory: Arc<dyn Memory>,
    stride: usize,
}

/// A ring's producer that writes an eventfd for every batch.
struct Ringing(Box<dyn Sends>, Bell);

impl Sends for Ringing {
    fn send(&mut self, first: u64, count: u32) -> u32 {
        let sent = self.0.send(first, count);
        if sent > 0 {
            // A bell that cannot be rung shows as a silent peer, which is an error with a time-out.
            let _rung = self.1.ring();
        }
        sent
    }
}

/// A ring's consumer that sleeps on the bell whenever the ring is empty.
struct Sleeping(Box<dyn Receives>, Bell);

impl Receives for Sleeping {
    fn receive(&mut self, count: u32, sum: &mut u64) -> u32 {
        let came = self.0.receive(count, sum);
        if came == 0 {
            let _rang = self.1.wait(Duration::from_millis(100));
        }
        came
    }
}

impl Side {
    /// Makes a connection: our side, and the descriptors for the other process.
    fn create<T: Message>(kind: Kind) -> Result<(Self, Vec<OwnedFd>)> {
        match kind {
            Kind::Pipe => {
                let ((their_in, our_out), (our_in, their_out)) = (std::io::pipe()?, std::io::pipe()?);
                Ok((Self::over::<_, _, T>(our_out, our_in), vec![their_in.into(), their_out.into()]))
            }
            Kind::UnixSocket => {
                let (ours, theirs) = UnixStream::pair()?;
                Ok((Self::over::<_, _, T>(ours.try_clone()?, ours), vec![theirs.into()]))
            }
            Kind::Broadcast => {
                let (halves, fd) = Halves::create(queues::broadcast_bytes::<T>(1).next_multiple_of(128))?;
                let publisher = queues::publisher::<T>(&halves.memory, 0, 1)?;
                // Their writing end is made here too, and adopted by them: the parent creates everything.
                drop(queues::publisher::<T>(&halves.memory, halves.stride, 1)?);
                let subscriber = queues::subscriber::<T>(&halves.memory, halves.stride, 1, 0)?;
                Ok((Self { send: Box::new(publisher), receive: Box::new(subscriber) }, vec![fd]))
            }
            Kind::Ring | Kind::Eventfd => {
                let (halves, fd) = Halves::create(Layout::<T>::bytes(CAPACITY))?;
                init::<T>(&*halves.memory, 0, CAPACITY)?;
                init::<T>(&*halves.memory, halves.stride, CAPACITY)?;
                let side = halves.ring::<T>(0, halves.stride)?;
                if kind == Kind::Ring {
                    return Ok((side, vec![fd]));
                }
                let (down, up) = (Bell::new()?, Bell::new()?);
                let fds = vec![fd, down.as_fd().try_clone_to_owned()?, up.as_fd().try_clone_to_owned()?];
                Ok((side.with_bells(down, up), fds))
            }
        }
    }

    /// The child's side, from the descriptors in the environment.
    pub(super) fn inherited<T: Message>(kind: Kind) -> Result<Self> {
        let list = std::env::var(DESCRIPTORS)?;
        let fds = list.split(',').map(|number| Ok(take_fd(DESCRIPTORS, number.parse()?)?)).collect::<Result<Vec<OwnedFd>>>()?;
        let mut fds = fds.into_iter();
        let mut next = || fds.next().context("a descriptor is missing");
        match kind {
            Kind::Pipe => {
                let (theirs, ours) = (next()?, next()?);
                Ok(Self::over::<_, _, T>(PipeWriter::from(ours), PipeReader::from(theirs)))
            }
            Kind::UnixSocket => {
                let stream = UnixStream::from(next()?);
                Ok(Self::over::<_, _, T>(stream.try_clone()?, stream))
            }
            Kind::Broadcast => {
                let halves = Halves::join(next()?, queues::broadcast_bytes::<T>(1).next_multiple_of(128))?;
                let publisher = queues::adopted_publisher::<T>(&halves.memory, halves.stride, 1)?;
                Ok(Self { send: Box::new(publisher), receive: Box::new(queues::subscriber::<T>(&halves.memory, 0, 1, 0)?) })
            }
            Kind::Ring | Kind::Eventfd => {
                let halves = Halves::join(next()?, Layout::<T>::bytes(CAPACITY))?;
                let side = halves.ring::<T>(halves.stride, 0)?;
                if kind == Kind::Ring {
                    return Ok(side);
                }
                let (down, up) = (Bell::from(next()?), Bell::from(next()?));
                Ok(side.with_bells(up, down))
            }
        }
    }

    fn over<W: std::io::Write + Send + 'static, R: std::io::Read + Send + 'static, T: Message>(writer: W, reader: R) -> Self {
        let send = StreamSender(Stream::<_, T>::new(writer));
        Self { send: Box::new(send), receive: Box::new(StreamReceiver(Stream::<_, T>::new(reader))) }
    }

    fn with_bells(self, ours: Bell, theirs: Bell) -> Self {
        Self { send: Box::new(Ringing(self.send, ours)), receive: Box::new(Sleeping(self.receive, theirs)) }
    }
}

impl Halves {
    fn create(stride: usize) -> Result<(Self, OwnedFd)> {
        let segment = Segment::create("relay-bench", 2 * stride)?;
        let fd = segment.as_fd().try_clone_to_owned()?;
        Ok((Self { memory: Arc::new(segment), stride }, fd))
    }

    fn join(fd: OwnedFd, stride: usize) -> Result<Self> {
        Ok(Self { memory: Arc::new(Segment::join(fd, Access::ReadWrite)?), stride })
    }

    fn ring<T: Message>(&self, send_at: usize, receive_at: usize) -> Result<Side> {
        let send = queues::ring_sender::<T>(Producer::attach(self.memory.clone(), send_at)?);
        Ok(Side { send, receive: queues::ring_receiver::<T>(Consumer::attach(self.memory.clone(), receive_at)?) })
    }
}

/// Measures everything asked for, rounds interleaved.
pub fn measure(args: &Args) -> Result<Report> {
    let binary = std::env::current_exe().context("own executable")?;
    measure_with(args, &|| {
        let mut command = Command::new(&binary);
        command.arg("bench-peer");
        command
    })
}

/// [`measure`], with the command that starts the other process (tests play it themselves).
pub(super) fn measure_with(args: &Args, peer: &dyn Fn() -> Command) -> Result<Report> {
    check(args.iters, &args.batch, args.rounds)?;
    let place = Place::choose(args.same_core, false)?;
    let samples = args.iters.min(10_000);
    let lines = ping_pong(place, samples)?;
    let mut report = Report { cpus: vec![place.sender, place.receiver], ..Report::default() };
    (report.ping_pong_ns, report.ping_pong_p99_ns) = (percentile(&lines, 0.5), percentile(&lines, 0.99));
    let mut steps = Steps::new(Some(args.size.len() * args.batch.len() * args.rounds as usize));
    for (size, batch) in args.size.iter().flat_map(|size| args.batch.iter().map(|batch| (*size, *batch))) {
        let mut found = vec![(Vec::new(), Vec::new(), 0); args.mode.len()];
        for round in 1..=args.rounds {
            steps.next(&format!("{batch} x {size} bytes, round {round}"));
            for (kind, (rounds, trips, preempted)) in args.mode.iter().zip(&mut found) {
                let round = Round { kind: *kind, size, batch, iters: args.iters, samples, place };
                let (ns, times, preemptions) = round.run(peer())?;
                rounds.push(ns);
                trips.extend(times);
                *preempted += preemptions;
            }
        }
        for (kind, (mut rounds, mut trips, preemptions)) in args.mode.iter().zip(found) {
            trips.sort_unstable();
            let name = kind.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
            let conditions = Conditions { batch, size, same_core: args.same_core };
            report.rows.push(row(name, conditions, &mut rounds, &trips, preemptions));
        }
    }
    Ok(report.finish())
}

/// One round of one row.
#[derive(Clone, Copy)]
struct Round {
    kind: Kind,
    size: usize,
    batch: u32,
    iters: u64,
    samples: u64,
    place: Place,
}

impl Round {
    /// ns a message, round trips, preemptions.
    fn run(self, command: Command) -> Result<(f64, Vec<u64>, i64)> {
        let (side, fds) = match self.size {
            8 => Side::create::<[u64; 1]>(self.kind)?,
            16 => Side::create::<[u64; 2]>(self.kind)?,
            64 => Side::create::<[u64; 8]>(self.kind)?,
            other => bail!(BadInput(format!("--size {other}: use 8, 16 or 64"))),
        };
        let mut child = self.start(command, fds)?;
        // In a thread of its own, so that the pinning ends with it.
        let mut words = BufReader::new(child.stdout.take().context("no stdout")?).lines();
        let outcome = std::thread::scope(|scope| scope.spawn(|| self.talk(side, &mut words)).join());
        let outcome = outcome.unwrap_or_else(|_| bail!("the sending side panicked"));
        if outcome.is_err() {
            // It may have gone by itself.
            let _killed = child.kill();
        }
        let _last_words = words.count();
        let status = child.wait().context("wait for bench-peer")?;
        let outcome = outcome.with_context(|| format!("{:?}, batch {}, {} bytes", self.kind, self.batch, self.size))?;
        ensure!(status.success(), "bench-peer: {status}");
        Ok(outcome)
    }

    fn start(self, mut command: Command, fds: Vec<OwnedFd>) -> Result<Child> {
        for fd in &fds {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).context("F_SETFD")?;
        }
        let kind = self.kind.to_possible_value().context("no name")?;
        let numbers: Vec<String> = fds.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
        command.args(["--kind", kind.get_name(), "--size", &self.size.to_string(), "--batch", &self.batch.to_string()]);
        command.args([
            "--iters",
            &self.iters.to_string(),
            "--samples",
            &self.samples.to_string(),
            "--cpu",
            &self.place.receiver.to_string(),
        ]);
        command.args(self.place.same_core().then_some("--same-core"));
        command.env(DESCRIPTORS, numbers.join(",")).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start bench-peer")
    }

    fn talk(self, mut side: Side, words: &mut Lines<BufReader<ChildStdout>>) -> Result<(f64, Vec<u64>, i64)> {
        let mut hear = |expected: &str| -> Result<String> {
            let mut rest =
                words.by_ref().map_while(Result::ok).filter_map(|line| line.strip_prefix(expected).map(|rest| rest.trim().to_owned()));
            rest.next().with_context(|| format!("bench-peer left before it said {expected:?}"))
        };
        self.place.enter(self.place.sender)?;
        hear("ready")?;
        let before = preemptions();
        let start = Instant::now();
        side.send.send_all(self.iters, self.batch, self.place.same_core())?;
        let theirs: i64 = hear("done")?.parse().context("preemptions")?;
        let elapsed = start.elapsed();
        let preempted = theirs + preemptions() - before;
        let trips = ask_all(&mut *side.send, &mut *side.receive, self.samples, self.place.same_core())?;
        Ok((elapsed.as_nanos() as f64 / self.iters as f64, trips, preempted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    const PLAY: &str = "RELAY_TEST_BENCH_PEER";

    #[derive(Parser)]
    struct Peer {
        #[command(flatten)]
        args: super::super::peer::Args,
    }

    /// Not a test of its own: the other process of the test below.
    #[test]
    fn play_peer() {
        let Ok(line) = std::env::var(PLAY) else { return };
        let peer = Peer::parse_from(std::iter::once("peer").chain(line.split(' ')));
        super::super::peer::run(&peer.args).unwrap();
    }

    #[test]
    fn req_004_6_every_kind_carries_every_message_between_processes() {
        let all = Kind::value_variants().to_vec();
        let args = Args { iters: 3000, mode: all.clone(), batch: vec![1, 32], size: vec![16, 64], rounds: 1, same_core: true };
        let binary = std::env::current_exe().unwrap();
        let report = measure_with(&args, &|| {
            let mut command = Command::new("sh");
            let script = format!("{PLAY}=\"$*\" exec {} --exact lab::ringbench::processes::tests::play_peer --nocapture", binary.display());
            command.args(["-c", &script, "sh"]);
            command
        });
        let report = report.unwrap();
        assert_eq!(report.rows.len(), all.len() * 4);
        assert!(report.rows.iter().all(|row| row.ns_per_message > 0.0 && row.p50_ns > 0));
    }
}
