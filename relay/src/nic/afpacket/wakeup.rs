//! What an errno of a send or a wake-up means, decided in one place.
//!
//! Must never count, retry or sleep: it only names.

use crate::nic::Kick;
use nix::errno::Errno;

/// What becomes of a packet whose send failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The device or the socket buffer is full for the moment (a stopped queue under PACKET_QDISC_BYPASS says ENOBUFS).
    Retry,
    /// The interface is down.
    Down,
    /// The interface no longer exists for this socket.
    Gone,
    /// This packet will never go (EMSGSIZE, EINVAL, …).
    Refused,
}

/// Classifies the errno of one send.
pub(super) const fn classify(errno: Errno) -> Verdict {
    match errno {
        Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM | Errno::EINTR | Errno::EBUSY => Verdict::Retry,
        Errno::ENETDOWN => Verdict::Down,
        Errno::ENXIO | Errno::ENODEV => Verdict::Gone,
        _ => Verdict::Refused,
    }
}

/// Classifies the errno of the system call that hands a batch over: benign ones end the turn, the rest is an error.
pub(super) const fn classify_call(errno: Errno) -> Result<Kick, Errno> {
    match classify(errno) {
        Verdict::Retry => Ok(Kick::Again),
        Verdict::Down => Ok(Kick::Down),
        Verdict::Gone => Ok(Kick::Gone),
        Verdict::Refused => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_its_errnos() {
        assert_eq!(classify(Errno::ENOBUFS), Verdict::Retry);
        assert_eq!(classify(Errno::ENETDOWN), Verdict::Down);
        assert_eq!(classify(Errno::ENXIO), Verdict::Gone);
        assert_eq!(classify(Errno::EMSGSIZE), Verdict::Refused);
        assert_eq!(classify_call(Errno::EBUSY), Ok(Kick::Again));
        assert_eq!(classify_call(Errno::EBADF), Err(Errno::EBADF));
    }
}
