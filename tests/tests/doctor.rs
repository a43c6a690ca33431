//! Each trap of `relay doctor`: made on purpose, named in one line, and gone after its remedy, which is run as printed wherever it
//! is a command.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set up its world has failed")]

use relay::lab::{Lab, LabSpec, Namespace, send};
use relay_tests::{needs_root, relay_bin, send_args, start_relay};
use seccompiler::{SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

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
    found(&doctor(namespace, args), name, verdict, words)
}

fn found((report, code): &(Value, i32), name: &str, verdict: &str, words: &str) -> String {
    let (found, reason, remedy) = stage(report, name);
    assert!(found == verdict && reason.contains(words), "{name}: wanted {verdict} `{words}`, got {found} `{reason}`");
    assert_eq!(*code, if report["verdict"] == "fail" { 5 } else { 0 }, "{report}");
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
    let remedy = finds(&lab.relay, &["lo"], "link", "warn", "lo is the loopback");
    assert_eq!(remedy, "name the interface the sender is behind");
    if let Err(error) = lab.relay.ip_batch("tuntap add dev tun0 mode tun\ntuntap add dev tap0 mode tap\n") {
        eprintln!("SKIPPED: tunnels: {error}");
        return;
    }
    let remedy = finds(&lab.relay, &["tun0"], "link", "fail", "tun0 has no Ethernet address");
    assert!(remedy.contains("or tap"), "{remedy}");
    finds(&lab.relay, &["tap0"], "link", "fail", "tap0 is down");
}

/// A bridge stands for every driver without native XDP, and without packets in several buffers.
#[test]
fn a_driver_without_xdp() {
    needs_root!();
    let lab = lab();
    lab.relay.ip_batch("link add br0 type bridge\nlink set br0 mtu 9000\nlink set br0 up\n").unwrap();
    let remedy = finds(&lab.relay, &["br0"], "native-xdp", "warn", "driver bridge has no native XDP: packets take the packet path");
    assert!(remedy.starts_with("use an interface whose driver has it") && remedy.contains("--xdp-mode generic"), "{remedy}");
    passes(&lab.relay, &["r0"], "native-xdp");
    let remedy = finds(&lab.relay, &["br0"], "mtu", "warn", "bytes are dropped as too_big");
    apply(&lab.relay, remedy.split_once(',').unwrap().0);
    passes(&lab.relay, &["br0"], "mtu");
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
    let six = "r0 [ff3e::1234]:5000 -> r1; id=six";
    lab.relay.sysctl("ipv6/conf/r0/disable_ipv6", "1").unwrap();
    let remedy = finds(&lab.relay, &["--rule", six], "membership", "fail", "IPv6 is switched off on r0, and rule six joins");
    apply(&lab.relay, &remedy);
    passes(&lab.relay, &["--rule", six], "membership");
}

/// The kernel has no memory for another membership: doctor and why say so, and the relay joins by itself once it has.
#[test]
fn a_membership_that_the_kernel_refuses() {
    needs_root!();
    let lab = lab();
    let relay = start_relay(&lab, &["--backend", "xsk", "--rule", RULE]).unwrap();
    let limit = "/proc/sys/net/core/optmem_max";
    let Ok(before) = lab.relay.run(|| std::fs::read_to_string(limit)).unwrap() else {
        eprintln!("SKIPPED: net.core.optmem_max is not the namespace's own in this kernel");
        return;
    };
    lab.relay.sysctl("core/optmem_max", "0").unwrap();
    relay.command(&["rule", "add", "r0 239.1.1.2:5000 -> r1; id=late"]).unwrap();
    let socket = relay.socket();
    let args = ["r0", "--listen", "0", "--socket", socket.to_str().unwrap()];
    let report = doctor_under(&lab.relay, &[], &args);
    let remedy = found(&report, "membership", "fail", "the running relay has not joined the group of rule late");
    assert_eq!(remedy, "relay why late");
    let remedy = found(&report, "mac-filter", "fail", "the MAC filter lacks the group of rule late");
    assert!(remedy.starts_with("ip link set r0 allmulticast on"), "{remedy}");
    let mut why = lab.relay.command(relay_bin().unwrap()).unwrap();
    let why = why.args(["why", "late", "--listen", "100ms", "--json", "--socket"]).arg(&socket).output().unwrap();
    let answer = String::from_utf8_lossy(&why.stdout).into_owned();
    assert!(answer.contains("239.1.1.2 is not joined on r0") && answer.contains("net.core.optmem_max"), "{answer}");
    lab.relay.sysctl("core/optmem_max", before.trim()).unwrap();
    let begin = Instant::now();
    while relay.rules().unwrap().as_array().unwrap().iter().any(|rule| rule["joined"] != true) {
        assert!(begin.elapsed() < Duration::from_secs(20), "{}", relay.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    let report = doctor_under(&lab.relay, &[], &args);
    for name in ["membership", "mac-filter"] {
        found(&report, name, "ok", "");
    }
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

/// What a routing daemon does: it switches multicast routing on and takes an interface.
const ROUTER: &str = "import socket, struct, time
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IGMP)
s.setsockopt(0, 200, struct.pack('i', 1))
s.setsockopt(0, 202, struct.pack('=HBBIII', 0, 8, 1, 0, socket.if_nametoindex('r0'), 0))
print('ready', flush=True)
time.sleep(60)";

#[test]
fn another_forwarder() {
    needs_root!();
    let lab = lab();
    passes(&lab.relay, &["--rule", RULE], "other-forwarders");
    let mut command = lab.relay.command("/usr/bin/python3").unwrap();
    let router = command.args(["-c", ROUTER]).stdout(std::process::Stdio::piped()).spawn();
    let Ok(mut router) = router.inspect_err(|error| eprintln!("SKIPPED: python3: {error}")) else { return };
    let mut said = router.stdout.take().unwrap();
    let ready = std::io::Read::read_exact(&mut said, &mut [0; "ready\n".len()]);
    let seen = ready.map(|()| doctor(&lab.relay, &["--rule", RULE]));
    router.kill().unwrap();
    router.wait().unwrap();
    match seen {
        Err(_) => eprintln!("SKIPPED: this kernel has no multicast routing"),
        Ok(report) => {
            let remedy = found(&report, "other-forwarders", "warn", "multicast routing is on, on 1 interface(s)");
            assert!(remedy.starts_with("stop smcrouted") && remedy.contains("ip mroute show"), "{remedy}");
            passes(&lab.relay, &["--rule", RULE], "other-forwarders");
        }
    }
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
    let pinned = |cpus: &str| doctor_under(&lab.relay, &["taskset", "-c", cpus], &["r0", "--listen", "0"]);
    let remedy = found(&pinned("0"), "cpus", "warn", "one CPU is allowed");
    assert!(remedy.contains("taskset -c 0-1"), "{remedy}");
    let (report, _) = doctor_under(&lab.relay, &[], &["r0", "--listen", "0"]);
    for name in ["capabilities", "kernel", "memlock"] {
        assert_eq!(stage(&report, name).0, "ok", "{report}");
    }
    if std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1) {
        found(&pinned("0-1"), "cpus", "ok", "2 CPUs are allowed");
    }
}

/// From now on the kernel refuses this call of the calling thread, and of what it starts; only with this first argument, if one is given.
fn refuse(call: i64, first: Option<u64>, errno: i32) {
    let equals = |value| SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).unwrap();
    let rules = first.map(|value| SeccompRule::new(vec![equals(value)]).unwrap()).into_iter().collect();
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new([(call, rules)].into(), SeccompAction::Allow, SeccompAction::Errno(errno as u32), arch).unwrap();
    let program: seccompiler::BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

/// As on a kernel without them.
#[test]
fn a_kernel_without_bpf_or_af_xdp_or_io_uring() {
    needs_root!();
    let lab = lab();
    let sound = doctor(&lab.relay, &["r0"]);
    let refused = [
        (libc::SYS_bpf, Some(5), libc::EPERM, "kernel", "fail", "does not load the XDP program", "CONFIG_BPF_SYSCALL"),
        (
            libc::SYS_socket,
            Some(libc::AF_XDP as u64),
            libc::EAFNOSUPPORT,
            "af-xdp",
            "fail",
            "no AF_XDP socket: EAFNOSUPPORT",
            "CONFIG_XDP_SOCKETS",
        ),
        (libc::SYS_io_uring_setup, None, libc::ENOSYS, "io-uring", "warn", "no io_uring", "CONFIG_IO_URING"),
    ];
    for (call, first, errno, name, verdict, words, cure) in refused {
        if stage(&sound.0, name).0 != "ok" {
            eprintln!("SKIPPED: {name}: this kernel has none itself");
            continue;
        }
        let without = || {
            refuse(call, first, errno);
            doctor(&lab.relay, &["r0"])
        };
        let report = std::thread::scope(|scope| scope.spawn(without).join()).unwrap();
        let remedy = found(&report, name, verdict, words);
        assert!(remedy.contains(cure), "{remedy}");
    }
}

/// Puts files over others, in a mount namespace of its own, before it starts the rest of its words.
const OVER: &str = "while [ \"$1\" != -- ]; do mount --bind \"$1\" \"$2\"; shift 2; done; shift; exec \"$@\"";

fn over<'a>(files: &[(&'a Path, &'a str)], rest: &[&'a str]) -> Vec<&'a str> {
    let files = files.iter().flat_map(|(new, old)| [new.to_str().unwrap(), old]);
    ["unshare", "--mount", "sh", "-euc", OVER, "sh"].into_iter().chain(files).chain(["--"]).chain(rest.iter().copied()).collect()
}

/// What a virtual machine does not have: a slow clock, a card on another NUMA node. And io_uring switched off for the whole host.
#[test]
fn clocks_nodes_and_switches_of_other_hosts() {
    needs_root!();
    let lab = lab();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    };
    let seen = |files: &[(&Path, &str)], rest: &[&str]| doctor_under(&lab.relay, &over(files, rest), &["r0", "--listen", "0"]);
    let clock = write("clock", "hpet\n");
    let files = [(clock.as_path(), "/sys/devices/system/clocksource/clocksource0/current_clocksource")];
    if Command::new("unshare").args(&over(&files, &["true"])[1..]).status().map_or(true, |status| !status.success()) {
        eprintln!("SKIPPED: no mount namespaces, or no clock source to be seen");
        return;
    }
    let remedy = found(&seen(&files, &[]), "clock", "warn", "the clock is hpet");
    assert!(remedy.contains("available_clocksource"), "{remedy}");
    write("clock", "tsc\n");
    found(&seen(&files, &[]), "clock", "ok", "the clock is tsc");

    let switch = write("disabled", "2\n");
    let off = || {
        refuse(libc::SYS_io_uring_setup, None, libc::EPERM);
        seen(&[(&switch, "/proc/sys/kernel/io_uring_disabled")], &[])
    };
    let report = std::thread::scope(|scope| scope.spawn(off).join()).unwrap();
    let remedy = found(&report, "io-uring", "warn", "io_uring is forbidden (kernel.io_uring_disabled = 2)");
    assert_eq!(remedy, "sysctl -w kernel.io_uring_disabled=0");

    let index = lab.relay.run(|| nix::net::if_::if_nametoindex("r0").unwrap()).unwrap();
    write("net/r0/ifindex", &format!("{index}\n"));
    write("net/r0/device/numa_node", "1\n");
    write("node/node1/cpulist", "1\n");
    let (net, node) = (folder.path().join("net"), folder.path().join("node"));
    let files = [(net.as_path(), "/sys/class/net"), (node.as_path(), "/sys/devices/system/node")];
    let two = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
    if !two || !Path::new("/sys/devices/system/node").exists() {
        eprintln!("SKIPPED: one CPU, or a kernel without NUMA");
        return;
    }
    let remedy = found(&seen(&files, &["taskset", "-c", "0"]), "placement", "warn", "on NUMA node 1 (CPUs 1)");
    let cpus = remedy.strip_prefix("relay run --cpus ").unwrap();
    found(&seen(&files, &["taskset", "-c", cpus]), "placement", "ok", "where all allowed CPUs are");
}
