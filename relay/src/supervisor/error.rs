//! Why the supervisor ended or refused something: message, field, remedy, exit code.
//!
//! Must never be made without a field or a remedy where there is one.

use crate::control::message::ErrorBody;
use std::fmt::Display;

/// Bad input or an unavailable resource (INTERFACE.md).
pub const BAD_INPUT: u8 = 2;
/// Degraded: a fall-back that was not asked for, with `--strict`.
pub const DEGRADED: u8 = 4;
/// Any other failure.
pub const FAILURE: u8 = 1;

/// A refusal; nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RunError {
    code: u8,
    message: String,
    field: String,
    hint: String,
}

impl RunError {
    /// Bad input.
    pub fn bad(field: &str, message: impl Display, hint: impl Display) -> Self {
        Self { code: BAD_INPUT, message: message.to_string(), field: field.into(), hint: hint.to_string() }
    }

    /// Something the system refused.
    pub fn failure(message: impl Display) -> Self {
        Self { code: FAILURE, message: message.to_string(), field: String::new(), hint: String::new() }
    }

    /// The same with another exit code.
    pub fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// The same with a remedy.
    pub fn with_hint(mut self, hint: impl Display) -> Self {
        self.hint = hint.to_string();
        self
    }

    /// Exit code of `relay run`.
    pub const fn exit_code(&self) -> u8 {
        self.code
    }

    /// The option or field at fault, or empty.
    pub fn field(&self) -> &str {
        &self.field
    }

    /// The remedy, or empty.
    pub fn hint(&self) -> &str {
        &self.hint
    }

    /// As an answer on the control socket.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { code: self.code, message: self.message.clone(), field: self.field.clone(), hint: self.hint.clone() }
    }
}
