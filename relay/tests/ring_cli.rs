//! The command lines of documents 000 and 002: the benches of ring and channels, and the demo, as a person types them.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const RELAY: &str = env!("CARGO_BIN_EXE_relay");

fn relay(arguments: &str) -> Output {
    let mut command = Command::new(RELAY);
    command.env_remove("RELAY_WORKER_ID").env_remove("RUST_LOG");
    command.args(arguments.split(' ')).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn json(arguments: &str) -> Value {
    let output = relay(&format!("{arguments} --json"));
    assert!(output.status.success(), "{arguments}: {}", said(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn req_002_4_the_documented_command_line_is_accepted() {
    for mode in ["lockfree", "mutex", "naive", "mpmc", "pipe"] {
        let output = relay(&format!("bench ring --iters 2000 --rounds 1 --same-core --mode {mode}"));
        assert!(output.status.success() && said(&output).contains(mode), "{mode}: {}", said(&output));
    }
    let report = json("bench ring --iters 2000 --rounds 1 --same-core --mode lockfree,mutex --batch 1,32 --size 8");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4, "both modes in one run");
    for key in ["mode", "batch", "size", "same_core", "ns_per_message", "p50_ns", "p99_ns", "ratio"] {
        assert!(rows.iter().all(|row| !row[key].is_null()), "{key}: {report}");
    }
    assert!(report["ping_pong_ns"].as_u64().unwrap() > 0);
}

/// 002.15: what must not be reordered, overflow of the indices, and the price of a shared line as rows of one run.
#[test]
fn req_002_15_false_sharing_has_a_row_of_its_own() {
    // `naive` keeps both indices on one line and caches neither; what differs is a figure, so only the rows are asserted.
    let report = json("bench ring --iters 20000 --rounds 1 --same-core --mode lockfree,naive --batch 1");
    let modes: Vec<&str> = report["rows"].as_array().unwrap().iter().map(|row| row["mode"].as_str().unwrap()).collect();
    assert_eq!(modes, ["lockfree", "naive"]);
}

fn demo(arguments: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/run_demo.sh");
    Command::new(script).args(arguments).env("RELAY_BIN", RELAY).output().unwrap()
}

/// Single request and reply, many requests unchanged, and a failure that is exit 2.
#[test]
fn req_002_16_one_request_many_requests_and_failure() {
    let golden = demo(&["--mode=golden"]);
    let text = said(&golden);
    assert_eq!(golden.status.code(), Some(0), "{text}");
    assert!(text.contains("request: \"hello\" -> reply: \"hello\""), "{text}");
    assert!(text.contains("many: 10000 sent, 10000 received, 0 lost, 0 reordered"), "{text}");
    assert_eq!(text.lines().last(), Some("OK: golden scenario completed"));
    assert_eq!(demo(&[]).stdout, golden.stdout, "golden is the default, and every run prints the same");
    let failure = demo(&["--mode=failure"]);
    let text = String::from_utf8_lossy(&failure.stdout).into_owned();
    assert_eq!((failure.status.code(), text.as_str()), (Some(2), "ERROR: invalid input or unavailable IPC resource\nexit=2\n"));
    assert_eq!(demo(&["--mode=other"]).status.code(), Some(2));
}

/// Verbose log, no waiting, time-outs, a report for machines, many readers. (Crash recovery: req_002_8.)
#[test]
fn req_002_18_extensions_are_there() {
    let verbose = relay("-v ring-demo --mode golden");
    assert!(verbose.status.success(), "{}", said(&verbose));
    for impatient in ["ring-demo --nonblock", "ring-demo --timeout-ms 0"] {
        let begin = Instant::now();
        let output = relay(impatient);
        assert!(begin.elapsed() < Duration::from_secs(5), "{impatient} waited");
        // Nothing can be there at once: the other process is not even started.
        assert_eq!(output.status.code(), Some(1), "{impatient}: {}", said(&output));
        assert!(said(&output).contains("timeout"), "{impatient}: {}", said(&output));
    }
    let report = json("bench channels --readers 1,3 --iters 20000 --rounds 1 --same-core");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| row["readers"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(relay("bench channels --readers 0").status.code(), Some(2));
}

/// One million messages from thread to thread, and from process to process: fewer than 1,000 system calls.
#[test]
fn req_002_19_a_message_costs_no_system_call() {
    let summary = tempfile::NamedTempFile::new().unwrap();
    for bench in ["ring --mode lockfree", "ipc --mode ring"] {
        let mut command = Command::new("strace");
        // Where cargo started this, the loader looks for each library in all of cargo's directories: 500 calls a process.
        command.env_remove("LD_LIBRARY_PATH");
        command.args(["-f", "-c", "-o"]).arg(summary.path()).arg(RELAY);
        command.args(format!("bench {bench} --iters 1000000 --rounds 1 --batch 32").split(' '));
        let Ok(output) = command.output() else { return println!("SKIPPED: strace is missing") };
        if said(&output).contains("ptrace") || said(&output).contains("--same-core is needed") {
            return println!("SKIPPED: {}", said(&output).trim());
        }
        assert!(output.status.success(), "{bench}: {}", said(&output));
        let table = std::fs::read_to_string(summary.path()).unwrap();
        let total = table.lines().rev().find(|line| line.trim_end().ends_with("total")).unwrap();
        // % time, seconds, µs a call, calls, errors if any, the word.
        let calls: u64 = total.split_whitespace().nth(3).and_then(|calls| calls.parse().ok()).unwrap();
        println!("{bench}: {calls} system calls");
        assert!(calls < 1_000, "{bench}: {calls} system calls\n{table}");
    }
}
