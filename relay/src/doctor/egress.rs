//! Stages about the rules together: loops, other forwarders of the same groups, and where outputs lead.

use super::{Finding, Scene, on, table};
use crate::plan::resolve::unicast_destination;
use crate::rule::set::RuleSet;
use crate::rule::{Output, Rule, SourceEdit};

/// All of them; nothing without rules.
pub(super) fn stages(scene: &mut Scene) -> Vec<Finding> {
    let rules = scene.question.rules.clone();
    if rules.is_empty() {
        return vec![Finding::skip(
            "loops",
            "no rules are known",
            "name them with --config FILE or --rule RULE, or ask a running relay (--socket)",
        )];
    }
    let mut findings = vec![loops(scene, &rules), other_forwarder()];
    for rule in &rules {
        findings.extend(rule.outputs.iter().map(|output| on(&output.egress, egress(scene, rule, output))));
    }
    findings.dedup();
    findings
}

fn loops(scene: &Scene, rules: &[Rule]) -> Finding {
    const STAGE: &str = "loops";
    if let Err(error) = RuleSet::new(rules.to_vec()) {
        return Finding::fail(STAGE, error.to_string(), "change the rules; `relay check FILE` says which");
    }
    let master = |name: &str| scene.known.get(name).and_then(|interface| interface.master);
    for rule in rules {
        for output in &rule.outputs {
            let same_group = output.to.is_none_or(|to| rule.matching.group.addr == to);
            if same_group && master(&rule.ingress).is_some() && master(&rule.ingress) == master(&output.egress) {
                return Finding::fail(
                    STAGE,
                    format!("{} and {} are ports of one bridge: what rule {} sends comes back to it", rule.ingress, output.egress, rule.id),
                    format!("take one out (ip link set {} nomaster), or send to another group", output.egress),
                );
            }
        }
    }
    Finding::ok(STAGE, format!("{} rule(s), and none feeds itself", rules.len()))
}

/// Active entries of the kernel's multicast routing: group, origin, input interface, packets, …
fn other_forwarder() -> Finding {
    const STAGE: &str = "other-forwarders";
    let routes = table("ip_mr_vif").lines().skip(1).count();
    if routes == 0 {
        return Finding::ok(STAGE, "the kernel's multicast routing is off: nobody else forwards");
    }
    Finding::warn(
        STAGE,
        format!("the kernel's multicast routing is on, on {routes} interface(s): a group that both forward arrives twice"),
        "stop smcrouted, pimd or mrouted for the relay's groups (`ip mroute show`)",
    )
}

fn egress(scene: &mut Scene, rule: &Rule, output: &Output) -> Finding {
    const STAGE: &str = "egress";
    let (name, id) = (&output.egress, &rule.id);
    let Some(interface) = scene.known.get(name).cloned() else {
        return Finding::fail(
            STAGE,
            format!("there is no interface {name} (rule {id})"),
            format!("make it, or change the rule; `ip link` lists {}", scene.known.keys().cloned().collect::<Vec<_>>().join(", ")),
        );
    };
    let ipv4 = rule.matching.group.addr.is_ipv4();
    let family = if ipv4 { "IPv4" } else { "IPv6" };
    let has_address = if ipv4 { interface.ipv4().is_some() } else { interface.ipv6().is_some() };
    if output.src == SourceEdit::Egress && !has_address {
        return Finding::fail(
            STAGE,
            format!("rule {id} says src=egress, and {name} has no {family} address"),
            format!("ip addr add ADDRESS/LEN dev {name}"),
        );
    }
    let Some(destination) = unicast_destination(&rule.matching, output) else {
        return Finding::ok(STAGE, "sends to a group: no route and no neighbour needed");
    };
    // Asked for one interface, the kernel takes everything without a route to be on its link: so it is asked without one as well.
    let routed = scene.netlink.next_hop(destination, None).is_ok_and(|hop| hop.is_some_and(|hop| hop.ifindex == interface.ifindex));
    match scene.netlink.next_hop(destination, Some(interface.ifindex)) {
        Err(error) => Finding::skip(STAGE, error.to_string(), ""),
        Ok(Some(hop)) if hop.mac.is_some() => Finding::ok(STAGE, format!("{destination} is reached through {}", hop.gateway)),
        Ok(Some(hop)) if routed => Finding::warn(
            STAGE,
            format!(
                "the neighbour {} for {destination} is not resolved yet (rule {id}): until then packets are dropped as no_neighbor",
                hop.gateway
            ),
            format!("see that it is up: ping -c 1 -I {name} {}", hop.gateway),
        ),
        Ok(_) => Finding::fail(
            STAGE,
            format!("no route to {destination} out of {name} (rule {id})"),
            format!("ip route add {destination} via GATEWAY dev {name}"),
        ),
    }
}
