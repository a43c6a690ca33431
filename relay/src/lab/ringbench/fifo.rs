//! SCHED_FIFO for a measuring thread. Must never be the default: it starves everything else on its CPU.
#![expect(unsafe_code, reason = "sched_setscheduler has no safe face in nix")]

use nix::errno::Errno;

/// The calling thread runs SCHED_FIFO priority 1 from now on.
pub(super) fn enter() -> nix::Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: reads one live sched_param; pid 0 is the calling thread.
    Errno::result(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameters) }).map(drop)
}
