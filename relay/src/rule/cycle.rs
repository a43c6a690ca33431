//! Rules of one relay that feed each other in a circle: a packet would come round again and again.
//!
//! Works on what rules say, never on what interfaces are connected to: an output feeds a rule whose ingress is the
//! output's interface and which takes what the output sends.

use super::{Output, Prefix, Rule, SourceEdit, TagMatch, VlanEdit};
use std::collections::HashMap;
use std::net::IpAddr;

/// The rules of a circle in order, as indices; `None` where there is none.
pub(super) fn find(rules: &[Rule]) -> Option<Vec<usize>> {
    let index = Index::of(rules);
    let mut state = vec![State::New; rules.len()];
    (0..rules.len()).find_map(|start| walk(rules, &index, &mut state, start))
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    New,
    OnPath,
    Done,
}

/// Depth first from `start`, without recursion; a rule met again on the path closes a circle.
fn walk(rules: &[Rule], index: &Index<'_>, state: &mut [State], start: usize) -> Option<Vec<usize>> {
    let mut path: Vec<(usize, Vec<usize>)> = Vec::new();
    let mut next = (state.get(start) == Some(&State::New)).then_some(start);
    loop {
        if let Some(rule) = next.take() {
            *state.get_mut(rule)? = State::OnPath;
            path.push((rule, index.fed_by(rules, rule)));
        }
        let (rule, fed) = path.last_mut()?;
        match fed.pop() {
            None => {
                *state.get_mut(*rule)? = State::Done;
                path.pop();
            }
            Some(to) => match state.get(to)? {
                State::New => next = Some(to),
                State::OnPath => return Some(path.iter().map(|(rule, _)| *rule).skip_while(|rule| *rule != to).collect()),
                State::Done => {}
            },
        }
    }
}

/// The rules of an ingress: those of one group by group, the others in a list.
#[derive(Default)]
struct Ingress {
    hosts: HashMap<IpAddr, Vec<usize>>,
    wider: Vec<usize>,
    all: Vec<usize>,
}

struct Index<'a>(HashMap<&'a str, Ingress>);

impl<'a> Index<'a> {
    fn of(rules: &'a [Rule]) -> Self {
        let mut index: HashMap<&str, Ingress> = HashMap::new();
        for (number, rule) in rules.iter().enumerate() {
            let ingress = index.entry(&rule.ingress).or_default();
            ingress.all.push(number);
            match rule.matching.group {
                group if group.is_host() => ingress.hosts.entry(group.addr).or_default().push(number),
                _ => ingress.wider.push(number),
            }
        }
        Self(index)
    }

    /// Rules that an output of `rule` feeds.
    fn fed_by(&self, rules: &[Rule], rule: usize) -> Vec<usize> {
        let Some(rule) = rules.get(rule) else { return vec![] };
        rule.outputs.iter().flat_map(|output| self.fed_by_output(rules, rule, output)).collect()
    }

    fn fed_by_output(&self, rules: &[Rule], from: &Rule, output: &Output) -> Vec<usize> {
        let Some(ingress) = self.0.get(output.egress.as_str()) else { return vec![] };
        let group = output.to.map_or(from.matching.group, Prefix::host);
        let feeds = |to: &&usize| rules.get(**to).is_some_and(|to| feeds(from, output, &group, to));
        match group.is_host() {
            true => ingress.hosts.get(&group.addr).into_iter().flatten().chain(&ingress.wider).filter(feeds).copied().collect(),
            false => ingress.all.iter().filter(feeds).copied().collect(),
        }
    }
}

/// Whether some packet that `from` sends to `group` by `output` is taken by `to` (whose ingress it is).
fn feeds(from: &Rule, output: &Output, group: &Prefix, to: &Rule) -> bool {
    let port = output.port.or(from.matching.port);
    group.overlaps(&to.matching.group)
        && to.matching.port.is_none_or(|wanted| port.is_none_or(|port| port == wanted))
        && tags_meet(tag_after(from.matching.tag, output.vlan), to.matching.tag)
        && sources_meet(from, output, to)
}

const fn tag_after(tag: TagMatch, edit: VlanEdit) -> TagMatch {
    match edit {
        VlanEdit::Keep => tag,
        VlanEdit::None => TagMatch::None,
        VlanEdit::Set(id) => TagMatch::Vlan(id),
    }
}

fn tags_meet(sent: TagMatch, taken: TagMatch) -> bool {
    sent == TagMatch::Any || taken == TagMatch::Any || sent == taken
}

/// `src=egress` is an address nobody knows yet: it can meet only a rule without a source of its own.
fn sources_meet(from: &Rule, output: &Output, to: &Rule) -> bool {
    let sent = match output.src {
        SourceEdit::Keep => from.matching.source,
        SourceEdit::Egress => return to.matching.source.is_none(),
        SourceEdit::Set(addr) => Some(Prefix::host(addr)),
    };
    let Some(sent) = sent else { return true };
    to.matching.source.is_none_or(|taken| taken.overlaps(&sent)) && !to.matching.except.iter().any(|except| except.covers(&sent))
}
