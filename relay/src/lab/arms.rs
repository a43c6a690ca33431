//! The things that are compared: the relay by path, and the baselines, each started and stopped the same way.
//!
//! All of them carry 239.1.1.1:5000 from `r0` to 239.9.9.9:6000 on `r1`; the bare redirect changes nothing in the packet.

use super::error::Result;
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
            Self::Packet => "uring",
            Self::Kernel | Self::Redirect => "xdp",
            Self::Sockets => "mmsg",
        }
    }

    /// Whether what it sends carries the new destination.
    pub fn rewrites(self) -> bool {
        self != Self::Redirect
    }

    /// The rule, with path and engine named (DECISIONS: tests and figures).
    fn rule(self) -> String {
        let engine = if self == Self::Xsk { " engine=tx" } else { "" };
        format!("r0 {GROUP} -> r1 {REWRITTEN} ttl=keep; id=lab path={}{engine}", self.name())
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
        match arm {
            Arm::Xsk | Arm::Packet | Arm::Kernel => start_relay(lab, arm, program, cpu, extra),
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

fn start_relay(lab: &Lab, arm: Arm, program: &Path, cpu: Option<usize>, extra: &[&str]) -> Result<Running> {
    let rule = arm.rule();
    let mut args = vec!["--backend", arm.name(), "--rule", &rule];
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
