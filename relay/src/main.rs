//! The `relay` binary: a worker or a keeper if a supervisor started it as one, else the command line. Everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    let is_set = |variable| std::env::var_os(variable).is_some();
    if is_set("RELAY_WORKER_ID") {
        relay::worker::main()
    } else if is_set(relay::keeper::SUPERVISOR) {
        relay::keeper::main()
    } else {
        relay::cli::main()
    }
}
