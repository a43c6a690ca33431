//! `relay bench` as a script sees it: the documented fields, one row a case, figures that fit together. Never how large they are.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::clock;
use relay_tests::{needs_root, paths, relay_bin};
use serde_json::Value;
use std::process::Command;

/// `relay bench ARGUMENTS --json` on the CPUs there are.
fn bench(arguments: &str) -> Value {
    let allowed = clock::allowed_cpus();
    let [first, last] = [allowed[0], allowed[allowed.len() - 1]].map(|cpu| cpu.to_string());
    let mut command = Command::new(relay_bin().unwrap());
    command.arg("bench").args(arguments.split(' ')).args(["--generator-cpu", &first, "--cpus", &last, "--json"]);
    let output = command.env_remove("RUST_LOG").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "bench {arguments}: {}: {said}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A row of each path at each fan-out, compared with the baseline at the same fan-out.
#[test]
fn fanout_has_a_row_a_case() {
    needs_root!();
    let _turn = paths::turn();
    let report = bench("fanout --rows xsk,packet --fanout 1,3 --rounds 1 --duration 300ms");
    for key in ["machine", "generator_ceiling_pps", "preempted", "rows"] {
        assert!(!report[key].is_null(), "{key}: {report}");
    }
    let rows = report["rows"].as_array().unwrap();
    let cases: Vec<_> = rows.iter().map(|row| (row["path"].as_str().unwrap(), row["fanout"].as_u64().unwrap())).collect();
    assert_eq!(cases, [("xsk", 1), ("packet", 1), ("xsk", 3), ("packet", 3)]);
    for row in rows {
        for key in ["path", "engine", "payload", "fanout", "hops", "offered_pps", "delivered_pps", "loss", "median_of", "min", "max"] {
            assert!(!row[key].is_null(), "{key}: {row}");
        }
        for key in ["p50_us", "p99_us", "p999_us"] {
            assert!(row.get(key).is_some_and(Value::is_null), "{key} is there, and not measured: {row}");
        }
        let [delivered, min, max] = ["delivered_pps", "min", "max"].map(|key| row[key].as_f64().unwrap());
        assert!(delivered > 0.0 && min <= delivered && delivered <= max, "{row}");
        let baseline = &rows.iter().find(|other| other["path"] == "packet" && other["fanout"] == row["fanout"]).unwrap()["delivered_pps"];
        let ratio = delivered / baseline.as_f64().unwrap();
        assert!((row["ratio_to_packet"].as_f64().unwrap() - ratio).abs() < 1e-6, "{row}");
    }
}

/// Sockets at the end get what is sent, merged or not, and their rows say so.
#[test]
fn sockets_at_the_end_are_rows_of_their_own() {
    needs_root!();
    let _turn = paths::turn();
    let report = bench("fanout --rows coalesce --fanout 2 --receiver udp,udp_gro --rounds 1 --duration 300ms");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| row["receiver"].as_str().unwrap()).collect::<Vec<_>>(), ["udp", "udp_gro"]);
    assert!(rows.iter().all(|row| row["delivered_pps"].as_f64().unwrap() > 0.0 && row["void"] == false), "{report}");
}

/// The wire is there in any case, a path has percentiles, and the plot is written.
#[test]
fn latency_has_percentiles_and_a_plot() {
    needs_root!();
    let _turn = paths::turn();
    let directory = tempfile::tempdir().unwrap();
    let name = directory.path().join("latency");
    let report = bench(&format!("latency --rows xsk --rate 5000 --rounds 1 --duration 300ms --save {}", name.display()));
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| row["path"].as_str().unwrap()).collect::<Vec<_>>(), ["wire", "xsk"]);
    for row in rows {
        let [p50, p99, p999] = ["p50_us", "p99_us", "p999_us"].map(|key| row[key].as_f64().unwrap());
        assert!(p50 <= p99 && p99 <= p999 && p999 > 0.0, "{row}");
        assert!(row["latency_samples"].as_u64().unwrap() > 0 && row["sent_packets"].as_u64().unwrap() > 0, "{row}");
    }
    let saved = |ending| std::fs::read_to_string(name.with_extension(ending)).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&saved("json")).unwrap(), report);
    assert!(saved("svg").starts_with("<svg") && saved("txt").contains("p99.9"));
}

/// The demonstration of all paths, and its picture. Long: nothing else runs every row.
#[test]
fn the_demo_draws_what_it_compares() {
    if !paths::long() {
        return eprintln!("SKIPPED: the demonstration of all paths takes half a minute (RELAY_TEST_LONG=1)");
    }
    needs_root!();
    let _turn = paths::turn();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("demo.svg");
    let mut command = Command::new(relay_bin().unwrap());
    let output = command.args(["demo", "--json", "--compare"]).arg(&file).env_remove("RUST_LOG").output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows: Vec<&str> = report["rows"].as_array().unwrap().iter().map(|row| row["backend"].as_str().unwrap()).collect();
    assert_eq!(rows, ["kernel", "xsk", "packet", "sockets"]);
    let svg = std::fs::read_to_string(&file).unwrap();
    assert!(svg.starts_with("<svg ") && svg.matches("class=\"mark\"").count() == 4, "{svg}");
    let directory_of_none = Command::new(relay_bin().unwrap()).args(["demo", "--compare", "/no/such/place.svg"]).output().unwrap();
    assert!(directory_of_none.status.code() == Some(2), "{directory_of_none:?}");
}

/// One row a relay; what leaves one goes into the next.
#[test]
fn a_chain_has_a_row_a_relay() {
    needs_root!();
    let _turn = paths::turn();
    let report = bench("chain --rows kernel,xsk --hops 2 --rate 5000 --duration 300ms --search 0s");
    let rows = report["rows"].as_array().unwrap();
    let cases: Vec<_> = rows.iter().map(|row| (row["path"].as_str().unwrap(), row["hops"].as_u64().unwrap())).collect();
    assert_eq!(cases, [("kernel", 1), ("kernel", 2), ("xsk", 1), ("xsk", 2)]);
    for pair in rows.chunks(2) {
        assert!(pair[1]["delivered_pps"].as_f64().unwrap() > 0.0, "{}", pair[1]);
        assert_eq!(pair[0]["delivered_pps"], pair[1]["offered_pps"]);
        assert!(pair[0]["loss_free_pps"].is_null(), "no search was asked for");
    }
}
