//! Rules as a config file that reads back as the same rules (`relay rule save`).

use super::VERSION;
use crate::rule::value::{DestinationText, RateText};
use crate::rule::{EngineChoice, Output, PathChoice, Rule, SourceEdit, TagMatch, Ttl, VlanEdit};
use std::fmt::{Display, Write};
use toml::Value;

/// The config file of these rules, in their order, defaults left out. Ids are always written, so that they can be found.
pub fn write(rules: &[Rule]) -> String {
    let mut file = format!("version = {VERSION}\n");
    for rule in rules {
        write_rule(&mut file, rule);
    }
    file
}

fn write_rule(file: &mut String, rule: &Rule) {
    file.push_str("\n[[rule]]\n");
    text(file, "id", Some(&rule.id));
    text(file, "ingress", Some(&rule.ingress));
    text(file, "match", Some(rule.match_text()));
    text(file, "tag", (rule.matching.tag != TagMatch::default()).then_some(rule.matching.tag));
    if !rule.matching.except.is_empty() {
        plain(file, "except", Some(Value::from(rule.matching.except.iter().map(ToString::to_string).collect::<Vec<_>>())));
    }
    text(file, "path", (rule.path != PathChoice::default()).then_some(rule.path));
    text(file, "engine", (rule.engine != EngineChoice::default()).then_some(rule.engine));
    plain(file, "exact", rule.exact.then_some(true));
    plain(file, "join", (!rule.join).then_some(false));
    rule.outputs.iter().for_each(|output| write_output(file, output));
}

fn write_output(file: &mut String, output: &Output) {
    file.push_str("[[rule.output]]\n");
    text(file, "egress", Some(&output.egress));
    let to = DestinationText(output.to, output.port).to_string();
    text(file, "to", Some(to).filter(|to| !to.is_empty()));
    match output.ttl {
        Ttl::Set(ttl) => plain(file, "ttl", Some(ttl)),
        ttl => text(file, "ttl", (ttl != Ttl::default()).then_some(ttl)),
    }
    text(file, "src", (output.src != SourceEdit::default()).then_some(output.src));
    plain(file, "sport", output.sport);
    plain(file, "dscp", output.dscp);
    match output.vlan {
        VlanEdit::Set(id) => plain(file, "vlan", Some(id)),
        vlan => text(file, "vlan", (vlan != VlanEdit::default()).then_some(vlan)),
    }
    text(file, "rate", output.rate.map(RateText));
}

/// A string, quoted as TOML needs it.
fn text(file: &mut String, key: &str, value: Option<impl Display>) {
    plain(file, key, value.map(|value| Value::String(value.to_string())));
}

fn plain(file: &mut String, key: &str, value: Option<impl Display>) {
    if let Some(value) = value {
        // Writing to a String can't fail.
        let _ = writeln!(file, "{key} = {value}");
    }
}
