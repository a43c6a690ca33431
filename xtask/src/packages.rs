//! What the build, the demo and the tests need besides Rust, and how to get it.
//!
//! Looks first, installs only what is missing, and only as root on a Debian system; elsewhere it prints the one line to run.
//! Must never install quietly.

use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::{Command, Stdio};

/// How to see that something is there.
#[derive(Clone, Copy)]
enum Probe {
    /// A command on PATH.
    Program(&'static str),
    /// A header in one of the usual places.
    Header(&'static str),
    /// libclang, wherever the distribution put it.
    LibClang,
    /// scapy, for the distribution's Python.
    Scapy,
}

/// Something needed, and its package in Debian, Fedora and Arch.
struct Need {
    probe: Probe,
    why: &'static str,
    packages: [&'static str; 3],
}

/// The C parts come from libbpf-sys and libxdp-sys (their build scripts call cc, make, pkg-config, ar, ld, objcopy, m4 and
/// `clang -target bpf`, and bindgen loads libclang); `ip` and `ethtool` build the namespaces of the demo and the tests.
const NEEDS: [Need; 10] = [
    Need { probe: Probe::Program("cc"), why: "C compiler", packages: ["gcc", "gcc", "gcc"] },
    Need { probe: Probe::Header("stdio.h"), why: "C headers", packages: ["libc6-dev", "glibc-devel", "glibc"] },
    Need { probe: Probe::Program("make"), why: "builds libbpf", packages: ["make", "make", "make"] },
    Need { probe: Probe::Program("pkg-config"), why: "builds libbpf", packages: ["pkg-config", "pkgconf-pkg-config", "pkgconf"] },
    Need { probe: Probe::Program("m4"), why: "builds libxdp", packages: ["m4", "m4", "m4"] },
    Need { probe: Probe::Program("clang"), why: "builds libxdp's BPF parts", packages: ["clang", "clang", "clang"] },
    Need { probe: Probe::LibClang, why: "generates bindings", packages: ["libclang-dev", "clang-libs", "clang"] },
    Need { probe: Probe::Header("libelf.h"), why: "libbpf", packages: ["libelf-dev", "elfutils-libelf-devel", "libelf"] },
    Need { probe: Probe::Header("zlib.h"), why: "libbpf", packages: ["zlib1g-dev", "zlib-devel", "zlib"] },
    Need { probe: Probe::Program("ip"), why: "makes the test networks", packages: ["iproute2", "iproute", "iproute2"] },
];

/// Optional: without it a few tests are skipped and say so.
const ETHTOOL: Need =
    Need { probe: Probe::Program("ethtool"), why: "switches offloads in tests", packages: ["ethtool", "ethtool", "ethtool"] };

/// Optional likewise: scapy builds the rewrite corpus a second time.
const SCAPY: Need = Need { probe: Probe::Scapy, why: "checks the golden packets", packages: ["python3-scapy", "python3-scapy", "scapy"] };

/// A package manager: its command, the words that install, and its column in [`Need::packages`].
struct Manager {
    program: &'static str,
    install: &'static [&'static str],
    column: usize,
}

const MANAGERS: [Manager; 3] = [
    Manager { program: "apt-get", install: &["install", "--yes", "--no-install-recommends"], column: 0 },
    Manager { program: "dnf", install: &["install", "--assumeyes"], column: 1 },
    Manager { program: "pacman", install: &["-S", "--needed", "--noconfirm"], column: 2 },
];

/// Makes everything that is needed present, or fails with the line to run.
pub(crate) fn install_missing() -> Result<()> {
    let missing: Vec<&Need> = NEEDS.iter().chain([&ETHTOOL, &SCAPY]).filter(|need| !present(need.probe)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let Some(manager) = MANAGERS.iter().find(|manager| on_path(manager.program)) else {
        bail!("missing: {}. Install them (Debian's names) with your package manager", names(&missing, 0).join(" "));
    };
    let packages = names(&missing, manager.column);
    if manager.program != "apt-get" || !is_root() {
        bail!("missing packages; run as root: {}", line(manager, &packages));
    }
    for need in &missing {
        eprintln!("xtask: installing {} ({})", need.packages[0], need.why);
    }
    apt_install(&packages)
}

/// Installs packages of Debian, as root.
pub(crate) fn apt_install(packages: &[String]) -> Result<()> {
    let [debian, ..] = &MANAGERS;
    if !on_path(debian.program) || !is_root() {
        bail!("needs apt-get and root: {}", line(debian, packages));
    }
    apt(&["update", "--quiet=2"])?;
    apt(&[debian.install, &packages.iter().map(String::as_str).collect::<Vec<_>>()].concat())
}

/// Package names without repetition, in order.
fn names(needs: &[&Need], column: usize) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for need in needs {
        let name = need.packages.get(column).copied().unwrap_or(need.packages[0]).to_owned();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn line(manager: &Manager, packages: &[String]) -> String {
    format!("{} {} {}", manager.program, manager.install.join(" "), packages.join(" "))
}

/// Runs apt-get, which asks nothing and prints nothing but errors.
pub(crate) fn apt(args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.status().context("start apt-get")?;
    if !status.success() {
        bail!("apt-get {} failed: {status}", args.join(" "));
    }
    Ok(())
}

fn present(probe: Probe) -> bool {
    match probe {
        Probe::Program(name) => on_path(name),
        Probe::Header(name) => include_directories().iter().any(|directory| Path::new(directory).join(name).exists()),
        Probe::LibClang => {
            std::env::var_os("LIBCLANG_PATH").is_some() || library_directories().iter().any(|directory| has_libclang(directory))
        }
        Probe::Scapy => has_scapy(),
    }
}

fn include_directories() -> [String; 3] {
    let triple = format!("/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    ["/usr/include".into(), "/usr/local/include".into(), triple]
}

/// Where clang-sys looks: the system's library directories and those of each LLVM.
fn library_directories() -> Vec<String> {
    let mut directories: Vec<String> = ["/usr/lib", "/usr/lib64", "/usr/local/lib"].map(String::from).to_vec();
    directories.push(format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH));
    for entry in std::fs::read_dir("/usr/lib").into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("llvm") {
            directories.push(entry.path().join("lib").to_string_lossy().into_owned());
        }
    }
    directories
}

/// For the Python that the tests ask first.
fn has_scapy() -> bool {
    let mut command = Command::new("/usr/bin/python3");
    let status = command.args(["-c", "import scapy"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// `libclang.so`, `libclang.so.N` or `libclang-N.so`.
fn has_libclang(directory: &str) -> bool {
    let is_libclang =
        |name: &str| name.starts_with("libclang.so") || (name.starts_with("libclang-") && name.contains(".so") && !name.contains("cpp"));
    std::fs::read_dir(directory).into_iter().flatten().flatten().any(|entry| is_libclang(&entry.file_name().to_string_lossy()))
}

/// Whether a program is there for root.
pub(crate) fn on_path(program: &str) -> bool {
    // Debian's root has these on PATH, its users often not.
    let also = ["/usr/sbin", "/sbin"].map(std::path::PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(also).any(|directory| directory.join(program).is_file())
}

/// The owner of our own /proc entry is the effective user.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_headers_are_found_or_not() {
        assert!(on_path("sh") && !on_path("no-such-program-4711"));
        assert!(!present(Probe::Header("no-such-header-4711.h")));
    }

    #[test]
    fn the_line_to_run_names_each_package_once() {
        let all: Vec<&Need> = NEEDS.iter().collect();
        let arch = line(&MANAGERS[2], &names(&all, 2));
        assert_eq!(arch, "pacman -S --needed --noconfirm gcc glibc make pkgconf m4 clang libelf zlib iproute2");
        assert!(line(&MANAGERS[0], &names(&all, 0)).starts_with("apt-get install --yes --no-install-recommends gcc libc6-dev make"));
    }
}
