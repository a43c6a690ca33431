//! Finds a compiler with the sources of its own library, and the LLVM of the same major version.
//!
//! A rustup toolchain with `rust-src`, or the distribution's `rustc-web` + `rust-web-src` (Debian); a compiler that
//! isn't nightly is told to act like one. The one that made the committed objects comes first.

use super::{linker::LLVM_MAJORS, manifest::Manifest};
use anyhow::{Result, bail};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

const PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-src", "llvm-22-dev"];

/// A compiler that can build for BPF.
pub(crate) struct Toolchain {
    rustc: PathBuf,
    sysroot: PathBuf,
    /// First line of `rustc -vV`.
    pub(crate) version: String,
    /// Version of the LLVM in the compiler.
    pub(crate) llvm: String,
    /// Where an LLVM of that major version stands.
    pub(crate) llvm_prefix: PathBuf,
}

/// The best toolchain on this machine; with `install`, after installing what Debian has.
pub(crate) fn find(recorded: Option<&Manifest>, install: bool) -> Result<Toolchain> {
    let mut lacks = Vec::new();
    if let Some(found) = best(recorded, &mut lacks) {
        return Ok(found);
    }
    if install {
        println!("installing {}", PACKAGES.join(" "));
        crate::packages::apt_install(&PACKAGES.map(String::from))?;
        lacks.clear();
        if let Some(found) = best(recorded, &mut lacks) {
            return Ok(found);
        }
    }
    let seen = if lacks.is_empty() { String::new() } else { format!(" (seen: {})", lacks.join("; ")) };
    bail!(
        "no compiler for BPF found{seen}: install `rustup toolchain install nightly --component rust-src` and LLVM of its major version \
         (llvm-22-dev or newer), or on Debian run `apt-get install {}` (`cargo xtask build-ebpf --install` does that as root)",
        PACKAGES.join(" ")
    )
}

/// The recorded one, else nightly, else whatever there is.
fn best(recorded: Option<&Manifest>, lacks: &mut Vec<String>) -> Option<Toolchain> {
    let usable = compilers().into_iter().filter_map(|rustc| probe(rustc).map_err(|lack| lacks.push(lack)).ok());
    let rank = |found: &Toolchain| (recorded.is_none_or(|manifest| manifest.names(found)), found.version.contains("nightly"));
    usable.max_by_key(rank)
}

/// Compilers of rustup (by path, since its proxies show one at a time) and of the distribution.
fn compilers() -> Vec<PathBuf> {
    let rustup = env::var_os("RUSTUP_HOME").map_or_else(|| home().join(".rustup"), PathBuf::from).join("toolchains");
    let toolchains = fs::read_dir(rustup).into_iter().flatten().flatten().map(|entry| entry.path().join("bin/rustc"));
    let mut found: Vec<_> =
        toolchains.chain(["/usr/bin/rustc", "/usr/local/bin/rustc"].map(PathBuf::from)).filter(|path| path.exists()).collect();
    found.sort();
    found
}

/// What the compiler says of itself, or what it lacks.
fn probe(rustc: PathBuf) -> Result<Toolchain, String> {
    let lack = |what: &str| format!("{} {what}", rustc.display());
    let text = output(&rustc, &["-vV"]).ok_or_else(|| lack("does not run"))?;
    let sysroot = PathBuf::from(output(&rustc, &["--print", "sysroot"]).unwrap_or_default().trim());
    if !sysroot.join("lib/rustlib/src/rust/library/core").exists() {
        return Err(lack("has no library sources (rust-src)"));
    }
    let llvm = text.lines().find_map(|line| line.strip_prefix("LLVM version: ")).unwrap_or_default().to_owned();
    let major = major(&llvm);
    if !LLVM_MAJORS.contains(&major) {
        return Err(lack(&format!("has LLVM {llvm}, which bpf-linker does not know")));
    }
    let llvm_prefix = llvm_prefix(major).ok_or_else(|| lack(&format!("needs LLVM {major} with headers (llvm-{major}-dev)")))?;
    let version = text.lines().next().unwrap_or_default().to_owned();
    Ok(Toolchain { rustc, sysroot, version, llvm, llvm_prefix })
}

/// From `LLVM_PREFIX`, the distribution's folder, or an `llvm-config` of that version.
fn llvm_prefix(major: u32) -> Option<PathBuf> {
    let asked = [format!("llvm-config-{major}"), "llvm-config".to_owned()];
    let asked = asked.iter().filter_map(|config| output(Path::new(config), &["--prefix"])).map(|prefix| PathBuf::from(prefix.trim()));
    let known = [env::var_os("LLVM_PREFIX").map(PathBuf::from), Some(PathBuf::from(format!("/usr/lib/llvm-{major}")))];
    known.into_iter().flatten().chain(asked).find(|prefix| is_llvm(prefix, major))
}

fn is_llvm(prefix: &Path, wanted: u32) -> bool {
    let version = output(&prefix.join("bin/llvm-config"), &["--version"]);
    version.is_some_and(|version| major(&version) == wanted)
        && prefix.join("bin/llvm-strip").exists()
        && prefix.join("include/llvm-c").exists()
}

fn major(version: &str) -> u32 {
    version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0)
}

fn output(program: &Path, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn home() -> PathBuf {
    env::var_os("HOME").map(PathBuf::from).unwrap_or_default()
}

/// Where cargo keeps the sources of other crates.
pub(crate) fn cargo_home() -> PathBuf {
    env::var_os("CARGO_HOME").map_or_else(|| home().join(".cargo"), PathBuf::from)
}

impl Toolchain {
    /// This compiler's cargo, with none of the environment that `cargo xtask` itself was started in.
    pub(crate) fn cargo(&self) -> Command {
        let beside = self.rustc.with_file_name("cargo");
        let mut command = Command::new(if beside.exists() { beside } else { PathBuf::from("cargo") });
        for name in [
            "RUSTFLAGS",
            "RUSTDOCFLAGS",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "RUSTUP_TOOLCHAIN",
            "CARGO_BUILD_TARGET",
            "CARGO_TARGET_DIR",
        ] {
            command.env_remove(name);
        }
        command.env("RUSTC", &self.rustc).env("RUSTC_BOOTSTRAP", "1");
        command
    }

    /// Major version of the compiler's LLVM.
    pub(crate) fn llvm_major(&self) -> u32 {
        major(&self.llvm)
    }

    /// The names under which the library's sources can appear: in the sysroot, and where a link there leads.
    pub(crate) fn source_roots(&self) -> Vec<PathBuf> {
        let source = self.sysroot.join("lib/rustlib/src/rust");
        let real = source.canonicalize().unwrap_or_else(|_| source.clone());
        vec![source, real]
    }
}
