//! `relay rule add | del | list | explain | save`: the running rules.

use super::failure::Failure;
use super::output::{self, Mood, Output, lines, text};
use super::{Context, OK, Outcome, rules, unexpected};
use crate::control::message::{Request, Response, RuleInfo};
use clap::Subcommand;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Commands of `relay rule`.
#[derive(Debug, Subcommand)]
pub(super) enum RuleCommand {
    /// Add a rule; in force everywhere when the command returns
    Add {
        /// INGRESS [SRC[/LEN]@]GROUP[/LEN][:PORT] -> EGRESS [ADDR][:PORT] [key=value ...] [, EGRESS ...] [; key=value ...]
        rule: String,
    },
    /// Delete a rule
    Del {
        /// Its id (see `relay rule list`)
        id: String,
    },
    /// List the rules with their paths and why
    List,
    /// Say how one rule runs, and why so
    Explain {
        /// Its id (see `relay rule list`)
        id: String,
    },
    /// Write the running rules to a file
    Save {
        /// The file [default: the daemon's --config]
        file: Option<PathBuf>,
    },
}

/// Runs one of them.
pub(super) fn run(command: RuleCommand, context: &Context) -> Outcome {
    match command {
        RuleCommand::Add { rule } => {
            let rule = rules::given(std::slice::from_ref(&rule)).map(|_| rule)?;
            change(&Request::RuleAdd { rule }, context)
        }
        RuleCommand::Del { id } => change(&Request::RuleDel { id }, context),
        RuleCommand::List => list(context),
        RuleCommand::Explain { id } => explain(&id, context),
        RuleCommand::Save { file } => change(&Request::RuleSave { file: file.map(|file| absolute(&file)).transpose()? }, context),
    }
}

/// `{"done":…}`: the id concerned, or the file written.
#[derive(Serialize)]
struct Done {
    done: String,
}

fn change(request: &Request, context: &Context) -> Outcome {
    match context.ask(request)? {
        Response::Done(done) => context.output.facts(&Done { done: done.clone() }, |_| done).map(|()| OK),
        other => Err(unexpected(&other)),
    }
}

fn running(context: &Context) -> Result<Vec<RuleInfo>, Failure> {
    match context.ask(&Request::RuleList)? {
        Response::Rules(rules) => Ok(rules),
        other => Err(unexpected(&other)),
    }
}

fn list(context: &Context) -> Outcome {
    let rules = running(context)?;
    context.output.facts(&rules, |output| table(&rules, output)).map(|()| OK)
}

fn explain(id: &str, context: &Context) -> Outcome {
    let Some(rule) = running(context)?.into_iter().find(|rule| rule.id == id) else {
        return Err(Failure::bad_input(format!("no rule has the id {id}")).field("ID").hint("see relay rule list"));
    };
    context.output.facts(&rule, |_| explanation(&rule)).map(|()| OK)
}

fn table(rules: &[RuleInfo], output: &Output) -> String {
    let mut table = output::table(&["ID", "RULE", "PATH", "ENGINE", "JOINED", "REASON"]);
    for rule in rules {
        let mood = if rule.path == "pending" { Mood::Warning } else { Mood::Good };
        let joined = if rule.joined { "yes" } else { "no" };
        let path = output.state(&rule.path, mood);
        table.add_row([text(&rule.id), text(&rule.rule), path, text(&rule.engine), text(joined), text(&rule.reason)]);
    }
    lines(&mut table)
}

fn explanation(rule: &RuleInfo) -> String {
    let engine = if rule.engine.is_empty() { String::new() } else { format!(", engine {}", rule.engine) };
    let joined = if rule.joined { "the relay has joined the group" } else { "the relay has not joined the group" };
    format!("{}\npath {}{engine}: {}\n{joined}\n", rule.rule, rule.path, rule.reason)
}

/// The daemon has another working directory. JSON carries text, so the path has to be UTF-8.
fn absolute(file: &Path) -> Result<String, Failure> {
    let wrong = |why: String| Failure::bad_input(format!("{}: {why}", file.display())).field("FILE");
    let absolute = std::path::absolute(file).map_err(|error| wrong(error.to_string()))?;
    absolute.into_os_string().into_string().map_err(|_| wrong("the path is not UTF-8".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_as_a_table() {
        let rule = RuleInfo {
            id: "itch-a".into(),
            rule: "eth0 239.1.1.1:5000 -> eth1".into(),
            path: "kernel".into(),
            engine: String::new(),
            reason: "no edit needs a worker".into(),
            joined: true,
            ..RuleInfo::default()
        };
        assert_eq!(
            table(&[rule], &Output::new(false)),
            "ID      RULE                         PATH    ENGINE  JOINED  REASON\n\
             itch-a  eth0 239.1.1.1:5000 -> eth1  kernel  -       yes     no edit needs a worker\n"
        );
    }
}
