//! Capabilities: which ones the relay needs, which it has, and how it gives them up.
//!
//! The needed sets are DECISIONS §6. Must never raise a capability: every function here only looks or drops. All calls act on
//! the calling thread, so they belong before the first thread is started.

use super::kernel;
use std::fmt;
use std::io;

/// A capability the relay knows by name (numbers of linux/capability.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Capability {
    /// Signal a worker of another uid.
    Kill = 5,
    /// Drop to the worker's group.
    SetGid = 6,
    /// Drop to the worker's user.
    SetUid = 7,
    /// Empty the bounding set.
    SetPcap = 8,
    /// Attach programs, join on any interface.
    NetAdmin = 12,
    /// AF_PACKET and AF_XDP sockets.
    NetRaw = 13,
    /// A UMEM above RLIMIT_MEMLOCK.
    IpcLock = 14,
    /// Variable packet offsets in the verifier.
    Perfmon = 38,
    /// Load programs and create maps.
    Bpf = 39,
}

/// Known capabilities with the kernel's name for them.
const NAMES: [(Capability, &str); 9] = [
    (Capability::Kill, "CAP_KILL"),
    (Capability::SetGid, "CAP_SETGID"),
    (Capability::SetUid, "CAP_SETUID"),
    (Capability::SetPcap, "CAP_SETPCAP"),
    (Capability::NetAdmin, "CAP_NET_ADMIN"),
    (Capability::NetRaw, "CAP_NET_RAW"),
    (Capability::IpcLock, "CAP_IPC_LOCK"),
    (Capability::Perfmon, "CAP_PERFMON"),
    (Capability::Bpf, "CAP_BPF"),
];

impl Capability {
    /// The kernel's name.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(capability, _)| *capability == self).map_or("CAP_?", |(_, name)| name)
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of capabilities; bit N is capability N, known by name or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Set(u64);

impl Set {
    /// No capability: what a worker has.
    pub const EMPTY: Self = Self(0);
    /// What the supervisor keeps for life. CAP_IPC_LOCK: when every AF_XDP interface is deleted and made again, no socket is left
    /// that the UMEM is registered with, and it is registered anew.
    pub const SUPERVISOR: Self = Self::of(&[
        Capability::Bpf,
        Capability::NetAdmin,
        Capability::NetRaw,
        Capability::SetUid,
        Capability::SetGid,
        Capability::Kill,
        Capability::IpcLock,
    ]);
    /// What set-up needs besides.
    pub const SET_UP: Self = Self::of(&[Capability::Perfmon]);

    /// The set of these.
    pub const fn of(capabilities: &[Capability]) -> Self {
        let mut bits = 0;
        let mut rest = capabilities;
        while let [first, tail @ ..] = rest {
            bits |= 1 << *first as u8;
            rest = tail;
        }
        Self(bits)
    }

    /// In either.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// In `self` and not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether nothing is in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether it is in.
    pub const fn contains(self, capability: Capability) -> bool {
        self.0 & (1 << capability as u8) != 0
    }

    /// The kernel's names, in numerical order; one unknown to the relay is `cap_N`.
    pub fn names(self) -> Vec<String> {
        (0..64).filter(|bit| self.0 & (1 << bit) != 0).map(name_of).collect()
    }
}

fn name_of(bit: u8) -> String {
    NAMES.iter().find(|(capability, _)| *capability as u8 == bit).map_or_else(|| format!("cap_{bit}"), |(_, name)| (*name).to_owned())
}

/// The effective set of the calling thread.
pub fn effective() -> io::Result<Set> {
    let [low, high] = kernel::capget()?;
    Ok(Set(u64::from(low.effective) | u64::from(high.effective) << 32))
}

/// What of `needed` is not effective.
pub fn missing(needed: Set) -> io::Result<Set> {
    effective().map(|have| needed.without(have))
}

/// Gives up every capability outside `kept`: effective and permitted become their intersection with it, inheritable
/// becomes empty. There is no way back.
pub fn retain(kept: Set) -> io::Result<()> {
    let halves = [kept.0 as u32, (kept.0 >> 32) as u32];
    let mut data = kernel::capget()?;
    for (half, kept) in data.iter_mut().zip(halves) {
        half.effective &= kept;
        half.permitted &= kept;
        half.inheritable = 0;
    }
    kernel::capset(&data)
}

/// Empties the bounding set, so that no program started later can gain a capability. What the thread has, it keeps.
/// `PermissionDenied` without CAP_SETPCAP: call it before [`retain`].
pub fn empty_bounding() -> io::Result<()> {
    for bit in 0..64 {
        match kernel::prctl(libc::PR_CAPBSET_READ, bit, 0) {
            Ok(0) => {}
            Ok(_) => drop(kernel::prctl(libc::PR_CAPBSET_DROP, bit, 0)?),
            // Beyond the last capability of this kernel.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Empties the ambient set, so that nothing is inherited across exec.
pub fn clear_ambient() -> io::Result<()> {
    kernel::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a thread of its own, since capabilities are a thread's.
    fn on_thread(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn supervisor_set_is_the_one_of_decisions_6() {
        let names = ["CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_BPF"];
        assert_eq!(Set::SUPERVISOR.names(), names);
        assert_eq!(Set::SET_UP.names(), ["CAP_PERFMON"]);
        assert_eq!(Set(1 << 21).names(), ["cap_21"]);
        assert!(Set::EMPTY.names().is_empty());
    }

    #[test]
    fn retain_keeps_what_is_named_and_nothing_else() {
        on_thread(|| {
            let before = effective().unwrap();
            if !before.contains(Capability::NetRaw) {
                println!("SKIPPED: needs CAP_NET_RAW");
                return;
            }
            retain(Set::of(&[Capability::NetRaw])).unwrap();
            assert_eq!(effective().unwrap().names(), ["CAP_NET_RAW"]);
            assert_eq!(missing(Set::SUPERVISOR).unwrap(), Set::SUPERVISOR.without(Set::of(&[Capability::NetRaw])));
            retain(Set::SUPERVISOR).unwrap();
            assert_eq!(effective().unwrap().names(), ["CAP_NET_RAW"], "a dropped capability never comes back");
            retain(Set::EMPTY).unwrap();
            assert!(effective().unwrap().is_empty());
        });
    }

    #[test]
    fn bounding_set_is_emptied_and_the_held_ones_stay() {
        on_thread(|| {
            let before = effective().unwrap();
            if !before.contains(Capability::SetPcap) {
                println!("SKIPPED: needs CAP_SETPCAP");
                return;
            }
            empty_bounding().unwrap();
            clear_ambient().unwrap();
            assert_eq!(effective().unwrap(), before);
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(status.contains("CapBnd:\t0000000000000000"), "{status}");
            assert!(status.contains("CapAmb:\t0000000000000000"), "{status}");
        });
    }

    #[test]
    fn bounding_set_without_setpcap_is_an_error_not_a_silence() {
        on_thread(|| {
            retain(Set::EMPTY).unwrap();
            assert_eq!(empty_bounding().unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        });
    }
}
