//! The endpoint of `--metrics` in a namespace: it parses, its sums are what the receiver saw, and drops have their reasons.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::{Lab, RelayProcess, send};
use relay_tests::paths::Path;
use relay_tests::{Listener, needs_root, on_every_path, on_path, send_args, start_relay};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

on_every_path!(every_packet_that_is_sent_is_measured);

/// The same where super-frames leave by another half of the port.
mod coalescing {
    super::on_path!(xsk_split, every_packet_that_is_sent_is_measured, XSK_COALESCE_SPLIT);
}

/// Status line, headers, and body of one request.
fn fetch(lab: &Lab, request: &str) -> (String, String) {
    let ask = || {
        let mut stream = TcpStream::connect("127.0.0.1:9464").unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let text = lab.relay.run(ask).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// Name with labels as written → value. Every line must be what the format's grammar allows.
fn samples(page: &str) -> BTreeMap<String, f64> {
    let mut found = BTreeMap::new();
    let mut types = BTreeMap::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "twice: {line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            assert!(types.contains_key(family(name)), "no type before {line}");
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
            assert!(series == name || (series.ends_with("\"}") && series.contains("=\"")), "{line}");
            assert!(found.insert(series.to_owned(), value.parse().unwrap()).is_none(), "twice: {line}");
        }
    }
    found
}

/// A histogram's samples have names of their own.
fn family(name: &str) -> &str {
    ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name)
}

fn sum(samples: &BTreeMap<String, f64>, name: &str, holding: &str) -> u64 {
    let of = samples.iter().filter(|(series, _)| series.split('{').next() == Some(name) && series.contains(holding));
    of.map(|(_, value)| *value as u64).sum()
}

/// `promtool check metrics` where it is installed.
fn promtool(page: &str) {
    let Ok(mut child) =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    else {
        eprintln!("SKIPPED: promtool is not installed (package prometheus); the grammar was checked here all the same");
        return;
    };
    child.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

const RULES: [&str; 8] = [
    "--metrics",
    "9464",
    "--backend",
    "xsk",
    "--rule",
    "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000, r1 239.9.9.8:6000; id=a",
    "--rule",
    "r0 239.1.1.2:5000 -> r1 239.9.9.7:6000; id=low",
];

#[test]
fn metrics_parse_and_sum_to_what_the_receiver_saw() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let relay = start_relay(&lab, &RULES).unwrap();
    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", Some(3000)).unwrap();
    relay_tests::send(&lab, &send_args("s0", "239.1.1.1:5000", 3000, 3000).unwrap()).unwrap();
    relay_tests::send(&lab, &send::Args { ttl: 1, ..send_args("s0", "239.1.1.2:5000", 1000, 250).unwrap() }).unwrap();
    let report = listener.wait().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let (head, page) = fetch(&lab, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(head.starts_with("HTTP/1.0 200 OK") && head.contains("version=0.0.4"), "{head}");
    promtool(&page);
    let samples = samples(&page);
    let sent_to = |to: &str| sum(&samples, "relay_output_tx_packets_total", &format!("to=\"{to}\""));
    assert_eq!((sent_to("239.9.9.9:6000"), sent_to("239.9.9.8:6000")), (report.received, 3000));
    assert_eq!(report.received, 3000);
    assert_eq!(sum(&samples, "relay_rule_rx_packets_total", ""), 3250);
    assert_eq!(sum(&samples, "relay_output_dropped_packets_total", "reason=\"ttl_expired\""), 250);
    assert_eq!(sum(&samples, "relay_interface_tx_packets_total", "interface=\"r1\""), 6000);
    assert_eq!(sum(&samples, "relay_interface_rx_packets_total", "interface=\"r0\""), 3250);
    assert_eq!(sum(&samples, "relay_worker_running", "state=\"run\""), 1);
    assert_eq!(sum(&samples, "relay_rule_joined", ""), 2);
    assert_eq!(sum(&samples, "relay_frames", ""), 32_768);
    latency_is_measured_once_for_each_packet_sent(&samples, &relay.stats().unwrap()["latency"][0]);
    documented(&samples);
    the_rest_of_http(&lab);
    ends_with_its_relay(relay);
}

/// 3000 packets for two outputs; none of those that were dropped.
fn latency_is_measured_once_for_each_packet_sent(samples: &BTreeMap<String, f64>, stats: &serde_json::Value) {
    let bucket = |le: &str| samples[&format!("relay_worker_latency_seconds_bucket{{worker=\"0\",le=\"{le}\"}}")] as u64;
    assert_eq!(sum(samples, "relay_worker_latency_seconds_count", ""), 6000);
    assert_eq!((bucket("+Inf"), bucket("0.000000256")), (6000, 0), "a system call takes longer");
    let seconds = samples["relay_worker_latency_seconds_sum{worker=\"0\"}"];
    assert!(seconds > 6000.0 * 256e-9 && seconds < 6000.0, "{seconds}");
    let [packets, p50, p99, p999] = ["packets", "p50_ns", "p99_ns", "p999_ns"].map(|key| stats[key].as_u64().unwrap());
    assert!(packets == 6000 && p50 > 256 && p50 <= p99 && p99 <= p999, "{stats}");
    let counts = stats["buckets"].as_array().unwrap().iter().map(|bucket| bucket[1].as_u64().unwrap());
    assert_eq!(counts.sum::<u64>(), 6000);
}

/// How long packets were in the workers is counted once for each that an output was sent; on the kernel path there is no worker.
fn every_packet_that_is_sent_is_measured(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000, r1 239.9.9.8:6001; id=a"]).unwrap();
    relay_tests::send(&lab, &send_args("s0", "239.1.1.1:5000", 2000, 500).unwrap()).unwrap();
    let begin = Instant::now();
    loop {
        let stats = relay.stats().unwrap();
        let outputs = stats["rules"][0]["outputs"].as_array().unwrap();
        let sent: u64 = outputs.iter().map(|output| output["tx_packets"].as_u64().unwrap()).sum();
        let workers = stats["latency"].as_array().unwrap();
        let measured: u64 = workers.iter().map(|worker| worker["packets"].as_u64().unwrap()).sum();
        if path.path == "kernel" && workers.is_empty() || sent > 0 && measured == sent {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(5), "{}: {measured} of {sent} measured: {stats}", path.name);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// `promtool check rules` of the alerts, where it is installed.
#[test]
fn the_alerts_are_rules() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/alerts.yml");
    let Ok(output) = Command::new("promtool").args(["check", "rules", file]).output() else {
        eprintln!("SKIPPED: promtool is not installed (package prometheus)");
        return;
    };
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
}

/// Every family is in docs/metrics.md.
fn documented(samples: &BTreeMap<String, f64>) {
    let text = include_str!("../../docs/metrics.md");
    for series in samples.keys() {
        let name = family(series.split('{').next().unwrap());
        let short = name.strip_prefix("relay_interface").or(name.strip_prefix("relay_rule")).or(name.strip_prefix("relay_output"));
        assert!(text.contains(&format!("`{name}`")) || short.is_some_and(|short| text.contains(&format!("`…{short}`"))), "{name}");
    }
}

fn the_rest_of_http(lab: &Lab) {
    assert!(fetch(lab, "GET /other HTTP/1.1\r\n\r\n").0.starts_with("HTTP/1.0 404"));
    assert!(fetch(lab, "POST /metrics HTTP/1.1\r\n\r\n").0.starts_with("HTTP/1.0 405"));
    let (head, body) = fetch(lab, "HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.0 200") && body.is_empty());
    // Half a request holds nobody up for longer than its patience, and 9 KiB of it are refused.
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(9000));
    let asked = lab.relay.run(|| {
        let mut stream = TcpStream::connect("127.0.0.1:9464").unwrap();
        let _ = stream.write_all(long.as_bytes());
    });
    asked.unwrap();
    assert!(fetch(lab, "GET /metrics HTTP/1.1\r\n\r\n").0.starts_with("HTTP/1.0 200"));
}

/// A thread that did not block signals would have eaten the SIGTERM.
fn ends_with_its_relay(mut relay: RelayProcess) {
    let status = relay.sigterm(Duration::from_secs(5)).unwrap();
    assert!(status.success(), "{status}: {}", relay.log());
}

#[test]
fn an_address_that_is_taken_changes_nothing() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let taken = lab.relay.run(|| std::net::TcpListener::bind("127.0.0.1:9464")).unwrap().unwrap();
    let mut relay = relay_tests::start_relay_unready(&lab, &["--metrics", "9464"]).unwrap();
    let status = relay.wait_exit(Duration::from_secs(5)).unwrap();
    assert_eq!(status.code(), Some(2), "{}", relay.log());
    assert!(relay.log().contains("--metrics") && relay.log().contains("name a free address"), "{}", relay.log());
    drop(taken);
}
