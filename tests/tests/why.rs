//! `relay why ID`: each cause made on purpose, told in a sentence with its remedy, and no longer told after the remedy.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set up its world has failed")]

use relay::lab::{Lab, LabSpec, RelayProcess, send};
use relay_tests::{needs_root, relay_bin, send_args, start_relay};
use serde_json::Value;

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
        std::thread::scope(|scope| {
            let sending = traffic.map(|args| scope.spawn(|| self.lab.src.run(|| send::send(args)).unwrap().unwrap()));
            std::thread::sleep(std::time::Duration::from_millis(100));
            let mut command = self.lab.relay.command(relay_bin().unwrap()).unwrap();
            command.args(["why", id, "--json", "--listen", "1s", "--socket"]).arg(self.relay.socket());
            let output = command.output().unwrap();
            sending.map(|thread| thread.join().unwrap());
            let answer = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
            (answer, output.status.code().unwrap())
        })
    }

    /// A sentence holds these words. Returns its remedy.
    fn says(&self, id: &str, traffic: Option<&send::Args>, words: &str) -> String {
        let (answer, code) = self.why(id, traffic);
        assert_eq!((code, answer["moving"].as_bool()), (5, Some(false)), "{answer}");
        let of = answer["sentences"].as_array().unwrap().iter().find(|one| one["sentence"].as_str().unwrap().contains(words));
        let remedy = of.unwrap_or_else(|| panic!("no `{words}` in {answer}"))["remedy"].as_str().unwrap().to_owned();
        assert!(!remedy.is_empty(), "{answer}");
        remedy
    }

    fn works(&self, id: &str, traffic: &send::Args) {
        let (answer, code) = self.why(id, Some(traffic));
        assert_eq!((code, answer["moving"].as_bool()), (0, Some(true)), "{answer}");
        assert!(answer["sentences"][0]["sentence"].as_str().unwrap().contains("works"), "{answer}");
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

/// 200 a second for 1.6 s.
fn traffic(to: &str) -> send::Args {
    send_args("s0", to, 200, 320).unwrap()
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
            std::thread::sleep(std::time::Duration::from_millis(10));
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
    std::thread::sleep(std::time::Duration::from_secs(2));
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
