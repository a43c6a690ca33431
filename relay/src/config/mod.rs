//! The config file: TOML to rules and back (INTERFACE.md). Errors name file, line, column, key and remedy.
//!
//! Works on text: must never open a file itself. Values are read by the rule language's own functions, so that both
//! forms take and refuse the same.

mod place;
mod write;

pub use write::write;

use crate::rule::check::{self, Place};
use crate::rule::error::{Fault, did_you_mean};
use crate::rule::{Match, Output, Rule, TagMatch, set, text, value};
use place::Located;
use std::collections::HashMap;
use thiserror::Error;
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

/// The version this relay reads and writes.
pub const VERSION: u64 = 1;
/// Keys at the top.
const TOP_KEYS: [&str; 2] = ["version", "rule"];
/// Keys of a `[[rule]]`.
const RULE_KEYS: [&str; 10] = ["id", "ingress", "match", "tag", "except", "path", "engine", "exact", "join", "output"];
/// Keys of a `[[rule.output]]`.
const OUTPUT_KEYS: [&str; 8] = ["egress", "to", "ttl", "src", "sport", "dscp", "vlan", "rate"];

/// What is wrong with a config file, in one line.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{file}:{line}:{column}: {field}: {problem} ({hint})")]
pub struct ConfigError {
    /// The file as the caller named it.
    pub file: String,
    /// Line from 1.
    pub line: usize,
    /// Column in characters from 1.
    pub column: usize,
    /// The key at fault.
    pub field: String,
    /// What is wrong.
    pub problem: String,
    /// What to write instead.
    pub hint: String,
}

type Value<'i> = Spanned<DeValue<'i>>;

/// Reads the rules of a config file. `file` is its name for messages. The rules keep all promises between them.
pub fn parse(file: &str, source: &str) -> Result<Vec<Rule>, ConfigError> {
    read(source).map_err(|located| located.in_file(file, source))
}

fn read(source: &str) -> Result<Vec<Rule>, Located> {
    let document = DeTable::parse(source).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        Located::new(at, "syntax", error.message().replace('\n', ", "), "see toml.io")
    })?;
    let top = document.get_ref();
    known_keys(top, &TOP_KEYS)?;
    check_version(top)?;
    let mut rules = Vec::new();
    let mut starts = Vec::new();
    for (start, table) in tables(top, "rule", "[[rule]]")? {
        rules.push(read_rule(source, start, table)?);
        starts.push(start);
    }
    set::validate(&rules).map_err(|error| Located::of_set(&error, &rules, &starts))?;
    Ok(rules)
}

fn known_keys(table: &DeTable<'_>, known: &[&str]) -> Result<(), Located> {
    let unknown = table.keys().filter(|key| !known.contains(&key.get_ref().as_ref())).min_by_key(|key| key.span().start);
    unknown.map_or(Ok(()), |key| {
        let name = key.get_ref().as_ref();
        Err(Located::new(key.span().start, name, "unknown key", did_you_mean(name, known)))
    })
}

fn check_version(top: &DeTable<'_>) -> Result<(), Located> {
    let hint = format!("write `version = {VERSION}` at the top");
    let Some(version) = top.get("version") else { return Err(Located::new(0, "version", "missing", hint)) };
    match version.get_ref().as_integer().map(|number| number.as_str() == VERSION.to_string()) {
        Some(true) => Ok(()),
        _ => Err(Located::new(version.span().start, "version", format!("this relay reads version {VERSION}"), hint)),
    }
}

/// The tables of an array of tables (none if it is absent), each with the byte where it starts.
fn tables<'t, 'i>(parent: &'t DeTable<'i>, key: &'static str, header: &str) -> Result<Vec<(usize, &'t DeTable<'i>)>, Located> {
    let Some(value) = parent.get(key) else { return Ok(vec![]) };
    let fault = |at: usize| Located::new(at, key, "not an array of tables", format!("write {header}"));
    let array: &DeArray<'i> = value.get_ref().as_array().ok_or_else(|| fault(value.span().start))?;
    let table =
        |item: &'t Value<'i>| item.get_ref().as_table().map(|table| (item.span().start, table)).ok_or_else(|| fault(item.span().start));
    array.iter().map(table).collect()
}

fn read_rule(source: &str, start: usize, table: &DeTable<'_>) -> Result<Rule, Located> {
    known_keys(table, &RULE_KEYS)?;
    let reader = Reader { source, start, table };
    let mut places = HashMap::from([(Place::Rule, start)]);
    let ingress = reader.required("ingress", |text| value::interface("ingress", text))?;
    let matching = reader.required("match", value::matching)?;
    let at = reader.at("match");
    places.extend([(Place::Source, at), (Place::Group, reader.within("match", matching.group_at))]);
    let matching = Match { tag: TagMatch::None, group: matching.group, port: matching.port, source: matching.source, except: vec![] };
    let mut outputs = Vec::new();
    for (number, (start, table)) in tables(table, "output", "[[rule.output]]")?.into_iter().enumerate() {
        outputs.push(read_output(source, start, table, number, &mut places)?);
    }
    let mut rule = Rule::new(ingress, matching, outputs);
    for key in text::RULE_KEYS.into_iter().filter(|key| *key != "except") {
        reader.optional(key, |text| text::set_rule(&mut rule, key, text))?;
    }
    read_except(&reader, &mut rule, &mut places)?;
    if rule.id.is_empty() {
        rule.id = rule.default_id();
    }
    check::check(&rule).map_err(|(place, fault)| Located::of_fault(places.get(&place).copied().unwrap_or(start), fault))?;
    Ok(rule)
}

fn read_except(reader: &Reader<'_, '_>, rule: &mut Rule, places: &mut HashMap<Place, usize>) -> Result<(), Located> {
    let items: Vec<&Value<'_>> = match reader.table.get("except") {
        None => vec![],
        Some(value) => value.get_ref().as_array().map_or_else(|| vec![value], |array| array.iter().collect()),
    };
    for (number, item) in items.into_iter().enumerate() {
        places.insert(Place::Except(number), item.span().start);
        reader.text(item, "except", |text| text::set_rule(rule, "except", text))?;
    }
    Ok(())
}

fn read_output(
    source: &str,
    start: usize,
    table: &DeTable<'_>,
    number: usize,
    places: &mut HashMap<Place, usize>,
) -> Result<Output, Located> {
    known_keys(table, &OUTPUT_KEYS)?;
    let reader = Reader { source, start, table };
    places.extend([
        (Place::Egress(number), reader.at("egress")),
        (Place::To(number), reader.at("to")),
        (Place::Src(number), reader.at("src")),
    ]);
    let mut output = Output::new(reader.required("egress", |text| value::interface("egress", text))?);
    if let Some(to) = reader.optional("to", value::destination)? {
        (output.to, output.port) = to;
    }
    for key in text::OUTPUT_KEYS {
        reader.optional(key, |text| text::set_output(&mut output, key, text))?;
    }
    Ok(output)
}

/// The values of one table, read as the texts of the rule language.
struct Reader<'t, 'i> {
    source: &'t str,
    start: usize,
    table: &'t DeTable<'i>,
}

impl Reader<'_, '_> {
    /// Where the value of `key` stands, or the table.
    fn at(&self, key: &str) -> usize {
        self.within(key, 0)
    }

    /// `offset` bytes into the value of `key`.
    fn within(&self, key: &str, offset: usize) -> usize {
        self.table.get(key).map_or(self.start, |value| place::within(self.source, value, offset))
    }

    fn required<T>(&self, key: &'static str, read: impl FnOnce(&str) -> Result<T, Fault>) -> Result<T, Located> {
        self.optional(key, read)?.ok_or_else(|| Located::new(self.start, key, "missing", format!("add `{key} = \"...\"`")))
    }

    fn optional<T>(&self, key: &'static str, read: impl FnOnce(&str) -> Result<T, Fault>) -> Result<Option<T>, Located> {
        self.table.get(key).map(|value| self.text(value, key, read)).transpose()
    }

    fn text<T>(&self, value: &Value<'_>, key: &'static str, read: impl FnOnce(&str) -> Result<T, Fault>) -> Result<T, Located> {
        let kind = Kind::of(key);
        let wrong = || Located::new(value.span().start, key, "of the wrong type", kind.remedy());
        let text = kind.text(key, value.get_ref()).ok_or_else(wrong)?;
        read(&text).map_err(|fault| Located::of_fault(place::within(self.source, value, fault.at), fault))
    }
}

/// The TOML types a key takes; a string always does.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Text,
    Number,
    Switch,
}

impl Kind {
    fn of(key: &str) -> Self {
        match key {
            "tag" | "ttl" | "sport" | "dscp" | "vlan" | "rate" => Self::Number,
            "exact" | "join" => Self::Switch,
            _ => Self::Text,
        }
    }

    const fn remedy(self) -> &'static str {
        match self {
            Self::Text => "a string",
            Self::Number => "a whole number or a string",
            Self::Switch => "true or false",
        }
    }

    fn text(self, key: &str, value: &DeValue<'_>) -> Option<String> {
        match (self, value) {
            (_, DeValue::String(text)) => Some(text.clone().into_owned()),
            (Self::Switch, DeValue::Boolean(yes)) => Some(if *yes { "yes" } else { "no" }.to_owned()),
            (Self::Number, DeValue::Integer(number)) if number.radix() == 10 => {
                Some(format!("{}{}", number.as_str(), if key == "rate" { "pps" } else { "" }))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
