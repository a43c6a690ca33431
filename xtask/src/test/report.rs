//! Reads what test programs print, and counts.
//!
//! Understands the format of Rust's own test harness with `--show-output`. Must never count a test that printed
//! `SKIPPED: reason` as passed.

use std::collections::BTreeMap;
use std::fmt;

/// Part of the harness's output we are in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Section {
    /// One line a test.
    #[default]
    Running,
    /// What passed tests printed.
    Successes,
    /// What failed tests printed, then their names.
    Failures,
}

/// All steps so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    passed: usize,
    failed: Vec<String>,
    /// Failed, and passed when they were run again.
    unsteady: Vec<String>,
    /// Name and reason.
    skipped: Vec<(String, String)>,
    section: Section,
    /// A program has said how many tests it runs, and not yet what came of them.
    open: bool,
    /// The test whose output is being read.
    current: String,
    /// Skips seen in the running program, by name.
    skips: BTreeMap<String, String>,
    failures: Vec<String>,
    /// What became of each test by name.
    outcomes: BTreeMap<String, String>,
}

impl Report {
    /// A check that is no test program.
    pub(super) fn note(&mut self, name: &str, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.failed.push(name.to_owned());
        }
    }

    /// Takes a line. Returns whether a reader wants to see it.
    pub(super) fn read(&mut self, line: &str) -> bool {
        match line {
            "successes:" => self.section = Section::Successes,
            "failures:" => self.section = Section::Failures,
            _ => {}
        }
        if announced(line) {
            self.died();
            self.open = true;
        } else if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            name.clone_into(&mut self.current);
        } else if let Some((name, word)) = ran(line) {
            self.outcomes.insert(name.to_owned(), word.to_owned());
        } else if let Some((name, reason)) = ignored(line) {
            self.skips.insert(name.to_owned(), reason.to_owned());
        } else if let (Section::Successes, Some(reason)) = (self.section, skipped(line)) {
            let name = self.current.clone();
            self.skips.entry(name).or_insert_with(|| reason.trim().to_owned());
        } else if let (Section::Failures, Some(name)) = (self.section, listed(line)) {
            self.failures.push(name.to_owned());
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            self.close(counts);
            return true;
        }
        self.section != Section::Successes
    }

    /// The end of one test program: `ok. 3 passed; 0 failed; 1 ignored; …`.
    fn close(&mut self, counts: &str) {
        let count = |what: &str| {
            let before = counts.split_once(what).map_or("", |(before, _)| before);
            before.trim_end().rsplit(' ').next().and_then(|number| number.parse::<usize>().ok()).unwrap_or(0)
        };
        let (passed, failed, ignored) = (count(" passed;"), count(" failed;"), count(" ignored;"));
        self.passed += (passed + ignored).saturating_sub(self.skips.len());
        self.outcomes.extend(self.skips.iter().map(|(name, reason)| (name.clone(), format!("skipped: {reason}"))));
        self.skipped.extend(std::mem::take(&mut self.skips));
        // Names that can't be told are still failures.
        self.failures.resize(failed, "a test whose name was not printed".to_owned());
        self.failed.append(&mut self.failures);
        self.section = Section::Running;
        self.open = false;
        self.current.clear();
    }

    /// A program that has not closed its account is a failure, which no second run of others can mend.
    fn died(&mut self) {
        if std::mem::take(&mut self.open) {
            self.failed.push("a test program that ended in the middle".to_owned());
        }
    }

    /// A program that died in the middle printed no result: nothing of it is counted but that.
    pub(super) fn end_of_step(&mut self) {
        self.died();
        self.section = Section::Running;
        self.current.clear();
        self.skips.clear();
        self.failures.clear();
    }

    /// `NAME<tab>passed`, `failed` or `skipped: REASON`, one a line (what `cargo xtask requirements` reads).
    pub(super) fn outcomes(&self) -> String {
        self.outcomes.iter().map(|(name, outcome)| format!("{name}\t{outcome}\n")).collect()
    }

    pub(super) fn failed_count(&self) -> usize {
        self.failed.len()
    }

    /// Names of the failures after the first `count`.
    pub(super) fn failed_since(&self, count: usize) -> Vec<String> {
        self.failed.get(count..).unwrap_or_default().to_vec()
    }

    /// Takes the failures after the first `count` back that have passed in a second run. What was not run again, or failed again,
    /// stays a failure, and so does what failed in another step under the same name.
    pub(super) fn forgive(&mut self, count: usize, again: &Self) {
        let passed = |name: &String| again.outcomes.get(name).is_some_and(|word| word == "passed") && !again.failed.contains(name);
        let since = self.failed.split_off(count.min(self.failed.len()));
        let (mut unsteady, failed): (Vec<_>, Vec<_>) = since.into_iter().partition(passed);
        self.failed.extend(failed);
        self.passed += unsteady.len();
        self.outcomes.extend(unsteady.iter().map(|name| (name.clone(), "passed".to_owned())));
        self.unsteady.append(&mut unsteady);
    }

    pub(super) fn passes(&self) -> bool {
        self.failed.is_empty() && self.passed > 0
    }
}

/// `running 3 tests`.
fn announced(line: &str) -> bool {
    let count = line.strip_prefix("running ").and_then(|rest| rest.strip_suffix(" tests").or_else(|| rest.strip_suffix(" test")));
    count.is_some_and(|count| count.parse::<usize>().is_ok())
}

/// `test NAME ... ok` or `test NAME ... FAILED`.
fn ran(line: &str) -> Option<(&str, &'static str)> {
    let (name, rest) = line.strip_prefix("test ")?.split_once(" ... ")?;
    match rest {
        "ok" => Some((name, "passed")),
        "FAILED" => Some((name, "failed")),
        _ => None,
    }
}

/// `test NAME ... ignored` or `test NAME ... ignored, REASON`.
fn ignored(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.strip_prefix("test ")?.split_once(" ... ignored")?;
    let reason = rest.strip_prefix(", ").unwrap_or("part of the long form: cargo xtask test --long");
    Some((name, reason))
}

/// `SKIPPED: REASON`, in capitals or not.
fn skipped(line: &str) -> Option<&str> {
    let (word, reason) = line.trim_start().split_once(':')?;
    word.eq_ignore_ascii_case("skipped").then_some(reason)
}

/// A name in the list of failures: four blanks and one word.
fn listed(line: &str) -> Option<&str> {
    let name = line.strip_prefix("    ")?;
    let plain = name.split(" - ").next().unwrap_or(name);
    (!plain.is_empty() && !plain.contains(' ') && plain.chars().all(|c| c.is_alphanumeric() || "_:./".contains(c))).then_some(name)
}

impl fmt::Display for Report {
    /// Skips and failures, then the line that counts, alone and last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, reason) in &self.skipped {
            writeln!(f, "skipped: {name}: {reason}")?;
        }
        for name in &self.unsteady {
            writeln!(f, "unsteady: {name}: failed, and passed when it was run again")?;
        }
        for name in &self.failed {
            writeln!(f, "failed: {name}")?;
        }
        writeln!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skipped.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 5 tests
test a::one ... ok
test a::two ... ok
test a::three ... FAILED
test a::four ... ignored
test a::five ... ignored, needs a NIC

successes:

---- a::two stdout ----
SKIPPED: no network namespace: EPERM
skipped: a second line counts once


successes:
    a::one
    a::two

failures:

---- a::three stdout ----

thread 'a::three' panicked at src/lib.rs:1:1:
    left side of it
stack backtrace:
   0: rust_begin_unwind


failures:
    a::three

test result: FAILED. 2 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.01s
";

    fn read(output: &str) -> Report {
        let mut report = Report::default();
        for line in output.lines() {
            report.read(line);
        }
        report
    }

    #[test]
    fn the_last_line_counts_and_each_skip_has_its_reason() {
        let text = read(OUTPUT).to_string();
        let want = "skipped: a::five: needs a NIC\n\
                    skipped: a::four: part of the long form: cargo xtask test --long\n\
                    skipped: a::two: no network namespace: EPERM\n\
                    failed: a::three\n\
                    1 passed, 1 failed, 3 skipped\n";
        assert_eq!(text, want);
        assert!(!read(OUTPUT).passes());
        let outcomes = "a::five\tskipped: needs a NIC\na::four\tskipped: part of the long form: cargo xtask test --long\n\
                        a::one\tpassed\na::three\tfailed\na::two\tskipped: no network namespace: EPERM\n";
        assert_eq!(read(OUTPUT).outcomes(), outcomes);
    }

    #[test]
    fn programs_add_up() {
        let twice = format!("{OUTPUT}{OUTPUT}");
        assert!(read(&twice).to_string().ends_with("2 passed, 2 failed, 6 skipped\n"));
    }

    #[test]
    fn a_failure_without_a_name_still_fails() {
        let report = read("test result: FAILED. 0 passed; 2 failed; 0 ignored; 0 measured");
        assert_eq!(report.failed_count(), 2);
    }

    #[test]
    fn what_passes_the_second_time_is_named_and_nothing_else_is_forgiven() {
        let again = OUTPUT.replace("a::three ... FAILED", "a::three ... ok");
        let again = again.split("failures:").next().unwrap_or_default();
        let mut report = read(OUTPUT);
        report.forgive(0, &read(again));
        let text = report.to_string();
        assert!(text.contains("unsteady: a::three: failed, and passed when it was run again\n"), "{text}");
        assert!(text.ends_with("2 passed, 0 failed, 3 skipped\n") && report.passes(), "{text}");
        assert!(report.outcomes().contains("a::three\tpassed\n"));
        for second in [OUTPUT, "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured"] {
            let mut report = read(OUTPUT);
            report.forgive(0, &read(second));
            assert_eq!((report.failed_since(0), report.passes()), (vec!["a::three".to_owned()], false));
        }
        assert!(report.failed_since(7).is_empty());
        let mut report = read(OUTPUT);
        report.forgive(1, &read(again));
        assert_eq!(report.failed_since(0), ["a::three"], "a failure of an earlier step is not the second run's to forgive");
    }

    #[test]
    fn a_program_that_dies_is_not_forgiven() {
        let mut report = read("running 2 tests\ntest a ... ok\nrunning 1 test\ntest b ... ok\n");
        report.end_of_step();
        report.forgive(0, &read("test a ... ok\ntest b ... ok\n"));
        assert_eq!((report.failed_count(), report.passes()), (2, false));
    }

    #[test]
    fn nothing_run_is_not_a_pass() {
        assert!(!Report::default().passes());
    }

    #[test]
    fn what_passed_tests_print_is_not_shown_again() {
        let mut report = Report::default();
        let shown: Vec<&str> = OUTPUT.lines().filter(|line| report.read(line)).collect();
        assert!(shown.contains(&"test a::one ... ok") && shown.contains(&"stack backtrace:"));
        assert!(!shown.iter().any(|line| line.to_ascii_uppercase().starts_with("SKIPPED")));
    }
}
