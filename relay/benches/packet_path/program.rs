//! The XDP program by itself: nanoseconds a packet in BPF_PROG_TEST_RUN, without driver, redirect and softirq.
//!
//! Rules rewrite one group into the next in a ring, so that a packet that is run over and over goes through all of them, in an
//! order that no cache can guess. Must never send: the redirects of a test run go nowhere.

use anyhow::{Context, Result};
use aya::programs::{TestRun as _, TestRunOptions};
use relay::lab::Lab;
use relay::lab::packet::{Flow, group_mac};
use relay::nic::afxdp::program::{LoadOptions, Mode, Program};
use relay_common::edit::{Edit, SET_DPORT, SET_DST, SET_DST_MAC, SET_SPORT, SET_SRC, TTL_KEEP, TTL_SET};
use relay_common::kernel::{KernelOutput, KernelPlan, MAX_LINEAR_L3_LEN};
use relay_common::{IngressConfig, MatchEntry, MatchKey, PORT_EXACT, Shape, TAG_EXACT, TAG_NONE};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

pub(super) const SHAPE: Shape = Shape { family: 4, tag_mode: TAG_EXACT, group_len: 32, port_mode: PORT_EXACT };
pub(super) const PORT: u16 = 5000;
/// Prime, so that steps of it come to every rule before they come to one again.
pub(super) const STEP: u32 = 7919;

/// What an output changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rewrite {
    /// MAC addresses and TTL.
    Link,
    /// Addresses and ports too.
    Full,
}

/// The program with so many rules of the kernel path, `None`: with none, so that every packet passes.
pub(super) struct Loaded {
    lab: Lab,
    program: Program,
    ifindex: u32,
    rules: u32,
}

impl Loaded {
    /// In namespaces of its own.
    pub(super) fn new(rules: u32, rewrite: Rewrite) -> Result<Self> {
        let lab = Lab::simple()?;
        let (program, ifindex) = lab.relay.run(|| Self::load(rules, rewrite))??;
        Ok(Self { lab, program, ifindex, rules })
    }

    fn load(rules: u32, rewrite: Rewrite) -> Result<(Program, u32)> {
        let object = std::env::var_os("RELAY_BPF_OBJECTS").map(|folder| std::fs::read(std::path::Path::new(&folder).join("relay.bpf.o")));
        let object = object.transpose()?;
        let mut program = Program::load(&LoadOptions { object: object.as_deref(), ..LoadOptions::default() })?;
        let ifindex = nix::net::if_::if_nametoindex("r0")?;
        let out = nix::net::if_::if_nametoindex("r1")?;
        let mut config = IngressConfig { slot: 0, shape_count: 1, kernel: 1, ..IngressConfig::default() };
        config.shapes[0] = SHAPE;
        config.own4[0] = u32::from_ne_bytes([10, 0, 0, 2]);
        program.set_ingress(ifindex, &config)?;
        program.attach(ifindex, Mode::Native)?;
        for rule in 0..rules {
            let key = MatchKey { ifindex, tag: TAG_NONE, addr: wide(group(rule)), port: PORT, zero: 0, shape: SHAPE };
            program.insert_match(&key, &MatchEntry { slot: rule, serial: 1, source_set: 0, zero: 0 })?;
            let edit = edit(rewrite, group(rule.wrapping_add(STEP) % rules));
            let only = KernelOutput { edit, slot: rule, ifindex: out, device: 0, blocked: 0 };
            let plan = KernelPlan {
                slot: rule,
                serial: 1,
                flags: 0,
                first_output: rule,
                output_count: 1,
                max_l3_len: MAX_LINEAR_L3_LEN,
                min_ttl: 1,
                family: 4,
                ready: 1,
                only,
            };
            let tables = program.kernel_mut().context("no kernel path here: relay run says why")?;
            if rule == 0 {
                tables.set_device(0, out, false, None)?;
            }
            tables.write_plan(rule, &plan, &[only])?;
            tables.set_rule(rule, Some(rule))?;
        }
        Ok((program, ifindex))
    }

    /// Nanoseconds a packet over `repeat` packets.
    pub(super) fn run(&mut self, payload: usize, repeat: u32) -> Result<f64> {
        let frame = frame(group(0), payload)?;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, frame.len() as u32, 0, self.ifindex, 0, 0].map(u32::to_ne_bytes).concat();
        let mut options = TestRunOptions::new();
        options.data_in = Some(&frame);
        options.ctx_in = Some(&context);
        options.repeat = repeat;
        let program = &mut self.program;
        let result = self.lab.relay.run(|| -> Result<_> { Ok(program.program()?.test_run(options)?) })??;
        let wanted = if self.rules == 0 { 2 } else { 4 };
        anyhow::ensure!(result.return_value == wanted, "the program's action is {}, not {wanted}", result.return_value);
        Ok(result.duration.as_nanos() as f64)
    }
}

/// A packet to this group.
pub(super) fn frame(destination: Ipv4Addr, payload: usize) -> Result<Vec<u8>> {
    let flow = Flow {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: group_mac(IpAddr::V4(destination)).context("a group")?,
        source: SocketAddr::from(([10, 0, 0, 1], 4000)),
        destination: SocketAddr::from((destination, PORT)),
        ttl: 16,
        dscp: 0,
    };
    Ok(flow.frame(&vec![0x5a; payload]))
}

/// The group of a rule.
pub(super) fn group(rule: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from_be_bytes([239, 1, 0, 1]) + rule)
}

pub(super) fn wide(address: Ipv4Addr) -> [u8; 16] {
    let [a, b, c, d] = address.octets();
    [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

pub(super) fn edit(rewrite: Rewrite, to: Ipv4Addr) -> Edit {
    let link = Edit { src_mac: [2, 0, 0, 0, 0, 9], family: 4, mtu: 1500, ttl_mode: TTL_SET, ttl: 15, ..Edit::default() };
    match rewrite {
        Rewrite::Link => link,
        Rewrite::Full => Edit {
            dst: wide(to),
            src: wide(Ipv4Addr::new(10, 0, 1, 1)),
            dst_mac: [1, 0, 0x5e, to.octets()[1] & 0x7f, to.octets()[2], to.octets()[3]],
            dport: PORT,
            sport: 4001,
            flags: SET_DST | SET_SRC | SET_DST_MAC | SET_DPORT | SET_SPORT,
            ttl_mode: TTL_KEEP,
            ..link
        },
    }
}
