//! A worker that is led through its own program: one instruction at a time, with an eye on the words that a successor goes by.
//!
//! The words are those of the shared memory that say what has happened: the indices of the kernel's rings and of ours, the pool's
//! length, the journal's state, cursor and count. The CPU's debug registers find each store to them while the worker runs at full
//! speed; between them it is led by single steps. Must never write into the worker, nor judge: tests do.

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use relay::datapath::journal::{APPLIED, CURSOR, IDLE, SAVED_AT, SAVED_LEN, STATE};
use relay::lab::process::signal_pid;
use relay::plan::work::WorkLayout;
use relay::ring::layout::{CONSUMER_AT, PRODUCER_AT};
use relay::sys::xdp::{self, Ring};
use std::io::IoSliceMut;
use std::time::{Duration, Instant};

/// Ports of the relay that is stepped: an ingress and an egress interface.
const PORTS: usize = 2;
/// Bytes of a ring's first line: `capacity` is a u32 at 12.
const CAPACITY_AT: usize = 12;

/// A word of shared memory that the stepped thread writes.
#[derive(Clone, Copy, Debug)]
struct Word {
    name: &'static str,
    address: usize,
    /// Of a ring, which may be one that nobody uses.
    ring: bool,
}

/// Where a worker was killed.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// Instructions it was led on one by one.
    pub steps: u64,
    /// The store it was led to.
    pub after: Option<&'static str>,
    /// Instruction it stood before, in its program's file (or in the address space, outside of it).
    pub instruction: u64,
    /// State of the thread's journal.
    pub state: u32,
    /// The original header of the packet in hand, where there is one.
    pub header: Option<Vec<u8>>,
}

/// How far to lead it.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// So many instructions.
    Steps(u64),
    /// The `count`th store to a word from now on (at full speed: the CPU itself watches the word), and `beyond` instructions more.
    Store {
        /// Number of the word.
        word: usize,
        /// Which of its stores.
        count: u64,
        /// Instructions behind it.
        beyond: u64,
    },
}

/// The stores that were asked for come within this time, or not at all.
const PATIENCE: Duration = Duration::from_secs(2);

fn mapping_of(pid: u32, wanted: impl Fn(&str, i64) -> bool) -> Result<Vec<usize>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).with_context(|| format!("maps of {pid}"))?;
    let start = |line: &str| {
        let mut fields = line.split_whitespace();
        let range = fields.next()?;
        let offset = i64::from_str_radix(fields.nth(1)?, 16).ok()?;
        let name = fields.nth(2).unwrap_or_default();
        wanted(name, offset).then(|| usize::from_str_radix(range.split('-').next()?, 16).ok())?
    };
    Ok(maps.lines().filter_map(start).collect())
}

fn read(pid: u32, address: usize, into: &mut [u8]) -> Result<()> {
    let (len, wanted) = (into.len(), RemoteIoVec { base: address, len: into.len() });
    let got = process_vm_readv(Pid::from_raw(pid.cast_signed()), &mut [IoSliceMut::new(into)], &[wanted])?;
    ensure!(got == len, "{got} of {len} bytes at {address:#x}");
    Ok(())
}

/// The words that a thread of a worker writes.
#[derive(Debug)]
pub struct Words {
    pid: u32,
    words: Vec<Word>,
    journal: usize,
    program: (usize, usize),
}

impl Words {
    /// Of the ingress thread (which is the only one where fused) or of the egress thread.
    pub fn of(pid: u32, frames: u32, ingress: bool, egress: bool) -> Result<Self> {
        let work = mapping_of(pid, |name, offset| name.starts_with("/memfd:relay-work") && offset == 0)?;
        let work = *work.first().context("no work segment")?;
        // The egress rings' places do not depend on their capacity, and the first says what it is.
        let first = WorkLayout::new(frames, 1).egress_rings;
        let mut capacity = [0; 4];
        read(pid, work + first + CAPACITY_AT, &mut capacity)?;
        let layout = WorkLayout::new(frames, u32::from_ne_bytes(capacity));
        let journal = work + if ingress { layout.ingress_journal } else { layout.egress_journal };
        let mut words = Vec::new();
        let mut add = |wanted: bool, name, address| words.extend(wanted.then_some(Word { name, address, ring: name.ends_with("er") }));
        for (own, journal) in [(ingress, layout.ingress_journal), (egress, layout.egress_journal)] {
            add(own, "state", work + journal + STATE);
        }
        add(ingress, "cursor", work + layout.ingress_journal + CURSOR);
        add(ingress, "count", work + layout.ingress_journal + APPLIED);
        add(ingress, "pool", work + layout.pool);
        add(ingress, "return ring consumer", work + layout.return_ring + CONSUMER_AT);
        add(egress, "return ring producer", work + layout.return_ring + PRODUCER_AT);
        for port in 0..PORTS {
            add(ingress, "egress ring producer", work + layout.egress_ring(port) + PRODUCER_AT);
            add(egress, "egress ring consumer", work + layout.egress_ring(port) + CONSUMER_AT);
        }
        let [rx, tx, fill, completion] = xdp::ring_offsets(&xdp::socket()?)?;
        for (own, ring, name, at) in [
            (ingress, Ring::Rx, "RX consumer", rx.consumer),
            (ingress, Ring::Fill, "fill producer", fill.producer),
            (egress, Ring::Tx, "TX producer", tx.producer),
            (egress, Ring::Completion, "completion consumer", completion.consumer),
        ] {
            let rings = mapping_of(pid, |name, offset| name.contains("socket:") && offset == ring.page_offset())?;
            ensure!(!rings.is_empty(), "the worker maps no {name}");
            rings.into_iter().for_each(|start| add(own, name, start + at));
        }
        Ok(Self { pid, words, journal, program: program(pid)? })
    }

    /// Numbers and names of those that are written while there is traffic: of the rings, those that are another after a while.
    pub fn written_within(&self, time: Duration) -> Result<Vec<(usize, &'static str)>> {
        let before = self.look()?;
        std::thread::sleep(time);
        let (now, words) = (self.look()?, self.words.iter().enumerate());
        let written = words.filter(|(at, word)| !word.ring || before.get(*at) != now.get(*at));
        Ok(written.map(|(at, word)| (at, word.name)).collect())
    }

    fn look(&self) -> Result<Vec<u32>> {
        let mut bytes = vec![0; self.words.len() * 4];
        let remote: Vec<RemoteIoVec> = self.words.iter().map(|word| RemoteIoVec { base: word.address, len: 4 }).collect();
        let got = process_vm_readv(Pid::from_raw(self.pid.cast_signed()), &mut [IoSliceMut::new(&mut bytes)], &remote)?;
        ensure!(got == bytes.len(), "{got} bytes of {} words", self.words.len());
        Ok(bytes.chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]])).collect())
    }

    /// What the journal says, and where the thread stands.
    fn finish(&self, thread: Pid, mut place: Place) -> Result<Place> {
        let mut head = [0; APPLIED + 4];
        read(self.pid, self.journal, &mut head)?;
        let word = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        place.state = word(STATE);
        if place.state != IDLE {
            let mut header = vec![0; SAVED_LEN];
            read(self.pid, self.journal + SAVED_AT + word(CURSOR) as usize * SAVED_LEN, &mut header)?;
            place.header = Some(header);
        }
        // Number of the call or -1, stack pointer, program counter.
        let registers = std::fs::read_to_string(format!("/proc/{}/task/{thread}/syscall", self.pid))?;
        let counter = registers.split_whitespace().last().and_then(|text| usize::from_str_radix(text.strip_prefix("0x")?, 16).ok());
        let counter = counter.with_context(|| format!("where it stands: {registers}"))?;
        let (start, end) = self.program;
        place.instruction = if (start..end).contains(&counter) { counter - start } else { counter } as u64;
        Ok(place)
    }
}

/// Where the code of a process's own program lies.
fn program(pid: u32) -> Result<(usize, usize)> {
    let file = std::fs::read_link(format!("/proc/{pid}/exe"))?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let name = file.to_string_lossy().trim_end_matches(" (deleted)").to_owned();
    let bounds = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
    };
    let all: Vec<_> = maps.lines().filter(|line| line.contains(&name)).filter_map(bounds).collect();
    let (start, _) = all.first().with_context(|| format!("{name} is not mapped"))?;
    Ok((*start, all.last().map_or(*start, |(_, end)| *end)))
}

/// Stops a thread of a worker, leads it on, and kills the worker there. `None`: somebody else has killed it meanwhile, or the store
/// did not come.
pub fn lead_and_kill(words: &Words, thread: Pid, until: Until) -> Result<Option<Place>> {
    ptrace::attach(thread)?;
    ensure!(stopped(thread), "it did not stop");
    // On one CPU a step is a switch of tasks; between two it is two messages, and takes several times as long.
    let (own, mut one) = (sched_getaffinity(Pid::from_raw(0))?, CpuSet::new());
    one.set((0..CpuSet::count()).find(|cpu| own.is_set(*cpu).unwrap_or(false)).context("no CPU")?)?;
    sched_setaffinity(thread, &one)?;
    sched_setaffinity(Pid::from_raw(0), &one)?;
    let led = match until {
        Until::Steps(steps) => steps_on(thread, steps).then(|| Place { steps, ..Place::default() }),
        Until::Store { word, count, beyond } => to_store(words, thread, (word, count, beyond))?,
    };
    let place = led.and_then(|place| words.finish(thread, place).ok());
    sched_setaffinity(Pid::from_raw(0), &own)?;
    // Where somebody else was first, there is nobody to kill.
    let _ = signal_pid(words.pid, Signal::SIGKILL);
    // The tracer must see the end before the supervisor can.
    while stopped(thread) {
        let _ = ptrace::cont(thread, None);
    }
    Ok(place)
}

fn stopped(thread: Pid) -> bool {
    matches!(waitpid(thread, Some(WaitPidFlag::__WALL)), Ok(WaitStatus::Stopped(..)))
}

fn steps_on(thread: Pid, steps: u64) -> bool {
    (0..steps).all(|_| ptrace::step(thread, None).is_ok() && stopped(thread))
}

fn to_store(words: &Words, thread: Pid, (word, count, beyond): (usize, u64, u64)) -> Result<Option<Place>> {
    let word = words.words.get(word).context("no such word")?;
    let begin = Instant::now();
    // A CPU that can't watch is a machine where the other kills have to do.
    if watch(thread, word.address).is_err() {
        return Ok(None);
    }
    for _ in 0..count {
        ptrace::cont(thread, None)?;
        loop {
            match waitpid(thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG))? {
                WaitStatus::StillAlive if begin.elapsed() > PATIENCE => return Ok(None),
                WaitStatus::StillAlive => std::thread::sleep(Duration::from_micros(100)),
                WaitStatus::Stopped(..) => break,
                _ => return Ok(None),
            }
        }
    }
    Ok(steps_on(thread, beyond).then(|| Place { steps: beyond, after: Some(word.name), ..Place::default() }))
}

/// Has the CPU stop the thread behind each store to these four bytes.
#[cfg(target_arch = "x86_64")]
fn watch(thread: Pid, address: usize) -> Result<()> {
    const REGISTERS: usize = std::mem::offset_of!(libc::user, u_debugreg);
    /// Register 0, stores, four bytes.
    const CONTROL: i64 = 0b1101 << 16 | 1;
    ptrace::write_user(thread, REGISTERS as *mut _, address as i64)?;
    Ok(ptrace::write_user(thread, (REGISTERS + 7 * 8) as *mut _, CONTROL)?)
}

/// Has the CPU stop the thread behind each store to these four bytes.
#[cfg(not(target_arch = "x86_64"))]
fn watch(_thread: Pid, _address: usize) -> Result<()> {
    anyhow::bail!("only written for x86-64")
}
