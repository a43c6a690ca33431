//! Behind a snooping switch, a group flows only to ports with members: the relay's joins must stand for as long as its rules.
//!
//! A bridge with a fast querier (2 s, membership 5 s) stands between sender and relay; traffic flows over more than three
//! membership intervals. A relay told not to join loses the stream meanwhile, which proves that the bridge snoops.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::Namespace;
use relay::lab::recv::Report;
use relay::lab::send::send;
use relay_tests::paths::{PATHS, Path};
use relay_tests::{Listener, RelayProcess, needs_root, relay_bin, rule_stats, send_args};
use std::time::Duration;

const RATE: u64 = 200;
/// In the first 9 to 10 s a switch floods: it waits for other queriers **[measured]**.
const FLOODED: u64 = 11 * RATE;
/// Three membership intervals of 5 s after that.
const COUNT: u64 = FLOODED + 16 * RATE;

struct Switched {
    src: Namespace,
    _bridge: Namespace,
    relay: Namespace,
    sink: Namespace,
}

fn build() -> Switched {
    let lab = Switched {
        src: Namespace::create("src").unwrap(),
        _bridge: Namespace::create("bridge").unwrap(),
        relay: Namespace::create("relay").unwrap(),
        sink: Namespace::create("sink").unwrap(),
    };
    // Times are in hundredths of a second.
    let bridge = "link add switch type bridge mcast_snooping 1 mcast_querier 1 mcast_query_interval 200 mcast_membership_interval 500 \
                  mcast_query_response_interval 100 mcast_querier_interval 500 mcast_startup_query_interval 50 \
                  mcast_startup_query_count 2\n";
    let pairs = format!(
        "{bridge}link add b0 type veth peer name s0 netns {}\nlink add b1 type veth peer name r0 netns {}\n\
         link set b0 master switch\nlink set b1 master switch\nlink set b0 up\nlink set b1 up\nlink set switch up\n",
        lab.src.name(),
        lab.relay.name()
    );
    lab._bridge.ip_batch(&pairs).unwrap();
    lab.src.ip_batch("addr add 10.0.0.1/24 dev s0\nlink set s0 up\nroute add 224.0.0.0/4 dev s0\n").unwrap();
    let relay = format!(
        "link add r1 type veth peer name k1 netns {}\naddr add 10.0.0.2/24 dev r0\nlink set r0 up\n\
         addr add 10.0.1.1/24 dev r1\nlink set r1 up\n",
        lab.sink.name()
    );
    lab.relay.ip_batch(&relay).unwrap();
    lab.sink.ip_batch("addr add 10.0.1.2/24 dev k1\nlink set k1 up\n").unwrap();
    lab
}

/// The stream's fate behind the bridge, and how many packets the rule took.
fn relayed(path: &Path, keys: &str) -> (Report, u64) {
    let lab = build();
    let rule = format!("r0 239.1.1.1:5000 -> r1 239.9.9.9:6000; id=a{keys}");
    let args: Vec<&str> = path.args.iter().copied().chain(["--rule", &rule]).collect();
    let mut relay = RelayProcess::start(&lab.relay, &relay_bin().unwrap(), &args).unwrap();
    relay.wait_ready().unwrap();
    path.check(&relay).unwrap();
    assert_eq!(relay.rules().unwrap()[0]["joined"], keys.is_empty());
    // The report of the join and the first query have passed.
    std::thread::sleep(Duration::from_secs(1));
    let mut listening = relay_tests::recv_args("k1", "239.9.9.9:6000", None).unwrap();
    listening.timeout = Duration::from_secs(60);
    let listener = Listener::with(&lab.sink, &listening).unwrap();
    let args = send_args("s0", "239.1.1.1:5000", RATE, COUNT).unwrap();
    let sent = lab.src.run(|| send(&args)).unwrap().unwrap();
    assert_eq!(sent.sent, COUNT);
    std::thread::sleep(Duration::from_millis(200));
    let report = listener.finish().unwrap();
    let taken = rule_stats(&relay.stats().unwrap(), "a").unwrap()["rx_packets"].as_u64().unwrap();
    (report, taken)
}

/// All at once: each needs its 27 s, and hardly any CPU.
#[test]
fn a_snooping_switch_keeps_sending_to_the_relay() {
    needs_root!();
    let (all, without) = std::thread::scope(|scope| {
        let all = PATHS.map(|path| scope.spawn(move || relayed(&path, "")));
        let without = PATHS.map(|path| scope.spawn(move || relayed(&path, " join=no")));
        (all.map(|thread| thread.join().unwrap()), without.map(|thread| thread.join().unwrap()))
    });
    for (path, (report, taken)) in PATHS.iter().zip(&all) {
        let got = (report.received, report.lost, report.duplicated, report.reordered, *taken);
        assert_eq!(got, (COUNT, 0, 0, 0, COUNT), "{}: {report:?}", path.name);
    }
    for (path, (report, taken)) in PATHS.iter().zip(&without) {
        eprintln!("{}: without a join {} of {COUNT} arrived", path.name, report.received);
        assert!(report.received < FLOODED && *taken == report.received, "{}: the bridge does not snoop: {report:?}", path.name);
    }
}
