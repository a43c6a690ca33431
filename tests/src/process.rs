//! What /proc says of the relay's processes: sockets, BPF objects, privileges, whether they are still there.
//!
//! Must never judge: tests do.

use anyhow::{Context, Result, ensure};
use relay::lab::RelayProcess;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A line `key: value` of /proc/PID/status.
pub fn status_field(pid: u32, key: &str) -> Result<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    found.map(|value| value.trim().to_owned()).with_context(|| format!("no {key} in the status of {pid}"))
}

/// Whether a process is dead: gone, or a zombie that nobody has waited for.
pub fn is_dead(pid: u32) -> bool {
    status_field(pid, "State").is_ok_and(|state| state.starts_with('Z')) || !std::path::Path::new(&format!("/proc/{pid}")).exists()
}

/// Waits until all of them are dead; how long that took, or `None` after `limit`.
pub fn wait_dead(pids: &[u32], limit: Duration) -> Option<Duration> {
    let begin = Instant::now();
    while begin.elapsed() < limit {
        if pids.iter().all(|pid| is_dead(*pid)) {
            return Some(begin.elapsed());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    None
}

/// Inodes of a process's sockets.
pub fn sockets(pid: u32) -> BTreeSet<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let links = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.map(|link| link.to_string_lossy().into_owned()).filter(|link| link.starts_with("socket:")).collect()
}

/// Descriptors of a process, as paths to open, whose name has this in it (memfds have names).
pub fn memory_named(pid: u32, name: &str) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).with_context(|| format!("process {pid}"))?.flatten();
    let named = |path: &PathBuf| std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains(name));
    Ok(entries.map(|entry| entry.path()).filter(named).collect())
}

/// KiB that /proc/PID/status says under this key.
pub fn kib(pid: u32, key: &str) -> Result<u64> {
    let text = status_field(pid, key)?;
    text.trim_end_matches("kB").trim().parse().with_context(|| format!("{key} of {pid}: {text}"))
}

/// Ids of the BPF objects a process holds, as (`prog`, id), (`map`, id), (`link`, id).
pub fn bpf_objects(pid: u32) -> BTreeSet<(String, u64)> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let texts = entries.filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    texts.filter_map(|text| object(&text)).collect()
}

/// A link's fdinfo names its program too, so the link comes first.
fn object(fdinfo: &str) -> Option<(String, u64)> {
    ["link", "map", "prog"].into_iter().find_map(|kind| {
        let id = fdinfo.lines().find_map(|line| line.strip_prefix(&format!("{kind}_id:")))?;
        Some((kind.to_owned(), id.trim().parse().ok()?))
    })
}

/// Waits until the kernel has none of these any more: it frees them a moment after their last user. `false`: nobody could say,
/// without bpftool.
pub fn wait_unloaded(objects: &BTreeSet<(String, u64)>) -> Result<bool> {
    let begin = Instant::now();
    loop {
        match still_loaded(objects) {
            None => return Ok(false),
            Some(left) if left.is_empty() => return Ok(true),
            Some(left) => ensure!(begin.elapsed() < Duration::from_secs(5), "still loaded: {left:?}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The objects of these that the kernel still has; `None` without bpftool.
fn still_loaded(objects: &BTreeSet<(String, u64)>) -> Option<BTreeSet<(String, u64)>> {
    let exists = |kind: &str, id: u64| {
        let output = std::process::Command::new("bpftool").args(["-j", kind, "show", "id", &id.to_string()]).output().ok()?;
        Some(output.status.success())
    };
    let mut left = BTreeSet::new();
    for (kind, id) in objects {
        if exists(kind, *id)? {
            left.insert((kind.clone(), *id));
        }
    }
    Some(left)
}

/// Names in /dev/shm.
pub fn shared_memory() -> BTreeSet<String> {
    let entries = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|name| name.contains("relay")).collect()
}

/// Waits until no worker is one of `old` and all run; the new ones.
pub fn wait_replaced(relay: &RelayProcess, old: &[u32], limit: Duration) -> Result<Vec<u32>> {
    let replaced = |status: &serde_json::Value| {
        let workers = status["workers"].as_array().map(Vec::as_slice).unwrap_or_default();
        workers.iter().all(|worker| worker["state"] == "run" && !old.iter().any(|pid| worker["pid"] == *pid))
    };
    relay.wait_status("the worker was not replaced", limit, replaced)?;
    Ok(relay.worker_pids()?)
}
