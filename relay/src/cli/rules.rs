//! Rules as the command line meets them: lines and config files, validated before anybody is asked to run them.

use super::failure::Failure;
use crate::config::{self, ConfigError};
use crate::rule::{Rule, RuleError, RuleSet, SetError};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Longest config file that is read, in bytes; 10,000 rules have two to three million.
const MAX_FILE_LEN: u64 = 64 << 20;

/// The rules of `--rule` or of `rule add`.
pub(super) fn given(lines: &[String]) -> Result<Vec<Rule>, Failure> {
    lines.iter().map(|line| line.parse().map_err(|error| wrong_line(line, error))).collect()
}

/// The rules of a config file; `field` is the argument that named it.
pub(super) fn load(file: &Path, field: &str) -> Result<Vec<Rule>, Failure> {
    let source = read(file).map_err(|error| Failure::bad_input(format!("{}: {error}", file.display())).field(field))?;
    Ok(config::parse(&file.to_string_lossy(), &source)?)
}

/// A config file and the rules beside it must make one valid set.
pub(super) fn check_together(config: Option<&Path>, rules: &[Rule]) -> Result<(), Failure> {
    let mut all = config.map_or(Ok(Vec::new()), |file| load(file, "--config"))?;
    all.extend_from_slice(rules);
    RuleSet::new(all)?;
    Ok(())
}

fn read(file: &Path) -> io::Result<String> {
    let mut source = String::new();
    File::open(file)?.take(MAX_FILE_LEN + 1).read_to_string(&mut source)?;
    if source.len() as u64 > MAX_FILE_LEN { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(source) }
}

fn wrong_line(line: &str, error: RuleError) -> Failure {
    let RuleError { field, column, problem, hint } = error;
    Failure::bad_input(format!("rule `{line}`: {field} at column {column}: {problem}")).field(field).hint(hint)
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let ConfigError { file, line, column, field, problem, hint } = error;
        Self::bad_input(format!("{file}:{line}:{column}: {field}: {problem}")).field(field).hint(hint)
    }
}

impl From<SetError> for Failure {
    fn from(error: SetError) -> Self {
        Self::bad_input(error.to_string()).field(error.field())
    }
}
