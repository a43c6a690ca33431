//! The supervisor's side of the control socket, driven by its epoll loop.
//!
//! Must never block, never let one client cost the others anything, and never trust a byte: every length is checked before memory is
//! taken, every wait has a deadline, every turn a bound. Descriptors that a client attaches never reach this process: requests are
//! read without a control buffer, for which the kernel releases them (unix(7), SCM_RIGHTS).
//!
//! ```text
//!            whole request           handler: Some            written
//! Reading ───────────────▶ (handler) ───────────▶ Writing ───────────────▶ Reading
//!    │                         │ None                ▲  └ after an error ──▶ gone
//!    │ not a message           ▼        reply()      │
//!    │                      Waiting ─────────────────┤
//!    └───────────────────────────────────────────────┘
//! any state: hang-up, deadline ──▶ gone
//! ```

use super::framing::{self, FrameError, MAX_REQUEST_LEN, MAX_RESPONSE_LEN, Reassembly, Step};
use super::message::{ErrorBody, Request, Response};
pub use super::path::BindError;
use super::path::BoundPath;
use crate::shm::share::send_with;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, getsockopt, send, sockopt::PeerCredentials};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Clients at once.
pub const MAX_CONNECTIONS: usize = 64;
/// Memory for half-sent requests, all clients together.
pub const MAX_REQUEST_MEMORY: usize = 16 << 20;
/// Memory for responses on their way, all clients together.
pub const MAX_RESPONSE_MEMORY: usize = 64 << 20;
/// A request must be whole this long after its first byte.
pub const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
/// A response must have been taken this long after it was ready.
pub const RESPONSE_PATIENCE: Duration = Duration::from_secs(10);
/// A client may be silent this long between requests.
pub const IDLE_PATIENCE: Duration = Duration::from_secs(60);

/// New clients taken in one turn.
const ACCEPTS_PER_TURN: usize = 16;
/// Reads for one client in one turn (16 KiB each).
const READS_PER_TURN: usize = 16;
/// Sends for one client in one turn (one socket buffer each).
const SENDS_PER_TURN: usize = 4;
/// How long accepting rests when the process has no descriptor left.
const ACCEPT_REST: Duration = Duration::from_millis(200);
/// The listener's mark in the epoll set; clients count up from 1.
const LISTENER: u64 = 0;

/// Names one client for as long as it is connected; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientToken(u64);

/// What answers requests: `None` when the answer comes later by [`Server::reply`].
pub type Handler<'a> = dyn FnMut(ClientToken, Request) -> Option<Response> + 'a;

/// A control socket with its clients.
#[derive(Debug)]
pub struct Server {
    epoll: Epoll,
    listener: UnixListener,
    bound: BoundPath,
    own_uid: u32,
    next_token: u64,
    connections: BTreeMap<u64, Connection>,
    accept_rests_until: Option<Instant>,
}

/// One client.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    phase: Phase,
    deadline: Option<Instant>,
    /// What goes along with the first byte of the next response.
    descriptors: Vec<OwnedFd>,
}

#[derive(Debug)]
enum Phase {
    Reading(Reassembly),
    Waiting,
    Writing { bytes: Vec<u8>, sent: usize, close: bool },
}

/// Whether a client is still served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stay,
    Gone,
}

impl Server {
    /// Listens at `path` with mode 0600. A dead socket there is replaced, a living one is [`BindError::InUse`].
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let (listener, bound) = BoundPath::listen(path)?;
        let failed = |source: nix::Error| BindError::Call { call: "epoll", path: path.into(), source: source.into() };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER)).map_err(failed)?;
        let own_uid = nix::unistd::geteuid().as_raw();
        Ok(Self { epoll, listener, bound, own_uid, next_token: 1, connections: BTreeMap::new(), accept_rests_until: None })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.bound.path()
    }

    /// When [`Server::turn`] has something to do even if [`Server::as_fd`] is not readable.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.connections.values().filter_map(|connection| connection.deadline).chain(self.accept_rests_until).min()
    }

    /// Does what can be done now: accepts, reads, asks `handler`, writes, drops who is late. Bounded; call it again while readable.
    pub fn turn(&mut self, now: Instant, handler: &mut Handler<'_>) {
        self.resume_accepting(now);
        let mut events = [EpollEvent::empty(); MAX_CONNECTIONS + 1];
        let ready = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        for event in events.iter().take(ready) {
            match event.data() {
                LISTENER => self.accept(now),
                token => self.serve(token, now, handler),
            }
        }
        self.connections.retain(|_, connection| connection.deadline.is_none_or(|deadline| now < deadline));
    }

    /// Answers a request for which the handler returned `None`. False if that client has gone, or waits for nothing.
    pub fn reply(&mut self, token: ClientToken, response: &Response) -> bool {
        self.reply_with(token, response, Vec::new())
    }

    /// [`Server::reply`] with descriptors, at most [`crate::shm::share::MAX_DESCRIPTORS`], that go along with its first byte.
    pub fn reply_with(&mut self, token: ClientToken, response: &Response, descriptors: Vec<OwnedFd>) -> bool {
        let Some(mut connection) = self.connections.remove(&token.0) else { return false };
        let waits = matches!(connection.phase, Phase::Waiting);
        if waits {
            connection.descriptors = descriptors;
            self.answer(&mut connection, response, false, Instant::now());
        }
        let stays = self.settle(token.0, connection, Fate::Stay);
        waits && stays
    }

    fn accept(&mut self, now: Instant) {
        for _ in 0..ACCEPTS_PER_TURN {
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream, now),
                Err(error) if is_transient(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.rest_accepting(now, &error),
            }
        }
    }

    /// Out of descriptors or memory: without a rest the listener would stay readable and the loop would spin.
    fn rest_accepting(&mut self, now: Instant, error: &io::Error) {
        tracing::warn!(%error, "control socket: accept failed, next try in {ACCEPT_REST:?}");
        let _ = self.epoll.modify(&self.listener, &mut EpollEvent::new(EpollFlags::empty(), LISTENER));
        self.accept_rests_until = Some(now + ACCEPT_REST);
    }

    fn resume_accepting(&mut self, now: Instant) {
        if self.accept_rests_until.is_some_and(|until| until <= now) {
            self.accept_rests_until = None;
            let _ = self.epoll.modify(&self.listener, &mut EpollEvent::new(EpollFlags::EPOLLIN, LISTENER));
        }
    }

    fn admit(&mut self, stream: UnixStream, now: Instant) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if let Some(refusal) = self.refusal(&stream) {
            tracing::debug!("control socket: client refused: {}", refusal.message);
            return refuse(&stream, refusal);
        }
        let token = self.next_token;
        self.next_token += 1;
        if self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, token)).is_ok() {
            let phase = Phase::Reading(Reassembly::new(MAX_REQUEST_LEN));
            self.connections.insert(token, Connection { stream, phase, deadline: Some(now + IDLE_PATIENCE), descriptors: Vec::new() });
        }
    }

    /// Why this client may not come in.
    fn refusal(&self, stream: &UnixStream) -> Option<ErrorBody> {
        let peer = getsockopt(stream, PeerCredentials).ok().map(|peer| peer.uid());
        if !peer.is_some_and(|uid| is_permitted(uid, self.own_uid)) {
            let message = format!("permission denied at {}", self.path().display());
            return Some(error(2, message, "run as root, or as the user of the daemon"));
        }
        (self.connections.len() >= MAX_CONNECTIONS)
            .then(|| error(1, format!("the daemon has {MAX_CONNECTIONS} clients already"), "try again, or close some of them"))
    }

    fn serve(&mut self, token: u64, now: Instant, handler: &mut Handler<'_>) {
        let Some(mut connection) = self.connections.remove(&token) else { return };
        let fate = match connection.phase {
            Phase::Reading(_) => self.read(token, &mut connection, now, handler),
            Phase::Waiting => Fate::Gone, // it listens to nothing, so this is a hang-up
            Phase::Writing { .. } => connection.write(now),
        };
        self.settle(token, connection, fate);
    }

    /// Puts a client back with the events of its new phase, or lets it go (closing takes it out of the epoll set).
    fn settle(&mut self, token: u64, connection: Connection, fate: Fate) -> bool {
        let mut event = EpollEvent::new(connection.interest(), token);
        let stays = fate == Fate::Stay && self.epoll.modify(&connection.stream, &mut event).is_ok();
        if stays {
            self.connections.insert(token, connection);
        }
        stays
    }

    fn read(&self, token: u64, connection: &mut Connection, now: Instant, handler: &mut Handler<'_>) -> Fate {
        for _ in 0..READS_PER_TURN {
            match connection.step(now, self.request_memory()) {
                Ok(Step::More) => {}
                Ok(Step::Closed) => return Fate::Gone,
                Ok(Step::Bad(error)) => return self.reject(connection, &error, now),
                Ok(Step::Whole(document)) => return self.dispatch(token, connection, &document, now, handler),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Fate::Stay,
                Err(error) if error.kind() == io::ErrorKind::OutOfMemory => return self.starve(connection, now),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Fate::Gone,
            }
        }
        Fate::Stay
    }

    fn dispatch(&self, token: u64, connection: &mut Connection, document: &[u8], now: Instant, handler: &mut Handler<'_>) -> Fate {
        let request = match framing::decode(document) {
            Ok(request) => request,
            Err(error) => return self.reject(connection, &error, now),
        };
        match handler(ClientToken(token), request) {
            Some(response) => self.answer(connection, &response, false, now),
            None => connection.wait(),
        }
    }

    /// Says what was wrong and closes: after a broken message nothing further can be understood.
    fn reject(&self, connection: &mut Connection, wrong: &FrameError, now: Instant) -> Fate {
        self.answer(connection, &Response::Error(error(2, wrong.to_string(), "use the relay of the same version")), true, now)
    }

    fn starve(&self, connection: &mut Connection, now: Instant) -> Fate {
        let busy = error(1, "the daemon has too many half-sent requests".into(), "try again");
        self.answer(connection, &Response::Error(busy), true, now)
    }

    fn answer(&self, connection: &mut Connection, response: &Response, close: bool, now: Instant) -> Fate {
        let bytes = framing::encode(response, MAX_RESPONSE_LEN).unwrap_or_else(|error| failure_bytes(&error.to_string()));
        if self.response_memory() + bytes.len() > MAX_RESPONSE_MEMORY + framing::HEADER_LEN {
            return connection.send(failure_bytes("the daemon has too many responses that nobody reads"), true, now);
        }
        connection.send(bytes, close, now)
    }

    /// Held by the other clients (the one being served is out of the map).
    fn request_memory(&self) -> usize {
        self.connections.values().map(Connection::request_memory).sum()
    }

    fn response_memory(&self) -> usize {
        self.connections.values().map(Connection::response_memory).sum()
    }
}

impl AsFd for Server {
    /// Readable whenever [`Server::turn`] has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl Connection {
    /// One read; `OutOfMemory` when this client's request together with `others` would be over the budget.
    fn step(&mut self, now: Instant, others: usize) -> io::Result<Step> {
        let Phase::Reading(reassembly) = &mut self.phase else { return Ok(Step::Closed) };
        let was_empty = reassembly.is_empty();
        let step = reassembly.step(&mut &self.stream)?;
        if was_empty {
            self.deadline = Some(now + REQUEST_PATIENCE);
        }
        if others + reassembly.held_len() > MAX_REQUEST_MEMORY {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(step)
    }

    fn wait(&mut self) -> Fate {
        self.phase = Phase::Waiting;
        self.deadline = None;
        Fate::Stay
    }

    fn send(&mut self, bytes: Vec<u8>, close: bool, now: Instant) -> Fate {
        self.phase = Phase::Writing { bytes, sent: 0, close };
        self.deadline = Some(now + RESPONSE_PATIENCE);
        self.write(now)
    }

    fn write(&mut self, now: Instant) -> Fate {
        let Phase::Writing { bytes, sent, close } = &mut self.phase else { return Fate::Stay };
        for _ in 0..SENDS_PER_TURN {
            let rest = bytes.get(*sent..).unwrap_or_default();
            let done = match self.descriptors.as_slice() {
                [] => send_some(&self.stream, rest),
                descriptors => send_with(self.stream.as_fd(), rest, descriptors, MsgFlags::MSG_DONTWAIT),
            };
            match done {
                Ok(count) => {
                    *sent += count;
                    self.descriptors.clear();
                }
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Fate::Stay,
                Err(_) => return Fate::Gone,
            }
            if *sent >= bytes.len() {
                return if *close { Fate::Gone } else { self.read_next(now) };
            }
        }
        Fate::Stay
    }

    fn read_next(&mut self, now: Instant) -> Fate {
        self.phase = Phase::Reading(Reassembly::new(MAX_REQUEST_LEN));
        self.deadline = Some(now + IDLE_PATIENCE);
        Fate::Stay
    }

    fn interest(&self) -> EpollFlags {
        match self.phase {
            Phase::Reading(_) => EpollFlags::EPOLLIN,
            Phase::Waiting => EpollFlags::empty(),
            Phase::Writing { .. } => EpollFlags::EPOLLOUT,
        }
    }

    fn request_memory(&self) -> usize {
        if let Phase::Reading(reassembly) = &self.phase { reassembly.held_len() } else { 0 }
    }

    fn response_memory(&self) -> usize {
        if let Phase::Writing { bytes, .. } = &self.phase { bytes.len() } else { 0 }
    }
}

/// Root, and whoever runs the daemon.
fn is_permitted(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == 0 || peer_uid == own_uid
}

/// A client that went away before it was accepted.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted)
}

fn error(code: u8, message: String, hint: &str) -> ErrorBody {
    ErrorBody { code, message, field: String::new(), hint: hint.into() }
}

fn failure_bytes(message: &str) -> Vec<u8> {
    framing::encode(&Response::Error(error(1, message.into(), "")), MAX_RESPONSE_LEN).unwrap_or_default()
}

/// A fresh socket's buffer is empty, so one send takes the refusal whole; who doesn't read it hears end of file.
fn refuse(stream: &UnixStream, refusal: ErrorBody) {
    if let Ok(bytes) = framing::encode(&Response::Error(refusal), MAX_RESPONSE_LEN) {
        let _ = send_some(stream, &bytes);
    }
}

fn send_some(stream: &UnixStream, bytes: &[u8]) -> nix::Result<usize> {
    send(stream.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
