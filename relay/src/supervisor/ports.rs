//! The ports of the relay: which interfaces are used how, and the sockets behind them.
//!
//! A port is an interface and a way to drive it; it has one set of sockets for each worker (worker w owns queue w). A
//! port's number never changes and is the same in every worker's manifest. Must never touch a ring or a packet.

mod adopt;

pub use adopt::KeptPort;

use super::error::{DEGRADED, RunError};
use super::interfaces::{Interface, Interfaces};
use super::options::{BackendChoice, Options, XdpMode, ZeroCopyChoice};
use crate::frame::FRAME_SIZE;
use crate::nic::afpacket::socket::{self as packet_socket, Fanout, FanoutMode};
use crate::nic::afxdp::create::{RingSizes, SocketSpec, create};
use crate::nic::afxdp::ledger::PortLedger;
use crate::nic::afxdp::program::{Mode, Program, ProgramError, socket_index};
use crate::plan::counters::MAX_PORTS;
use crate::plan::manifest::{OrphanList, PortKind, PortManifest};
use crate::rule::{EngineChoice, PathChoice, Rule};
use crate::sys::xdp::{self, BindFlags};
use crate::worker::partition::{self, Scheme};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// An interface that was refused is tried again after this time.
pub(super) const REFUSED_RETRY: Duration = Duration::from_secs(1);
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
    /// A look at the rings, taken while they can be mapped: which frames are in them when the interface is gone.
    pub ledger: Option<PortLedger>,
    /// The AF_PACKET socket that takes super-frames, where rules coalesce.
    pub coalesce: Option<OwnedFd>,
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
    /// Rules send super-frames here.
    pub coalesce: bool,
    /// By worker.
    pub sockets: Vec<PortSockets>,
    /// Whether our program is on the interface.
    pub attached: bool,
    /// Its interface is gone; the sockets go as soon as the workers have taken their frames back.
    pub retired: bool,
    /// It is open, and has no sockets since there are no workers (`--backend kernel`).
    pub workerless: bool,
    /// What sockets that are gone had dropped: without a free frame, with a full ring.
    pub past_drops: [u64; 2],
}

impl Port {
    /// Whether its interface is another one by now, or none.
    fn is_stale(&self, known: &BTreeMap<String, Interface>, gone: &BTreeSet<u32>) -> bool {
        gone.contains(&self.facts.ifindex) || known.get(&self.name).is_none_or(|facts| facts.ifindex != self.facts.ifindex)
    }

    /// Whether it can receive and send: its interface is there, and so are its sockets.
    pub fn is_live(&self) -> bool {
        !self.retired && (self.workerless || !self.sockets.is_empty())
    }
}

/// All ports, by number.
#[derive(Debug, Default)]
pub struct Ports {
    list: Vec<Port>,
    sizes: Option<RingSizes>,
    /// Interfaces that are there and could not be opened, why not, and when they were last tried.
    refused: BTreeMap<(String, Way), (String, Instant)>,
    /// How often ports have been let go of.
    burials: u32,
}

/// What a set of rules needs of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Rules take packets here.
    pub ingress: bool,
    /// Rules send here.
    pub egress: bool,
    /// Rules send super-frames here.
    pub coalesce: bool,
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

/// What a port was before a change: its use, whether our program was on it, rung and reason, whether it had sockets.
pub type Mark = (Use, bool, &'static str, String, bool);

impl Ports {
    /// For [`Maker::roll_back`].
    pub fn mark(&self) -> Vec<Mark> {
        let mark = |port: &Port| {
            let used = Use { ingress: port.ingress, egress: port.egress, coalesce: port.coalesce };
            (used, port.attached, port.backend, port.reason.clone(), !port.sockets.is_empty())
        };
        self.list.iter().map(mark).collect()
    }

    /// All ports in numeric order.
    pub fn list(&self) -> &[Port] {
        &self.list
    }

    /// Drops the sockets of ports whose frames the workers have taken back. Returns whether there were any.
    pub fn bury(&mut self) -> bool {
        let mut any = false;
        for port in self.list.iter_mut().filter(|port| port.retired) {
            port.sockets.clear();
            (port.retired, port.backend, port.reason) = (false, "none", "the interface is missing".into());
            any = true;
        }
        any
    }

    /// Whether interfaces went away, or came that rules wait for.
    pub fn differ(
        &self,
        needs: &BTreeMap<(String, Way), Use>,
        known: &BTreeMap<String, Interface>,
        gone: &BTreeSet<u32>,
        now: Instant,
    ) -> bool {
        let waits = |(name, way): &(String, Way)| {
            let due = self.refused.get(&(name.clone(), *way)).is_none_or(|(_, tried)| now >= *tried + REFUSED_RETRY);
            due && known.get(name).is_some_and(|facts| facts.up) && !self.is_served(name, *way)
        };
        self.list.iter().any(|port| port.retired || port.is_live() && port.is_stale(known, gone)) || needs.keys().any(waits)
    }

    /// Whether an interface has a port for this way, or for the rung below.
    fn is_served(&self, name: &str, way: Way) -> bool {
        self.list.iter().any(|port| port.name == name && port.is_live() && (port.way == way || port.way == Way::Packet))
    }

    /// When a refused interface is to be tried again.
    pub fn next_retry(&self) -> Option<Instant> {
        self.refused.values().map(|(_, tried)| *tried + REFUSED_RETRY).min()
    }

    /// Forgets refusals of interfaces that are not needed any more, or went away.
    pub fn forget_refused(&mut self, needs: &BTreeMap<(String, Way), Use>, known: &BTreeMap<String, Interface>) {
        self.refused.retain(|key, _| needs.contains_key(key) && known.contains_key(&key.0));
    }

    /// Whether an interface had a port once, or was refused one: then it is no news that it can't have one.
    fn was_there(&self, key: &(String, Way)) -> bool {
        self.refused.contains_key(key) || self.list.iter().any(|port| port.name == key.0)
    }

    /// Why an interface has no port now.
    pub fn why_not(&self, name: &str, known: &BTreeMap<String, Interface>) -> Option<String> {
        if self.list.iter().any(|port| port.name == name && port.is_live()) {
            return None;
        }
        let refused = self.refused.iter().find(|((refused, _), _)| refused == name).map(|(_, (why, _))| why.clone());
        Some(match known.get(name) {
            None => format!("interface {name} is missing"),
            Some(facts) if !facts.up => format!("interface {name} is down"),
            Some(_) => refused.unwrap_or_else(|| format!("interface {name} is being opened")),
        })
    }

    /// Takes over what the kernel says of interfaces that are still the same.
    pub fn refresh(&mut self, known: &BTreeMap<String, Interface>) {
        for port in self.list.iter_mut().filter(|port| port.is_live()) {
            if let Some(facts) = known.get(&port.name).filter(|facts| facts.ifindex == port.facts.ifindex) {
                port.facts = facts.clone();
            }
        }
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
        let receiving = self.list.iter().filter(|port| port.ingress && port.way == Way::Xsk && port.is_live()).count().max(1) as u32;
        let depth = (sizes.fill / receiving).max(64);
        self.list
            .iter()
            .map(|port| {
                let sockets = port.sockets.get(worker).filter(|_| port.is_live());
                PortManifest {
                    name: port.name.clone(),
                    ifindex: port.facts.ifindex,
                    queue: worker as u32,
                    kind: match (sockets, port.way) {
                        (None, _) => PortKind::Absent,
                        (_, Way::Xsk) => PortKind::Xsk,
                        (_, Way::Packet) => PortKind::Packet,
                    },
                    ingress: port.ingress,
                    egress: port.egress,
                    receive_fd: sockets.map_or(-1, |sockets| sockets.receive.as_raw_fd()),
                    send_fd: sockets.and_then(|sockets| sockets.send.as_ref()).map_or(-1, AsRawFd::as_raw_fd),
                    coalesce_fd: sockets.and_then(|sockets| sockets.coalesce.as_ref()).map_or(-1, AsRawFd::as_raw_fd),
                    sizes,
                    depth: if !port.ingress {
                        0
                    } else if port.way == Way::Xsk {
                        depth
                    } else {
                        256
                    },
                }
            })
            .collect()
    }

    /// Frames of a worker in the rings of interfaces that are gone. To be asked while the worker is dead.
    pub fn orphans(&self, worker: usize, frames: u32) -> OrphanList {
        let mut bits = Vec::new();
        let ledgers = self.list.iter().filter(|port| port.retired).filter_map(|port| port.sockets.get(worker)?.ledger.as_ref());
        for frame in ledgers.flat_map(PortLedger::addresses).map(|address| address / u64::from(FRAME_SIZE)) {
            bits.resize(bits.len().max((frames as usize).div_ceil(64)), 0);
            if let Some(word) = bits.get_mut(frame as usize / 64) {
                *word |= 1 << (frame % 64);
            }
        }
        OrphanList { frames: bits, serial: self.burials }
    }

    /// Descriptors a worker inherits.
    pub fn descriptors(&self, worker: usize) -> impl Iterator<Item = i32> + '_ {
        let sockets = self.list.iter().filter(|port| port.is_live()).filter_map(move |port| port.sockets.get(worker));
        let fds = |sockets: &PortSockets| {
            let [send, coalesce] = [&sockets.send, &sockets.coalesce].map(|socket| socket.as_ref().map(AsRawFd::as_raw_fd));
            [Some(sockets.receive.as_raw_fd()), send, coalesce]
        };
        sockets.flat_map(fds).flatten()
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
            let used = needs.entry((output.egress.clone(), way)).or_default();
            used.egress = true;
            used.coalesce |= rule.engine == EngineChoice::Coalesce;
        }
    }
    needs
}

/// Interfaces that rules name and that are not there: the rules wait for them.
pub fn missing<'a>(rules: &'a [Rule], known: &BTreeMap<String, Interface>) -> BTreeMap<&'a str, &'a str> {
    let named = rules.iter().flat_map(|rule| {
        std::iter::once(&rule.ingress).chain(rule.outputs.iter().map(|output| &output.egress)).map(|name| (name.as_str(), rule.id.as_str()))
    });
    named.filter(|(name, _)| !known.contains_key(*name)).collect()
}

/// Rules and options that contradict each other are refused, never quietly done another way.
pub fn check_supported(rules: &[Rule], options: &Options) -> Result<(), RunError> {
    for rule in rules {
        if options.backend == BackendChoice::Kernel && matches!(rule.path, PathChoice::Xsk | PathChoice::Packet) {
            let problem = format!("rule {} asks for a worker, and --backend kernel starts none", rule.id);
            return Err(RunError::bad("path", problem, "leave out path=, or use --backend auto"));
        }
        if rule.engine == EngineChoice::Coalesce && rule.exact {
            let problem = format!("engine=coalesce sends at most once, exact=yes asks for exactly once (rule {})", rule.id);
            return Err(RunError::bad("engine", problem, "use engine=tx, or exact=no"));
        }
    }
    Ok(())
}

impl Maker<'_> {
    /// Makes what is missing of `needs` where the interface is there and up; the rules of the others wait. Returns whether any
    /// port is new, goes, or is used in a new way (workers have to be replaced then). After an error [`Maker::roll_back`] drops
    /// what was made meanwhile. Unless `strict`, and for interfaces that were refused before, a refusal is no error but noted.
    pub fn ensure(
        &mut self,
        ports: &mut Ports,
        needs: &BTreeMap<(String, Way), Use>,
        known: &BTreeMap<String, Interface>,
        strict: bool,
    ) -> Result<bool, RunError> {
        let mut changed = ports.list.iter().any(|port| port.retired);
        for ((name, way), used) in needs {
            let key = (name.clone(), *way);
            let Some(facts) = known.get(name).filter(|facts| facts.up) else { continue };
            match self.ensure_one(ports, facts, *way, *used) {
                Ok(new) => {
                    changed |= new;
                    ports.refused.remove(&key);
                }
                Err(error) if strict && !ports.was_there(&key) => return Err(error),
                Err(error) => {
                    let why = error.to_string();
                    if ports.refused.get(&key).is_none_or(|(known, _)| *known != why) {
                        tracing::warn!(interface = %name, %error, "not opened, tried again every second");
                    }
                    ports.refused.insert(key, (why, Instant::now()));
                }
            }
        }
        Ok(changed)
    }

    /// Lets go of the ports whose interface is gone: detached, out of the tables; the sockets wait for the workers.
    pub fn retire(&mut self, ports: &mut Ports, known: &BTreeMap<String, Interface>, gone: &BTreeSet<u32>) {
        for (number, port) in ports.list.iter_mut().enumerate().filter(|(_, port)| port.is_live() && port.is_stale(known, gone)) {
            tracing::warn!(interface = %port.name, ifindex = port.facts.ifindex, "interface is gone: its rules wait for it");
            self.detach(port);
            if let (true, Some(program)) = (port.attached, self.program.as_mut()) {
                go_dark(program, number, port);
            }
            for statistics in port.sockets.iter().filter_map(|sockets| xdp::statistics(&sockets.receive).ok()) {
                port.past_drops[0] += statistics.rx_dropped;
                port.past_drops[1] += statistics.rx_ring_full;
            }
            (port.retired, port.attached, port.workerless) = (true, false, false);
            ports.burials += 1;
        }
    }

    /// Makes the ports what they were at `mark`.
    pub fn roll_back(&mut self, ports: &mut Ports, mark: &[Mark]) {
        for port in ports.list.drain(mark.len().min(ports.list.len())..) {
            self.detach(&port);
        }
        for (port, (used, attached, backend, reason, live)) in ports.list.iter_mut().zip(mark) {
            if port.attached && !attached {
                self.detach(port);
                (port.attached, port.backend, port.reason) = (false, backend, reason.clone());
            }
            if !live {
                port.sockets.clear();
                port.workerless = false;
            }
            (port.ingress, port.egress, port.coalesce) = (used.ingress, used.egress, used.coalesce);
        }
    }

    /// The sockets that take super-frames, one for each worker.
    fn add_coalescing(port: &mut Port) -> Result<(), RunError> {
        for sockets in &mut port.sockets {
            let failed = |error: packet_socket::SocketError| RunError::failure(error).with_hint("AF_PACKET needs CAP_NET_RAW");
            sockets.coalesce = Some(packet_socket::open_coalesce(port.facts.ifindex).map_err(failed)?);
        }
        port.coalesce = true;
        Ok(())
    }

    fn ensure_one(&mut self, ports: &mut Ports, facts: &Interface, way: Way, used: Use) -> Result<bool, RunError> {
        if facts.loopback || facts.mac.is_none() {
            let hint = "the relay sends and receives Ethernet frames: use an interface with a MAC address (tap, veth, a NIC)";
            return Err(RunError::bad("interface", format!("{} has no MAC address (tun, loopback)", facts.name), hint));
        }
        let found = ports.list.iter().position(|port| port.name == facts.name && port.way == way);
        if found.is_none() && ports.list.len() >= MAX_PORTS {
            return Err(RunError::bad("interface", format!("more than {MAX_PORTS} interfaces"), "use a second relay"));
        }
        match found.and_then(|at| ports.list.get_mut(at)) {
            Some(port) if port.retired => return Ok(true),
            Some(port) if port.is_live() => return self.widen(port, facts, used),
            _ => {}
        }
        let mut port = match way {
            Way::Packet => self.packet_port(facts, used, "asked for by --backend packet or path=packet".into())?,
            Way::Xsk => self.xsk_or_packet(ports, facts, used)?,
        };
        if used.coalesce {
            Self::add_coalescing(&mut port)?;
        }
        let found = ports.list.iter_mut().find(|other| other.name == port.name && other.way == port.way);
        match found {
            Some(other) if other.is_live() || other.retired => {
                // Driven by the rung below already.
                return Self::widen_use(other, used);
            }
            Some(absent) => {
                tracing::info!(interface = %port.name, ifindex = port.facts.ifindex, "interface is back");
                *absent = Port {
                    past_drops: absent.past_drops,
                    ingress: port.ingress || absent.ingress,
                    egress: port.egress || absent.egress,
                    ..port
                };
            }
            None => ports.list.push(port),
        }
        Ok(true)
    }

    /// Uses a live port in further ways.
    fn widen(&mut self, port: &mut Port, facts: &Interface, used: Use) -> Result<bool, RunError> {
        if used.ingress && !port.ingress && port.way == Way::Xsk {
            let attached = self.attach(facts).and_then(|rung| self.check_queues(facts).map(|()| rung));
            (port.backend, port.reason) = attached.map_err(|error| self.refusal(error))?;
            port.attached = true;
        }
        Self::widen_use(port, used)
    }

    /// Notes the further uses, and says whether there are any.
    fn widen_use(port: &mut Port, used: Use) -> Result<bool, RunError> {
        let new = (used.ingress && !port.ingress) || (used.egress && !port.egress) || (used.coalesce && !port.coalesce);
        (port.ingress, port.egress) = (port.ingress || used.ingress, port.egress || used.egress);
        if used.coalesce && !port.coalesce && port.is_live() {
            Self::add_coalescing(port)?;
        }
        Ok(new)
    }

    /// AF_XDP, or the rung below where that was not insisted on (DECISIONS §13).
    fn xsk_or_packet(&mut self, ports: &mut Ports, facts: &Interface, used: Use) -> Result<Port, RunError> {
        let sizes = *ports.sizes.get_or_insert_with(|| ring_sizes(self.options.frames));
        let refused = match self.xsk_port(ports, facts, used, sizes) {
            Ok(port) => return Ok(port),
            Err(error) => error,
        };
        let insisted = matches!(self.options.backend, BackendChoice::Xsk | BackendChoice::Kernel)
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
            let first = ports.list.iter().find(|port| port.way == Way::Xsk && port.is_live()).and_then(|port| port.sockets.get(worker));
            match create(umem, spec, first.map(|first| &first.receive)) {
                Ok(socket) => {
                    if socket.zero_copy {
                        backend = "af_xdp_zero_copy";
                    }
                    let ledger = PortLedger::open(&socket.fd, sizes).map_err(|error| ProgramError::Diagnostics(error.to_string()))?;
                    sockets.push(PortSockets { receive: socket.fd, send: None, coalesce: None, ledger: Some(ledger) });
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
            coalesce: false,
            sockets,
            attached: used.ingress,
            retired: false,
            workerless: self.umems.is_empty(),
            past_drops: [0; 2],
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
            sockets.push(PortSockets { receive, send: Some(send), coalesce: None, ledger: None });
        }
        Ok(Port {
            name: facts.name.clone(),
            way: Way::Packet,
            facts: facts.clone(),
            backend: "af_packet",
            reason,
            ingress: used.ingress,
            egress: used.egress,
            coalesce: false,
            sockets,
            attached: false,
            retired: false,
            workerless: self.umems.is_empty(),
            past_drops: [0; 2],
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
