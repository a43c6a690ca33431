//! The relay as a service and without root: what it tells the service manager, how exposed its unit is, and the demo of an ordinary user.

use nix::sys::signal::Signal;
use relay::lab::{Lab, RelayProcess};
use relay_tests::{needs_root, relay_bin};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

/// Waits for a message that begins so; anything else on the way (watchdog) is left out.
fn await_message(manager: &UnixDatagram, begin: &str) {
    let limit = Instant::now() + Duration::from_secs(10);
    let mut buffer = [0; 512];
    while Instant::now() < limit {
        if let Ok(len) = manager.recv(&mut buffer)
            && String::from_utf8_lossy(&buffer[..len]).starts_with(begin)
        {
            return;
        }
    }
    unreachable!("no {begin} within ten seconds");
}

#[test]
fn the_manager_hears_ready_reloading_alive_and_stopping() {
    needs_root!();
    let lab = Lab::simple().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    // A shell in between sets the variables for this relay alone, and becomes it.
    let script = directory.path().join("relay");
    let text = format!(
        "#!/bin/sh\nexport NOTIFY_SOCKET={} WATCHDOG_USEC=400000\nexec {} \"$@\"\n",
        path.display(),
        relay_bin().unwrap().display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = directory.path().join("relay.toml");
    std::fs::write(&config, "version = 1\n").unwrap();
    let mut relay = RelayProcess::start(&lab.relay, &script, &["--backend", "packet", "--config", config.to_str().unwrap()]).unwrap();
    await_message(&manager, "READY=1");
    await_message(&manager, "WATCHDOG=1");
    relay.signal(Signal::SIGHUP).unwrap();
    await_message(&manager, "RELOADING=1\nMONOTONIC_USEC=");
    await_message(&manager, "READY=1");
    std::fs::write(&config, "version = 9\n").unwrap();
    relay.signal(Signal::SIGHUP).unwrap();
    await_message(&manager, "STATUS=configuration refused");
    await_message(&manager, "READY=1");
    relay.signal(Signal::SIGTERM).unwrap();
    await_message(&manager, "STOPPING=1");
    assert!(relay.wait_exit(Duration::from_secs(5)).unwrap().success());
}

/// docs/service.md has the reasons line by line; no new hole comes in unseen.
#[test]
fn the_unit_is_no_more_exposed_than_documented() {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/relay.service");
    let Ok(output) = Command::new("systemd-analyze").args(["security", "--offline=true", "--no-pager", unit]).output() else {
        eprintln!("SKIPPED: systemd-analyze is not installed (package systemd)");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let level = text.lines().find_map(|line| line.split("relay.service: ").nth(1)?.split(' ').next()?.parse::<f64>().ok());
    assert!(level.is_some_and(|level| level <= 2.5), "{text}");
}

#[test]
fn an_ordinary_user_sees_the_demo_pass() {
    needs_root!();
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("relay");
    std::fs::copy(relay_bin().unwrap(), &program).unwrap();
    let begin = Instant::now();
    let user = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let Ok(output) = Command::new("setpriv").args(user).arg(&program).args(["demo", "--json"]).current_dir("/").output() else {
        eprintln!("SKIPPED: needs setpriv (util-linux)");
        return;
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    if errors.contains("user namespaces are not allowed") {
        eprintln!("SKIPPED: {errors}");
        return;
    }
    assert_eq!(errors, "", "no terminal, no progress");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    assert!(report["verdict"] == "PASS" && output.status.success(), "{report} {errors}");
    assert!(report["note"].as_str().unwrap().contains("BPF is not permitted"), "{report}");
    assert!(report["rows"].as_array().unwrap().iter().any(|row| row["backend"] == "packet"), "{report}");
    eprintln!("as an ordinary user: {:?}", begin.elapsed());
    // What it can't compare it says before it runs anything.
    let compared = Command::new("setpriv").args(user).arg(&program).args(["demo", "--compare"]).current_dir("/").output().unwrap();
    let said = String::from_utf8_lossy(&compared.stderr);
    assert!(compared.status.code() == Some(2) && compared.stdout.is_empty(), "{compared:?}");
    assert!(said.contains("--compare needs root: generator, path xsk and path kernel are BPF") && said.contains("; sudo relay"), "{said}");
}
