//! The things that are compared: the relay by path, and the baselines, each started and stopped the same way.
//!
//! All of them carry 239.1.1.1:5000 from `r0` to 239.9.9.9:6000 on `r1`; the bare redirect and
//! kernel routing leave its addresses alone.

use super::error::{LabError, Result};
use super::netns::Namespace;
use super::peers::{Peer, Program};
use super::process::RelayProcess;
use super::sockets_relay::{Route, SocketsRelay};
use super::topology::Lab;
use super::xdp::LabProgram;
#[cfg(feature = "peers")]
use super::xsk_loop::XskLoop;
use super::{clock, socket};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

/// Without it there is no kernel path.
const BTF: &str = "/sys/kernel/btf/vmlinux";

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
    /// The same with an output that changes MAC addresses and TTL alone.
    #[value(name = "kernel_macs")]
    KernelMacs,
    /// A bare AF_XDP forwarding loop with the same rewrite: what AF_XDP TX allows (feature `peers`).
    #[value(name = "xsk_loop")]
    XskLoop,
    /// Plain UDP sockets.
    Sockets,
    /// socat, where it is installed.
    Socat,
    /// Kernel multicast routing, set up by smcroute, where it is installed; changes no address.
    Smcroute,
    /// A bare XDP redirect: what the machine allows.
    Redirect,
}

impl Arm {
    /// All of them, in the order of a table.
    pub const ALL: [Self; 10] = [
        Self::Kernel,
        Self::KernelMacs,
        Self::Xsk,
        Self::XskLoop,
        Self::Coalesce,
        Self::Packet,
        Self::Sockets,
        Self::Socat,
        Self::Smcroute,
        Self::Redirect,
    ];

    /// What has to be there for it and is not.
    pub fn missing(self) -> Option<&'static str> {
        match self {
            Self::XskLoop if cfg!(not(feature = "peers")) => Some("the feature `peers`"),
            Self::Kernel | Self::KernelMacs if !Path::new(BTF).exists() => Some("the kernel's BTF (CONFIG_DEBUG_INFO_BTF)"),
            Self::Socat | Self::Smcroute => self.peer().filter(|peer| peer.find().is_none()).map(Program::command),
            _ => None,
        }
    }

    fn peer(self) -> Option<Program> {
        match self {
            Self::Socat => Some(Program::Socat),
            Self::Smcroute => Some(Program::Smcroute),
            _ => None,
        }
    }

    /// Its name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xsk => "xsk",
            Self::Coalesce => "coalesce",
            Self::Packet => "packet",
            Self::Kernel => "kernel",
            Self::KernelMacs => "kernel_macs",
            Self::XskLoop => "xsk_loop",
            Self::Sockets => "sockets",
            Self::Socat => "socat",
            Self::Smcroute => "smcroute",
            Self::Redirect => "redirect",
        }
    }

    /// Its engine in JSON.
    pub fn engine(self) -> &'static str {
        match self {
            Self::Xsk | Self::XskLoop => "tx",
            Self::Coalesce => "coalesce",
            Self::Packet => "uring",
            Self::Kernel | Self::KernelMacs | Self::Redirect => "xdp",
            Self::Sockets => "mmsg",
            Self::Socat => "send",
            Self::Smcroute => "mroute",
        }
    }

    /// Whether what it sends carries the new destination.
    pub fn rewrites(self) -> bool {
        !matches!(self, Self::KernelMacs | Self::Smcroute | Self::Redirect)
    }

    /// The path of its rule.
    fn path(self) -> &'static str {
        match self {
            Self::Coalesce => "xsk",
            Self::KernelMacs => "kernel",
            _ => self.name(),
        }
    }

    /// Whether it is the relay, and no baseline.
    pub fn is_relay(self) -> bool {
        matches!(self, Self::Xsk | Self::Coalesce | Self::Packet | Self::Kernel | Self::KernelMacs)
    }

    /// Whether it is the relay with rules as they come: any number of outputs, rewritten as told.
    pub fn takes_any_rule(self) -> bool {
        self.is_relay() && self.rewrites()
    }

    /// Whether it sends XDP frames, and no socket buffers.
    pub fn sends_frames(self) -> bool {
        matches!(self, Self::Kernel | Self::KernelMacs | Self::Redirect)
    }

    /// The rule, with path and engine named (DECISIONS: tests and figures).
    fn rule(self, group: SocketAddr, outputs: &str, number: u32) -> String {
        let engine = match self {
            Self::Xsk => " engine=tx",
            Self::Coalesce => " engine=coalesce",
            _ => "",
        };
        let id = if number == 0 { "lab".to_owned() } else { format!("lab{number}") };
        format!("r0 {group} -> {outputs}; id={id} path={}{engine}", self.path())
    }
}

/// What output `n` sends to; the first is [`REWRITTEN`].
pub fn rewritten(n: u16) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(239, 9, 9 + (n / 200) as u8, 9 + (n % 200) as u8).into(), REWRITTEN.port() + n)
}

/// So many outputs out of `r1`, each rewritten differently.
fn outputs(fanout: u16) -> String {
    let outputs: Vec<String> = (0..fanout).map(|n| format!("r1 {} ttl=keep", rewritten(n))).collect();
    outputs.join(", ")
}

/// The `n`th group after [`GROUP`]: what hop `n` of a chain takes, and hop `n - 1` sends; the group of rule `n`.
fn hop_group(n: u32) -> SocketAddr {
    let IpAddr::V4(first) = GROUP.ip() else { return GROUP };
    SocketAddr::new(IpAddr::V4(Ipv4Addr::from_bits(first.to_bits() + n)), GROUP.port())
}

/// A started arm; stops when dropped.
#[derive(Debug)]
pub enum Running {
    /// `relay run`.
    Relay(Box<RelayProcess>),
    /// The bare AF_XDP loop.
    #[cfg(feature = "peers")]
    XskLoop(XskLoop),
    /// The plain-socket relay.
    Sockets(SocketsRelay),
    /// Somebody else's program.
    Peer(Peer),
    /// The bare redirect.
    Redirect(LabProgram),
}

impl Running {
    /// Starts an arm on one CPU; it forwards when this returns. `extra`: further arguments of `relay run`.
    pub fn start(lab: &Lab, arm: Arm, program: &Path, cpu: Option<usize>, extra: &[&str]) -> Result<Self> {
        Self::start_many(lab, arm, (1, 1), program, cpu, extra)
    }

    /// The same with so many outputs, all out of `r1`, and so many rules, for [`GROUP`] and the groups after it.
    pub fn start_many(
        lab: &Lab,
        arm: Arm,
        (fanout, rules): (u16, u16),
        program: &Path,
        cpu: Option<usize>,
        extra: &[&str],
    ) -> Result<Self> {
        match arm {
            // What sends every packet on takes those for many rules too: the row says what making them costs.
            _ if fanout > 1 && !arm.takes_any_rule() => Err(LabError::Invalid(format!("{} has one output", arm.name()))),
            _ if rules > 1 && !arm.is_relay() && arm != Arm::Redirect => Err(LabError::Invalid(format!("{} has no rules", arm.name()))),
            Arm::Xsk | Arm::Coalesce | Arm::Packet | Arm::Kernel | Arm::KernelMacs => {
                let outputs = if arm.rewrites() { outputs(fanout) } else { "r1".to_owned() };
                let rules: Vec<String> = (0..u32::from(rules)).map(|n| arm.rule(hop_group(n), &outputs, n)).collect();
                start_relay(&lab.relay, arm, &rules, program, cpu, extra)
            }
            #[cfg(feature = "peers")]
            Arm::XskLoop => Ok(Self::XskLoop(XskLoop::start(&lab.relay, "r0", "r1", REWRITTEN, cpu)?)),
            #[cfg(not(feature = "peers"))]
            Arm::XskLoop => Err(LabError::Missing { tool: "the bare AF_XDP loop", remedy: "build with `--features peers`" }),
            Arm::Socat => Ok(Self::Peer(Peer::start(&lab.relay, Program::Socat, cpu)?)),
            Arm::Smcroute => Ok(Self::Peer(Peer::start(&lab.relay, Program::Smcroute, cpu)?)),
            Arm::Sockets => start_sockets(&lab.relay, GROUP, REWRITTEN, cpu),
            Arm::Redirect => start_redirect(lab),
        }
    }

    /// One relay of a chain ([`Lab::chain`]), hop 0 the first: each has one output, to the group the next one takes.
    pub fn start_hop(lab: &Lab, hop: u32, arm: Arm, program: &Path, cpu: Option<usize>, extra: &[&str]) -> Result<Self> {
        let (namespace, from, to) = (lab.hop(hop), hop_group(hop), hop_group(hop + 1));
        match arm {
            Arm::Sockets => start_sockets(namespace, from, to, cpu),
            _ if arm.takes_any_rule() => {
                start_relay(namespace, arm, &[arm.rule(from, &format!("r1 {to} ttl=keep"), 0)], program, cpu, extra)
            }
            _ => Err(LabError::Invalid(format!("{} has no place in a chain", arm.name()))),
        }
    }

    /// Packets it says it has relayed, where it counts them itself.
    pub fn relayed(&self) -> Option<u64> {
        match self {
            Self::Relay(relay) => {
                let stats = relay.stats().ok()?;
                stats["rules"].as_array()?.iter().map(|rule| rule["outputs"][0]["tx_packets"].as_u64()).sum()
            }
            #[cfg(feature = "peers")]
            Self::XskLoop(relay) => Some(relay.relayed()),
            Self::Sockets(relay) => Some(relay.relayed()),
            Self::Peer(_) => None,
            Self::Redirect(program) => program.count().ok(),
        }
    }

    /// Involuntary context switches of what carries the packets; `None` where that is no thread.
    pub fn preemptions(&self) -> Option<u64> {
        match self {
            Self::Relay(relay) => Some(relay.worker_pids().ok()?.into_iter().map(clock::involuntary_switches).sum()),
            #[cfg(feature = "peers")]
            Self::XskLoop(relay) => Some(relay.preemptions()),
            Self::Sockets(relay) => Some(relay.preemptions()),
            Self::Peer(peer) => Some(peer.preemptions()),
            Self::Redirect(_) => None,
        }
    }
}

fn start_relay(namespace: &Namespace, arm: Arm, rules: &[String], program: &Path, cpu: Option<usize>, extra: &[&str]) -> Result<Running> {
    let mut args = vec!["--backend", arm.path()];
    args.extend(rules.iter().flat_map(|rule| ["--rule", rule]));
    let cpus = cpu.map(|cpu| cpu.to_string());
    if let Some(cpus) = &cpus {
        args.extend(["--cpus", cpus]);
    }
    args.extend(extra);
    let mut relay = RelayProcess::start(namespace, program, &args)?;
    relay.wait_ready()?;
    Ok(Running::Relay(Box::new(relay)))
}

fn start_sockets(namespace: &Namespace, group: SocketAddr, to: SocketAddr, cpu: Option<usize>) -> Result<Running> {
    let from = super::recv::Subscription { source: None, group };
    let route = Route { ingress: "r0".into(), from, egress: "r1".into(), to, ttl: TTL, cpu };
    Ok(Running::Sockets(SocketsRelay::start(namespace, &route)?))
}

fn start_redirect(lab: &Lab) -> Result<Running> {
    let mut program = LabProgram::load()?;
    lab.relay.run(|| {
        program.set_device(socket::ifindex("r1")?)?;
        program.attach("lab_redirect", socket::ifindex("r0")?)
    })??;
    Ok(Running::Redirect(program))
}
