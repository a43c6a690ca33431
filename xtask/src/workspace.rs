//! Where the workspace is, which files are in it, and how to call its cargo.
//!
//! Must never write a file.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The workspace's root directory: of the checkout cargo runs us for, which need not be the one that built us.
pub(crate) fn root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.parent().map_or_else(|| here.clone(), Path::to_path_buf)
}

/// The cargo that runs us, in the workspace's root.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// A file of the workspace.
#[derive(Clone, Debug)]
pub(crate) struct File {
    /// Path from the root, with slashes.
    pub(crate) path: String,
    /// Content.
    pub(crate) text: String,
}

/// All text files, sorted by path; build output, the repository's own data and Cargo.lock left out.
pub(crate) fn files() -> Result<Vec<File>> {
    let root = root();
    let mut paths = Vec::new();
    walk(&root, &mut paths)?;
    paths.sort();
    let mut files = Vec::new();
    for path in paths {
        let name = path.strip_prefix(&root).unwrap_or(&path).to_string_lossy().into_owned();
        if let Ok(text) = std::fs::read_to_string(&path) {
            files.push(File { path: name, text });
        }
    }
    Ok(files)
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))? {
        let entry = entry?;
        let (name, kind) = (entry.file_name().to_string_lossy().into_owned(), entry.file_type()?);
        if kind.is_dir() && name != ".git" && !name.starts_with("target") {
            walk(&entry.path(), found)?;
        } else if kind.is_file() && name != "Cargo.lock" && name != ".git" {
            found.push(entry.path());
        }
    }
    Ok(())
}
