//! The path of the control socket: taken without a race, replaced only when nobody listens, removed only while it is ours.
//!
//! Must never follow a symbolic link at the path, and never remove what is not a dead socket of a relay.

use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use std::fs::{DirBuilder, File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;
/// How long a listener with a full backlog is waited for before it counts as alive.
const PROBE_PATIENCE: Duration = Duration::from_millis(500);
/// How often, 10 ms apart, the directory's lock is tried while another relay starts or stops in it.
const LOCK_ATTEMPTS: u32 = 50;

/// Why the socket could not be had. All of them are exit code 2: an unavailable resource.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Over the 107 bytes of `sun_path` (unix(7)).
    #[error("the socket path {path} is longer than 107 bytes")]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// A symbolic link could point the socket at somebody else's file.
    #[error("{path} is a symbolic link")]
    Symlink {
        /// The path.
        path: PathBuf,
    },
    /// Some other kind of file.
    #[error("{path} exists and is not a socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A living process listens there.
    #[error("{path} belongs to pid {pid}")]
    InUse {
        /// The path.
        path: PathBuf,
        /// Process that listens (0: unknown, as for one in another pid namespace).
        pid: i32,
    },
    /// Another relay holds the directory's lock for half a second.
    #[error("another process keeps the lock of the directory {directory}")]
    Locked {
        /// The socket's directory.
        directory: PathBuf,
    },
    /// A call failed.
    #[error("{call} {path}: {source}")]
    Call {
        /// Which.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl BindError {
    /// The remedy, in one line.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Symlink { .. } | Self::NotASocket { .. } => "remove it, or name another socket with --socket",
            Self::Locked { .. } => "try again, or name a socket in another directory with --socket",
            Self::TooLong { .. } | Self::InUse { .. } | Self::Call { .. } => "name another socket with --socket",
        }
    }
}

/// A listening socket and the file that names it.
#[derive(Debug)]
pub(super) struct BoundPath {
    path: PathBuf,
    /// Device and inode of the socket file we made.
    identity: (u64, u64),
}

impl BoundPath {
    /// Listens at `path`, mode 0600, non-blocking and close-on-exec. Makes the last directory of the path if it is missing.
    pub(super) fn listen(path: &Path) -> Result<(UnixListener, Self), BindError> {
        let address = UnixAddr::new(path).map_err(|_| BindError::TooLong { path: path.into() })?;
        let directory = directory_of(path);
        make_directory(directory)?;
        let _lock = lock(directory)?;
        clear(path)?;
        let listener = open_listener(path, &address).map_err(|source| call("bind", path, source))?;
        let identity = identity(&metadata(path)?);
        Ok((listener, Self { path: path.into(), identity }))
    }

    /// Where it listens.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        // Without the lock (it is tried for half a second) the file may be a successor's in the next instant: then it stays.
        let Ok(_lock) = lock(directory_of(&self.path)) else { return };
        if metadata(&self.path).is_ok_and(|now| identity(&now) == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Connects, waiting at most `patience` for a place in the backlog; `WouldBlock` after that.
pub(super) fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let stream = UnixStream::from(fd);
    stream.set_write_timeout(Some(patience))?;
    nix::sys::socket::connect(stream.as_raw_fd(), &address)?;
    Ok(stream)
}

fn call(call: &'static str, path: &Path, source: io::Error) -> BindError {
    BindError::Call { call, path: path.into(), source }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn make_directory(directory: &Path) -> Result<(), BindError> {
    match DirBuilder::new().mode(0o755).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(call("mkdir", directory, error)),
        _ => Ok(()),
    }
}

/// The directory itself is the lock, so that two relays never replace one stale socket at once, and no lock file stays behind.
fn lock(directory: &Path) -> Result<Flock<File>, BindError> {
    let mut file = File::open(directory).map_err(|error| call("open", directory, error))?;
    for _ in 0..LOCK_ATTEMPTS {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => return Ok(held),
            Err((unlocked, _)) => file = unlocked,
        }
        sleep(Duration::from_millis(10));
    }
    Err(BindError::Locked { directory: directory.into() })
}

fn metadata(path: &Path) -> Result<Metadata, BindError> {
    std::fs::symlink_metadata(path).map_err(|error| call("stat", path, error))
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Removes a socket nobody listens at; refuses anything else. Called with the lock held.
fn clear(path: &Path) -> Result<(), BindError> {
    let kind = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(call("stat", path, error)),
        Ok(metadata) => metadata.file_type(),
    };
    if kind.is_symlink() {
        return Err(BindError::Symlink { path: path.into() });
    }
    if !kind.is_socket() {
        return Err(BindError::NotASocket { path: path.into() });
    }
    match connect(path, PROBE_PATIENCE) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| call("unlink", path, error))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(BindError::InUse { path: path.into(), pid: 0 }),
        Err(error) => Err(call("connect", path, error)),
        Ok(living) => Err(BindError::InUse { path: path.into(), pid: listener_pid(&living) }),
    }
}

fn listener_pid(stream: &UnixStream) -> i32 {
    nix::sys::socket::getsockopt(stream, nix::sys::socket::sockopt::PeerCredentials).map_or(0, |peer| peer.pid())
}

/// The mode is set on the socket before it has a name, so that the file is never wider than 0600, whatever the umask.
fn open_listener(path: &Path, address: &UnixAddr) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), address)?;
    if let Err(error) = listen(&fd, Backlog::new(BACKLOG)?) {
        let _ = std::fs::remove_file(path);
        return Err(error.into());
    }
    Ok(UnixListener::from(fd))
}
