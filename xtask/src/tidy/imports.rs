//! The table of rooms: who may import whom, and which words the data path may not use.
//!
//! Product code only; tests may reach further. The table is the one of ARCHITECTURE.md.

use super::{Finding, error};
use crate::source::Source;
use crate::stats::words;

/// A room of `relay/src` and the rooms it may name, in reading order.
const ROOMS: [(&str, &[&str]); 18] = [
    ("wire", &[]),
    ("rule", &["wire"]),
    ("config", &["rule", "wire"]),
    ("ring", &[]),
    ("sys", &["ring"]),
    ("frame", &["sys"]),
    ("shm", &["sys", "ring"]),
    ("nic", &["wire", "frame", "ring", "sys"]),
    ("plan", &["wire", "rule", "frame", "ring", "shm", "nic", "sys"]),
    ("datapath", &["wire", "rule", "frame", "ring", "nic", "plan", "sys"]),
    ("control", &["rule", "shm", "plan", "sys"]),
    ("worker", &["wire", "rule", "frame", "ring", "shm", "nic", "plan", "datapath", "control", "sys"]),
    ("keeper", &["shm", "sys"]),
    ("supervisor", &["wire", "rule", "config", "frame", "ring", "shm", "nic", "plan", "control", "worker", "keeper", "sys"]),
    ("lab", &["wire", "rule", "frame", "ring", "shm", "nic", "plan", "datapath", "control", "worker", "sys"]),
    ("doctor", &["wire", "rule", "frame", "nic", "plan", "control", "supervisor", "sys"]),
    ("metrics", &["control", "supervisor"]),
    ("cli", &["wire", "rule", "config", "shm", "nic", "plan", "control", "worker", "supervisor", "lab", "doctor", "metrics", "sys"]),
];

/// Text that must not stand in a room's product code, and why.
const FORBIDDEN: [(&str, &str, &str); 13] = [
    ("datapath", "nic::afxdp", "the data path knows the port contract, not who implements it"),
    ("datapath", "nic::afpacket", "the data path knows the port contract, not who implements it"),
    ("datapath", "std::fs", "packet logic makes no system call"),
    ("datapath", "std::io", "packet logic makes no system call"),
    ("datapath", "libc::", "packet logic makes no system call"),
    ("datapath", "Mutex", "packet logic takes no lock"),
    ("datapath", "RwLock", "packet logic takes no lock"),
    ("datapath", "tracing::", "packet logic logs nothing: count it"),
    ("datapath", "println!", "packet logic logs nothing: count it"),
    ("wire", "unsafe", "wire is pure"),
    ("rule", "libc::", "rules are pure"),
    ("rule", "std::fs", "rules are pure"),
    ("ring", "Mutex", "the ring is lock-free"),
];

pub(super) fn check(source: &Source) -> Vec<Finding> {
    let Some(room) = source.room() else { return Vec::new() };
    let Some((_, allowed)) = ROOMS.iter().find(|(name, _)| *name == room) else {
        return vec![error(&source.path, 1, format!("room `{room}` is not in the table of xtask/src/tidy/imports.rs"))];
    };
    let mut findings = Vec::new();
    for (line, named) in named_rooms(source) {
        if named != room && is_room(&named) && !allowed.contains(&named.as_str()) {
            findings.push(error(&source.path, line, format!("`{room}` must not know `{named}`; it may use: {}", list(allowed))));
        }
    }
    for (line, text) in source.product() {
        for (_, word, why) in FORBIDDEN.iter().filter(|(of, word, _)| *of == room && text.contains(word)) {
            findings.push(error(&source.path, line, format!("`{word}` in `{room}`: {why}")));
        }
    }
    findings
}

fn list(rooms: &[&str]) -> String {
    if rooms.is_empty() { "nothing".to_owned() } else { rooms.join(", ") }
}

fn is_room(name: &str) -> bool {
    ROOMS.iter().any(|(room, _)| *room == name)
}

/// Rooms named by `crate::room`, `crate::{room, …}` and by enough `super::` to leave the room.
fn named_rooms(source: &Source) -> Vec<(usize, String)> {
    // One text, so that a list in braces may span lines.
    let text: String = source.code.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
    let climb = "super::".repeat(depth(&source.path));
    let mut found = Vec::new();
    for root in ["crate::", climb.as_str()] {
        for (at, _) in text.match_indices(root) {
            let line = text.get(..at).unwrap_or_default().matches('\n').count();
            let inside_word = text.get(..at).is_some_and(|before| before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':'));
            if inside_word || source.test.get(line).copied().unwrap_or(false) {
                continue;
            }
            let rest = text.get(at + root.len()..).unwrap_or_default();
            found.extend(first_names(rest).into_iter().map(|name| (line + 1, name)));
        }
    }
    found
}

/// Modules between the crate's root and this file, itself included.
fn depth(path: &str) -> usize {
    let inside = path.strip_prefix("relay/src/").unwrap_or(path);
    inside.split('/').filter(|part| *part != "mod.rs").count()
}

/// `frame::Pool` → frame; `{frame::{Frame, Pool}, nic}` → frame, nic.
fn first_names(rest: &str) -> Vec<String> {
    let Some(inside) = rest.strip_prefix('{') else {
        return words(rest).next().filter(|word| rest.starts_with(word)).map(str::to_owned).into_iter().collect();
    };
    let (mut level, mut names, mut item) = (0, Vec::new(), String::new());
    for c in inside.chars() {
        match c {
            '{' => level += 1,
            '}' if level == 0 => break,
            '}' => level -= 1,
            ',' if level == 0 => names.push(std::mem::take(&mut item)),
            _ if level == 0 => item.push(c),
            _ => {}
        }
    }
    names.push(item);
    names.iter().filter_map(|item| words(item).next()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::scan_one;
    use crate::workspace::File;

    fn findings(path: &str, text: &str) -> Vec<String> {
        check(&scan_one(&File { path: path.into(), text: text.into() })).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_data_path_that_imports_the_supervisor_is_found() {
        let found = findings("relay/src/datapath/ingress.rs", "//! x\n\nuse crate::supervisor::Options;\n");
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("relay/src/datapath/ingress.rs:3: error: `datapath` must not know `supervisor`"), "{found:?}");
    }

    #[test]
    fn lists_full_paths_and_climbing_are_seen() {
        let list = "use crate::{\n    frame::{Frame, Pool},\n    control::Message,\n};\n";
        assert_eq!(findings("relay/src/datapath/egress.rs", list).len(), 1);
        assert_eq!(findings("relay/src/frame/pool.rs", "fn f() { crate::nic::x() }\n").len(), 1);
        assert_eq!(findings("relay/src/nic/afxdp/rings.rs", "use super::super::super::rule::Rule;\n").len(), 1);
        assert_eq!(findings("relay/src/nic/afxdp/mod.rs", "use super::super::rule::Rule;\n").len(), 1);
        assert_eq!(findings("relay/src/nic/afxdp/rings.rs", "use super::super::Packet;\n").len(), 0);
    }

    #[test]
    fn comments_strings_and_tests_may_name_anything() {
        let text = "// use crate::cli\nconst X: &str = \"crate::cli\";\n#[cfg(test)]\nmod tests {\n    use crate::cli::X;\n}\n";
        assert!(findings("relay/src/wire/mod.rs", text).is_empty());
    }

    #[test]
    fn what_the_table_allows_is_allowed() {
        assert!(
            findings("relay/src/datapath/ingress.rs", "use crate::{frame, nic::Packet};\nuse crate::datapath::fate::Fate;\n").is_empty()
        );
    }

    #[test]
    fn locks_and_logs_in_the_data_path_are_found() {
        assert_eq!(findings("relay/src/datapath/turn.rs", "use std::sync::Mutex;\ntracing::info!(\"x\");\n").len(), 2);
        assert_eq!(findings("relay/src/datapath/turn.rs", "use crate::nic::afxdp::Rings;\n").len(), 1);
    }

    #[test]
    fn the_table_is_the_one_of_the_architecture() {
        let document = include_str!("../../../ARCHITECTURE.md");
        for (room, allowed) in ROOMS {
            let row = document.lines().find(|line| line.starts_with(&format!("| `{room}/` |"))).unwrap_or_default();
            assert!(row.ends_with(&format!("| {} |", list(allowed))), "row of `{room}`: {row}");
        }
    }

    #[test]
    fn a_new_room_must_enter_the_table() {
        assert_eq!(findings("relay/src/attic/mod.rs", "").len(), 1);
    }
}
