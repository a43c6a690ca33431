//! What the steps of a packet's way cost by themselves, without a network: `cargo bench -p relay --bench packet_path`.
//!
//! User space: parse, match, rewrite, on one pinned core. The XDP program: BPF_PROG_TEST_RUN (as root; left out otherwise). Rounds are
//! interleaved; medians with minimum and maximum. RELAY_BENCH_ROUNDS changes their number (9). Run it on a quiet machine.

mod program;
mod user;

use anyhow::Result;
use program::{Loaded, Rewrite};
use relay::lab::ringbench::measure::summary;

/// One row: its name, and what gives nanoseconds a packet.
type Row<'a> = (String, Box<dyn FnMut() -> Result<f64> + 'a>);

/// Packets a round in the kernel, and in user space.
const REPEAT: u32 = 1_000_000;

fn main() -> Result<()> {
    if let (Ok(row), Ok(calls)) = (std::env::var("RELAY_BENCH_ROW"), std::env::var("RELAY_BENCH_CALLS")) {
        return user::count(&row, calls.parse()?);
    }
    let rounds = std::env::var("RELAY_BENCH_ROUNDS").ok().and_then(|value| value.parse().ok()).unwrap_or(9);
    let mut rows = user::rows(REPEAT)?;
    if nix::unistd::geteuid().is_root() {
        kernel_rows(&mut rows)?;
    } else {
        println!("SKIPPED: rows of the XDP program need root");
    }
    let mut times = vec![Vec::new(); rows.len()];
    for _ in 0..rounds {
        for ((_, once), times) in rows.iter_mut().zip(&mut times) {
            times.push(once()?);
        }
    }
    for ((name, _), times) in rows.iter().zip(&mut times) {
        let (median, min, max) = summary(times);
        println!("{name:52} {median:8.1} ns  ({min:.1}–{max:.1})");
    }
    Ok(())
}

/// Rules are all used in turn; `payload` bytes a packet.
fn kernel_rows(rows: &mut Vec<Row<'_>>) -> Result<()> {
    for (name, rules, rewrite, payload) in [
        ("xdp: no rule, passes", 0, Rewrite::Link, 64),
        ("xdp: 1 rule, MACs and TTL", 1, Rewrite::Link, 64),
        ("xdp: 1 rule, full rewrite", 1, Rewrite::Full, 64),
        ("xdp: 1 rule, full rewrite, payload 1400", 1, Rewrite::Full, 1400),
        ("xdp: 100 rules, full rewrite", 100, Rewrite::Full, 64),
        ("xdp: 10,000 rules, full rewrite", 10_000, Rewrite::Full, 64),
    ] {
        let mut loaded = Loaded::new(rules, rewrite)?;
        rows.push((name.into(), Box::new(move || loaded.run(payload, REPEAT))));
    }
    Ok(())
}
