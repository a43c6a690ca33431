//! `cargo xtask bench`: every bench of the relay, one after the other, with a release build; figures into target/bench.
//!
//! Must never judge: the worst exit code of the relay's benches is ours.

use crate::relay::run;
use crate::{packages, workspace};
use anyhow::{Context, Result, ensure};
use std::process::{Command, ExitCode};

/// How the benches run.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Hold the figures against the bars; exit code 5 if one is missed
    #[arg(long)]
    gate: bool,
    /// Paced loads last 60 s, as the bars ask for
    #[arg(long)]
    long: bool,
    /// One of them alone (path, payload, flows, rules, loss, fanout, receivers, latency, chain)
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

/// Name of the files and arguments of `relay bench`: a few minutes together.
const BENCHES: [(&str, &str); 9] = [
    ("path", "path --duration 2s"),
    ("payload", "path --rows kernel,xsk,xsk_loop,packet --payload 64,512,1400 --duration 1s"),
    ("flows", "path --rows xsk,coalesce --flows 16 --duration 1s"),
    ("rules", "path --rows kernel,xsk --rules 1,10000 --duration 1s"),
    ("loss", "path --rows kernel,xsk --rate 500000"),
    ("fanout", "fanout --duration 1s"),
    ("receivers", "fanout --rows coalesce,kernel,xsk,packet --fanout 16 --receiver link,udp,udp_gro --duration 1s"),
    ("latency", "latency"),
    ("chain", "chain --search 2s"),
];

/// Arguments of a load at a pace.
fn lasting(name: &str, long: bool) -> &'static [&'static str] {
    match name {
        "loss" | "chain" if long => &["--duration", "60s"],
        "loss" => &["--duration", "10s"],
        _ => &[],
    }
}

/// Runs them.
pub(crate) fn bench(args: &Args) -> Result<ExitCode> {
    let chosen: Vec<_> = BENCHES.iter().filter(|(name, _)| args.only.as_ref().is_none_or(|only| only == name)).collect();
    ensure!(!chosen.is_empty(), "--only: one of {}", BENCHES.map(|(name, _)| name).join(", "));
    packages::install_missing()?;
    eprintln!("xtask: building the relay (release)");
    ensure!(
        run(workspace::cargo().args(["build", "--release", "--package", "relay", "--bin", "relay"]))?.success(),
        "no build, no figures"
    );
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace::root().join("target"), |target| workspace::root().join(target));
    let directory = target.join("bench");
    std::fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    let mut worst = 0;
    for (name, arguments) in chosen {
        eprintln!("xtask: relay bench {arguments}");
        let mut command = Command::new(target.join("release/relay"));
        command.arg("bench").args(arguments.split(' ')).args(lasting(name, args.long)).arg("--save").arg(directory.join(name));
        if args.gate {
            command.arg("--gate");
        }
        worst = worst.max(run(&mut command)?.code().unwrap_or(1));
    }
    eprintln!("xtask: tables, JSON and plots are in {}", directory.display());
    Ok(u8::try_from(worst).map_or(ExitCode::FAILURE, ExitCode::from))
}
