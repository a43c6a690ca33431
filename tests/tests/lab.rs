//! The laboratory itself: what it counts is true, and it leaves nothing behind. Everything else rests on this.

use relay::lab::arms::{GROUP, REWRITTEN, TTL};
use relay::lab::recv::{Subscription, Verdict};
use relay::lab::sockets_relay::{Route, SocketsRelay};
use relay_tests::{Lab, LabSpec, Listener, needs_root, relay_bin, send, send_args, send_in_background};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn namespaces_of(pid: u32) -> usize {
    let prefix = format!("relay-lab-{pid}-");
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)).count()
}

/// The plain-socket relay carries verified traffic: sequence, integrity, TTL and destination.
#[test]
fn plain_sockets_relay_every_datagram() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let from = Subscription { source: None, group: GROUP };
    let route = Route { ingress: "r0".into(), from, egress: "r1".into(), to: REWRITTEN, ttl: TTL, cpu: None };
    let _relay = SocketsRelay::start(&lab.relay, &route).unwrap();
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(5_000)).unwrap();
    let sent = send(&lab, &send_args("s0", &GROUP.to_string(), 20_000, 5_000).unwrap()).unwrap();
    let report = listener.wait().unwrap();
    assert_eq!((sent.sent, report.verdict, report.distinct), (5_000, Verdict::Pass, 5_000), "{report:?}");
    assert_eq!(report.ttls.into_iter().collect::<Vec<_>>(), [TTL]);
}

/// The bare AF_XDP loop carries verified traffic: what it is compared with does the same work.
#[cfg(feature = "peers")]
#[test]
fn the_bare_loop_relays_every_datagram() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let relay = relay::lab::xsk_loop::XskLoop::start(&lab.relay, "r0", "r1", REWRITTEN, None).unwrap();
    let listener = Listener::on(lab.sink(1), "k1", &REWRITTEN.to_string(), Some(5_000)).unwrap();
    // Not by UDP sockets: the loop adjusts checksums, and theirs are not complete.
    let mut args = send_args("s0", &GROUP.to_string(), 20_000, 5_000).unwrap();
    args.backend = relay::lab::send::Backend::Xsk;
    let sent = send(&lab, &args).unwrap();
    let report = listener.wait().unwrap();
    assert_eq!((sent.sent, report.verdict, report.distinct), (5_000, Verdict::Pass, 5_000), "{report:?}");
    assert_eq!(report.ttls.into_iter().collect::<Vec<_>>(), [TTL]);
    assert_eq!(relay.relayed(), 5_000);
}

/// A receiver that misses datagrams, sees some twice or hears a stranger says so.
#[test]
fn a_receiver_fails_what_is_not_whole() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let listen = |count| Listener::on(&lab.relay, "r0", "239.5.5.5:7000", count).unwrap();
    let mut args = send_args("s0", "239.5.5.5:7000", 20_000, 100).unwrap();
    let listener = listen(None);
    send(&lab, &args).unwrap();
    args.first = 90;
    send(&lab, &args).unwrap();
    args.first = 200;
    send(&lab, &args).unwrap();
    let report = listener.finish().unwrap();
    assert_eq!((report.received, report.duplicated, report.lost, report.verdict), (300, 10, 10, Verdict::Fail), "{report:?}");

    let listener = listen(Some(1));
    lab.src
        .run(|| {
            let socket = std::net::UdpSocket::bind("10.0.0.1:0").unwrap();
            socket.set_multicast_ttl_v4(4).unwrap();
            socket.send_to(b"no datagram of ours", "239.5.5.5:7000").unwrap();
        })
        .unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let report = listener.finish().unwrap();
    assert_eq!((report.foreign, report.verdict), (1, Verdict::Fail));
}

/// A source-specific receiver gets its source and no other.
#[test]
fn joins_are_source_specific_where_asked() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    lab.src.ip_batch("addr add 10.0.0.77/24 dev s0\n").unwrap();
    let listener = Listener::on(&lab.relay, "r0", "10.0.0.77@232.1.1.1:7000", None).unwrap();
    let mut args = send_args("s0", "232.1.1.1:7000", 10_000, 50).unwrap();
    args.source = Some("10.0.0.1:7100".parse().unwrap());
    send(&lab, &args).unwrap();
    args.source = Some("10.0.0.77:7177".parse().unwrap());
    send(&lab, &args).unwrap();
    let report = listener.finish().unwrap();
    assert_eq!((report.received, report.verdict), (50, Verdict::Pass), "{report:?}");
    assert_eq!(report.sources.into_iter().collect::<Vec<_>>(), ["10.0.0.77:7177"]);
}

/// Two queues, IPv6, and a namespace for each sink.
#[test]
fn every_topology_carries_packets() {
    needs_root!();
    let lab = Lab::new(LabSpec { sinks: 3, separate_sinks: true, queues: 2, mtu: 9_000 }).unwrap();
    let queues = lab.relay.output("ip", &["-d", "link", "show", "r0"]).unwrap();
    assert!(queues.contains("numtxqueues 2") && queues.contains("numrxqueues 2") && queues.contains("mtu 9000"), "{queues}");
    for link in 1..=3 {
        let iface = format!("k{link}");
        let listener = Listener::on(lab.sink(link), &iface, "[ff3e::1234]:7000", Some(20)).unwrap();
        let args = send_args(&format!("r{link}"), "[ff3e::1234]:7000", 10_000, 20).unwrap();
        lab.relay.run(|| relay::lab::send::send(&args)).unwrap().unwrap();
        assert_eq!(listener.wait().unwrap().verdict, Verdict::Pass, "link {link}");
    }
}

/// Whether a process with this command line runs.
fn runs(command: &str) -> bool {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok()).any(|line| line == command.as_bytes())
}

/// Namespaces, and the processes in them, go when the maker is killed by any signal.
#[test]
fn nothing_is_left_behind() {
    needs_root!();
    if std::env::var_os("RELAY_LAB_TEST_CHILD").is_some() {
        let lab = Lab::simple().unwrap();
        #[expect(clippy::zombie_processes, reason = "it must outlive this process, which is killed")]
        let _inside = lab.relay.command("sleep").unwrap().arg(format!("30.{}", std::process::id())).spawn().unwrap();
        std::thread::sleep(Duration::from_secs(30));
        return;
    }
    for signal in ["INT", "TERM", "KILL"] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "nothing_is_left_behind", "--nocapture"]).env("RELAY_LAB_TEST_CHILD", "1").process_group(0);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let pid = child.id();
        let begin = Instant::now();
        while namespaces_of(pid) < 3 && begin.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let inside = format!("sleep\x0030.{pid}\0");
        while !runs(&inside) && begin.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(namespaces_of(pid) == 3 && runs(&inside), "the child built its laboratory");
        assert!(Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status().unwrap().success());
        child.wait().unwrap();
        let begin = Instant::now();
        while namespaces_of(pid) > 0 && begin.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(namespaces_of(pid), 0, "after SIG{signal}");
        assert!(!runs(&inside), "after SIG{signal} a process goes on in a dead laboratory");
    }
}

/// `relay recv` gives its verdict as the exit code, and JSON with the account.
#[test]
fn the_exit_code_of_recv_is_the_verdict() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    for (expected, code) in [(500, 0), (501, 5)] {
        let mut command = lab.relay.command(relay_bin().unwrap()).unwrap();
        command.args(["recv", "--json", "--iface", "r0", "--group", "239.5.5.5:7000", "--timeout", "1s", "--count", &expected.to_string()]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Joined once it says so.
        let mut line = String::new();
        BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
        let sent = send_in_background(&lab, &send_args("s0", "239.5.5.5:7000", 10_000, 500).unwrap()).unwrap().wait().unwrap();
        assert_eq!(sent.sent, 500);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((report["distinct"].as_u64(), report["lost"].as_u64()), (Some(500), Some(expected - 500)), "{report}");
    }
}
