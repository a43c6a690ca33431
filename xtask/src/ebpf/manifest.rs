//! The record beside the committed objects: their hashes, the sources' hash, the toolchain that made them.
//!
//! Flat `key = "value"` lines. Must never hold a path or a date: it is compared.

use super::{RECIPES, Recipe, Toolchain};
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
};

/// Its name.
pub(crate) const FILE: &str = "objects.toml";
const HEADER: &str = "# Written by `cargo xtask build-ebpf`; `cargo xtask build-ebpf --check` compares. SHA-256 in hex.\n";
/// What the objects are made of, from the workspace root; besides the versions in the lock file.
const SOURCES: [&str; 2] = ["relay-ebpf", "relay-common"];

/// The record.
#[derive(Debug)]
pub(crate) struct Manifest(BTreeMap<String, String>);

impl Manifest {
    /// The record of freshly built objects.
    pub(crate) fn new(root: &Path, toolchain: &Toolchain, linker: String, objects: &Path) -> Result<Self> {
        let mut lines = BTreeMap::from([
            ("rustc".to_owned(), toolchain.version.clone()),
            ("llvm".to_owned(), toolchain.llvm.clone()),
            ("linker".to_owned(), linker),
            ("sources".to_owned(), sources(root)?),
        ]);
        for recipe in &RECIPES {
            lines.insert(recipe.file.to_owned(), hash_file(&objects.join(recipe.file))?);
        }
        Ok(Self(lines))
    }

    /// Reads the record in `folder`.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let text = fs::read_to_string(folder.join(FILE)).with_context(|| format!("reading {FILE}"))?;
        let pairs = text.lines().filter_map(|line| line.split_once(" = "));
        Ok(Self(pairs.map(|(key, value)| (key.trim_matches('"').to_owned(), value.trim_matches('"').to_owned())).collect()))
    }

    /// Writes the record into `folder`.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::write(folder.join(FILE), format!("{HEADER}{self}")).with_context(|| format!("writing {FILE}"))
    }

    /// The committed objects are the recorded ones, and were built from the sources as they are now.
    pub(crate) fn verify(&self, root: &Path, folder: &Path) -> Result<()> {
        for recipe in &RECIPES {
            if hash_file(&folder.join(recipe.file))? != self.get(recipe.file) {
                bail!("{} is not the object recorded in {FILE}: run cargo xtask build-ebpf", recipe.file);
            }
        }
        if sources(root)? != self.get("sources") {
            bail!("relay-ebpf, relay-common or their locked versions changed since the objects were built: run cargo xtask build-ebpf");
        }
        Ok(())
    }

    /// Whether both were made by the same compiler and linker, so that their bytes must be equal.
    pub(crate) fn same_toolchain(&self, other: &Self) -> bool {
        self.toolchain() == other.toolchain()
    }

    /// Compiler, LLVM and linker in one line.
    pub(crate) fn toolchain(&self) -> String {
        format!("{}, LLVM {}, {}", self.get("rustc"), self.get("llvm"), self.get("linker"))
    }

    /// Fails naming the first object whose bytes differ.
    pub(crate) fn same_objects(&self, fresh: &Self) -> Result<()> {
        for Recipe { file, .. } in &RECIPES {
            if self.get(file) != fresh.get(file) {
                bail!("{file}: committed {}, built now {}", self.get(file), fresh.get(file));
            }
        }
        Ok(())
    }

    /// Whether this compiler made the recorded objects.
    pub(crate) fn names(&self, toolchain: &Toolchain) -> bool {
        self.get("rustc") == toolchain.version && self.get("llvm") == toolchain.llvm
    }

    fn get(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }
}

impl fmt::Display for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(key, value)| writeln!(f, "\"{key}\" = \"{value}\""))
    }
}

fn hash_file(path: &Path) -> Result<String> {
    Ok(hex(&Sha256::digest(fs::read(path).with_context(|| format!("reading {}", path.display()))?)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One hash over every source file (path, length, bytes) and the locked BPF crates.
fn sources(root: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    for folder in SOURCES {
        let mut files = files(&root.join(folder))?;
        files.sort();
        for path in files {
            let bytes = fs::read(&path)?;
            hash.update(format!("{}\0{}\0", path.strip_prefix(root)?.display(), bytes.len()));
            hash.update(bytes);
        }
    }
    hash.update(locked(&fs::read_to_string(root.join("Cargo.lock"))?));
    Ok(hex(&hash.finalize()))
}

/// The lock file's entries of the crates that become BPF code.
fn locked(lock: &str) -> String {
    let is_bpf =
        |entry: &&str| ["name = \"aya-ebpf", "name = \"aya-log-ebpf", "name = \"aya-log-common"].iter().any(|name| entry.contains(name));
    lock.split("[[package]]").filter(is_bpf).collect()
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() { found.extend(files(&path)?) } else { found.push(path) }
    }
    Ok(found)
}
