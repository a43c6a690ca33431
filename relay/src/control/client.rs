//! The command line's side of the control socket.
//!
//! Must never wait without a bound, and never take more from a daemon than the response limit.

use super::framing::{self, FrameError, MAX_REQUEST_LEN, MAX_RESPONSE_LEN, Reassembly, Step};
use super::message::{Request, Response};
use super::path::connect;
use crate::shm::share::Receiving;
use nix::sys::socket::{MsgFlags, send};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// For one request and its response together.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens at the path.
    #[error("no daemon at {path}")]
    NoDaemon {
        /// The path.
        path: PathBuf,
    },
    /// The socket belongs to another user.
    #[error("permission denied at {path}")]
    Permission {
        /// The path.
        path: PathBuf,
    },
    /// Over the 107 bytes of `sun_path` (unix(7)).
    #[error("the socket path {path} is longer than 107 bytes")]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// No whole response within [`PATIENCE`].
    #[error("the daemon at {path} did not answer within {PATIENCE:?}")]
    Timeout {
        /// The path.
        path: PathBuf,
    },
    /// The daemon closed the connection without a response.
    #[error("the daemon at {path} closed the connection without an answer")]
    Closed {
        /// The path.
        path: PathBuf,
    },
    /// Bytes that are no message, or a request over the limit.
    #[error("{path}: {source}")]
    Frame {
        /// The path.
        path: PathBuf,
        /// What is wrong with them.
        source: FrameError,
    },
    /// Another error of the socket.
    #[error("{path}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ClientError {
    /// Exit code of a command that failed so (INTERFACE.md).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoDaemon { .. } => 3,
            Self::Permission { .. } | Self::TooLong { .. } => 2,
            Self::Frame { source: FrameError::TooLong { .. } | FrameError::Version { .. }, .. } => 2,
            Self::Timeout { .. } | Self::Closed { .. } | Self::Frame { .. } | Self::Io { .. } => 1,
        }
    }

    /// The remedy, in one line; empty where there is none to name.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoDaemon { .. } => "start `relay run`, or name its socket with --socket",
            Self::Permission { .. } => "run as root, or as the user of the daemon",
            Self::TooLong { .. } => "name a shorter path with --socket",
            Self::Timeout { .. } | Self::Closed { .. } => "look at the daemon's log",
            Self::Frame { source: FrameError::TooLong { .. }, .. } => "use fewer or shorter rules",
            Self::Frame { .. } => "use the relay of the same version as the daemon",
            Self::Io { .. } => "",
        }
    }

    fn connecting(path: &Path, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory => Self::NoDaemon { path },
            io::ErrorKind::PermissionDenied => Self::Permission { path },
            io::ErrorKind::WouldBlock => Self::Timeout { path },
            _ if source.raw_os_error() == Some(libc::ENAMETOOLONG) => Self::TooLong { path },
            _ => Self::Io { path, source },
        }
    }
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: UnixStream,
}

impl Client {
    /// Connects to the daemon at `path`.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = connect(path, PATIENCE).map_err(|error| ClientError::connecting(path, error))?;
        Ok(Self { path: path.into(), stream })
    }

    /// Asks once and waits for the answer; the connection can be used again.
    pub fn request(&mut self, request: &Request) -> Result<Response, ClientError> {
        self.request_with(request).map(|(response, _)| response)
    }

    /// The same, with the descriptors that came along.
    pub fn request_with(&mut self, request: &Request) -> Result<(Response, Vec<OwnedFd>), ClientError> {
        let bytes = framing::encode(request, MAX_REQUEST_LEN).map_err(|source| self.broken(source))?;
        let until = Instant::now() + PATIENCE;
        self.write(&bytes, until)?;
        let mut source = Receiving::from(&self.stream);
        let document = self.read(&mut source, until)?;
        let response = framing::decode(&document).map_err(|source| self.broken(source))?;
        Ok((response, source.descriptors))
    }

    /// A daemon that refuses closes before it has read everything: then its reason is still to be read.
    fn write(&self, mut bytes: &[u8], until: Instant) -> Result<(), ClientError> {
        while !bytes.is_empty() {
            let left = self.left(until)?;
            self.stream.set_write_timeout(Some(left)).map_err(|error| self.failed(error))?;
            match send(self.stream.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(self.failed(error.into())),
            }
        }
        Ok(())
    }

    fn read(&self, source: &mut Receiving<'_>, until: Instant) -> Result<Vec<u8>, ClientError> {
        let mut reassembly = Reassembly::new(MAX_RESPONSE_LEN);
        loop {
            let left = self.left(until)?;
            self.stream.set_read_timeout(Some(left)).map_err(|error| self.failed(error))?;
            match reassembly.step(source) {
                Ok(Step::More) => {}
                Ok(Step::Whole(document)) => return Ok(document),
                Ok(Step::Closed) => return Err(ClientError::Closed { path: self.path.clone() }),
                Ok(Step::Bad(error)) => return Err(self.broken(error)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    fn left(&self, until: Instant) -> Result<Duration, ClientError> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ClientError::Timeout { path: self.path.clone() }) } else { Ok(left) }
    }

    fn broken(&self, source: FrameError) -> ClientError {
        ClientError::Frame { path: self.path.clone(), source }
    }

    fn failed(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Timeout { path },
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => ClientError::Closed { path },
            _ => ClientError::Io { path, source },
        }
    }
}
