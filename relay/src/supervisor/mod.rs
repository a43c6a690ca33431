//! The supervisor: owns every kernel object, never the data path.
//!
//! Must never block on a worker or touch a packet.

pub mod options;

/// Why the supervisor ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Nothing is built yet.
    #[error("the supervisor is not part of this build")]
    NotBuilt,
}

impl RunError {
    /// Exit code of `relay run`.
    pub fn exit_code(&self) -> u8 {
        1
    }

    /// The option at fault, or empty.
    pub fn field(&self) -> &str {
        ""
    }

    /// The remedy, or empty.
    pub fn hint(&self) -> &str {
        ""
    }
}

/// Runs the relay until it is told to stop.
pub fn run(_options: options::Options) -> Result<(), RunError> {
    Err(RunError::NotBuilt)
}
