//! `relay run` as a child process: start in a namespace, wait until it forwards, ask it, stop it, kill it.
//!
//! Knows the relay only by its command line and its JSON (INTERFACE.md). A process that is dropped is killed, with its workers.

use super::error::{LabError, Result};
use super::netns::Namespace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// How often a waiting helper looks.
const POLL: Duration = Duration::from_millis(20);
/// Longest wait of [`RelayProcess::wait_ready`].
const READY: Duration = Duration::from_secs(10);
/// A relay without workers (kernel path alone) is ready when it says so, or, told to say nothing, after so long.
const SETTLED: Duration = Duration::from_secs(3);
const FORWARDS: &str = "relay forwards";
/// Longest wait for the last words of a relay that has ended.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// A running `relay run` and its socket.
#[derive(Debug)]
pub struct RelayProcess {
    child: Child,
    program: PathBuf,
    directory: PathBuf,
    log: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl RelayProcess {
    /// Starts `program run ARGS --socket …` inside `namespace`. Does not wait: see [`RelayProcess::wait_ready`].
    pub fn start(namespace: &Namespace, program: &Path, args: &[&str]) -> Result<Self> {
        Self::start_with_stderr(namespace, program, args, Stdio::piped())
    }

    /// The same with another standard error, which is in [`RelayProcess::log`] only if it is [`Stdio::piped`].
    pub fn start_with_stderr(namespace: &Namespace, program: &Path, args: &[&str], stderr: Stdio) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("relay-lab-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir_all(&directory).map_err(LabError::io(directory.display().to_string()))?;
        let mut command = namespace.command(program)?;
        command.arg("run").args(args).arg("--socket").arg(directory.join("relay.sock"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().map_err(LabError::io(format!("starting {}", program.display())))?;
        let log = Arc::new(Mutex::new(String::new()));
        let readers = [child.stdout.take().map(|out| collect(out, &log)), child.stderr.take().map(|err| collect(err, &log))];
        Ok(Self { child, program: program.into(), directory, log, readers: readers.into_iter().flatten().collect() })
    }

    /// Starts `run ARGS --takeover` at the same socket; from now on that is the relay. Returns how the one before ended, which must
    /// be within 10 s.
    pub fn take_over(&mut self, namespace: &Namespace, args: &[&str]) -> Result<ExitStatus> {
        self.start_again(namespace, &[args, &["--takeover"]].concat())
    }

    /// Starts `run ARGS` at the same socket; from now on that is the relay. Returns as [`RelayProcess::take_over`].
    pub fn start_again(&mut self, namespace: &Namespace, args: &[&str]) -> Result<ExitStatus> {
        let mut command = namespace.command(&self.program)?;
        command.arg("run").args(args).arg("--socket").arg(self.socket());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(LabError::io(format!("starting {}", self.program.display())))?;
        let before = std::mem::replace(&mut self.child, child);
        let mut before =
            Self { child: before, program: PathBuf::new(), directory: PathBuf::new(), log: Arc::clone(&self.log), readers: vec![] };
        let streams =
            [self.child.stdout.take().map(|out| collect(out, &self.log)), self.child.stderr.take().map(|err| collect(err, &self.log))];
        self.readers = streams.into_iter().flatten().collect();
        before.wait_exit(Duration::from_secs(10))
    }

    /// Path of the control socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("relay.sock")
    }

    /// Process id of the supervisor.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it wrote so far, both streams.
    pub fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until every worker is in state `run`; its last words as the error otherwise.
    pub fn wait_ready(&mut self) -> Result<Value> {
        let begin = Instant::now();
        while begin.elapsed() < READY {
            if let Some(status) = self.exited()? {
                return Err(LabError::Invalid(format!("the relay ended with {status} before it was ready: {}", self.log().trim())));
            }
            if let Ok(status) = self.status()
                && is_ready(&status, self.log().contains(FORWARDS) || begin.elapsed() > SETTLED)
            {
                return Ok(status);
            }
            std::thread::sleep(POLL);
        }
        Err(LabError::Timeout { what: "the relay was not ready".into(), ms: READY.as_millis(), detail: format!(": {}", self.log().trim()) })
    }

    /// Waits until `condition` holds of `relay status`.
    pub fn wait_status(&self, what: &str, limit: Duration, condition: impl Fn(&Value) -> bool) -> Result<Value> {
        let begin = Instant::now();
        let mut last = Value::Null;
        while begin.elapsed() < limit {
            if let Ok(status) = self.status() {
                if condition(&status) {
                    return Ok(status);
                }
                last = status;
            }
            std::thread::sleep(POLL);
        }
        Err(LabError::Timeout {
            what: what.into(),
            ms: limit.as_millis(),
            detail: format!("; last status {last}; log: {}", self.log().trim()),
        })
    }

    /// `relay status --json`.
    pub fn status(&self) -> Result<Value> {
        self.query(&["status"])
    }

    /// `relay stats --json`.
    pub fn stats(&self) -> Result<Value> {
        self.query(&["stats"])
    }

    /// `relay rule list --json`.
    pub fn rules(&self) -> Result<Value> {
        self.query(&["rule", "list"])
    }

    /// A command of the client with `--json`, parsed; its standard error as the error.
    pub fn query(&self, args: &[&str]) -> Result<Value> {
        let output = self.client(args, true)?;
        if !output.status.success() {
            return Err(tool(args, &output.stderr));
        }
        serde_json::from_slice(&output.stdout).map_err(|e| LabError::Invalid(format!("relay {}: no JSON: {e}", args.join(" "))))
    }

    /// A command of the client; must exit 0.
    pub fn command(&self, args: &[&str]) -> Result<String> {
        let output = self.client(args, false)?;
        if output.status.success() { Ok(String::from_utf8_lossy(&output.stdout).into_owned()) } else { Err(tool(args, &output.stderr)) }
    }

    /// A command of the client, whatever it answers. The socket is a path, so no namespace matters.
    pub fn client(&self, args: &[&str], json: bool) -> Result<std::process::Output> {
        let mut command = Command::new(&self.program);
        command.args(args).arg("--socket").arg(self.socket()).stdin(Stdio::null());
        if json {
            command.arg("--json");
        }
        command.output().map_err(LabError::io(format!("relay {}", args.join(" "))))
    }

    /// Process ids of the workers, as `relay status` says.
    pub fn worker_pids(&self) -> Result<Vec<u32>> {
        let status = self.status()?;
        let workers = status["workers"].as_array().cloned().unwrap_or_default();
        Ok(workers.iter().filter_map(|w| w["pid"].as_u64()).filter_map(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0).collect())
    }

    /// Sends a signal to the supervisor.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        signal_pid(self.pid(), signal)
    }

    /// SIGTERM, then waits for the end.
    pub fn sigterm(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait_exit(limit)
    }

    /// SIGKILL, then waits for the end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL)?;
        self.wait_exit(Duration::from_secs(5))
    }

    /// Waits for the end.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let begin = Instant::now();
        while begin.elapsed() < limit {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Err(LabError::Timeout { what: "the relay did not end".into(), ms: limit.as_millis(), detail: format!(": {}", self.log().trim()) })
    }

    /// The exit status, if it has ended; its last words are in the log then.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        let status = self.child.try_wait().map_err(LabError::io("wait for the relay"))?;
        if status.is_some() {
            self.drain_log();
        }
        Ok(status)
    }

    /// Lets the readers finish. Bounded: an orphan of the relay may hold the streams open for as long as it lives.
    fn drain_log(&self) {
        let begin = Instant::now();
        while begin.elapsed() < LAST_WORDS && !self.readers.iter().all(JoinHandle::is_finished) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Sends a signal to any process that a helper names.
pub fn signal_pid(pid: u32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid.cast_signed()), signal).map_err(LabError::io(format!("{signal} to {pid}")))
}

impl Drop for RelayProcess {
    fn drop(&mut self) {
        let workers = if matches!(self.exited(), Ok(None)) { descendants(self.pid()) } else { Vec::new() };
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in workers {
            let _ = signal_pid(pid, Signal::SIGKILL);
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Children of a process, read from /proc.
fn descendants(pid: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn tool(args: &[&str], stderr: &[u8]) -> LabError {
    LabError::Tool { command: format!("relay {}", args.join(" ")), stderr: String::from_utf8_lossy(stderr).trim().into() }
}

fn is_ready(status: &Value, said_so: bool) -> bool {
    let workers = status["workers"].as_array().map(Vec::as_slice).unwrap_or_default();
    workers.iter().all(|worker| worker["state"] == "run") && (!workers.is_empty() || said_so)
}

/// Copies a stream into the log, line by line; on to our stderr as well where RELAY_LAB_VERBOSE is set.
fn collect(stream: impl Read + Send + 'static, log: &Arc<Mutex<String>>) -> JoinHandle<()> {
    let log = Arc::clone(log);
    let aloud = std::env::var_os("RELAY_LAB_VERBOSE").is_some();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&line);
            if aloud {
                eprint!("relay: {text}");
            }
            log.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
            line.clear();
        }
    })
}
