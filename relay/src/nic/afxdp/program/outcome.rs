//! The programs that learn what becomes of redirected packets: loaded, and attached to the kernel's tracepoints while needed.
//!
//! They read one field of a kernel structure, whose place is asked of the kernel's BTF. Must never let the kernel path run
//! where they can't: what it counts would be wrong.

use super::{ProgramError, btf, link};
use aya::Ebpf;
use aya::programs::RawTracePoint;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";
/// Programs and the tracepoints they are for.
const WATCHERS: [(&str, &CStr); 3] =
    [("relay_flushed", c"xdp_devmap_xmit"), ("relay_refused", c"xdp_redirect_err"), ("relay_polled", c"napi_poll")];

/// Where `struct net_device` has its `ifindex`, in bytes, if the kernel says.
pub(super) fn ifindex_offset() -> Option<u32> {
    static OFFSET: OnceLock<Option<u32>> = OnceLock::new();
    *OFFSET.get_or_init(|| btf::member_offset(&std::fs::read(KERNEL_BTF).ok()?, "net_device", "ifindex"))
}

/// Has the kernel verify the programs, and attaches them for a moment: whether that can be done has to be known before a rule
/// relies on it.
pub(super) fn load(ebpf: &mut Ebpf) -> Result<Watch, ProgramError> {
    if ifindex_offset().is_none() {
        return Err(ProgramError::Diagnostics(format!("the kernel does not describe its structures ({KERNEL_BTF})")));
    }
    for (name, _) in WATCHERS {
        watcher(ebpf, name)?.load().map_err(|error| ProgramError::load(name, error))?;
    }
    attach(ebpf)?;
    Ok(Watch::default())
}

fn watcher<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut RawTracePoint, ProgramError> {
    let program = ebpf.program_mut(name).ok_or(ProgramError::Missing { kind: "program", name })?;
    program.try_into().map_err(|_| ProgramError::Missing { kind: "tracepoint program", name })
}

/// The attachments; none: nothing is counted.
#[derive(Debug, Default)]
pub(super) struct Watch(Vec<OwnedFd>);

impl Watch {
    /// Whoever holds one of these keeps its program attached.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd)
    }

    /// Attaches all, or detaches all. All or nothing.
    pub(super) fn set(&mut self, ebpf: &mut Ebpf, on: bool) -> Result<(), ProgramError> {
        if on == self.0.is_empty() {
            self.0 = if on { attach(ebpf)? } else { Vec::new() };
        }
        Ok(())
    }
}

fn attach(ebpf: &mut Ebpf) -> Result<Vec<OwnedFd>, ProgramError> {
    let attach = |(name, tracepoint): (&'static str, &CStr)| {
        let program = watcher(ebpf, name)?.fd().map_err(|error| ProgramError::load(name, error))?;
        let link = link::attach_tracepoint(tracepoint, program.as_fd());
        link.map_err(|errno| ProgramError::Diagnostics(format!("tracepoint {}: {errno}", tracepoint.to_string_lossy())))
    };
    WATCHERS.into_iter().map(attach).collect()
}
