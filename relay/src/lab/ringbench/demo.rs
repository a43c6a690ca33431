//! `scripts/run_demo.sh`: the ring between two processes, for people; every run prints the same.
//!
//! `golden` ends with `OK: golden scenario completed`, exit 0. `failure` asks for a channel that is not there and ends with
//! `ERROR: invalid input or unavailable IPC resource` and `exit=2`, exit 2. Must never print what differs between two runs.

use crate::ring::{Consumer, Layout, Producer, init};
use crate::shm::discovery::{CONTROL, Place, parse_place, take_fd};
use crate::shm::{Access, Segment};
use anyhow::{Context, Result, anyhow, ensure};
use clap::ValueEnum;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest payload of a [`Message`].
pub const MAX_PAYLOAD: usize = 256;
const CAPACITY: u32 = 256;
const COUNT: u32 = 10_000;

/// What goes through the demo's rings (002.14).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Message {
    /// Number.
    pub id: i32,
    /// Bytes of the payload that count.
    pub len: i32,
    /// The bytes.
    pub payload: [u8; MAX_PAYLOAD],
}

/// Why a message was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("message of {0} bytes: 0 to {MAX_PAYLOAD} are possible")]
pub struct BadLength(pub i64);

impl Message {
    /// Packs a payload.
    pub fn encode(id: i32, bytes: &[u8]) -> Result<Self, BadLength> {
        let mut payload = [0; MAX_PAYLOAD];
        payload.get_mut(..bytes.len()).ok_or(BadLength(bytes.len() as i64))?.copy_from_slice(bytes);
        Ok(Self { id, len: bytes.len() as i32, payload })
    }

    /// The payload; the length is the peer's word and is judged.
    pub fn decode(&self) -> Result<&[u8], BadLength> {
        let len = usize::try_from(self.len).map_err(|_| BadLength(self.len.into()))?;
        self.payload.get(..len).ok_or(BadLength(self.len.into()))
    }
}

/// What to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Everything works
    Golden,
    /// A channel that is not there
    Failure,
    /// The other process of golden
    #[value(hide = true)]
    Echo,
}

/// Arguments of the hidden `relay ring-demo`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What to show
    #[arg(long, value_enum, default_value = "golden")]
    pub mode: Mode,
    /// Longest wait for the other side
    #[arg(long, default_value_t = 10_000, value_name = "MS")]
    pub timeout_ms: u64,
    /// Fail at once where the demo would wait
    #[arg(long)]
    pub nonblock: bool,
}

/// Plays; returns the exit code. What goes wrong on the way is an error (exit 1).
pub fn run(args: &Args) -> Result<u8> {
    let limit = if args.nonblock { Duration::ZERO } else { Duration::from_millis(args.timeout_ms) };
    match args.mode {
        Mode::Golden => {
            let binary = std::env::current_exe().context("own executable")?;
            let mut command = Command::new(binary);
            command.args(["ring-demo", "--mode", "echo", "--timeout-ms", &args.timeout_ms.to_string()]);
            golden(command, limit, &mut |line| println!("{line}"))?;
            Ok(0)
        }
        Mode::Failure => Ok(failure(&mut |line| println!("{line}"))),
        Mode::Echo => echo(Duration::from_millis(args.timeout_ms)).map(|()| 0),
    }
}

/// The two rings of the demo: there and back.
struct Pair {
    there: Producer<Message>,
    back: Consumer<Message>,
    limit: Duration,
}

impl Pair {
    fn ask(&mut self, message: &Message) -> Result<Message> {
        self.send(message)?;
        self.hear()
    }

    fn send(&mut self, message: &Message) -> Result<()> {
        until(self.limit, || self.there.push(*message).ok()).context("request: the ring stays full")
    }

    fn hear(&mut self) -> Result<Message> {
        until(self.limit, || self.back.pop()).context("reply")
    }
}

fn until<T>(limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Some(found) => return Ok(found),
            None if start.elapsed() >= limit => return Err(anyhow!("timeout: nothing within {limit:?}")),
            None => std::thread::yield_now(),
        }
    }
}

/// The scenario with deterministic counts.
fn golden(mut echo: Command, limit: Duration, say: &mut dyn FnMut(String)) -> Result<()> {
    let segment = Segment::create("relay-demo", 2 * Layout::<Message>::bytes(CAPACITY))?;
    let fd = segment.as_fd().try_clone_to_owned()?;
    let memory = Arc::new(segment);
    for offset in [0, Layout::<Message>::bytes(CAPACITY)] {
        init::<Message>(&*memory, offset, CAPACITY)?;
    }
    let there = Producer::attach(memory.clone(), 0)?;
    let mut pair = Pair { there, back: Consumer::attach(memory, Layout::<Message>::bytes(CAPACITY))?, limit };
    capacity(&mut pair, say)?;
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty())).context("F_SETFD")?;
    let mut child = echo.env(CONTROL, format!("fd:{}", fd.as_raw_fd())).stdout(Stdio::null()).spawn().context("start the echo")?;
    let outcome = scenario(&mut pair, say);
    finish(&mut child, outcome)?;
    say("OK: golden scenario completed".to_owned());
    Ok(())
}

/// Before anybody reads: exactly CAPACITY messages fit.
fn capacity(pair: &mut Pair, say: &mut dyn FnMut(String)) -> Result<()> {
    let mut accepted = 0;
    while pair.there.push(Message::encode(-1, b"fill")?).is_ok() {
        accepted += 1;
    }
    ensure!(accepted == CAPACITY, "{accepted} messages fit, not {CAPACITY}");
    say(format!("capacity: {accepted} messages fit, the next is refused"));
    Ok(())
}

fn scenario(pair: &mut Pair, say: &mut dyn FnMut(String)) -> Result<()> {
    for _ in 0..CAPACITY {
        ensure!(pair.hear()?.decode()? == b"fill", "the echo changed a message");
    }
    let reply = pair.ask(&Message::encode(1, b"hello")?)?;
    ensure!(reply.decode()? == b"hello" && reply.id == 1, "the echo changed a message");
    say(format!("request: \"hello\" -> reply: \"{}\"", String::from_utf8_lossy(reply.decode()?)));
    let mut checksum = 0_u64;
    let mut heard = 0;
    for id in 0..COUNT as i32 {
        pair.send(&Message::encode(id, format!("message {id}").as_bytes())?)?;
        while let Some(reply) = pair.back.pop() {
            checksum = check(&reply, heard, checksum)?;
            heard += 1;
        }
    }
    while heard < COUNT {
        checksum = check(&pair.hear()?, heard, checksum)?;
        heard += 1;
    }
    say(format!("many: {COUNT} sent, {heard} received, 0 lost, 0 reordered, checksum {checksum:016x}"));
    let refused = Message::encode(0, &[0; MAX_PAYLOAD + 1]).err().map(|error| error.to_string());
    say(format!("too long: {}", refused.context("257 bytes were accepted")?));
    let mut hostile = Message::encode(0, b"")?;
    hostile.len = -1;
    say(format!("hostile length: {}", hostile.decode().err().context("a length of -1 was accepted")?));
    pair.send(&Message::encode(i32::MIN, b"bye")?)
}

fn check(reply: &Message, expected: u32, checksum: u64) -> Result<u64> {
    ensure!(reply.id == expected as i32, "message {} came instead of {expected}", reply.id);
    let bytes = reply.decode()?;
    Ok(bytes.iter().fold(checksum, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)))
}

fn finish(child: &mut Child, outcome: Result<()>) -> Result<()> {
    if outcome.is_err() {
        // It may have gone by itself.
        let _killed = child.kill();
    }
    let status = child.wait().context("wait for the echo")?;
    outcome?;
    ensure!(status.success(), "the echo: {status}");
    Ok(())
}

/// The other process: sends everything back until told to leave.
fn echo(limit: Duration) -> Result<()> {
    let Place::Fd(number) = parse_place(CONTROL, std::env::var_os(CONTROL))? else { return Err(anyhow!("{CONTROL}: fd:N is needed")) };
    let memory = Arc::new(Segment::join(take_fd(CONTROL, number)?, Access::ReadWrite)?);
    let mut there = Consumer::<Message>::attach(memory.clone(), 0)?;
    let mut back = Producer::<Message>::attach(memory, Layout::<Message>::bytes(CAPACITY))?;
    loop {
        let message = until(limit, || there.pop()).context("request")?;
        if message.id == i32::MIN {
            return Ok(());
        }
        until(limit, || back.push(message).ok()).context("reply: the ring stays full")?;
    }
}

/// A descriptor that nobody has opened.
fn failure(say: &mut dyn FnMut(String)) -> u8 {
    let missing = parse_place(CONTROL, Some("fd:1048575".into())).and_then(|place| match place {
        Place::Fd(number) => take_fd(CONTROL, number).map(drop),
        Place::Path(_) => Ok(()),
    });
    match missing {
        Err(_) => {
            say("ERROR: invalid input or unavailable IPC resource".to_owned());
            say("exit=2".to_owned());
            2
        }
        Ok(()) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn req_002_14_messages_round_trip_and_lengths_are_judged() {
        let message = Message::encode(7, b"hello").unwrap();
        assert_eq!((message.id, message.decode()), (7, Ok(&b"hello"[..])));
        assert_eq!(Message::encode(0, &[1; 256]).unwrap().decode().unwrap().len(), 256);
        assert_eq!(Message::encode(0, &[1; 257]), Err(BadLength(257)));
        assert_eq!(Message { len: -1, ..message }.decode(), Err(BadLength(-1)));
        assert_eq!(Message { len: 257, ..message }.decode(), Err(BadLength(257)));
        assert_eq!(size_of::<Message>(), 264);
    }

    /// Not a test of its own: the other process of the test below.
    #[test]
    fn play_echo() {
        if std::env::var_os("RELAY_TEST_ECHO").is_some() {
            echo(Duration::from_secs(20)).unwrap();
        }
    }

    #[test]
    fn req_002_5_golden_is_the_same_over_twenty_runs() {
        let run = || {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "lab::ringbench::demo::tests::play_echo", "--nocapture"]).env("RELAY_TEST_ECHO", "1");
            let mut lines = Vec::new();
            golden(command, Duration::from_secs(20), &mut |line| lines.push(line)).unwrap();
            lines
        };
        let first = run();
        assert_eq!(first.last().unwrap(), "OK: golden scenario completed");
        assert!((1..20).all(|_| run() == first), "{first:?}");
    }

    #[test]
    fn req_002_6_failure_says_so_and_is_two() {
        let mut lines = Vec::new();
        assert_eq!(failure(&mut |line| lines.push(line)), 2);
        assert_eq!(lines, ["ERROR: invalid input or unavailable IPC resource", "exit=2"]);
    }

    #[test]
    fn req_002_17_a_silent_peer_is_a_timeout() {
        let mut quiet = Command::new("sleep");
        quiet.arg("30");
        let error = golden(quiet, Duration::from_millis(20), &mut |_| ()).unwrap_err();
        assert!(format!("{error:#}").contains("timeout"), "{error:#}");
    }
}
