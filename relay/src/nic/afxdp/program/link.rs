//! A program's hold on an interface: a `bpf_link`, made by one `bpf(2)` call.
//!
//! aya's own `attach` falls back to netlink where the kernel refuses a link, and such a program outlives us; its `FdLink`
//! keeps the descriptor to itself, which a hand-over needs. Hence this call. Must never attach by any other means.
#![expect(unsafe_code, reason = "bpf(BPF_LINK_CREATE) has no safe face, and a new descriptor has to be owned")]

use super::{InterfaceXdp, ProgramError};
use aya::programs::Xdp;
use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::{fmt, fs};

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

impl Link {
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

/// The kernel makes every BPF descriptor close-on-exec.
fn link_create(attr: &LinkCreate) -> Result<OwnedFd, Errno> {
    // SAFETY: attr points to size_of::<LinkCreate>() readable bytes for the length of the call; the kernel writes none.
    let result = unsafe { libc::syscall(libc::SYS_bpf, LINK_CREATE, std::ptr::from_ref(attr), size_of::<LinkCreate>()) };
    let fd = Errno::result(result)?;
    // SAFETY: the call succeeded, so this is a new descriptor and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
