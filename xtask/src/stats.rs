//! `cargo xtask stats`: how large the product is and where its unsafe code stands (requirement 001.10).
//!
//! Must never fail a build: it only reports, the limits are stated beside the figures.

use crate::source::{self, Source};
use crate::workspace;
use anyhow::Result;
use std::collections::BTreeMap;
use std::process::ExitCode;

/// Rooms that must stay below [`CORE_LIMIT`] together.
const CORE: [&str; 7] = ["wire", "rule", "frame", "ring", "shm", "nic", "datapath"];
const CORE_LIMIT: usize = 6_000;
const PRODUCT_LIMIT: usize = 10_000;

#[derive(Default)]
struct Count {
    files: usize,
    lines: usize,
    unsafe_blocks: usize,
    unsafe_files: Vec<String>,
}

/// Prints the table.
pub(crate) fn run() -> Result<ExitCode> {
    let sources = source::scan(&workspace::files()?);
    let mut parts: BTreeMap<String, Count> = BTreeMap::new();
    for source in &sources {
        if let Some(part) = part(source) {
            parts.entry(part).or_default().add(source);
        }
    }
    print(&parts);
    Ok(ExitCode::SUCCESS)
}

/// A room of the relay, or a crate of the product; the tool and the tests are none.
fn part(source: &Source) -> Option<String> {
    match source.path.split('/').next()? {
        "relay" => Some(source.room().unwrap_or("(root)").to_owned()),
        name @ ("relay-common" | "relay-ebpf") => Some(name.to_owned()),
        _ => None,
    }
}

impl Count {
    fn add(&mut self, source: &Source) {
        let lines = source.product().count();
        if lines == 0 {
            return;
        }
        self.files += 1;
        self.lines += lines;
        let blocks = unsafe_blocks(source);
        self.unsafe_blocks += blocks;
        if blocks > 0 {
            self.unsafe_files.push(source.path.clone());
        }
    }
}

/// `unsafe {`, `unsafe fn`, `unsafe impl`, `unsafe extern`: every place that asks for a reason.
pub(crate) fn unsafe_blocks(source: &Source) -> usize {
    source.product().flat_map(|(_, line)| words(line)).filter(|word| *word == "unsafe").count()
}

/// Identifiers of a line.
pub(crate) fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

fn print(parts: &BTreeMap<String, Count>) {
    println!("{:<14}{:>7}{:>8}{:>8}", "part", "files", "lines", "unsafe");
    for (name, count) in parts {
        println!("{name:<14}{:>7}{:>8}{:>8}", count.files, count.lines, count.unsafe_blocks);
    }
    let sum = |wanted: &dyn Fn(&str) -> bool| parts.iter().filter(|(name, _)| wanted(name)).map(|(_, count)| count.lines).sum::<usize>();
    let (core, all) = (sum(&|name| CORE.contains(&name)), sum(&|_| true));
    println!("\nwire to datapath: {core} lines of product code (limit {CORE_LIMIT}){}", verdict(core, CORE_LIMIT));
    let lab = sum(&|name| name == "lab");
    println!("product without the laboratory: {} lines (limit {PRODUCT_LIMIT}){}", all - lab, verdict(all - lab, PRODUCT_LIMIT));
    println!("laboratory (demo, generators, benchmarks): {lab} lines");
    let files: Vec<&String> = parts.values().flat_map(|count| &count.unsafe_files).collect();
    println!("files with unsafe code: {}", files.len());
    for file in files {
        println!("  {file}");
    }
}

fn verdict(lines: usize, limit: usize) -> &'static str {
    if lines < limit { "" } else { ": above the limit" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::File;

    #[test]
    fn unsafe_is_counted_in_code_only() {
        let text = "// unsafe\nfn f() { unsafe { g() } }\nunsafe impl Send for X {}\nlet not_unsafe = \"unsafe\";\n";
        let source = source::scan_one(&File { path: "relay/src/sys/mod.rs".into(), text: text.into() });
        assert_eq!(unsafe_blocks(&source), 2);
    }

    #[test]
    fn the_tool_is_no_product() {
        let part_of = |path: &str| part(&source::scan_one(&File { path: path.into(), text: String::new() }));
        assert_eq!(part_of("xtask/src/main.rs"), None);
        assert_eq!(part_of("relay/src/wire/mod.rs").as_deref(), Some("wire"));
        assert_eq!(part_of("relay-common/src/lib.rs").as_deref(), Some("relay-common"));
    }
}
