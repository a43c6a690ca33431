//! `relay stop`: ends the relay at the control socket, or what one without a supervisor has left, and says what it was.

use super::failure::Failure;
use super::output::count;
use super::{Context, OK, Outcome, unexpected};
use crate::control::message::{Request, Response};
use crate::supervisor::takeover::{self, Orphans};
use crate::sys::process;
use serde::Serialize;
use std::os::fd::AsFd;
use std::time::Duration;

/// A relay ends within a second; a machine may be slow.
const LIMIT: Duration = Duration::from_secs(10);

/// What was ended.
#[derive(Debug, Serialize)]
struct Stopped {
    /// There was no supervisor any more.
    orphaned: bool,
    #[serde(flatten)]
    relay: Orphans,
}

/// Ends it and prints what it was; exit code 3 if there is nothing.
pub(super) fn run(context: &Context) -> Outcome {
    let stopped = match context.ask(&Request::Status) {
        Ok(Response::Status(status)) => {
            let attached = status.interfaces.iter().filter(|interface| interface.ingress && interface.backend.starts_with("af_xdp"));
            let relay = Orphans {
                pid: status.supervisor.pid,
                interfaces: attached.map(|interface| interface.name.clone()).collect(),
                rules: status.rules as usize,
                workers: status.workers.iter().filter(|worker| worker.pid != 0).count(),
            };
            end(relay.pid, context)?;
            Stopped { orphaned: false, relay }
        }
        Ok(other) => return Err(unexpected(&other)),
        Err(nobody) => match takeover::end_orphans(&context.global.socket).map_err(super::run::failure)? {
            Some(relay) => Stopped { orphaned: true, relay },
            None => return Err(nobody),
        },
    };
    context.output.facts(&stopped, |_| text(&stopped)).map(|()| OK)
}

fn end(pid: u32, context: &Context) -> Result<(), Failure> {
    let failed = |what: String| Failure::new(1, what);
    let pidfd = process::pidfd(pid).map_err(|errno| failed(format!("supervisor {pid}: {errno}")))?;
    context.ask(&Request::Shutdown)?;
    if process::ends_within(pidfd.as_fd(), LIMIT) {
        return Ok(());
    }
    Err(failed(format!("supervisor {pid} has been told to stop, and has not ended")))
}

fn text(Stopped { orphaned, relay }: &Stopped) -> String {
    let Orphans { pid, interfaces, rules, workers } = relay;
    let what = if *orphaned { format!("what the relay of pid {pid} had left") } else { format!("the relay of pid {pid}") };
    let xdp = if interfaces.is_empty() { String::new() } else { format!(", XDP on {}", interfaces.join(" ")) };
    format!("ended {what}: {}, {}{xdp}\n", count(*rules as u64, "rule"), count(*workers as u64, "worker"))
}
