//! Sealed memfds: memory without a name, freed by the kernel at the last close.
//!
//! Must never make one that another process could shrink (a reader would get SIGBUS).

use super::Mapping;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Who may write a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writers {
    /// Whoever gets the descriptor.
    Holders,
    /// Only the mapping that [`create`] returns: the descriptor serves readers alone from then on.
    Creator,
}

/// A memfd of `len` bytes, sealed against any change of size, mapped for writing.
pub fn create(name: &str, len: usize, writers: Writers) -> Result<(OwnedFd, Arc<Mapping>), Errno> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&fd, i64::try_from(len).map_err(|_| Errno::EFBIG)?)?;
    let mapping = Mapping::new(&fd, 0, len, true, false)?;
    let size = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    let seals = match writers {
        Writers::Holders => size,
        Writers::Creator => size | SealFlag::F_SEAL_FUTURE_WRITE,
    };
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
    Ok((fd, Arc::new(mapping)))
}

/// Maps an inherited memfd whole. Refuses one that could still shrink, or is smaller than `min_len`.
pub fn join(fd: &OwnedFd, min_len: usize, writable: bool) -> Result<Arc<Mapping>, Errno> {
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS)?;
    let sealed = SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK);
    let len = usize::try_from(nix::sys::stat::fstat(fd)?.st_size).unwrap_or(0);
    if !sealed || len < min_len {
        return Err(Errno::EBADF);
    }
    Ok(Arc::new(Mapping::new(fd, 0, len, writable, false)?))
}
