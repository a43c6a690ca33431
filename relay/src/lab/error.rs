//! What can go wrong in the laboratory. Every message names the thing that failed; never a bare errno.

use std::io;

/// An error of the laboratory.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A system call or a file failed.
    #[error("{what}: {source}")]
    Io {
        /// The call and the object.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// A tool ended with a failure.
    #[error("`{command}` failed: {stderr}")]
    Tool {
        /// What was run.
        command: String,
        /// What it said.
        stderr: String,
    },
    /// Making namespaces needs CAP_SYS_ADMIN and CAP_NET_ADMIN.
    #[error("network namespaces need root: run this with sudo")]
    NotRoot,
    /// A tool is not installed.
    #[error("`{tool}` is missing: {remedy}")]
    Missing {
        /// The tool.
        tool: &'static str,
        /// What to install.
        remedy: &'static str,
    },
    /// Something that was waited for did not come.
    #[error("{what} within {ms} ms{detail}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        ms: u128,
        /// What is known, starting with `: `, or empty.
        detail: String,
    },
    /// Wrong arguments or an unexpected answer.
    #[error("{0}")]
    Invalid(String),
}

impl LabError {
    /// For `map_err`: names what failed.
    pub fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source: source.into() }
    }
}

/// Shorthand of this room.
pub type Result<T> = std::result::Result<T, LabError>;
