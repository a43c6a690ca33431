//! The binary as scripts meet it: exit codes, error shapes, JSON keys. The daemon is a thread of the test with canned answers.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

use relay::control::message::*;
use relay::control::server::Server;
use serde_json::Value;
use std::fs;
use std::io::{self, BufRead};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A daemon that answers from a table until it is dropped.
struct Daemon {
    directory: TempDir,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    fn start(answer: fn(Request) -> Response) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let mut server = Server::bind(&directory.path().join("relay.sock")).unwrap();
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                server.turn(Instant::now(), &mut |_, request| Some(answer(request)));
                thread::sleep(Duration::from_millis(1));
            }
        });
        Self { directory, stop, thread: Some(thread) }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("relay.sock")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn answer(request: Request) -> Response {
    match request {
        Request::RuleAdd { rule } if rule.contains("239.9.9.9") => refusal(2, "match exists: use apply", "match"),
        Request::RuleAdd { .. } => Response::Done("r1".into()),
        Request::RuleDel { id } if id == "r1" => Response::Done(id),
        Request::RuleDel { id } => refusal(2, &format!("no rule has the id {id}"), "id"),
        Request::RuleList => Response::Rules(vec![rule_info()]),
        Request::Status => Response::Status(Box::new(status())),
        Request::Stats => Response::Stats(Box::new(stats())),
        Request::Channels => Response::Channels(Box::new(channels())),
        Request::Apply { rules, .. } if rules.len() == 1 => Response::Changes(Changes { unchanged: 1, ..Changes::default() }),
        Request::Apply { rules, .. } => Response::Changes(Changes { added: rules, removed: vec!["old".into()], unchanged: 0 }),
        Request::RuleSave { file: Some(file) } => Response::Done(file),
        Request::RuleSave { file: None } => refusal(2, "the daemon has no --config", "file"),
        Request::Capture { .. } | Request::CaptureEnd { .. } => refusal(2, "no rule a", "--rule"),
        Request::Shutdown => refusal(4, "degraded", ""),
    }
}

fn refusal(code: u8, message: &str, field: &str) -> Response {
    Response::Error(ErrorBody { code, message: message.into(), field: field.into(), hint: "a hint".into() })
}

fn rule_info() -> RuleInfo {
    RuleInfo {
        id: "r1".into(),
        rule: "eth0 239.1.1.1:5000 -> eth1".into(),
        path: "xsk".into(),
        engine: "tx".into(),
        reason: "a rewrite per output".into(),
        joined: true,
        ..RuleInfo::default()
    }
}

fn status() -> Status {
    Status { interfaces: vec![InterfaceInfo::default()], workers: vec![WorkerInfo::default()], ..Status::default() }
}

fn stats() -> Stats {
    let rule = RuleStats { outputs: vec![OutputStats::default()], ..RuleStats::default() };
    Stats { interfaces: vec![InterfaceStats::default()], rules: vec![rule], frames: FrameStats::default(), latency: Vec::new() }
}

fn channels() -> Channels {
    Channels { channels: vec![ChannelInfo::default()], segments: vec![SegmentInfo::default()] }
}

/// Runs the binary without anything of this test's environment that it would heed.
fn relay(socket: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_relay"));
    for variable in ["RUST_LOG", "NO_COLOR", "RELAY_WORKER_ID"] {
        command.env_remove(variable);
    }
    command.env("RELAY_SOCKET", socket).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn words(arguments: &str) -> Vec<&str> {
    arguments.split('|').filter(|word| !word.is_empty()).collect()
}

/// Exit code, nothing on stdout, one error line; with --json one object of exactly four keys.
fn assert_fails(socket: &Path, arguments: &str, code: i32, field: &str) {
    let plain = relay(socket, &words(arguments));
    let stderr = String::from_utf8(plain.stderr).unwrap();
    assert_eq!(plain.status.code(), Some(code), "relay {arguments}: {stderr}");
    assert!(plain.stdout.is_empty(), "relay {arguments}: facts of a failure");
    let lines: Vec<&str> = stderr.lines().collect();
    assert!(lines.first().is_some_and(|line| line.starts_with("error: ")), "relay {arguments}: {stderr}");
    assert!(lines.len() == 1, "relay {arguments}: {stderr}");

    let json = relay(socket, &[&["--json"], words(arguments).as_slice()].concat());
    let stderr = String::from_utf8(json.stderr).unwrap();
    assert_eq!(json.status.code(), Some(code), "relay --json {arguments}: {stderr}");
    let body: Value = serde_json::from_str(&stderr).unwrap_or_else(|error| panic!("relay --json {arguments}: {error}: {stderr}"));
    assert_eq!(keys(&body), ["error"], "relay --json {arguments}");
    assert_eq!(keys(&body["error"]), ["code", "field", "hint", "message"], "relay --json {arguments}");
    assert_eq!(body["error"]["code"], code, "relay --json {arguments}");
    assert_eq!(body["error"]["field"], field, "relay --json {arguments}: {stderr}");
    assert!(!body["error"]["message"].as_str().unwrap().is_empty());
}

fn keys(value: &Value) -> Vec<String> {
    let mut keys: Vec<String> = value.as_object().map(|object| object.keys().cloned().collect()).unwrap_or_default();
    keys.sort();
    keys
}

fn assert_keys(value: &Value, wanted: &str) {
    let keys = keys(value);
    for key in wanted.split(' ') {
        assert!(keys.iter().any(|have| have == key), "{key} is missing among {keys:?}");
    }
}

/// REQUIREMENTS 002.9, 002.16: bad input is exit code 2 and says which argument.
#[test]
fn req_002_9_bad_arguments_are_exit_code_2() {
    let nowhere = Path::new("/nonexistent/relay.sock");
    let cases = [
        ("bogus", "bogus"),
        ("status|--bogus", "--bogus"),
        ("rule|add", "RULE"),
        ("rule|del", "ID"),
        ("check", "FILE"),
        ("send|--iface|lo", "--to"),
        ("send|--iface|lo|--to|239.1.1.1", "--to"),
        ("send|--iface|lo|--to|239.1.1.1:5000|--ttl|0", "--ttl"),
        ("send|--iface|nonexistent0|--to|239.1.1.1:5000", ""),
        ("recv|--iface|lo|--group|239.1.1.1", "--group"),
        ("recv|--iface|nonexistent0|--group|239.1.1.1:5000", ""),
        ("bench|sideways", "sideways"),
        ("bench|fanout|--fanout|1,65", "--fanout"),
        ("bench|path|--rounds|0", "--rounds"),
        ("run|--workers|0", "--workers"),
        ("run|--workers|65", "--workers"),
        ("run|--workers|two", "--workers"),
        ("run|--backend|magic", "--backend"),
        ("run|--xdp-mode|offload", "--xdp-mode"),
        ("run|--zero-copy|maybe", "--zero-copy"),
        ("run|--pipeline|twisted", "--pipeline"),
        ("run|--wait|sleep", "--wait"),
        ("run|--partition|fair", "--partition"),
        ("run|--linger|5", "--linger"),
        ("run|--linger=-5s", "--linger"),
        ("run|--heartbeat|0", "--heartbeat"),
        ("run|--frames|1000", "--frames"),
        ("run|--frames|4294967296", "--frames"),
        ("run|--metrics|nine", "--metrics"),
        ("run|--cpus|2-1", "--cpus"),
        ("run|--cpus|1023", "--cpus"),
        ("run|--cpus|0,1024", "--cpus"),
        ("completions|tcsh", "SHELL"),
        ("man|/proc/nonexistent", "DIR"),
        ("check|/nonexistent.toml", "FILE"),
        ("apply|/nonexistent.toml", "FILE"),
    ];
    for (arguments, field) in cases {
        assert_fails(nowhere, arguments, 2, field);
    }
}

/// REQUIREMENTS 002.9: no daemon is exit code 3 for every command that needs one.
#[test]
fn req_002_9_no_daemon_is_exit_code_3() {
    let directory = tempfile::tempdir().unwrap();
    let dead = directory.path().join("dead.sock");
    drop(UnixListener::bind(&dead).unwrap());
    for socket in [&dead, &directory.path().join("absent.sock")] {
        for arguments in
            ["status", "stats", "rule|list", "rule|del|x", "rule|explain|x", "rule|save", "rule|add|eth0 239.1.1.1:5000 -> eth1"]
        {
            assert_fails(socket, arguments, 3, "--socket");
        }
    }
    assert_fails(&directory.path().join("x".repeat(120)), "status", 2, "--socket");
}

/// REQUIREMENTS 002.9: what the daemon refuses has the code that the daemon says.
#[test]
fn req_002_9_the_daemons_refusals_are_passed_on() {
    let daemon = Daemon::start(answer);
    assert_fails(&daemon.socket(), "rule|del|unknown", 2, "id");
    assert_fails(&daemon.socket(), "rule|explain|unknown", 2, "ID");
    assert_fails(&daemon.socket(), "rule|save", 2, "file");
    assert_fails(&daemon.socket(), "rule|add|eth0 239.9.9.9:5000 -> eth1", 2, "match");
}

#[test]
fn facts_are_on_stdout_and_exit_code_is_0() {
    let daemon = Daemon::start(answer);
    let cases = [
        ("status", "WORKER"),
        ("stats", "frames: 0 = none"),
        ("channels", "OVERRUNS"),
        ("rule|list", "eth0 239.1.1.1:5000 -> eth1"),
        ("rule|explain|r1", "path xsk, engine tx: a rewrite per output"),
        ("rule|del|r1", "r1"),
        ("rule|add|eth0 239.1.1.1:5000 -> eth1", "r1"),
        ("rule|save|here.toml", "/here.toml"),
        ("completions|zsh", "#compdef relay"),
        ("--help", "Usage: relay"),
        ("run|--help", "--worker-user"),
        ("--version", env!("CARGO_PKG_VERSION")),
    ];
    for (arguments, says) in cases {
        let output = relay(&daemon.socket(), &words(arguments));
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "relay {arguments}");
        assert!(stdout.contains(says), "relay {arguments}: {stdout}");
        assert!(output.stderr.is_empty(), "relay {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(!stdout.contains('\u{1b}'), "relay {arguments}: colours without a terminal");
    }
}

#[test]
fn json_has_the_keys_of_the_contract() {
    let daemon = Daemon::start(answer);
    let json = |arguments: &str| -> Value {
        let output = relay(&daemon.socket(), &[words(arguments).as_slice(), &["--json"]].concat());
        assert_eq!(output.status.code(), Some(0), "relay {arguments}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let status = json("status");
    assert_keys(&status, "version supervisor interfaces workers rules epoch");
    assert_keys(&status["supervisor"], "pid uptime_ms capabilities");
    assert_keys(&status["interfaces"][0], "name backend reason driver queues");
    assert_keys(&status["workers"][0], "id pid state cpu restarts last_exit heartbeat_age_ms");
    assert_keys(&json("rule|list")[0], "id rule path engine reason joined query_age_ms pending loop_suspected");
    let channels = json("channels");
    assert_keys(&channels, "channels segments");
    assert_keys(&channels["channels"][0], "name kind worker memory_bytes capacity depth high_water sent received dropped overruns");
    assert_keys(&channels["segments"][0], "name worker memory_bytes");
    let stats = json("stats");
    assert_keys(&stats, "interfaces rules frames");
    assert_keys(&stats["interfaces"][0], "name rx_packets rx_bytes passed drops");
    assert_keys(&stats["rules"][0], "id rx_packets rx_bytes drops outputs");
    assert_keys(&stats["rules"][0]["outputs"][0], "index egress to tx_packets tx_bytes drops");
    assert_keys(&stats["frames"], "total free fill rx egress return tx completion hand kernel lost_invalid");
}

const ONE_RULE: &str = r#"
version = 1
[[rule]]
id = "itch-a"
ingress = "eth0"
match = "239.1.1.1:5000"
[[rule.output]]
egress = "eth1"
"#;

#[test]
fn check_needs_nothing_and_says_where_a_file_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("relay.toml");
    let name = file.to_str().unwrap();
    let nowhere = Path::new("/nonexistent.sock");
    fs::write(&file, ONE_RULE).unwrap();
    let valid = relay(nowhere, &["check", name]);
    assert_eq!(String::from_utf8(valid.stdout).unwrap(), format!("{name}: valid, 1 rule\n"));
    let valid = relay(nowhere, &["check", name, "--json"]);
    assert_eq!(serde_json::from_slice::<Value>(&valid.stdout).unwrap()["rules"], 1);
    fs::write(&file, ONE_RULE.replace("egress =", "egres =")).unwrap();
    assert_fails(nowhere, &format!("check|{name}"), 2, "egres");
    assert_fails(nowhere, &format!("apply|{name}"), 2, "egres");
    assert_fails(nowhere, &format!("run|--config|{name}"), 2, "egres");
    let wrong = relay(nowhere, &["check", name]);
    let stderr = String::from_utf8(wrong.stderr).unwrap();
    assert!(stderr.starts_with(&format!("error: {name}:8:1: egres: ")) && stderr.contains("egress"), "{stderr}");
    fs::write(&file, [0xff, 0xfe]).unwrap();
    assert_fails(nowhere, &format!("check|{name}"), 2, "FILE");
    assert_fails(nowhere, &format!("check|{}", directory.path().display()), 2, "FILE");
}

#[test]
fn wrong_rules_are_refused_before_anybody_is_asked() {
    let daemon = Daemon::start(|request| panic!("asked: {request:?}"));
    let cases = [("eth0 239.1.1.1:5000 -> eth1 ttl=999", "ttl"), ("eth0 239.1.1.1:5000 -> eth0", "egress"), ("nonsense", "match")];
    for (rule, field) in cases {
        assert_fails(&daemon.socket(), &format!("rule|add|{rule}"), 2, field);
        assert_fails(&daemon.socket(), &format!("run|--rule|{rule}"), 2, field);
    }
    assert_fails(&daemon.socket(), "run|--rule|a 239.1.1.1:5 -> b|--rule|a 239.1.1.1:5 -> c", 2, "match");
}

#[test]
fn diff_is_a_verdict_and_apply_is_not() {
    let daemon = Daemon::start(answer);
    let file = daemon.directory.path().join("relay.toml");
    let name = file.to_str().unwrap();
    let second = ONE_RULE.replace("version = 1", "").replace("itch-a", "itch-b").replace("239.1.1.1", "239.1.1.2");
    fs::write(&file, format!("{ONE_RULE}{second}")).unwrap();
    for (arguments, code) in [(["diff", name].as_slice(), 5), (&["apply", name], 0), (&["apply", name, "--dry-run"], 0)] {
        let output = relay(&daemon.socket(), arguments);
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        assert!(
            stdout.starts_with("- old\n+ eth0 239.1.1.1:5000 -> eth1") && stdout.ends_with("2 rules added, 1 rule removed, 0 unchanged\n"),
            "{stdout}"
        );
        assert!(output.stderr.is_empty());
    }
    fs::write(&file, ONE_RULE).unwrap();
    let same = relay(&daemon.socket(), &["diff", name, "--json"]);
    assert_eq!(same.status.code(), Some(0));
    assert_keys(&serde_json::from_slice(&same.stdout).unwrap(), "added removed unchanged");
}

/// The largest set that is promised goes through the socket in one request.
#[test]
fn ten_thousand_rules_are_applied_at_once() {
    let daemon = Daemon::start(|request| match request {
        Request::Apply { rules, .. } => Response::Changes(Changes { unchanged: rules.len() as u64, ..Changes::default() }),
        other => panic!("not asked for: {other:?}"),
    });
    let file = daemon.directory.path().join("relay.toml");
    let rule = |number: u32| {
        let group = format!("239.{}.{}.{}", 1 + number / 65_536, number / 256 % 256, number % 256);
        format!(
            "[[rule]]\nid = \"channel-{number}\"\ningress = \"enp129s0f0\"\nmatch = \"10.1.0.0/16@{group}:50000\"\n\
             [[rule.output]]\negress = \"enp129s0f1\"\nto = \"239.200.{}.{}:50000\"\nttl = \"keep\"\ndscp = 46\n",
            number / 256 % 256,
            number % 256
        )
    };
    let text: String = std::iter::once("version = 1\n".to_owned()).chain((0..10_000).map(rule)).collect();
    fs::write(&file, text).unwrap();
    let output = relay(&daemon.socket(), &["apply", file.to_str().unwrap()]);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(stdout, "0 rules added, 0 rules removed, 10000 unchanged\n", "{}", String::from_utf8_lossy(&output.stderr));
}

/// A datagram from here to here, and one that never comes.
#[test]
fn the_verdict_of_recv_is_its_exit_code() {
    let nowhere = Path::new("/nonexistent.sock");
    let arguments = "recv|--iface|lo|--group|127.0.0.1:45671|--count|3|--timeout|5s|--json";
    let mut receiving = Command::new(env!("CARGO_BIN_EXE_relay"));
    let mut receiving = receiving.args(words(arguments)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    io::BufReader::new(receiving.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "listening on lo\n");
    let sent = relay(nowhere, &words("send|--iface|lo|--to|127.0.0.1:45671|--count|3|--rate|0|--json"));
    assert_eq!(sent.status.code(), Some(0), "{}", String::from_utf8_lossy(&sent.stderr));
    let received = receiving.wait_with_output().unwrap();
    let report: Value = serde_json::from_slice(&received.stdout).unwrap();
    assert_eq!((received.status.code(), &report["verdict"]), (Some(0), &Value::from("pass")), "{report}");
    let silent = relay(nowhere, &words("recv|--iface|lo|--group|127.0.0.1:45672|--count|1|--timeout|200ms|--json"));
    let report: Value = serde_json::from_slice(&silent.stdout).unwrap();
    assert_eq!((silent.status.code(), &report["verdict"]), (Some(5), &Value::from("fail")), "{report}");
}

#[test]
fn the_socket_argument_is_stronger_than_the_environment() {
    let daemon = Daemon::start(answer);
    let socket = daemon.socket();
    let socket = socket.to_str().unwrap();
    assert_eq!(relay(Path::new("/nonexistent.sock"), &["--socket", socket, "status"]).status.code(), Some(0));
    assert_eq!(relay(Path::new("/nonexistent.sock"), &["status", "--socket", socket]).status.code(), Some(0));
}

#[test]
fn a_wrong_rust_log_is_named() {
    let output = Command::new(env!("CARGO_BIN_EXE_relay")).args(["--json", "status"]).env("RUST_LOG", "a=b=c").output().unwrap();
    let body: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!((output.status.code(), &body["error"]["field"]), (Some(2), &Value::from("RUST_LOG")));
}

#[test]
fn a_reader_that_has_gone_is_no_error_but_a_full_disk_is() {
    let run = |stdout: Stdio| Command::new(env!("CARGO_BIN_EXE_relay")).args(["completions", "bash"]).stdout(stdout).output().unwrap();
    let (reading, writing) = io::pipe().unwrap();
    drop(reading);
    let output = run(writing.into());
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
    let full = run(fs::OpenOptions::new().write(true).open("/dev/full").unwrap().into());
    assert_eq!(full.status.code(), Some(1));
}

#[test]
fn manual_pages_are_written() {
    let directory = tempfile::tempdir().unwrap();
    let pages = directory.path().join("man");
    let output = relay(Path::new("/nonexistent.sock"), &["man", pages.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0));
    for page in ["relay.1", "relay-run.1", "relay-rule-add.1"] {
        assert!(fs::read_to_string(pages.join(page)).unwrap().contains(".TH"), "{page}");
    }
}

/// REQUIREMENTS 000.6: another user is refused by the mode of the socket, and by the daemon itself where the mode was widened.
#[test]
fn req_000_6_another_user_is_refused() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let daemon = Daemon::start(answer);
    fs::set_permissions(daemon.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let binary = daemon.directory.path().join("relay");
    fs::copy(env!("CARGO_BIN_EXE_relay"), &binary).unwrap();
    for mode in [0o600, 0o666] {
        fs::set_permissions(daemon.socket(), fs::Permissions::from_mode(mode)).unwrap();
        let mut command = Command::new(&binary);
        let output = command.args(["--json", "status"]).env("RELAY_SOCKET", daemon.socket()).uid(65_534).gid(65_534).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "mode {mode:o}: {stderr}");
        assert!(stderr.contains("permission denied at"), "mode {mode:o}: {stderr}");
    }
}
