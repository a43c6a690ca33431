//! `cargo xtask`: the project's own tool. Needs nothing but Rust.
//!
//! One subcommand, one file. Must never become a part of the product.

mod ebpf;
mod packages;
mod requirements;
mod run;
mod source;
mod stats;
mod test;
mod tidy;
mod workspace;

use clap::Parser;
use std::process::ExitCode;

/// The project's own tool.
#[derive(Parser)]
#[command(name = "cargo xtask", version, about)]
enum Command {
    /// Install what is missing, build, and run `relay demo`
    Demo(run::Args),
    /// Install what is missing, build, and run every test; the last line counts them
    Test(test::Args),
    /// Build, and run `relay bench path`
    Bench(run::Args),
    /// Check what compilers don't: who imports whom, where unsafe code stands, how long files are
    Tidy,
    /// Count the lines and the unsafe blocks of every room
    Stats,
    /// Show which test proves which promise of the design documents
    Requirements(requirements::Args),
    /// Build the BPF objects from source, or check the committed ones
    BuildEbpf(ebpf::Args),
    /// Install what the build needs, and nothing else
    Install,
}

fn main() -> anyhow::Result<ExitCode> {
    match Command::parse() {
        Command::Demo(args) => run::demo(&args),
        Command::Test(args) => test::run(&args),
        Command::Bench(args) => run::bench(&args),
        Command::Tidy => tidy::run(),
        Command::Stats => stats::run(),
        Command::Requirements(args) => requirements::run(&args),
        Command::Install => packages::install_missing().map(|()| ExitCode::SUCCESS),
        Command::BuildEbpf(args) => ebpf::run(&args).map(|()| ExitCode::SUCCESS),
    }
}
