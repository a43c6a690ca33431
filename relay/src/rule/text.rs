//! The one-line form of a rule (INTERFACE.md): parsing, and the canonical line that parses back to the same rule.
//!
//! ```text
//! INGRESS [SRC[/LEN]@]GROUP[/LEN][:PORT] -> EGRESS [ADDR][:PORT] [key=value ...] [, EGRESS ...] [; key=value ...]
//! ```
//! `#` starts a comment. Must never panic whatever the text.

use super::check::{self, Place};
use super::error::{Fault, RuleError, did_you_mean};
use super::value::{self, DestinationText, RateText};
use super::{EngineChoice, Match, Output, PathChoice, Rule, SourceEdit, TagMatch, Ttl, VlanEdit};
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

/// Keys of an output.
pub const OUTPUT_KEYS: [&str; 6] = ["ttl", "src", "sport", "dscp", "vlan", "rate"];
/// Keys of a rule, after the `;`.
pub const RULE_KEYS: [&str; 7] = ["id", "tag", "except", "path", "engine", "exact", "join"];

/// A part of the line that knows where it stands.
#[derive(Clone, Copy)]
struct Piece<'a> {
    text: &'a str,
    /// Bytes from the start of the line.
    at: usize,
}

impl<'a> Piece<'a> {
    fn split_once(self, mark: &str) -> (Self, Option<Self>) {
        match self.text.split_once(mark) {
            Some((left, right)) => (Self { text: left, at: self.at }, Some(Self { text: right, at: self.at + left.len() + mark.len() })),
            None => (self, None),
        }
    }

    fn split(self, mark: &str) -> Vec<Self> {
        let (first, mut rest) = self.split_once(mark);
        let mut pieces = vec![first];
        while let Some(piece) = rest {
            let (first, next) = piece.split_once(mark);
            pieces.push(first);
            rest = next;
        }
        pieces
    }

    fn words(self) -> Vec<Self> {
        let base = self.text.as_ptr() as usize;
        let piece = |word: &'a str| Self { text: word, at: self.at + (word.as_ptr() as usize - base) };
        self.text.split_whitespace().map(piece).collect()
    }

    fn end(self) -> Self {
        Self { text: "", at: self.at + self.text.trim_end().len() }
    }

    fn fault(self, fault: Fault) -> (usize, Fault) {
        (self.at + fault.at, fault)
    }
}

/// A fault and the byte in the line where it stands.
type Placed<T> = Result<T, (usize, Fault)>;

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(line: &str) -> Result<Self, RuleError> {
        let text = line.split('#').next().unwrap_or_default();
        parse_line(Piece { text, at: 0 }).map_err(|(at, fault)| fault.in_line(column(line, at)))
    }
}

/// Characters before byte `at`, and one.
fn column(line: &str, at: usize) -> usize {
    line.char_indices().take_while(|(byte, _)| *byte < at).count() + 1
}

fn parse_line(line: Piece<'_>) -> Placed<Rule> {
    let mut places = HashMap::new();
    let (head, keys) = line.split_once(";");
    let (left, right) = head.split_once("->");
    let (ingress, matching) = parse_left(left, &mut places)?;
    let Some(right) = right else {
        return Err(head.end().fault(Fault::new("output", "`->` missing", "INGRESS GROUP:PORT -> EGRESS")));
    };
    let outputs =
        right.split(",").into_iter().enumerate().map(|(at, piece)| parse_output(piece, at, &mut places)).collect::<Result<_, _>>()?;
    let mut rule = Rule::new(ingress, matching, outputs);
    if let Some(keys) = keys {
        parse_rule_keys(keys, &mut rule, &mut places)?;
    }
    if rule.id.is_empty() {
        rule.id = rule.default_id();
    }
    check::check(&rule).map_err(|(place, fault)| (places.get(&place).copied().unwrap_or_default(), fault))?;
    Ok(rule)
}

fn parse_left(left: Piece<'_>, places: &mut HashMap<Place, usize>) -> Placed<(String, Match)> {
    let words = left.words();
    let mut words = words.into_iter();
    let missing = |field, hint: &str| left.end().fault(Fault::new(field, "missing", hint));
    let ingress = words.next().ok_or_else(|| missing("ingress", "INGRESS GROUP:PORT -> EGRESS"))?;
    let name = value::interface("ingress", ingress.text).map_err(|fault| ingress.fault(fault))?;
    let word = words.next().ok_or_else(|| missing("match", "[SRC@]GROUP[:PORT] after the ingress"))?;
    if let Some(extra) = words.next() {
        return Err(extra.fault(Fault::new("match", format!("`{}` before the arrow", extra.text), "INGRESS GROUP:PORT -> EGRESS")));
    }
    let found = value::matching(word.text).map_err(|fault| word.fault(fault))?;
    places.insert(Place::Source, word.at);
    places.insert(Place::Group, word.at + found.group_at);
    Ok((name, Match { tag: TagMatch::None, group: found.group, port: found.port, source: found.source, except: vec![] }))
}

fn parse_output(piece: Piece<'_>, number: usize, places: &mut HashMap<Place, usize>) -> Placed<Output> {
    let words = piece.words();
    let Some((egress, rest)) = words.split_first() else {
        return Err(piece.end().fault(Fault::new("egress", "missing", "EGRESS [ADDR][:PORT] [key=value ...]")));
    };
    places.insert(Place::Egress(number), egress.at);
    let mut output = Output::new(value::interface("egress", egress.text).map_err(|fault| egress.fault(fault))?);
    let mut keys = rest;
    if let Some((to, behind)) = rest.split_first().filter(|(to, _)| !to.text.contains('=')) {
        places.insert(Place::To(number), to.at);
        (output.to, output.port) = value::destination(to.text).map_err(|fault| to.fault(fault))?;
        keys = behind;
    }
    let mut seen = Vec::new();
    for word in keys {
        let (key, value) = key_value(*word, &mut seen, &OUTPUT_KEYS)?;
        if key == "src" {
            places.insert(Place::Src(number), value.at);
        }
        set_output(&mut output, key, value.text).map_err(|fault| value.fault(fault))?;
    }
    Ok(output)
}

/// Sets one key of an output from its text. An unknown key changes nothing: the callers know their keys.
pub(crate) fn set_output(output: &mut Output, key: &str, text: &str) -> Result<(), Fault> {
    match key {
        "ttl" => output.ttl = value::ttl(text)?,
        "src" => output.src = value::source_edit(text)?,
        "sport" => output.sport = value::source_port(text)?,
        "dscp" => output.dscp = value::dscp(text)?,
        "vlan" => output.vlan = value::vlan(text)?,
        "rate" => output.rate = Some(value::rate(text)?),
        _ => {}
    }
    Ok(())
}

fn parse_rule_keys(keys: Piece<'_>, rule: &mut Rule, places: &mut HashMap<Place, usize>) -> Placed<()> {
    let mut seen = Vec::new();
    for word in keys.words() {
        let (key, value) = key_value(word, &mut seen, &RULE_KEYS)?;
        if key == "except" {
            places.insert(Place::Except(rule.matching.except.len()), value.at);
            seen.retain(|seen| *seen != "except");
        }
        set_rule(rule, key, value.text).map_err(|fault| value.fault(fault))?;
    }
    Ok(())
}

/// Sets one key of a rule from its text; `except` adds. An unknown key changes nothing: the callers know their keys.
pub(crate) fn set_rule(rule: &mut Rule, key: &str, text: &str) -> Result<(), Fault> {
    match key {
        "id" => rule.id = value::id(text)?,
        "tag" => rule.matching.tag = value::tag(text)?,
        "except" => rule.matching.except.push(value::prefix("except", text)?),
        "path" => rule.path = value::path(text)?,
        "engine" => rule.engine = value::engine(text)?,
        "exact" => rule.exact = value::yes_no("exact", text)?,
        "join" => rule.join = value::yes_no("join", text)?,
        _ => {}
    }
    Ok(())
}

/// Cuts `key=value`, with a known key that has not been seen yet.
fn key_value<'a>(word: Piece<'a>, seen: &mut Vec<&'a str>, known: &[&'static str]) -> Placed<(&'a str, Piece<'a>)> {
    let (key, value) = word.split_once("=");
    let Some(value) = value else {
        return Err(word.fault(Fault::new("key", format!("`{}` is no key=value", word.text), format!("one of {}", known.join(", ")))));
    };
    if !known.contains(&key.text) {
        return Err(word.fault(Fault::new("key", format!("unknown key `{}`", key.text), unknown_key_hint(key.text, known))));
    }
    if seen.contains(&key.text) {
        return Err(word.fault(Fault::new("key", format!("`{}` given twice", key.text), "leave one of them out")));
    }
    seen.push(key.text);
    Ok((key.text, value))
}

fn unknown_key_hint(key: &str, known: &[&str]) -> String {
    match (RULE_KEYS.contains(&key), OUTPUT_KEYS.contains(&key)) {
        (true, _) => format!("`{key}` belongs to the rule: write it after `;`"),
        (_, true) => format!("`{key}` belongs to an output: write it before `;`"),
        _ => did_you_mean(key, known),
    }
}

impl Output {
    /// An output that changes nothing but the TTL.
    pub fn new(egress: String) -> Self {
        let (ttl, src, vlan) = (Ttl::default(), SourceEdit::default(), VlanEdit::default());
        Self { egress, to: None, port: None, ttl, src, sport: None, dscp: None, vlan, rate: None }
    }
}

impl Rule {
    /// A rule with the default of every key; its id is still empty (see [`Rule::default_id`]).
    pub fn new(ingress: String, matching: Match, outputs: Vec<Output>) -> Self {
        let (path, engine) = (PathChoice::default(), EngineChoice::default());
        Self { id: String::new(), ingress, matching, outputs, path, engine, exact: false, join: true }
    }

    /// `[SRC[/LEN]@]GROUP[/LEN][:PORT]`, canonical.
    pub fn match_text(&self) -> String {
        self.matching.to_string()
    }

    /// The id of a rule without one: `r-` and 40 bits of FNV-1a over ingress, match and tag in canonical text. Stable for
    /// ever, since scripts keep it.
    pub fn default_id(&self) -> String {
        let text = format!("{} {} tag={}", self.ingress, self.matching, self.matching.tag);
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        format!("r-{:010x}", (hash ^ hash >> 40) & 0xff_ffff_ffff)
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = self.source {
            write!(f, "{source}@")?;
        }
        write!(f, "{}", self.group)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.egress)?;
        if self.to.is_some() || self.port.is_some() {
            write!(f, " {}", DestinationText(self.to, self.port))?;
        }
        write_key(f, "ttl", (self.ttl != Ttl::default()).then_some(self.ttl))?;
        write_key(f, "src", (self.src != SourceEdit::default()).then_some(self.src))?;
        write_key(f, "sport", self.sport)?;
        write_key(f, "dscp", self.dscp)?;
        write_key(f, "vlan", (self.vlan != VlanEdit::default()).then_some(self.vlan))?;
        write_key(f, "rate", self.rate.map(RateText))
    }
}

/// The canonical line: keys in the order of INTERFACE.md, defaults left out.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ->", self.ingress, self.matching)?;
        for (at, output) in self.outputs.iter().enumerate() {
            write!(f, "{} {output}", if at == 0 { "" } else { "," })?;
        }
        let keys = RuleKeys(self).to_string();
        if keys.is_empty() { Ok(()) } else { write!(f, ";{keys}") }
    }
}

/// What stands after the `;`, with a blank before each.
struct RuleKeys<'a>(&'a Rule);

impl fmt::Display for RuleKeys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rule { id, matching, path, engine, exact, join, .. } = self.0;
        write_key(f, "id", (*id != self.0.default_id()).then_some(id))?;
        write_key(f, "tag", (matching.tag != TagMatch::default()).then_some(matching.tag))?;
        matching.except.iter().try_for_each(|source| write_key(f, "except", Some(source)))?;
        write_key(f, "path", (*path != PathChoice::default()).then_some(path))?;
        write_key(f, "engine", (*engine != EngineChoice::default()).then_some(engine))?;
        write_key(f, "exact", exact.then_some("yes"))?;
        write_key(f, "join", (!join).then_some("no"))
    }
}

fn write_key(f: &mut fmt::Formatter<'_>, key: &str, value: Option<impl fmt::Display>) -> fmt::Result {
    value.map_or(Ok(()), |value| write!(f, " {key}={value}"))
}

#[cfg(test)]
mod tests;
