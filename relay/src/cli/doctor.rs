//! `relay doctor`: the stages as a table; needs no daemon, but asks one that runs.

use super::failure::Failure;
use super::output::{self, Mood, Output, lines, text};
use super::{Context, OK, Outcome, VERDICT_FAILED, rules, values};
use crate::control::client::{Client, ClientError};
use crate::control::message::{Request, Response};
use crate::doctor::{Daemon, Finding, Question, Report, Verdict, examine};
use crate::lab::progress::Steps;
use crate::rule::Rule;
use clap::Args;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Arguments of `relay doctor`.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Interfaces to examine [default: those of the rules, else all that are up]
    #[arg(value_name = "IFACE")]
    interfaces: Vec<String>,
    /// Rules that are to run, from a TOML file [default: those of the running relay]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A rule that is to run, as one line (repeatable)
    #[arg(long = "rule", value_name = "RULE")]
    rules: Vec<String>,
    /// Workers that are to run [default: those of the running relay, else 1]
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// Frames of packet memory per worker
    #[arg(long, value_name = "N", default_value = "32768", value_parser = values::frames)]
    frames: u32,
    /// How long to listen for queriers and TTLs; 0: not at all
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = values::duration)]
    listen: Duration,
}

/// Examines and prints; exit code 5 if a stage fails.
pub(super) fn run(args: &DoctorArgs, context: &Context) -> Outcome {
    let daemon = daemon(&context.global.socket)?;
    let rules = match (&args.config, args.rules.is_empty(), &daemon) {
        (None, true, Some(daemon)) => daemon.rules.iter().filter_map(|info| info.rule.parse().ok()).collect(),
        _ => given(args)?,
    };
    let running = daemon.as_ref().map_or(0, |daemon| daemon.status.workers.len() as u32);
    let question = Question {
        interfaces: args.interfaces.clone(),
        rules,
        workers: args.workers.unwrap_or(running.max(1)),
        frames: args.frames,
        listen: args.listen,
        daemon,
    };
    let listening = listening(args.listen);
    let report = examine(question).map_err(|error| Failure::new(1, error).hint("is /proc mounted, and netlink allowed here?"))?;
    drop(listening);
    context.output.facts(&report, |output| page(&report, output))?;
    Ok(if report.verdict == Verdict::Fail { VERDICT_FAILED } else { OK })
}

fn given(args: &DoctorArgs) -> Result<Vec<Rule>, Failure> {
    let mut all = args.config.as_deref().map_or(Ok(Vec::new()), |file| rules::load(file, "--config"))?;
    all.extend(rules::given(&args.rules)?);
    Ok(all)
}

/// What a running relay says of itself; `None` where none runs or it may not be asked.
pub(super) fn daemon(socket: &Path) -> Result<Option<Daemon>, Failure> {
    let mut client = match Client::connect(socket) {
        Ok(client) => client,
        Err(ClientError::NoDaemon { .. } | ClientError::Permission { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let (Response::Status(status), Response::Rules(rules)) = (client.request(&Request::Status)?, client.request(&Request::RuleList)?)
    else {
        return Ok(None);
    };
    check_namespace(status.supervisor.pid)?;
    Ok(Some(Daemon { status: *status, rules }))
}

/// Interfaces are those of this process's network namespace: the relay's own must be the same one. Where that cannot be seen
/// (another user's process) it is taken to be.
pub(super) fn check_namespace(pid: u32) -> Result<(), Failure> {
    let of = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/net")).ok();
    match (of("self"), of(&pid.to_string())) {
        (Some(own), Some(theirs)) if own != theirs => {
            Err(Failure::bad_input(format!("the relay at the socket (pid {pid}) runs in another network namespace"))
                .field("--socket")
                .hint(format!("run it there: nsenter -t {pid} -n relay …")))
        }
        _ => Ok(()),
    }
}

/// Says that it takes time, until dropped.
pub(super) fn listening(listen: Duration) -> Steps {
    let mut steps = Steps::new(None);
    if listen > Duration::from_secs(1) {
        steps.next(&format!("listening for {} s", listen.as_secs()));
    }
    steps
}

fn page(report: &Report, output: &Output) -> String {
    let mut table = output::table(&["VERDICT", "STAGE", "WHERE", "FINDING"]);
    for finding in &report.findings {
        table.add_row([
            output.state(finding.verdict.name(), mood(finding.verdict)),
            text(finding.stage),
            text(if finding.interface.is_empty() { "host" } else { &finding.interface }),
            text(&finding.reason),
        ]);
        if !finding.remedy.is_empty() {
            table.add_row([text(" "), text(" "), text(" "), text(&format!("→ {}", finding.remedy))]);
        }
    }
    lines(&mut table) + "\n" + &summary(&report.findings)
}

fn mood(verdict: Verdict) -> Mood {
    match verdict {
        Verdict::Ok => Mood::Good,
        Verdict::Skip | Verdict::Warn => Mood::Warning,
        Verdict::Fail => Mood::Bad,
    }
}

fn summary(findings: &[Finding]) -> String {
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (ok, skip, warn, fail) = (count(Verdict::Ok), count(Verdict::Skip), count(Verdict::Warn), count(Verdict::Fail));
    format!("{ok} ok, {warn} to look at, {fail} failed, {skip} not seen\n")
}
