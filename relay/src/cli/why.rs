//! `relay why ID`: facts of a moment from the daemon and the wire, then sentences.

use super::failure::Failure;
use super::{Context, OK, Outcome, VERDICT_FAILED, doctor, unexpected, values};
use crate::control::message::{Request, Response, RuleInfo, Stats, Status};
use crate::doctor::why::{Answer, Evidence, answer, overhear};
use crate::rule::Rule;
use crate::rule::error::nearest;
use crate::supervisor::interfaces::Interfaces;
use clap::Args;
use std::time::{Duration, Instant};

/// Arguments of `relay why`.
#[derive(Debug, Args)]
pub(super) struct WhyArgs {
    /// Id of the rule, as in `relay rule list`
    id: String,
    /// How long to watch the counters and to listen on the ingress interface
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = values::period)]
    listen: Duration,
}

/// Watches, listens, answers; exit code 5 unless the rule moves packets.
pub(super) fn run(args: &WhyArgs, context: &Context) -> Outcome {
    let infos = rules(context)?;
    let info = infos.iter().find(|info| info.id == args.id).ok_or_else(|| unknown(&args.id, &infos))?;
    let rule: Rule = info.rule.parse().map_err(|_| {
        Failure::new(1, format!("rule {} of the daemon is not readable here", info.id))
            .hint("use the relay of the same version as the daemon")
    })?;
    doctor::check_namespace(status(context)?.supervisor.pid)?;
    let known = Interfaces::open().and_then(|mut interfaces| interfaces.snapshot()).map_err(|error| Failure::new(1, error.to_string()))?;
    let listening = doctor::listening(args.listen);
    let (before, began) = (stats(context)?, Instant::now());
    let overheard = match known.get(&rule.ingress) {
        Some(interface) if interface.up => overhear(&rule, interface.ifindex, args.listen),
        _ => Err(format!("{} is not up", rule.ingress)),
    };
    // Without the right to listen the counters still need the time.
    std::thread::sleep(args.listen.saturating_sub(began.elapsed()));
    drop(listening);
    let after = stats(context)?;
    let found = answer(&Evidence {
        rule: &rule,
        info,
        others: &infos,
        status: &*status(context)?,
        before: &before,
        after: &after,
        period: began.elapsed(),
        known: &known,
        overheard: &overheard,
    });
    context.output.facts(&found, |_| page(&found))?;
    Ok(if found.moving { OK } else { VERDICT_FAILED })
}

fn rules(context: &Context) -> Result<Vec<RuleInfo>, Failure> {
    match context.ask(&Request::RuleList)? {
        Response::Rules(rules) => Ok(rules),
        other => Err(unexpected(&other)),
    }
}

fn status(context: &Context) -> Result<Box<Status>, Failure> {
    match context.ask(&Request::Status)? {
        Response::Status(status) => Ok(status),
        other => Err(unexpected(&other)),
    }
}

fn stats(context: &Context) -> Result<Box<Stats>, Failure> {
    match context.ask(&Request::Stats)? {
        Response::Stats(stats) => Ok(stats),
        other => Err(unexpected(&other)),
    }
}

fn unknown(id: &str, infos: &[RuleInfo]) -> Failure {
    let hint = nearest(id, infos.iter().map(|info| info.id.as_str()));
    let hint = hint.map_or_else(|| "see `relay rule list`".to_owned(), |id| format!("did you mean {id}?"));
    Failure::bad_input(format!("no rule {id}")).field("ID").hint(hint)
}

fn page(answer: &Answer) -> String {
    let lines = answer.sentences.iter().map(|one| {
        let remedy = if one.remedy.is_empty() { String::new() } else { format!("\n    → {}", one.remedy) };
        format!("{}: {}{remedy}\n", answer.id, one.sentence)
    });
    lines.collect()
}
