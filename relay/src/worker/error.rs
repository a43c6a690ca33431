//! What can go wrong between workers and those who use them, and the exit code of each.
//!
//! Must never grow a variant that nobody produces.

use std::time::Duration;

/// The error set of the worker library.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It was stopped, or not started yet.
    #[error("worker {0} is not running: start it first")]
    WorkerNotRunning(u32),
    /// It was started before.
    #[error("worker {0} is running already: stop it first")]
    WorkerAlreadyRunning(u32),
    /// Its code panicked; the others go on.
    #[error("worker {id} panicked: {message}")]
    WorkerPanicked {
        /// Its number.
        id: u32,
        /// What it said.
        message: String,
    },
    /// Its ring is full.
    #[error("worker {0} takes no more: its ring is full")]
    SendError(u32),
    /// It left, and its ring is empty for ever.
    #[error("nothing more to receive from worker {0}: it has left")]
    ReceiveError(u32),
    /// It did not do it in time.
    #[error("worker {id}: not done within {limit:?}")]
    Timeout {
        /// Its number.
        id: u32,
        /// How long was waited.
        limit: Duration,
    },
    /// The configuration contradicts itself.
    #[error("{field}: {problem}")]
    InvalidConfig {
        /// What to change.
        field: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// No more workers.
    #[error("all {0} workers are there: raise the number of workers")]
    PoolFull(u32),
    /// No such number.
    #[error("no worker {0}")]
    WorkerNotFound(u32),
    /// The flows cannot be dealt out like that.
    #[error("partition: {0}")]
    PartitionError(&'static str),
    /// Anything else, with the call that failed.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// Exit code (INTERFACE): 2 for bad input or an unavailable resource, 1 for a failure on the way.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::InvalidConfig { .. } | Self::PartitionError(_) | Self::WorkerNotFound(_) | Self::PoolFull(_) => 2,
            Self::WorkerNotRunning(_) | Self::WorkerAlreadyRunning(_) => 2,
            Self::WorkerPanicked { .. } | Self::SendError(_) | Self::ReceiveError(_) | Self::Timeout { .. } | Self::Other(_) => 1,
        }
    }
}
