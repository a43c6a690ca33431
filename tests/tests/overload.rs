//! More than the relay can carry: what is lost has a name and is as much as the outside says, at every moment; afterwards nothing is
//! lost, and no memory has grown.
//!
//! Flat out for a second or two on each path; `RELAY_TEST_LONG=1`: then 110 % of what it has delivered for 60 s, then 50 %. Flat out is
//! no overload of the kernel path, which keeps pace with a generator on its own CPU. Must never bound a rate: a busy machine carries
//! less.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay::lab::generator::{Generator, received};
use relay_tests::paths::{Moved, Outside, Path, long, moved};
use relay_tests::process::kib;
use relay_tests::stream::Stream;
use relay_tests::{Lab, RelayProcess, assert_frames_conserved, assert_rules_conserved, interface_stats, on_every_path};
use serde_json::Value;
use std::time::{Duration, Instant};

on_every_path!(an_overload_is_accounted_for_and_leaves_nothing_behind);

const RULE: &str = "r0 239.1.1.1:5000 -> r1 239.9.9.9:6000 ttl=keep; id=stream";
const FROM: &str = "239.1.1.1:5000";
const TO: &str = "239.9.9.9:6000";
const FLAT_OUT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(60);
/// Packets of one call of the generator.
const CALL: u32 = 300_000;
/// What the kernels send by themselves (neighbour discovery, memberships).
const STRAY: u64 = 100;
/// Frames of a worker: as much can be on its way.
const FRAMES: u64 = 1 << 15;
/// Memory that may come and go, KiB.
const GROWTH: u64 = 2 << 10;

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// Packets r0 has taken, and those it has dropped by name.
fn ingress(stats: &Value) -> (u64, u64) {
    let interface = interface_stats(stats, "r0").unwrap();
    (number(&interface["rx_packets"]), interface["drops"].as_object().unwrap().values().map(number).sum())
}

/// Memory of supervisor and workers that is nobody else's, KiB.
fn memory(relay: &RelayProcess) -> u64 {
    let pids = relay.worker_pids().unwrap();
    pids.iter().chain([&relay.pid()]).map(|pid| kib(*pid, "RssAnon").unwrap()).sum()
}

/// What a relay says of itself while `load` runs in another thread, held against k1's own counter: it has never sent less than has
/// arrived, nor more than could still be on its way. Memory a moment after the begin, and at the end.
fn watch(lab: &Lab, relay: &RelayProcess, before: &Value, load: impl FnOnce() -> u64 + Send) -> (u64, [u64; 2]) {
    let own = received(lab.sink(1), "k1").unwrap() - moved(before, &relay.stats().unwrap(), "stream").unwrap().tx[0];
    std::thread::scope(|scope| {
        let sending = scope.spawn(load);
        std::thread::sleep(Duration::from_millis(200));
        let early = memory(relay);
        let mut looks = 0;
        while !sending.is_finished() {
            let arrived = received(lab.sink(1), "k1").unwrap() - own;
            let stats = relay.stats().unwrap();
            let later = received(lab.sink(1), "k1").unwrap() - own;
            let counted = moved(before, &stats, "stream").unwrap();
            let failed: u64 = counted.output_drops[0].get("send_failed").copied().unwrap_or(0);
            assert!(arrived <= counted.tx[0] + STRAY, "{arrived} have arrived: {counted:?}");
            assert!(counted.tx[0] <= later + FRAMES + failed, "{later} have arrived: {counted:?}");
            looks += 1;
            std::thread::sleep(Duration::from_millis(100));
        }
        let late = memory(relay);
        println!("{looks} looks, {early} KiB early and {late} KiB late");
        (sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), [early, late])
    })
}

/// What became of the packets offered since some moment.
#[derive(Debug)]
struct Account {
    /// Lost between the sender and the relay's interface.
    outside: u64,
    taken: u64,
    dropped: u64,
    counted: Moved,
    arrived: u64,
}

impl Account {
    /// Everything offered was lost before the relay, or dropped by name, or has arrived.
    fn closes(&self, offered: u64) -> bool {
        let Self { outside, taken, dropped, counted, arrived } = self;
        offered == taken + outside
            && *taken == counted.rx + dropped + counted.drops.values().sum::<u64>()
            && (counted.tx[0]..=counted.tx[0] + STRAY).contains(arrived)
    }

    fn lost(&self) -> u64 {
        self.dropped + self.counted.output_drops[0].values().sum::<u64>()
    }
}

/// One overload, and its account once everything has arrived. Packets delivered a second.
fn overload(path: &Path, lab: &Lab, relay: &RelayProcess, load: impl FnOnce() -> u64 + Send) -> f64 {
    let (before, outside) = (relay.stats().unwrap(), Outside::of(lab, relay, "stream").unwrap());
    let (own, (taken, dropped)) = (received(lab.sink(1), "k1").unwrap(), ingress(&before));
    let begin = Instant::now();
    let (offered, [early, late]) = watch(lab, relay, &before, load);
    let (seconds, end) = (begin.elapsed().as_secs_f64(), Instant::now());
    let account = || {
        let after = relay.stats().unwrap();
        let (counted, (taken_now, dropped_now)) = (moved(&before, &after, "stream").unwrap(), ingress(&after));
        let failed = counted.output_drops[0].get("send_failed").copied().unwrap_or(0);
        let outside = outside.lost(relay).unwrap().saturating_sub(failed);
        let arrived = received(lab.sink(1), "k1").unwrap() - own;
        Account { outside, taken: taken_now - taken, dropped: dropped_now - dropped, counted, arrived }
    };
    let mut last = account();
    while !last.closes(offered) {
        assert!(end.elapsed() < Duration::from_secs(10), "{offered} offered: {last:?}; {}", relay.stats().unwrap());
        std::thread::sleep(Duration::from_millis(50));
        last = account();
    }
    println!("{}: offered {offered}, {last:?}", path.name);
    assert_rules_conserved(&relay.stats().unwrap());
    assert_frames_conserved(&relay.stats().unwrap());
    if last.lost() == 0 {
        println!("{}: no overload: it keeps pace with the generator here", path.name);
    }
    assert!(late <= early + GROWTH, "memory grew from {early} to {late} KiB");
    last.arrived as f64 / seconds
}

fn an_overload_is_accounted_for_and_leaves_nothing_behind(path: &Path) {
    let lab = Lab::simple().unwrap();
    let relay = path.start(&lab, &[RULE]).unwrap();
    let mut generator = Generator::new(&lab, FROM.parse().unwrap(), 64).unwrap();
    let delivered = overload(path, &lab, &relay, || {
        let (mut offered, begin) = (0, Instant::now());
        while begin.elapsed() < FLAT_OUT {
            generator.send(&lab, 0, CALL).unwrap();
            offered += u64::from(CALL);
        }
        offered
    });
    let mut rate = 10_000;
    if long() {
        let load = || generator.paced(&lab, 0, (delivered * 1.1) as u64, LONG).unwrap();
        let delivered = overload(path, &lab, &relay, load);
        rate = (delivered / 2.0).min(100_000.0) as u64;
        assert_eq!(
            relay.status().unwrap()["workers"].as_array().map_or(0, |workers| workers.iter().map(|w| number(&w["restarts"])).sum()),
            0
        );
    }
    let stream = Stream { rule: "stream", from: FROM, to: TO, rate, count: rate / 2, worked: path.path != "kernel" };
    stream.loses_nothing(&lab, &relay, || {}).unwrap();
}
