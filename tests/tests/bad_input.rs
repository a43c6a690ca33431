//! Bad input and unavailable resources: one line that names the field and the remedy, the exit code of INTERFACE.md, and nothing changed.
//!
//! Every test has a relay that goes on forwarding: 1,000 packets before, 1,000 after. Two workers are tested here too, since
//! asking for too many is refused.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

use relay::control::message::PROTOCOL_VERSION;
use relay::lab::xdp::LabProgram;
use relay::lab::{Namespace, socket};
use relay_tests::{Lab, LabSpec, Listener, RelayProcess, needs_root, relay_bin, send, send_args, start_relay};
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const RULE: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=first path=xsk engine=tx";
const OTHER: &str = "r0 239.1.1.2:5000 -> r1; id=second";

/// 1,000 packets of 239.1.1.1:5000, all of them at the sink, none twice.
fn forwards(lab: &Lab) {
    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", Some(1_000)).unwrap();
    send(lab, &send_args("s0", "239.1.1.1:5000", 20_000, 1_000).unwrap()).unwrap();
    let report = listener.wait().unwrap();
    assert_eq!((report.distinct, report.lost, report.duplicated), (1_000, 0, 0), "{report:?}");
}

/// Runs a command to its end; one that does not end within 10 s is killed and fails the test.
fn finish(command: &mut Command, what: &str) -> Output {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > Duration::from_secs(10) {
            child.kill().unwrap();
            panic!("{what}: still runs after 10 s: {}", String::from_utf8_lossy(&child.wait_with_output().unwrap().stderr));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

/// What a refusal said, by its JSON.
#[derive(Debug)]
struct Refusal {
    message: String,
    field: String,
    hint: String,
}

/// Runs `relay ARGS` in `namespace` as text and as JSON: this exit code, one error line, a field, all of which is returned.
fn refused(namespace: &Namespace, args: &[&str], code: i32) -> Refusal {
    let what = format!("relay {}", args.join(" "));
    let run = |json: &[&str]| finish(namespace.command(relay_bin().unwrap()).unwrap().args(args).args(json).env("RUST_LOG", "off"), &what);
    let plain = run(&[]);
    let text = String::from_utf8_lossy(&plain.stderr).into_owned();
    assert_eq!(plain.status.code(), Some(code), "{what}: {text}");
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{what}: not one line: {text}");
    let json = run(&["--json"]);
    assert_eq!(json.status.code(), Some(code), "{what} --json");
    let body: Value =
        serde_json::from_slice(&json.stderr).unwrap_or_else(|e| panic!("{what}: {e}: {}", String::from_utf8_lossy(&json.stderr)));
    assert_eq!(body["error"]["code"], code, "{what}");
    let text_of = |key: &str| body["error"][key].as_str().unwrap().to_owned();
    let refusal = Refusal { message: text_of("message"), field: text_of("field"), hint: text_of("hint") };
    assert!(!refusal.field.is_empty() && text.contains(&refusal.field), "{what}: the line names no field: {text}");
    refusal
}

/// `relay run ARGS` beside the relay that runs, with a socket of its own that must be gone afterwards.
fn refused_run(lab: &Lab, args: &[&str], code: i32) -> Refusal {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("other.sock");
    let refusal = refused(&lab.relay, &[&["run", "--socket", socket.to_str().unwrap()], args].concat(), code);
    assert!(!socket.exists(), "{args:?}: the socket file is still there");
    refusal
}

/// Names and ids of the XDP programs on the interfaces of a namespace.
fn programs(namespace: &Namespace) -> Vec<String> {
    let links: Value = serde_json::from_str(&namespace.output("ip", &["-j", "-d", "link", "show"]).unwrap()).unwrap();
    let with_program = links.as_array().unwrap().iter().filter(|link| !link["xdp"].is_null());
    with_program.map(|link| format!("{} {}", link["ifname"], link["xdp"]["prog"]["id"])).collect()
}

/// What must not change: rules, workers, programs.
fn fingerprint(lab: &Lab, relay: &RelayProcess) -> (Value, Vec<u32>, Vec<String>) {
    (relay.rules().unwrap(), relay.worker_pids().unwrap(), programs(&lab.relay))
}

/// A lab with a relay in it that forwards.
fn running() -> (Lab, RelayProcess) {
    let lab = Lab::new(LabSpec { sinks: 2, ..LabSpec::default() }).unwrap();
    let relay = start_relay(&lab, &["--rule", RULE]).unwrap();
    forwards(&lab);
    (lab, relay)
}

/// Checks that nothing changed over `body`, and that the relay forwards on.
fn unchanged(body: impl FnOnce(&Lab, &RelayProcess)) {
    let (lab, mut relay) = running();
    let before = fingerprint(&lab, &relay);
    body(&lab, &relay);
    assert_eq!(fingerprint(&lab, &relay), before);
    forwards(&lab);
    assert!(relay.sigterm(Duration::from_secs(2)).unwrap().success());
    assert!(programs(&lab.relay).is_empty() && !relay.socket().exists());
}

/// Arguments and rules that `relay run` refuses.
#[test]
fn a_run_with_bad_arguments_changes_nothing() {
    needs_root!();
    unchanged(|lab, relay| {
        let no_mac = refused_run(lab, &["--rule", "r2 239.1.1.1:5000 -> lo"], 2);
        assert!(no_mac.field == "interface" && no_mac.message.contains("lo has no MAC address"), "{no_mac:?}");
        for rule in [
            "r2",
            "r2 239.1.1.1:5000",
            "r2 239.1.1.1:5000 ->",
            "r2 239.1.1.1:99999 -> r1",
            "r2 239.1.1.1:0x -> r1",
            "r2 239.1.1.300:5000 -> r1",
            "r2 239.1.1.1:5000 -> r2",
            "r2 239.1.1.1:5000 -> r1 ttl=0",
            "r2 239.1.1.1:5000 -> r1 ttl=keep ; colour=red",
            "r2 239.1.1.1:5000 -> r1 [ff3e::1]",
            "r2 224.0.0.5:5000 -> r1",
        ] {
            refused_run(lab, &["--rule", rule], 2);
        }
        assert_eq!(refused_run(lab, &["--rule", OTHER, "--cpus", "4000"], 2).field, "--cpus");
        refused_run(lab, &["--rule", OTHER, "--workers", "0"], 2);
        refused_run(lab, &["--rule", OTHER, "--backend", "telepathy"], 2);
        let second = refused_run(lab, &["--rule", OTHER], 2);
        assert!(second.field == "ingress" && second.message.contains(&format!("pid {}", relay.pid())), "{second:?}");
        let socket = relay.socket();
        let taken = refused(&lab.relay, &["run", "--rule", "r2 239.1.1.1:5000 -> r1", "--socket", socket.to_str().unwrap()], 2);
        assert!(taken.field == "--socket" && taken.message.contains(&format!("pid {}", relay.pid())), "{taken:?}");
    });
}

/// A config with an unknown key: file, line and column, and the nearest known key; the same under `check` and `run`.
#[test]
fn a_config_with_an_unknown_key_changes_nothing() {
    needs_root!();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("relay.toml");
    let text = "version = 1\n[[rule]]\ningress = \"r2\"\nmatch = \"239.1.1.1:5000\"\n[[rule.output]]\negress = \"r1\"\nttll = \"keep\"\n";
    std::fs::write(&file, text).unwrap();
    let name = file.to_str().unwrap();
    unchanged(|lab, relay| {
        let socket = relay.socket();
        let socket = socket.to_str().unwrap();
        for refusal in [
            refused_run(lab, &["--config", name], 2),
            refused(&lab.relay, &["check", name], 2),
            refused(&lab.relay, &["apply", name, "--socket", socket], 2),
        ] {
            let place = format!("{name}:7:1");
            assert!(refusal.message.contains(&place) && format!("{refusal:?}").contains("`ttl`"), "{refusal:?}");
        }
        refused_run(lab, &["--config", "/nonexistent/relay.toml"], 2);
    });
}

/// Without a daemon: exit 3, whatever is at the path.
#[test]
fn without_a_daemon_the_exit_code_is_3() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let stale = directory.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    for socket in [directory.path().join("none.sock"), stale.clone()] {
        for command in [&["status"][..], &["stats"], &["rule", "list"], &["rule", "add", RULE], &["rule", "del", "first"]] {
            let refusal = refused(&lab.relay, &[command, &["--socket", socket.to_str().unwrap()]].concat(), 3);
            assert!(refusal.field == "--socket" && refusal.hint.contains("relay run"), "{refusal:?}");
        }
    }
    assert!(stale.exists(), "a client removes nothing");
}

/// Rules that the running relay refuses.
#[test]
fn a_refused_rule_changes_nothing() {
    needs_root!();
    unchanged(|lab, relay| {
        let socket = relay.socket();
        let refuse = |args: &[&str]| refused(&lab.relay, &[args, &["--socket", socket.to_str().unwrap()]].concat(), 2);
        for rule in ["garbage", "lo 239.1.1.2:5000 -> r1", "r0 239.1.1.2:5000 -> lo", "r0 239.1.1.2:70000 -> r1", "r0 239.1.1.2:1 -> r0"] {
            refuse(&["rule", "add", rule]);
        }
        let same = refuse(&["rule", "add", "r0 239.1.1.1:5000 -> r2; id=again"]);
        assert!(format!("{same:?}").contains("apply"), "{same:?}");
        assert!(refuse(&["rule", "del", "nobody"]).message.contains("nobody"));
    });
}

/// Somebody else's XDP program is named, left alone, and reason enough to refuse: at the start and at run time.
#[test]
fn a_foreign_program_is_left_alone() {
    needs_root!();
    unchanged(|lab, relay| {
        let mut foreign = LabProgram::load().unwrap();
        lab.relay.run(|| foreign.attach("lab_drop", socket::ifindex("r2")?)).unwrap().unwrap();
        let before = programs(&lab.relay);
        let rule = "r2 239.1.1.9:5000 -> r1";
        let socket = relay.socket();
        let at_run_time = ["rule", "add", rule, "--socket", socket.to_str().unwrap()];
        let started = refused_run(lab, &["--rule", rule], 2);
        assert!(started.message.contains("lab_drop"), "{started:?}");
        // Without CAP_SYS_ADMIN, which it has dropped, a running relay may not ask for the name, only for the id.
        for refusal in [started, refused(&lab.relay, &at_run_time, 2)] {
            assert!(refusal.message.contains("r2") && refusal.message.contains("detach"), "{refusal:?}");
        }
        assert_eq!(programs(&lab.relay), before);
    });
}

/// More workers than RX queues: exit 2 with the interface's name, and the program is gone again.
#[test]
fn more_workers_than_queues_are_refused() {
    needs_root!();
    unchanged(|lab, _relay| {
        let refusal = refused_run(lab, &["--rule", "r2 239.1.1.1:5000 -> r1", "--workers", "2"], 2);
        assert!(refusal.field == "--workers" && refusal.message.contains("r2"), "{refusal:?}");
    });
}

/// A bridge has no native XDP: refused where AF_XDP was insisted on, degraded with --strict, and nothing is left.
#[test]
fn an_interface_without_native_xdp_is_refused_where_asked() {
    needs_root!();
    unchanged(|lab, _relay| {
        lab.relay.ip_batch("link add br9 type bridge\nlink set br9 up\n").unwrap();
        let rule = "br9 239.1.1.1:5000 -> r1";
        for (args, code) in
            [(["--backend", "xsk"].as_slice(), 2), (&["--xdp-mode", "native"], 2), (&["--zero-copy", "on"], 2), (&["--strict"], 4)]
        {
            let refusal = refused_run(lab, &[&["--rule", rule], args].concat(), code);
            assert!(refusal.message.contains("br9") && format!("{refusal:?}").contains("--backend packet"), "{refusal:?}");
        }
        lab.relay.ip_batch("link del br9\n").unwrap();
    });
}

/// What the relay answers to bytes; empty if it hangs up.
fn speak(path: &Path, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(7))).unwrap();
    // The relay may hang up before it has read all of it.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn message(len: u32, version: u8, document: &[u8]) -> Vec<u8> {
    [&len.to_le_bytes(), &[version][..], document].concat()
}

/// Truncated, oversized and garbage messages cost their sender the connection and nobody else anything.
#[test]
fn garbage_at_the_control_socket_changes_nothing() {
    needs_root!();
    let version = PROTOCOL_VERSION as u8;
    let noise: Vec<u8> = (0..100_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    unchanged(|_lab, relay| {
        let path: PathBuf = relay.socket();
        for bytes in [
            Vec::new(),
            vec![7],
            message(100, version, b"{\"Stat"),
            message(u32::MAX, version, b"{}"),
            message(0, version, b""),
            message(2, version.wrapping_add(1), b"{}"),
            message(9, version, b"not JSON!"),
            message(11, version, b"{\"Nope\":{}}"),
            message(3, version, &[0xff, 0xfe, 0xfd]),
            noise,
        ] {
            let answer = speak(&path, &bytes);
            let text = String::from_utf8_lossy(answer.get(5..).unwrap_or_default()).into_owned();
            assert!(answer.is_empty() || text.contains("\"code\":2"), "{text}");
            assert!(relay.status().is_ok(), "the relay answers the next client");
        }
        // Held half-open, they take no place from others.
        let _idle: Vec<UnixStream> = (0..32).map(|_| UnixStream::connect(&path).unwrap()).collect();
        assert!(relay.status().is_ok());
    });
}

/// Packets that each RX queue of an interface's XDP program has seen.
fn by_queue(namespace: &Namespace, iface: &str) -> [u64; 2] {
    let text = namespace.output("ethtool", &["-S", iface]).unwrap();
    [0, 1].map(|queue| {
        let name = format!("rx_queue_{queue}_xdp_packets:");
        let line = text.lines().find_map(|line| line.trim().strip_prefix(&name)).unwrap_or_else(|| panic!("{name} in {text}"));
        line.trim().parse().unwrap()
    })
}

/// Sixteen flows with ports of their own, at once: every packet exactly once. Returns the status.
fn sixteen_flows(lab: &Lab) {
    const EACH: u64 = 500;
    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", Some(16 * EACH)).unwrap();
    std::thread::scope(|scope| {
        for flow in 0..16_u16 {
            scope.spawn(move || {
                let mut args = send_args("s0", "239.1.1.1:5000", 2_000, EACH).unwrap();
                args.first = u64::from(flow) * EACH;
                args.source = Some(format!("10.0.0.1:{}", 7_000 + flow).parse().unwrap());
                send(lab, &args).unwrap();
            });
        }
    });
    let report = listener.wait().unwrap();
    assert_eq!((report.distinct, report.lost, report.duplicated, report.sources.len()), (16 * EACH, 0, 0, 16), "{report:?}");
}

/// Two workers, a queue each: flows over both queues arrive exactly once, on AF_XDP in both pipelines and on AF_PACKET.
#[test]
fn req_001_11_two_workers_forward_every_packet_once() {
    needs_root!();
    let lab = Lab::new(LabSpec { queues: 2, ..LabSpec::default() }).unwrap();
    for (path, pipeline) in [("xsk", "fused"), ("xsk", "split"), ("packet", "fused")] {
        let rule = format!("r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=two path={path} engine=tx");
        let mut relay = start_relay(&lab, &["--workers", "2", "--pipeline", pipeline, "--rule", &rule]).unwrap();
        assert_eq!(relay.worker_pids().unwrap().len(), 2);
        let before = if path == "xsk" { by_queue(&lab.relay, "r0") } else { [0, 0] };
        sixteen_flows(&lab);
        if path == "xsk" {
            let after = by_queue(&lab.relay, "r0");
            assert!(after[0] > before[0] && after[1] > before[1], "both queues carried flows: {before:?} {after:?}");
        }
        let stats = relay.stats().unwrap();
        relay_tests::assert_rules_conserved(&stats);
        assert_eq!(relay_tests::rule_stats(&stats, "two").unwrap()["outputs"][0]["tx_packets"], 8_000, "{path} {pipeline}: {stats}");
        let status = relay.status().unwrap();
        let backend = if path == "xsk" { "af_xdp_copy" } else { "af_packet" };
        assert!(status["interfaces"].as_array().unwrap().iter().all(|iface| iface["backend"] == backend), "{status}");
        relay.sigterm(Duration::from_secs(2)).unwrap();
    }
}

/// `--partition` on the packet path: whatever the scheme, every packet goes to exactly one worker, and both get some.
#[test]
fn req_003_4_packet_sockets_share_as_partition_says() {
    needs_root!();
    let lab = Lab::new(LabSpec { queues: 2, ..LabSpec::default() }).unwrap();
    for scheme in ["flow-hash", "consistent", "range", "round-robin"] {
        let rule = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; path=packet";
        let mut relay = start_relay(&lab, &["--workers", "2", "--partition", scheme, "--rule", rule]).unwrap();
        sixteen_flows(&lab);
        std::thread::sleep(Duration::from_millis(100));
        let channels = relay.query(&["channels"]).unwrap();
        let rows = channels["channels"].as_array().unwrap().iter().filter(|row| row["kind"] == "egress");
        let sent: Vec<u64> = rows.map(|row| row["sent"].as_u64().unwrap()).collect();
        println!("{scheme}: {sent:?}");
        assert!(sent.len() == 2 && sent.iter().all(|count| *count > 0) && sent.iter().sum::<u64>() == 8_000, "{scheme}: {sent:?}");
        relay.sigterm(Duration::from_secs(2)).unwrap();
    }
}
