//! What workers really ask of the kernel, by strace, over a run with every fault: nothing that the table in relay/src/worker/sandbox.rs
//! does not list (the kernel would have killed them), and but for three nothing is listed that none of them needs.
//!
//! Must never be a measure of speed: everything is traced.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::Signal;
use relay::lab::process::signal_pid;
use relay_tests::paths::turn;
use relay_tests::process::{is_dead, wait_replaced};
use relay_tests::{Lab, RelayProcess, needs_root, relay_bin, send, send_args};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Listed, and not made here, but by the C library elsewhere, or by a worker that says why it ends (relay/src/worker/sandbox.rs says
/// where).
const NOT_MET: [&str; 3] = ["clock_gettime", "mremap", "write"];

/// What the table in the sandbox's own documentation lists.
fn listed() -> BTreeSet<String> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../relay/src/worker/sandbox.rs")).unwrap();
    let rows = text.lines().filter_map(|line| line.strip_prefix("//! | ")).skip(1);
    rows.flat_map(|row| row.split(" | ").next().unwrap_or_default().split(", ").map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// A program that is the relay, traced where it runs as a daemon: a file for each thread in the directory.
fn traced(directory: &Path) -> std::path::PathBuf {
    let (script, relay) = (directory.join("relay"), relay_bin().unwrap());
    let (trace, relay) = (directory.join("t"), relay.display());
    let lines = format!(
        "#!/bin/sh\ncase $1 in\nrun) exec strace -ff -ttt -qq -o {} {relay} \"$@\" ;;\n*) exec {relay} \"$@\" ;;\nesac\n",
        trace.display()
    );
    std::fs::write(&script, lines).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    script
}

/// Time, call and what is behind it.
fn call(line: &str) -> Option<(f64, &str, &str)> {
    let (time, rest) = line.split_once(' ')?;
    let (name, rest) = rest.split_once('(')?;
    Some((time.parse().ok()?, name, rest))
}

/// Calls of all workers behind their filters, with how often.
fn used(directory: &Path) -> BTreeMap<String, u64> {
    let entries = std::fs::read_dir(directory).unwrap().filter_map(|entry| Some(entry.ok()?.path()));
    let read = |path: std::path::PathBuf| Some((path.extension()?.to_str()?.to_owned(), std::fs::read_to_string(&path).ok()?));
    let threads: BTreeMap<String, String> = entries.filter_map(read).collect();
    let mut used = BTreeMap::new();
    for text in threads.values().filter(|text| text.lines().any(|line| line.contains("execveat(") && line.contains("worker"))) {
        let calls = || text.lines().filter_map(call);
        let begin = calls().position(|(_, name, _)| name == "execveat").unwrap_or(0);
        let closed = calls().skip(begin).find(|(_, name, rest)| *name == "seccomp" && rest.starts_with("SECCOMP_SET_MODE_FILTER"));
        let Some((closed, ..)) = closed else { continue };
        let threads_of = calls().filter(|(_, name, _)| name.starts_with("clone")).filter_map(|(_, _, rest)| rest.rsplit("= ").next());
        let own = threads_of.filter_map(|id| threads.get(id.trim())).chain([text]);
        for (_, name, _) in own.flat_map(|text| text.lines()).filter_map(call).filter(|(time, ..)| *time > closed) {
            *used.entry(name.to_owned()).or_default() += 1;
        }
    }
    used
}

/// Traffic, deaths, pauses, many rules, interfaces that go and come, an orderly end.
fn every_fault(lab: &Lab, mut relay: RelayProcess, more: &str) {
    relay.wait_ready().unwrap();
    let supervisor = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", relay.pid())).unwrap();
    let supervisor: u32 = supervisor.split_whitespace().next().unwrap().parse().unwrap();
    let traffic = || send(lab, &send_args("s0", "239.1.1.1:5000", 2_000, 400).unwrap()).unwrap();
    traffic();
    let pids = relay.worker_pids().unwrap();
    signal_pid(pids[0], Signal::SIGSTOP).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let _ = signal_pid(pids[0], Signal::SIGCONT);
    traffic();
    let pids = relay.worker_pids().unwrap();
    let _ = signal_pid(pids[0], Signal::SIGKILL);
    wait_replaced(&relay, &pids, Duration::from_secs(20)).unwrap();
    traffic();
    let file = tempfile::NamedTempFile::new().unwrap();
    let rule = |n: u32| {
        format!(
            "[[rule]]\nid = \"n{n}\"\ningress = \"r0\"\nmatch = \"239.3.{}.{}:5000\"\n{more}[[rule.output]]\negress = \"r1\"\nto = \"239.9.9.7:6000\"\n",
            n / 250,
            n % 250
        )
    };
    std::fs::write(file.path(), format!("version = 1\n{}", (0..2_000).map(rule).collect::<String>())).unwrap();
    relay.command(&["apply", file.path().to_str().unwrap()]).unwrap();
    relay.command(&["rule", "add", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]).unwrap();
    lab.relay.ip_batch("link set r1 down\n").unwrap();
    traffic();
    lab.relay.ip_batch("link set r1 up\n").unwrap();
    traffic();
    lab.relay.ip_batch("link del r1\n").unwrap();
    traffic();
    std::thread::sleep(Duration::from_millis(500));
    signal_pid(supervisor, Signal::SIGTERM).unwrap();
    let begin = Instant::now();
    while !is_dead(supervisor) {
        assert!(begin.elapsed() < Duration::from_secs(20), "{}", relay.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "traces everything for a minute: cargo test -p relay-tests --test syscalls -- --ignored"]
fn a_worker_makes_the_calls_on_its_list_and_no_other() {
    needs_root!();
    let _turn = turn();
    if Command::new("strace").arg("-V").output().is_err() {
        return println!("SKIPPED: no strace");
    }
    let mut all: BTreeMap<String, u64> = BTreeMap::new();
    for (args, more) in [
        (&["--backend", "xsk", "--pipeline", "fused"][..], ""),
        (&["--backend", "xsk", "--pipeline", "split"], ""),
        (&["--backend", "xsk", "--pipeline", "fused"], "engine = \"coalesce\"\n"),
        (&["--backend", "xsk", "--pipeline", "fused", "--spare"], ""),
        (&["--backend", "packet"], ""),
        (&["--backend", "packet", "--io-uring", "off"], ""),
    ] {
        let (lab, directory) = (Lab::simple().unwrap(), tempfile::tempdir().unwrap());
        let engine = if more.is_empty() { String::new() } else { format!(" {}", more.trim().replace([' ', '"'], "")) };
        let rule = format!("r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a{engine}");
        let args = [args, &["--rule", &rule]].concat();
        every_fault(&lab, RelayProcess::start(&lab.relay, &traced(directory.path()), &args).unwrap(), more);
        let used = used(directory.path());
        println!("{args:?}: {used:?}");
        used.into_iter().for_each(|(name, count)| *all.entry(name).or_default() += count);
    }
    let (listed, used): (BTreeSet<String>, BTreeSet<String>) = (listed(), all.into_keys().collect());
    println!("listed, and never used: {:?}", listed.difference(&used).collect::<Vec<_>>());
    assert!(used.is_subset(&listed), "not on the list: {:?}", used.difference(&listed));
    let unused: Vec<&String> = listed.difference(&used).filter(|name| !NOT_MET.contains(&name.as_str())).collect();
    assert!(unused.is_empty(), "on the list, and nobody needs them: {unused:?}");
}
