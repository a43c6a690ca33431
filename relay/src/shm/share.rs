//! Handing a channel's descriptor to outside readers over a Unix socket, to those who may have it.
//!
//! ```text
//! reader ── 1 byte: b'r' (by my uid) or b'c' (RELAY_DISABLE_IPC_PERMISSIONS=1: as your child) ──▶ creator
//! reader ◀── b'y' and the descriptor (read-only), or b'n' ── creator, by SO_PEERCRED: same uid, or root, or ('c') really its child
//! ```
//! The socket file has mode 0600; the check does not rely on it. Must never wait without a bound, nor take over a living
//! owner's path: a stale one is replaced only after ECONNREFUSED.

use super::channel::ChannelError;
use super::header::parent_of;
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, UnixCredentials, accept4, getsockopt, recvmsg, sendmsg,
    sockopt::PeerCredentials,
};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long either side waits for the other.
const TIMEOUT: Duration = Duration::from_millis(500);

/// Descriptors that may come with one message (the kernel's own limit is 253).
pub const MAX_DESCRIPTORS: usize = 128;

fn system(call: &'static str) -> impl FnOnce(io::Error) -> ChannelError {
    move |error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ChannelError::Timeout,
        _ => ChannelError::System(call, Errno::from_raw(error.raw_os_error().unwrap_or(0))),
    }
}

/// Whether a process may have the descriptor. Pure, apart from what `parent` looks up.
pub fn permitted(own: (u32, u32), peer: (u32, u32), as_child: bool, parent: impl FnOnce(u32) -> Option<u32>) -> bool {
    let ((own_pid, own_uid), (peer_pid, peer_uid)) = (own, peer);
    peer_uid == own_uid || peer_uid == 0 || (as_child && parent(peer_pid) == Some(own_pid))
}

/// The creator's side: a listening socket, removed when dropped.
#[derive(Debug)]
pub struct Share {
    listener: UnixListener,
    path: PathBuf,
}

impl Share {
    /// Listens at `path`. A path left by a dead owner is replaced; one that answers is an error.
    pub fn bind(path: &Path) -> Result<Self, ChannelError> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let refused = UnixStream::connect(path).err().is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
                if !refused {
                    return Err(ChannelError::System("bind (a living process answers at this path: use another)", Errno::EADDRINUSE));
                }
                std::fs::remove_file(path).map_err(system("unlink"))?;
                UnixListener::bind(path)
            }
            other => other,
        };
        let listener = listener.map_err(system("bind"))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(system("chmod"))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Serves one caller: waits for it, judges it, answers. Says whether it got the descriptor.
    pub fn serve_one(&self, fd: impl AsFd) -> Result<bool, ChannelError> {
        let (mut stream, _) = self.listener.accept().map_err(system("accept"))?;
        stream.set_read_timeout(Some(TIMEOUT)).map_err(system("SO_RCVTIMEO"))?;
        let mut wish = [0];
        stream.read_exact(&mut wish).map_err(system("read"))?;
        let peer: UnixCredentials = getsockopt(&stream, PeerCredentials).map_err(|errno| ChannelError::System("SO_PEERCRED", errno))?;
        let own = (std::process::id(), nix::unistd::getuid().as_raw());
        if !permitted(own, (peer.pid() as u32, peer.uid()), wish == *b"c", parent_of) {
            stream.write_all(b"n").map_err(system("write"))?;
            return Ok(false);
        }
        let read_only = std::fs::File::open(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).map_err(system("open"))?;
        let fds = [read_only.as_raw_fd()];
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(b"y")], &[ControlMessage::ScmRights(&fds)], MsgFlags::MSG_NOSIGNAL, None)
            .map_err(|errno| ChannelError::System("sendmsg", errno))?;
        Ok(true)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        // Somebody may have removed it already: nothing more to do then.
        let _gone = std::fs::remove_file(&self.path);
    }
}

/// The outside reader's side: asks at `path` for the descriptor.
pub fn fetch(path: &Path, as_child: bool) -> Result<OwnedFd, ChannelError> {
    let mut stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => denied(),
        _ => system("connect")(error),
    })?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(system("SO_RCVTIMEO"))?;
    stream.write_all(if as_child { b"c" } else { b"r" }).map_err(system("write"))?;
    let mut answer = [0];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(&mut answer)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
        .map_err(|errno| if errno == Errno::EAGAIN { ChannelError::Timeout } else { ChannelError::System("recvmsg", errno) })?;
    let found = message.cmsgs().map_err(|errno| ChannelError::System("recvmsg", errno))?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    found.map(own).ok_or_else(denied)
}

/// Takes a connection of a non-blocking listener of any kind.
pub fn accept(listener: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).map(own)
}

#[expect(unsafe_code, reason = "a received descriptor is a number until it is owned")]
fn own(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just installed it for us (SCM_RIGHTS, accept), and nobody else knows the number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Reads a stream and keeps the descriptors that come along with the bytes.
#[derive(Debug)]
pub struct Receiving<'a> {
    stream: &'a UnixStream,
    /// What came.
    pub descriptors: Vec<OwnedFd>,
}

impl<'a> Receiving<'a> {
    /// Nothing has come yet.
    pub const fn from(stream: &'a UnixStream) -> Self {
        Self { stream, descriptors: Vec::new() }
    }
}

impl Read for Receiving<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (len, descriptors) = receive_with(self.stream.as_fd(), buffer, MsgFlags::empty())?;
        self.descriptors.extend(descriptors);
        Ok(len)
    }
}

/// The kernel's own limit (`SCM_MAX_FD`): with room for so many, none that comes is lost sight of.
const MOST_DESCRIPTORS: usize = 253;

/// Takes bytes (of a packet socket: one packet) with the descriptors that come along.
pub fn receive_with(socket: BorrowedFd<'_>, buffer: &mut [u8], flags: MsgFlags) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([i32; MOST_DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags | MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            descriptors.extend(fds.into_iter().map(own));
        }
    }
    Ok((message.bytes, descriptors))
}

/// Sends the first of `bytes` with the descriptors; says how many bytes went. At most [`MAX_DESCRIPTORS`].
pub fn send_with(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[impl AsRawFd], flags: MsgFlags) -> nix::Result<usize> {
    let fds: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], rights, flags | MsgFlags::MSG_NOSIGNAL, None)
}

fn denied() -> ChannelError {
    ChannelError::PermissionDenied { uid: nix::unistd::getuid().as_raw() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn req_000_6_only_the_same_uid_root_or_a_real_child_is_let_in() {
        let never = |_| -> Option<u32> { panic!("the parent is not asked for") };
        assert!(permitted((10, 500), (99, 500), false, never));
        assert!(permitted((10, 500), (99, 0), false, never));
        assert!(!permitted((10, 500), (99, 501), false, never));
        assert!(!permitted((10, 500), (99, 501), true, |_| Some(1)), "exported by hand from a shell");
        assert!(!permitted((10, 500), (99, 501), true, |_| None));
        assert!(permitted((10, 500), (99, 501), true, |_| Some(10)), "a child of the creator");
    }

    #[test]
    fn req_002_17_a_stale_path_is_replaced_and_a_living_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("channel.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "left behind, as by SIGKILL");
        let share = Share::bind(&path).unwrap();
        assert!(matches!(Share::bind(&path), Err(ChannelError::System(_, Errno::EADDRINUSE))));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(share);
        assert!(!path.exists());
    }

    #[test]
    fn req_002_17_a_peer_that_does_not_answer_is_a_timeout() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("silent.sock");
        let _share = Share::bind(&path).unwrap();
        assert_eq!(fetch(&path, false).unwrap_err(), ChannelError::Timeout);
    }
}
