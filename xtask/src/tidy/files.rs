//! Rules for single files: how they open, how long they are, what must not stand in them, and which may hold unsafe code.

use super::{Finding, Level, error};
use crate::source::Source;
use crate::stats::unsafe_blocks;
use crate::workspace::File;
use std::collections::BTreeSet;

/// Lines of a file.
const FILE_LIMIT: usize = 700;
/// Lines of a function, from `fn` to its closing brace.
const FUNCTION_LIMIT: usize = 60;

/// Names of registry hosts, in two halves so that this file passes.
const HOSTS: [(&str, &str); 6] =
    [("crates", ".io"), ("docs", ".rs/"), ("pypi", ".org"), ("npmjs", ".org"), ("deb.debian", ".org"), ("proxy.golang", ".org")];

/// Ways to ask for the time of day, which jumps.
const WALL_CLOCKS: [&str; 4] = ["SystemTime", "CLOCK_REALTIME", "CLOCK_TAI", "UtcDateTime"];
/// Files of the product that may: they stamp what others read, and decide nothing by it.
const STAMPS: [&str; 2] = ["relay/src/datapath/tap.rs", "relay/src/lab/clock.rs"];

/// What a clock that jumps could make go wrong: nothing may be decided by the time of day.
fn wall_clocks(source: &Source) -> Vec<Finding> {
    if !source.path.starts_with("relay/src/") || STAMPS.contains(&source.path.as_str()) {
        return Vec::new();
    }
    let asks = |line: &str| WALL_CLOCKS.into_iter().find(|clock| line.contains(clock));
    let found = source.product().filter_map(|(at, line)| asks(line).map(|clock| (at, clock)));
    found.map(|(at, clock)| error(&source.path, at, format!("`{clock}` jumps: use Instant or CLOCK_MONOTONIC"))).collect()
}

/// Any text file.
pub(super) fn check_file(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (at, line) in file.text.lines().enumerate() {
        for (name, end) in HOSTS {
            if line.contains(&format!("{name}{end}")) {
                findings.push(error(&file.path, at + 1, "names a registry's host: say which package, not where from"));
            }
        }
    }
    findings
}

/// A Rust file.
pub(super) fn check_source(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let first = source.text.lines().next().unwrap_or_default();
    if !first.starts_with("//!") {
        findings.push(error(&source.path, 1, "does not open with `//!`: say what it is for and what it must never do"));
    }
    let len = source.code.len();
    if len > FILE_LIMIT {
        findings.push(error(&source.path, len, format!("{len} lines; the limit is {FILE_LIMIT}: split it by what changes together")));
    }
    for (at, line) in source.code.iter().enumerate() {
        let bare: String = line.split_whitespace().collect();
        if bare.contains("#[allow(") || bare.contains("#![allow(") {
            findings.push(error(&source.path, at + 1, "`allow` never ends: write `#[expect(lint, reason = \"…\")]`"));
        }
    }
    findings.extend(wall_clocks(source));
    findings.extend(long_functions(source));
    findings
}

fn long_functions(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    // Open functions: line of `fn`, depth before its brace.
    let (mut open, mut pending, mut depth) = (Vec::new(), None, 0usize);
    for (at, line) in source.code.iter().enumerate() {
        if starts_function(line) {
            pending = Some(at);
        }
        for c in line.chars() {
            match c {
                '{' => {
                    open.extend(pending.take().map(|start| (start, depth)));
                    depth += 1;
                }
                '}' => {
                    depth = depth.saturating_sub(1);
                    if let Some((start, _)) = open.pop_if(|(_, before)| *before == depth) {
                        findings.extend(too_long(source, start, at + 1 - start));
                    }
                }
                ';' if pending.is_some_and(|start| start != at || !line.contains('{')) => pending = None,
                _ => {}
            }
        }
    }
    findings
}

fn starts_function(line: &str) -> bool {
    let mut words = line.split_whitespace();
    words.any(|word| word == "fn") && !line.trim_start().starts_with("type ")
}

fn too_long(source: &Source, start: usize, len: usize) -> Option<Finding> {
    (len > FUNCTION_LIMIT).then(|| Finding {
        path: source.path.clone(),
        line: start + 1,
        level: Level::Warning,
        what: format!("a function of {len} lines; aim at {FUNCTION_LIMIT} at most"),
    })
}

/// Unsafe code stands in the files of the list, each of which says why; the list names no others.
pub(super) fn check_unsafe(sources: &[Source], list: &str) -> Vec<Finding> {
    let listed: BTreeSet<&str> = list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let mut findings = Vec::new();
    for source in sources {
        let has_unsafe = unsafe_blocks(source) > 0;
        let is_listed = listed.contains(source.path.as_str());
        if has_unsafe && !is_listed {
            findings.push(error(&source.path, 1, "unsafe code outside the files of xtask/src/unsafe_files.txt"));
        }
        if has_unsafe && !says_why(source) {
            findings.push(error(&source.path, 1, "unsafe code without `#![expect(unsafe_code, reason = \"…\")]`"));
        }
        if !has_unsafe && is_listed {
            findings.push(error(&source.path, 1, "in xtask/src/unsafe_files.txt without unsafe code: take it out of the list"));
        }
    }
    let known: BTreeSet<&str> = sources.iter().map(|source| source.path.as_str()).collect();
    findings.extend(listed.difference(&known).map(|path| error("xtask/src/unsafe_files.txt", 1, format!("{path} does not exist"))));
    findings
}

/// At the top, or at the one item of the file that needs it.
fn says_why(source: &Source) -> bool {
    let bare: String = source.text.split_whitespace().collect();
    bare.contains("expect(unsafe_code,reason=\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::scan_one;

    fn source(text: &str) -> Source {
        scan_one(&File { path: "relay/src/sys/x.rs".into(), text: text.into() })
    }

    fn says(findings: &[Finding], what: &str) -> bool {
        findings.len() == 1 && findings[0].to_string().contains(what)
    }

    #[test]
    fn a_file_without_a_purpose_is_found() {
        assert!(says(&check_source(&source("fn f() {}\n")), "does not open with"));
        assert!(check_source(&source("//! Purpose.\nfn f() {}\n")).is_empty());
    }

    #[test]
    fn allow_is_found_in_code_only() {
        assert!(says(&check_source(&source("//! x\n#[allow(dead_code)]\nfn f() {}\n")), "2: error: `allow`"));
        assert!(says(&check_source(&source("//! x\n#![ allow(dead_code)]\n")), "allow"));
        assert!(check_source(&source("//! x\n// #[allow(dead_code)]\n")).is_empty());
    }

    #[test]
    fn the_time_of_day_is_found_in_the_product_alone() {
        assert!(says(&check_source(&source("//! x\nfn f() { std::time::SystemTime::now(); }\n")), "2: error: `SystemTime` jumps"));
        assert!(check_source(&source("//! x\n// SystemTime\n#[cfg(test)]\nmod tests {\n    use std::time::SystemTime;\n}\n")).is_empty());
        let stamp = File { path: STAMPS[0].into(), text: "//! x\nfn f() { now(CLOCK_REALTIME); }\n".into() };
        assert!(check_source(&scan_one(&stamp)).is_empty());
    }

    #[test]
    fn long_files_are_errors_and_long_functions_warnings() {
        assert!(says(&check_source(&source(&format!("//! x\n{}", "\n".repeat(700)))), "701 lines"));
        let body = "    g();\n".repeat(59);
        let long = check_source(&source(&format!("//! x\nimpl X {{\nfn f(\n) {{\n{body}}}\n}}\n")));
        assert!(says(&long, "warning: a function of 62 lines"), "{long:?}");
        let short = "    g();\n".repeat(50);
        assert!(check_source(&source(&format!("//! x\nfn f() {{\n{short}}}\nfn h() {{\n{short}}}\n"))).is_empty());
    }

    #[test]
    fn declarations_without_a_body_open_nothing() {
        let body = "    g();\n".repeat(59);
        assert!(check_source(&source(&format!("//! x\ntrait T {{\n    fn f(&self);\n}}\nmod m {{\n{body}\n}}\n"))).is_empty());
    }

    #[test]
    fn unsafe_code_needs_the_list_and_a_reason() {
        let bare = [source("//! x\nfn f() { unsafe { g() } }\n")];
        assert_eq!(check_unsafe(&bare, "").len(), 2);
        let fenced = [source("//! x\n#![expect(unsafe_code, reason = \"mmap\")]\nfn f() { unsafe { g() } }\n")];
        assert!(check_unsafe(&fenced, "# why\nrelay/src/sys/x.rs\n").is_empty());
        assert!(says(&check_unsafe(&fenced, ""), "outside the files"));
    }

    #[test]
    fn the_list_is_kept_short() {
        assert!(says(&check_unsafe(&[source("//! unsafe\n")], "relay/src/sys/x.rs"), "without unsafe code"));
        assert!(says(&check_unsafe(&[], "relay/src/sys/gone.rs"), "does not exist"));
    }

    #[test]
    fn hosts_of_registries_are_found() {
        let text = format!("a\nsee https://{}{}/x\n", "crates", ".io");
        assert!(says(&check_file(&File { path: "README.md".into(), text }), "README.md:2: error"));
    }
}
