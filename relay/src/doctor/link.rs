//! Stages that look at one interface: link, kind, XDP and who is there already, MTU, offloads, queues, placement.

use super::{Finding, Role, Scene, Verdict, read, table};
use crate::nic::afxdp::program::{InterfaceXdp, Mode, interface_xdp, name_of};
use crate::rule::{Rule, TagMatch};
use crate::supervisor::interfaces::Interface;

/// `NETDEV_XDP_ACT_*` (linux/netdev.h).
const BASIC: u64 = 1;
const REDIRECT: u64 = 1 << 1;
const NDO_XMIT: u64 = 1 << 2;
const ZERO_COPY: u64 = 1 << 3;
const RX_SG: u64 = 1 << 5;
/// `ETH_FLAG_*` (linux/ethtool.h).
const RXVLAN: u32 = 1 << 8;
const LRO: u32 = 1 << 15;
/// Largest packet, IP header on, that one frame of the relay holds behind its headroom with two tags.
const SINGLE_FRAME_MTU: u32 = crate::frame::FRAME_CAPACITY - 22;
/// Names of our own programs.
const OURS: [&str; 2] = ["relay", "relay_single"];

/// All of them for one interface.
pub(super) fn stages(scene: &mut Scene, interface: &Interface) -> Vec<Finding> {
    let role = scene.role(&interface.name);
    let features = xdp_features(interface.ifindex);
    let mut findings = vec![link(interface), kind(scene, interface)];
    if role.ingress {
        findings.push(native_xdp(interface, features, scene.question.daemon.is_some()));
        findings.push(foreign_program(scene, interface));
        findings.push(offloads(scene.netlink.offloads(&interface.name).ok(), scene.taking(&interface.name), &interface.name));
        findings.push(queues(scene, interface));
    }
    if role.egress {
        findings.push(xdp_transmit(interface, features));
    }
    findings.push(mtu(scene, interface, role, features));
    findings.push(placement(interface));
    findings
}

fn link(interface: &Interface) -> Finding {
    const STAGE: &str = "link";
    let name = &interface.name;
    if interface.loopback {
        return Finding::warn(
            STAGE,
            format!("{name} is the loopback: nothing comes in from outside"),
            "name the interface the sender is behind",
        );
    }
    if interface.mac.is_none() {
        return Finding::fail(
            STAGE,
            format!("{name} has no Ethernet address"),
            "use an Ethernet interface (for a tunnel: gretap, vxlan or tap)",
        );
    }
    if !interface.up {
        return Finding::fail(STAGE, format!("{name} is down"), format!("ip link set {name} up"));
    }
    if !interface.carrier {
        let remedy = match interface.kind.as_deref() {
            Some("veth") => format!("bring its peer up: ip link set {} up, in the peer's namespace", peer(interface)),
            _ => "plug the cable in, or bring the other end up".into(),
        };
        return Finding::fail(STAGE, format!("{name} is up, but has no carrier"), remedy);
    }
    Finding::ok(STAGE, "up, with carrier")
}

fn peer(interface: &Interface) -> String {
    interface.lower.map_or_else(|| "PEER".into(), |index| format!("PEER (ifindex {index} there)"))
}

/// Interfaces that are part of another, or stand on another, see packets late, untagged, or not at all.
fn kind(scene: &Scene, interface: &Interface) -> Finding {
    const STAGE: &str = "kind";
    let name = &interface.name;
    let by_index = |index: Option<u32>| scene.known.values().find(|other| Some(other.ifindex) == index);
    if let Some(master) = by_index(interface.master) {
        let kind = master.kind.as_deref().unwrap_or("another interface");
        let free = format!("name {} instead, or take {name} out of it: ip link set {name} nomaster", master.name);
        return match kind {
            "vrf" => Finding::ok(STAGE, format!("part of VRF {}", master.name)),
            _ => Finding::fail(
                STAGE,
                format!(
                    "{name} is a port of {kind} {}: queries and memberships are the {kind}'s, so joins made on the port lapse",
                    master.name
                ),
                free,
            ),
        };
    }
    match (interface.kind.as_deref(), by_index(interface.lower)) {
        (Some("vlan"), lower) => {
            let id = vlan_id(name).map_or_else(|| "ID".into(), |id| id.to_string());
            let lower = lower.map_or("the interface below", |lower| lower.name.as_str());
            Finding::warn(
                STAGE,
                format!("{name} is VLAN {id} of {lower}: sub-interfaces have no native XDP, so it takes the packet path"),
                format!("name {lower} in the rule and say tag={id} (and vlan={id} on an output)"),
            )
        }
        (Some(kind @ ("bond" | "bridge" | "team" | "macvlan" | "ipvlan" | "vxlan" | "gretap" | "dummy" | "ifb")), _) => {
            Finding::ok(STAGE, format!("a {kind}: no queues of a NIC behind it, so speed is the kernel's"))
        }
        (Some(kind), _) => Finding::ok(STAGE, format!("a {kind}")),
        (None, _) => Finding::ok(STAGE, "a network card"),
    }
}

/// `eth0.7  VID: 7  REORDER_HDR: …` in /proc/net/vlan.
fn vlan_id(name: &str) -> Option<u16> {
    let text = table(&format!("vlan/{name}"));
    text.split("VID:").nth(1)?.split_whitespace().next()?.parse().ok()
}

/// What the driver says it can do (kernels from 6.3 on). libbpf asks, so that it is not our own word.
#[cfg(feature = "peers")]
fn xdp_features(ifindex: u32) -> Option<u64> {
    use libbpf_rs::{Xdp, XdpFlags};
    use std::os::fd::AsFd;
    let any = std::io::stdin();
    let answer = Xdp::new(any.as_fd()).query(i32::try_from(ifindex).ok()?, XdpFlags::NONE).ok()?;
    Some(answer.feature_flags)
}

#[cfg(not(feature = "peers"))]
const fn xdp_features(_ifindex: u32) -> Option<u64> {
    None
}

fn native_xdp(interface: &Interface, features: Option<u64>, relay_runs: bool) -> Finding {
    const STAGE: &str = "native-xdp";
    let driver = interface.driver.as_deref().unwrap_or("unknown");
    match features {
        None => Finding::skip(
            STAGE,
            format!("driver {driver}: its XDP features cannot be asked (kernel before 6.3, or built without `peers`)"),
            "`relay run` tries and says which rung it took; see `relay status`",
        ),
        Some(bits) if bits & BASIC == 0 || bits & REDIRECT == 0 => Finding::warn(
            STAGE,
            format!("driver {driver} has no native XDP: packets take the packet path"),
            "use an interface whose driver has it, or ask for generic XDP: relay run --xdp-mode generic",
        ),
        Some(bits) if bits & ZERO_COPY == 0 => Finding::ok(STAGE, format!("driver {driver}: native XDP, copy mode")),
        Some(_) if relay_runs => {
            Finding::ok(STAGE, format!("driver {driver}: native XDP, zero copy offered (`relay status` says what it got)"))
        }
        Some(_) => Finding::ok(STAGE, format!("driver {driver}: native XDP, zero copy offered")),
    }
}

fn xdp_transmit(interface: &Interface, features: Option<u64>) -> Finding {
    const STAGE: &str = "xdp-transmit";
    match features {
        None => Finding::skip(
            STAGE,
            "whether the driver takes redirected packets cannot be asked here",
            "`relay rule explain ID` says which path a rule takes",
        ),
        Some(bits) if bits & NDO_XMIT == 0 => {
            let remedy = match interface.kind.as_deref() {
                Some("veth") => "ethtool -K PEER gro on, on the veth's other end (in its namespace)".into(),
                _ => format!("ethtool -L {} combined N with a TX queue for each CPU, or use path=xsk", interface.name),
            };
            Finding::warn(STAGE, "takes no packets redirected by XDP, so rules that send here cannot use the kernel path", remedy)
        }
        Some(_) => Finding::ok(STAGE, "takes packets redirected by XDP (kernel path)"),
    }
}

fn foreign_program(scene: &Scene, interface: &Interface) -> Finding {
    const STAGE: &str = "xdp-program";
    let name = &interface.name;
    let found: InterfaceXdp = match interface_xdp(interface.ifindex) {
        Ok(found) => found,
        Err(error) => return Finding::skip(STAGE, error.to_string(), ""),
    };
    let Some((mode, id)) = found.programs.first().copied() else { return Finding::ok(STAGE, "no XDP program is attached") };
    let program = name_of(id);
    let relay = scene.question.daemon.as_ref();
    if relay.is_some_and(|daemon| daemon.backend(name).starts_with("af_xdp")) {
        return Finding::ok(STAGE, format!("the running relay's program is attached (id {id})"));
    }
    if OURS.contains(&program.as_str()) {
        return Finding::fail(
            STAGE,
            format!("another relay's XDP program is attached (id {id})"),
            "stop that relay, or ask it with --socket PATH",
        );
    }
    let off = if mode == Mode::Generic { "xdpgeneric" } else { "xdp" };
    Finding::fail(
        STAGE,
        format!("a foreign XDP program is attached: {program} (id {id}, {})", if mode == Mode::Generic { "generic" } else { "native" }),
        format!("stop who loaded it (`bpftool prog show id {id}`), or detach it: ip link set dev {name} {off} off"),
    )
}

fn offloads<'a>(bits: Option<u32>, mut rules: impl Iterator<Item = &'a Rule>, name: &str) -> Finding {
    const STAGE: &str = "offloads";
    let Some(bits) = bits else { return Finding::ok(STAGE, "the driver has no offloads to ask about") };
    if bits & LRO != 0 {
        return Finding::fail(STAGE, "large receive offload merges packets before XDP sees them", format!("ethtool -K {name} lro off"));
    }
    let tagged = rules.find(|rule| rule.matching.tag != TagMatch::None);
    match tagged {
        Some(rule) if bits & RXVLAN != 0 => Finding::fail(
            STAGE,
            format!("the interface takes VLAN tags off before XDP sees them, and rule {} wants a tag", rule.id),
            format!("ethtool -K {name} rxvlan off"),
        ),
        Some(_) => Finding::ok(STAGE, "nothing merges packets or takes tags off"),
        None => Finding::ok(STAGE, "nothing merges packets; no rule needs a tag"),
    }
}

fn queues(scene: &Scene, interface: &Interface) -> Finding {
    const STAGE: &str = "queues";
    let (name, queues, workers) = (&interface.name, interface.rx_queues, scene.question.workers.max(1));
    if scene.question.daemon.as_ref().is_some_and(|daemon| daemon.backend(name).starts_with("af_packet")) {
        return Finding::ok(STAGE, "the packet path takes packets of every queue");
    }
    if queues > workers {
        return Finding::fail(
            STAGE,
            format!("{queues} RX queues, and {workers} worker(s) serve one each: AF_XDP never sees packets of the others"),
            format!("{}, or relay run --workers {queues}", fewer_queues(interface, workers)),
        );
    }
    Finding::ok(STAGE, format!("{queues} RX queue(s), each served by a worker"))
}

/// The command that leaves `count` RX queues. A veth with XDP on it keeps as many as its peer sends to, so there the peer's go.
pub(super) fn fewer_queues(interface: &Interface, count: u32) -> String {
    let name = &interface.name;
    match (interface.kind.as_deref(), interface.xdp_program) {
        (Some("veth"), Some(_)) => format!("ethtool -L PEER tx {count} on the veth's other end (in its namespace)"),
        (Some("veth"), None) => format!("ethtool -L {name} rx {count}"),
        _ => format!("ethtool -L {name} combined {count}"),
    }
}

fn mtu(scene: &Scene, interface: &Interface, role: Role, features: Option<u64>) -> Finding {
    const STAGE: &str = "mtu";
    let (name, own) = (&interface.name, interface.mtu);
    if role.ingress && own > SINGLE_FRAME_MTU && features.is_some_and(|bits| bits & RX_SG == 0) {
        return Finding::warn(
            STAGE,
            format!(
                "MTU {own}: packets above {SINGLE_FRAME_MTU} bytes are dropped as too_big (the driver cannot spread one over several frames)"
            ),
            format!("ip link set {name} mtu {SINGLE_FRAME_MTU}, and the same on the sender's side"),
        );
    }
    let feeding = scene.question.rules.iter().filter(|rule| rule.outputs.iter().any(|output| output.egress == *name));
    let largest = feeding.filter_map(|rule| scene.known.get(&rule.ingress).map(|ingress| (ingress.mtu, &rule.ingress))).max();
    match largest {
        Some((from, ingress)) if from > own => Finding::warn(
            STAGE,
            format!("MTU {own} is below the {from} of {ingress}: larger packets are dropped as mtu_exceeded"),
            format!("ip link set {name} mtu {from}"),
        ),
        _ => Finding::ok(STAGE, format!("MTU {own}")),
    }
}

/// Which NUMA node the card is on. /sys shows the namespace it was mounted in, so an interface of another index there is not ours.
fn placement(interface: &Interface) -> Finding {
    let directory = format!("/sys/class/net/{}", interface.name);
    let same = read(&format!("{directory}/ifindex")).is_some_and(|index| index == interface.ifindex.to_string());
    let node = if same { read(&format!("{directory}/device/numa_node")) } else { None };
    let node: i64 = node.and_then(|node| node.parse().ok()).unwrap_or(-1);
    let near = read(&format!("/sys/devices/system/node/node{node}/cpulist")).unwrap_or_default();
    let allowed = table_of_status("Cpus_allowed_list:");
    numa(node, &near, &allowed)
}

fn table_of_status(key: &str) -> String {
    let status = read("/proc/thread-self/status").unwrap_or_default();
    status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim().to_owned()
}

fn numa(node: i64, near: &str, allowed: &str) -> Finding {
    const STAGE: &str = "placement";
    if node < 0 {
        return Finding::ok(STAGE, "no NUMA node of its own: any CPU will do");
    }
    let (near_set, allowed_set) = (numbers(near), numbers(allowed));
    let far = allowed_set.iter().filter(|cpu| !near_set.contains(cpu)).count();
    if far == 0 {
        return Finding::ok(STAGE, format!("on NUMA node {node}, where all allowed CPUs are"));
    }
    let verdict = if far == allowed_set.len() { Verdict::Warn } else { Verdict::Ok };
    let reason = format!("on NUMA node {node} (CPUs {near}); {far} of {} allowed CPUs are elsewhere", allowed_set.len());
    Finding::new(verdict, STAGE, reason, if verdict == Verdict::Warn { format!("relay run --cpus {near}") } else { String::new() })
}

/// `0-3,8` as numbers.
fn numbers(list: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<u32>().ok()?..=last.trim().parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_far_from_every_allowed_cpu_is_a_warning() {
        assert_eq!(numa(-1, "", "0-3").verdict, Verdict::Ok);
        assert_eq!(numa(0, "0-3", "0-3").verdict, Verdict::Ok);
        assert_eq!(numa(1, "4-7", "0-4").verdict, Verdict::Ok);
        let far = numa(1, "4-7", "0-3");
        assert_eq!((far.verdict, far.remedy.as_str()), (Verdict::Warn, "relay run --cpus 4-7"));
    }

    #[test]
    fn drivers_by_their_features() {
        let interface = Interface { name: "x".into(), driver: Some("d".into()), ..Interface::default() };
        for (features, verdict) in [(None, Verdict::Skip), (Some(0), Verdict::Warn), (Some(BASIC | REDIRECT), Verdict::Ok)] {
            assert_eq!(native_xdp(&interface, features, false).verdict, verdict);
        }
        assert_eq!(xdp_transmit(&interface, Some(BASIC)).verdict, Verdict::Warn);
        assert_eq!(xdp_transmit(&interface, Some(BASIC | NDO_XMIT)).verdict, Verdict::Ok);
    }

    #[test]
    fn lro_and_stripped_tags_fail() {
        let rule: Rule = "x 239.1.1.1:5 -> y; tag=7 id=t".parse().unwrap();
        let lro = offloads(Some(LRO), std::iter::empty(), "x");
        assert_eq!((lro.verdict, lro.remedy.as_str()), (Verdict::Fail, "ethtool -K x lro off"));
        assert_eq!(offloads(Some(RXVLAN), [&rule].into_iter(), "x").remedy, "ethtool -K x rxvlan off");
        assert_eq!(offloads(Some(RXVLAN), std::iter::empty(), "x").verdict, Verdict::Ok);
        assert_eq!(offloads(Some(0), [&rule].into_iter(), "x").verdict, Verdict::Ok);
    }
}
