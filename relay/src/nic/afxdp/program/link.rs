//! A program's hold on an interface: a `bpf_link`, made by one `bpf(2)` call.
//!
//! aya's own `attach` falls back to netlink where the kernel refuses a link, and such a program outlives us; its `FdLink`
//! keeps the descriptor to itself, which a hand-over needs. Hence these calls. Must never attach by any other means.
#![expect(unsafe_code, reason = "the link commands of bpf(2) have no safe face, and a new descriptor has to be owned")]

use super::{InterfaceXdp, ProgramError};
use aya::programs::Xdp;
use nix::errno::Errno;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::{fmt, fs};

/// `BPF_RAW_TRACEPOINT_OPEN`, `BPF_LINK_UPDATE`, `BPF_LINK_DETACH` (linux/bpf.h).
const RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const LINK_UPDATE: libc::c_int = 29;
const LINK_DETACH: libc::c_int = 34;
/// `BPF_LINK_CREATE`, `BPF_XDP`, `XDP_FLAGS_SKB_MODE`, `XDP_FLAGS_DRV_MODE` (linux/bpf.h, linux/if_link.h).
const LINK_CREATE: libc::c_int = 28;
const ATTACH_XDP: u32 = 37;
const FLAG_GENERIC: u32 = 1 << 1;
const FLAG_NATIVE: u32 = 1 << 2;

/// Where the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// In the driver.
    Native,
    /// In the network stack, for any interface: slower, and only when asked for.
    Generic,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// What the kernel reports after attaching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The interface.
    pub ifindex: u32,
    /// The mode, read back.
    pub mode: Mode,
    /// The program's id, as `bpftool prog` shows it.
    pub program_id: u32,
    /// The link's id, as `bpftool link` shows it; `None` where /proc isn't readable.
    pub link_id: Option<u32>,
}

/// An attached program. Dropping it detaches, unless the descriptor was duplicated.
#[derive(Debug)]
pub(super) struct Link {
    fd: OwnedFd,
    mode: Mode,
    program_id: u32,
}

/// `union bpf_attr`, `struct link_create` up to `flags`.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// `union bpf_attr`, `struct link_update` up to `flags`.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
}

/// `union bpf_attr`, `struct link_detach`.
#[repr(C)]
struct LinkDetach {
    link_fd: u32,
}

impl Link {
    /// Puts a program in the place of the one that a link has, in one step: every packet meets one of the two.
    pub(super) fn adopt(fd: OwnedFd, program: &Xdp, mode: Mode) -> Result<Self, Errno> {
        let new = program.fd().map_err(|_| Errno::EBADF)?.as_fd();
        let program_id = program.info().map_err(|_| Errno::EBADF)?.id();
        let attr = LinkUpdate { link_fd: fd.as_raw_fd() as u32, new_prog_fd: new.as_raw_fd() as u32, flags: 0 };
        link_call(LINK_UPDATE, &attr)?;
        Ok(Self { fd, mode, program_id })
    }

    /// Detaches at once, whoever else holds the link (the keeper does).
    pub(super) fn detach(self) -> Result<(), Errno> {
        link_call(LINK_DETACH, &LinkDetach { link_fd: self.fd.as_raw_fd() as u32 }).map(drop)
    }

    pub(super) fn create(program: &Xdp, ifindex: u32, mode: Mode) -> Result<Self, Errno> {
        let fd = program.fd().map_err(|_| Errno::EBADF)?.as_fd();
        let program_id = program.info().map_err(|_| Errno::EBADF)?.id();
        let flags = match mode {
            Mode::Native => FLAG_NATIVE,
            Mode::Generic => FLAG_GENERIC,
        };
        let attr = LinkCreate { prog_fd: fd.as_raw_fd() as u32, target_ifindex: ifindex, attach_type: ATTACH_XDP, flags };
        Ok(Self { fd: link_create(&attr)?, mode, program_id })
    }

    /// Compares what the interface reports with what was asked for.
    pub(super) fn confirm(&self, interface: &InterfaceXdp) -> Result<Attachment, ProgramError> {
        if interface.programs != [(self.mode, self.program_id)] {
            return Err(ProgramError::NotAsAsked {
                interface: interface.name.clone(),
                wanted: self.mode,
                program: self.program_id,
                found: format!("{:?}", interface.programs),
            });
        }
        Ok(Attachment { ifindex: interface.ifindex, mode: self.mode, program_id: self.program_id, link_id: self.id() })
    }

    fn id(&self) -> Option<u32> {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd())).ok()?;
        text.lines().find_map(|line| line.strip_prefix("link_id:")).and_then(|id| id.trim().parse().ok())
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// `union bpf_attr`, `struct raw_tracepoint` up to `prog_fd`.
#[repr(C)]
struct RawTracepoint {
    name: u64,
    prog_fd: u32,
    zero: u32,
}

/// Attaches a program to a tracepoint for as long as anybody holds the descriptor.
pub(super) fn attach_tracepoint(name: &CStr, program: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    // The name lives through the call, which reads it through this address.
    let attr = RawTracepoint { name: name.as_ptr() as u64, prog_fd: program.as_raw_fd() as u32, zero: 0 };
    let fd = link_call(RAW_TRACEPOINT_OPEN, &attr)?;
    // SAFETY: the call succeeded, so this is a new descriptor and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `T` is one of the structures of this file.
fn link_call<T>(command: libc::c_int, attr: &T) -> Result<libc::c_long, Errno> {
    // SAFETY: attr points to size_of::<T>() readable bytes for the length of the call; the kernel writes none.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    Errno::result(result)
}

/// The kernel makes every BPF descriptor close-on-exec.
fn link_create(attr: &LinkCreate) -> Result<OwnedFd, Errno> {
    let fd = link_call(LINK_CREATE, attr)?;
    // SAFETY: the call succeeded, so this is a new descriptor and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
