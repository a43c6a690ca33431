//! Each trap of `relay doctor`: made on purpose, named in one line, and gone after its remedy, which is run as printed wherever it
//! is a command.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set up its world has failed")]

use relay::lab::{Lab, LabSpec, Namespace, send};
use relay_tests::{needs_root, relay_bin, send_args, start_relay};
use serde_json::Value;
use std::process::{Command, Output};

/// No relay listens there.
const NOWHERE: &str = "/nonexistent/relay.sock";

fn lab() -> Lab {
    Lab::simple().unwrap()
}

/// The report of `[PREFIX] relay doctor ARGS` in a namespace, and its exit code.
fn doctor_under(namespace: &Namespace, prefix: &[&str], args: &[&str]) -> (Value, i32) {
    let relay = relay_bin().unwrap();
    let relay = relay.to_str().unwrap();
    let words: Vec<&str> = prefix.iter().copied().chain([relay, "doctor", "--json"]).chain(args.iter().copied()).collect();
    let mut command = namespace.command(words[0]).unwrap();
    command.args(&words[1..]);
    if !args.contains(&"--socket") {
        command.args(["--socket", NOWHERE]);
    }
    let output: Output = command.output().unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    (report, output.status.code().unwrap())
}

fn doctor(namespace: &Namespace, args: &[&str]) -> (Value, i32) {
    let quiet = if args.contains(&"--listen") { &[][..] } else { &["--listen", "0"] };
    doctor_under(namespace, &[], &[args, quiet].concat())
}

/// Verdict, reason and remedy of one stage; of the finding that is worst, where there are several.
fn stage(report: &Value, name: &str) -> (String, String, String) {
    let rank = |finding: &Value| ["ok", "skip", "warn", "fail"].iter().position(|word| finding["verdict"] == *word);
    let of = report["findings"].as_array().unwrap().iter().filter(|finding| finding["stage"] == name);
    let worst = of.max_by_key(|finding| rank(finding)).unwrap_or_else(|| panic!("no stage {name} in {report}"));
    let word = |key: &str| worst[key].as_str().unwrap().to_owned();
    (word("verdict"), word("reason"), word("remedy"))
}

/// The stage has this verdict, and its reason holds these words. Returns the remedy.
fn finds(namespace: &Namespace, args: &[&str], name: &str, verdict: &str, words: &str) -> String {
    let (report, code) = doctor(namespace, args);
    let (found, reason, remedy) = stage(&report, name);
    assert!(found == verdict && reason.contains(words), "{name}: wanted {verdict} `{words}`, got {found} `{reason}`");
    assert_eq!(code, if report["verdict"] == "fail" { 5 } else { 0 }, "{report}");
    assert!(verdict == "ok" || !remedy.is_empty(), "{name}: no remedy for `{reason}`");
    remedy
}

fn passes(namespace: &Namespace, args: &[&str], name: &str) {
    finds(namespace, args, name, "ok", "");
}

/// Runs a remedy as it is printed.
fn apply(namespace: &Namespace, remedy: &str) {
    namespace.output("sh", &["-c", remedy]).unwrap_or_else(|error| panic!("`{remedy}`: {error}"));
}

const RULE: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a";

#[test]
fn a_sound_lab_has_nothing_that_fails() {
    needs_root!();
    let lab = lab();
    let (report, code) = doctor(&lab.relay, &["--rule", RULE]);
    assert_eq!((report["verdict"] == "fail", code), (false, 0), "{report}");
    let stages: std::collections::BTreeSet<&str> =
        report["findings"].as_array().unwrap().iter().map(|finding| finding["stage"].as_str().unwrap()).collect();
    assert!(stages.len() >= 18, "{stages:?}");
}

#[test]
fn links() {
    needs_root!();
    let lab = lab();
    finds(&lab.relay, &["nosuch0"], "link", "fail", "there is no interface nosuch0");
    lab.relay.ip_batch("link set r0 down\n").unwrap();
    let remedy = finds(&lab.relay, &["r0"], "link", "fail", "r0 is down");
    apply(&lab.relay, &remedy);
    passes(&lab.relay, &["r0"], "link");
    lab.src.ip_batch("link set s0 down\n").unwrap();
    let remedy = finds(&lab.relay, &["r0"], "link", "fail", "no carrier");
    assert!(remedy.contains("in the peer's namespace"), "{remedy}");
    lab.src.ip_batch("link set s0 up\n").unwrap();
    passes(&lab.relay, &["r0"], "link");
}

#[test]
fn bridge_ports_and_vlans() {
    needs_root!();
    let lab = lab();
    lab.relay.ip_batch("link add br0 type bridge\nlink set br0 up\nlink set r0 master br0\nlink set r1 master br0\n").unwrap();
    let keep = "r0 239.1.1.1:5000 -> r1; id=a";
    let remedy = finds(&lab.relay, &["--rule", keep], "loops", "fail", "r0 and r1 are ports of one bridge");
    apply(&lab.relay, remedy.split_once('(').unwrap().1.split_once(')').unwrap().0);
    passes(&lab.relay, &["--rule", keep], "loops");
    let remedy = finds(&lab.relay, &["r0"], "kind", "fail", "r0 is a port of bridge br0");
    apply(&lab.relay, remedy.rsplit_once(": ").unwrap().1);
    passes(&lab.relay, &["r0"], "kind");
    if let Err(error) = lab.relay.ip_batch("link add link r0 name r0.7 type vlan id 7\nlink set r0.7 up\n") {
        eprintln!("SKIPPED: VLAN sub-interfaces: {error}");
        return;
    }
    let remedy = finds(&lab.relay, &["r0.7"], "kind", "warn", "r0.7 is VLAN 7 of r0");
    assert_eq!(remedy, "name r0 in the rule and say tag=7 (and vlan=7 on an output)");
    passes(&lab.relay, &["r0", "--rule", "r0 239.1.1.1:5000 -> r1; tag=7"], "kind");
}

#[test]
fn a_foreign_xdp_program_is_named() {
    needs_root!();
    let lab = lab();
    let attach = || {
        use libbpf_rs::{ObjectBuilder, Xdp, XdpFlags};
        use std::os::fd::AsFd;
        let object = ObjectBuilder::default().open_memory(relay::nic::afxdp::program::LAB_OBJECT).unwrap().load().unwrap();
        let program = object.progs().find(|program| program.name() == "lab_count_pass").unwrap();
        let ifindex = nix::net::if_::if_nametoindex("r0").unwrap();
        Xdp::new(program.as_fd()).attach(ifindex.cast_signed(), XdpFlags::DRV_MODE).unwrap();
    };
    lab.relay.run(attach).unwrap();
    let remedy = finds(&lab.relay, &["r0"], "xdp-program", "fail", "a foreign XDP program is attached: lab_count_pass");
    apply(&lab.relay, remedy.rsplit_once(": ").unwrap().1);
    passes(&lab.relay, &["r0"], "xdp-program");
}

#[test]
fn a_relay_that_runs_is_no_stranger_to_its_own_doctor() {
    needs_root!();
    let lab = lab();
    let relay = start_relay(&lab, &["--backend", "xsk", "--rule", RULE]).unwrap();
    let socket = relay.socket();
    let own = ["r0", "--listen", "0", "--socket", socket.to_str().unwrap()];
    let (report, code) = doctor_under(&lab.relay, &[], &own);
    assert_eq!((stage(&report, "xdp-program").0, stage(&report, "membership").0, code), ("ok".into(), "ok".into(), 0), "{report}");
    let remedy = finds(&lab.relay, &["r0"], "xdp-program", "fail", "another relay's XDP program");
    assert!(remedy.contains("--socket"), "{remedy}");
}

#[test]
fn mtu_and_offloads() {
    needs_root!();
    let lab = lab();
    lab.relay.ip_batch("link set r1 mtu 1400\n").unwrap();
    let remedy = finds(&lab.relay, &["--rule", RULE], "mtu", "warn", "MTU 1400 is below the 1500 of r0");
    apply(&lab.relay, &remedy);
    passes(&lab.relay, &["--rule", RULE], "mtu");
    let tagged = "r0 239.1.1.1:5000 -> r1; id=t tag=7";
    let (report, _) = doctor(&lab.relay, &["--rule", tagged]);
    if stage(&report, "offloads").0 == "ok" {
        eprintln!("SKIPPED: this kernel's veth does not take tags off");
        return;
    }
    let remedy = finds(&lab.relay, &["--rule", tagged], "offloads", "fail", "takes VLAN tags off before XDP sees them, and rule t");
    apply(&lab.relay, &remedy);
    passes(&lab.relay, &["--rule", tagged], "offloads");
}

#[test]
fn queues_and_transmit() {
    needs_root!();
    let lab = Lab::new(LabSpec { queues: 2, ..LabSpec::default() }).unwrap();
    let remedy = finds(&lab.relay, &["--rule", RULE], "queues", "fail", "2 RX queues, and 1 worker(s) serve one each");
    passes(&lab.relay, &["--rule", RULE, "--workers", "2"], "queues");
    apply(&lab.relay, remedy.split_once(", or").unwrap().0);
    passes(&lab.relay, &["--rule", RULE], "queues");
    lab.sink(1).output("ethtool", &["-K", "k1", "gro", "off"]).unwrap();
    let remedy = finds(&lab.relay, &["--rule", RULE], "xdp-transmit", "warn", "cannot use the kernel path");
    apply(lab.sink(1), &remedy.split_once(',').unwrap().0.replace("PEER", "k1"));
    passes(&lab.relay, &["--rule", RULE], "xdp-transmit");
}

#[test]
fn memberships() {
    needs_root!();
    let lab = lab();
    lab.relay.ip_batch("link set r0 multicast off\n").unwrap();
    let remedy = finds(&lab.relay, &["r0"], "membership", "fail", "multicast is switched off on r0");
    apply(&lab.relay, &remedy);
    passes(&lab.relay, &["r0"], "membership");
    lab.relay.sysctl("ipv4/igmp_max_memberships", "5").unwrap();
    let remedy = finds(&lab.relay, &["r0"], "membership", "fail", "igmp_max_memberships = 5");
    apply(&lab.relay, &remedy);
    passes(&lab.relay, &["r0"], "membership");
    let specific = "r0 10.0.0.1@232.1.1.1:5000 -> r1; id=s";
    lab.relay.sysctl("ipv4/conf/r0/force_igmp_version", "2").unwrap();
    let remedy = finds(&lab.relay, &["--rule", specific], "membership", "fail", "IGMPv2 is forced on r0, and rule s needs IGMPv3");
    apply(&lab.relay, &remedy);
    passes(&lab.relay, &["--rule", specific], "membership");
    lab.relay.ip_batch("addr flush dev r0\n").unwrap();
    let remedy = finds(&lab.relay, &["--rule", RULE], "membership", "warn", "r0 has no IPv4 address");
    apply(&lab.relay, &remedy.replace("ADDRESS/LEN", "10.0.0.2/24"));
    passes(&lab.relay, &["--rule", RULE], "membership");
}

#[test]
fn querier_heard_or_not() {
    needs_root!();
    let lab = lab();
    let remedy = finds(&lab.relay, &["r0", "--listen", "1s"], "querier", "warn", "no IGMP or MLD query in 1 s");
    assert!(remedy.contains("--listen 130s") && remedy.contains("querier"), "{remedy}");
    let bridge = "link add br0 type bridge mcast_snooping 1 mcast_querier 1 mcast_query_interval 100 mcast_startup_query_interval 25\n\
                  link set s0 master br0\nlink set br0 up\n";
    lab.src.ip_batch(bridge).unwrap();
    finds(&lab.relay, &["r0", "--listen", "4s"], "querier", "ok", "queries come from");
}

#[test]
fn mac_filter_and_reverse_path_filter() {
    needs_root!();
    let lab = lab();
    let unjoined = "r0 239.1.1.1:5000 -> r1; id=u join=no";
    let remedy = finds(&lab.relay, &["--rule", unjoined], "mac-filter", "warn", "rule u does not join");
    apply(&lab.relay, &remedy);
    passes(&lab.relay, &["--rule", unjoined], "mac-filter");
    lab.relay.sysctl("ipv4/conf/r0/rp_filter", "1").unwrap();
    let remedy = finds(&lab.relay, &["r0"], "rp-filter", "warn", "rp_filter is strict");
    apply(&lab.relay, &remedy);
    passes(&lab.relay, &["r0"], "rp-filter");
}

#[test]
fn ttl_1_is_heard() {
    needs_root!();
    let lab = lab();
    let args = send::Args { ttl: 1, ..send_args("s0", "239.1.1.1:5000", 100, 600).unwrap() };
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| lab.src.run(|| send::send(&args)).unwrap().unwrap());
        let remedy = finds(&lab.relay, &["--rule", RULE, "--listen", "1s"], "ttl", "fail", "239.1.1.1 comes in with TTL 1");
        assert!(remedy.contains("ttl=keep"), "{remedy}");
        finds(
            &lab.relay,
            &["--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep", "--listen", "1s"],
            "ttl",
            "ok",
            "1 group(s) heard",
        );
        sending.join().unwrap();
    });
}

#[test]
fn rules_and_their_outputs() {
    needs_root!();
    let lab = lab();
    let circle = ["--rule", "r0 239.1.1.1:5000 -> r1; id=x", "--rule", "r1 239.1.1.1:5000 -> r0; id=y"];
    finds(&lab.relay, &circle, "loops", "fail", "feed each other in a circle");
    passes(&lab.relay, &circle[..2], "loops");
    finds(&lab.relay, &["--rule", "r0 239.1.1.1:5000 -> gone9; id=x"], "egress", "fail", "there is no interface gone9");
    let away = ["--rule", "r0 239.1.1.1:5000 -> r1 192.0.2.5:6000; id=x"];
    let remedy = finds(&lab.relay, &away, "egress", "fail", "no route to 192.0.2.5 out of r1");
    apply(&lab.relay, &remedy.replace("GATEWAY", "10.0.1.2"));
    let remedy = finds(&lab.relay, &away, "egress", "warn", "the neighbour 10.0.1.2 for 192.0.2.5 is not resolved");
    let ping = remedy.split_once(": ").unwrap().1;
    if lab.relay.output("sh", &["-c", ping]).is_err() {
        lab.relay.ip_batch("neigh replace 10.0.1.2 dev r1 lladdr 02:00:00:00:00:09\n").unwrap();
    }
    passes(&lab.relay, &away, "egress");
    lab.relay.ip_batch("addr flush dev r1\n").unwrap();
    let own = ["--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 src=egress; id=x"];
    let remedy = finds(&lab.relay, &own, "egress", "fail", "says src=egress, and r1 has no IPv4 address");
    apply(&lab.relay, &remedy.replace("ADDRESS/LEN", "10.0.1.1/24"));
    passes(&lab.relay, &own, "egress");
}

#[test]
fn privileges_limits_and_cpus() {
    needs_root!();
    if !["setpriv", "prlimit", "taskset"].iter().all(|tool| Command::new(tool).arg("--version").output().is_ok()) {
        eprintln!("SKIPPED: needs setpriv, prlimit and taskset (util-linux)");
        return;
    }
    let lab = lab();
    let without = |capabilities: &str| {
        vec!["setpriv".to_owned(), "--bounding-set".into(), capabilities.into(), "--inh-caps".into(), capabilities.into()]
    };
    let under = |prefix: &[String], name: &str| {
        let prefix: Vec<&str> = prefix.iter().map(String::as_str).collect();
        let (report, code) = doctor_under(&lab.relay, &prefix, &["r0", "--listen", "1s"]);
        (stage(&report, name), code)
    };
    let ((verdict, reason, remedy), code) = under(&without("-net_raw"), "capabilities");
    assert_eq!((verdict.as_str(), reason.as_str(), code), ("fail", "`relay run` lacks CAP_NET_RAW", 5));
    assert!(remedy.contains("--cap-add CAP_NET_RAW"), "{remedy}");
    assert_eq!(under(&without("-net_raw"), "querier").0.0, "skip");
    assert_eq!(under(&without("-bpf,-sys_admin"), "kernel").0.0, "skip");
    let limited = [vec!["prlimit".to_owned(), "--memlock=4194304".into()], without("-ipc_lock,-sys_resource")].concat();
    let ((verdict, reason, remedy), _) = under(&limited, "memlock");
    assert!(verdict == "fail" && reason.contains("needs 65536 KiB locked, the limit is 4096 KiB"), "{reason}");
    assert!(remedy.starts_with("ulimit -l unlimited") && remedy.contains("--frames N"), "{remedy}");
    let prefix: Vec<&str> = limited.iter().map(String::as_str).collect();
    let (report, _) = doctor_under(&lab.relay, &prefix, &["r0", "--listen", "0", "--frames", "1024"]);
    assert_eq!(stage(&report, "memlock").0, "ok", "{report}");
    let one = ["taskset".to_owned(), "-c".into(), "0".into()];
    let ((verdict, reason, remedy), _) = under(&one, "cpus");
    assert!(verdict == "warn" && reason.starts_with("one CPU is allowed") && remedy.contains("taskset"), "{verdict} {reason} {remedy}");
}
