//! Channels: one writer, any number of readers, one sealed segment each.
//!
//! ```text
//! segment: header (256 B) · broadcast of T · rest   gate (optional, a segment of its own): who must not be lapped
//! writer:  create ─ share descriptors ─ send …      kernel lock on the segment: a second writer is refused (`AlreadyOwned`)
//!          dies ─▶ the kernel drops the lock ─▶ another adopts: new epoch, numbers go on
//! reader:  open ─ receive …                         a read-only mapping suffices
//! ```
//! The rest, if the segment is longer than [`channel_len`], is the caller's (the worker's status page, a manifest).
//! Two-way use is two channels ([`Parent`], [`Child`]): the types leave no way to write the wrong direction.
//! Must never wait: see [`super::full`] for what to do when a gate is closed.

use super::header::{HEADER_SIZE, Header, HeaderError};
use super::segment::{Access, Segment, SegmentError};
use crate::ring::broadcast;
use crate::ring::layout::layout_hash;
use crate::ring::{Behind, Gate, GateLine, Memory, Publisher, Received, RingError, Subscriber, Words};
use bytemuck::Pod;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Why a channel could not be made or opened. Every one of them is exit code 2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// It has a living writer.
    #[error("channel has a writer already (pid {0}): one channel has one writer; stop that process first")]
    AlreadyOwned(u32),
    /// The segment could not be had.
    #[error(transparent)]
    Segment(SegmentError),
    /// Its header is not that of a channel of this type.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// Its broadcast is not one of this type.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// Not with these credentials.
    #[error("channel: permission denied to uid {uid}: use the creator's uid, or let the creator pass the descriptor")]
    PermissionDenied {
        /// Who asked.
        uid: u32,
    },
    /// An environment variable is missing or unusable.
    #[error("{variable}: {problem}")]
    Environment {
        /// Its name.
        variable: &'static str,
        /// What is wrong with it, and the remedy.
        problem: &'static str,
    },
    /// What an environment variable led to was refused.
    #[error("{variable}: {reason}")]
    Inherited {
        /// Its name.
        variable: &'static str,
        /// Why.
        reason: Box<ChannelError>,
    },
    /// The other side did not answer.
    #[error("channel: no answer within the time-out")]
    Timeout,
    /// A system call failed.
    #[error("channel: {0}: {1}")]
    System(&'static str, Errno),
}

impl From<SegmentError> for ChannelError {
    fn from(error: SegmentError) -> Self {
        Self::Segment(error)
    }
}

impl ChannelError {
    /// Unavailable resource (INTERFACE, exit codes).
    pub const EXIT_CODE: u8 = 2;

    /// This error, said of the variable through which the channel came.
    pub fn of(self, variable: &'static str) -> Self {
        Self::Inherited { variable, reason: Box::new(self) }
    }

    /// Whether the two sides disagree about the element's type.
    pub const fn is_layout_mismatch(&self) -> bool {
        matches!(self, Self::Header(HeaderError::Layout { .. }) | Self::Ring(RingError::Element { .. }))
    }
}

/// What a channel moved, as one side knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ChannelStats {
    /// Messages sent by all writers so far.
    pub sent: u64,
    /// Messages this reader got (0 for a writer).
    pub received: u64,
    /// Messages lost because this reader was lapped.
    pub overruns: u64,
    /// Times the gate was closed.
    pub full: u64,
    /// Messages the writer gave up on.
    pub dropped: u64,
    /// Messages waiting for this reader.
    pub depth: u64,
    /// Most that ever waited, as sampled by this reader.
    pub max_depth: u64,
    /// Bytes of the channel's memory.
    pub memory_bytes: u64,
}

/// Kernel lock that says who writes: an open file description lock on a description of our own, dropped by the kernel when we die.
#[derive(Debug)]
struct WriterLock {
    own: OwnedFd,
    held: bool,
}

impl WriterLock {
    /// What the lock is taken on.
    fn open(segment: &Segment) -> Result<Self, ChannelError> {
        // Reopening gives a description of its own; an inherited descriptor shares its parent's, and so its locks.
        let path = format!("/proc/self/fd/{}", segment.as_fd().as_raw_fd());
        let own = nix::fcntl::open(path.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())
            .map_err(|errno| ChannelError::System("open of /proc/self/fd (is /proc mounted?)", errno))?;
        Ok(Self { own, held: false })
    }

    /// Takes it, unless somebody else holds it (also in this process).
    fn take(&mut self) -> Result<(), ChannelError> {
        let whole = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
        self.held = match fcntl(&self.own, FcntlArg::F_OFD_SETLK(&whole)) {
            Ok(_) => true,
            Err(Errno::EAGAIN | Errno::EACCES) => false,
            Err(errno) => return Err(ChannelError::System("F_OFD_SETLK", errno)),
        };
        Ok(())
    }
}

/// A channel that a process may write later, once its writer is gone: mapped, with everything opened that taking it over needs.
#[derive(Debug)]
pub struct Claim<T: Pod> {
    segment: Arc<Segment>,
    header: Header,
    lock: WriterLock,
    pid: u32,
    element: PhantomData<T>,
}

impl<T: Pod> Claim<T> {
    /// Maps the channel; its writer goes on.
    pub fn open(fd: OwnedFd) -> Result<Self, ChannelError> {
        Self::of(Arc::new(Segment::join(fd, Access::ReadWrite)?))
    }

    fn of(segment: Arc<Segment>) -> Result<Self, ChannelError> {
        let header = Header::open(segment.clone(), layout_hash::<T>())?;
        Ok(Self { lock: WriterLock::open(&segment)?, segment, header, pid: std::process::id(), element: PhantomData })
    }

    /// All of the channel's memory.
    pub const fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// Takes the writing end over: numbers go on, the epoch is a new one. One system call, `fcntl(F_OFD_SETLK)`.
    pub fn take(self) -> Result<Writer<T>, ChannelError> {
        Writer::attach(self, None)
    }

    /// The same for whom the kernel has told that the writer before is dead: it drops that one's lock somewhat later, and
    /// [`Writer::hold`] takes it then.
    pub fn succeed(self) -> Result<Writer<T>, ChannelError> {
        let mut writer = Writer::attach_early(self, None)?;
        writer.hold();
        Ok(writer)
    }
}

/// The writing end: neither `Clone` nor, through `&mut self`, shareable.
#[derive(Debug)]
pub struct Writer<T: Pod> {
    publisher: Publisher<T>,
    header: Header,
    segment: Arc<Segment>,
    gate: Option<Arc<Segment>>,
    lock: WriterLock,
}

impl<T: Pod> Writer<T> {
    /// A new channel of `capacity` slots (a power of two). Readers that fall behind are lapped and told so.
    pub fn create(name: &str, capacity: u32) -> Result<Self, ChannelError> {
        Self::attach(Claim::of(new_channel::<T>(name, capacity)?)?, None)
    }

    /// A new channel whose writer waits for up to `reader_count` admitted readers instead of lapping them.
    pub fn create_gated(name: &str, capacity: u32, reader_count: u32) -> Result<Self, ChannelError> {
        let gate = Segment::create(name, HEADER_SIZE + Gate::words(reader_count) * 8)?;
        let gate = Arc::new(gate);
        Header::create(gate.clone(), gate_layout(reader_count))?;
        Self::attach(Claim::of(new_channel::<T>(name, capacity)?)?, Some((gate, reader_count)))
    }

    /// A new channel at the start of `segment`.
    pub fn create_in(segment: Segment, capacity: u32) -> Result<Self, ChannelError> {
        Self::attach(Claim::of(prepare::<T>(segment, capacity)?)?, None)
    }

    /// Takes over the writing end of a channel whose writer is gone: numbers go on, the epoch is a new one.
    pub fn adopt(fd: OwnedFd) -> Result<Self, ChannelError> {
        Claim::open(fd)?.take()
    }

    /// [`Self::adopt`] with the gate's descriptor.
    pub fn adopt_gated(fd: OwnedFd, gate: OwnedFd, reader_count: u32) -> Result<Self, ChannelError> {
        let gate = Arc::new(Segment::join(gate, Access::ReadWrite)?);
        Header::open(gate.clone(), gate_layout(reader_count))?;
        Self::attach(Claim::open(fd)?, Some((gate, reader_count)))
    }

    fn attach(mut claim: Claim<T>, gate: Option<(Arc<Segment>, u32)>) -> Result<Self, ChannelError> {
        claim.lock.take()?;
        if claim.lock.held { Self::attach_early(claim, gate) } else { Err(ChannelError::AlreadyOwned(claim.header.owner())) }
    }

    fn attach_early(claim: Claim<T>, gate: Option<(Arc<Segment>, u32)>) -> Result<Self, ChannelError> {
        let Claim { segment, header, lock, pid, element: _ } = claim;
        let gate_words = gate.as_ref().and_then(|(memory, count)| Gate::new(gate_words(memory, *count)?, *count));
        let publisher = Publisher::attach(segment.clone(), HEADER_SIZE, gate_words)?;
        header.own(pid);
        Ok(Self { publisher, header, segment, gate: gate.map(|(memory, _)| memory), lock })
    }

    /// Sends. Fails only if the channel is gated and an admitted reader would lose a message.
    #[inline]
    pub fn send(&mut self, message: &T) -> Result<(), Behind> {
        self.publisher.send(message)
    }

    /// Counts a message that the caller gives up on.
    pub fn count_dropped(&mut self) {
        self.publisher.count_dropped();
    }

    /// From now on no message is lost to `reader`.
    pub fn admit(&mut self, reader: u32) {
        let position = self.publisher.position();
        if let Some(gate) = self.publisher.gate() {
            gate.admit(reader, position);
        }
    }

    /// Stops waiting for `reader`.
    pub fn evict(&mut self, reader: u32) {
        if let Some(gate) = self.publisher.gate() {
            gate.evict(reader);
        }
    }

    /// Takes the lock, if it was not to be had yet ([`Claim::succeed`]). One system call then, none otherwise.
    pub fn hold(&mut self) {
        if !self.lock.held {
            // An error leaves it as it is.
            let _ = self.lock.take();
        }
    }

    /// Header of the segment: beat, state, epoch.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// Messages sent so far, by predecessors too.
    pub const fn sent(&self) -> u64 {
        self.publisher.position()
    }

    /// The last message sent, by a predecessor perhaps.
    pub fn last(&self) -> Option<T> {
        self.publisher.last()
    }

    /// Slots.
    pub const fn capacity(&self) -> u32 {
        self.publisher.capacity()
    }

    /// All of the channel's memory.
    pub const fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// Descriptor of the gate, for admitted readers.
    pub fn gate_fd(&self) -> Option<BorrowedFd<'_>> {
        self.gate.as_ref().map(|gate| gate.as_fd())
    }
}

impl<T: Pod> AsFd for Writer<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.segment.as_fd()
    }
}

/// A reading end.
#[derive(Debug)]
pub struct Reader<T: Pod> {
    subscriber: Subscriber<T>,
    header: Header,
    segment: Arc<Segment>,
    max_depth: u64,
}

impl<T: Pod> Reader<T> {
    /// Reads what is sent from now on, over a read-only mapping.
    pub fn open(fd: OwnedFd) -> Result<Self, ChannelError> {
        Self::attach(fd, None)
    }

    /// Reads everything since `reader` was admitted; the writer waits for us.
    pub fn open_gated(fd: OwnedFd, gate: OwnedFd, reader_count: u32, reader: u32) -> Result<Self, ChannelError> {
        let gate = Arc::new(Segment::join(gate, Access::ReadWrite)?);
        Header::open(gate.clone(), gate_layout(reader_count))?;
        let line = gate_words(&gate, reader_count).and_then(|words| GateLine::new(words, reader_count, reader));
        let line = line.ok_or(RingError::DoesNotFit { offset: HEADER_SIZE, needed: Gate::words(reader_count) * 8, len: gate.len() })?;
        Self::attach(fd, Some(line))
    }

    fn attach(fd: OwnedFd, line: Option<GateLine>) -> Result<Self, ChannelError> {
        let segment = Arc::new(Segment::join(fd, Access::ReadOnly)?);
        let header = Header::open(segment.clone(), layout_hash::<T>())?;
        let subscriber = Subscriber::attach(segment.clone(), HEADER_SIZE, line)?;
        Ok(Self { subscriber, header, segment, max_depth: 0 })
    }

    /// The next message, nothing, or how many were lost.
    #[inline]
    pub fn receive(&mut self) -> Received<T> {
        self.subscriber.receive()
    }

    /// The newest message, without moving.
    pub fn latest(&self) -> Option<T> {
        self.subscriber.latest()
    }

    /// Goes back to the oldest message that is still there.
    pub fn rewind(&mut self) {
        self.subscriber.rewind();
    }

    /// Header of the segment: beat, state, epoch, creator.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// All of the channel's memory, read-only.
    pub const fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// What moved; also samples the high-water mark.
    pub fn stats(&mut self) -> ChannelStats {
        let subscriber = &self.subscriber;
        let depth = subscriber.depth();
        self.max_depth = self.max_depth.max(depth);
        ChannelStats {
            sent: subscriber.sent(),
            received: subscriber.received(),
            overruns: subscriber.lost(),
            full: subscriber.gate_closed(),
            dropped: subscriber.dropped(),
            depth,
            max_depth: self.max_depth,
            memory_bytes: self.segment.len() as u64,
        }
    }
}

fn new_channel<T: Pod>(name: &str, capacity: u32) -> Result<Arc<Segment>, ChannelError> {
    crate::ring::layout::check_capacity(capacity)?;
    prepare::<T>(Segment::create(name, channel_len::<T>(capacity))?, capacity)
}

/// Bytes of a channel of `capacity` slots.
pub const fn channel_len<T: Pod>(capacity: u32) -> usize {
    HEADER_SIZE + broadcast::bytes::<T>(capacity)
}

/// Makes a channel at the start of a new segment (zero as the kernel made it), for a writer that is to come ([`Writer::adopt`]).
pub fn prepare<T: Pod>(segment: Segment, capacity: u32) -> Result<Arc<Segment>, ChannelError> {
    let segment = Arc::new(segment);
    Header::create(segment.clone(), layout_hash::<T>())?;
    broadcast::init_zeroed::<T>(segment.clone(), HEADER_SIZE, capacity)?;
    Ok(segment)
}

fn gate_words(gate: &Arc<Segment>, reader_count: u32) -> Option<Words> {
    let memory: Arc<dyn Memory> = gate.clone();
    Words::new(memory, HEADER_SIZE, Gate::words(reader_count))
}

/// A gate's layout is its number of readers.
const fn gate_layout(reader_count: u32) -> u64 {
    u64::from_le_bytes(*b"GATE\0\0\0\0") ^ (reader_count as u64) << 32
}

/// The parent's ends of a pair: writes control, reads status.
#[derive(Debug)]
pub struct Parent<C: Pod, S: Pod> {
    /// Down.
    pub control: Writer<C>,
    /// Up.
    pub status: Reader<S>,
    status_fd: OwnedFd,
}

impl<C: Pod, S: Pod> Parent<C, S> {
    /// Makes both channels, before any child is started.
    pub fn create(name: &str, capacity: u32) -> Result<Self, ChannelError> {
        let control = Writer::create(&format!("relay-{name}-control"), capacity)?;
        let status = new_channel::<S>(&format!("relay-{name}-status"), capacity)?;
        let status_fd = duplicate(status.as_fd())?;
        Ok(Self { control, status: Reader::open(duplicate(status.as_fd())?)?, status_fd })
    }

    /// Descriptors the child is to inherit: (control, status).
    pub fn child_fds(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.control.as_fd(), self.status_fd.as_fd())
    }
}

/// The child's ends of a pair: reads control, writes status.
#[derive(Debug)]
pub struct Child<C: Pod, S: Pod> {
    /// Down.
    pub control: Reader<C>,
    /// Up.
    pub status: Writer<S>,
}

impl<C: Pod, S: Pod> Child<C, S> {
    /// Takes the inherited descriptors.
    pub fn attach(control: OwnedFd, status: OwnedFd) -> Result<Self, ChannelError> {
        let (control, status) = Self::open(control, status)?;
        Ok(Self { control, status: status.take().map_err(|error| error.of(super::discovery::STATUS))? })
    }

    /// The same for a child whose predecessor may still write.
    pub fn open(control: OwnedFd, status: OwnedFd) -> Result<(Reader<C>, Claim<S>), ChannelError> {
        let mut control = Reader::open(control).map_err(|error| error.of(super::discovery::CONTROL))?;
        // What was sent between creation and start is meant for us too.
        control.rewind();
        Ok((control, Claim::open(status).map_err(|error| error.of(super::discovery::STATUS))?))
    }
}

/// Another descriptor for the same segment, close-on-exec.
pub fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, ChannelError> {
    fd.try_clone_to_owned().map_err(|error| ChannelError::System("dup", Errno::from_raw(error.raw_os_error().unwrap_or(0))))
}
