//! `relay why ID`: why a rule moves no packets, in sentences, from what is there now.
//!
//! Compares counters a moment apart and listens meanwhile on the ingress interface for what XDP left to the kernel. The nearest
//! cause comes first. Pure but for [`overhear`]; must never guess: a sentence says what was seen.

use super::listen::{Heard, addresses, listen};
use crate::control::message::{InterfaceStats, OutputStats, RuleInfo, RuleStats, Stats, Status};
use crate::rule::{Prefix, Rule, TagMatch};
use crate::supervisor::interfaces::Interface;
use crate::wire::parse::{Headers, ParseVerdict, parse};
use relay_common::TAG_NONE;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

/// One cause, or one thing that goes well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sentence {
    /// What was seen.
    pub sentence: String,
    /// What to type or change, or empty.
    pub remedy: String,
}

/// What `relay why` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// The rule.
    pub id: String,
    /// Whether every output sent packets and dropped none.
    pub moving: bool,
    /// The nearest cause first.
    pub sentences: Vec<Sentence>,
}

/// Packets of the rule's group that were heard, by why the rule does not take them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overheard {
    /// All that the rule would take.
    pub fitting: u64,
    /// Other VLAN tags, outer first; `None` untagged.
    pub tags: BTreeMap<Option<(u16, Option<u16>)>, u64>,
    /// Other ports.
    pub ports: BTreeMap<u16, u64>,
    /// Sources outside the rule's.
    pub sources: BTreeMap<IpAddr, u64>,
    /// Sources that `except=` names.
    pub excepted: BTreeMap<IpAddr, u64>,
    /// Fragments to the group.
    pub fragments: u64,
    /// Queries, TTLs.
    pub heard: Heard,
}

/// Everything the answer is made from.
#[derive(Clone, Debug)]
pub struct Evidence<'a> {
    /// The rule.
    pub rule: &'a Rule,
    /// As it runs.
    pub info: &'a RuleInfo,
    /// All rules that run.
    pub others: &'a [RuleInfo],
    /// `relay status`, afterwards.
    pub status: &'a Status,
    /// Counters before.
    pub before: &'a Stats,
    /// Counters afterwards.
    pub after: &'a Stats,
    /// Between them.
    pub period: Duration,
    /// Interfaces here.
    pub known: &'a BTreeMap<String, Interface>,
    /// What was heard meanwhile, or why nothing could be.
    pub overheard: &'a Result<Overheard, String>,
}

/// Listens for packets of the rule's group that its path does not take.
pub fn overhear(rule: &Rule, ifindex: u32, limit: Duration) -> Result<Overheard, String> {
    let mut overheard = Overheard::default();
    listen(ifindex, limit, |packet, len| {
        overheard.take(rule, packet, len);
        true
    })?;
    Ok(overheard)
}

impl Overheard {
    fn take(&mut self, rule: &Rule, packet: &[u8], len: usize) {
        self.heard.take(packet, len);
        match parse(packet, len) {
            Ok(headers) => self.sort(rule, &headers),
            Err(ParseVerdict::Fragment) if fragment_group(packet).is_some_and(|to| rule.matching.group.covers(&Prefix::host(to))) => {
                self.fragments += 1;
            }
            Err(_) => {}
        }
    }

    fn sort(&mut self, rule: &Rule, headers: &Headers) {
        let matching = &rule.matching;
        let (source, group) = addresses(headers);
        if !matching.group.covers(&Prefix::host(group)) {
            return;
        }
        let from = Prefix::host(source);
        if !tag_fits(matching.tag, headers.tag) {
            *self.tags.entry(tag_of(headers.tag)).or_default() += 1;
        } else if matching.port.is_some_and(|port| port != headers.dport) {
            *self.ports.entry(headers.dport).or_default() += 1;
        } else if matching.except.iter().any(|except| except.covers(&from)) {
            *self.excepted.entry(source).or_default() += 1;
        } else if matching.source.is_some_and(|wanted| !wanted.covers(&from)) {
            *self.sources.entry(source).or_default() += 1;
        } else {
            self.fitting += 1;
        }
    }
}

fn tag_of(tag: u32) -> Option<(u16, Option<u16>)> {
    let (outer, inner) = ((tag & 0xffff) as u16, (tag >> 16) as u16);
    (tag != TAG_NONE).then_some((outer, Some(inner).filter(|inner| *inner != 0)))
}

fn tag_fits(wanted: TagMatch, tag: u32) -> bool {
    match wanted {
        TagMatch::Any => true,
        TagMatch::None => tag_of(tag).is_none(),
        TagMatch::Vlan(id) => tag_of(tag) == Some((id, None)),
        TagMatch::QinQ(outer, inner) => tag_of(tag) == Some((outer, Some(inner))),
    }
}

/// Destination of an IPv4 fragment.
fn fragment_group(packet: &[u8]) -> Option<IpAddr> {
    let tags = (0..2).take_while(|n| matches!(packet.get(12 + 4 * n..14 + 4 * n), Some([0x81, 0x00] | [0x88, 0xa8]))).count();
    let destination: [u8; 4] = packet.get(14 + 4 * tags + 16..14 + 4 * tags + 20)?.try_into().ok()?;
    Some(destination.into())
}

/// Makes the sentences.
pub fn answer(evidence: &Evidence<'_>) -> Answer {
    let mut sentences = Vec::new();
    let taken = moved(
        rule_of(evidence.after, evidence.rule).map(|rule| rule.rx_packets),
        rule_of(evidence.before, evidence.rule).map(|rule| rule.rx_packets),
    );
    let moving = taken > 0 && outputs(evidence, taken, &mut sentences);
    if taken > 0 {
        // What a queue or a ring loses may be this rule's, even if all that it takes is sent.
        interface_drops(evidence, &mut sentences);
    } else {
        workers(evidence, &mut sentences);
        ingress(evidence, &mut sentences);
        if sentences.is_empty() {
            interface_drops(evidence, &mut sentences);
            overheard(evidence, &mut sentences);
            rivals(evidence, &mut sentences);
            if sentences.is_empty() {
                nothing(evidence, &mut sentences);
            }
        }
    }
    Answer { id: evidence.rule.id.clone(), moving, sentences }
}

fn say(sentences: &mut Vec<Sentence>, sentence: impl Into<String>, remedy: impl Into<String>) {
    sentences.push(Sentence { sentence: sentence.into(), remedy: remedy.into() });
}

fn rule_of<'a>(stats: &'a Stats, rule: &Rule) -> Option<&'a RuleStats> {
    stats.rules.iter().find(|one| one.id == rule.id)
}

fn interface_of<'a>(stats: &'a Stats, name: &str) -> Option<&'a InterfaceStats> {
    stats.interfaces.iter().find(|one| one.name == name)
}

fn moved(after: Option<u64>, before: Option<u64>) -> u64 {
    after.unwrap_or(0).saturating_sub(before.unwrap_or(0))
}

fn moved_by(after: &BTreeMap<String, u64>, before: Option<&BTreeMap<String, u64>>) -> Vec<(String, u64)> {
    let since = |reason: &String, count: u64| count.saturating_sub(before.and_then(|before| before.get(reason)).copied().unwrap_or(0));
    let mut moved: Vec<(String, u64)> =
        after.iter().map(|(reason, count)| (reason.clone(), since(reason, *count))).filter(|(_, n)| *n > 0).collect();
    moved.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    moved
}

fn rate(packets: u64, period: Duration) -> String {
    format!("{:.0} a second", packets as f64 / period.as_secs_f64().max(0.001))
}

/// The rule takes packets: what becomes of them. Whether every output sends and drops nothing.
fn outputs(evidence: &Evidence<'_>, taken: u64, sentences: &mut Vec<Sentence>) -> bool {
    let Some(after) = rule_of(evidence.after, evidence.rule) else { return false };
    let before = rule_of(evidence.before, evidence.rule);
    let mut well = true;
    for (reason, count) in moved_by(&after.drops, before.map(|before| &before.drops)) {
        well = false;
        say(sentences, format!("{count} of {taken} packets reach no output: {}", meaning(&reason)), cure(&reason, &evidence.rule.ingress));
    }
    for output in &after.outputs {
        let earlier = before.and_then(|before| before.outputs.get(output.index as usize));
        well &= one_output(evidence, output, earlier, sentences);
    }
    if well {
        say(
            sentences,
            format!("rule {} works: it takes {} and every output sends them", evidence.rule.id, rate(taken, evidence.period)),
            "",
        );
    }
    well
}

fn one_output(evidence: &Evidence<'_>, output: &OutputStats, before: Option<&OutputStats>, sentences: &mut Vec<Sentence>) -> bool {
    let sent = moved(Some(output.tx_packets), before.map(|before| before.tx_packets));
    let dropped = moved_by(&output.drops, before.map(|before| &before.drops));
    for (reason, count) in &dropped {
        let of = count + sent;
        say(
            sentences,
            format!("output {} ({}) drops {count} of {of}: {}", output.index, output.egress, about_output(evidence, output, reason)),
            output_cure(evidence, output, reason),
        );
    }
    dropped.is_empty() && sent > 0
}

fn about_output(evidence: &Evidence<'_>, output: &OutputStats, reason: &str) -> String {
    match (reason, evidence.known.get(&output.egress)) {
        ("output_down", None) => format!("interface {} is missing", output.egress),
        ("output_down" | "send_failed", Some(interface)) if !interface.up => format!("interface {} is down", output.egress),
        ("output_down" | "send_failed", Some(interface)) if !interface.carrier => format!("interface {} has no carrier", output.egress),
        ("output_down", Some(_)) => format!("interface {} has no usable address for src=egress", output.egress),
        ("mtu_exceeded", Some(interface)) => format!("they are larger than the MTU of {} ({})", output.egress, interface.mtu),
        _ => meaning(reason).to_owned(),
    }
}

fn output_cure(evidence: &Evidence<'_>, output: &OutputStats, reason: &str) -> String {
    let (name, known) = (&output.egress, evidence.known.get(&output.egress));
    match (reason, known) {
        ("output_down", None) => format!("make the interface {name}; the relay takes it up again by itself"),
        ("output_down" | "send_failed", Some(interface)) if !interface.up => format!("ip link set {name} up"),
        ("output_down" | "send_failed", Some(interface)) if !interface.carrier => format!("bring the other end of {name} up"),
        ("output_down", Some(_)) => format!("ip addr add ADDRESS/LEN dev {name}"),
        ("mtu_exceeded", Some(_)) => {
            let from = evidence.known.get(&evidence.rule.ingress).map_or(1500, |ingress| ingress.mtu);
            format!("ip link set {name} mtu {from}, or send smaller packets")
        }
        ("no_neighbor", _) => format!("see that {} answers: ping -c 1 -I {name} {}", output.to, host(&output.to)),
        _ => cure(reason, name),
    }
}

/// The address of `ADDR:PORT` or `ADDR`.
fn host(to: &str) -> String {
    to.parse::<std::net::SocketAddr>().map_or_else(|_| to.to_owned(), |address| address.ip().to_string())
}

/// What a drop reason means.
fn meaning(reason: &str) -> &'static str {
    match reason {
        "ttl_expired" => "their TTL is used up: they come in with TTL 1, and the output counts down",
        "no_frame" => "no free frame for this output's copy",
        "egress_full" => "the output is slower than the input",
        "no_neighbor" => "the next hop's link-layer address is not known",
        "output_down" => "the output is down",
        "mtu_exceeded" => "they are larger than the output's MTU",
        "rate_limited" => "they exceed the output's rate=",
        "no_headroom" => "no room in the frame for another tag",
        "send_failed" => "the kernel refused them for good",
        "malformed" => "their lengths contradict each other",
        "rule_gone" => "they were left over from a rule that is deleted",
        "multicast_source" => "their source address is a multicast address",
        "own_source" => "their source is this host's own address: a loop",
        "bad_ip_checksum" => "their IP checksum is wrong",
        "bad_udp_checksum" => "their UDP checksum is wrong",
        "too_big" => "they are larger than the path can carry",
        "invalid_descriptor" => "the kernel handed in a wrong descriptor",
        "poison" => "they killed workers and are skipped",
        "rx_ring_full" => "the worker is too slow: its RX ring is full",
        "fill_empty" => "the worker is too slow: no free frame to receive into",
        _ => "for a reason this version does not know",
    }
}

/// What to do about it.
fn cure(reason: &str, interface: &str) -> String {
    match reason {
        "ttl_expired" => "raise the sender's TTL, or say ttl=keep or ttl=N on the output".into(),
        "no_frame" | "rx_ring_full" | "fill_empty" => {
            "give the worker more frames (relay run --frames N) or a CPU of its own (--cpus), or add workers (--workers N)".into()
        }
        "egress_full" => format!("see what slows {interface} down, or say rate= on the output"),
        "rate_limited" => "raise or leave out rate= on the output".into(),
        "too_big" => "lower the sender's packet size, or use an interface with native XDP".into(),
        "own_source" => format!("find who sends this host's packets back to {interface}, or say except=ADDRESS in the rule"),
        "multicast_source" | "malformed" | "bad_ip_checksum" | "bad_udp_checksum" => {
            "correct the sender, or the device that rewrites its packets".into()
        }
        "no_headroom" => "send fewer tags: vlan=ID replaces them".into(),
        "invalid_descriptor" | "poison" => "report it with the output of `relay status` and `relay stats`".into(),
        _ => "see `relay status` and the daemon's log".into(),
    }
}

fn workers(evidence: &Evidence<'_>, sentences: &mut Vec<Sentence>) {
    for worker in evidence.status.workers.iter().filter(|worker| worker.state != "run") {
        let last = if worker.last_exit.is_empty() { String::new() } else { format!(" (the last one ended: {})", worker.last_exit) };
        say(sentences, format!("worker {} does not run: {}{last}", worker.id, worker.state), "see the daemon's log");
    }
}

fn ingress(evidence: &Evidence<'_>, sentences: &mut Vec<Sentence>) {
    let name = &evidence.rule.ingress;
    match evidence.known.get(name) {
        None => say(
            sentences,
            format!("the ingress interface {name} is missing"),
            format!("make the interface {name}; the relay takes it up again by itself"),
        ),
        Some(interface) if !interface.up => {
            say(sentences, format!("the ingress interface {name} is down"), format!("ip link set {name} up"))
        }
        Some(interface) if !interface.carrier => {
            say(sentences, format!("the ingress interface {name} has no carrier"), "bring its other end up");
        }
        Some(interface) if evidence.rule.join && !interface.multicast => {
            say(
                sentences,
                format!("multicast is switched off on {name}, so no membership is reported"),
                format!("ip link set {name} multicast on"),
            );
        }
        Some(_) => {}
    }
}

fn interface_drops(evidence: &Evidence<'_>, sentences: &mut Vec<Sentence>) {
    let name = &evidence.rule.ingress;
    let Some(after) = interface_of(evidence.after, name) else { return };
    let before = interface_of(evidence.before, name);
    // What no rule takes is the host's (the packet path counts it here), and not this rule's cause.
    let lost = moved_by(&after.drops, before.map(|before| &before.drops)).into_iter().filter(|(reason, _)| reason != "no_rule");
    for (reason, count) in lost {
        say(sentences, format!("{name} loses {count} packets before any rule takes them: {}", meaning(&reason)), cure(&reason, name));
    }
    let unserved = moved(after.passed_by.get("no_socket").copied(), before.and_then(|before| before.passed_by.get("no_socket").copied()));
    if unserved > 0 {
        let queues = evidence.known.get(name).map_or(0, |interface| interface.rx_queues);
        let count = evidence.status.workers.len() as u32;
        let fewer = evidence.known.get(name).map_or_else(String::new, |interface| super::link::fewer_queues(interface, count));
        say(
            sentences,
            format!("{unserved} packets came in on a queue of {name} that no worker serves ({queues} RX queues, {count} worker(s))"),
            format!("{fewer}, or relay run --workers {queues}"),
        );
    }
}

fn tag_text(tag: Option<(u16, Option<u16>)>) -> String {
    match tag {
        None => "none".into(),
        Some((outer, None)) => outer.to_string(),
        Some((outer, Some(inner))) => format!("{outer}.{inner}"),
    }
}

/// Packets of the group came by and were not the rule's.
fn overheard(evidence: &Evidence<'_>, sentences: &mut Vec<Sentence>) {
    let Ok(over) = evidence.overheard else { return };
    let group = evidence.rule.matching.group;
    for (tag, count) in &over.tags {
        let carried = if tag.is_none() { "no VLAN tag".into() } else { format!("VLAN tag {}", tag_text(*tag)) };
        say(
            sentences,
            format!("{count} packets to {group} carry {carried}, and the rule takes tag={}", wanted_tag(evidence.rule)),
            format!("say tag={} (or tag=any) in the rule", tag_text(*tag)),
        );
    }
    for (port, count) in &over.ports {
        let wanted = evidence.rule.matching.port.unwrap_or(0);
        say(
            sentences,
            format!("{count} packets to {group} go to port {port}, and the rule takes port {wanted}"),
            format!("say :{port} in the rule, or leave the port out"),
        );
    }
    for (source, count) in &over.sources {
        let wanted = evidence.rule.matching.source.map_or_else(String::new, |source| source.to_string());
        say(
            sentences,
            format!("{count} packets to {group} come from {source}, and the rule takes only {wanted}"),
            format!("say {source}@ in the rule, or leave the source out"),
        );
    }
    for (source, count) in &over.excepted {
        say(
            sentences,
            format!("{count} packets to {group} come from {source}, which except= leaves to the host"),
            "take that except= out of the rule",
        );
    }
    if over.fitting > 0 {
        let path = &evidence.info.path;
        say(
            sentences,
            format!(
                "{} packets fit the rule, and went to the host instead of path {path}: the rule is not in force on this queue",
                over.fitting
            ),
            "see `relay doctor` for queues, and `relay status` for workers",
        );
    }
    if over.fragments > 0 {
        say(
            sentences,
            format!("{} packets to {group} are fragments, which pass: only the first has a port", over.fragments),
            "send datagrams that fit the sender's MTU",
        );
    }
}

fn wanted_tag(rule: &Rule) -> String {
    match rule.matching.tag {
        TagMatch::None => "none".into(),
        TagMatch::Any => "any".into(),
        TagMatch::Vlan(id) => id.to_string(),
        TagMatch::QinQ(outer, inner) => format!("{outer}.{inner}"),
    }
}

/// Another rule of this ingress whose match overlaps took packets meanwhile.
fn rivals(evidence: &Evidence<'_>, sentences: &mut Vec<Sentence>) {
    let Some(own) = rule_of(evidence.after, evidence.rule) else { return };
    for other in evidence.after.rules.iter().filter(|other| other.id != own.id) {
        let before = evidence.before.rules.iter().find(|before| before.id == other.id);
        let taken = moved(Some(other.rx_packets), before.map(|before| before.rx_packets));
        if taken > 0 && evidence.rivals_of_rule().any(|id| id == other.id) {
            say(
                sentences,
                format!("rule {} takes {taken} packets that both match: its match is narrower", other.id),
                format!("delete rule {}, or give both outputs to it: one packet has one rule", other.id),
            );
        }
    }
}

impl Evidence<'_> {
    /// Ids of rules whose canonical text has the same ingress and an overlapping group.
    fn rivals_of_rule(&self) -> impl Iterator<Item = String> {
        let parsed = self.others.iter().filter_map(|info| info.rule.parse::<Rule>().ok());
        parsed
            .filter(|other| other.ingress == self.rule.ingress && other.matching.group.overlaps(&self.rule.matching.group))
            .map(|other| other.id)
    }
}

/// Nothing came, and nothing near it.
fn nothing(evidence: &Evidence<'_>, sentences: &mut Vec<Sentence>) {
    let (name, group) = (&evidence.rule.ingress, evidence.rule.matching.group);
    let seconds = evidence.period.as_secs_f64().round();
    let total = rule_of(evidence.after, evidence.rule).map_or(0, |rule| rule.rx_packets);
    if evidence.rule.join && group.addr.is_multicast() && !evidence.info.joined {
        say(
            sentences,
            format!("{group} is not joined on {name}, so switches do not send it here"),
            format!(
                "see the daemon's log for what the kernel answered; {} (it is tried again every second)",
                unjoined_cure(group.addr, name)
            ),
        );
    }
    let so_far = if total > 0 { format!(" ({total} earlier)") } else { String::new() };
    match evidence.overheard {
        Err(error) => {
            say(
                sentences,
                format!("no packet for this rule in {seconds} s{so_far}; what passes by was not seen: {error}"),
                "run it as root, in the network namespace of the relay",
            );
        }
        Ok(over) => {
            say(
                sentences,
                format!("nothing to {group} came in on {name} in {seconds} s{so_far}"),
                format!(
                    "see that the sender runs, and sends out of an interface on this segment with TTL > 1: relay send --iface IF --to {}",
                    example(evidence.rule)
                ),
            );
            quiet_segment(evidence, over, sentences);
        }
    }
}

/// What most often stands against a membership.
fn unjoined_cure(group: IpAddr, interface: &str) -> String {
    if group.is_ipv4() {
        return "raise net.ipv4.igmp_max_memberships or net.core.optmem_max if it says so".into();
    }
    format!("sysctl -w net.ipv6.conf.{interface}.disable_ipv6=0 if IPv6 is off there")
}

/// `239.1.1.1:5000` of the rule's match.
fn example(rule: &Rule) -> String {
    std::net::SocketAddr::new(rule.matching.group.addr, rule.matching.port.unwrap_or(5000)).to_string()
}

/// A silent querier is a cause only where a stream could have lapsed for want of one.
fn quiet_segment(evidence: &Evidence<'_>, over: &Overheard, sentences: &mut Vec<Sentence>) {
    let rule = evidence.rule;
    if !rule.matching.group.addr.is_multicast() {
        return;
    }
    if !rule.join {
        say(
            sentences,
            "the relay does not join this group (join=no), so a snooping switch does not send it here",
            "say join=yes, or leave join= out",
        );
    } else if over.heard.igmp_querier.is_none() && over.heard.mld_querier.is_none() {
        say(
            sentences,
            "the group is joined, but no querier was heard meanwhile: without one, snooping switches stop a stream after about four minutes",
            "relay doctor --listen 130s tells for sure; then switch an IGMP querier on at the router or switch",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::message::WorkerInfo;
    use crate::plan::fate::{DropReason, OutputDropReason};

    const RULE: &str = "eth0 239.1.1.1:5000 -> eth1; id=a";

    /// The answer for a rule between two sound interfaces, once `change` has changed the counters, and `heard` was overheard.
    fn answer_to(change: impl Fn(&mut Stats, &mut Status), heard: &Overheard) -> Answer {
        let rule: Rule = RULE.parse().unwrap();
        let sound =
            |name: &str| Interface { name: name.into(), up: true, carrier: true, multicast: true, mtu: 1500, ..Interface::default() };
        let known = ["eth0", "eth1"].map(|name| (name.to_owned(), sound(name))).into();
        let info = RuleInfo { id: "a".into(), rule: RULE.into(), path: "xsk".into(), joined: true, ..RuleInfo::default() };
        let before = Stats {
            interfaces: vec![InterfaceStats { name: "eth0".into(), ..InterfaceStats::default() }],
            rules: vec![RuleStats {
                id: "a".into(),
                outputs: vec![OutputStats { egress: "eth1".into(), ..OutputStats::default() }],
                ..RuleStats::default()
            }],
            ..Stats::default()
        };
        let (mut after, mut status) = (before.clone(), Status::default());
        change(&mut after, &mut status);
        let evidence = Evidence {
            rule: &rule,
            info: &info,
            others: std::slice::from_ref(&info),
            status: &status,
            before: &before,
            after: &after,
            period: Duration::from_secs(1),
            known: &known,
            overheard: &Ok(heard.clone()),
        };
        answer(&evidence)
    }

    /// Not one of them is "for a reason this version does not know".
    #[test]
    fn every_drop_reason_has_a_meaning_and_a_remedy() {
        let unknown = (meaning("no such reason"), cure("no such reason", "eth0"));
        let whole = DropReason::ALL.iter().filter(|reason| **reason != DropReason::NoRule).map(|reason| reason.name());
        for name in whole.clone() {
            let by_rule = |stats: &mut Stats, _: &mut Status| {
                stats.rules[0].rx_packets = 9;
                stats.rules[0].drops.insert(name.into(), 9);
            };
            let by_interface = |stats: &mut Stats, _: &mut Status| {
                stats.interfaces[0].drops.insert(name.into(), 9);
            };
            for answer in [answer_to(by_rule, &Overheard::default()), answer_to(by_interface, &Overheard::default())] {
                let first = &answer.sentences[0];
                assert!(!answer.moving && first.sentence.contains(meaning(name)) && first.remedy == cure(name, "eth0"), "{answer:?}");
            }
        }
        for name in whole.chain(OutputDropReason::ALL.iter().map(|reason| reason.name())) {
            assert_ne!(meaning(name), unknown.0, "{name}");
        }
        for reason in OutputDropReason::ALL.iter().map(|reason| reason.name()) {
            let dropped = |stats: &mut Stats, _: &mut Status| {
                (stats.rules[0].rx_packets, stats.rules[0].outputs[0].tx_packets) = (9, 4);
                stats.rules[0].outputs[0].drops.insert(reason.into(), 5);
            };
            let answer = answer_to(dropped, &Overheard::default());
            let first = &answer.sentences[0];
            assert!(!answer.moving && first.sentence.starts_with("output 0 (eth1) drops 5 of 9") && !first.remedy.is_empty(), "{answer:?}");
        }
    }

    #[test]
    fn losses_before_the_rule_are_told_of_beside_its_success() {
        let beside = |stats: &mut Stats, _: &mut Status| {
            (stats.rules[0].rx_packets, stats.rules[0].outputs[0].tx_packets) = (9, 9);
            stats.interfaces[0].drops.insert("rx_ring_full".into(), 5);
        };
        let answer = answer_to(beside, &Overheard::default());
        assert!(answer.moving && answer.sentences[0].sentence.starts_with("rule a works"), "{answer:?}");
        assert!(answer.sentences[1].sentence.starts_with("eth0 loses 5 packets"), "{answer:?}");
    }

    #[test]
    fn a_worker_that_does_not_run_is_the_nearest_cause() {
        let degraded = |_: &mut Stats, status: &mut Status| {
            let last_exit = "signal 11".to_owned();
            status.workers = vec![WorkerInfo { id: 3, state: "degraded".into(), last_exit, ..WorkerInfo::default() }];
        };
        let answer = answer_to(degraded, &Overheard::default());
        assert_eq!(answer.sentences[0].sentence, "worker 3 does not run: degraded (the last one ended: signal 11)");
        assert_eq!(answer.sentences[0].remedy, "see the daemon's log");
    }

    #[test]
    fn packets_that_fit_and_pass_are_told_of() {
        let answer = answer_to(|_, _| {}, &Overheard { fitting: 7, ..Overheard::default() });
        assert!(answer.sentences[0].sentence.starts_with("7 packets fit the rule, and went to the host instead of path xsk"), "{answer:?}");
        assert!(answer.sentences[0].remedy.contains("relay status"), "{answer:?}");
    }

    /// The packet path counts the host's own packets there.
    #[test]
    fn what_no_rule_takes_is_no_cause() {
        let others = |stats: &mut Stats, _: &mut Status| {
            stats.interfaces[0].drops.insert("no_rule".into(), 9);
        };
        let answer = answer_to(others, &Overheard::default());
        assert!(answer.sentences[0].sentence.starts_with("nothing to 239.1.1.1"), "{answer:?}");
    }
}
