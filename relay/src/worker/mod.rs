//! One worker process: adopt what the supervisor made, finish the predecessor's work, forward, report.
//!
//! Knows no capability, no socket call, no file. Everything it needs comes by descriptor (plan/manifest.rs); everything
//! it would take into the grave stands in shared memory (datapath/journal.rs). Must never create a kernel object but the
//! io_uring of the packet path.

pub mod adopt;
pub mod error;
pub mod ledger;
pub mod orphans;
pub mod partition;
pub mod port;
pub mod recovery;
pub mod run;
pub mod sandbox;
pub mod snapshot;
pub mod team;
pub mod wait;

use std::process::ExitCode;

/// Exit code of a worker that was started wrongly (INTERFACE.md: bad input or unavailable resource).
const BAD_START: u8 = 2;

/// Entry of the process; `RELAY_WORKER_ID` is set.
pub fn main() -> ExitCode {
    let adopted = match adopt::from_environment() {
        Ok(adopted) => adopted,
        Err(error) => {
            eprintln!("worker: {error}");
            return ExitCode::from(BAD_START);
        }
    };
    match run::run(adopted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("worker: {error}");
            ExitCode::FAILURE
        }
    }
}
