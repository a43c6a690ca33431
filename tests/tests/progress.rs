//! What takes longer than two seconds shows progress on stderr: on a terminal, never with `--json`, never elsewhere. Needs no root.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::pty::{OpenptyResult, openpty};
use relay_tests::relay_bin;
use std::fs::File;
use std::io::Read;
use std::process::{Child, Command, Stdio};

/// `relay send` on the loopback for a little longer than the patience.
fn send(more: &[&str], stderr: Stdio) -> Child {
    let mut command = Command::new(relay_bin().unwrap());
    command.args(["send", "--iface", "lo", "--to", "127.0.0.1:40999", "--rate", "100", "--duration", "2600ms"]).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).env_remove("RUST_LOG").spawn().unwrap()
}

fn on_a_terminal(more: &[&str]) -> (Child, File) {
    let OpenptyResult { master, slave } = openpty(None, None).unwrap();
    (send(more, slave.into()), master.into())
}

/// What was written to a terminal whose writers are gone.
fn seen(child: &mut Child, mut terminal: File) -> String {
    assert!(child.wait().unwrap().success());
    let mut text = Vec::new();
    // The end of a pseudo-terminal is EIO.
    let _ = terminal.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn progress_is_for_terminals_alone() {
    let (mut plain, terminal) = on_a_terminal(&[]);
    let (mut json, other_terminal) = on_a_terminal(&["--json"]);
    let piped = send(&[], Stdio::piped());
    let text = seen(&mut plain, terminal);
    assert!(text.starts_with("\r\x1b[Ksent ") && text.contains(" 2 s") && text.ends_with("\r\x1b[K"), "{text:?}");
    assert_eq!(seen(&mut json, other_terminal), "");
    assert_eq!(String::from_utf8_lossy(&piped.wait_with_output().unwrap().stderr), "");
}
