//! The command line: one file per command, each a set of arguments and one function that answers with facts or a failure.
//!
//! A new command is one file, one line in [`Command`] and one in `dispatch`. Must never touch a packet or a kernel object: it
//! asks the daemon, or hands its options to the supervisor or the lab.

mod apply;
mod bench;
mod capture;
mod channels;
mod check;
mod completions;
mod demo;
mod diff;
mod doctor;
pub mod failure;
mod journal;
mod logs;
mod man;
pub mod output;
mod pcapng;
mod recv;
mod rule;
mod rules;
mod run;
mod send;
mod stats;
mod status;
mod stop;
#[cfg(feature = "top")]
mod top;
mod usage;
pub mod values;
mod why;

use crate::control::client::{Client, ClientError};
use crate::control::message::{Request, Response};
use crate::supervisor::storing::{self, Given};
use crate::{lab, supervisor};
use clap::{ArgAction, Args, Parser, Subcommand};
use failure::Failure;
use output::Output;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// What a command ends with: the exit code of its verdict, or why there is none.
pub type Outcome = Result<u8, Failure>;

/// Exit code 0.
pub const OK: u8 = 0;
/// Exit code of a verdict that is not a pass, such as a `diff` that is not empty.
pub const VERDICT_FAILED: u8 = 5;

/// A multicast relay: UDP groups in at one interface, out of others, rewritten as each output asks.
#[derive(Debug, Parser)]
#[command(name = "relay", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Arguments of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Control socket of the daemon
    #[arg(long, global = true, env = "RELAY_SOCKET", hide_env_values = true, default_value = "/run/relay/relay.sock", value_name = "PATH")]
    pub socket: PathBuf,
    /// Print facts and errors as JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Log more on stderr (twice: even more; RUST_LOG overrides)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

/// The commands, in the order of the manual.
#[derive(Debug, Subcommand)]
enum Command {
    /// Run the relay in the foreground until SIGTERM or SIGINT; SIGHUP re-reads the config file
    Run(Box<run::RunArgs>),
    /// Change, list and explain the running rules
    #[command(subcommand)]
    Rule(rule::RuleCommand),
    /// Make the running set of rules equal to a file
    Apply(apply::ApplyArgs),
    /// Show what `apply` would change; exit code 5 if anything
    Diff(diff::DiffArgs),
    /// Validate a config file: needs no privileges, daemon or interfaces
    Check(check::CheckArgs),
    /// Health: interfaces with their backends and why, workers
    Status,
    /// Counters of interfaces, rules, outputs and frames
    Stats,
    /// End the relay, or what one whose supervisor is dead has left, and say what that was
    Stop,
    /// Live view of rules, interfaces and workers
    #[cfg(feature = "top")]
    Top(top::TopArgs),
    /// Examine this machine before packets are lost: each trap in one line, with its remedy; exit code 5 if something fails
    Doctor(doctor::DoctorArgs),
    /// Why a rule moves no packets, in sentences; exit code 5 if it does not
    Why(why::WhyArgs),
    /// Capture packets inside the relay, where tcpdump sees none: before and after the rewrite, and where they are dropped
    Capture(capture::CaptureArgs),
    /// Shared-memory channels between supervisor and workers: memory, depth, what moved, what was lost
    Channels,
    /// Send numbered, stamped datagrams at a steady rate, or the frames of a capture again
    Send(Box<send::SendArgs>),
    /// Receive and verify what `send` sent; the exit code is the verdict
    Recv(lab::recv::Args),
    /// Three namespaces, a relay, real traffic, a table and PASS or FAIL
    Demo(lab::demo::Args),
    /// Measure, as a table or JSON
    #[command(subcommand)]
    Bench(Box<bench::BenchCommand>),
    /// The other process of `bench ipc`
    #[command(hide = true)]
    BenchPeer(lab::ringbench::peer::Args),
    /// The ring between two processes, for scripts/run_demo.sh
    #[command(hide = true)]
    RingDemo(lab::ringbench::demo::Args),
    /// Print the completions of a shell
    Completions(completions::CompletionsArgs),
    /// Write the manual pages into a directory
    Man(man::ManArgs),
}

/// What a command works with.
#[derive(Debug)]
pub struct Context {
    /// Arguments of every command.
    pub global: Global,
    /// Where facts go.
    pub output: Output,
}

impl Context {
    /// Asks the daemon; what it refuses is a failure with its code.
    pub fn ask(&self, request: &Request) -> Result<Response, Failure> {
        match Client::connect(&self.global.socket).map_err(|error| self.unreachable(error))?.request(request)? {
            Response::Error(body) => Err(body.into()),
            response => Ok(response),
        }
    }

    /// No daemon: but perhaps what one has left.
    fn unreachable(&self, error: ClientError) -> Failure {
        match supervisor::takeover::orphans_of(&self.global.socket) {
            Some(pid) => Failure::from(error).hint(format!(
                "what its supervisor (pid {pid}) has left forwards on: `relay run --takeover` goes on with it, `relay stop` ends it"
            )),
            None => error.into(),
        }
    }
}

/// Runs the command of this process's arguments.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    ExitCode::from(match Cli::try_parse_from(&arguments) {
        Ok(cli) => execute(cli),
        Err(error) => usage::report(&error, &arguments),
    })
}

fn execute(cli: Cli) -> u8 {
    // Before anything is opened: what is open at their numbers now was passed on.
    let given = if matches!(cli.command, Command::Run(_)) { storing::given() } else { Ok(Vec::new()) };
    let json = cli.global.json;
    if !json {
        lab::progress::show();
    }
    let context = Context { output: Output::new(json), global: cli.global };
    let outcome =
        logs::init(context.global.verbose, matches!(cli.command, Command::Run(_))).and_then(|()| dispatch(cli.command, given, &context));
    outcome.unwrap_or_else(|failure| {
        failure.print(json);
        failure.code
    })
}

fn dispatch(command: Command, given: Given, context: &Context) -> Outcome {
    match command {
        Command::Run(args) => run::run(*args, given, context),
        Command::Rule(command) => rule::run(command, context),
        Command::Apply(args) => apply::run(&args, context),
        Command::Diff(args) => diff::run(&args, context),
        Command::Check(args) => check::run(&args, context),
        Command::Status => status::run(context),
        Command::Stats => stats::run(context),
        Command::Stop => stop::run(context),
        #[cfg(feature = "top")]
        Command::Top(args) => top::run(&args, context),
        Command::Doctor(args) => doctor::run(&args, context),
        Command::Why(args) => why::run(&args, context),
        Command::Capture(args) => capture::run(&args, context),
        Command::Channels => channels::run(context),
        Command::Send(args) => send::run(&args, context),
        Command::Recv(args) => recv::run(&args, context),
        Command::Demo(args) => demo::run(&args, context),
        Command::Bench(command) => bench::run(&command, context),
        Command::BenchPeer(args) => lab::ringbench::peer::run(&args).map(|()| OK).map_err(bench::failed),
        Command::RingDemo(args) => lab::ringbench::demo::run(&args).map_err(bench::failed),
        Command::Completions(args) => completions::run(&args, context),
        Command::Man(args) => man::run(&args, context),
    }
}

/// A daemon that answers something else than was asked.
fn unexpected(response: &Response) -> Failure {
    let kind = match response {
        Response::Done(_) => "done",
        Response::Rules(_) => "rules",
        Response::Status(_) => "status",
        Response::Stats(_) => "stats",
        Response::Channels(_) => "channels",
        Response::Changes(_) => "changes",
        Response::Capture(_) => "capture",
        Response::Error(_) => "error",
    };
    Failure::new(1, format!("the daemon answered with {kind}, which was not asked for"))
        .hint("use the relay of the same version as the daemon")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_and_argument_has_a_help_line() {
        fn look(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{} says nothing", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {} says nothing", command.get_name(), argument.get_id());
            }
            command.get_subcommands().for_each(look);
        }
        look(&Cli::command());
    }
}
