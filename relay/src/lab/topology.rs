//! The usual laboratory: a source, a relay and sinks, each in its namespace, joined by veth pairs.
//!
//! ```text
//! src: s0 10.0.0.1 ── r0 10.0.0.2 :relay: r1 10.0.1.1 ── k1 10.0.1.2 :sink (shared, or one each)
//!                                         rN 10.0.N.1 ── kN 10.0.N.2
//! ```
//! A chain has several relays: `s0 ── r0 relay r1 ── r0 relay2 r1 ── … ── k1`.
//! IPv6 likewise: fd00::1, fd00::2, fd00:0:0:N::1, fd00:0:0:N::2. Checksum offload stays on, as on a real host: packets of local
//! senders carry partial checksums. GRO is on everywhere, since only so a veth accepts redirected and XDP_TX packets (TRAPS).

use super::error::{LabError, Result};
use super::netns::Namespace;
use std::fmt::Write;

/// What to build.
#[derive(Clone, Debug)]
pub struct LabSpec {
    /// Links from the relay to sinks, 1–250.
    pub sinks: u32,
    /// A namespace for each sink, or one for all.
    pub separate_sinks: bool,
    /// RX and TX queues of both ends of every pair.
    pub queues: u32,
    /// MTU of every interface.
    pub mtu: u32,
}

impl Default for LabSpec {
    fn default() -> Self {
        Self { sinks: 1, separate_sinks: false, queues: 1, mtu: 1_500 }
    }
}

/// A built laboratory; all of it goes when it is dropped.
#[derive(Debug)]
pub struct Lab {
    /// The sender's namespace, interface `s0`.
    pub src: Namespace,
    /// The relay's namespace, interfaces `r0` to `rN`; of a chain, the first relay's.
    pub relay: Namespace,
    /// The further relays of a chain.
    behind: Vec<Namespace>,
    sinks: Vec<Namespace>,
    spec: LabSpec,
}

impl Lab {
    /// Builds it; everything is up when this returns.
    pub fn new(spec: LabSpec) -> Result<Self> {
        if !(1..=250).contains(&spec.sinks) || spec.queues == 0 {
            return Err(LabError::Invalid(format!("a lab needs 1–250 sinks and a queue, not {} and {}", spec.sinks, spec.queues)));
        }
        let namespaces = if spec.separate_sinks { spec.sinks } else { 1 };
        let src = Namespace::create("src")?;
        let relay = Namespace::create("relay")?;
        let sinks = (1..=namespaces).map(|i| Namespace::create(&format!("sink{i}"))).collect::<Result<Vec<_>>>()?;
        let lab = Self { src, relay, behind: Vec::new(), sinks, spec };
        for namespace in lab.namespaces() {
            quieten(namespace)?;
        }
        lab.relay.ip_batch(&lab.relay_lines())?;
        lab.src.ip_batch(&lab.src_lines())?;
        for link in 1..=lab.spec.sinks {
            lab.sink(link).ip_batch(&lab.sink_lines(link))?;
        }
        lab.enable_gro_everywhere()?;
        Ok(lab)
    }

    /// One sink, one queue, MTU 1500.
    pub fn simple() -> Result<Self> {
        Self::new(LabSpec::default())
    }

    /// So many relays in a row, `r1` of each joined to `r0` of the next, `r1` of the last to `k1`. IPv4 alone: what a link carries
    /// downstream is what was relayed.
    pub fn chain(hops: u32) -> Result<Self> {
        if !(1..=16).contains(&hops) {
            return Err(LabError::Invalid(format!("a chain has 1–16 relays, not {hops}")));
        }
        let src = Namespace::create("src")?;
        let relay = Namespace::create("relay")?;
        let behind = (2..=hops).map(|hop| Namespace::create(&format!("relay{hop}"))).collect::<Result<Vec<_>>>()?;
        let lab = Self { src, relay, behind, sinks: vec![Namespace::create("sink1")?], spec: LabSpec::default() };
        for namespace in lab.namespaces() {
            quieten(namespace)?;
            let _ = namespace.sysctl("ipv6/conf/default/disable_ipv6", "1");
        }
        (0..=hops).try_for_each(|link| lab.chain_link(link, hops))?;
        lab.src.ip_batch("route add 224.0.0.0/4 dev s0\n")?;
        Ok(lab)
    }

    /// Relay `n` of a chain, from 0.
    pub fn hop(&self, n: u32) -> &Namespace {
        n.checked_sub(1).and_then(|n| self.behind.get(n as usize)).unwrap_or(&self.relay)
    }

    /// Link 0 leads to the first relay, link `hops` to the sink.
    fn chain_link(&self, link: u32, hops: u32) -> Result<()> {
        let (upper, up) = if link == 0 { (&self.src, "s0") } else { (self.hop(link - 1), "r1") };
        let (lower, down) = if link == hops { (self.sink(1), "k1") } else { (self.hop(link), "r0") };
        upper.ip_batch(&format!(
            "link add {up} mtu 1500 type veth peer name {down} mtu 1500 netns {}\naddr add 10.0.{link}.1/24 dev {up}\nlink set {up} up\n",
            lower.name()
        ))?;
        lower.ip_batch(&format!("addr add 10.0.{link}.2/24 dev {down}\nlink set {down} up\n"))?;
        enable_gro(upper, up)?;
        enable_gro(lower, down)
    }

    /// The namespace of `kN`, N from 1.
    pub fn sink(&self, link: u32) -> &Namespace {
        let index = if self.spec.separate_sinks { link.saturating_sub(1) as usize } else { 0 };
        self.sinks.get(index).unwrap_or(&self.relay)
    }

    /// What it was built from.
    pub fn spec(&self) -> &LabSpec {
        &self.spec
    }

    fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        [&self.src, &self.relay].into_iter().chain(&self.behind).chain(&self.sinks)
    }

    /// All pairs, made in the relay's namespace, and the relay's own ends.
    fn relay_lines(&self) -> String {
        let mut lines = String::new();
        for link in 0..=self.spec.sinks {
            let (peer, home) = if link == 0 { ("s0".into(), self.src.name()) } else { (format!("k{link}"), self.sink(link).name()) };
            let own = if link == 0 { 2 } else { 1 };
            let shape = format!("mtu {} numrxqueues {q} numtxqueues {q}", self.spec.mtu, q = self.spec.queues);
            // Writing to a String cannot fail.
            let _ = writeln!(lines, "link add r{link} {shape} type veth peer name {peer} {shape} netns {home}");
            let _ = writeln!(lines, "addr add 10.0.{link}.{own}/24 dev r{link}");
            let _ = writeln!(lines, "addr add {}/64 dev r{link} nodad", address6(link, own));
            let _ = writeln!(lines, "link set r{link} up");
        }
        lines
    }

    fn src_lines(&self) -> String {
        "addr add 10.0.0.1/24 dev s0\naddr add fd00::1/64 dev s0 nodad\nlink set s0 up\n\
         route add 224.0.0.0/4 dev s0\nroute add default via 10.0.0.2\nroute add ::/0 via fd00::2\n"
            .into()
    }

    fn sink_lines(&self, link: u32) -> String {
        let mut lines =
            format!("addr add 10.0.{link}.2/24 dev k{link}\naddr add {}/64 dev k{link} nodad\nlink set k{link} up\n", address6(link, 2));
        if link == 1 || self.spec.separate_sinks {
            let _ = writeln!(
                lines,
                "route add 224.0.0.0/4 dev k{link}\nroute add default via 10.0.{link}.1\nroute add ::/0 via {}",
                address6(link, 1)
            );
        }
        lines
    }

    fn enable_gro_everywhere(&self) -> Result<()> {
        enable_gro(&self.src, "s0")?;
        for link in 0..=self.spec.sinks {
            enable_gro(&self.relay, &format!("r{link}"))?;
        }
        (1..=self.spec.sinks).try_for_each(|link| enable_gro(self.sink(link), &format!("k{link}")))
    }
}

fn address6(link: u32, host: u32) -> String {
    if link == 0 { format!("fd00::{host}") } else { format!("fd00:0:0:{link:x}::{host}") }
}

/// No duplicate address detection, no reverse path filter: both cost seconds or packets that no test is about.
fn quieten(namespace: &Namespace) -> Result<()> {
    for kind in ["all", "default"] {
        namespace.sysctl(&format!("ipv4/conf/{kind}/rp_filter"), "0")?;
        // A kernel without IPv6 has no such file, and needs none.
        let _ = namespace.sysctl(&format!("ipv6/conf/{kind}/accept_dad"), "0");
    }
    Ok(())
}

/// Turns GRO on at a veth interface, so that its peer takes redirected packets (`veth_xdp_xmit` wants a peer that polls).
pub fn enable_gro(namespace: &Namespace, iface: &str) -> Result<()> {
    namespace.output("ethtool", &["-K", iface, "gro", "on"]).map(drop).map_err(|error| match error {
        LabError::Missing { .. } => LabError::Missing { tool: "ethtool", remedy: "install ethtool (apt-get install ethtool)" },
        other => other,
    })
}
