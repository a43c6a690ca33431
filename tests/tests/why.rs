//! `relay why ID`: each cause made on purpose, told in a sentence with its remedy, and no longer told after the remedy.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::Signal;
use relay::lab::process::signal_pid;
use relay::lab::{Lab, LabSpec, RelayProcess, send};
use relay_tests::raw::{Checksum, Datagram, Injector};
use relay_tests::{needs_root, relay_bin, send_args, send_in_background, start_relay};
use serde_json::Value;
use std::time::{Duration, Instant};

struct World {
    lab: Lab,
    relay: RelayProcess,
}

impl World {
    fn new(args: &[&str]) -> Self {
        Self::of(LabSpec::default(), args)
    }

    fn of(spec: LabSpec, args: &[&str]) -> Self {
        let lab = Lab::new(spec).unwrap();
        let relay = start_relay(&lab, args).unwrap();
        Self { lab, relay }
    }

    /// The answer of `relay why ID`, while `traffic` flows from `s0` if there is any, and its exit code.
    fn why(&self, id: &str, traffic: Option<&send::Args>) -> (Value, i32) {
        let _sending = traffic.map(|args| send_in_background(&self.lab, args).unwrap());
        std::thread::sleep(Duration::from_millis(150));
        let mut command = self.lab.relay.command(relay_bin().unwrap()).unwrap();
        command.args(["why", id, "--json", "--listen", "500ms", "--socket"]).arg(self.relay.socket());
        let output = command.output().unwrap();
        let answer = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
        (answer, output.status.code().unwrap())
    }

    /// A sentence holds these words. Returns its remedy.
    fn says(&self, id: &str, traffic: Option<&send::Args>, words: &str) -> String {
        let (answer, code) = self.why(id, traffic);
        assert_eq!((code, answer["moving"].as_bool()), (5, Some(false)), "{answer}");
        remedy(&answer, words)
    }

    fn works(&self, id: &str, traffic: &send::Args) {
        let (answer, code) = self.why(id, Some(traffic));
        assert_eq!((code, answer["moving"].as_bool()), (0, Some(true)), "{answer}");
        assert!(answer["sentences"][0]["sentence"].as_str().unwrap().contains("works"), "{answer}");
    }

    /// It works within 20 s: interfaces that come back are taken up by the relay itself.
    fn works_soon(&self, id: &str) {
        let begin = Instant::now();
        while self.why(id, Some(&traffic(GROUP))).0["moving"] != true {
            assert!(begin.elapsed() < Duration::from_secs(20), "{}", self.relay.log());
        }
    }

    fn apply(&self, remedy: &str) {
        self.lab.relay.output("sh", &["-c", remedy]).unwrap_or_else(|error| panic!("`{remedy}`: {error}"));
    }

    /// Another rule in place of the old one.
    fn change(&self, id: &str, rule: &str) {
        self.relay.command(&["rule", "del", id]).unwrap();
        self.relay.command(&["rule", "add", rule]).unwrap();
    }
}

/// The remedy of the sentence that holds these words.
fn remedy(answer: &Value, words: &str) -> String {
    let of = answer["sentences"].as_array().unwrap().iter().find(|one| one["sentence"].as_str().unwrap().contains(words));
    let remedy = of.unwrap_or_else(|| panic!("no `{words}` in {answer}"))["remedy"].as_str().unwrap().to_owned();
    assert!(!remedy.is_empty(), "{answer}");
    remedy
}

/// 200 a second, until the answer is there.
fn traffic(to: &str) -> send::Args {
    send_args("s0", to, 200, 2_000).unwrap()
}

const GROUP: &str = "239.1.1.1:5000";

#[test]
fn it_works_and_ttl_1_expires() {
    needs_root!();
    for backend in ["xsk", "packet"] {
        let world = World::new(&["--backend", backend, "--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]);
        world.works("a", &traffic(GROUP));
        let low = send::Args { ttl: 1, ..traffic(GROUP) };
        let remedy = world.says("a", Some(&low), "TTL 1");
        assert!(remedy.contains("ttl=keep"), "{remedy}");
        world.change("a", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=a");
        world.works("a", &low);
    }
}

/// One of `traffic`'s datagrams in VLAN 7, as it is on the wire.
fn tagged() -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 92, 0, 1, 0, 0, 16, 17, 0, 0, 10, 0, 0, 1, 239, 1, 1, 1];
    let sum = relay::wire::checksum::checksum(&ip).to_be_bytes();
    ip[10..12].copy_from_slice(&sum);
    let ethernet = [0x01, 0x00, 0x5e, 1, 1, 1, 2, 0, 0, 0, 0, 1, 0x81, 0x00, 0, 7, 0x08, 0x00];
    let udp = [0x9c, 0x40, 0x13, 0x88, 0, 72, 0, 0];
    [&ethernet[..], &ip, &udp, &[0; 64]].concat()
}

#[test]
fn another_tag() {
    needs_root!();
    let world = World::new(&["--backend", "xsk", "--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]);
    let frame = tagged();
    let inject = || {
        let socket = relay::nic::afpacket::socket::open_send(nix::net::if_::if_nametoindex("s0").unwrap()).unwrap();
        for _ in 0..160 {
            assert_eq!(nix::unistd::write(&socket, &frame).unwrap(), frame.len());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| world.lab.src.run(inject).unwrap());
        let remedy = world.says("a", None, "carry VLAN tag 7, and the rule takes tag=none");
        assert!(remedy.starts_with("say tag=7"), "{remedy}");
        sending.join().unwrap();
        world.change("a", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a tag=7");
        let sending = scope.spawn(|| world.lab.src.run(inject).unwrap());
        let (answer, code) = world.why("a", None);
        assert_eq!((code, answer["moving"].as_bool()), (0, Some(true)), "{answer}");
        sending.join().unwrap();
    });
}

#[test]
fn other_port_or_source() {
    needs_root!();
    let world = World::new(&["--backend", "xsk", "--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]);
    let remedy = world.says("a", Some(&traffic("239.1.1.1:5001")), "go to port 5001, and the rule takes port 5000");
    assert!(remedy.contains(":5001"), "{remedy}");
    world.change("a", "r0 239.1.1.1:5001 -> r1 239.9.9.9:6000; id=a");
    world.works("a", &traffic("239.1.1.1:5001"));
    world.change("a", "r0 10.0.0.9@232.1.1.1:5000 -> r1 239.9.9.9:6000; id=a");
    let remedy = world.says("a", Some(&traffic("232.1.1.1:5000")), "come from 10.0.0.1, and the rule takes only 10.0.0.9");
    assert!(remedy.contains("10.0.0.1@"), "{remedy}");
    world.change("a", "r0 10.0.0.1@232.1.1.1:5000 -> r1 239.9.9.9:6000; id=a");
    world.works("a", &traffic("232.1.1.1:5000"));
    world.change("a", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a except=10.0.0.1");
    let remedy = world.says("a", Some(&traffic(GROUP)), "which except= leaves to the host");
    assert!(remedy.contains("except="), "{remedy}");
}

#[test]
fn interfaces_down_or_small() {
    needs_root!();
    let world = World::new(&["--backend", "xsk", "--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]);
    world.lab.relay.ip_batch("link set r1 down\n").unwrap();
    let remedy = world.says("a", Some(&traffic(GROUP)), "interface r1 is down");
    world.apply(&remedy);
    world.works("a", &traffic(GROUP));
    world.lab.relay.ip_batch("link set r0 down\n").unwrap();
    let remedy = world.says("a", None, "the ingress interface r0 is down");
    world.apply(&remedy);
    world.works("a", &traffic(GROUP));
    world.lab.relay.ip_batch("link set r0 multicast off\n").unwrap();
    let remedy = world.says("a", None, "multicast is switched off on r0");
    world.apply(&remedy);
    world.lab.relay.ip_batch("link set r1 mtu 600\n").unwrap();
    let large = send::Args { size: 1000, ..traffic(GROUP) };
    let remedy = world.says("a", Some(&large), "larger than the MTU of r1 (600)");
    world.apply(remedy.split_once(',').unwrap().0);
    world.works("a", &large);
}

#[test]
fn unicast_without_an_answering_host() {
    needs_root!();
    let world = World::new(&["--backend", "xsk", "--rule", "r0 239.1.1.1:5000 -> r1 10.0.1.77:6000; id=a"]);
    let remedy = world.says("a", Some(&traffic(GROUP)), "link-layer address is not known");
    assert!(remedy.contains("ping -c 1 -I r1 10.0.1.77"), "{remedy}");
    world.lab.sink(1).ip_batch("addr add 10.0.1.77/24 dev k1\n").unwrap();
    world.lab.relay.ip_batch("neigh flush dev r1\n").unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let (answer, _) = world.why("a", Some(&traffic(GROUP)));
    // The kernel asks again by itself; the first answer may come within the watch.
    let again = if answer["moving"] == true { answer } else { world.why("a", Some(&traffic(GROUP))).0 };
    assert_eq!(again["moving"], true, "{again}");
}

#[test]
fn fragments_and_a_quiet_wire() {
    needs_root!();
    let world = World::new(&["--backend", "xsk", "--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]);
    let remedy = world.says("a", None, "nothing to 239.1.1.1 came in on r0");
    assert!(remedy.contains("relay send"), "{remedy}");
    world.says("a", None, "no querier was heard");
    world.says("a", Some(&send::Args { size: 3000, ..traffic(GROUP) }), "are fragments");
    world.change("a", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a join=no");
    world.says("a", None, "join=no");
}

/// Each kind of wrong packet, all in one watch; the right ones that follow are all sent.
#[test]
fn packets_that_are_wrong() {
    needs_root!();
    let world = World::new(&["--backend", "xsk", "--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]);
    let right = Datagram::to("239.1.1.1", 5_000, &[7; 64]).unwrap();
    let mut bad_header = right.bytes();
    bad_header[24] ^= 0xff;
    let wrong = [
        Datagram { src: "239.1.1.1".parse().unwrap(), ..right.clone() }.bytes(),
        Datagram { src: "10.0.0.2".parse().unwrap(), ..right.clone() }.bytes(),
        Datagram { checksum: Checksum::Wrong, ..right }.bytes(),
        bad_header,
    ];
    let injector = Injector::on(&world.lab.src, "s0").unwrap();
    let inject = || {
        for frame in wrong.iter().cycle().take(320) {
            injector.send(frame).unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let (answer, code) = std::thread::scope(|scope| {
        scope.spawn(inject);
        world.why("a", None)
    });
    assert_eq!((code, answer["moving"].as_bool()), (5, Some(false)), "{answer}");
    for (words, cure) in [
        ("reach no output: their source address is a multicast address", "correct the sender"),
        ("reach no output: their source is this host's own address: a loop", "except=ADDRESS"),
        ("reach no output: their UDP checksum is wrong", "correct the sender"),
        ("reach no output: their IP checksum is wrong", "correct the sender"),
    ] {
        assert!(remedy(&answer, words).contains(cure), "{answer}");
    }
    world.works("a", &traffic(GROUP));
}

/// What the packet path counts before any rule sees it; packets that are right are sent then.
#[test]
fn packets_that_no_rule_sees() {
    needs_root!();
    let spec = LabSpec { mtu: 9_000, ..LabSpec::default() };
    let world = World::of(spec, &["--backend", "packet", "--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]);
    let large = send::Args { size: 8_000, ..traffic(GROUP) };
    let remedy = world.says("a", Some(&large), "before any rule takes them: they are larger than the path can carry");
    assert!(remedy.starts_with("lower the sender's packet size"), "{remedy}");
    world.works("a", &traffic(GROUP));
    let mut long = Datagram::to("239.1.1.1", 5_000, &[7; 64]).unwrap().bytes();
    // The UDP length's first byte.
    long[38] = 0x10;
    let injector = Injector::on(&world.lab.src, "s0").unwrap();
    let remedy = std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..320 {
                injector.send(&long).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        world.says("a", None, "before any rule takes them: their lengths contradict each other")
    });
    assert!(remedy.starts_with("correct the sender"), "{remedy}");
    world.works("a", &traffic(GROUP));
}

/// Three outputs, each with another fault, in one answer; each remedy as it is printed, and the rule works.
#[test]
fn outputs_without_interface_carrier_or_address() {
    needs_root!();
    let rule = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 src=egress, r2 239.9.9.9:6000, r3 239.9.9.9:6000; id=a";
    let spec = LabSpec { sinks: 3, separate_sinks: true, ..LabSpec::default() };
    let world = World::of(spec, &["--backend", "packet", "--rule", rule]);
    world.works("a", &traffic(GROUP));
    world.lab.relay.ip_batch("addr flush dev r1\nlink del r2\n").unwrap();
    world.lab.sink(3).ip_batch("link set k3 down\n").unwrap();
    let (answer, code) = world.why("a", Some(&traffic(GROUP)));
    assert_eq!((code, answer["moving"].as_bool()), (5, Some(false)), "{answer}");
    let address = remedy(&answer, "interface r1 has no usable address for src=egress");
    world.apply(&address.replace("ADDRESS/LEN", "10.0.1.1/24"));
    assert_eq!(remedy(&answer, "interface r2 is missing"), "make the interface r2; the relay takes it up again by itself");
    world.lab.relay.ip_batch(&format!("link add r2 type veth peer name k2 netns {}\nlink set r2 up\n", world.lab.sink(2).name())).unwrap();
    world.lab.sink(2).ip_batch("link set k2 up\n").unwrap();
    assert_eq!(remedy(&answer, "interface r3 has no carrier"), "bring the other end of r3 up");
    world.lab.sink(3).ip_batch("link set k3 up\n").unwrap();
    world.works_soon("a");
}

#[test]
fn an_ingress_without_carrier_or_gone() {
    needs_root!();
    let world = World::new(&["--backend", "packet", "--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]);
    world.lab.src.ip_batch("link set s0 down\n").unwrap();
    assert_eq!(world.says("a", None, "the ingress interface r0 has no carrier"), "bring its other end up");
    world.lab.src.ip_batch("link set s0 up\n").unwrap();
    world.works_soon("a");
    world.lab.relay.ip_batch("link del r0\n").unwrap();
    let remedy = world.says("a", None, "the ingress interface r0 is missing");
    assert_eq!(remedy, "make the interface r0; the relay takes it up again by itself");
    let lines = format!("link add r0 type veth peer name s0 netns {}\naddr add 10.0.0.2/24 dev r0\nlink set r0 up\n", world.lab.src.name());
    world.lab.relay.ip_batch(&lines).unwrap();
    world.lab.src.ip_batch("addr add 10.0.0.1/24 dev s0\nlink set s0 up\n").unwrap();
    world.works_soon("a");
}

#[test]
fn a_rate_and_a_listener_without_privileges() {
    needs_root!();
    let world = World::new(&["--backend", "packet", "--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 rate=50pps; id=a"]);
    let remedy = world.says("a", Some(&traffic(GROUP)), "they exceed the output's rate=");
    assert_eq!(remedy, "raise or leave out rate= on the output");
    world.change("a", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a");
    world.works("a", &traffic(GROUP));
    let mut command = world.lab.relay.command("setpriv").unwrap();
    command.args(["--bounding-set", "-net_raw", "--inh-caps", "-net_raw"]).arg(relay_bin().unwrap());
    let Ok(output) = command.args(["why", "a", "--json", "--listen", "100ms", "--socket"]).arg(world.relay.socket()).output() else {
        eprintln!("SKIPPED: needs setpriv (util-linux)");
        return;
    };
    let answer = serde_json::from_slice(&output.stdout).unwrap();
    assert!(self::remedy(&answer, "what passes by was not seen").starts_with("run it as root"), "{answer}");
}

#[test]
fn a_queue_without_a_worker() {
    needs_root!();
    let spec = LabSpec { queues: 2, ..LabSpec::default() };
    let world = World::of(spec, &["--backend", "xsk", "--workers", "1", "--rule", "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a"]);
    // A flow keeps the queue its sender's hash gave it: try a few source ports.
    let answers: Vec<Value> =
        (0..8).map(|_| world.why("a", Some(&traffic(GROUP))).0).take_while(|a| !a.to_string().contains("no worker serves")).collect();
    assert!(answers.len() < 8, "no flow came in on the second queue: {answers:?}");
    let unserved = world.why("a", Some(&traffic(GROUP))).0.to_string();
    assert!(!unserved.contains("no worker serves") || unserved.contains("ethtool -L PEER tx 1"), "{unserved}");
    world.lab.src.output("ethtool", &["-L", "s0", "tx", "1"]).unwrap();
    world.works("a", &traffic(GROUP));
}

/// A worker that has no time loses what no rule has seen yet; more packet memory, as the remedy says, bridges the same pause.
#[test]
fn a_worker_that_is_too_slow() {
    needs_root!();
    let rule = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a";
    for (frames, is_enough) in [("1024", false), ("65536", true)] {
        let world = World::new(&["--backend", "xsk", "--workers", "1", "--frames", frames, "--rule", rule]);
        let worker = world.relay.worker_pids().unwrap()[0];
        let fast = send_args("s0", GROUP, 20_000, 60_000).unwrap();
        let (answer, _) = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(400));
                signal_pid(worker, Signal::SIGSTOP).unwrap();
                std::thread::sleep(Duration::from_millis(200));
                // It may have been taken for hung, and replaced.
                let _ = signal_pid(worker, Signal::SIGCONT);
            });
            world.why("a", Some(&fast))
        });
        if is_enough {
            assert!(!answer.to_string().contains("before any rule takes them"), "{answer}");
        } else {
            let remedy = remedy(&answer, "packets before any rule takes them: the worker is too slow");
            assert!(remedy.contains("--frames N"), "{remedy}");
        }
    }
}

#[test]
fn a_narrower_rule_takes_them() {
    needs_root!();
    let rules = [
        "--backend",
        "xsk",
        "--rule",
        "r0 239.1.0.0/16:5000 -> r1 239.9.9.9:6000; id=wide",
        "--rule",
        "r0 239.1.1.1:5000 -> r1 239.9.9.8:6000; id=narrow",
    ];
    let world = World::new(&rules);
    let remedy = world.says("wide", Some(&traffic(GROUP)), "rule narrow takes");
    assert!(remedy.contains("delete rule narrow"), "{remedy}");
    world.relay.command(&["rule", "del", "narrow"]).unwrap();
    world.works("wide", &traffic(GROUP));
}

#[test]
fn an_unknown_id_is_bad_input() {
    needs_root!();
    let world = World::new(&["--backend", "packet", "--rule", "r0 239.1.1.1:5000 -> r1; id=alpha"]);
    let output = world
        .lab
        .relay
        .command(relay_bin().unwrap())
        .unwrap()
        .args(["why", "alhpa", "--socket"])
        .arg(world.relay.socket())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("did you mean alpha?"), "{output:?}");
}
