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
pub mod spare;
pub mod team;
pub mod wait;

use std::process::ExitCode;

/// Exit code of a worker that was started wrongly (INTERFACE.md: bad input or unavailable resource).
const BAD_START: u8 = 2;

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Boot(#[from] adopt::BootError),
    #[error(transparent)]
    Run(#[from] run::RunError),
}

/// Entry of the process; `RELAY_WORKER_ID` is set.
pub fn main() -> ExitCode {
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("worker: {error}");
            if matches!(error, Failure::Boot(_)) { ExitCode::from(BAD_START) } else { ExitCode::FAILURE }
        }
    }
}

fn work() -> Result<(), Failure> {
    let mut mapped = adopt::from_environment()?;
    let watch = mapped.manifest.spare.map(spare::Watch::open).transpose()?;
    let mut crew = run::Crew::hire(&mapped.manifest)?;
    if let Some(watch) = watch {
        mapped.populate();
        spare::refresh(&mut mapped);
        crew.close_box(&mapped.manifest);
        let stands_in = watch.wait(&mut mapped);
        // No descriptor can be closed in the box; the kernel does it at the end.
        std::mem::forget(watch);
        if !stands_in {
            std::mem::forget(mapped);
            return Ok(());
        }
    }
    Ok(run::run(mapped.adopt()?, crew)?)
}
