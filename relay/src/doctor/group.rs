//! Stages about multicast at one interface: memberships, querier, MAC filter, TTLs, reverse path filter.

use super::{Finding, Scene, sysctl, table};
use crate::rule::{Rule, Ttl};
use crate::supervisor::interfaces::Interface;
use crate::wire::mac;
use std::net::IpAddr;

/// Groups the relay joins per socket, and the kernel's default limit.
const GROUPS_PER_SOCKET: i64 = 20;
/// Between two general queries by default (RFC 3376 §8.2).
const QUERY_INTERVAL: u64 = 125;

/// All of them for one interface.
pub(super) fn stages(scene: &Scene, interface: &Interface) -> Vec<Finding> {
    if !scene.role(&interface.name).ingress {
        return Vec::new();
    }
    vec![
        membership(scene, interface),
        querier(scene, interface),
        filter(scene, interface),
        ttl(scene, interface),
        rp_filter(&interface.name),
    ]
}

fn membership(scene: &Scene, interface: &Interface) -> Finding {
    const STAGE: &str = "membership";
    let name = &interface.name;
    if !interface.multicast {
        return Finding::fail(
            STAGE,
            format!("multicast is switched off on {name}: the kernel sends no membership reports"),
            format!("ip link set {name} multicast on"),
        );
    }
    if let Some(limit) = sysctl("net/ipv4/igmp_max_memberships").filter(|limit| *limit < GROUPS_PER_SOCKET) {
        return Finding::fail(
            STAGE,
            format!("net.ipv4.igmp_max_memberships = {limit}, and the relay joins {GROUPS_PER_SOCKET} groups per socket"),
            format!("sysctl -w net.ipv4.igmp_max_memberships={GROUPS_PER_SOCKET}"),
        );
    }
    let specific = scene.taking(name).find(|rule| rule.matching.source.is_some() && rule.matching.group.addr.is_ipv4());
    if let (Some(rule), Some(version)) = (specific, forced_version(name)) {
        return Finding::fail(
            STAGE,
            format!("IGMPv{version} is forced on {name}, and rule {} needs IGMPv3 for its source", rule.id),
            format!("sysctl -w net.ipv4.conf.{name}.force_igmp_version=0 net.ipv4.conf.all.force_igmp_version=0"),
        );
    }
    let ipv6 = scene.taking(name).find(|rule| rule.join && rule.matching.group.addr.is_ipv6());
    if let Some(rule) = ipv6.filter(|_| sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6")).is_none_or(|off| off != 0)) {
        return Finding::fail(
            STAGE,
            format!("IPv6 is switched off on {name}, and rule {} joins an IPv6 group", rule.id),
            format!("sysctl -w net.ipv6.conf.{name}.disable_ipv6=0"),
        );
    }
    if let Some(rule) = not_joined(scene, name) {
        return Finding::fail(STAGE, format!("the running relay has not joined the group of rule {rule}"), format!("relay why {rule}"));
    }
    if scene.taking(name).all(|rule| rule.matching.group.addr.is_ipv4()) && interface.ipv4().is_none() {
        return Finding::warn(
            STAGE,
            format!("{name} has no IPv4 address: reports go out from 0.0.0.0, which some switches ignore"),
            format!("ip addr add ADDRESS/LEN dev {name}"),
        );
    }
    Finding::ok(STAGE, "memberships can be reported")
}

/// The kernel takes the first of `all` and the interface's own that is set.
fn forced_version(name: &str) -> Option<i64> {
    let of = |whose: &str| sysctl(&format!("net/ipv4/conf/{whose}/force_igmp_version")).filter(|version| *version != 0);
    of("all").or_else(|| of(name)).filter(|version| *version < 3)
}

fn not_joined(scene: &Scene, name: &str) -> Option<String> {
    let daemon = scene.question.daemon.as_ref()?;
    let wanted = |id: &str| scene.taking(name).any(|rule| rule.id == id && rule.join && rule.matching.group.addr.is_multicast());
    daemon.rules.iter().find(|info| !info.joined && wanted(&info.id)).map(|info| info.id.clone())
}

fn querier(scene: &Scene, interface: &Interface) -> Finding {
    const STAGE: &str = "querier";
    let heard = match scene.heard.get(&interface.name) {
        None => return Finding::skip(STAGE, "not listened for", "relay doctor --listen 130s"),
        Some(Err(error)) => return Finding::skip(STAGE, format!("listening failed: {error}"), "run it as root"),
        Some(Ok(heard)) => heard,
    };
    let limit = scene.question.listen;
    match (heard.igmp_querier, heard.mld_querier) {
        (Some(v4), _) => Finding::ok(STAGE, format!("IGMP queries come from {v4}")),
        (None, Some(v6)) => Finding::ok(STAGE, format!("MLD queries come from {v6}")),
        (None, None) => {
            let switch = "switch an IGMP querier on at the router or switch of this segment, or switch snooping off";
            let remedy = if limit.as_secs() < QUERY_INTERVAL {
                format!("listen for longer (relay doctor --listen 130s); if still none: {switch}")
            } else {
                switch.into()
            };
            let reason = format!(
                "no IGMP or MLD query in {} s: without a querier, snooping switches stop a stream after about four minutes",
                limit.as_secs()
            );
            Finding::warn(STAGE, reason, remedy)
        }
    }
}

fn filter(scene: &Scene, interface: &Interface) -> Finding {
    const STAGE: &str = "mac-filter";
    let name = &interface.name;
    if interface.unfiltered {
        return Finding::ok(STAGE, "takes every multicast frame");
    }
    if let Some(rule) = scene.taking(name).find(|rule| !rule.join && rule.matching.group.addr.is_multicast()) {
        return Finding::warn(
            STAGE,
            format!("rule {} does not join (join=no): the card's MAC filter may refuse its group", rule.id),
            format!("ip link set {name} allmulticast on"),
        );
    }
    let list = table("dev_mcast");
    let lacking = scene.question.daemon.as_ref().and_then(|_| scene.taking(name).find(|rule| !programmed(&list, name, rule)));
    match lacking {
        Some(rule) => Finding::fail(
            STAGE,
            format!("the MAC filter lacks the group of rule {}", rule.id),
            format!("ip link set {name} allmulticast on, and see `relay why {}`", rule.id),
        ),
        None => Finding::ok(STAGE, "joins program the MAC filter"),
    }
}

/// Lines of /proc/net/dev_mcast: `2 eth0 1 0 01005e010101`. Prefixes are joined address by address, not here.
fn programmed(list: &str, name: &str, rule: &Rule) -> bool {
    let group = rule.matching.group;
    let host = if group.addr.is_ipv4() { 32 } else { 128 };
    let Some(mac) = Some(group.addr).filter(|addr| addr.is_multicast() && group.len == host).map(group_mac) else { return true };
    let mac: String = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    list.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(1) == Some(&name) && words.last() == Some(&mac.as_str())
    })
}

fn group_mac(group: IpAddr) -> mac::Mac {
    match group {
        IpAddr::V4(v4) => mac::ipv4_group(v4.octets()),
        IpAddr::V6(v6) => mac::ipv6_group(v6.octets()),
    }
}

fn ttl(scene: &Scene, interface: &Interface) -> Finding {
    const STAGE: &str = "ttl";
    let heard = match scene.heard.get(&interface.name) {
        Some(Ok(heard)) => heard,
        _ => return Finding::skip(STAGE, "not listened for", "run it as root, with --listen 5s"),
    };
    let dies = |group: &IpAddr| {
        let of = scene.taking(&interface.name).filter(|rule| rule.matching.group.covers(&crate::rule::Prefix::host(*group)));
        let mut of = of.peekable();
        of.peek().is_none() || of.any(|rule| rule.outputs.iter().any(|output| output.ttl == Ttl::Dec))
    };
    let expiring: Vec<&IpAddr> = heard.ttl.iter().filter(|(group, ttl)| **ttl <= 1 && dies(group)).map(|(group, _)| group).collect();
    match (expiring.first(), heard.udp) {
        (Some(group), _) => Finding::fail(
            STAGE,
            format!("{group} comes in with TTL 1: one hop, and a relay that counts it down must drop it (ttl_expired)"),
            "raise the sender's TTL (IP_MULTICAST_TTL), or say ttl=keep or ttl=N on the output",
        ),
        (None, 0) if scene.question.daemon.is_some() => Finding::skip(
            STAGE,
            "no multicast passed by in that time (what the running relay takes is not seen here)",
            "see ttl_expired in `relay stats`",
        ),
        (None, 0) => Finding::skip(
            STAGE,
            "no multicast came in while listening",
            "start the sender, and listen for longer: relay doctor --listen 30s",
        ),
        (None, _) => Finding::ok(STAGE, format!("{} group(s) heard, with enough TTL left", heard.ttl.len())),
    }
}

/// The kernel takes the larger of `all` and the interface's own.
fn rp_filter(name: &str) -> Finding {
    const STAGE: &str = "rp-filter";
    let of = |whose: &str| sysctl(&format!("net/ipv4/conf/{whose}/rp_filter")).unwrap_or(0);
    match of("all").max(of(name)) {
        1 => Finding::warn(
            STAGE,
            "rp_filter is strict: ordinary sockets here (not the relay) lose multicast whose source is not routed back through this interface",
            format!("sysctl -w net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{name}.rp_filter=2"),
        ),
        _ => Finding::ok(STAGE, "not strict"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mac_filter_is_read_by_interface_and_address() {
        let list = "2    eth0            1     0     01005e000001\n3    eth1            1     0     01005e010101";
        let rule: Rule = "eth1 239.1.1.1:5000 -> eth0".parse().unwrap();
        assert!(programmed(list, "eth1", &rule));
        assert!(!programmed(list, "eth0", &rule));
        let wide: Rule = "eth1 239.1.0.0/16:5000 -> eth0".parse().unwrap();
        assert!(programmed(list, "eth0", &wide), "prefixes are not looked for");
    }
}
