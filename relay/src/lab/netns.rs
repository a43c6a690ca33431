//! Named network namespaces that never outlive their maker.
//!
//! Names are `relay-lab-<pid>-<n>-<label>`. Deleted on drop and on panic; after any other end of the process (SIGINT, SIGKILL) by a
//! janitor process that sees the end of a pipe; and what even that missed is swept at the next start. Code enters a namespace by
//! setns(CLONE_NEWNET) of one thread: must never remount /sys (`ip netns exec` does, and hides bpffs) and never touch a namespace
//! of another name.
#![expect(unsafe_code, reason = "setns between fork and exec")]

use super::error::{LabError, Result};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

const PREFIX: &str = "relay-lab-";
const DIRECTORY: &str = "/run/netns";
const IPROUTE_HINT: &str = "install iproute2 (apt-get install iproute2)";

static NEXT: AtomicU32 = AtomicU32::new(0);
static JANITOR: OnceLock<Option<Child>> = OnceLock::new();

/// Waits for the end of our pipe, then ends what still runs in our namespaces, deletes them and the relays' socket directories.
/// `$1`: our prefix, `$2`: where the directories are.
const JANITOR_SCRIPT: &str = r#"
cat >/dev/null
for path in /run/netns/"$1"*; do
  [ -e "$path" ] || continue
  name=${path##*/}
  pids=$(ip netns pids "$name" 2>/dev/null) && [ -n "$pids" ] && kill -KILL $pids
  ip netns del "$name"
done
rm -rf "$2/$1"*"#;

/// One network namespace; deleted when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    /// Makes a namespace with `lo` up.
    pub fn create(label: &str) -> Result<Self> {
        prepare()?;
        let name = format!("{PREFIX}{}-{}-{label}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name])?;
        let path = Path::new(DIRECTORY).join(&name);
        let file = File::open(&path).map_err(|source| {
            delete(&name);
            LabError::io(path.display().to_string())(source)
        })?;
        let namespace = Self { name, file };
        namespace.ip_batch("link set lo up\n")?;
        Ok(namespace)
    }

    /// Its name under /run/netns.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Moves the calling thread here for good: for threads made for it.
    pub fn enter(&self) -> Result<()> {
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(LabError::io(format!("setns {}", self.name)))
    }

    /// Runs `work` in a thread inside. A panic goes on in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| self.enter().map(|()| work()));
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that will run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let file: OwnedFd = self.file.as_fd().try_clone_to_owned().map_err(LabError::io("dup of a namespace"))?;
        let mut command = Command::new(program);
        // SAFETY: between fork and exec this makes one system call on a descriptor the closure owns; it allocates and locks nothing.
        unsafe { command.pre_exec(move || setns(&file, CloneFlags::CLONE_NEWNET).map_err(Into::into)) };
        Ok(command)
    }

    /// Runs a command inside to its end; its standard output, or its standard error as the error.
    pub fn output(&self, program: &'static str, args: &[&str]) -> Result<String> {
        finish(self.command(program)?.args(args), program, "install it")
    }

    /// Runs lines of `ip` commands inside, in one process.
    pub fn ip_batch(&self, lines: &str) -> Result<()> {
        let mut command = self.command("ip")?;
        command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| spawn_error(e, "ip", IPROUTE_HINT))?;
        let written = child.stdin.take().map(|mut stdin| stdin.write_all(lines.as_bytes()));
        let output = child.wait_with_output().map_err(LabError::io("waiting for ip"))?;
        match (output.status.success(), written) {
            (true, Some(Ok(()))) => Ok(()),
            _ => Err(LabError::Tool {
                command: format!("ip -batch (in {})", self.name),
                stderr: String::from_utf8_lossy(&output.stderr).trim().into(),
            }),
        }
    }

    /// Writes a sysctl of this namespace; `key` with slashes, below /proc/sys/net.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{key}");
        self.run(|| std::fs::write(&path, value))?.map_err(LabError::io(path.clone()))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        delete(&self.name);
    }
}

/// Privilege, leftovers, janitor; once per process.
fn prepare() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    let janitor = JANITOR.get_or_init(|| {
        sweep_stale();
        start_janitor().ok()
    });
    match janitor {
        Some(_) => Ok(()),
        None => Err(LabError::Missing { tool: "sh", remedy: "a POSIX shell is needed" }),
    }
}

/// The janitor holds the other end of a pipe of ours; it is in a process group of its own, so that ^C does not reach it.
fn start_janitor() -> std::io::Result<Child> {
    let prefix = format!("{PREFIX}{}-", std::process::id());
    Command::new("sh")
        .args(["-c", JANITOR_SCRIPT, "relay-lab-janitor", &prefix])
        .arg(std::env::temp_dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

/// Deletes namespaces of makers that no longer live.
fn sweep_stale() {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if maker(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            delete(&name);
        }
    }
}

/// The pid in a name of ours.
fn maker(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

/// Ends what still runs inside (an orphan would keep the namespace alive without its name), then deletes.
/// Nothing can be done about a failure here; the sweep of the next start tries again.
fn delete(name: &str) {
    let inside = ip(&["netns", "pids", name]).unwrap_or_default();
    for pid in inside.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(|pid| *pid != std::process::id()) {
        let _ = super::process::signal_pid(pid, nix::sys::signal::Signal::SIGKILL);
    }
    let _ = ip(&["netns", "del", name]);
}

fn ip(args: &[&str]) -> Result<String> {
    finish(Command::new("ip").args(args), "ip", IPROUTE_HINT)
}

fn finish(command: &mut Command, tool: &'static str, remedy: &'static str) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().map_err(|e| spawn_error(e, tool, remedy))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(LabError::Tool { command: format!("{command:?}"), stderr: String::from_utf8_lossy(&output.stderr).trim().into() })
}

fn spawn_error(error: std::io::Error, tool: &'static str, remedy: &'static str) -> LabError {
    match error.kind() {
        std::io::ErrorKind::NotFound => LabError::Missing { tool, remedy },
        _ => LabError::io(tool)(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ours_have_a_maker() {
        assert_eq!(maker("relay-lab-12-0-src"), Some(12));
        for other in ["relay-lab-", "relay-lab-x-0", "relay-12-0-src", "lab-12-0"] {
            assert_eq!(maker(other), None);
        }
    }

    #[test]
    fn a_namespace_ends_with_its_guard() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: namespaces need root");
            return;
        }
        let namespace = Namespace::create("guard").unwrap();
        let path = Path::new(DIRECTORY).join(namespace.name());
        assert!(path.exists());
        let outside = nix::net::if_::if_nameindex().unwrap().iter().count();
        let inside = namespace.run(|| nix::net::if_::if_nameindex().unwrap().iter().count()).unwrap();
        assert_eq!(inside, 1, "only lo inside, {outside} outside");
        let links = namespace.output("ip", &["-o", "link"]).unwrap();
        assert_eq!(links.lines().count(), 1, "{links}");
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _guard = namespace;
            panic!("on purpose");
        }));
        assert!(panicked.is_err());
        assert!(!path.exists());
    }
}
