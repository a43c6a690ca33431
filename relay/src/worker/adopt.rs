//! From inherited descriptors to a data path that is ready to recover: the Boot state.
//!
//! Each failure is one line that names the variable, the descriptor or the call. Must never trust a descriptor before
//! its seals, size and magic have been checked.

use super::ledger::Ledger;
use super::orphans::{Orphans, OrphansError};
use super::port::{AnyReceive, AnyTransmit, NoReceive};
use crate::datapath::egress::{Egress, EgressBooks, EgressPort, Lane, PortState};
use crate::datapath::ingress::{Ingress, IngressParts, IngressPort};
use crate::datapath::journal::Journal;
use crate::datapath::latency::{Stamper, stamps};
use crate::datapath::tap::Tap;
use crate::frame::HeldMap;
use crate::frame::{FRAME_SIZE, Pool, RawDesc, Umem};
use crate::nic::afpacket::{DEFAULT_DEPTH, Engines, PacketReceive, PacketTransmit, Reason};
use crate::nic::afxdp::{self, port::AdoptError};
use crate::plan::manifest::{Command, Manifest, ManifestError, Orders, PortKind, PortManifest};
use crate::plan::records::{RULES_LEN, RecordsError, RulesSegment};
use crate::plan::status::{FrameStats, RUNG_PLAIN, RungReport, StatusError, StatusPage};
use crate::plan::tap::TapWriter;
use crate::plan::work::WorkLayout;
use crate::ring::{self, Consumer, Memory, Producer, RingError};
use crate::shm::discovery::{Environment, take_fd};
use crate::shm::{Access, ChannelError, Child, Segment, Writer};
use crate::sys::shared::OutOfMapping;
use crate::sys::{Mapping, SharedArray, SharedWord};
use bytemuck::Pod;
use nix::errno::Errno;
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
pub fn from_environment() -> Result<Adopted, BootError> {
    let environment = Environment::read(|name| std::env::var_os(name))?;
    let said = environment.worker_id;
    let Child { control, status: reports } = environment.attach::<Command, FrameStats>()?;
    let orders = Orders::new(control);
    let manifest = orders.manifest()?;
    if manifest.worker != said {
        return Err(BootError::Identity { said, manifest: manifest.worker });
    }
    adopt(manifest, orders, reports)
}

fn inherited(role: &'static str, fd: i32) -> Result<OwnedFd, BootError> {
    take_fd(role, fd).map_err(BootError::from)
}

fn segment(role: &'static str, fd: i32, len: usize, access: Access) -> Result<Arc<Mapping>, BootError> {
    let segment = Segment::join(inherited(role, fd)?, access).and_then(|segment| segment.at_least(len));
    Ok(segment.map_err(|error| ChannelError::from(error).of(role))?.into_parts().1)
}

fn adopt(manifest: Manifest, orders: Orders, reports: Writer<FrameStats>) -> Result<Adopted, BootError> {
    let status = StatusPage::of(reports.segment())?;
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
    initialise(&work, &layout, &manifest)?;
    let held = SharedArray::new(&work, layout.held, manifest.frame_count as usize)?;
    let held_by_senders = SharedArray::new(&work, layout.held_by_senders(manifest.frame_count), manifest.frame_count as usize)?;
    let mut parts = Parts {
        umem: Arc::clone(&umem),
        held: held.clone(),
        held_by_senders: held_by_senders.clone(),
        receive: Vec::new(),
        transmit: Vec::new(),
        egress: Vec::new(),
        stamps: Vec::new(),
        ledgers: Vec::new(),
        engines: manifest.io_uring,
        rungs: status.rungs.clone(),
    };
    for (number, port) in manifest.ports.iter().enumerate() {
        parts.adopt_port(&work, &layout, number, port)?;
    }
    let orphans = Orphans::new(&work, &layout, &manifest)?;
    let ledger = Ledger::new(&work, &layout, manifest.frame_count, parts.ledgers)?;
    let memory: Arc<dyn Memory> = Arc::<Mapping>::clone(&work);
    let ingress = Ingress::new(IngressParts {
        umem,
        pool: Pool::attach(&work, layout.pool, manifest.frame_count)?,
        journal: Journal::attach(&work, layout.ingress_journal)?,
        ports: parts.receive,
        egress: parts.egress,
        returns: Consumer::attach(Arc::clone(&memory), layout.return_ring)?,
        counters: status.ingress.clone(),
        held: HeldMap::new(held),
        held_by_senders: HeldMap::new(held_by_senders),
        stamps: parts.stamps,
        tap: tap(manifest.tap_fd)?,
    });
    let books = EgressBooks { counters: status.egress.clone(), ports: status.sends.clone(), latency: status.latency.clone() };
    let returns = Producer::attach(memory, layout.return_ring)?;
    let egress = Egress::new(Journal::attach(&work, layout.egress_journal)?, parts.transmit, returns, books);
    Ok(Adopted { manifest, orders, status, reports, rules, ingress, egress, ledger, life, orphans })
}

/// A ring that a predecessor has spoiled costs its captures, never the forwarding.
fn tap(fd: i32) -> Result<Tap, BootError> {
    let ring = TapWriter::adopt(inherited("tap ring", fd)?);
    Ok(ring.inspect_err(|error| eprintln!("worker: nothing can be captured: {error}")).map(Tap::new).unwrap_or_default())
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
    umem: Arc<Umem>,
    held: SharedArray<u8>,
    held_by_senders: SharedArray<u8>,
    receive: Vec<IngressPort<AnyReceive>>,
    transmit: Vec<EgressPort<AnyTransmit>>,
    egress: Vec<Option<Producer<RawDesc>>>,
    stamps: Vec<Option<Stamper>>,
    ledgers: Vec<afxdp::ledger::PortLedger>,
    engines: Engines,
    rungs: SharedArray<RungReport>,
}

impl Parts {
    fn adopt_port(&mut self, work: &Arc<Mapping>, layout: &WorkLayout, number: usize, port: &PortManifest) -> Result<(), BootError> {
        let (receive, transmit) = match port.kind {
            PortKind::Xsk => self.adopt_xsk(port)?,
            PortKind::Packet => self.adopt_packet(port)?,
            PortKind::Absent => {
                if port.ingress {
                    self.receive.push(IngressPort { receive: AnyReceive::Absent(NoReceive), number, ifindex: port.ifindex });
                }
                self.egress.push(None);
                self.stamps.push(None);
                return Ok(());
            }
        };
        let rung = if port.ingress { receive.rung() } else { transmit.rung() };
        if rung.rung == RUNG_PLAIN && rung != self.rungs.get(number) {
            eprintln!("worker: port {}: af_packet_plain: {}", port.name, Reason::from_raw(rung.errno));
        }
        self.rungs.set(number, rung);
        if port.ingress {
            self.receive.push(IngressPort { receive, number, ifindex: port.ifindex });
        }
        let memory: Arc<dyn Memory> = Arc::<Mapping>::clone(work);
        let ring = Consumer::attach(Arc::clone(&memory), layout.egress_ring(number))?;
        let coalescer = if port.coalesce_fd < 0 { None } else { Some(self.adopt_coalescer(port.coalesce_fd)?) };
        let (stamper, meter) = stamps()?;
        let state = PortState::default();
        self.transmit.push(EgressPort { transmit, coalescer, lane: Lane::Direct, ring, number, state, meter: Some(meter) });
        self.stamps.push(Some(stamper));
        self.egress.push(if port.egress { Some(Producer::attach(memory, layout.egress_ring(number))?) } else { None });
        Ok(())
    }

    fn adopt_packet(&self, port: &PortManifest) -> Result<(AnyReceive, AnyTransmit), BootError> {
        let receive = inherited("receiving AF_PACKET socket", port.receive_fd)?;
        let send = inherited("sending AF_PACKET socket", port.send_fd)?;
        let failed = |errno| BootError::Descriptor { role: "receiving AF_PACKET socket", fd: port.receive_fd, errno };
        let receive = PacketReceive::open(receive, &self.umem, DEFAULT_DEPTH, self.held.clone(), self.engines).map_err(failed)?;
        let transmit = PacketTransmit::open(send, &self.umem, DEFAULT_DEPTH, self.held_by_senders.clone(), self.engines);
        Ok((AnyReceive::Packet(Box::new(receive)), AnyTransmit::Packet(Box::new(transmit))))
    }

    fn adopt_coalescer(&self, fd: i32) -> Result<AnyTransmit, BootError> {
        let socket = inherited("AF_PACKET socket for super-frames", fd)?;
        Ok(AnyTransmit::Packet(Box::new(PacketTransmit::coalesce(socket, &self.umem, self.held_by_senders.clone()))))
    }

    fn adopt_xsk(&mut self, port: &PortManifest) -> Result<(AnyReceive, AnyTransmit), BootError> {
        let fd = inherited("AF_XDP socket", port.receive_fd)?;
        let failed = |error| BootError::Port { name: port.name.clone(), error };
        self.ledgers.push(afxdp::ledger::PortLedger::open(&fd, port.sizes).map_err(failed)?);
        let (receive, transmit) = afxdp::adopt(Arc::new(fd), port.sizes, port.depth).map_err(failed)?;
        Ok((AnyReceive::Xsk(receive), AnyTransmit::Xsk(transmit)))
    }
}
