//! `cargo xtask`: the project's own tool. Needs nothing but Rust.
//!
//! One subcommand, one file. Must never become a part of the product.

mod bench;
mod ebpf;
mod instructions;
mod judges;
mod packages;
mod relay;
mod requirements;
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
    Demo(relay::Args),
    /// Install what is missing, build, and run every test; the last line counts them
    Test(test::Args),
    /// Build for release, and run every `relay bench` of packets into target/bench
    Bench(bench::Args),
    /// Count the instructions of the packet's way in user space, and hold them against the committed list
    Instructions(instructions::Args),
    /// Check what compilers don't: who imports whom, where unsafe code stands, how long files are
    Tidy,
    /// Count the lines and the unsafe blocks of every room
    Stats,
    /// Show which test proves which promise of the design documents
    Requirements(requirements::Args),
    /// Build the BPF objects from source, or check the committed ones
    BuildEbpf(ebpf::Args),
    /// Install what the build needs, and the tools that judge in tests where they can be had
    Install,
}

fn main() -> ExitCode {
    run(Command::parse()).unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(args) => relay::demo(&args),
        Command::Test(args) => test::run(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Instructions(args) => instructions::run(&args),
        Command::Tidy => tidy::run(),
        Command::Stats => stats::run(),
        Command::Requirements(args) => requirements::run(&args),
        Command::Install => packages::install_missing().map(|()| {
            judges::install();
            ExitCode::SUCCESS
        }),
        Command::BuildEbpf(args) => ebpf::run(&args).map(|()| ExitCode::SUCCESS),
    }
}
