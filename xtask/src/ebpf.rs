//! `cargo xtask build-ebpf`: from `relay-ebpf` to the committed objects that `cargo build` embeds, and the proof that
//! they belong together.
//!
//! Every object is one deterministic function of (sources, lock file, toolchain): paths are remapped, one codegen unit,
//! debug information stripped to BTF. Must never be needed to build the relay itself.

mod linker;
mod manifest;
mod object;
mod toolchain;

use anyhow::{Context, Result, bail};
use manifest::Manifest;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use toolchain::Toolchain;

/// Options of `build-ebpf`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Rebuild and compare with the committed objects, byte for byte where the toolchain is the recorded one
    #[arg(long)]
    check: bool,
    /// Install missing packages with apt-get (Debian, as root)
    #[arg(long)]
    install: bool,
}

/// Where the committed objects stand, from the workspace root.
const OBJECTS: &str = "relay/src/nic/afxdp/object";
const TARGET: &str = "bpfel-unknown-none";

/// One committed object: its file, the binary it is made of, its features.
struct Recipe {
    file: &'static str,
    binary: &'static str,
    features: &'static str,
}

const RECIPES: [Recipe; 3] = [
    Recipe { file: "relay.bpf.o", binary: "relay-xdp", features: "" },
    Recipe { file: "relay-log.bpf.o", binary: "relay-xdp", features: "log" },
    Recipe { file: "lab.bpf.o", binary: "lab-xdp", features: "" },
];

/// Builds the objects and writes them, or checks the committed ones.
pub(crate) fn run(args: &Args) -> Result<()> {
    let root = root()?;
    let recorded = Manifest::read(&root.join(OBJECTS)).ok();
    if args.check {
        let recorded = recorded.as_ref().with_context(|| format!("{OBJECTS}/{} is missing: run cargo xtask build-ebpf", manifest::FILE))?;
        recorded.verify(&root, &root.join(OBJECTS))?;
    }
    let toolchain = toolchain::find(recorded.as_ref(), args.install)?;
    println!("toolchain: {}, LLVM {}", toolchain.version, toolchain.llvm);
    let target = target_dir(&root).join("bpf");
    let linker = linker::ensure(&target, &toolchain)?;
    let fresh = build_all(&root, &target, &toolchain, &linker)?;
    let manifest = Manifest::new(&root, &toolchain, linker::version(&linker)?, &fresh)?;
    match recorded {
        Some(recorded) if args.check => compare(&root, &recorded, &manifest, &fresh),
        _ => install(&root, &manifest, &fresh),
    }
}

fn root() -> Result<PathBuf> {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    Ok(manifest.parent().context("xtask stands in the workspace root")?.canonicalize()?)
}

/// `CARGO_TARGET_DIR`, or `target`.
fn target_dir(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir))
}

/// Builds every recipe into `target/bpf/objects` and returns that folder.
fn build_all(root: &Path, target: &Path, toolchain: &Toolchain, linker: &Path) -> Result<PathBuf> {
    let out = target.join("objects");
    fs::create_dir_all(&out)?;
    for recipe in &RECIPES {
        build(root, target, toolchain, linker, recipe)?;
        let built = target.join(TARGET).join("release").join(recipe.binary);
        strip(toolchain, &built, &out.join(recipe.file))?;
    }
    Ok(out)
}

fn build(root: &Path, target: &Path, toolchain: &Toolchain, linker: &Path, recipe: &Recipe) -> Result<()> {
    let mut command = toolchain.cargo();
    command
        .args(["build", "--quiet", "--locked", "--release", "--package", "relay-ebpf", "-Zbuild-std=core", "--target", TARGET])
        .args(["--bin", recipe.binary, "--features", recipe.features])
        .arg("--target-dir")
        .arg(target)
        .current_dir(root)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(root, target, toolchain, linker).join("\x1f"))
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort");
    run_command(&mut command)
}

/// Paths end up in BTF's line information, so none of this machine may show. The linker generates the code: the
/// processor and its features are the linker's arguments.
fn rustflags(root: &Path, target: &Path, toolchain: &Toolchain, linker: &Path) -> Vec<String> {
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let mut flags = vec![remap(root, "relay"), remap(&toolchain::cargo_home(), "cargo"), remap(target, "target")];
    flags.extend(toolchain.source_roots().iter().map(|source| remap(source, "rust")));
    flags.push("--cfg=bpf_target_arch=\"x86_64\"".to_owned());
    flags.push(format!("-Clinker={}", linker.display()));
    flags.extend(["-Ctarget-cpu=v3", "-Cdebuginfo=2", "-Clink-arg=--btf"].map(String::from));
    if toolchain.llvm_major() >= 22 {
        flags.push("-Clink-arg=--cpu-features=+allows-misaligned-mem-access".to_owned());
    }
    flags
}

/// Keeps what loading, BTF and aya-log need; `--strip-all` would take the symbols that relocations name.
fn strip(toolchain: &Toolchain, from: &Path, to: &Path) -> Result<()> {
    run_command(Command::new(toolchain.llvm_prefix.join("bin/llvm-strip")).arg("-g").arg(from).arg("-o").arg(to))
}

fn install(root: &Path, manifest: &Manifest, fresh: &Path) -> Result<()> {
    let objects = root.join(OBJECTS);
    fs::create_dir_all(&objects)?;
    for recipe in &RECIPES {
        fs::copy(fresh.join(recipe.file), objects.join(recipe.file)).with_context(|| format!("copying {}", recipe.file))?;
    }
    manifest.write(&objects)?;
    println!("wrote {OBJECTS}:\n{manifest}");
    Ok(())
}

/// Byte for byte under the recorded toolchain; under another one, everything but the code itself, and the corpus.
fn compare(root: &Path, recorded: &Manifest, fresh: &Manifest, folder: &Path) -> Result<()> {
    if recorded.same_toolchain(fresh) {
        recorded.same_objects(fresh)?;
        println!("identical: {} objects, byte for byte", RECIPES.len());
        return Ok(());
    }
    println!("the objects were built by {}, which is not on hand: bytes can't be compared, so", recorded.toolchain());
    for recipe in &RECIPES {
        let committed = object::describe(&fs::read(root.join(OBJECTS).join(recipe.file))?)?;
        let built = object::describe(&fs::read(folder.join(recipe.file))?)?;
        if let Some(difference) = committed.symmetric_difference(&built).next() {
            bail!("{}: programs, maps or BTF layout differ: {difference}", recipe.file);
        }
        println!("{}: same programs, maps and BTF layout ({} facts)", recipe.file, built.len());
    }
    corpus(root, folder)
}

/// Runs the golden corpus over the fresh objects. Needs root; the test says so itself where it can't run.
fn corpus(root: &Path, folder: &Path) -> Result<()> {
    let mut command = Command::new("cargo");
    command.args(["test", "--quiet", "--package", "relay-tests", "--test", "xdp_program", "--", "--nocapture"]);
    run_command(command.current_dir(root).env("RELAY_BPF_OBJECTS", folder)).context("the fresh objects don't pass the golden corpus")
}

/// Runs a command to its end; an error names it.
fn run_command(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{} failed ({status})", command.get_program().display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cheap half of `--check`, without a BPF toolchain: whoever edits the sources and forgets the objects fails here.
    #[test]
    fn committed_objects_belong_to_the_sources() {
        let root = root().unwrap();
        Manifest::read(&root.join(OBJECTS)).unwrap().verify(&root, &root.join(OBJECTS)).unwrap();
    }

    #[test]
    fn committed_objects_describe_themselves() {
        let root = root().unwrap();
        let facts = object::describe(&fs::read(root.join(OBJECTS).join("relay.bpf.o")).unwrap()).unwrap();
        assert!(facts.contains("program relay in xdp.frags"), "{facts:#?}");
        assert!(facts.contains("program relay_single in xdp"), "{facts:#?}");
        assert!(facts.iter().any(|fact| fact.starts_with("map MATCHES") && fact.contains("MatchKey(32)")), "{facts:#?}");
    }

    #[test]
    fn a_truncated_object_is_an_error() {
        let bytes = fs::read(root().unwrap().join(OBJECTS).join("relay.bpf.o")).unwrap();
        for len in [0, 3, 63, 64, 1000, bytes.len() - 1] {
            assert!(object::describe(&bytes[..len]).is_err(), "{len} bytes");
        }
    }
}
