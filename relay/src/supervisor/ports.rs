//! The ports of the relay: which interfaces are used how, and the sockets behind them.
//!
//! A port is an interface and a way to drive it; it has one set of sockets for each worker (worker w owns queue w). A
//! port's number never changes and is the same in every worker's manifest. Must never touch a ring or a packet.

use super::error::{DEGRADED, RunError};
use super::interfaces::{Interface, Interfaces};
use super::options::{BackendChoice, Options, XdpMode, ZeroCopyChoice};
use crate::nic::afpacket::socket::{self as packet_socket, Fanout, FanoutMode};
use crate::nic::afxdp::create::{RingSizes, SocketSpec, create};
use crate::nic::afxdp::program::{Mode, Program, ProgramError, socket_index};
use crate::plan::counters::MAX_PORTS;
use crate::plan::manifest::{PortKind, PortManifest};
use crate::rule::{EngineChoice, PathChoice, Rule};
use crate::sys::xdp::BindFlags;
use crate::worker::partition::{self, Scheme};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

/// Largest packet (IP header on) that one frame holds behind the headroom with two tags.
const MAX_SINGLE_MTU: u32 = crate::frame::FRAME_CAPACITY - 22;

/// How an interface is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// AF_XDP.
    Xsk,
    /// AF_PACKET.
    Packet,
}

/// Sockets of one port for one worker.
#[derive(Debug)]
pub struct PortSockets {
    /// AF_XDP socket, or the receiving AF_PACKET socket.
    pub receive: OwnedFd,
    /// The sending AF_PACKET socket.
    pub send: Option<OwnedFd>,
}

/// One port.
#[derive(Debug)]
pub struct Port {
    /// Interface name.
    pub name: String,
    /// How it is driven.
    pub way: Way,
    /// The interface as it was when the port was made.
    pub facts: Interface,
    /// Name of the rung as `status` shows it.
    pub backend: &'static str,
    /// Why this rung.
    pub reason: String,
    /// Rules take packets here.
    pub ingress: bool,
    /// Rules send here.
    pub egress: bool,
    /// By worker.
    pub sockets: Vec<PortSockets>,
    /// Whether our program is on the interface.
    pub attached: bool,
    /// AF_PACKET packets the kernel dropped, accumulated (the kernel's counter resets when it is read).
    pub packet_drops: u64,
}

/// All ports, by number.
#[derive(Debug, Default)]
pub struct Ports {
    list: Vec<Port>,
    sizes: Option<RingSizes>,
}

/// What a set of rules needs of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Rules take packets here.
    pub ingress: bool,
    /// Rules send here.
    pub egress: bool,
}

/// Sizes that keep one stalled output from taking the frames of all (DESIGN §4, 9): half of the UMEM stands ready to
/// receive, and one output's rings together hold less than the other half.
pub fn ring_sizes(frames: u32) -> RingSizes {
    let receive = (frames / 2).clamp(64, 16_384);
    let send = (frames / 8).clamp(64, 2048);
    RingSizes { rx: receive, fill: receive, tx: send, completion: send }
}

/// Slots of each egress ring. With an egress thread of its own it takes a whole receive ring: what has gathered there while
/// a worker was dead comes in faster than that thread may get a CPU.
pub fn egress_capacity(frames: u32, split: bool) -> u32 {
    let sizes = ring_sizes(frames);
    if split { sizes.rx } else { sizes.tx }
}

/// What a port was before a change: its use, whether our program was on it, rung and reason.
pub type Mark = (Use, bool, &'static str, String);

impl Ports {
    /// For [`Maker::roll_back`].
    pub fn mark(&self) -> Vec<Mark> {
        let mark = |port: &Port| (Use { ingress: port.ingress, egress: port.egress }, port.attached, port.backend, port.reason.clone());
        self.list.iter().map(mark).collect()
    }

    /// All ports in numeric order.
    pub fn list(&self) -> &[Port] {
        &self.list
    }

    /// All ports, to note what becomes of them.
    pub fn list_mut(&mut self) -> &mut [Port] {
        &mut self.list
    }

    /// The port of an interface driven in this way.
    pub fn find(&self, name: &str, way: Way) -> Option<(usize, &Port)> {
        self.list.iter().enumerate().find(|(_, port)| port.name == name && port.way == way)
    }

    /// The port an ingress interface has in fact: the way asked for, or packet where that was the rung below.
    pub fn ingress(&self, rule: &Rule) -> Option<(usize, &Port)> {
        let wanted = if rule.path == PathChoice::Packet { Way::Packet } else { Way::Xsk };
        self.find(&rule.ingress, wanted).or_else(|| self.find(&rule.ingress, Way::Packet)).filter(|(_, port)| port.ingress)
    }

    /// The port an output of a rule sends by: the same way as the rule's ingress where there is one.
    pub fn egress(&self, rule: &Rule, name: &str) -> Option<(usize, &Port)> {
        let way = self.ingress(rule).map_or(Way::Xsk, |(_, port)| port.way);
        self.find(name, way).or_else(|| self.list.iter().enumerate().find(|(_, port)| port.name == name))
    }

    /// Ports as a worker's manifest lists them.
    pub fn manifest(&self, worker: usize, frames: u32) -> Vec<PortManifest> {
        let sizes = self.sizes.unwrap_or_else(|| ring_sizes(frames));
        let receiving = self.list.iter().filter(|port| port.ingress && port.way == Way::Xsk).count().max(1) as u32;
        let depth = (sizes.fill / receiving).max(64);
        self.list
            .iter()
            .filter_map(|port| {
                let sockets = port.sockets.get(worker)?;
                Some(PortManifest {
                    name: port.name.clone(),
                    ifindex: port.facts.ifindex,
                    queue: worker as u32,
                    kind: if port.way == Way::Xsk { PortKind::Xsk } else { PortKind::Packet },
                    ingress: port.ingress,
                    egress: port.egress,
                    receive_fd: sockets.receive.as_raw_fd(),
                    send_fd: sockets.send.as_ref().map_or(-1, AsRawFd::as_raw_fd),
                    sizes,
                    depth: if !port.ingress {
                        0
                    } else if port.way == Way::Xsk {
                        depth
                    } else {
                        256
                    },
                })
            })
            .collect()
    }

    /// Descriptors a worker inherits.
    pub fn descriptors(&self, worker: usize) -> impl Iterator<Item = i32> + '_ {
        let sockets = self.list.iter().filter_map(move |port| port.sockets.get(worker));
        sockets.flat_map(|sockets| [Some(sockets.receive.as_raw_fd()), sockets.send.as_ref().map(AsRawFd::as_raw_fd)]).flatten()
    }
}

/// What is needed to make ports.
pub struct Maker<'a> {
    /// Options of the run.
    pub options: &'a Options,
    /// The program, where XDP is used at all.
    pub program: Option<&'a mut Program>,
    /// Why there is no program.
    pub no_program: &'a str,
    /// One UMEM for each worker.
    pub umems: &'a [crate::frame::Umem],
}

/// Ways and uses of interfaces that a set of rules needs.
pub fn needs(rules: &[Rule], options: &Options) -> BTreeMap<(String, Way), Use> {
    let mut needs: BTreeMap<(String, Way), Use> = BTreeMap::new();
    for rule in rules {
        let way = if rule.path == PathChoice::Packet || options.backend == BackendChoice::Packet { Way::Packet } else { Way::Xsk };
        needs.entry((rule.ingress.clone(), way)).or_default().ingress = true;
        for output in &rule.outputs {
            needs.entry((output.egress.clone(), way)).or_default().egress = true;
        }
    }
    needs
}

/// Interfaces that rules name must be there.
pub fn check_interfaces(rules: &[Rule], known: &BTreeMap<String, Interface>) -> Result<(), RunError> {
    for rule in rules {
        let named = std::iter::once(("ingress", &rule.ingress)).chain(rule.outputs.iter().map(|output| ("egress", &output.egress)));
        for (field, name) in named {
            if !known.contains_key(name) {
                let names: Vec<&str> = known.keys().map(String::as_str).collect();
                let hint = format!("interfaces here are {}; see `ip link`", names.join(", "));
                return Err(RunError::bad(field, format!("no interface {name} (rule {})", rule.id), hint));
            }
        }
    }
    Ok(())
}

/// What the language allows and this build can't do yet is refused, never quietly done another way.
pub fn check_supported(rules: &[Rule], options: &Options) -> Result<(), RunError> {
    let missing = |field: &str, what: &str, hint: &str| Err(RunError::bad(field, format!("{what} is not part of this version"), hint));
    if options.backend == BackendChoice::Kernel {
        return missing("--backend", "the kernel path", "use --backend xsk");
    }
    for rule in rules {
        if rule.path == PathChoice::Kernel {
            return missing("path", &format!("path=kernel (rule {})", rule.id), "use path=auto");
        }
        if rule.engine == EngineChoice::Coalesce {
            return missing("engine", &format!("engine=coalesce (rule {})", rule.id), "use engine=auto");
        }
        if rule.outputs.iter().any(|output| output.rate.is_some()) {
            return missing("rate", &format!("rate= (rule {})", rule.id), "leave it out");
        }
    }
    Ok(())
}

impl Maker<'_> {
    /// Makes what is missing of `needs`. Returns whether any port is new or is used in a new way (workers have to be
    /// replaced then). After an error [`Maker::roll_back`] drops what was made meanwhile.
    pub fn ensure(
        &mut self,
        ports: &mut Ports,
        needs: &BTreeMap<(String, Way), Use>,
        known: &BTreeMap<String, Interface>,
    ) -> Result<bool, RunError> {
        let mut changed = false;
        for ((name, way), used) in needs {
            changed |= self.ensure_one(ports, name, *way, *used, known)?;
        }
        Ok(changed)
    }

    /// Makes the ports what they were at `mark`.
    pub fn roll_back(&mut self, ports: &mut Ports, mark: &[Mark]) {
        for port in ports.list.drain(mark.len().min(ports.list.len())..) {
            self.detach(&port);
        }
        for (port, (used, attached, backend, reason)) in ports.list.iter_mut().zip(mark) {
            if port.attached && !attached {
                self.detach(port);
                (port.attached, port.backend, port.reason) = (false, backend, reason.clone());
            }
            (port.ingress, port.egress) = (used.ingress, used.egress);
        }
    }

    fn ensure_one(
        &mut self,
        ports: &mut Ports,
        name: &str,
        way: Way,
        used: Use,
        known: &BTreeMap<String, Interface>,
    ) -> Result<bool, RunError> {
        let facts = known.get(name).ok_or_else(|| RunError::bad("interface", format!("no interface {name}"), "see `ip link`"))?;
        if let Some(port) = ports.list.iter_mut().find(|port| port.name == name && port.way == way) {
            let new = (used.ingress && !port.ingress) || (used.egress && !port.egress);
            if used.ingress && !port.ingress && way == Way::Xsk {
                let attached = self.attach(facts).and_then(|rung| self.check_queues(facts).map(|()| rung));
                (port.backend, port.reason) = attached.map_err(|error| self.refusal(error))?;
                port.attached = true;
            }
            (port.ingress, port.egress) = (port.ingress || used.ingress, port.egress || used.egress);
            return Ok(new);
        }
        if ports.list.len() >= MAX_PORTS {
            return Err(RunError::bad("interface", format!("more than {MAX_PORTS} interfaces"), "use a second relay"));
        }
        let port = match way {
            Way::Packet => self.packet_port(facts, used, "asked for by --backend packet or path=packet".into())?,
            Way::Xsk => self.xsk_or_packet(ports, facts, used)?,
        };
        if ports.list.iter().any(|other| other.name == port.name && other.way == port.way) {
            return Ok(false);
        }
        ports.list.push(port);
        Ok(true)
    }

    /// AF_XDP, or the rung below where that was not insisted on (DECISIONS §13).
    fn xsk_or_packet(&mut self, ports: &mut Ports, facts: &Interface, used: Use) -> Result<Port, RunError> {
        let sizes = *ports.sizes.get_or_insert_with(|| ring_sizes(self.options.frames));
        let refused = match self.xsk_port(ports, facts, used, sizes) {
            Ok(port) => return Ok(port),
            Err(error) => error,
        };
        let insisted = self.options.backend == BackendChoice::Xsk
            || self.options.xdp_mode != XdpMode::Auto
            || self.options.zero_copy == ZeroCopyChoice::On
            || matches!(refused, ProgramError::Foreign { .. } | ProgramError::AlreadyAttached { .. } | ProgramError::TooFewQueues { .. });
        if insisted {
            return Err(self.refusal(refused));
        }
        if self.options.strict {
            return Err(RunError::bad(
                "--strict",
                format!("interface {}: {refused}", facts.name),
                "drop --strict, or use --backend packet",
            )
            .code(DEGRADED));
        }
        tracing::warn!(interface = %facts.name, reason = %refused, "no AF_XDP here: falling back to AF_PACKET");
        self.packet_port(facts, used, format!("fell back: {refused}"))
    }

    fn refusal(&self, error: ProgramError) -> RunError {
        match error {
            ProgramError::TooFewQueues { .. } => RunError::bad("--workers", error, ""),
            ProgramError::Foreign { .. } => RunError::bad("interface", error, ""),
            _ => RunError::bad("interface", error, "use --backend packet for interfaces without XDP"),
        }
    }

    fn attach(&mut self, facts: &Interface) -> Result<(&'static str, String), ProgramError> {
        let missing = || ProgramError::Diagnostics(self.no_program.to_string());
        let Some(program) = self.program.as_mut() else { return Err(missing()) };
        let (mode, backend) = match self.options.xdp_mode {
            XdpMode::Generic => (Mode::Generic, "af_xdp_generic"),
            XdpMode::Auto | XdpMode::Native => (Mode::Native, "af_xdp_copy"),
        };
        program.attach(facts.ifindex, mode)?;
        Ok((backend, format!("{mode} XDP attached")))
    }

    /// Every worker serves a queue of its own (DECISIONS §1). Only where XDP attaches: AF_PACKET deals out to any number.
    fn check_queues(&mut self, facts: &Interface) -> Result<(), ProgramError> {
        let (queues, workers) = (facts.rx_queues, self.umems.len());
        if queues as usize >= workers {
            return Ok(());
        }
        let _ = self.program.as_mut().map(|program| program.detach(facts.ifindex));
        Err(ProgramError::TooFewQueues { interface: facts.name.clone(), queues, workers })
    }

    fn detach(&mut self, port: &Port) {
        if let (true, Some(program)) = (port.attached, self.program.as_mut())
            && let Err(error) = program.detach(port.facts.ifindex)
        {
            tracing::warn!(interface = %port.name, %error, "detaching");
        }
    }

    fn xsk_port(&mut self, ports: &Ports, facts: &Interface, used: Use, sizes: RingSizes) -> Result<Port, ProgramError> {
        if self.program.is_none() {
            return Err(ProgramError::Diagnostics(self.no_program.to_string()));
        }
        let (mut backend, mut reason) = ("af_xdp_copy", "sends only, needs no XDP program".to_string());
        if used.ingress {
            (backend, reason) = self.attach(facts)?;
            self.check_queues(facts)?;
        }
        let flags = BindFlags {
            zero_copy: self.options.zero_copy == ZeroCopyChoice::On,
            multi_buffer: self.program.as_ref().is_some_and(|program| program.multi_buffer()),
        };
        let mut sockets = Vec::new();
        for (worker, umem) in self.umems.iter().enumerate() {
            let spec = SocketSpec { ifindex: facts.ifindex, queue: worker as u32, sizes, flags };
            let first = ports.list.iter().find(|port| port.way == Way::Xsk).and_then(|port| port.sockets.get(worker));
            match create(umem, spec, first.map(|first| &first.receive)) {
                Ok(socket) => {
                    if socket.zero_copy {
                        backend = "af_xdp_zero_copy";
                    }
                    sockets.push(PortSockets { receive: socket.fd, send: None });
                }
                Err(error) => {
                    if used.ingress {
                        let _ = self.program.as_mut().map(|program| program.detach(facts.ifindex));
                    }
                    return Err(ProgramError::Diagnostics(error.to_string()));
                }
            }
        }
        let facts = facts.clone();
        Ok(Port {
            name: facts.name.clone(),
            way: Way::Xsk,
            facts,
            backend,
            reason,
            ingress: used.ingress,
            egress: used.egress,
            sockets,
            attached: used.ingress,
            packet_drops: 0,
        })
    }

    fn packet_port(&mut self, facts: &Interface, used: Use, reason: String) -> Result<Port, RunError> {
        if facts.mtu > MAX_SINGLE_MTU {
            tracing::warn!(interface = %facts.name, mtu = facts.mtu, "packets above {MAX_SINGLE_MTU} bytes are dropped as too_big on the packet path");
        }
        let workers = self.umems.len();
        let fanout = if workers > 1 { Some(fanout(facts.ifindex, self.options.partition, workers as u32)?) } else { None };
        let failed = |error: packet_socket::SocketError| RunError::failure(error).with_hint("AF_PACKET needs CAP_NET_RAW");
        let mut sockets = Vec::new();
        for _ in 0..workers {
            let receive = packet_socket::open_receive(facts.ifindex, &[], fanout).map_err(failed)?;
            let send = packet_socket::open_send(facts.ifindex).map_err(failed)?;
            sockets.push(PortSockets { receive, send: Some(send) });
        }
        Ok(Port {
            name: facts.name.clone(),
            way: Way::Packet,
            facts: facts.clone(),
            backend: "af_packet",
            reason,
            ingress: used.ingress,
            egress: used.egress,
            sockets,
            attached: false,
            packet_drops: 0,
        })
    }
}

/// How the packet sockets of an interface share its packets (`--partition`).
fn fanout(ifindex: u32, scheme: Scheme, workers: u32) -> Result<Fanout, RunError> {
    let refused = |error: crate::worker::error::Error| RunError::bad("--partition", error, "use fewer --workers, or flow-hash");
    let mode = match scheme {
        Scheme::FlowHash => FanoutMode::Hash,
        Scheme::RoundRobin => FanoutMode::RoundRobin,
        Scheme::Consistent | Scheme::Range => FanoutMode::Table(partition::table(scheme, workers).map_err(refused)?),
    };
    Ok(Fanout { group: ifindex as u16, mode })
}

/// Lets the program hand packets of an AF_XDP ingress port to its sockets.
pub fn go_live(program: &mut Program, number: usize, port: &Port) -> Result<(), ProgramError> {
    for (queue, sockets) in port.sockets.iter().enumerate() {
        program.set_socket(socket_index(number as u32, queue as u32), &sockets.receive)?;
    }
    Ok(())
}

/// Takes an ingress port out of the program's tables: what comes from now on passes.
pub fn go_dark(program: &mut Program, number: usize, port: &Port) {
    for queue in 0..port.sockets.len() {
        // An empty slot is what we want; whatever failed, the program is detached next.
        let _ = program.clear_socket(socket_index(number as u32, queue as u32));
    }
}

/// Asks the kernel for the interfaces.
pub fn known(interfaces: &mut Interfaces) -> Result<BTreeMap<String, Interface>, RunError> {
    interfaces.snapshot().map_err(|error| RunError::failure(format!("asking the kernel for its interfaces: {error}")))
}
