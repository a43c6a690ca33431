//! Rules as the command line meets them: lines and config files, validated before anybody is asked to run them.

use super::failure::Failure;
use crate::rule::Rule;
use std::path::Path;

/// The rules of `--rule` or of `rule add`.
pub(super) fn given(lines: &[String]) -> Result<Vec<Rule>, Failure> {
    if lines.is_empty() { Ok(Vec::new()) } else { Err(Failure::new(1, "rule text is not understood by this build")) }
}

/// The rules of a config file.
pub(super) fn load(file: &Path) -> Result<Vec<String>, Failure> {
    Err(Failure::new(1, format!("{}: config files are not understood by this build", file.display())))
}

/// A config file and the rules beside it must make one valid set.
pub(super) fn check_together(config: Option<&Path>, _rules: &[Rule]) -> Result<(), Failure> {
    config.map_or(Ok(()), |file| load(file).map(|_| ()))
}
