//! What a successor has to know besides descriptors: versions, options that must agree, ports, rules with their slots, workers,
//! counters of what is gone. Written by the supervisor at each change, kept by the keeper, read by a successor.
//!
//! The text of a sealed memfd. Must never be read beyond [`MAX_LEN`], nor be believed when its versions are not ours.

use super::book::KeptRule;
use super::fleet::{self, KeptWorker};
use super::options::Options;
use super::ports::KeptPort;
use crate::nic::afxdp::program::{Counted, Sums};
use crate::plan::manifest::LAYOUT_VERSION;
use crate::sys::memo;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

/// Counted up whenever a field below changes its meaning.
pub const VERSION: u32 = 2;
/// Longest text: rules are at most 8 MiB, their slots less.
const MAX_LEN: u64 = 64 << 20;

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Handover {
    /// [`VERSION`].
    pub version: u32,
    /// [`LAYOUT_VERSION`] of the segments.
    pub layout: u32,
    /// Version of the program.
    pub build: String,
    /// Options that a successor must share, by name.
    pub options: BTreeMap<String, String>,
    /// Ports by number.
    pub ports: Vec<KeptPort>,
    /// How often ports have been let go of.
    pub burials: u32,
    /// The set in force.
    pub rules: Vec<KeptRule>,
    /// Where the next rule slot and the next output slot are looked for.
    pub next_slots: [usize; 2],
    /// Workers by number.
    pub workers: Vec<KeptWorker>,
    /// What deleted rules have counted, by interface.
    pub retired: BTreeMap<String, [u64; 4]>,
    /// What programs before the present one have counted.
    pub sums: Sums,
    /// Whose numbers stand in the kernel path's counters.
    pub counted: Counted,
}

/// Why a successor can't go on with what is there.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// Another build's.
    #[error(
        "the running relay ({build}) hands over version {version} with layout {layout}, this program takes {VERSION} with {LAYOUT_VERSION}"
    )]
    Version {
        /// Its version.
        build: String,
        /// Of the hand-over.
        version: u32,
        /// Of the segments.
        layout: u32,
    },
    /// Too long, or not of this shape.
    #[error("what the running relay hands over can't be read: {0}")]
    Content(String),
}

/// What every version has.
#[derive(Deserialize)]
struct Versions {
    version: u32,
    layout: u32,
    build: String,
}

/// Options that decide what the memory and the sockets are, as text.
pub fn options(options: &Options) -> BTreeMap<String, String> {
    let lower = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
    [
        ("--frames", options.frames.to_string()),
        ("--workers", options.workers.to_string()),
        ("--pipeline", if fleet::splits(options) { "split" } else { "fused" }.into()),
        ("--backend", lower(&options.backend)),
        ("--xdp-mode", lower(&options.xdp_mode)),
        ("--zero-copy", lower(&options.zero_copy)),
        ("--partition", lower(&options.partition)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

impl Handover {
    /// The first option that is another one here: its name, and what it is there.
    pub fn disagreement(&self, ours: &Options) -> Option<(String, String)> {
        let ours = options(ours);
        self.options.iter().find(|(name, value)| ours.get(*name) != Some(value)).map(|(name, value)| (name.clone(), value.clone()))
    }

    /// As a sealed memfd.
    pub fn write(&self) -> io::Result<OwnedFd> {
        memo::write("relay-handover", &serde_json::to_vec(self)?)
    }

    /// From such a memfd.
    pub fn read(fd: OwnedFd) -> Result<Self, HandoverError> {
        Self::parse(&memo::read(fd, MAX_LEN).map_err(|error| HandoverError::Content(error.to_string()))?)
    }

    fn parse(text: &[u8]) -> Result<Self, HandoverError> {
        // Words of the text are in both messages, which are one line of the log.
        let failed = |error: serde_json::Error| HandoverError::Content(error.to_string().escape_debug().to_string());
        let Versions { version, layout, build } = serde_json::from_slice(text).map_err(failed)?;
        if version != VERSION || layout != LAYOUT_VERSION {
            return Err(HandoverError::Version { build: build.escape_debug().to_string(), version, layout });
        }
        serde_json::from_slice(text).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handover() -> Handover {
        Handover {
            version: VERSION,
            layout: LAYOUT_VERSION,
            build: "0.1.0".into(),
            options: BTreeMap::from([("--frames".into(), "64".into())]),
            ports: vec![],
            burials: 3,
            rules: vec![KeptRule { text: "a 239.1.1.1:5000 -> b".into(), slot: 3, serial: 7, outputs: vec![4] }],
            next_slots: [4, 5],
            workers: vec![KeptWorker {
                pid: 7,
                generation: 2,
                restarts: 1,
                last_exit: "killed by SIGKILL".into(),
                spare: 8,
                promotions: 1,
                spare_deaths: 0,
            }],
            retired: BTreeMap::from([("a".into(), [1, 2, 3, 4])]),
            sums: Sums { interfaces: vec![vec![[1, 64]]], drops: vec![([1, 2, 3, 4], [5, 6])], ..Sums::default() },
            counted: Counted { rules: BTreeMap::from([(3, 7)]), outputs: BTreeMap::from([(4, (3, 7))]) },
        }
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(Handover::read(handover().write().unwrap()).unwrap(), handover());
    }

    #[test]
    fn another_version_is_named_whatever_else_it_has() {
        let text = format!(r#"{{"version":{},"layout":{LAYOUT_VERSION},"build":"9.9","of_the_future":[]}}"#, VERSION + 1);
        let error = Handover::parse(text.as_bytes()).unwrap_err();
        assert!(matches!(error, HandoverError::Version { version, .. } if version == VERSION + 1), "{error}");
        assert!(error.to_string().contains("9.9"));
        let older = Handover { layout: LAYOUT_VERSION - 1, ..handover() };
        assert!(matches!(Handover::read(older.write().unwrap()), Err(HandoverError::Version { .. })));
    }

    #[test]
    fn hostile_texts_are_refused() {
        let ours = format!(r#"{{"version":{VERSION},"layout":{LAYOUT_VERSION},"build":""}}"#);
        for text in ["", "[]", "{}", "null", &ours, &"[".repeat(100_000)] {
            assert!(matches!(Handover::parse(text.as_bytes()), Err(HandoverError::Content(_))));
        }
        let no_text = std::fs::File::open("/proc/self").unwrap();
        assert!(matches!(Handover::read(no_text.into()), Err(HandoverError::Content(_))));
    }
}
