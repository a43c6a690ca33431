//! One worker process.

/// Entry of a process that a supervisor started as a worker.
pub fn main() -> std::process::ExitCode {
    eprintln!("error: the worker is not part of this build");
    std::process::ExitCode::from(1)
}
