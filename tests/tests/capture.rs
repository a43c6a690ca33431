//! `relay capture` (issue 6, 4): what workers carry and drop is in a pcapng file, before and after the rewrite, while a packet
//! socket on the same interface sees nothing; and forwarding never notices.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use relay::lab::recv::Verdict;
use relay_tests::paths::{Outside, Path, Waits, XSK_FUSED, only_lost, turn};
use relay_tests::process::wait_replaced;
use relay_tests::raw::Capture;
use relay_tests::{Lab, Listener, RelayProcess, needs_root, relay_bin, rule_stats, send, send_args};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// One module of three tests, one a path with workers, from each `fn(&Path)`.
macro_rules! on_workers_paths {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            relay_tests::on_path!(xsk_fused, $name, XSK_FUSED);
            relay_tests::on_path!(xsk_split, $name, XSK_SPLIT);
            relay_tests::on_path!(packet, $name, PACKET);
        }
    )+};
}

on_workers_paths!(a_hundred_of_a_hundred_before_and_after_the_rewrite, drops_have_their_reason);

/// A packet of a file.
#[derive(Clone, Debug)]
struct Seen {
    interface: String,
    point: &'static str,
    comment: String,
    bytes: Vec<u8>,
    len: u32,
}

impl Seen {
    /// Of an untagged IPv4 packet.
    fn ttl(&self) -> u8 {
        self.bytes[22]
    }

    fn dst(&self) -> String {
        format!(
            "{:?}:{}",
            std::net::Ipv4Addr::from(<[u8; 4]>::try_from(&self.bytes[30..34]).unwrap()),
            u16::from_be_bytes([self.bytes[36], self.bytes[37]])
        )
    }

    /// Sequence and pattern, without the time stamp.
    fn payload(&self) -> Vec<u8> {
        self.bytes[42..].to_vec()
    }
}

fn parse(bytes: &[u8]) -> Vec<Seen> {
    let mut reader = PcapNgReader::new(bytes).unwrap();
    let (mut interfaces, mut packets, mut unexpected) = (Vec::new(), Vec::new(), Vec::new());
    while let Some(block) = reader.next_block() {
        match block.unwrap() {
            Block::InterfaceDescription(block) => {
                let text = |find: fn(&InterfaceDescriptionOption<'_>) -> Option<String>| block.options.iter().find_map(find).unwrap();
                let name = text(|option| match option {
                    InterfaceDescriptionOption::IfName(name) => Some(name.to_string()),
                    _ => None,
                });
                let about = text(|option| match option {
                    InterfaceDescriptionOption::IfDescription(about) => Some(about.to_string()),
                    _ => None,
                });
                let points = [("before", "ingress"), ("after", "egress"), ("dropped", "drop")];
                interfaces.push((name, points.iter().find(|(word, _)| about.contains(word)).unwrap().1));
            }
            Block::EnhancedPacket(block) => {
                let comment = block.options.iter().find_map(|option| match option {
                    EnhancedPacketOption::Comment(comment) => Some(comment.to_string()),
                    _ => None,
                });
                let (interface, point) = interfaces[block.interface_id as usize].clone();
                let (comment, bytes) = (comment.unwrap(), block.data.to_vec());
                packets.push(Seen { interface, point, comment, bytes, len: block.original_len });
            }
            other => unexpected.push(other.into_owned()),
        }
    }
    assert!(unexpected.is_empty(), "{unexpected:?}");
    packets
}

/// A `relay capture` that runs; killed when dropped.
struct Capturing {
    child: Child,
    stderr: BufReader<ChildStderr>,
    notes: String,
    file: PathBuf,
    _folder: tempfile::TempDir,
}

impl Capturing {
    /// Starts it and waits until packets are captured.
    fn start(relay: &RelayProcess, args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("test.pcapng");
        let mut command = Command::new(relay_bin().unwrap());
        command.args(["capture", "--json", "-w"]).arg(&file).args(args).arg("--socket").arg(relay.socket());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut notes = String::new();
        while !notes.contains("capture: capturing") {
            assert!(stderr.read_line(&mut notes).unwrap() > 0, "it ended: {notes}");
        }
        Self { child, stderr, notes, file, _folder: folder }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for its end; summary and packets.
    fn wait(mut self) -> (Value, Vec<Seen>) {
        let mut summary = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut summary).unwrap();
        self.stderr.read_to_string(&mut self.notes).unwrap();
        assert!(self.child.wait().unwrap().success(), "{}", self.notes);
        let packets = parse(&std::fs::read(&self.file).unwrap());
        assert_tshark_agrees(&self.file, &packets);
        let summary: Value = serde_json::from_str(&summary).unwrap();
        assert_eq!((summary["packets"].as_u64(), summary["malformed"].as_u64()), (Some(packets.len() as u64), Some(0)), "{summary}");
        (summary, packets)
    }

    /// ^C, then the same, once the workers have had their time.
    fn finish(self) -> (Value, Vec<Seen>) {
        std::thread::sleep(Duration::from_millis(150));
        self.signal(Signal::SIGINT);
        self.wait()
    }
}

impl Drop for Capturing {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The other reader of pcapng files sees the same packets, comments and interfaces.
fn assert_tshark_agrees(file: &std::path::Path, packets: &[Seen]) {
    let fields = ["frame.interface_name", "frame.comment", "frame.len", "frame.cap_len"];
    let fields = fields.iter().flat_map(|field| ["-e", *field]);
    let output = match Command::new("tshark").arg("-n").arg("-r").arg(file).args(["-T", "fields"]).args(fields).output() {
        Ok(output) => output,
        Err(error) => return eprintln!("SKIPPED: tshark: {error}; the file was read by a library alone"),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = text.lines().collect();
    let wanted: Vec<String> =
        packets.iter().map(|packet| format!("{}\t{}\t{}\t{}", packet.interface, packet.comment, packet.len, packet.bytes.len())).collect();
    assert!(output.status.success() && lines == wanted, "{}\n{text}", String::from_utf8_lossy(&output.stderr));
}

/// `relay capture ARGS -w FILE` that is to end by itself: its output, and whether the file is there.
fn refused(relay: &RelayProcess, args: &[&str]) -> (Output, bool) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("none.pcapng");
    let output = relay.client(&[&["capture", "-w", file.to_str().unwrap()], args].concat(), true).unwrap();
    (output, file.exists())
}

fn await_sent(relay: &RelayProcess, id: &str, output: usize, count: u64) {
    let begin = Instant::now();
    while rule_stats(&relay.stats().unwrap(), id).unwrap()["outputs"][output]["tx_packets"] != count {
        assert!(begin.elapsed() < Duration::from_secs(5), "{}", relay.stats().unwrap());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn at<'a>(packets: &'a [Seen], point: &str, word: &str) -> Vec<&'a Seen> {
    packets.iter().filter(|packet| packet.point == point && packet.comment.contains(word)).collect()
}

fn a_hundred_of_a_hundred_before_and_after_the_rewrite(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000, r1 239.9.9.8:6001 ttl=keep; id=a"]).unwrap();
    let tcpdump = Capture::on(&lab.relay, "r0", &[]).unwrap();
    let capture = Capturing::start(&relay, &["--count", "300"]);
    send(&lab, &send_args("s0", "239.1.1.1:5000", 1_000, 100).unwrap()).unwrap();
    let (summary, packets) = capture.wait();
    assert_eq!((&summary["left_out"], &summary["overrun"]), (&0.into(), &0.into()), "{summary}");
    let before = at(&packets, "ingress", "rule=a fate=forwarded outputs=2/2 worker=0");
    let [first, second] = ["output=0 fate=forwarded to=r1 239.9.9.9:6000", "output=1 fate=forwarded to=r1 239.9.9.8:6001"]
        .map(|word| at(&packets, "egress", word));
    assert_eq!([before.len(), first.len(), second.len()], [100; 3]);
    for ((before, first), second) in before.iter().zip(&first).zip(&second) {
        assert_eq!((before.interface.as_str(), before.ttl(), before.dst().as_str()), ("r0", 16, "239.1.1.1:5000"));
        assert_eq!((first.interface.as_str(), first.ttl(), first.dst().as_str()), ("r1", 15, "239.9.9.9:6000"));
        assert_eq!((second.interface.as_str(), second.ttl(), second.dst().as_str()), ("r1", 16, "239.9.9.8:6001"));
        assert!(before.payload() == first.payload() && before.payload() == second.payload());
        assert!(before.bytes.len() == 106 && before.len == 106, "{before:?}");
        let number = |seen: &Seen| seen.comment.rsplit_once("packet=").unwrap().1.to_owned();
        assert!(number(before) == number(first) && number(before) == number(second));
    }
    let payloads: std::collections::BTreeSet<Vec<u8>> = before.iter().map(|packet| packet.payload()).collect();
    assert_eq!(payloads.len(), 100, "each of them once");
    if path.path == "xsk" {
        assert_eq!(tcpdump.frames().len(), 0, "what a packet socket sees of it");
    }
}

/// One output's TTL is used up, the other goes on; a packet that no output gets; a rule that was not asked for.
fn drops_have_their_reason(path: &Path) {
    let lab = Lab::simple().unwrap();
    let rules = ["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep, r1 239.9.9.8:6000; id=a", "r0 239.1.1.2:5000 -> r1; id=b"];
    let relay = path.start(&lab, &rules).unwrap();
    let (drops, all) = (Capturing::start(&relay, &["--rule", "a", "--at", "drop"]), Capturing::start(&relay, &["--snaplen", "60"]));
    for group in ["239.1.1.1:5000", "239.1.1.2:5000"] {
        let mut args = send_args("s0", group, 1_000, 20).unwrap();
        args.ttl = 1;
        send(&lab, &args).unwrap();
    }
    await_sent(&relay, "a", 0, 20);
    let (_, drops) = drops.finish();
    let word = "rule=a output=1 fate=dropped reason=ttl_expired to=r1 239.9.9.8:6000";
    assert_eq!((at(&drops, "drop", word).len(), drops.len()), (20, 20), "{drops:?}");
    assert!(drops.iter().all(|packet| packet.interface == "r0" && packet.ttl() == 1 && packet.bytes.len() == 106));
    // The other capture of the same packets has its own filter and its own length.
    let (_, all) = all.finish();
    assert_eq!(at(&all, "ingress", "rule=a fate=forwarded outputs=1/2").len(), 20);
    assert_eq!(at(&all, "ingress", "rule=b fate=dropped outputs=0/1").len(), 20);
    assert_eq!(at(&all, "drop", "rule=b output=0 fate=dropped reason=ttl_expired").len(), 20);
    assert_eq!((at(&all, "drop", "rule=a").len(), at(&all, "egress", "").len(), all.len()), (20, 20, 100));
    assert!(all.iter().all(|packet| packet.bytes.len() == 60 && packet.len == 106));
}

/// A reader that stops costs the traffic nothing; what it missed is counted, to the packet.
#[test]
fn a_reader_that_stops_costs_nothing_and_is_told() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = XSK_FUSED.start(&lab, &["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000, r1 239.9.9.8:6000; id=a"]).unwrap();
    const COUNT: u64 = 20_000;
    for attempt in 0.. {
        let capture = Capturing::start(&relay, &["--snaplen", "96"]);
        capture.signal(Signal::SIGSTOP);
        let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", Some(COUNT)).unwrap();
        send(&lab, &send_args("s0", "239.1.1.1:5000", 40_000, COUNT).unwrap()).unwrap();
        let report = listener.wait().unwrap();
        capture.signal(Signal::SIGCONT);
        let (summary, packets) = capture.finish();
        let missed = [&summary["overrun"], &summary["left_out"]].map(|count| count.as_u64().unwrap());
        if report.lost > 0 && attempt < 3 {
            eprintln!("once more: {} lost", report.lost);
            continue;
        }
        assert_eq!((report.received, report.lost, report.duplicated), (COUNT, 0, 0));
        assert!(missed[0] > 0 && packets.len() > 1_000, "{summary}");
        // Three records for each packet, but one where a whole packet is left out.
        if missed[1] == 0 {
            assert_eq!(packets.len() as u64 + missed[0], 3 * COUNT, "{summary}");
        }
        break;
    }
}

/// The worker dies and is replaced: the capture goes on, and nothing of it is left behind at the end.
#[test]
fn a_capture_outlives_the_worker_and_leaves_nothing() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = XSK_FUSED.start(&lab, &["r0 239.1.1.1:5000 -> r1; id=a"]).unwrap();
    let taps = || {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", relay.pid())).unwrap().flatten();
        let links = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        links.filter(|link| link.to_string_lossy().contains("relay-tap")).count()
    };
    assert_eq!(taps(), 1, "one worker");
    let capture = Capturing::start(&relay, &["--at", "ingress"]);
    let burst = || send(&lab, &send_args("s0", "239.1.1.1:5000", 2_000, 100).unwrap()).unwrap();
    burst();
    await_sent(&relay, "a", 0, 100);
    let old = relay.worker_pids().unwrap();
    old.iter().for_each(|pid| kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap());
    wait_replaced(&relay, &old, Duration::from_secs(5)).unwrap();
    burst();
    await_sent(&relay, "a", 0, 200);
    // A planned replacement, and a rule that comes meanwhile, seen under its name.
    relay.command(&["rule", "add", "r0 239.1.1.3:5000 -> r1 239.7.7.7:7000; id=late"]).unwrap();
    send(&lab, &send_args("s0", "239.1.1.3:5000", 2_000, 50).unwrap()).unwrap();
    await_sent(&relay, "late", 0, 50);
    let (summary, packets) = capture.finish();
    assert_eq!((at(&packets, "ingress", "rule=a ").len(), at(&packets, "ingress", "rule=late ").len()), (200, 50), "{summary}");
    // A client that is killed has no chance to say so.
    let capture = Capturing::start(&relay, &[]);
    drop(capture);
    burst();
    await_sent(&relay, "a", 0, 300);
    assert_eq!(taps(), 1, "what was handed out is closed here");
    assert_eq!(relay.status().unwrap()["workers"][0]["restarts"], 1);
}

fn path_of(relay: &RelayProcess, id: &str) -> String {
    let rules = relay.rules().unwrap();
    let rule = rules.as_array().unwrap().iter().find(|rule| rule["id"] == id).unwrap().clone();
    rule["path"].as_str().unwrap().to_owned()
}

/// A worker carries a rule of the kernel path while it is captured, and the program does again afterwards; no packet is lost or
/// doubled on the way there and back. A rule that insists on the path stays there.
#[test]
fn a_worker_carries_what_is_to_be_seen() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let rules = ["r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=k", "r0 239.1.1.2:5000 -> r1 239.9.9.8:6000; id=insists path=kernel"];
    let args: Vec<&str> = rules.iter().flat_map(|rule| ["--rule", *rule]).collect();
    let relay = relay_tests::start_relay(&lab, &args).unwrap();
    assert_eq!(path_of(&relay, "k"), "kernel");
    for (args, hint) in [(&["--rule", "k"][..], "--by-worker"), (&["--rule", "insists", "--by-worker"], "path=xsk")] {
        let (output, exists) = refused(&relay, args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && !exists && text.contains("kernel path") && text.contains(hint), "{args:?}: {text}");
    }
    const COUNT: u64 = 1500;
    for attempt in 0.. {
        let (waits, outside) = (Waits::of(&relay).unwrap(), Outside::of(&lab, &relay, "k").unwrap());
        let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", Some(COUNT)).unwrap();
        let seen = std::thread::scope(|scope| {
            let sending = scope.spawn(|| send(&lab, &send_args("s0", "239.1.1.1:5000", 1_000, COUNT).unwrap()).unwrap());
            std::thread::sleep(Duration::from_millis(300));
            let seen = Capturing::start(&relay, &["--rule", "k", "--by-worker", "--at", "egress", "--count", "100"]).wait().1;
            sending.join().unwrap();
            seen
        });
        assert!(seen.len() == 100 && seen.iter().all(|packet| packet.dst() == "239.9.9.9:6000"), "{seen:?}");
        let report = listener.wait().unwrap();
        let begin = Instant::now();
        while path_of(&relay, "k") != "kernel" {
            assert!(begin.elapsed() < Duration::from_secs(10), "{}", relay.rules().unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
        let is_spoiled = report.verdict == Verdict::Void || only_lost(&report, outside.lost(&relay).unwrap());
        if report.lost > 0 && (is_spoiled || waits.starved(&relay).unwrap().is_some()) && attempt < 4 {
            eprintln!("once more: {} lost", report.lost);
            continue;
        }
        assert_eq!((report.lost, report.duplicated, report.corrupted), (0, 0, 0), "{report:?}");
        break;
    }
    assert_eq!(path_of(&relay, "insists"), "kernel");
}

#[test]
fn what_cannot_be_captured_is_refused_by_name() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let rules = ["r0 239.1.1.1:5000 -> r1; id=k path=kernel", "r0 239.1.1.2:5000 -> r1; id=x path=xsk"];
    let args: Vec<&str> = rules.iter().flat_map(|rule| ["--rule", *rule]).collect();
    let relay = relay_tests::start_relay(&lab, &args).unwrap();
    for (args, words) in [
        (&["--rule", "k"][..], ["rule k is on the kernel path", "path=xsk"]),
        (&["--rule", "none"], ["no rule none", "rule list"]),
        (&["--at", "egres"], ["--at", "ingress, egress or drop"]),
        (&["--snaplen", "4"], ["--snaplen", "14"]),
    ] {
        let (output, exists) = refused(&relay, args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && !exists && words.iter().all(|word| text.contains(word)), "{args:?}: {output:?}");
    }
    let directory = relay.client(&["capture", "-w", "/no/such/place.pcapng"], false).unwrap();
    assert!(directory.status.code() == Some(2) && String::from_utf8_lossy(&directory.stderr).contains("/no/such/place"), "{directory:?}");
    let capture = Capturing::start(&relay, &["--count", "10"]);
    assert!(capture.notes.contains("not seen, because on the kernel path: k;"), "{}", capture.notes);
    for group in ["239.1.1.1:5000", "239.1.1.2:5000"] {
        send(&lab, &send_args("s0", group, 1_000, 20).unwrap()).unwrap();
    }
    let (summary, packets) = capture.wait();
    assert_eq!((summary["unseen"].as_u64(), packets.len(), at(&packets, "egress", "rule=x").len()), (Some(1), 10, 5), "{packets:?}");
}

/// `-w -`: the file on stdout, as it grows; a reader that goes away is an end like any other.
#[test]
fn stdout_is_a_file_too() {
    needs_root!();
    let _turn = turn();
    let lab = Lab::simple().unwrap();
    let relay = XSK_FUSED.start(&lab, &["r0 239.1.1.1:5000 -> r1; id=a"]).unwrap();
    let command = |args: &[&str]| {
        let mut command = Command::new(relay_bin().unwrap());
        command.args(["capture", "-w", "-"]).args(args).arg("--socket").arg(relay.socket());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut ends = command(&["--duration", "300ms"]);
    let mut bytes = Vec::new();
    ends.stdout.take().unwrap().read_to_end(&mut bytes).unwrap();
    assert!(ends.wait().unwrap().success() && parse(&bytes).is_empty(), "interfaces and no packet");
    let mut left = command(&[]);
    let mut stderr = BufReader::new(left.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    drop(left.stdout.take());
    send(&lab, &send_args("s0", "239.1.1.1:5000", 1_000, 20).unwrap()).unwrap();
    assert!(left.wait().unwrap().success(), "{line}");
}
