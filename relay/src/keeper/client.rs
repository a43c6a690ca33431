//! The successor's side: finds the keeper by the path of the control socket, asks for the table, tells it that it may go.
//!
//! Must never trust a listener of another user, nor wait without a bound.

use super::message::{self, Message, Received};
use super::table::{Assembly, Table, TableError};
use nix::errno::Errno;
use nix::sys::socket::sockopt::{PeerCredentials, ReceiveTimeout};
use nix::sys::socket::{AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, getsockopt, setsockopt, socket};
use nix::sys::time::{TimeVal, TimeValLike};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

/// How long the keeper may take for its next word.
const PATIENCE_S: i64 = 2;
/// Bytes of an abstract address (unix(7)).
const MAX_NAME: usize = 107;

/// Why the keeper's table could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// A call failed.
    #[error("keeper: {call}: {errno}")]
    System {
        /// Which.
        call: &'static str,
        /// Why.
        errno: Errno,
    },
    /// Somebody else listens there.
    #[error("keeper: the listener belongs to uid {0}, neither root nor ours")]
    Stranger(u32),
    /// No answer, or an end in the middle.
    #[error("keeper: no answer: only root and the user of the relay may take over")]
    Silent,
    /// What came is no table.
    #[error(transparent)]
    Table(#[from] TableError),
}

const fn failed(call: &'static str) -> impl FnOnce(Errno) -> ClientError {
    move |errno| ClientError::System { call, errno }
}

/// The abstract address of the relay with this control socket: the end of its path, as much as fits.
fn address(control: &Path) -> nix::Result<UnixAddr> {
    let path = std::path::absolute(control).unwrap_or_else(|_| control.into());
    let path = path.as_os_str().as_encoded_bytes();
    let prefix = b"relay-keeper-";
    let end = path.get(path.len().saturating_sub(MAX_NAME - prefix.len())..).unwrap_or_default();
    UnixAddr::new_abstract(&[prefix, end].concat())
}

/// Makes the listening socket of a relay with this control socket.
pub fn listen(control: &Path) -> nix::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    bind(fd.as_raw_fd(), &address(control)?)?;
    nix::sys::socket::listen(&fd, Backlog::new(4)?)?;
    Ok(fd)
}

/// A connection to a keeper.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    /// Process that made the listener: the supervisor, dead or alive.
    pub supervisor: u32,
}

/// Connects; `None` where no relay with this control socket has a keeper.
pub fn connect(control: &Path) -> Result<Option<Client>, ClientError> {
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).map_err(failed("socket"))?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(PATIENCE_S)).map_err(failed("SO_RCVTIMEO"))?;
    match nix::sys::socket::connect(socket.as_raw_fd(), &address(control).map_err(failed("address"))?) {
        Err(Errno::ECONNREFUSED) => return Ok(None),
        other => other.map_err(failed("connect"))?,
    }
    let maker = getsockopt(&socket, PeerCredentials).map_err(failed("SO_PEERCRED"))?;
    if maker.uid() != 0 && maker.uid() != nix::unistd::geteuid().as_raw() {
        return Err(ClientError::Stranger(maker.uid()));
    }
    Ok(Some(Client { socket, supervisor: maker.pid().unsigned_abs() }))
}

impl Client {
    /// The table as it is now. It can be asked for again.
    pub fn table(&self) -> Result<Table, ClientError> {
        message::send(self.socket.as_fd(), &Message::Take, &[], MsgFlags::empty()).map_err(|errno| match errno {
            // It has hung up on us already.
            Errno::EPIPE | Errno::ECONNRESET => ClientError::Silent,
            errno => failed("asking")(errno),
        })?;
        let mut assembly = Assembly::default();
        loop {
            match message::receive(self.socket.as_fd(), MsgFlags::empty()) {
                Received::Message(message, descriptors) => {
                    if let Some(table) = assembly.take(message, descriptors)? {
                        return Ok(table);
                    }
                }
                Received::Malformed => return Err(TableError::Malformed("not in the keeper's words").into()),
                Received::Nothing | Received::End => return Err(ClientError::Silent),
            }
        }
    }

    /// Lets the keeper go.
    pub fn release(self) -> Result<(), ClientError> {
        message::send(self.socket.as_fd(), &Message::Release, &[], MsgFlags::empty()).map_err(failed("releasing the keeper"))?;
        // It goes by closing its end; a keeper that does not is none of ours any more.
        let _ = message::receive(self.socket.as_fd(), MsgFlags::empty());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_any_length_has_an_address_and_nobody_there_is_none() {
        let long = format!("/run/{}/relay.sock", "x".repeat(200));
        assert!(address(Path::new(&long)).is_ok());
        assert_ne!(address(Path::new("/run/a.sock")).unwrap(), address(Path::new("/run/b.sock")).unwrap());
        assert!(connect(Path::new("/nowhere/at/all.sock")).unwrap().is_none());
    }
}
