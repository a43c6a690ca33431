//! A text in a sealed memfd: what one process writes down for another that gets the descriptor.
//!
//! Must never be read beyond the reader's own bound.

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// Writes it down for good.
pub fn write(name: &str, text: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.write_all(text)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// Reads one of at most `max` bytes.
pub fn read(fd: OwnedFd, max: u64) -> io::Result<Vec<u8>> {
    let file = File::from(fd);
    let len = file.metadata()?.len();
    if len > max {
        return Err(io::Error::other(format!("{len} bytes are more than {max}")));
    }
    let mut text = vec![0; len as usize];
    file.read_exact_at(&mut text, 0)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_stays_and_is_read_within_bounds() {
        let memo = write("test", b"text").unwrap();
        assert!(File::from(memo.try_clone().unwrap()).write_all(b"x").is_err(), "sealed");
        assert_eq!(read(memo.try_clone().unwrap(), 4).unwrap(), b"text");
        assert!(read(memo, 3).is_err());
        let huge = memfd_create("huge", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&huge, 1 << 40).unwrap();
        assert!(read(huge, 1 << 20).is_err(), "a length that is no reason to take memory");
    }
}
