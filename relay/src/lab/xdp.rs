//! The lab's XDP programs (`lab_drop`, `lab_redirect`, `lab_generate`, `lab_xsk`) in user space: load, attach, count.
//!
//! Native mode or an error; the attachment ends with its value. Interfaces are found in the calling thread's namespace, so all of
//! this runs inside `Namespace::run`. Must never attach to an interface that the lab did not create, `relay recv` excepted.

use super::error::{LabError, Result};
use aya::maps::{Array, DevMap, MapData, PerCpuArray, XskMap};
use aya::programs::links::FdLink;
use aya::programs::{TestRun, TestRunAttrs, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use relay_common::CounterValue;
use relay_common::lab::{Pace, SILENCES, Silence, TEMPLATE_LEN, Template};
use std::os::fd::AsRawFd;

static OBJECT: &[u8] = aya::include_bytes_aligned!("../nic/afxdp/object/lab.bpf.o");

/// Frames per batch of a live test run; the kernel's default and limit are 64 and 256. A batch is sent as a whole.
pub(super) const LIVE_BATCH: u32 = 64;

/// What `lab_generate` writes into every packet of its own. Zeroes: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Where the sequence number stands (u64, big-endian).
    pub sequence_offset: u32,
    /// Where the time of sending stands (u64, big-endian, ns).
    pub stamp_offset: u32,
    /// Where the checksum over both, and over flows, stands.
    pub checksum_offset: u32,
    /// Flows by turns, and in what they differ (`VARY_*`).
    pub flows: u32,
    /// See `flows`.
    pub vary: u32,
}

/// One loaded instance of the lab object, with maps of its own.
#[derive(Debug)]
pub struct LabProgram {
    ebpf: Ebpf,
    links: Vec<FdLink>,
}

fn bpf<E: std::error::Error>(what: &str) -> impl FnOnce(E) -> LabError {
    let what = what.to_owned();
    move |error| {
        let mut text = format!("{what}: {error}");
        let mut source = error.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        LabError::Invalid(text)
    }
}

impl LabProgram {
    /// Creates the maps; programs are loaded when first used.
    pub fn load() -> Result<Self> {
        let ebpf = EbpfLoader::new().load(OBJECT).map_err(bpf("loading the lab object"))?;
        Ok(Self { ebpf, links: Vec::new() })
    }

    /// Attaches a program natively until this value is dropped.
    pub fn attach(&mut self, name: &str, ifindex: u32) -> Result<()> {
        let program = self.program(name)?;
        let id = program.attach_to_if_index(ifindex, XdpMode::Driver).map_err(bpf(&format!("attaching {name}")))?;
        let link = program.take_link(id).map_err(bpf(name))?;
        // A netlink attachment would outlive us (TRAPS): FdLink refuses it, and dropping the refused link detaches.
        let link = FdLink::try_from(link).map_err(|_| LabError::Invalid(format!("{name}: the kernel gave no bpf_link")))?;
        self.links.push(link);
        Ok(())
    }

    /// Packets that the programs of this instance have handled.
    pub fn count(&self) -> Result<u64> {
        let map = self.ebpf.map("LAB_COUNT").ok_or_else(|| missing("LAB_COUNT"))?;
        let map = PerCpuArray::<&MapData, CounterValue>::try_from(map).map_err(bpf("LAB_COUNT"))?;
        let values = map.get(&0, 0).map_err(bpf("LAB_COUNT"))?;
        Ok(values.iter().map(|value| value.packets).sum())
    }

    /// The silences that `lab_silence` has noted, as far as there was room.
    pub fn silences(&self) -> Result<Vec<Silence>> {
        let map = self.ebpf.map("LAB_SILENCES").ok_or_else(|| missing("LAB_SILENCES"))?;
        let map = Array::<&MapData, Silence>::try_from(map).map_err(bpf("LAB_SILENCES"))?;
        let count = map.get(&0, 0).map_err(bpf("LAB_SILENCES"))?.len_ns.min(u64::from(SILENCES) - 1);
        (1..=count as u32).map(|at| map.get(&at, 0).map_err(bpf("LAB_SILENCES"))).collect()
    }

    /// Where `lab_redirect` sends to.
    pub fn set_device(&mut self, ifindex: u32) -> Result<()> {
        let map = self.ebpf.map_mut("LAB_DEVICES").ok_or_else(|| missing("LAB_DEVICES"))?;
        let mut map = DevMap::<&mut MapData>::try_from(map).map_err(bpf("LAB_DEVICES"))?;
        map.set(0, ifindex, None, 0).map_err(bpf("LAB_DEVICES"))
    }

    /// The socket of a queue for `lab_xsk`.
    pub fn set_socket(&mut self, queue: u32, socket: &impl AsRawFd) -> Result<()> {
        let map = self.ebpf.map_mut("LAB_XSKS").ok_or_else(|| missing("LAB_XSKS"))?;
        let mut map = XskMap::<&mut MapData>::try_from(map).map_err(bpf("LAB_XSKS"))?;
        map.set(queue, socket.as_raw_fd(), 0).map_err(bpf("LAB_XSKS"))
    }

    /// What `lab_generate` writes into every packet; the places of `marks` are zero in it, but for the checksum.
    pub fn set_template(&mut self, frame: &[u8], marks: Marks) -> Result<()> {
        let len = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let mut bytes = [0; TEMPLATE_LEN];
        let room = bytes.get_mut(..frame.len()).ok_or_else(|| LabError::Invalid(format!("a template of {len} bytes is too long")))?;
        room.copy_from_slice(frame);
        let Marks { sequence_offset, stamp_offset, checksum_offset, flows, vary } = marks;
        let at = checksum_offset as usize;
        let checksum = frame.get(at..at + 2).map_or(0, |pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
        let template = Template { len, sequence_offset, checksum_offset, checksum, stamp_offset, flows, vary, zero: 0, bytes };
        let map = self.ebpf.map_mut("LAB_TEMPLATE").ok_or_else(|| missing("LAB_TEMPLATE"))?;
        let mut map = Array::<&mut MapData, Template>::try_from(map).map_err(bpf("LAB_TEMPLATE"))?;
        map.set(0, template, 0).map_err(bpf("LAB_TEMPLATE"))
    }

    /// When `lab_generate` sends.
    pub fn set_pace(&mut self, pace: Pace) -> Result<()> {
        let map = self.ebpf.map_mut("LAB_PACE").ok_or_else(|| missing("LAB_PACE"))?;
        let mut map = Array::<&mut MapData, Pace>::try_from(map).map_err(bpf("LAB_PACE"))?;
        map.set(0, pace, 0).map_err(bpf("LAB_PACE"))
    }

    /// Sends `repeat` packets out of `ifindex` from the calling thread (BPF_PROG_TEST_RUN with live frames), so many at a time.
    /// Each call costs about 20 ms beside its packets.
    pub fn generate(&mut self, frame: &[u8], ifindex: u32, repeat: u32, batch: u32) -> Result<()> {
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let mut context = [0u8; 24];
        let words = [0, u32::try_from(frame.len()).unwrap_or(0), 0, ifindex, 0, 0];
        for (bytes, word) in context.chunks_mut(4).zip(words) {
            bytes.copy_from_slice(&u32::to_ne_bytes(word));
        }
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.ctx_in = Some(&context);
        options.repeat = repeat;
        options.attrs = TestRunAttrs::new().xdp_live_frames(batch);
        self.program("lab_generate")?.test_run(options).map(drop).map_err(bpf("lab_generate"))
    }

    fn program(&mut self, name: &str) -> Result<&mut Xdp> {
        let program = self.ebpf.program_mut(name).ok_or_else(|| missing(name))?;
        let program: &mut Xdp = program.try_into().map_err(bpf(name))?;
        if program.fd().is_err() {
            program.load().map_err(bpf(&format!("loading {name}")))?;
        }
        Ok(program)
    }
}

fn missing(name: &str) -> LabError {
    LabError::Invalid(format!("the lab object has no `{name}`"))
}
