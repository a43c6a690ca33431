//! `cargo xtask tidy`: the rules of this project that no compiler checks.
//!
//! Who imports whom, where unsafe code may stand, what the data path may call, how files open and how long they are, and that each
//! row of the fault table has a mutation which finds its place. Every finding names file, line and remedy. Must never change a file.

mod files;
mod imports;
mod mutants;

use crate::source::{self, Source};
use crate::workspace::{self, File};
use anyhow::Result;
use std::fmt;
use std::process::ExitCode;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Error,
    Warning,
}

/// One broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Finding {
    path: String,
    line: usize,
    level: Level,
    what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = if self.level == Level::Error { "error" } else { "warning" };
        write!(f, "{}:{}: {level}: {}", self.path, self.line, self.what)
    }
}

/// An error at a line of a file.
fn error(path: &str, line: usize, what: impl Into<String>) -> Finding {
    Finding { path: path.to_owned(), line, level: Level::Error, what: what.into() }
}

/// Prints the findings.
pub(crate) fn run() -> Result<ExitCode> {
    Ok(if passes()? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints the findings; whether none is an error.
pub(crate) fn passes() -> Result<bool> {
    let files = workspace::files()?;
    let sources = source::scan(&files);
    let findings = check(&files, &sources);
    for finding in &findings {
        println!("{finding}");
    }
    let errors = findings.iter().filter(|finding| finding.level == Level::Error).count();
    println!("tidy: {} files, {errors} errors, {} warnings", files.len(), findings.len() - errors);
    Ok(errors == 0)
}

fn check(files: &[File], sources: &[Source]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for source in sources {
        findings.extend(imports::check(source));
        findings.extend(files::check_source(source));
    }
    findings.extend(files.iter().flat_map(files::check_file));
    findings.extend(mutants::check(files));
    findings.extend(files::check_unsafe(sources, include_str!("unsafe_files.txt")));
    findings
}
