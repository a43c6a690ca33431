//! The XDP program loaded with the golden corpus's tables, and run on packets from memory (BPF_PROG_TEST_RUN).
//!
//! Must never judge: tests do.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use crate::golden;
use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use nix::sched::{CloneFlags, unshare};
use relay::frame::Umem;
use relay::nic::afxdp::program::{LoadOptions, Mode, Program};
use relay::nic::afxdp::{PortSocket, SocketSpec, create};
use relay::sys::Mapping;
use relay::sys::xdp::BindFlags;
use relay_common::MAX_QUEUES;
use std::process::Command;

/// Left to the kernel.
pub const XDP_PASS: u32 = 2;
/// Handed to a socket.
pub const XDP_REDIRECT: u32 = 4;
/// Bytes of `RedirectMeta` before a redirected packet.
pub const META_LEN: usize = 16;

/// Whether this process may load programs; says so where it may not.
pub fn can_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIPPED: loading XDP programs and making network namespaces needs root");
    }
    root
}

/// A pair of veths in a namespace of this thread, more queues than the program has places.
#[derive(Debug)]
pub struct Lab {
    /// `eb0`.
    pub ifindex: u32,
}

impl Lab {
    /// Makes them; they go with the thread.
    #[expect(clippy::new_without_default, reason = "it moves the thread into another namespace")]
    pub fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let queues = (MAX_QUEUES + 1).to_string();
        ip(&["link", "add", "eb0", "numrxqueues", &queues, "type", "veth", "peer", "name", "eb1"]);
        for interface in ["eb0", "eb1"] {
            // Without addresses IPv6 is silent, and only the tests' packets are counted.
            ip(&["link", "set", interface, "addrgenmode", "none"]);
            ip(&["link", "set", interface, "up"]);
        }
        Self { ifindex: nix::net::if_::if_nametoindex("eb0").unwrap() }
    }
}

/// Runs `ip` in this thread's namespace.
pub fn ip(args: &[&str]) {
    assert!(Command::new("ip").args(args).status().unwrap().success(), "ip {args:?}");
}

/// The object of `RELAY_BPF_OBJECTS`, if one is named.
pub fn object() -> Option<&'static [u8]> {
    let folder = std::env::var_os("RELAY_BPF_OBJECTS")?;
    Some(Vec::leak(std::fs::read(std::path::Path::new(&folder).join("relay.bpf.o")).unwrap()))
}

/// Loaded, with the corpus's tables, attached natively (which registers the queues a test run names).
pub fn loaded(lab: &Lab, single_buffer: bool) -> Program {
    let mut program = Program::load(&LoadOptions { single_buffer, object: object(), ..Default::default() }).unwrap();
    assert_eq!(program.multi_buffer(), !single_buffer);
    let tables = golden::tables(lab.ifindex);
    program.set_ingress(lab.ifindex, &tables.ingress).unwrap();
    for (key, entry) in &tables.matches {
        program.insert_match(key, entry).unwrap();
    }
    for (key, len, verdict) in &tables.sources {
        program.insert_source(key, *len, verdict).unwrap();
    }
    program.attach(lab.ifindex, Mode::Native).unwrap();
    program
}

/// A bound socket that nobody serves: redirecting into it is all that is asked.
pub fn socket(lab: &Lab) -> (Umem, PortSocket) {
    let len = 64 * relay::frame::FRAME_SIZE as usize;
    let memory = nix::sys::memfd::memfd_create("xdp-program", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&memory, len as i64).unwrap();
    let umem = Umem::new(Mapping::new(&memory, 0, len, true, true).unwrap());
    let sizes = create::RingSizes { rx: 64, fill: 64, tx: 64, completion: 64 };
    let spec = SocketSpec { ifindex: lab.ifindex, queue: 0, sizes, flags: BindFlags::default() };
    let socket = create::create(&umem, spec, None).unwrap();
    (umem, socket)
}

/// What one run of the program did.
#[derive(Debug)]
pub struct Run {
    /// `XDP_*`.
    pub action: u32,
    /// Metadata, then the packet.
    pub out: Vec<u8>,
}

/// Runs the program once on a packet of 14 bytes at least.
pub fn run(xdp: &Xdp, ifindex: u32, queue: u32, packet: &[u8]) -> Run {
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let context = [0, packet.len() as u32, 0, ifindex, queue, 0].map(u32::to_ne_bytes).concat();
    let mut out = vec![0; packet.len() + 256];
    let mut options = TestRunOptions::new();
    options.data_in = Some(packet);
    options.ctx_in = Some(&context);
    options.data_out = Some(&mut out);
    let result = xdp.test_run(options).unwrap();
    out.truncate(result.data_size_out as usize);
    Run { action: result.return_value, out }
}
