//! What is said when the arguments themselves are wrong: clap's words in the shape of our errors.

use super::failure::Failure;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use std::ffi::OsString;

/// Prints help, version or the error; returns the exit code.
pub(super) fn report(error: &clap::Error, arguments: &[OsString]) -> u8 {
    if !error.use_stderr() {
        let _ = error.print(); // a reader that has gone is not an error
        return super::OK;
    }
    let json = arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == "--json");
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand && !json {
        let _ = error.print();
    } else {
        failure(error).print(json);
    }
    super::failure::BAD_INPUT
}

fn failure(error: &clap::Error) -> Failure {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Failure::bad_input("a command is missing").hint("see relay --help");
    }
    let text = error.render().to_string();
    let paragraphs: Vec<String> = text.split("\n\n").map(joined).collect();
    let first = paragraphs.first().map(String::as_str).unwrap_or_default();
    let message = first.strip_prefix("error: ").unwrap_or(first);
    Failure::bad_input(message).field(field(error)).hint(hint(&paragraphs))
}

/// The lines of a paragraph as one.
fn joined(paragraph: &str) -> String {
    paragraph.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// `--workers` of `--workers <N>`; the first of several.
fn field(error: &clap::Error) -> String {
    let named = match error.get(ContextKind::InvalidArg).or_else(|| error.get(ContextKind::InvalidSubcommand)) {
        Some(ContextValue::String(one)) => one.as_str(),
        Some(ContextValue::Strings(several)) => several.first().map(String::as_str).unwrap_or_default(),
        _ => "",
    };
    named.split(' ').next().unwrap_or_default().trim_matches(['<', '>', '[', ']', '.']).to_owned()
}

fn hint(paragraphs: &[String]) -> String {
    let find = |prefix: &str| paragraphs.iter().find(|paragraph| paragraph.starts_with(prefix));
    match (find("tip: "), find("Usage: ")) {
        (Some(tip), _) => tip.trim_start_matches("tip: ").to_owned(),
        (None, Some(usage)) => format!("usage: {}", usage.trim_start_matches("Usage: ")),
        (None, None) => "see --help".to_owned(),
    }
}
