//! The XDP program from user space: load it, fill its tables, attach it, count.
//!
//! The only production loader. Nothing is pinned: program, maps and links die with the last descriptor. Must never know
//! a rule: the planner turns rules into keys. Every call is a handful of `bpf(2)` calls and none waits for a grace period.

mod before;
mod btf;
mod error;
pub mod kernel;
mod link;
mod outcome;
mod query;

pub use before::Sums;
pub use error::ProgramError;
pub use kernel::{Counted, KernelTables};
pub use link::{Attachment, Mode};
pub use query::{InterfaceXdp, interface_xdp, program_name as name_of};

use aya::maps::{HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, XskMap, lpm_trie::Key};
use aya::programs::Xdp;
use aya::{Ebpf, EbpfLoader};
use before::{Before, COUNTERS, KERNEL_DROPS, OUTPUT_TX, REFUSED, RULE_RX};
use relay_common::{
    CounterValue, IngressConfig, MAX_MATCHES, MAX_QUEUES, MAX_SOURCES, MatchEntry, MatchKey, SOURCE_KEY_BITS, SourceKey, SourceVerdict,
    XdpCounter,
};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The production object.
pub static RELAY_OBJECT: &[u8] = aya::include_bytes_aligned!("object/relay.bpf.o");
/// The same with aya-log's diagnostics.
pub static RELAY_LOG_OBJECT: &[u8] = aya::include_bytes_aligned!("object/relay-log.bpf.o");
/// The programs of benchmarks and tests.
pub static LAB_OBJECT: &[u8] = aya::include_bytes_aligned!("object/lab.bpf.o");

/// The programs, best first: with the kernel path (needs CAP_PERFMON), without it, and for kernels that refuse programs for
/// packets in several buffers.
const RUNGS: [Rung; 3] = [
    Rung { program: "relay", multi_buffer: true, kernel: true },
    Rung { program: "relay_plain", multi_buffer: true, kernel: false },
    Rung { program: "relay_single", multi_buffer: false, kernel: false },
];

/// One of the programs that can be loaded.
#[derive(Clone, Copy, Debug)]
struct Rung {
    program: &'static str,
    multi_buffer: bool,
    kernel: bool,
}

/// How to load.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions<'a> {
    /// Entries of the match table.
    pub matches: u32,
    /// Entries of the source prefix table.
    pub sources: u32,
    /// Log malformed packets through aya-log; see [`Program::flush_diagnostics`].
    pub diagnostics: bool,
    /// Another object than the embedded one (checks of freshly built objects).
    pub object: Option<&'a [u8]>,
    /// Don't try the program for packets in several buffers (tests of what older kernels get).
    pub single_buffer: bool,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        Self { matches: MAX_MATCHES, sources: MAX_SOURCES, diagnostics: false, object: None, single_buffer: false }
    }
}

/// All counters of one interface's slot, in the order of [`XdpCounter::ALL`].
pub type Counters = [CounterValue; XdpCounter::COUNT as usize];

/// Index into the socket table of queue `queue` of the interface in `slot`.
pub const fn socket_index(slot: u32, queue: u32) -> u32 {
    slot * MAX_QUEUES + queue
}

/// The loaded program with its tables and links.
pub struct Program {
    links: BTreeMap<u32, link::Link>,
    ingress: HashMap<MapData, u32, IngressConfig>,
    matches: HashMap<MapData, MatchKey, MatchEntry>,
    sources: LpmTrie<MapData, SourceKey, SourceVerdict>,
    sockets: XskMap<MapData>,
    counters: PerCpuArray<MapData, CounterValue>,
    counting: Vec<(&'static str, OwnedFd)>,
    before: Before,
    diagnostics: Option<Box<dyn FnMut() + Send>>,
    rung: Rung,
    kernel: Result<KernelTables, String>,
    ebpf: Ebpf,
}

impl Program {
    /// Loads the object and has the kernel verify the program: the one for packets in several buffers, or, where the
    /// kernel refuses that (before 5.18), the other. Needs CAP_BPF and CAP_NET_ADMIN.
    pub fn load(options: &LoadOptions<'_>) -> Result<Self, ProgramError> {
        let mut first = None;
        for rung in RUNGS.into_iter().filter(|rung| !options.single_buffer || !rung.multi_buffer) {
            match Self::load_as(options, rung, first.as_ref()) {
                Err(refused @ ProgramError::Load { .. }) => first = first.or(Some(refused)),
                other => return other,
            }
        }
        Err(first.unwrap_or(ProgramError::Missing { kind: "program", name: "relay" }))
    }

    /// `refused`: what the kernel said of the rung above.
    fn load_as(options: &LoadOptions<'_>, rung: Rung, refused: Option<&ProgramError>) -> Result<Self, ProgramError> {
        let mut ebpf = open(options, rung.multi_buffer)?;
        xdp(&mut ebpf, rung.program)?.load().map_err(|error| ProgramError::load(rung.program, error))?;
        let diagnostics = if options.diagnostics { Some(logger(&mut ebpf)?) } else { None };
        Ok(Self {
            links: BTreeMap::new(),
            counting: [COUNTERS, RULE_RX, OUTPUT_TX, REFUSED, KERNEL_DROPS]
                .map(|name| duplicate(&ebpf, name))
                .into_iter()
                .collect::<Result<_, _>>()?,
            before: Before::default(),
            ingress: map(&mut ebpf, "INGRESS")?,
            matches: map(&mut ebpf, "MATCHES")?,
            sources: map(&mut ebpf, "SOURCES")?,
            sockets: map(&mut ebpf, "XSKS")?,
            counters: map(&mut ebpf, COUNTERS)?,
            diagnostics,
            kernel: kernel_tables(&mut ebpf, rung, refused),
            rung,
            ebpf,
        })
    }

    /// Whether packets in several buffers reach the program (else the driver limits the MTU).
    pub fn multi_buffer(&self) -> bool {
        self.rung.multi_buffer
    }

    /// The kernel path's tables, or why there is none.
    pub fn kernel(&self) -> Result<&KernelTables, &str> {
        self.kernel.as_ref().map_err(String::as_str)
    }

    /// The same, to write.
    pub fn kernel_mut(&mut self) -> Option<&mut KernelTables> {
        self.kernel.as_mut().ok()
    }

    /// Has the kernel tell what becomes of redirected packets, or not. To be on while the tables have a rule's plan.
    pub fn watch_kernel(&mut self, on: bool) -> Result<(), ProgramError> {
        self.kernel.as_mut().map_or(Ok(()), |tables| tables.watch(&mut self.ebpf, on))
    }

    /// Attaches to an interface in exactly this mode. Refuses where any program is attached already, and where the
    /// kernel reports another mode or program afterwards.
    pub fn attach(&mut self, ifindex: u32, mode: Mode) -> Result<Attachment, ProgramError> {
        let before = interface_xdp(ifindex)?;
        if self.links.contains_key(&ifindex) {
            return Err(ProgramError::AlreadyAttached { interface: before.name });
        }
        before.refuse_foreign()?;
        let link = link::Link::create(self.program()?, ifindex, mode).map_err(|errno| attach_error(&before, mode, errno))?;
        let attachment = link.confirm(&interface_xdp(ifindex)?)?;
        self.links.insert(ifindex, link);
        Ok(attachment)
    }

    /// Takes an interface over from another program of ours, through the link that holds it: no packet meets none or both.
    pub fn take_over(&mut self, ifindex: u32, link: OwnedFd, mode: Mode) -> Result<Attachment, ProgramError> {
        let before = interface_xdp(ifindex)?;
        let link = link::Link::adopt(link, self.program()?, mode).map_err(|errno| attach_error(&before, mode, errno))?;
        let attachment = link.confirm(&interface_xdp(ifindex)?)?;
        self.links.insert(ifindex, link);
        Ok(attachment)
    }

    /// Detaches from an interface.
    pub fn detach(&mut self, ifindex: u32) -> Result<(), ProgramError> {
        let link = self.links.remove(&ifindex).ok_or(ProgramError::NotAttached { ifindex })?;
        link.detach().map_err(|errno| ProgramError::Diagnostics(format!("detaching from interface {ifindex}: {errno}")))
    }

    /// Descriptors of all links by interface. Whoever holds one keeps the program attached.
    pub fn links(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.links.iter().map(|(&ifindex, link)| (ifindex, link.as_fd()))
    }

    /// After each change of a table: what was found in it before is no longer the way of a packet.
    fn forget_flows(&mut self) -> Result<(), ProgramError> {
        self.kernel_mut().map_or(Ok(()), KernelTables::forget_flows)
    }

    /// Writes an interface's slot and shapes. Before [`Self::attach`], or packets pass uncounted by slot.
    pub fn set_ingress(&mut self, ifindex: u32, config: &IngressConfig) -> Result<(), ProgramError> {
        self.ingress.insert(ifindex, config, 0).map_err(on("INGRESS", "writing interface"))?;
        self.forget_flows()
    }

    /// From now on every packet of the interface passes.
    pub fn remove_ingress(&mut self, ifindex: u32) -> Result<(), ProgramError> {
        self.ingress.remove(&ifindex).map_err(on("INGRESS", "removing interface"))?;
        self.forget_flows()
    }

    /// Adds or replaces an entry.
    pub fn insert_match(&mut self, key: &MatchKey, entry: &MatchEntry) -> Result<(), ProgramError> {
        self.matches.insert(key, entry, 0).map_err(on("MATCHES", "adding an entry"))?;
        self.forget_flows()
    }

    /// Removes an entry.
    pub fn remove_match(&mut self, key: &MatchKey) -> Result<(), ProgramError> {
        self.matches.remove(key).map_err(on("MATCHES", "removing an entry"))?;
        self.forget_flows()
    }

    /// Adds or replaces the verdict for sources in the first `prefix_len` bits of the address, in the key's set.
    pub fn insert_source(&mut self, key: &SourceKey, prefix_len: u32, verdict: &SourceVerdict) -> Result<(), ProgramError> {
        self.sources.insert(&source_key(key, prefix_len), verdict, 0).map_err(on("SOURCES", "adding a prefix"))?;
        self.forget_flows()
    }

    /// Removes such a verdict.
    pub fn remove_source(&mut self, key: &SourceKey, prefix_len: u32) -> Result<(), ProgramError> {
        self.sources.remove(&source_key(key, prefix_len)).map_err(on("SOURCES", "removing a prefix"))?;
        self.forget_flows()
    }

    /// Puts a bound AF_XDP socket at [`socket_index`]. The table does not keep it alive.
    pub fn set_socket(&mut self, index: u32, socket: &impl AsRawFd) -> Result<(), ProgramError> {
        self.sockets.set(index, socket.as_raw_fd(), 0).map_err(on("XSKS", "setting a socket"))
    }

    /// Empties a place of the socket table: packets for it pass.
    pub fn clear_socket(&mut self, index: u32) -> Result<(), ProgramError> {
        self.sockets.unset(index).map_err(on("XSKS", "clearing a socket"))
    }

    /// One slot's counters, summed over the CPUs, and what programs before this one have counted.
    pub fn counters(&self, slot: u32) -> Result<Counters, ProgramError> {
        let mut sums = self.before.interface(slot);
        before::add_slot(&mut sums, &self.counters, slot)?;
        Ok(sums)
    }

    /// What programs before this one have counted: of the first `slots` interface slots, and of what the kernel path counts.
    pub fn past(&self, slots: usize, counted: &Counted) -> Sums {
        let pairs = |counters: Counters| counters.iter().map(|value| [value.packets, value.bytes]).collect();
        let interfaces = (0..slots as u32).map(|slot| pairs(self.before.interface(slot))).collect();
        self.kernel().map(|tables| tables.past(counted)).unwrap_or_default().with(interfaces)
    }

    /// The maps that count, by name: for whoever goes on counting.
    pub fn counting(&self) -> impl Iterator<Item = (&'static str, BorrowedFd<'_>)> {
        self.counting.iter().map(|(name, fd)| (*name, fd.as_fd()))
    }

    /// Links of the programs that count what is sent. Whoever holds one keeps its program attached.
    pub fn watching(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.kernel.iter().flat_map(KernelTables::watching)
    }

    /// Goes on from the maps of another program of ours, and from what that one went on from.
    pub fn go_on_counting(&mut self, maps: Vec<(String, OwnedFd)>, sums: Sums) -> Result<(), ProgramError> {
        let (first, rest) = maps.into_iter().partition(|(name, _)| name == COUNTERS);
        if let Ok(tables) = &mut self.kernel {
            tables.go_on_counting(rest, sums.clone())?;
        }
        self.before = Before::new(first, sums)?;
        Ok(())
    }

    /// Passes what the program logged on to the `log` crate. Nothing to do unless loaded with diagnostics.
    pub fn flush_diagnostics(&mut self) {
        if let Some(flush) = &mut self.diagnostics {
            flush();
        }
    }

    /// The loaded program, for test runs.
    pub fn program(&mut self) -> Result<&mut Xdp, ProgramError> {
        xdp(&mut self.ebpf, self.rung.program)
    }
}

/// A further descriptor of a map that counts, before it is taken.
fn duplicate(ebpf: &Ebpf, name: &'static str) -> Result<(&'static str, OwnedFd), ProgramError> {
    let Some(Map::PerCpuArray(map) | Map::PerCpuHashMap(map)) = ebpf.map(name) else {
        return Err(ProgramError::Missing { kind: "map", name });
    };
    let copy = map.fd().as_fd().try_clone_to_owned();
    copy.map(|fd| (name, fd)).map_err(|error| ProgramError::Diagnostics(format!("map {name}: {error}")))
}

/// Creates the maps. No CO-RE relocation is in the object, so aya has no need of the kernel's own BTF.
fn open(options: &LoadOptions<'_>, multi_buffer: bool) -> Result<Ebpf, ProgramError> {
    let embedded = if options.diagnostics { RELAY_LOG_OBJECT } else { RELAY_OBJECT };
    let (multi_buffer, log, ifindex_at) = (u32::from(multi_buffer), 1_u32, outcome::ifindex_offset().unwrap_or(0));
    let (buckets, all) = kernel::flow_buckets(aya::util::nr_cpus().unwrap_or(1) as u32);
    let mut loader = EbpfLoader::new();
    loader.btf(None).map_max_entries("MATCHES", options.matches).map_max_entries("SOURCES", options.sources);
    loader.override_global("MULTI_BUFFER", &multi_buffer, true);
    loader.map_max_entries("FLOWS", all).override_global("FLOW_BUCKETS", &buckets, true);
    loader.override_global("IFINDEX_AT", &ifindex_at, true);
    if options.diagnostics {
        loader.override_global("LOG", &log, true);
    }
    loader.load(options.object.unwrap_or(embedded)).map_err(|error| ProgramError::Object(Box::new(error)))
}

fn kernel_tables(ebpf: &mut Ebpf, rung: Rung, refused: Option<&ProgramError>) -> Result<KernelTables, String> {
    if !rung.kernel {
        return Err(refused.map_or_else(|| "this program has no kernel path".into(), ToString::to_string));
    }
    KernelTables::load(ebpf).map_err(|error| error.to_string())
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, ProgramError> {
    let program = ebpf.program_mut(name).ok_or(ProgramError::Missing { kind: "program", name })?;
    program.try_into().map_err(|_| ProgramError::Missing { kind: "XDP program", name })
}

fn map<M: TryFrom<aya::maps::Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, ProgramError> {
    let map = ebpf.take_map(name).ok_or(ProgramError::Missing { kind: "map", name })?;
    M::try_from(map).map_err(on(name, "checking its layout"))
}

fn on(map: &'static str, operation: &'static str) -> impl Fn(MapError) -> ProgramError {
    move |source| ProgramError::Map { map, operation, source }
}

fn source_key(key: &SourceKey, prefix_len: u32) -> Key<SourceKey> {
    Key::new((32 + prefix_len).min(SOURCE_KEY_BITS), *key)
}

/// Hides aya-log's logger, whose type names a crate that nothing else here needs.
fn logger(ebpf: &mut Ebpf) -> Result<Box<dyn FnMut() + Send>, ProgramError> {
    let mut logger = aya_log::EbpfLogger::init(ebpf).map_err(|error| ProgramError::Diagnostics(error.to_string()))?;
    Ok(Box::new(move || logger.flush()))
}

/// What the errno of an attachment means. A program may have come between the question and the attachment.
fn attach_error(before: &InterfaceXdp, mode: Mode, errno: nix::errno::Errno) -> ProgramError {
    use nix::errno::Errno;
    let interface = before.name.clone();
    match (errno, mode) {
        (Errno::EBUSY | Errno::EEXIST, _) => interface_xdp(before.ifindex)
            .and_then(|now| now.refuse_foreign())
            .err()
            .unwrap_or(ProgramError::Attach { interface, mode, errno }),
        (Errno::EOPNOTSUPP, Mode::Native) => ProgramError::NoNativeXdp { interface },
        _ => ProgramError::Attach { interface, mode, errno },
    }
}
