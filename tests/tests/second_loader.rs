//! A second opinion: libbpf opens and loads the committed objects, and finds in them what aya finds.

use libbpf_rs::{MapCore as _, MapType, ObjectBuilder};
use relay::nic::afxdp::program::{LAB_OBJECT, RELAY_OBJECT};
use relay_common::{COUNTER_SLOTS, MAX_INTERFACES, MAX_MATCHES, MAX_QUEUES, MAX_SOURCES, XdpCounter};

fn can_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIPPED: loading XDP programs needs root");
    }
    root
}

#[test]
fn libbpf_loads_the_relay_object() {
    if !can_run() {
        return;
    }
    let object = ObjectBuilder::default().open_memory(RELAY_OBJECT).unwrap().load().unwrap();
    let found = |name: &str| {
        let map = object.maps().find(|map| map.name() == name).unwrap_or_else(|| panic!("no map {name}"));
        (map.map_type(), map.key_size(), map.value_size(), map.max_entries())
    };
    assert_eq!(found("INGRESS"), (MapType::Hash, 4, 160, MAX_INTERFACES));
    assert_eq!(found("MATCHES"), (MapType::Hash, 32, 16, MAX_MATCHES));
    assert_eq!(found("SOURCES"), (MapType::LpmTrie, 24, 8, MAX_SOURCES));
    assert_eq!(found("XSKS"), (MapType::Xskmap, 4, 4, MAX_INTERFACES * MAX_QUEUES));
    assert_eq!(found("COUNTERS"), (MapType::PercpuArray, 4, 16, COUNTER_SLOTS * XdpCounter::COUNT));
    let mut programs: Vec<_> = object.progs().map(|program| program.name().to_string_lossy().into_owned()).collect();
    programs.sort();
    assert_eq!(programs, ["relay", "relay_egress", "relay_flushed", "relay_plain", "relay_polled", "relay_refused", "relay_single"]);
}

#[test]
fn libbpf_loads_the_lab_object() {
    if !can_run() {
        return;
    }
    let object = ObjectBuilder::default().open_memory(LAB_OBJECT).unwrap().load().unwrap();
    let mut programs: Vec<_> = object.progs().map(|program| program.name().to_string_lossy().into_owned()).collect();
    programs.sort();
    assert_eq!(programs, ["lab_count_pass", "lab_drop", "lab_generate", "lab_redirect", "lab_silence", "lab_xsk"]);
}
