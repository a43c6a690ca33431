//! Helpers of the namespace tests: where the relay's executable is, a laboratory with a relay in it, traffic with a verdict.
//!
//! The namespaces, generators and receivers themselves are `relay::lab`. Must never judge: tests do.

use anyhow::{Context, Result, ensure};
use relay::lab::recv::{Receiver, Subscription};
use relay::lab::send::Backend;
use relay::lab::{Namespace, recv, send};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

pub mod fuzz;
pub mod golden;
pub mod mutate;
pub mod paths;
pub mod process;
pub mod raw;
pub mod rewrites;
pub mod step;
pub mod stream;
pub mod tagged;
pub mod xdp;

pub use relay::lab::{Lab, LabSpec, RelayProcess};

/// Whether namespaces can be made here; otherwise says on stderr that the test is skipped, and why.
pub fn can_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: network namespaces need root");
    }
    root
}

/// Returns from the calling test, saying why, where namespaces cannot be made.
#[macro_export]
macro_rules! needs_root {
    () => {
        if !$crate::can_run() {
            return;
        }
    };
}

/// The relay's executable: `RELAY_BIN`, else `relay` in the profile directory that this test was built into.
pub fn relay_bin() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("RELAY_BIN") {
        return Ok(path.into());
    }
    let test = std::env::current_exe().context("the test's own path")?;
    let profile = test.parent().and_then(|deps| deps.parent()).context("the test's own path has no profile directory")?;
    let path = profile.join("relay");
    let release = if profile.ends_with("release") { " --release" } else { "" };
    ensure!(path.exists(), "{} is missing: run `cargo build{release} -p relay` first, or set RELAY_BIN", path.display());
    Ok(path)
}

/// Starts `relay run ARGS` in the relay's namespace and waits until every worker runs.
pub fn start_relay(lab: &Lab, args: &[&str]) -> Result<RelayProcess> {
    let mut relay = start_relay_unready(lab, args)?;
    relay.wait_ready()?;
    Ok(relay)
}

/// Starts `relay run ARGS` in the relay's namespace and does not wait.
pub fn start_relay_unready(lab: &Lab, args: &[&str]) -> Result<RelayProcess> {
    Ok(RelayProcess::start(&lab.relay, &relay_bin()?, args)?)
}

/// A verifying receiver in a thread; joined before [`Listener::on`] returns.
#[derive(Debug)]
pub struct Listener {
    thread: JoinHandle<Result<recv::Report, relay::lab::LabError>>,
    stop: std::sync::Arc<AtomicBool>,
}

impl Listener {
    /// Listens for `[SRC@]GROUP:PORT` on `iface` in `namespace` until `count` datagrams are there, or [`Listener::finish`].
    pub fn on(namespace: &Namespace, iface: &str, group: &str, count: Option<u64>) -> Result<Self> {
        Self::with(namespace, &recv_args(iface, group, count)?)
    }

    /// Listens in `namespace` as `args` say.
    pub fn with(namespace: &Namespace, args: &recv::Args) -> Result<Self> {
        let receiver = namespace.run(|| Receiver::open(args))??;
        let stop = std::sync::Arc::<AtomicBool>::default();
        let seen = stop.clone();
        Ok(Self { thread: std::thread::spawn(move || receiver.run(&seen)), stop })
    }

    /// Takes what is still in the buffer, then ends; the account.
    pub fn finish(self) -> Result<recv::Report> {
        self.stop.store(true, Ordering::Relaxed);
        self.wait()
    }

    /// Waits until `count` is reached or nothing has come for 5 s; the account.
    pub fn wait(self) -> Result<recv::Report> {
        Ok(self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?)
    }
}

/// Arguments of a receiver with a time-out of 5 s.
pub fn recv_args(iface: &str, group: &str, count: Option<u64>) -> Result<recv::Args> {
    Ok(recv::Args {
        iface: iface.into(),
        group: group.parse::<Subscription>().map_err(anyhow::Error::msg)?,
        count,
        timeout: Duration::from_secs(5),
        duration: Some(Duration::from_secs(120)),
        linger: Duration::from_millis(100),
        backend: Backend::Sockets,
        cpu: None,
    })
}

/// Arguments of a paced sender on `iface`, 64 bytes, TTL 16, the kernel's source.
pub fn send_args(iface: &str, to: &str, rate: u64, count: u64) -> Result<send::Args> {
    Ok(send::Args {
        iface: iface.into(),
        to: to.parse::<SocketAddr>().with_context(|| format!("destination {to}"))?,
        rate,
        count: Some(count),
        size: 64,
        ttl: 16,
        dscp: 0,
        source: None,
        duration: Some(Duration::from_secs(120)),
        first: 0,
        backend: Backend::Sockets,
        cpu: None,
    })
}

/// Sends from `s0` and returns when the last datagram is out.
pub fn send(lab: &Lab, args: &send::Args) -> Result<send::Report> {
    Ok(lab.src.run(|| send::send(args))??)
}

/// Sends from `s0` in the background; the test goes on.
pub fn send_in_background(lab: &Lab, args: &send::Args) -> Result<Sending> {
    send_in_background_from(&lab.src, args)
}

/// Sends from a namespace in the background; the test goes on.
pub fn send_in_background_from(namespace: &Namespace, args: &send::Args) -> Result<Sending> {
    let mut command = namespace.command(relay_bin()?)?;
    command.args(["send", "--json", "--iface", &args.iface, "--to", &args.to.to_string(), "--rate", &args.rate.to_string()]);
    command.args(["--size", &args.size.to_string(), "--ttl", &args.ttl.to_string(), "--first", &args.first.to_string()]);
    command.args(args.count.iter().flat_map(|count| ["--count".to_owned(), count.to_string()]));
    command.args(args.duration.iter().flat_map(|d| ["--duration".to_owned(), format!("{}ms", d.as_millis())]));
    Ok(Sending { child: command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().context("relay send")? })
}

/// A `relay send` that runs; killed when dropped.
#[derive(Debug)]
pub struct Sending {
    child: Child,
}

impl Sending {
    /// Waits for its end; its report.
    pub fn wait(mut self) -> Result<send::Report> {
        let mut text = String::new();
        if let Some(mut stdout) = self.child.stdout.take() {
            std::io::Read::read_to_string(&mut stdout, &mut text).context("relay send")?;
        }
        let status = self.child.wait().context("relay send")?;
        ensure!(status.success(), "relay send ended with {status}");
        Ok(serde_json::from_str(&text)?)
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The counters of one rule in `relay stats --json`.
pub fn rule_stats<'a>(stats: &'a Value, id: &str) -> Result<&'a Value> {
    let rules = stats["rules"].as_array().context("stats without rules")?;
    rules.iter().find(|rule| rule["id"] == id).with_context(|| format!("no rule {id} in {stats}"))
}

/// Counters of an interface, in the answer of `stats`.
pub fn interface_stats<'a>(stats: &'a Value, name: &str) -> Result<&'a Value> {
    let interfaces = stats["interfaces"].as_array().context("stats without interfaces")?;
    interfaces.iter().find(|interface| interface["name"] == name).with_context(|| format!("no interface {name} in {stats}"))
}

/// DESIGN §4.1: the places of the frames sum to their total.
pub fn assert_frames_conserved(stats: &Value) {
    let frames = &stats["frames"];
    let count = |place: &str| frames[place].as_u64().unwrap_or(0);
    let places = ["free", "fill", "rx", "egress", "return", "tx", "completion", "hand", "kernel", "lost_invalid"];
    assert_eq!(places.iter().map(|place| count(place)).sum::<u64>(), count("total"), "{frames}");
}

/// DESIGN §4.2: per output, `tx + Σ drops == rx − Σ rule drops`.
pub fn assert_rules_conserved(stats: &Value) {
    for rule in stats["rules"].as_array().into_iter().flatten() {
        let inputs = rule["rx_packets"].as_u64().unwrap_or(0) - sum(&rule["drops"]);
        for output in rule["outputs"].as_array().into_iter().flatten() {
            assert_eq!(output["tx_packets"].as_u64().unwrap_or(0) + sum(&output["drops"]), inputs, "{rule}");
        }
    }
}

fn sum(counters: &Value) -> u64 {
    counters.as_object().into_iter().flatten().filter_map(|(_, count)| count.as_u64()).sum()
}
