//! How a command fails: one message, the field at fault, the remedy, and the exit code of INTERFACE.md.
//!
//! Must never print more than one line each for error and hint, and never a control character of foreign text.

use crate::control::client::ClientError;
use crate::control::message::ErrorBody;
use crate::lab::LabError;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::{self, Write as _};

/// Exit code for bad input or an unavailable resource.
pub const BAD_INPUT: u8 = 2;

/// Why a command has no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Exit code (INTERFACE.md).
    pub code: u8,
    /// What went wrong.
    pub message: String,
    /// The argument, key or environment variable at fault; empty where there is none.
    pub field: String,
    /// The remedy; empty where there is none to name.
    pub hint: String,
}

impl Failure {
    /// A failure without field and hint.
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), field: String::new(), hint: String::new() }
    }

    /// Exit code 2.
    pub fn bad_input(message: impl Into<String>) -> Self {
        Self::new(BAD_INPUT, message)
    }

    /// Names the field at fault.
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }

    /// Names the remedy.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Two lines on stderr, or one of JSON. A stderr that is gone cannot be complained to.
    pub fn print(&self, json: bool) {
        let text = if json { self.json_line() } else { self.text_lines() };
        let _ = io::stderr().write_all(text.as_bytes());
    }

    fn text_lines(&self) -> String {
        let mut text = format!("error: {}\n", one_line(&self.message));
        if !self.hint.is_empty() {
            text += &format!("hint: {}\n", one_line(&self.hint));
        }
        text
    }

    fn json_line(&self) -> String {
        #[derive(Serialize)]
        struct Wrapped {
            error: ErrorBody,
        }
        let wrapped = Wrapped { error: self.clone().into() };
        serde_json::to_string(&wrapped).unwrap_or_else(|_| self.text_lines()) + "\n"
    }
}

impl From<Failure> for ErrorBody {
    fn from(failure: Failure) -> Self {
        let Failure { code, message, field, hint } = failure;
        Self { code, message: one_line(&message), field, hint: one_line(&hint) }
    }
}

impl From<ErrorBody> for Failure {
    fn from(body: ErrorBody) -> Self {
        let ErrorBody { code, message, field, hint } = body;
        Self { code, message, field, hint }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::new(error.exit_code(), error.to_string()).field("--socket").hint(error.hint())
    }
}

impl From<LabError> for Failure {
    fn from(error: LabError) -> Self {
        let code = match &error {
            LabError::NotRoot | LabError::Missing { .. } | LabError::Invalid(_) => BAD_INPUT,
            LabError::Io { source, .. } if is_unavailable(source) => BAD_INPUT,
            LabError::Io { .. } | LabError::Tool { .. } | LabError::Timeout { .. } => 1,
        };
        Self::new(code, error.to_string())
    }
}

/// A resource that is missing or forbidden, as opposed to one that failed.
fn is_unavailable(error: &io::Error) -> bool {
    let kind = matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound | io::ErrorKind::AddrNotAvailable);
    kind || error.raw_os_error() == Some(libc::ENODEV)
}

/// `text` with white space for line breaks and `\u{…}` for other control characters.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.trim_end().chars() {
        match character {
            '\n' | '\r' | '\t' => line.push(' '),
            control if control.is_control() => {
                let _ = write!(line, "{}", control.escape_unicode());
            }
            plain => line.push(plain),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_and_cannot_drive_the_terminal() {
        let failure = Failure::bad_input("first\nsecond \x1b[31mred\n").hint("do\tthis");
        assert_eq!(failure.text_lines(), "error: first second \\u{1b}[31mred\nhint: do this\n");
    }

    #[test]
    fn json_has_exactly_the_keys_of_the_contract() {
        let line = Failure::new(3, "m").field("f").json_line();
        assert_eq!(line, "{\"error\":{\"code\":3,\"message\":\"m\",\"field\":\"f\",\"hint\":\"\"}}\n");
    }
}
