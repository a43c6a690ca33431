//! The linker: bpf-linker, of the same LLVM as the compiler, installed under `target/` when it is missing.
//!
//! A bpf-linker of another LLVM crashes or miscompiles, and its version can't be asked for its LLVM, so one from
//! elsewhere is never picked up; `BPF_LINKER` names one deliberately.

use super::{run_command, toolchain::Toolchain};
use anyhow::{Context, Result, bail};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// The version the objects are made with.
pub(crate) const VERSION: &str = "0.13.0";
/// LLVM majors that version can be built for.
pub(crate) const LLVM_MAJORS: std::ops::RangeInclusive<u32> = 21..=23;

/// The linker for this toolchain; built now if it isn't there yet (half a minute).
pub(crate) fn ensure(target: &Path, toolchain: &Toolchain) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("BPF_LINKER") {
        return Ok(path.into());
    }
    let folder = target.join(format!("bpf-linker-{VERSION}-llvm{}", toolchain.llvm_major()));
    let linker = folder.join("bin/bpf-linker");
    if !linker.exists() {
        println!("installing bpf-linker {VERSION} into {}", folder.display());
        install(&folder, toolchain)?;
    }
    if !linker.exists() {
        bail!("cargo install left no {}", linker.display());
    }
    Ok(linker)
}

/// Name and version, as the linker says.
pub(crate) fn version(linker: &Path) -> Result<String> {
    let output = Command::new(linker).arg("--version").output().with_context(|| format!("starting {}", linker.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn install(folder: &Path, toolchain: &Toolchain) -> Result<()> {
    let mut command = toolchain.cargo();
    command
        .args(["install", "bpf-linker", "--quiet", "--locked", "--version", VERSION, "--no-default-features", "--features"])
        .arg(format!("llvm-{}", toolchain.llvm_major()))
        .arg("--root")
        .arg(folder)
        .arg("--target-dir")
        .arg(folder.join("build"))
        .env("LLVM_PREFIX", &toolchain.llvm_prefix);
    run_command(&mut command).context("building bpf-linker; it needs a C++ compiler and the LLVM named above with its headers")?;
    std::fs::remove_dir_all(folder.join("build")).or(Ok(()))
}
