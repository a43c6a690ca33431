//! Where in a config file something is wrong: bytes while reading, line and column in the message.

use super::{ConfigError, Value};
use crate::rule::error::{Fault, one_line};
use crate::rule::{Rule, SetError};

/// A fault at a byte of the file.
pub(super) struct Located {
    at: usize,
    field: String,
    problem: String,
    hint: String,
}

impl Located {
    pub(super) fn new(at: usize, field: &str, problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { at, field: one_line(field.to_owned()), problem: one_line(problem.into()), hint: one_line(hint.into()) }
    }

    pub(super) fn of_fault(at: usize, fault: Fault) -> Self {
        Self::new(at, fault.field, fault.problem, fault.hint)
    }

    /// A fault between rules stands at the last of them.
    pub(super) fn of_set(error: &SetError, rules: &[Rule], starts: &[usize]) -> Self {
        let at = error.culprit(rules).and_then(|rule| starts.get(rule)).copied().unwrap_or_default();
        let text = error.to_string();
        let text = text.strip_prefix(error.field()).and_then(|text| text.strip_prefix(": ")).unwrap_or(&text);
        let (problem, hint) = text.split_once(" (").unwrap_or((text, ""));
        Self::new(at, error.field(), problem, hint.strip_suffix(')').unwrap_or(hint))
    }

    pub(super) fn in_file(self, file: &str, source: &str) -> ConfigError {
        let before = source.get(..self.at).unwrap_or(source);
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        ConfigError {
            file: file.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before.get(line_start..).unwrap_or_default().chars().count() + 1,
            field: self.field,
            problem: self.problem,
            hint: self.hint,
        }
    }
}

/// The byte `offset` bytes into a value: behind the quote of a plain string, else where the value starts.
pub(super) fn within(source: &str, value: &Value<'_>, offset: usize) -> usize {
    let start = value.span().start;
    let inner = source.get(start + 1..);
    match value.get_ref().as_str() {
        Some(text) if offset > 0 && inner.is_some_and(|inner| inner.starts_with(text)) => start + 1 + offset,
        _ => start,
    }
}
