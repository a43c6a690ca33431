//! Behind a snooping switch, a group flows only to ports with members: the relay's joins must stand for as long as its rules.
//!
//! A bridge with a fast querier (2 s, membership 5 s) stands between sender and relay; traffic flows over more than one
//! membership interval (three with `RELAY_TEST_LONG=1`), for any source and for one, over IPv4 and IPv6. A relay told not to join loses the stream meanwhile,
//! which proves that the bridge snoops.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::recv::Report;
use relay::lab::send::send;
use relay::lab::{Namespace, enable_gro};
use relay_tests::paths::{PATHS, Path, long};
use relay_tests::{Listener, RelayProcess, needs_root, relay_bin, rule_stats, send_args};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const RATE: u64 = 200;
/// In the first 9 to 10 s a switch floods: it waits for other queriers **[measured]**.
const FLOODED: u64 = 11 * RATE;
/// More than one membership interval of 5 s after that; three in the long form.
fn count() -> u64 {
    FLOODED + if long() { 16 } else { 7 } * RATE
}

/// What flows: the rule's match, the sender's destination, what the sink gets.
struct Flow {
    name: &'static str,
    matching: &'static str,
    to: &'static str,
    out: &'static str,
}

const FLOWS: [Flow; 4] = [
    Flow { name: "IPv4, any source", matching: "239.1.1.1:5000", to: "239.1.1.1:5000", out: "239.9.9.9:6000" },
    Flow { name: "IPv4, one source", matching: "10.0.0.1@232.1.1.1:5000", to: "232.1.1.1:5000", out: "232.9.9.9:6000" },
    Flow { name: "IPv6, any source", matching: "[ff1e::1234]:5000", to: "[ff1e::1234]:5000", out: "[ff1e::9]:6000" },
    Flow { name: "IPv6, one source", matching: "[fd00::1]@[ff3e::1234]:5000", to: "[ff3e::1234]:5000", out: "[ff3e::9]:6000" },
];

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
    for namespace in [&lab.src, &lab._bridge, &lab.relay, &lab.sink] {
        for kind in ["all", "default"] {
            namespace.sysctl(&format!("ipv6/conf/{kind}/accept_dad"), "0").unwrap();
        }
    }
    // Times are in hundredths of a second.
    let bridge = "link add switch type bridge mcast_snooping 1 mcast_querier 1 mcast_query_interval 200 mcast_membership_interval 500 \
                  mcast_query_response_interval 100 mcast_querier_interval 500 mcast_startup_query_interval 50 \
                  mcast_startup_query_count 2 mcast_igmp_version 3 mcast_mld_version 2\n";
    let pairs = format!(
        "{bridge}link add b0 type veth peer name s0 netns {}\nlink add b1 type veth peer name r0 netns {}\n\
         link set b0 master switch\nlink set b1 master switch\nlink set b0 up\nlink set b1 up\nlink set switch up\n",
        lab.src.name(),
        lab.relay.name()
    );
    lab._bridge.ip_batch(&pairs).unwrap();
    lab.src
        .ip_batch("addr add 10.0.0.1/24 dev s0\naddr add fd00::1/64 dev s0 nodad\nlink set s0 up\nroute add 224.0.0.0/4 dev s0\n")
        .unwrap();
    let relay = format!(
        "link add r1 type veth peer name k1 netns {}\naddr add 10.0.0.2/24 dev r0\naddr add fd00::2/64 dev r0 nodad\nlink set r0 up\n\
         addr add 10.0.1.1/24 dev r1\nlink set r1 up\n",
        lab.sink.name()
    );
    lab.relay.ip_batch(&relay).unwrap();
    lab.sink.ip_batch("addr add 10.0.1.2/24 dev k1\naddr add fd00:0:0:1::2/64 dev k1 nodad\nlink set k1 up\n").unwrap();
    enable_gro(&lab.sink, "k1").unwrap();
    lab
}

/// One after the other: the kernel verifies the program for each, and two dozen at once would wait for each other.
fn start(namespace: &Namespace, args: &[&str]) -> RelayProcess {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut relay = RelayProcess::start(namespace, &relay_bin().unwrap(), args).unwrap();
    relay.wait_ready().unwrap();
    relay
}

/// The stream's fate behind the bridge, and how many packets the rule took.
fn relayed(path: &Path, flow: &Flow, keys: &str) -> (Report, u64) {
    let lab = build();
    let rule = format!("r0 {} -> r1 {}; id=a{keys}", flow.matching, flow.out);
    let args: Vec<&str> = path.args.iter().copied().chain(["--rule", &rule]).collect();
    let relay = start(&lab.relay, &args);
    path.check(&relay).unwrap();
    assert_eq!(relay.rules().unwrap()[0]["joined"], keys.is_empty());
    // The report of the join and the first query have passed.
    std::thread::sleep(Duration::from_secs(1));
    let mut listening = relay_tests::recv_args("k1", flow.out, None).unwrap();
    listening.timeout = Duration::from_secs(60);
    let listener = Listener::with(&lab.sink, &listening).unwrap();
    let args = send_args("s0", flow.to, RATE, count()).unwrap();
    let sent = lab.src.run(|| send(&args)).unwrap().unwrap();
    assert_eq!(sent.sent, count());
    std::thread::sleep(Duration::from_millis(200));
    let report = listener.finish().unwrap();
    let taken = rule_stats(&relay.stats().unwrap(), "a").unwrap()["rx_packets"].as_u64().unwrap();
    let heard = relay.rules().unwrap()[0]["query_age_ms"].as_u64();
    assert!(heard.is_some_and(|age| age < 5_000), "{}: the last query was heard {heard:?} ms ago", flow.name);
    (report, taken)
}

/// All at once: each needs its 18 s, and hardly any CPU.
#[test]
fn a_snooping_switch_keeps_sending_to_the_relay() {
    needs_root!();
    let cases = || PATHS.iter().flat_map(|path| FLOWS.iter().map(move |flow| (path, flow)));
    // Each flow once, and each path once, proves that the bridge snoops.
    let proofs = || cases().enumerate().filter(|(at, _)| *at < FLOWS.len() || at % FLOWS.len() == 0).map(|(_, case)| case);
    let (all, without) = std::thread::scope(|scope| {
        let all: Vec<_> = cases().map(|(path, flow)| scope.spawn(move || relayed(path, flow, ""))).collect();
        let without: Vec<_> = proofs().map(|(path, flow)| scope.spawn(move || relayed(path, flow, " join=no"))).collect();
        let end = |threads: Vec<std::thread::ScopedJoinHandle<'_, (Report, u64)>>| -> Vec<(Report, u64)> {
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        };
        (end(all), end(without))
    });
    for ((path, flow), (report, taken)) in cases().zip(&all) {
        let got = (report.received, report.lost, report.duplicated, report.reordered, *taken);
        assert_eq!(got, (count(), 0, 0, 0, count()), "{}, {}: {report:?}", path.name, flow.name);
    }
    for ((path, flow), (report, taken)) in proofs().zip(&without) {
        eprintln!("{}, {}: without a join {} of {} arrived", path.name, flow.name, report.received, count());
        let snooped = report.received < FLOODED && *taken == report.received;
        assert!(snooped, "{}, {}: the bridge does not snoop: {report:?}", path.name, flow.name);
    }
}
