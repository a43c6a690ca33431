//! Two relays back to back between the same two segments: a packet goes round until its TTL ends it, and both the end and the
//! suspicion are told. A rule that would feed itself is refused.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::{Namespace, RelayProcess, enable_gro};
use relay_tests::paths::{Moved, Path, await_moved};
use relay_tests::{assert_rules_conserved, on_every_path, relay_bin, send_args};
use std::time::Duration;

on_every_path!(two_relays_end_by_ttl, a_circle_is_refused);

const COUNT: u64 = 100;

struct World {
    sender: Namespace,
    _segments: Namespace,
    relays: [Namespace; 2],
}

/// Two bridges are the segments; each relay has a leg in both, the sender one in the first.
fn world() -> World {
    let world = World {
        sender: Namespace::create("sender").unwrap(),
        _segments: Namespace::create("segments").unwrap(),
        relays: [Namespace::create("left").unwrap(), Namespace::create("right").unwrap()],
    };
    let mut lines = String::new();
    for segment in 0..2 {
        lines += &format!("link add seg{segment} type bridge mcast_snooping 0\nlink set seg{segment} up\n");
        for (number, relay) in world.relays.iter().enumerate() {
            let port = format!("p{number}{segment}");
            lines += &format!(
                "link add {port} type veth peer name r{segment} netns {}\nlink set {port} master seg{segment}\nlink set {port} up\n",
                relay.name()
            );
        }
    }
    lines += &format!("link add ps type veth peer name s0 netns {}\nlink set ps master seg0\nlink set ps up\n", world.sender.name());
    world._segments.ip_batch(&lines).unwrap();
    for port in ["p00", "p01", "p10", "p11"] {
        enable_gro(&world._segments, port).unwrap();
    }
    for (number, relay) in world.relays.iter().enumerate() {
        let legs = (0..2).map(|segment| format!("addr add 10.0.{segment}.{}/24 dev r{segment}\nlink set r{segment} up\n", number + 1));
        relay.ip_batch(&legs.collect::<String>()).unwrap();
    }
    world.sender.ip_batch("addr add 10.0.0.9/24 dev s0\nlink set s0 up\nroute add 224.0.0.0/4 dev s0\n").unwrap();
    world
}

fn start(path: &Path, namespace: &Namespace, rule: &str) -> RelayProcess {
    let args: Vec<&str> = path.args.iter().copied().chain(["--rule", rule]).collect();
    let mut relay = RelayProcess::start(namespace, &relay_bin().unwrap(), &args).unwrap();
    relay.wait_ready().unwrap();
    path.check(&relay).unwrap();
    relay
}

/// TTL 16: there 16, 14 … 2, back 15, 13 … 1, and the last one is not sent again.
fn two_relays_end_by_ttl(path: &Path) {
    let world = world();
    let there = start(path, &world.relays[0], "r0 239.1.1.1:5000 -> r1; id=a");
    let back = start(path, &world.relays[1], "r1 239.1.1.1:5000 -> r0; id=a");
    let before = [there.stats().unwrap(), back.stats().unwrap()];
    let mut args = send_args("s0", "239.1.1.1:5000", 100, COUNT).unwrap();
    args.ttl = 16;
    world.sender.run(|| relay::lab::send::send(&args)).unwrap().unwrap();
    assert_rules_conserved(&await_moved(&there, &before[0], "a", &Moved::all(8 * COUNT, 1)).unwrap());
    let expired = [("ttl_expired".to_owned(), COUNT)].into();
    let wanted = Moved { tx: vec![7 * COUNT], output_drops: vec![expired], ..Moved::all(8 * COUNT, 1) };
    assert_rules_conserved(&await_moved(&back, &before[1], "a", &wanted).unwrap());
    std::thread::sleep(Duration::from_millis(1_200));
    assert_eq!(back.rules().unwrap()[0]["loop_suspected"], true, "{}", back.log());
    assert!(back.log().contains("does another relay send them back"), "{}", back.log());
}

/// Within one relay: at the start, and at run time without a change.
fn a_circle_is_refused(path: &Path) {
    let world = world();
    let relay = start(path, &world.relays[0], "r0 239.1.1.1:5000 -> r1; id=there");
    let refused = relay.client(&["rule", "add", "r1 239.1.1.1:5000 -> r0; id=back"], false).unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{text}");
    assert!(text.contains("there") && text.contains("back") && text.contains("circle"), "{text}");
    assert_eq!(relay.rules().unwrap().as_array().unwrap().len(), 1);
    relay.command(&["rule", "add", "r1 239.1.1.1:5000 -> r0 239.1.1.2; id=onward"]).unwrap();
}
