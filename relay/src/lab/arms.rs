//! The things that are compared: the relay by path, and the baselines, each started and stopped the same way.
//!
//! All of them carry 239.1.1.1:5000 from `r0` to 239.9.9.9:6000 on `r1`; the bare redirect changes nothing in the packet.

use super::error::{LabError, Result};
use super::process::RelayProcess;
use super::sockets_relay::{Route, SocketsRelay};
use super::topology::Lab;
use super::xdp::LabProgram;
use super::{clock, socket};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

/// What is sent to.
pub const GROUP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(239, 1, 1, 1)), 5000);
/// What comes out.
pub const REWRITTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(239, 9, 9, 9)), 6000);
/// TTL of what is sent.
pub const TTL: u8 = 16;

/// One thing to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub enum Arm {
    /// The relay over AF_XDP, engine tx, one thread.
    Xsk,
    /// The relay over AF_XDP, engine coalesce, one thread.
    Coalesce,
    /// The relay over AF_PACKET + io_uring: the baseline of every ratio.
    Packet,
    /// The relay's devmap broadcast in the kernel.
    Kernel,
    /// Plain UDP sockets.
    Sockets,
    /// A bare XDP redirect: what the machine allows.
    Redirect,
}

impl Arm {
    /// Its name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xsk => "xsk",
            Self::Coalesce => "coalesce",
            Self::Packet => "packet",
            Self::Kernel => "kernel",
            Self::Sockets => "sockets",
            Self::Redirect => "redirect",
        }
    }

    /// Its engine in JSON.
    pub fn engine(self) -> &'static str {
        match self {
            Self::Xsk => "tx",
            Self::Coalesce => "coalesce",
            Self::Packet => "uring",
            Self::Kernel | Self::Redirect => "xdp",
            Self::Sockets => "mmsg",
        }
    }

    /// Whether what it sends carries the new destination.
    pub fn rewrites(self) -> bool {
        self != Self::Redirect
    }

    /// The path of its rule.
    fn path(self) -> &'static str {
        if self == Self::Coalesce { "xsk" } else { self.name() }
    }

    /// Whether it is the relay, and no baseline: such an arm can send to several outputs.
    pub fn is_relay(self) -> bool {
        matches!(self, Self::Xsk | Self::Coalesce | Self::Packet | Self::Kernel)
    }

    /// Whether it sends XDP frames, and no socket buffers.
    pub fn sends_frames(self) -> bool {
        matches!(self, Self::Kernel | Self::Redirect)
    }

    /// The rule, with path and engine named (DECISIONS: tests and figures); every output is rewritten differently.
    fn rule(self, fanout: u16) -> String {
        let engine = match self {
            Self::Xsk => " engine=tx",
            Self::Coalesce => " engine=coalesce",
            _ => "",
        };
        let output = |n: u16| format!("r1 239.9.{}.{}:{} ttl=keep", 9 + n / 200, 9 + n % 200, 6000 + n);
        let outputs: Vec<String> = (0..fanout).map(output).collect();
        format!("r0 {GROUP} -> {}; id=lab path={}{engine}", outputs.join(", "), self.path())
    }
}

/// A started arm; stops when dropped.
#[derive(Debug)]
pub enum Running {
    /// `relay run`.
    Relay(Box<RelayProcess>),
    /// The plain-socket relay.
    Sockets(SocketsRelay),
    /// The bare redirect.
    Redirect(LabProgram),
}

impl Running {
    /// Starts an arm on one CPU; it forwards when this returns. `extra`: further arguments of `relay run`.
    pub fn start(lab: &Lab, arm: Arm, program: &Path, cpu: Option<usize>, extra: &[&str]) -> Result<Self> {
        Self::start_fanout(lab, arm, 1, program, cpu, extra)
    }

    /// The same with so many outputs, all out of `r1`.
    pub fn start_fanout(lab: &Lab, arm: Arm, fanout: u16, program: &Path, cpu: Option<usize>, extra: &[&str]) -> Result<Self> {
        match arm {
            _ if fanout > 1 && !arm.is_relay() => Err(LabError::Invalid(format!("{} has one output only", arm.name()))),
            Arm::Xsk | Arm::Coalesce | Arm::Packet | Arm::Kernel => start_relay(lab, arm, &arm.rule(fanout), program, cpu, extra),
            Arm::Sockets => {
                let from = super::recv::Subscription { source: None, group: GROUP };
                let route = Route { ingress: "r0".into(), from, egress: "r1".into(), to: REWRITTEN, ttl: TTL, cpu };
                Ok(Self::Sockets(SocketsRelay::start(&lab.relay, &route)?))
            }
            Arm::Redirect => start_redirect(lab),
        }
    }

    /// Packets it says it has relayed, where it counts them itself.
    pub fn relayed(&self) -> Option<u64> {
        match self {
            Self::Relay(relay) => {
                let stats = relay.stats().ok()?;
                stats["rules"].as_array()?.iter().map(|rule| rule["outputs"][0]["tx_packets"].as_u64()).sum()
            }
            Self::Sockets(relay) => Some(relay.relayed()),
            Self::Redirect(program) => program.count().ok(),
        }
    }

    /// Involuntary context switches of what carries the packets; `None` where that is no thread.
    pub fn preemptions(&self) -> Option<u64> {
        match self {
            Self::Relay(relay) => Some(relay.worker_pids().ok()?.into_iter().map(clock::involuntary_switches).sum()),
            Self::Sockets(relay) => Some(relay.preemptions()),
            Self::Redirect(_) => None,
        }
    }
}

fn start_relay(lab: &Lab, arm: Arm, rule: &str, program: &Path, cpu: Option<usize>, extra: &[&str]) -> Result<Running> {
    let mut args = vec!["--backend", arm.path(), "--rule", rule];
    let cpus = cpu.map(|cpu| cpu.to_string());
    if let Some(cpus) = &cpus {
        args.extend(["--cpus", cpus]);
    }
    args.extend(extra);
    let mut relay = RelayProcess::start(&lab.relay, program, &args)?;
    relay.wait_ready()?;
    Ok(Running::Relay(Box::new(relay)))
}

fn start_redirect(lab: &Lab) -> Result<Running> {
    let mut program = LabProgram::load()?;
    lab.relay.run(|| {
        program.set_device(socket::ifindex("r1")?)?;
        program.attach("lab_redirect", socket::ifindex("r0")?)
    })??;
    Ok(Running::Redirect(program))
}
