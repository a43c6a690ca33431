//! `cargo xtask`: the project's own tool. Needs nothing but Rust.
//!
//! One subcommand, one file. Must never become a part of the product.

mod ebpf;

use clap::Parser;

/// The project's own tool.
#[derive(Parser)]
#[command(name = "cargo xtask", version, about)]
enum Command {
    /// Build the BPF objects from source, or check the committed ones
    BuildEbpf(ebpf::Args),
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::BuildEbpf(args) => ebpf::run(&args),
    }
}
