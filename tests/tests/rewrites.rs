//! The rewrite corpus over the wire: what leaves the egress interfaces is the golden frame, bit for bit, on every path; what doesn't
//! is counted under its name.
//!
//! One relay with a rule for each case. Interfaces have the corpus's MAC addresses, neighbours are permanent, tags are captured too.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use relay_tests::paths::{Moved, Path, moved};
use relay_tests::raw::{Capture, Injector};
use relay_tests::rewrites::{self, Case, Fate, HOPS, LINKS, SINK_MACS};
use relay_tests::{Lab, LabSpec, RelayProcess, assert_frames_conserved, assert_rules_conserved, coalescing, on_every_path};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

on_every_path!(golden_frames_come_out);
coalescing!(golden_frames_leave_among_super_frames);

/// By egress interface: frames, with the case and output they belong to.
type Frames = BTreeMap<&'static str, Vec<(Vec<u8>, String)>>;

fn mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The corpus's world.
fn lab() -> Lab {
    let lab = Lab::new(LabSpec { sinks: 2, separate_sinks: true, ..LabSpec::default() }).unwrap();
    let mut lines = String::new();
    for link in LINKS {
        let _ = writeln!(lines, "link set {} address {} mtu {}", link.name, mac(link.mac), link.mtu);
        let _ = lab.relay.output("ethtool", &["-K", link.name, "txvlan", "off", "rxvlan", "off"]);
    }
    for (egress, address, via) in HOPS {
        let station = SINK_MACS[usize::from(egress == "r2")];
        let _ = writeln!(lines, "neigh replace {via} lladdr {} dev {egress} nud permanent", mac(station));
        if via != address {
            let _ = writeln!(lines, "route add {address} via {via}");
        }
    }
    for (number, station) in SINK_MACS.into_iter().enumerate() {
        let name = format!("k{}", number + 1);
        lab.sink(number as u32 + 1).ip_batch(&format!("link set {name} address {}\n", mac(station))).unwrap();
        let _ = lab.sink(number as u32 + 1).output("ethtool", &["-K", &name, "txvlan", "off", "rxvlan", "off"]);
    }
    let _ = lab.src.output("ethtool", &["-K", "s0", "txvlan", "off", "rxvlan", "off"]);
    lab.relay.ip_batch(&lines).unwrap();
    lab
}

/// What has to come out, and what the rules have to count.
fn expected(cases: &[Case]) -> (Frames, BTreeMap<&str, Moved>) {
    let (mut frames, mut counts) = (Frames::new(), BTreeMap::new());
    for case in cases {
        let mut count = Moved { rx: 1, ..Moved::default() };
        match &case.fate {
            Err(reason) => {
                let outputs = case.rule.matches(',').count() + 1;
                count = Moved::dropped(1, reason, outputs);
            }
            Ok(fates) => fates.iter().enumerate().for_each(|(number, fate)| match fate {
                Fate::Sent(egress, frame) => {
                    frames.entry(egress).or_default().push((frame.clone(), format!("{} output {number}", case.name)));
                    count.tx.push(1);
                    count.output_drops.push(BTreeMap::new());
                }
                Fate::Dropped(reason) => {
                    count.tx.push(0);
                    count.output_drops.push([((*reason).to_owned(), 1)].into());
                }
            }),
        }
        counts.insert(case.name.as_str(), count);
    }
    (frames, counts)
}

/// Sends `copies` of each packet and compares. A neighbour that the relay hasn't heard of yet shows in no count: all are permanent.
fn carry(path: &Path, copies: usize) {
    let (lab, cases) = (lab(), rewrites::corpus());
    let (wanted, counts) = expected(&cases);
    let rules: Vec<&str> = cases.iter().map(|case| case.rule.as_str()).collect();
    let relay = path.start(&lab, &rules).unwrap();
    let unicast: Vec<IpAddr> = HOPS.iter().map(|(_, address, _)| address.parse().unwrap()).collect();
    let captures = [("r1", Capture::on(lab.sink(1), "k1", &unicast).unwrap()), ("r2", Capture::on(lab.sink(2), "k2", &unicast).unwrap())];
    let injector = Injector::on(&lab.src, "s0").unwrap();
    let (before, begin) = (relay.stats().unwrap(), Instant::now());
    for case in &cases {
        (0..copies).for_each(|_| injector.send(&case.packet).unwrap());
    }
    let mut out: BTreeMap<&str, Vec<Vec<u8>>> = BTreeMap::new();
    let done =
        |out: &BTreeMap<&str, Vec<Vec<u8>>>| wanted.iter().all(|(name, frames)| out.get(name).map_or(0, Vec::len) >= frames.len() * copies);
    while !done(&out) && begin.elapsed() < Duration::from_secs(3) {
        std::thread::sleep(Duration::from_millis(10));
        captures.iter().for_each(|(name, capture)| out.entry(name).or_default().extend(capture.whole_frames()));
    }
    // What must not come has its time too.
    std::thread::sleep(Duration::from_millis(100));
    captures.iter().for_each(|(name, capture)| out.entry(name).or_default().extend(capture.whole_frames()));
    for (name, frames) in &wanted {
        assert_frames(path, name, frames, out.remove(name).unwrap_or_default(), copies);
    }
    assert_counts(path, &relay, &before, &counts, copies as u64);
    eprintln!("{}: {} cases, {} frames out, all golden", path.name, cases.len(), wanted.values().map(Vec::len).sum::<usize>() * copies);
}

/// The same frames, none missing and none besides.
fn assert_frames(path: &Path, egress: &str, wanted: &[(Vec<u8>, String)], out: Vec<Vec<u8>>, copies: usize) {
    let mut out: Vec<Vec<u8>> = out.iter().map(|frame| rewrites::without_padding(frame).to_vec()).collect();
    let mut missing = Vec::new();
    for (frame, case) in wanted {
        for _ in 0..copies {
            match out.iter().position(|one| one == frame) {
                Some(at) => drop(out.swap_remove(at)),
                None => missing.push(format!("{case}: {}", head(frame))),
            }
        }
    }
    let besides: Vec<String> = out.iter().map(|frame| head(frame)).collect();
    assert!(
        missing.is_empty() && besides.is_empty(),
        "{} {egress}: missing\n{}\ncame instead\n{}",
        path.name,
        missing.join("\n"),
        besides.join("\n")
    );
}

/// The headers, in hexadecimal.
fn head(frame: &[u8]) -> String {
    rewrites::hex(frame.get(..90).unwrap_or(frame))
}

fn assert_counts(path: &Path, relay: &RelayProcess, before: &serde_json::Value, counts: &BTreeMap<&str, Moved>, copies: u64) {
    let begin = Instant::now();
    loop {
        let after = relay.stats().unwrap();
        let wrong = counts.iter().find_map(|(id, count)| {
            let (now, wanted) = (moved(before, &after, id).unwrap(), times(count, copies));
            (now != wanted).then(|| format!("rule {id} counted {now:?}, not {wanted:?}"))
        });
        let Some(wrong) = wrong else {
            assert_rules_conserved(&after);
            assert_frames_conserved(&after);
            return;
        };
        assert!(begin.elapsed() < Duration::from_secs(2), "{}: {wrong}", path.name);
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn times(count: &Moved, copies: u64) -> Moved {
    let drops = |drops: &BTreeMap<String, u64>| drops.iter().map(|(name, count)| (name.clone(), count * copies)).collect();
    Moved {
        rx: count.rx * copies,
        drops: drops(&count.drops),
        tx: count.tx.iter().map(|count| count * copies).collect(),
        output_drops: count.output_drops.iter().map(drops).collect(),
    }
}

fn golden_frames_come_out(path: &Path) {
    carry(path, 1);
}

/// Each packet goes alone here; runs are coalesce.rs's matter.
fn golden_frames_leave_among_super_frames(path: &Path) {
    carry(path, 1);
}
