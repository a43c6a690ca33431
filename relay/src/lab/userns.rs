//! Namespaces of an ordinary user: what `relay demo` moves into when it is not root.
//!
//! In a user namespace of its own a process has every capability over the network namespaces it makes, and none over the host:
//! BPF stays forbidden there. Must run while the process has one thread, and leaves nothing: all of it ends with the process.

use super::error::{LabError, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

/// Where `ip netns` keeps its names: a directory of the host's root, so an empty one is put over it.
const NAMES: &str = "/run";

/// Becomes uid 0 of a new user namespace, with a network and a mount namespace of its own.
pub(super) fn enter() -> Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    let forbidden = |errno| {
        LabError::Invalid(format!(
            "user namespaces are not allowed here ({errno}): run it as root, or sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=100 kernel.apparmor_restrict_unprivileged_userns=0"
        ))
    };
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).map_err(forbidden)?;
    write("/proc/self/uid_map", &format!("0 {uid} 1"))?;
    // A group map may be written without privilege only where the group list can no longer be changed (user_namespaces(7)).
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/gid_map", &format!("0 {gid} 1"))?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(LabError::io("mount / private"))?;
    mount(Some("tmpfs"), NAMES, Some("tmpfs"), MsFlags::empty(), none).map_err(LabError::io(format!("mount {NAMES}")))
}

fn write(path: &str, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(LabError::io(path))
}
