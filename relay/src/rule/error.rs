//! What can be wrong with a rule: the field, the place, the problem and the remedy, in one line.

use thiserror::Error;

/// A value that is wrong, before anybody knows in which line it stands.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{field}: {problem} ({hint})")]
pub struct Fault {
    /// The field at fault, in the words of the rule language.
    pub field: &'static str,
    /// Bytes from the start of the value to the fault.
    pub at: usize,
    /// What is wrong.
    pub problem: String,
    /// What to write instead.
    pub hint: String,
}

impl Fault {
    /// A fault at the start of the value.
    pub fn new(field: &'static str, problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { field, at: 0, problem: one_line(problem.into()), hint: one_line(hint.into()) }
    }

    /// The same, `by` bytes further on.
    pub fn shifted(self, by: usize) -> Self {
        Self { at: self.at + by, ..self }
    }

    /// With its column in the line.
    pub fn in_line(self, column: usize) -> RuleError {
        RuleError { field: self.field, column, problem: self.problem, hint: self.hint }
    }
}

/// A line that is no rule.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{field} at column {column}: {problem} ({hint})")]
pub struct RuleError {
    /// The field at fault, in the words of the rule language.
    pub field: &'static str,
    /// Column of the fault in the line, in characters from 1.
    pub column: usize,
    /// What is wrong.
    pub problem: String,
    /// What to write instead.
    pub hint: String,
}

/// The text with its control characters written out (`\n`): a message stays one line, whatever it quotes.
pub fn one_line(text: String) -> String {
    if !text.contains(char::is_control) {
        return text;
    }
    let written = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(written).collect()
}

/// The known word nearest to `word`, if one is near enough to be meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let scored = known.into_iter().map(|known| (strsim::damerau_levenshtein(word, known), known));
    scored.min_by_key(|(distance, _)| *distance).filter(|(distance, known)| *distance <= known.len().max(3) / 2).map(|(_, known)| known)
}

/// "did you mean `ttl`?", or the list of what there is.
pub fn did_you_mean(word: &str, known: &[&str]) -> String {
    match nearest(word, known.iter().copied()) {
        Some(known) => format!("did you mean `{known}`?"),
        None => format!("one of {}", known.join(", ")),
    }
}
