//! How a worker finds what it inherited: environment variables that carry descriptor numbers (INTERFACE, "Environment of a worker").
//!
//! The descriptor *is* the permission. A `/path` instead of `fd:N` is for outside readers: the creator listens there and judges
//! the caller by its credentials ([`super::share`]). Must never panic on what the environment says, nor name a variable wrongly.
#![expect(unsafe_code, reason = "an inherited descriptor is a number until it is owned")]

use super::channel::{ChannelError, Child, Claim, Reader};
use bytemuck::Pod;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

/// Number of the worker.
pub const WORKER_ID: &str = "RELAY_WORKER_ID";
/// Channel from the supervisor.
pub const CONTROL: &str = "RELAY_CONTROL_CHANNEL";
/// Channel to the supervisor.
pub const STATUS: &str = "RELAY_STATUS_CHANNEL";
/// `1`: an outside reader asks to be let in as a child of the creator; counts only if it is one.
pub const DISABLE_PERMISSIONS: &str = "RELAY_DISABLE_IPC_PERMISSIONS";

/// Where a channel is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// An inherited descriptor.
    Fd(RawFd),
    /// A Unix socket that hands the descriptor out.
    Path(PathBuf),
}

/// Reads `fd:N` or an absolute path.
pub fn parse_place(variable: &'static str, value: Option<OsString>) -> Result<Place, ChannelError> {
    let wrong = |problem| ChannelError::Environment { variable, problem };
    let value = value.ok_or(wrong("not set: workers are started by relay run, which sets it to fd:N"))?;
    let value = value.into_string().map_err(|_| wrong("not UTF-8: expected fd:N or an absolute path"))?;
    if value.starts_with('/') {
        return Ok(Place::Path(value.into()));
    }
    let number = value.strip_prefix("fd:").ok_or(wrong("expected fd:N or an absolute path"))?;
    let digits_only = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let number = number.parse().ok().filter(|_| digits_only).ok_or(wrong("no descriptor number behind fd:"))?;
    if number <= 2 { Err(wrong("descriptors 0 to 2 are stdin, stdout and stderr")) } else { Ok(Place::Fd(number)) }
}

/// Takes ownership of an inherited descriptor, once it is known to be open; sets close-on-exec.
pub fn take_fd(variable: &'static str, number: RawFd) -> Result<OwnedFd, ChannelError> {
    let wrong = |problem| ChannelError::Environment { variable, problem };
    // SAFETY: only borrowed to ask whether it is open; a closed number gives EBADF.
    let probe = unsafe { BorrowedFd::borrow_raw(number) };
    if number < 0 || fcntl(probe, FcntlArg::F_GETFD).is_err() {
        return Err(wrong("the descriptor is not open: was it passed on without close-on-exec?"));
    }
    // SAFETY: open as just checked, and named by the environment as ours to take, once, before any other thread starts.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|errno| ChannelError::System("F_SETFD", errno))?;
    Ok(fd)
}

/// What a worker's environment says.
#[derive(Debug)]
pub struct Environment {
    /// Number of the worker.
    pub worker_id: u32,
    /// Its control channel.
    pub control: OwnedFd,
    /// Its status channel.
    pub status: OwnedFd,
}

impl Environment {
    /// Reads the variables through `lookup` (`std::env::var_os`) and takes the descriptors.
    pub fn read(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Self, ChannelError> {
        let wrong = |problem| ChannelError::Environment { variable: WORKER_ID, problem };
        let id = lookup(WORKER_ID).ok_or(wrong("not set: workers are started by relay run"))?;
        let worker_id = id.to_str().and_then(|id| id.parse().ok()).ok_or(wrong("not a worker number"))?;
        let (control, status) = (parse_place(CONTROL, lookup(CONTROL))?, parse_place(STATUS, lookup(STATUS))?);
        let (Place::Fd(control), Place::Fd(status)) = (&control, &status) else {
            let variable = if matches!(control, Place::Path(_)) { CONTROL } else { STATUS };
            return Err(ChannelError::Environment { variable, problem: "a worker takes fd:N only: a path is for outside readers" });
        };
        if control == status {
            return Err(ChannelError::Environment { variable: STATUS, problem: "is the same descriptor as RELAY_CONTROL_CHANNEL" });
        }
        Ok(Self { worker_id, control: take_fd(CONTROL, *control)?, status: take_fd(STATUS, *status)? })
    }

    /// Opens both channels; errors name the variable through which the channel came.
    pub fn attach<C: Pod, S: Pod>(self) -> Result<Child<C, S>, ChannelError> {
        Child::attach(self.control, self.status)
    }

    /// The same where a predecessor may still write.
    pub fn open<C: Pod, S: Pod>(self) -> Result<(Reader<C>, Claim<S>), ChannelError> {
        Child::open(self.control, self.status)
    }
}

/// The variables for a child that inherits these descriptors under the same numbers.
pub fn variables(worker_id: u32, control: impl AsFd, status: impl AsFd) -> [(&'static str, String); 3] {
    let fd = |fd: BorrowedFd<'_>| format!("fd:{}", fd.as_raw_fd());
    [(WORKER_ID, worker_id.to_string()), (CONTROL, fd(control.as_fd())), (STATUS, fd(status.as_fd()))]
}

/// Whether an outside reader asks to be let in as a child of the creator ([`super::share::fetch`]); the creator decides.
pub fn asks_as_child(lookup: impl Fn(&str) -> Option<OsString>) -> bool {
    lookup(DISABLE_PERMISSIONS).is_some_and(|value| value == "1")
}
