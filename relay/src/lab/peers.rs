//! Other people's relays as rows of the benchmark, where they are installed: smcroute (kernel multicast routing) and socat.
//!
//! Each is started as its manual says, for the one flow of the benches. Must never be needed: who has not installed them measures
//! without them.

use super::arms::{GROUP, REWRITTEN, TTL};
use super::clock;
use super::error::{LabError, Result};
use super::netns::Namespace;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a program may take until it forwards.
const READY: Duration = Duration::from_secs(5);

/// A program of somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `socat`: one datagram a call, rewritten by being sent anew.
    Socat,
    /// `smcrouted`: the kernel's multicast routing, which changes TTL and MACs alone.
    Smcroute,
}

impl Program {
    /// What to look for.
    pub fn command(self) -> &'static str {
        match self {
            Self::Socat => "socat",
            Self::Smcroute => "smcrouted",
        }
    }

    /// Its executable, if there is one.
    pub fn find(self) -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
        places.map(|place| place.join(self.command())).find(|file| file.is_file())
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Socat => "apt-get install socat",
            Self::Smcroute => "apt-get install smcroute",
        }
    }

    /// A file of the namespace that shows `.1` when it forwards.
    fn sign(self) -> (&'static str, &'static str) {
        match self {
            // Port 5000, joined or not: both happen before socat sends.
            Self::Socat => ("/proc/thread-self/net/udp", ":1388 "),
            // 239.1.1.1 as the kernel prints it.
            Self::Smcroute => ("/proc/thread-self/net/ip_mr_cache", "010101EF "),
        }
    }
}

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    directory: PathBuf,
}

impl Peer {
    /// Carries the benches' flow from `r0` to `r1` of `namespace` when this returns.
    pub fn start(namespace: &Namespace, program: Program, cpu: Option<usize>) -> Result<Self> {
        let file = program.find().ok_or(LabError::Missing { tool: program.command(), remedy: program.remedy() })?;
        let directory = std::env::temp_dir().join(format!("{}-{}", namespace.name(), program.command()));
        std::fs::create_dir_all(&directory).map_err(LabError::io(directory.display().to_string()))?;
        let mut command = match cpu {
            // Part of util-linux, as `ip` is of iproute2.
            Some(cpu) => {
                let mut command = namespace.command("taskset")?;
                command.args(["-c", &cpu.to_string()]).arg(&file);
                command
            }
            None => namespace.command(&file)?,
        };
        arguments(&mut command, program, &directory)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(LabError::io(format!("starting {}", program.command())))?;
        let mut peer = Self { child, directory };
        peer.wait_ready(namespace, program)?;
        Ok(peer)
    }

    /// Involuntary context switches so far.
    pub fn preemptions(&self) -> u64 {
        clock::involuntary_switches(self.child.id())
    }

    fn wait_ready(&mut self, namespace: &Namespace, program: Program) -> Result<()> {
        let (file, sign) = program.sign();
        let begin = Instant::now();
        while begin.elapsed() < READY {
            if let Some(status) = self.child.try_wait().map_err(LabError::io(program.command()))? {
                return Err(LabError::Invalid(format!("{} ended with {status}", program.command())));
            }
            if namespace.run(|| std::fs::read_to_string(file))?.is_ok_and(|text| text.contains(sign)) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let what = format!("{} did not forward", program.command());
        Err(LabError::Timeout { what, ms: READY.as_millis(), detail: String::new() })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn arguments(command: &mut Command, program: Program, directory: &Path) -> Result<()> {
    match program {
        Program::Socat => {
            let from = format!("UDP4-RECV:{},bind={group},ip-add-membership={group}:r0", GROUP.port(), group = GROUP.ip());
            let to = format!("UDP4-DATAGRAM:{REWRITTEN},ip-multicast-if=10.0.1.1,ip-multicast-ttl={TTL}");
            command.arg("-u").args([from, to]);
        }
        Program::Smcroute => {
            let config = directory.join("smcroute.conf");
            let text = format!("phyint r0 enable\nphyint r1 enable\nmroute from r0 source 10.0.0.1 group {} to r1\n", GROUP.ip());
            std::fs::write(&config, text).map_err(LabError::io(config.display().to_string()))?;
            command.args(["-n", "-N", "-f"]).arg(config);
            command.arg("-P").arg(directory.join("pid")).arg("-u").arg(directory.join("socket"));
        }
    }
    Ok(())
}
