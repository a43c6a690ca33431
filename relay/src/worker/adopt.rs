//! From inherited descriptors to a data path that is ready to recover: the Boot state, in two steps.
//!
//! ```text
//! from_environment: descriptors → Mapped      all that can be made while a predecessor works: nothing of its state is read
//! Mapped::adopt:    Mapped → Adopted          once it is dead: the lock is taken, every index read
//! ```
//! A spare waits between the two, in its box (worker/spare.rs), so the second step makes no system call but that for the locks.
//! Each failure is one line that names the variable, the descriptor or the call. Must never trust a descriptor before
//! its seals, size and magic have been checked.

use super::ledger::Ledger;
use super::orphans::{Orphans, OrphansError};
use super::port::{AnyReceive, AnyTransmit, NoReceive};
use crate::datapath::egress::{Egress, EgressBooks, EgressPort, Lane, PortState};
use crate::datapath::ingress::{Bundling, Ingress, IngressParts, IngressPort};
use crate::datapath::journal::Journal;
use crate::datapath::latency::{Stamper, stamps};
use crate::datapath::table::Table;
use crate::datapath::tap::Tap;
use crate::frame::HeldMap;
use crate::frame::{FRAME_SIZE, Pool, RawDesc, Umem};
use crate::nic::afpacket::{DEFAULT_DEPTH, PacketReceive, PacketTransmit, Reason};
use crate::nic::afxdp::{self, port::AdoptError};
use crate::plan::manifest::{Command, Manifest, ManifestError, Orders, PortKind, PortManifest};
use crate::plan::records::{RULES_LEN, RecordsError, RulesSegment};
use crate::plan::status::{FrameStats, RUNG_PLAIN, RungReport, StatusError, StatusPage};
use crate::plan::tap::TapClaim;
use crate::plan::work::WorkLayout;
use crate::ring::{self, Consumer, Memory, Producer, RingError};
use crate::shm::discovery::{Environment, take_fd};
use crate::shm::{Access, Actor, ChannelError, Claim, Segment, State, Writer, discovery};
use crate::sys::shared::OutOfMapping;
use crate::sys::{Mapping, SharedArray, SharedWord};
use bytemuck::Pod;
use nix::errno::Errno;
use std::hash::RandomState;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

/// Why a worker could not start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The environment, a descriptor of the manifest, or what lies in one.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The environment and the control segment speak of two workers.
    #[error("RELAY_WORKER_ID: is {said}, but RELAY_CONTROL_CHANNEL leads to the manifest of worker {manifest}")]
    Identity {
        /// By the environment.
        said: u32,
        /// By the manifest.
        manifest: u32,
    },
    /// A descriptor is not what the manifest says.
    #[error("descriptor {fd} ({role}): {errno}")]
    Descriptor {
        /// What it should be.
        role: &'static str,
        /// Its number.
        fd: i32,
        /// Why not.
        errno: Errno,
    },
    /// The manifest can't be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The status segment can't be used.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// The rules segment can't be read.
    #[error(transparent)]
    Records(#[from] RecordsError),
    /// A port can't be adopted.
    #[error("port {name}: {error}")]
    Port {
        /// Interface.
        name: String,
        /// Why.
        error: AdoptError,
    },
    /// A ring of ours is corrupt.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A segment is too small.
    #[error(transparent)]
    Layout(#[from] OutOfMapping),
    /// What is left of interfaces that are gone can't be told.
    #[error(transparent)]
    Orphans(#[from] OrphansError),
}

/// Everything of a worker that is not its predecessor's.
pub struct Mapped {
    /// What the supervisor wants.
    pub manifest: Manifest,
    orders: Orders,
    pub(super) status: StatusPage,
    claim: Claim<FrameStats>,
    /// The rules.
    pub rules: RulesSegment,
    /// Those in force when it was mapped, or later.
    pub table: Option<Table>,
    layout: WorkLayout,
    umem: Arc<Umem>,
    work: Arc<Mapping>,
    ports: Vec<MappedPort>,
    tap: Option<TapClaim>,
    /// EOF on it is the supervisor's death.
    pub life: OwnedFd,
}

/// A port with everything made for it.
struct MappedPort {
    halves: Halves,
    coalescer: Option<(AnyTransmit, Bundling)>,
}

enum Halves {
    Absent,
    Xsk(afxdp::Mapped, afxdp::ledger::PortLedger),
    Packet(Option<AnyReceive>, AnyTransmit),
}

/// A worker that has everything but has not started.
pub struct Adopted {
    /// What the supervisor wants.
    pub manifest: Manifest,
    /// Commands of the supervisor.
    pub orders: Orders,
    /// What the worker says of itself.
    pub status: StatusPage,
    /// Where it reports its frames.
    pub reports: Writer<FrameStats>,
    /// The rules.
    pub rules: RulesSegment,
    /// The rules as the data path wants them, perhaps of an older epoch.
    pub table: Option<Table>,
    /// Ingress side.
    pub ingress: Ingress<AnyReceive>,
    /// Egress side.
    pub egress: Egress<AnyTransmit>,
    /// Where the frames are.
    pub ledger: Ledger,
    /// EOF on it is the supervisor's death.
    pub life: OwnedFd,
    /// Frames of interfaces that are gone.
    pub orphans: Orphans,
}

/// Reads the environment of the process.
pub fn from_environment() -> Result<Mapped, BootError> {
    let environment = Environment::read(|name| std::env::var_os(name))?;
    let said = environment.worker_id;
    let (control, claim) = environment.open::<Command, FrameStats>()?;
    let orders = Orders::new(control);
    let manifest = orders.manifest()?;
    if manifest.worker != said {
        return Err(BootError::Identity { said, manifest: manifest.worker });
    }
    map(manifest, orders, claim)
}

/// An inherited descriptor, by its role.
pub(super) fn inherited(role: &'static str, fd: i32) -> Result<OwnedFd, BootError> {
    take_fd(role, fd).map_err(BootError::from)
}

fn segment(role: &'static str, fd: i32, len: usize, access: Access) -> Result<Arc<Mapping>, BootError> {
    let segment = Segment::join(inherited(role, fd)?, access).and_then(|segment| segment.at_least(len));
    Ok(segment.map_err(|error| ChannelError::from(error).of(role))?.into_parts().1)
}

fn map(manifest: Manifest, orders: Orders, claim: Claim<FrameStats>) -> Result<Mapped, BootError> {
    let layout = WorkLayout::new(manifest.frame_count, manifest.egress_capacity);
    let umem_len = manifest.frame_count as usize * FRAME_SIZE as usize;
    let umem = segment("UMEM", manifest.umem_fd, umem_len, Access::ReadWrite)?;
    let umem = Arc::new(Umem::new(Arc::into_inner(umem).ok_or(BootError::Descriptor {
        role: "UMEM",
        fd: manifest.umem_fd,
        errno: Errno::EBUSY,
    })?));
    let work = segment("work segment", manifest.work_fd, layout.len, Access::ReadWrite)?;
    let rules = RulesSegment::join(&segment("rules segment", manifest.rules_fd, RULES_LEN, Access::ReadOnly)?)?;
    let life = inherited("life socket", manifest.life_fd)?;
    let maker = PortMaker { manifest: &manifest, umem: &umem, work: &work, layout: &layout };
    let ports = manifest.ports.iter().map(|port| maker.make(port)).collect::<Result<_, _>>()?;
    let tap = tap(manifest.tap_fd)?;
    let status = StatusPage::of(claim.segment())?;
    Ok(Mapped { manifest, orders, status, claim, rules, table: None, layout, umem, work, ports, tap, life })
}

/// A ring that a predecessor has spoiled costs its captures, never the forwarding.
fn tap(fd: i32) -> Result<Option<TapClaim>, BootError> {
    let ring = TapClaim::open(inherited("tap ring", fd)?);
    Ok(ring.inspect_err(nothing_captured).ok())
}

fn nothing_captured(error: &ChannelError) {
    eprintln!("worker: nothing can be captured: {error}");
}

/// Makes what ports need in this process.
struct PortMaker<'a> {
    manifest: &'a Manifest,
    umem: &'a Arc<Umem>,
    work: &'a Arc<Mapping>,
    layout: &'a WorkLayout,
}

impl PortMaker<'_> {
    fn make(&self, port: &PortManifest) -> Result<MappedPort, BootError> {
        let halves = match port.kind {
            PortKind::Absent => Halves::Absent,
            PortKind::Xsk => Self::xsk(port)?,
            PortKind::Packet => self.packet(port)?,
        };
        let coalesces = port.kind != PortKind::Absent && port.coalesce_fd >= 0;
        Ok(MappedPort { halves, coalescer: coalesces.then(|| self.coalescer(port.coalesce_fd)).transpose()? })
    }

    fn xsk(port: &PortManifest) -> Result<Halves, BootError> {
        let fd = inherited("AF_XDP socket", port.receive_fd)?;
        let failed = |error| BootError::Port { name: port.name.clone(), error };
        let ledger = afxdp::ledger::PortLedger::open(&fd, port.sizes).map_err(failed)?;
        Ok(Halves::Xsk(afxdp::map(Arc::new(fd), port.sizes).map_err(failed)?, ledger))
    }

    fn packet(&self, port: &PortManifest) -> Result<Halves, BootError> {
        let receive = Some(inherited("receiving AF_PACKET socket", port.receive_fd)?).filter(|_| port.ingress);
        let send = inherited("sending AF_PACKET socket", port.send_fd)?;
        let failed = |errno| BootError::Descriptor { role: "receiving AF_PACKET socket", fd: port.receive_fd, errno };
        let engines = self.manifest.io_uring;
        let held = self.held()?;
        let open = |socket| PacketReceive::open(socket, self.umem, DEFAULT_DEPTH, held, engines).map_err(failed);
        let receive = receive.map(open).transpose()?.map(|receive| AnyReceive::Packet(Box::new(receive)));
        let transmit = PacketTransmit::open(send, self.umem, DEFAULT_DEPTH, self.held_by_senders()?, engines);
        Ok(Halves::Packet(receive, AnyTransmit::Packet(Box::new(transmit))))
    }

    fn coalescer(&self, fd: i32) -> Result<(AnyTransmit, Bundling), BootError> {
        let socket = inherited("AF_PACKET socket for super-frames", fd)?;
        let pays = Bundling::default();
        let half = PacketTransmit::coalesce(socket, self.umem, self.held_by_senders()?, Arc::clone(&pays));
        Ok((AnyTransmit::Packet(Box::new(half)), pays))
    }

    fn held(&self) -> Result<SharedArray<u8>, OutOfMapping> {
        SharedArray::new(self.work, self.layout.held, self.manifest.frame_count as usize)
    }

    fn held_by_senders(&self) -> Result<SharedArray<u8>, OutOfMapping> {
        let frames = self.manifest.frame_count;
        SharedArray::new(self.work, self.layout.held_by_senders(frames), frames as usize)
    }
}

impl Mapped {
    /// Has done now what would take time, or a call that the box does not have, later: page tables of the rings, the seed of hash
    /// tables. Those of the UMEM are left to faults: filling them held the worker's CPU for milliseconds, and one fault fills sixteen.
    pub fn populate(&self) {
        let _ = RandomState::new();
        let rings = self.layout.egress_ring(self.manifest.ports.len());
        // Where the kernel refuses, it costs faults too.
        let _ = self.work.populate(rings);
    }

    /// Goes on where the predecessor has stopped for ever.
    pub fn adopt(self) -> Result<Adopted, BootError> {
        let Self { manifest, orders, status, claim, rules, table, layout, umem, work, ports, tap, life } = self;
        // A spare with a listener may be here before the kernel has dropped the locks of whom it stands in for.
        let is_early = manifest.spare.is_some_and(|spare| spare.listener_fd >= 0);
        let reports = if is_early { claim.succeed() } else { claim.take() }.map_err(|error| error.of(discovery::STATUS))?;
        let take_tap = if is_early { TapClaim::succeed } else { TapClaim::take };
        if manifest.spare.is_some() {
            status.header.become_state(State::Boot, Actor::Spare).map_err(ChannelError::from)?;
        }
        initialise(&work, &layout, &manifest)?;
        let mut parts = Parts::new(status.rungs.clone());
        for (number, (port, mapped)) in manifest.ports.iter().zip(ports).enumerate() {
            parts.adopt_port((&work, &layout), number, port, mapped)?;
        }
        let orphans = Orphans::new(&work, &layout, &manifest)?;
        let ledger = Ledger::new(&work, &layout, manifest.frame_count, parts.ledgers)?;
        let memory: Arc<dyn Memory> = Arc::<Mapping>::clone(&work);
        let frames = manifest.frame_count as usize;
        let ingress = Ingress::new(IngressParts {
            umem,
            pool: Pool::attach(&work, layout.pool, manifest.frame_count)?,
            journal: Journal::attach(&work, layout.ingress_journal)?,
            ports: parts.receive,
            egress: parts.egress,
            returns: Consumer::attach(Arc::clone(&memory), layout.return_ring)?,
            counters: status.ingress.clone(),
            held: HeldMap::new(SharedArray::new(&work, layout.held, frames)?),
            held_by_senders: HeldMap::new(SharedArray::new(&work, layout.held_by_senders(manifest.frame_count), frames)?),
            stamps: parts.stamps,
            bundling: parts.bundling,
            tap: tap.and_then(|tap| take_tap(tap).inspect_err(nothing_captured).ok()).map(Tap::new).unwrap_or_default(),
        });
        let books = EgressBooks { counters: status.egress.clone(), ports: status.sends.clone(), latency: status.latency.clone() };
        let returns = Producer::attach(memory, layout.return_ring)?;
        let egress = Egress::new(Journal::attach(&work, layout.egress_journal)?, parts.transmit, returns, books);
        Ok(Adopted { manifest, orders, status, reports, rules, table, ingress, egress, ledger, life, orphans })
    }
}

/// Fills a fresh work segment; leaves one that a predecessor has used as it is, but for rings of ports it did not have.
fn initialise(work: &Arc<Mapping>, layout: &WorkLayout, manifest: &Manifest) -> Result<(), BootError> {
    let used = SharedWord::new(work, 0)?;
    if used.load(Acquire) == 0 {
        Pool::attach(work, layout.pool, manifest.frame_count)?.fill(manifest.frame_count);
        ring::init::<u64>(work.as_ref(), layout.return_ring, manifest.frame_count)?;
        used.store(1, Release);
    }
    for number in 0..manifest.ports.len() {
        ensure_ring::<RawDesc>(work, layout.egress_ring(number), layout.egress_capacity)?;
    }
    Ok(())
}

fn ensure_ring<T: Pod>(work: &Arc<Mapping>, offset: usize, capacity: u32) -> Result<(), RingError> {
    match Consumer::<T>::attach(Arc::<Mapping>::clone(work), offset) {
        Err(RingError::Magic(0)) => ring::init::<T>(work.as_ref(), offset, capacity),
        other => other.map(drop),
    }
}

struct Parts {
    receive: Vec<IngressPort<AnyReceive>>,
    transmit: Vec<EgressPort<AnyTransmit>>,
    egress: Vec<Option<Producer<RawDesc>>>,
    stamps: Vec<Option<Stamper>>,
    bundling: Vec<Option<Bundling>>,
    ledgers: Vec<afxdp::ledger::PortLedger>,
    rungs: SharedArray<RungReport>,
}

impl Parts {
    const fn new(rungs: SharedArray<RungReport>) -> Self {
        Self {
            receive: Vec::new(),
            transmit: Vec::new(),
            egress: Vec::new(),
            stamps: Vec::new(),
            bundling: Vec::new(),
            ledgers: Vec::new(),
            rungs,
        }
    }

    fn adopt_port(
        &mut self,
        (work, layout): (&Arc<Mapping>, &WorkLayout),
        number: usize,
        port: &PortManifest,
        MappedPort { halves, coalescer }: MappedPort,
    ) -> Result<(), BootError> {
        let (receive, transmit) = match halves {
            Halves::Xsk(mapped, ledger) => {
                self.ledgers.push(ledger);
                let (receive, transmit) = mapped.go_on(port.depth);
                (Some(AnyReceive::Xsk(receive)).filter(|_| port.ingress), AnyTransmit::Xsk(transmit))
            }
            Halves::Packet(receive, transmit) => (receive, transmit),
            Halves::Absent => {
                if port.ingress {
                    self.receive.push(IngressPort { receive: AnyReceive::Absent(NoReceive), number, ifindex: port.ifindex });
                }
                self.egress.push(None);
                self.stamps.push(None);
                self.bundling.push(None);
                return Ok(());
            }
        };
        let rung = receive.as_ref().map_or_else(|| transmit.rung(), AnyReceive::rung);
        if rung.rung == RUNG_PLAIN && rung != self.rungs.get(number) {
            eprintln!("worker: port {}: af_packet_plain: {}", port.name, Reason::from_raw(rung.errno));
        }
        self.rungs.set(number, rung);
        self.receive.extend(receive.map(|receive| IngressPort { receive, number, ifindex: port.ifindex }));
        let memory: Arc<dyn Memory> = Arc::<Mapping>::clone(work);
        let ring = Consumer::attach(Arc::clone(&memory), layout.egress_ring(number))?;
        let (stamper, meter) = stamps()?;
        let (coalescer, pays) = coalescer.unzip();
        let state = PortState::default();
        self.transmit.push(EgressPort { transmit, coalescer, lane: Lane::Direct, ring, number, state, meter: Some(meter) });
        self.stamps.push(Some(stamper));
        self.bundling.push(pays);
        self.egress.push(if port.egress { Some(Producer::attach(memory, layout.egress_ring(number))?) } else { None });
        Ok(())
    }
}
