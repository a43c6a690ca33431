//! `relay send --replay`: what `relay capture` saw is sent again as it was, at its own pace or another, and what is no capture is
//! refused before a single frame goes out.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use pcap_file::pcap::{PcapPacket, PcapWriter};
use relay_tests::raw::Datagram;
use relay_tests::{Lab, Listener, RelayProcess, needs_root, relay_bin, send, send_args, start_relay};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

const RULE: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a";
const COUNT: u64 = 200;

/// `relay send --iface s0 --replay FILE ARGS` in the sender's namespace.
fn replay(lab: &Lab, file: &Path, args: &[&str]) -> Output {
    let mut command = lab.src.command(relay_bin().unwrap()).unwrap();
    command.args(["send", "--iface", "s0", "--json", "--replay"]).arg(file).args(args).output().unwrap()
}

fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// 200 datagrams at 1000 a second, as the relay's workers took them.
fn captured(lab: &Lab, relay: &RelayProcess, folder: &Path) -> PathBuf {
    let file = folder.join("ours.pcapng");
    let mut command = lab.relay.command(relay_bin().unwrap()).unwrap();
    command
        .args(["capture", "--at", "ingress", "--count", "200", "--duration", "20s", "--socket"])
        .arg(relay.socket())
        .arg("-w")
        .arg(&file);
    let mut capture = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut said = BufReader::new(capture.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.contains("capturing"), "{line}");
    send(lab, &send_args("s0", "239.1.1.1:5000", 1_000, COUNT).unwrap()).unwrap();
    said.read_to_string(&mut line).unwrap();
    assert!(capture.wait().unwrap().success(), "{line}");
    file
}

/// The receiver behind the relay takes the second sending for the first; and each of several for a repetition.
#[test]
fn a_capture_is_sent_again_as_it_was() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let relay = start_relay(&lab, &["--backend", "xsk", "--rule", RULE]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = captured(&lab, &relay, folder.path());

    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", Some(COUNT)).unwrap();
    let sent = report(&replay(&lab, &file, &[]));
    let got = listener.wait().unwrap();
    assert_eq!((got.distinct, got.lost, got.duplicated, got.corrupted, got.foreign), (COUNT, 0, 0, 0, 0), "{got:?}");
    assert_eq!((got.first_sequence, got.last_sequence), (Some(0), Some(COUNT - 1)));
    assert_eq!((&sent["sent"], &sent["frames"], &sent["bytes"]), (&COUNT.into(), &COUNT.into(), &(COUNT * 106).into()), "{sent}");
    let (captured_ms, took_ms) = (sent["captured_ms"].as_f64().unwrap(), sent["duration_ms"].as_f64().unwrap());
    // Sent in 199 ms, captured batch by batch (fewer where a busy machine makes larger batches); never sent faster than captured.
    assert!(captured_ms > 5.0 && took_ms >= captured_ms, "{sent}");

    let listener = Listener::on(lab.sink(1), "k1", "239.9.9.9:6000", None).unwrap();
    let sent = report(&replay(&lab, &file, &["--speed", "4", "--loop", "3"]));
    std::thread::sleep(Duration::from_millis(300));
    let got = listener.finish().unwrap();
    assert_eq!((got.distinct, got.duplicated, got.corrupted), (COUNT, 2 * COUNT, 0), "{got:?}");
    assert!(sent["sent"] == 3 * COUNT && sent["duration_ms"].as_f64().unwrap() >= 3.0 * captured_ms / 4.0 * 0.99, "{sent}");

    let few = report(&replay(&lab, &file, &["--count", "7", "--speed", "0"]));
    assert_eq!(few["sent"], 7, "{few}");
}

/// A classic file of microseconds, with the checksum of a card that was to finish it: the receiver takes the frame all the same.
#[test]
fn a_classic_file_with_unfinished_checksums() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("classic.pcap");
    let mut writer = PcapWriter::new(std::fs::File::create(&file).unwrap()).unwrap();
    for sequence in 0..20u64 {
        let mut payload = [0; 40];
        relay::lab::payload::write(&mut payload, sequence, 1);
        let checksum = relay_tests::raw::Checksum::Partial;
        let frame = Datagram { checksum, ..Datagram::to("239.1.1.1", 5_000, &payload).unwrap() }.bytes();
        writer.write_packet(&PcapPacket::new(Duration::from_millis(5 * sequence), frame.len() as u32, &frame)).unwrap();
    }
    drop(writer);
    let listener = Listener::on(&lab.relay, "r0", "239.1.1.1:5000", Some(20)).unwrap();
    let sent = report(&replay(&lab, &file, &[]));
    let got = listener.wait().unwrap();
    assert_eq!((got.distinct, got.lost, got.corrupted), (20, 0, 0), "{got:?}");
    assert!(sent["completed"] == 20 && (94.0..96.0).contains(&sent["captured_ms"].as_f64().unwrap()), "{sent}");
}

#[test]
fn nothing_is_sent_of_what_is_refused() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, frames: &[Vec<u8>], cut: usize| {
        let mut writer = PcapWriter::new(Vec::new()).unwrap();
        for frame in frames {
            writer.write_packet(&PcapPacket::new(Duration::ZERO, frame.len() as u32, frame)).unwrap();
        }
        let bytes = writer.into_writer();
        let path = folder.path().join(name);
        std::fs::write(&path, &bytes[..bytes.len() - cut]).unwrap();
        path
    };
    let small = Datagram::to("239.1.1.1", 5_000, &[7; 64]).unwrap().bytes();
    let large = Datagram::to("239.1.1.1", 5_000, &[7; 2_000]).unwrap().bytes();
    let whole = write("whole", std::slice::from_ref(&small), 0);
    let heard = relay_tests::raw::Capture::on(&lab.relay, "r0", &[]).unwrap();
    for (file, args, words) in [
        (folder.path().join("missing"), &[][..], "No such file"),
        ("/proc/self/cmdline".into(), &[], "neither pcap nor pcapng"),
        (write("cut", &[small.clone(), small.clone()], 5), &[], "ends in the middle of something"),
        (write("large", &[small, large], 0), &[], "packet 2 of 2042 bytes does not fit the MTU of s0 (1500)"),
        (whole.clone(), &["--to", "239.1.1.1:5000"], "cannot be used with"),
        (whole.clone(), &["--speed", "fast"], "--speed"),
        (whole.clone(), &["--iface", "nosuch0"], "nosuch0"),
    ] {
        let mut command = lab.src.command(relay_bin().unwrap()).unwrap();
        let iface = if args.contains(&"--iface") { &[][..] } else { &["--iface", "s0"] };
        let output = command.arg("send").args(iface).args(args).arg("--replay").arg(file).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && error.contains(words), "wanted `{words}`: {output:?}");
    }
    let alone = lab.src.command(relay_bin().unwrap()).unwrap().args(["send", "--iface", "s0", "--speed", "2"]).output().unwrap();
    assert_eq!(alone.status.code(), Some(2), "{alone:?}");
    assert!(heard.frames().is_empty());
    assert_eq!(report(&replay(&lab, &whole, &[]))["sent"], 1);
    assert_eq!(heard.frames().len(), 1);
}
