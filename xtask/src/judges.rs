//! Other people's tools that judge what we write: Wireshark's reader of captures, the kernel's own account of BPF objects,
//! Prometheus's reader of metrics. Tests that want one say SKIPPED without it.
//!
//! Installed on Debian, as root. Must never fail a run: what can't be had is said and left out.

use crate::packages::{apt, is_root, on_path};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::{Command, Stdio};

/// A program, and how to get it.
struct Judge {
    program: &'static str,
    package: &'static str,
    /// Only this file of the package, without its services and what they depend on; else the package as it is.
    alone: Option<&'static str>,
}

const JUDGES: [Judge; 3] = [
    Judge { program: "tshark", package: "tshark", alone: None },
    Judge { program: "bpftool", package: "bpftool", alone: None },
    Judge { program: "promtool", package: "prometheus", alone: Some("usr/bin/promtool") },
];

/// Where a program without its package goes.
const PLACE: &str = "/usr/local/bin";
/// A package source that does not answer is left alone soon.
const SOON: [&str; 4] = ["-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1"];

/// Gets what is missing and can be had.
pub(crate) fn install() {
    let missing: Vec<&Judge> = JUDGES.iter().filter(|judge| !on_path(judge.program)).collect();
    if missing.is_empty() {
        return;
    }
    let ready = if is_root() && on_path("apt-get") { update() } else { Err(anyhow::anyhow!("needs apt-get and root")) };
    if let Err(error) = ready {
        eprintln!("xtask: not installed, so a few tests will be skipped: {}: {error:#}", names(&missing));
        return;
    }
    for judge in missing {
        eprintln!("xtask: installing {} (judges in tests)", judge.program);
        if let Err(error) = get(judge) {
            eprintln!("xtask: not installed, so a few tests will be skipped: {}: {error:#}", judge.program);
        }
    }
}

fn names(judges: &[&Judge]) -> String {
    judges.iter().map(|judge| judge.program).collect::<Vec<_>>().join(", ")
}

fn update() -> Result<()> {
    apt(&[&SOON[..], &["update", "--quiet=2"]].concat())
}

fn get(judge: &Judge) -> Result<()> {
    match judge.alone {
        None => apt(&[&SOON[..], &["install", "--yes", "--no-install-recommends", judge.package]].concat()),
        Some(file) => unpack(judge, file),
    }
}

/// Fetches a package, takes one program out of it and leaves the rest.
fn unpack(judge: &Judge, file: &str) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("relay-xtask-{}", std::process::id()));
    std::fs::create_dir_all(&folder).context("temporary directory")?;
    let done = unpack_in(&folder, judge, file);
    // Half a download is of no use to anybody, and what is left of it is in the system's temporary directory.
    let _ = std::fs::remove_dir_all(&folder);
    done
}

fn unpack_in(folder: &Path, judge: &Judge, file: &str) -> Result<()> {
    run(Command::new("apt-get").args(SOON).args(["download", judge.package]).current_dir(folder))?;
    let package = std::fs::read_dir(folder)?.flatten().map(|entry| entry.path()).find(|path| path.extension().is_some_and(|e| e == "deb"));
    let package = package.with_context(|| format!("apt-get downloaded no package {}", judge.package))?;
    run(Command::new("dpkg-deb").arg("-x").arg(package).arg(folder))?;
    let place = Path::new(PLACE).join(judge.program);
    std::fs::copy(folder.join(file), &place).with_context(|| format!("copying to {}", place.display()))?;
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let status = status.with_context(|| format!("starting {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{} failed: {status}", command.get_program().display());
    }
    Ok(())
}
