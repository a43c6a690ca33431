//! A segment: a sealed memfd and its mapping. It has no name, so nothing is left behind by a crash.
//!
//! Life of a segment: `create` (supervisor) → pass the descriptor → `join` (worker, reader) → drop = *leave*. It is *deleted* by
//! the kernel when the last descriptor and the last mapping are gone; no one has to do it, and no one can forget it.
//! Must never map what could shrink: size and seals are checked first, so no access raises SIGBUS.
#![expect(unsafe_code, reason = "states that the mapping of a sealed memfd stays valid")]

use crate::ring::Memory;
use crate::sys::Mapping;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// What a process may do with a segment it joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Map to read only. A write by mistake is SIGSEGV, not damage.
    ReadOnly,
    /// Map to read and write.
    ReadWrite,
}

/// Why a segment could not be made or joined.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// A system call failed.
    #[error("segment: {call}: {errno}")]
    System {
        /// Its name.
        call: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// The descriptor could be truncated under our feet.
    #[error("segment: the descriptor is not sealed against shrinking and growing; only memfds made by relay are accepted")]
    NotSealed,
    /// Nothing to map.
    #[error("segment: the descriptor has {0} bytes")]
    Size(i64),
    /// Smaller than what is to lie in it.
    #[error("segment: {len} bytes are less than the {needed} that are needed (is the other side another build?)")]
    TooSmall {
        /// Its size.
        len: usize,
        /// What was asked for.
        needed: usize,
    },
}

const fn failed(call: &'static str) -> impl FnOnce(Errno) -> SegmentError {
    move |errno| SegmentError::System { call, errno }
}

/// A memfd of `len` bytes whose size cannot change any more.
fn unmapped(name: &str, len: usize) -> Result<OwnedFd, SegmentError> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).map_err(failed("memfd_create"))?;
    let len = i64::try_from(len.max(1).next_multiple_of(4096)).map_err(|_| SegmentError::Size(i64::MAX))?;
    nix::unistd::ftruncate(&fd, len).map_err(failed("ftruncate"))?;
    seal(&fd, SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW)?;
    Ok(fd)
}

fn seal(fd: &OwnedFd, seals: SealFlag) -> Result<(), SegmentError> {
    fcntl(fd, FcntlArg::F_ADD_SEALS(seals)).map(drop).map_err(failed("F_ADD_SEALS"))
}

/// A mapped, sealed memfd.
#[derive(Debug)]
pub struct Segment {
    fd: OwnedFd,
    mapping: Arc<Mapping>,
}

impl Segment {
    /// Makes a zeroed segment of `len` bytes, rounded up to pages, sealed against any change of size, close-on-exec.
    /// `name` shows in /proc/PID/maps only.
    pub fn create(name: &str, len: usize) -> Result<Self, SegmentError> {
        let fd = unmapped(name, len)?;
        seal(&fd, SealFlag::F_SEAL_SEAL)?;
        Self::join(fd, Access::ReadWrite)
    }

    /// [`Self::create`], and nobody after this process can map it for writing or write to it: for what workers only read.
    pub fn create_for_readers(name: &str, len: usize) -> Result<Self, SegmentError> {
        let segment = Self::join(unmapped(name, len)?, Access::ReadWrite)?;
        seal(&segment.fd, SealFlag::F_SEAL_FUTURE_WRITE | SealFlag::F_SEAL_SEAL)?;
        Ok(segment)
    }

    /// Maps all of an inherited or received descriptor, after checking that its size cannot change.
    pub fn join(fd: OwnedFd, access: Access) -> Result<Self, SegmentError> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS)
            .map_err(|errno| if errno == Errno::EINVAL { SegmentError::NotSealed } else { failed("F_GET_SEALS")(errno) })?;
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW) {
            return Err(SegmentError::NotSealed);
        }
        let size = nix::sys::stat::fstat(&fd).map_err(failed("fstat"))?.st_size;
        let len = usize::try_from(size).ok().filter(|len| *len > 0).ok_or(SegmentError::Size(size))?;
        let mapping = Mapping::new(&fd, 0, len, access == Access::ReadWrite, false).map_err(failed("mmap"))?;
        Ok(Self { fd, mapping: Arc::new(mapping) })
    }

    /// Refuses a segment of fewer than `needed` bytes.
    pub fn at_least(self, needed: usize) -> Result<Self, SegmentError> {
        let len = self.len();
        if len < needed { Err(SegmentError::TooSmall { len, needed }) } else { Ok(self) }
    }

    /// The mapping, for words and arrays in it; it outlives the segment's descriptor.
    pub const fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The descriptor and the mapping, apart.
    pub fn into_parts(self) -> (OwnedFd, Arc<Mapping>) {
        (self.fd, self.mapping)
    }

    /// First byte. What lies there may change at any time.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// Never true: an empty segment cannot be made or joined.
    pub fn is_empty(&self) -> bool {
        self.mapping.is_empty()
    }
}

impl AsFd for Segment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

// SAFETY: the mapping lives as long as the segment, and the seals, checked in join(), keep its pages from going away.
unsafe impl Memory for Segment {
    fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    fn len(&self) -> usize {
        self.mapping.len()
    }

    fn writable(&self) -> bool {
        self.mapping.writable()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_ring_in_a_segment_joined_twice() {
        let ours = Segment::create("test", crate::ring::Layout::<u64>::bytes(64)).unwrap();
        crate::ring::init::<u64>(&ours, 0, 64).unwrap();
        let theirs = Segment::join(ours.as_fd().try_clone_to_owned().unwrap(), Access::ReadWrite).unwrap();
        let mut producer = crate::ring::Producer::<u64>::attach(Arc::new(ours), 0).unwrap();
        let mut consumer = crate::ring::Consumer::<u64>::attach(Arc::new(theirs), 0).unwrap();
        producer.push(42).unwrap();
        assert_eq!(consumer.pop(), Some(42));
    }

    #[test]
    fn req_000_5_descriptors_that_could_shrink_are_refused() {
        let plain = memfd_create("plain", MFdFlags::MFD_CLOEXEC).unwrap();
        assert_eq!(Segment::join(plain, Access::ReadOnly).unwrap_err(), SegmentError::NotSealed);
        let unsealed = memfd_create("unsealed", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        assert_eq!(Segment::join(unsealed, Access::ReadOnly).unwrap_err(), SegmentError::NotSealed);
        let (pipe, _write) = nix::unistd::pipe().unwrap();
        assert_eq!(Segment::join(pipe, Access::ReadOnly).unwrap_err(), SegmentError::NotSealed);
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert!(Segment::join(file.into(), Access::ReadOnly).is_err());
    }

    #[test]
    fn a_segment_cannot_be_truncated_and_readers_cannot_attach_writing_sides() {
        let segment = Segment::create("test", 4096).unwrap();
        crate::ring::init::<u64>(&segment, 0, 8).unwrap();
        assert_eq!(nix::unistd::ftruncate(segment.as_fd(), 0), Err(Errno::EPERM));
        let reader = Segment::join(segment.as_fd().try_clone_to_owned().unwrap(), Access::ReadOnly).unwrap();
        assert_eq!(reader.len(), 4096);
        assert!(crate::ring::Producer::<u64>::attach(Arc::new(reader), 0).is_err());
    }
}
