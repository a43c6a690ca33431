//! The planner: which path and engine carries a rule, and why. `relay rule explain` says its words.
//!
//! Pure: a rule, what was asked for, and facts that others have found out. Must never ask the kernel, and never choose another
//! path than the one asked for: what can't be had is said.

use crate::rule::{EngineChoice, Rule};
use relay_common::MAX_OWN;
use relay_common::kernel::{MAX_LINEAR_L3_LEN, MAX_OUTPUTS_OF_PLAN};

/// Which path was asked for, by the rule or by the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// The best that can be had.
    #[default]
    Auto,
    /// The kernel path and no other.
    Kernel,
    /// A worker over AF_XDP, or over AF_PACKET where that is the rung below.
    Xsk,
    /// A worker over AF_PACKET.
    Packet,
}

/// How an interface is driven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Drive {
    /// The XDP program runs in its driver.
    Native,
    /// The XDP program runs in the stack.
    Generic,
    /// AF_PACKET, for this reason.
    Packet(String),
}

/// What is known about a rule's ingress interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IngressFacts {
    /// How it is driven.
    pub drive: Drive,
    /// Its MTU.
    pub mtu: u32,
    /// Its own IPv4 addresses.
    pub own4: usize,
    /// Its own IPv6 addresses.
    pub own6: usize,
    /// Why its port is what it is.
    pub reason: String,
}

/// What is known about the interface of one output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressFacts {
    /// Its name.
    pub name: String,
    /// Kind of virtual interface, empty for others.
    pub kind: String,
    /// Whether it takes redirected packets (NDO_XMIT); `None`: the kernel does not say (before 6.3).
    pub takes_redirected: Option<bool>,
    /// It is there.
    pub present: bool,
}

/// All that the planner looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// What was asked for.
    pub wish: Wish,
    /// Why the program has no kernel path, if it has none.
    pub no_kernel: Option<String>,
    /// `None`: the interface is missing, or no port of it is made yet.
    pub ingress: Option<IngressFacts>,
    /// One for each output.
    pub egress: Vec<EgressFacts>,
    /// A capture asks for a worker to carry it.
    pub is_captured: bool,
}

/// What carries a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// The XDP program itself.
    Kernel,
    /// A worker over AF_XDP.
    Xsk,
    /// A worker over AF_PACKET.
    Packet,
    /// Nothing yet.
    Pending,
}

impl Path {
    /// Its name in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Xsk => "xsk",
            Self::Packet => "packet",
            Self::Pending => "pending",
        }
    }
}

/// The planner's word on one rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What carries it.
    pub path: Path,
    /// `xdp`, `tx`, `uring` or empty.
    pub engine: &'static str,
    /// Why.
    pub reason: String,
    /// The path asked for can't be had, for this reason: nothing carries the rule.
    pub unmet: Option<String>,
}

/// Chooses.
pub fn choose(rule: &Rule, facts: &Facts) -> Decision {
    match facts.wish {
        Wish::Kernel => insisted(rule, facts),
        Wish::Auto => match obstacle(rule, facts).or_else(|| by_capture(facts)) {
            None => in_kernel("nothing it asks for needs a process".into()),
            Some(why) => by_worker(facts, &format!("not in the kernel, since {why}; ")),
        },
        Wish::Xsk | Wish::Packet => by_worker(facts, ""),
    }
}

fn insisted(rule: &Rule, facts: &Facts) -> Decision {
    let unmet = obstacle(rule, facts);
    let reason = unmet.as_ref().map_or_else(|| "asked for by path=kernel or --backend kernel".into(), |why| format!("can't be had: {why}"));
    Decision { unmet, ..in_kernel(reason) }
}

const fn in_kernel(reason: String) -> Decision {
    Decision { path: Path::Kernel, engine: "xdp", reason, unmet: None }
}

fn by_worker(facts: &Facts, before: &str) -> Decision {
    let (path, engine, why) = match &facts.ingress {
        None => (Path::Pending, "", "the ingress interface is missing"),
        Some(IngressFacts { drive: Drive::Packet(_), reason, .. }) => (Path::Packet, "uring", reason.as_str()),
        Some(ingress) => (Path::Xsk, "tx", ingress.reason.as_str()),
    };
    Decision { path, engine, reason: format!("{before}{why}"), unmet: None }
}

/// What keeps a rule from the kernel path; the first obstacle is named.
fn obstacle(rule: &Rule, facts: &Facts) -> Option<String> {
    by_rule(rule)
        .or_else(|| facts.no_kernel.clone())
        .or_else(|| by_ingress(rule, facts))
        .or_else(|| facts.egress.iter().find_map(by_egress))
}

fn by_rule(rule: &Rule) -> Option<String> {
    if rule.engine != EngineChoice::Auto {
        return Some("engine= names an engine of a worker".into());
    }
    if let Some(output) = rule.outputs.iter().position(|output| output.rate.is_some()) {
        return Some(format!("output {output} has rate=, which only a worker keeps"));
    }
    (rule.outputs.len() > MAX_OUTPUTS_OF_PLAN as usize).then(|| format!("it has more than {MAX_OUTPUTS_OF_PLAN} outputs"))
}

fn by_ingress(rule: &Rule, facts: &Facts) -> Option<String> {
    let name = &rule.ingress;
    let Some(ingress) = &facts.ingress else { return Some(format!("interface {name} is missing")) };
    match &ingress.drive {
        Drive::Native => {}
        Drive::Generic => return Some(format!("the program runs in generic mode on {name} (native is needed)")),
        Drive::Packet(why) => return Some(format!("no XDP program runs on {name} ({why})")),
    }
    if ingress.mtu > MAX_LINEAR_L3_LEN {
        return Some(format!(
            "packets of {name} may be larger than one page with its headroom (MTU {}, at most {MAX_LINEAR_L3_LEN})",
            ingress.mtu
        ));
    }
    let own = if rule.matching.group.addr.is_ipv4() { ingress.own4 } else { ingress.own6 };
    (own > MAX_OWN).then(|| format!("{name} has {own} addresses of its own, and the program compares a source with {MAX_OWN}"))
}

fn by_capture(facts: &Facts) -> Option<String> {
    facts.is_captured.then(|| "a capture wants a worker to carry it (--by-worker)".into())
}

fn by_egress(egress: &EgressFacts) -> Option<String> {
    let name = &egress.name;
    if !egress.present {
        // Its own outputs wait for it, on any path; the others go on.
        return None;
    }
    match egress.takes_redirected {
        Some(true) => None,
        Some(false) if egress.kind == "veth" => {
            Some(format!("{name} takes no redirected packets: its peer needs GRO or an XDP program (`ethtool -K PEER gro on`)"))
        }
        Some(false) => Some(format!("the driver of {name} takes no redirected packets (NDO_XMIT)")),
        None => Some(format!("the kernel does not say whether {name} takes redirected packets (before 6.3)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn facts(wish: Wish) -> Facts {
        let ingress = IngressFacts { drive: Drive::Native, mtu: 1500, own4: 1, own6: 2, reason: "native XDP attached".into() };
        let egress = EgressFacts { name: "b".into(), kind: "veth".into(), takes_redirected: Some(true), present: true };
        Facts { wish, no_kernel: None, ingress: Some(ingress), egress: vec![egress], is_captured: false }
    }

    fn rule(line: &str) -> Rule {
        line.parse().unwrap()
    }

    const PLAIN: &str = "a 239.1.1.1:5000 -> b 239.9.9.9:6000";

    /// What is changed in the facts, and the word that has to stand in the reason.
    type Case = (&'static str, fn(&mut Facts), &'static str);

    #[test]
    fn every_obstacle_is_named_and_auto_goes_to_a_worker() {
        let cases: &[Case] = &[
            ("a 239.1.1.1:5000 -> b; engine=tx", |_| {}, "engine="),
            ("a 239.1.1.1:5000 -> b rate=10kpps", |_| {}, "rate="),
            (PLAIN, |f| f.no_kernel = Some("the kernel refuses it".into()), "refuses"),
            (PLAIN, |f| with(f, |i| i.drive = Drive::Generic), "generic"),
            (PLAIN, |f| with(f, |i| i.mtu = 9000), "MTU 9000"),
            (PLAIN, |f| with(f, |i| i.own4 = 5), "5 addresses"),
            ("a [ff3e::1]:5000 -> b", |f| with(f, |i| i.own6 = 9), "9 addresses"),
            (PLAIN, |f| f.egress[0].takes_redirected = Some(false), "gro on"),
            (PLAIN, |f| (f.egress[0].takes_redirected, f.egress[0].kind) = (Some(false), String::new()), "NDO_XMIT"),
            (PLAIN, |f| f.egress[0].takes_redirected = None, "6.3"),
        ];
        for (line, change, word) in cases {
            let mut auto = facts(Wish::Auto);
            change(&mut auto);
            let decision = choose(&rule(line), &auto);
            assert_eq!((decision.path, decision.engine, decision.unmet), (Path::Xsk, "tx", None), "{line} {word}");
            assert!(decision.reason.contains(word) && decision.reason.contains("native XDP attached"), "{word}: {}", decision.reason);
            let insisted = choose(&rule(line), &Facts { wish: Wish::Kernel, ..auto });
            assert!(insisted.unmet.is_some_and(|why| why.contains(word)), "{word}");
        }
    }

    fn with(facts: &mut Facts, change: impl Fn(&mut IngressFacts)) {
        facts.ingress.iter_mut().for_each(change);
    }

    #[test]
    fn without_obstacle_auto_is_the_kernel() {
        for line in [PLAIN, "a 239.1.1.1:5000 -> b vlan=7 dscp=46 src=egress, b ttl=3; exact=yes"] {
            let decision = choose(&rule(line), &facts(Wish::Auto));
            assert_eq!((decision.path, decision.engine, decision.unmet), (Path::Kernel, "xdp", None), "{line}");
        }
    }

    #[test]
    fn an_output_without_its_interface_is_no_obstacle_for_the_others() {
        for wish in [Wish::Auto, Wish::Kernel] {
            let mut facts = facts(wish);
            (facts.egress[0].present, facts.egress[0].takes_redirected) = (false, None);
            assert_eq!(choose(&rule(PLAIN), &facts).unmet, None);
            assert_eq!(choose(&rule(PLAIN), &facts).path, Path::Kernel);
        }
    }

    #[test]
    fn a_capture_moves_what_may_be_moved() {
        let captured = |wish| choose(&rule(PLAIN), &Facts { is_captured: true, ..facts(wish) });
        let auto = captured(Wish::Auto);
        assert!(auto.path == Path::Xsk && auto.reason.contains("a capture wants a worker"), "{auto:?}");
        let insisted = captured(Wish::Kernel);
        assert_eq!((insisted.path, insisted.unmet), (Path::Kernel, None), "who insists on the path keeps it");
    }

    #[test]
    fn the_rung_below_is_said_with_its_reason() {
        let mut facts = facts(Wish::Auto);
        with(&mut facts, |i| (i.drive, i.reason) = (Drive::Packet("no native XDP".into()), "fell back: no native XDP".into()));
        let decision = choose(&rule(PLAIN), &facts);
        assert_eq!((decision.path, decision.engine), (Path::Packet, "uring"));
        assert!(decision.reason.contains("fell back"), "{}", decision.reason);
        assert_eq!(choose(&rule(PLAIN), &Facts { ingress: None, ..facts }).path, Path::Pending);
    }

    proptest! {
        /// Whatever the facts: a path asked for is never replaced by another one, and only a rule without obstacle is in force.
        #[test]
        fn what_is_asked_for_is_never_replaced(
            wish in prop_oneof![Just(Wish::Auto), Just(Wish::Kernel), Just(Wish::Xsk), Just(Wish::Packet)],
            drive in 0..3, mtu in 68_u32..10_000, own in 0_usize..9, takes in prop::option::of(any::<bool>()),
            present in any::<bool>(), refused in any::<bool>(), missing in any::<bool>(),
        ) {
            let mut facts = facts(wish);
            with(&mut facts, |i| {
                i.drive = match drive { 0 => Drive::Native, 1 => Drive::Generic, _ => Drive::Packet("why".into()) };
                (i.mtu, i.own4) = (mtu, own);
            });
            if missing { facts.ingress = None; }
            if refused { facts.no_kernel = Some("refused".into()); }
            (facts.egress[0].takes_redirected, facts.egress[0].present) = (takes, present);
            let decision = choose(&rule(PLAIN), &facts);
            let possible = obstacle(&rule(PLAIN), &facts).is_none();
            match wish {
                Wish::Kernel => prop_assert_eq!((decision.path, decision.unmet.is_none()), (Path::Kernel, possible)),
                Wish::Auto => prop_assert_eq!(decision.path == Path::Kernel, possible),
                _ => prop_assert!(decision.path != Path::Kernel && decision.unmet.is_none()),
            }
            prop_assert!(!decision.reason.is_empty() && !decision.reason.contains('\n'));
        }
    }
}
