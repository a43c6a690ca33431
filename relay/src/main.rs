//! The `relay` binary: a worker if a supervisor started it as one, else the command line. Everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::var_os("RELAY_WORKER_ID").is_some() { relay::worker::main() } else { relay::cli::main() }
}
