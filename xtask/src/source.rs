//! Rust source as tidy and stats see it: code without comments and strings, and which lines belong to tests.
//!
//! A scanner, not a parser: it knows strings, comments, braces and `#[cfg(test)]`. Must never fail on odd input; at worst a
//! line is counted wrongly.

use crate::workspace::File;
use std::collections::BTreeSet;

/// One scanned file.
#[derive(Debug)]
pub(crate) struct Source {
    /// Path from the root.
    pub(crate) path: String,
    /// The text as it stands.
    pub(crate) text: String,
    /// The same lines with comments and the insides of strings blanked.
    pub(crate) code: Vec<String>,
    /// Whether a line belongs to tests.
    pub(crate) test: Vec<bool>,
}

impl Source {
    /// Lines of product code: not blank, not comment, not test. Numbers start at 1.
    pub(crate) fn product(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code
            .iter()
            .zip(&self.test)
            .enumerate()
            .filter(|(_, (line, test))| !**test && !line.trim().is_empty())
            .map(|(at, (line, _))| (at + 1, line.as_str()))
    }

    /// The room of `relay/src` the file belongs to.
    pub(crate) fn room(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("relay/src/")?;
        let first = inside.split('/').next()?;
        Some(first.strip_suffix(".rs").unwrap_or(first)).filter(|room| !matches!(*room, "lib" | "main"))
    }
}

/// Scans every Rust file.
pub(crate) fn scan(files: &[File]) -> Vec<Source> {
    let mut sources: Vec<Source> = files.iter().filter(|file| file.path.ends_with(".rs")).map(scan_one).collect();
    let test_files: BTreeSet<String> = sources.iter().flat_map(test_modules).collect();
    for source in &mut sources {
        let elsewhere = source.path.starts_with("tests/") || source.path.contains("/tests/") || source.path.contains("/benches/");
        if elsewhere || test_files.contains(&source.path) || source.code.iter().any(|line| line.contains("#![cfg(test)]")) {
            source.test.fill(true);
        }
    }
    sources
}

/// One file by itself.
pub(crate) fn scan_one(file: &File) -> Source {
    let masked = mask(&file.text);
    let code: Vec<String> = masked.lines().map(str::to_owned).collect();
    let test = test_lines(&masked, code.len());
    Source { path: file.path.clone(), text: file.text.clone(), code, test }
}

/// Files that `#[cfg(test)] mod name;` of this file names, in both places they may stand.
fn test_modules(source: &Source) -> Vec<String> {
    let (directory, file) = source.path.rsplit_once('/').unwrap_or(("", &source.path));
    let stem = file.trim_end_matches(".rs");
    let base = if matches!(stem, "mod" | "lib" | "main") { directory.to_owned() } else { format!("{directory}/{stem}") };
    let mut found = Vec::new();
    for pair in source.code.windows(2) {
        let [attribute, item] = pair else { continue };
        let name = item.trim().trim_start_matches("pub(crate) ").strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';'));
        if let (true, Some(name)) = (is_test_attribute(attribute), name) {
            found.extend([format!("{base}/{name}.rs"), format!("{base}/{name}/mod.rs")]);
        }
    }
    found
}

fn is_test_attribute(line: &str) -> bool {
    line.contains("#[cfg(test)]") || line.contains("#[cfg(all(test") || line.contains("#[cfg(all(loom, test")
}

/// Marks the item after each test attribute, to its closing brace or semicolon.
fn test_lines(masked: &str, count: usize) -> Vec<bool> {
    let mut test = vec![false; count];
    let (mut depth, mut inside, mut pending) = (0usize, None, false);
    for (line, mark) in masked.lines().zip(&mut test) {
        pending |= inside.is_none() && is_test_attribute(line);
        *mark = pending || inside.is_some();
        for byte in line.bytes() {
            match byte {
                b'{' => {
                    if pending {
                        (inside, pending) = (Some(depth), false);
                    }
                    depth += 1;
                }
                b'}' => {
                    depth = depth.saturating_sub(1);
                    if inside == Some(depth) {
                        inside = None;
                    }
                }
                b';' if pending => pending = false,
                _ => {}
            }
        }
    }
    test
}

/// What the scanner is inside of.
enum State {
    Code,
    LineComment,
    BlockComment(u32),
    Text,
    RawText(usize),
}

/// Comments and the insides of strings and character literals become blanks; lines stay lines.
pub(crate) fn mask(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let (mut at, mut state) = (0, State::Code);
    while at < bytes.len() {
        let (next, len) = step(state, bytes.get(at..).unwrap_or_default(), &mut out);
        state = next;
        at += len;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Consumes at least one byte of `rest` (never empty) and writes as many.
fn step(state: State, rest: &[u8], out: &mut Vec<u8>) -> (State, usize) {
    match state {
        State::Code => step_code(rest, out),
        State::LineComment if rest.first() == Some(&b'\n') => keep(State::Code, rest, 1, out),
        State::LineComment => blank(State::LineComment, rest, 1, out),
        State::BlockComment(depth) if rest.starts_with(b"*/") => {
            blank(if depth == 1 { State::Code } else { State::BlockComment(depth - 1) }, rest, 2, out)
        }
        State::BlockComment(depth) if rest.starts_with(b"/*") => blank(State::BlockComment(depth + 1), rest, 2, out),
        State::BlockComment(depth) => blank(State::BlockComment(depth), rest, 1, out),
        State::Text if rest.first() == Some(&b'\\') => blank(State::Text, rest, 2, out),
        State::Text if rest.first() == Some(&b'"') => keep(State::Code, rest, 1, out),
        State::Text => blank(State::Text, rest, 1, out),
        State::RawText(hashes) => {
            let closes = rest.first() == Some(&b'"') && rest.iter().skip(1).take_while(|byte| **byte == b'#').count() >= hashes;
            if closes { keep(State::Code, rest, 1 + hashes, out) } else { blank(State::RawText(hashes), rest, 1, out) }
        }
    }
}

fn step_code(rest: &[u8], out: &mut Vec<u8>) -> (State, usize) {
    let after_word = out.last().is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    if rest.starts_with(b"//") {
        return blank(State::LineComment, rest, 2, out);
    }
    if rest.starts_with(b"/*") {
        return blank(State::BlockComment(1), rest, 2, out);
    }
    if rest.first() == Some(&b'"') {
        return keep(State::Text, rest, 1, out);
    }
    if !after_word && let Some(hashes) = raw_text(rest) {
        let prefix = rest.iter().position(|byte| *byte == b'"').unwrap_or(0);
        return keep(State::RawText(hashes), rest, prefix + 1, out);
    }
    if rest.first() == Some(&b'\'')
        && let Some(len) = character(rest)
    {
        return blank(State::Code, rest, len, out);
    }
    keep(State::Code, rest, 1, out)
}

/// `r"`, `r#"`, `br##"` …: the number of hashes.
fn raw_text(rest: &[u8]) -> Option<usize> {
    let rest = rest.strip_prefix(b"b").or_else(|| rest.strip_prefix(b"c")).unwrap_or(rest);
    let rest = rest.strip_prefix(b"r")?;
    let hashes = rest.iter().take_while(|byte| **byte == b'#').count();
    (rest.get(hashes) == Some(&b'"')).then_some(hashes)
}

/// Length of a character literal; a lifetime is none.
fn character(rest: &[u8]) -> Option<usize> {
    if rest.get(1) == Some(&b'\\') {
        return rest.iter().skip(3).position(|byte| *byte == b'\'').map(|at| at + 4);
    }
    // One character of one to four bytes.
    (2..=5)
        .find(|at| rest.get(*at) == Some(&b'\''))
        .filter(|at| *at == 2 || rest.get(1).is_some_and(|byte| !byte.is_ascii()))
        .map(|at| at + 1)
}

fn keep(state: State, rest: &[u8], len: usize, out: &mut Vec<u8>) -> (State, usize) {
    out.extend(rest.iter().take(len));
    (state, len)
}

fn blank(state: State, rest: &[u8], len: usize, out: &mut Vec<u8>) -> (State, usize) {
    out.extend(rest.iter().take(len).map(|byte| if *byte == b'\n' { b'\n' } else { b' ' }));
    (state, len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        scan_one(&File { path: "relay/src/wire/mod.rs".into(), text: text.into() })
    }

    #[test]
    fn comments_and_strings_are_blanked_and_lines_kept() {
        let text = "let a = \"unsafe // {\"; // unsafe\n/* unsafe /* } */ unsafe\n*/ b('\"', b'{', '\\'', 'a', r#\"un\"safe\"#);\n";
        let masked = mask(text);
        assert!(!masked.contains("unsafe") && !masked.contains('{') && !masked.contains('}'), "{masked}");
        assert_eq!((masked.lines().count(), masked.len()), (3, text.len()));
        assert!(masked.contains("let a") && masked.contains("b("));
    }

    #[test]
    fn lifetimes_are_no_characters() {
        assert_eq!(mask("fn f<'a>(x: &'a str) -> &'a str { x }"), "fn f<'a>(x: &'a str) -> &'a str { x }");
    }

    #[test]
    fn test_items_are_no_product() {
        let text = "//! doc\nfn a() {}\n#[cfg(test)]\nuse x;\n\n#[cfg(test)]\nmod tests {\n    fn b() {\n    }\n}\nfn c() {}\n";
        let lines: Vec<usize> = source(text).product().map(|(at, _)| at).collect();
        assert_eq!(lines, [2, 11]);
    }

    #[test]
    fn a_test_module_in_a_file_of_its_own_is_test() {
        let file = |path: &str, text: &str| File { path: path.into(), text: text.into() };
        let files = [file("relay/src/ring/mod.rs", "mod a;\n#[cfg(test)]\nmod tests;\n"), file("relay/src/ring/tests.rs", "fn f() {}\n")];
        let sources = scan(&files);
        assert_eq!(sources.iter().map(|source| source.product().count()).collect::<Vec<_>>(), [1, 0]);
    }

    #[test]
    fn rooms() {
        let room = |path: &str| scan_one(&File { path: path.into(), text: String::new() }).room().map(str::to_owned);
        assert_eq!(room("relay/src/nic/afxdp/mod.rs").as_deref(), Some("nic"));
        assert_eq!(room("relay/src/lib.rs"), None);
        assert_eq!(room("xtask/src/main.rs"), None);
    }
}
