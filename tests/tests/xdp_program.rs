//! The XDP program in the kernel: every packet of the golden corpus gets its verdict, counter, rule and nothing else;
//! attaching is explicit, read back, and leaves nothing behind.
//!
//! Each test runs in a network namespace of its own thread, which ends with it. `RELAY_BPF_OBJECTS` names a folder of
//! freshly built objects to be tested instead of the embedded ones (`cargo xtask build-ebpf --check`).

#![expect(clippy::unwrap_used, reason = "a test's way to fail")]

use aya::programs::{Xdp, XdpMode};
use relay::nic::afxdp::program::{self, LoadOptions, Mode, Program, ProgramError, interface_xdp, socket_index};
use relay_common::{
    CounterValue, MAX_QUEUES, MAX_SHAPES, META_MAGIC, NO_CONFIG_SLOT, Shape,
    XdpCounter::{self, *},
};
use relay_tests::golden::{self, Case, INTERFACE_SLOT};
use relay_tests::xdp::{Lab, META_LEN, Run, XDP_PASS, XDP_REDIRECT, can_run, ip, loaded, object, run, socket};
use std::process::Command;

/// Runs one packet and returns what it did and the one counter it moved.
fn judge(program: &mut Program, slot: u32, ifindex: u32, queue: u32, packet: &[u8]) -> (Run, XdpCounter) {
    let before = program.counters(slot).unwrap();
    let run = run(program.program().unwrap(), ifindex, queue, packet);
    let after = program.counters(slot).unwrap();
    let moved: Vec<_> = XdpCounter::ALL.iter().filter(|counter| after[**counter as usize] != before[**counter as usize]).collect();
    assert_eq!(moved.len(), 1, "exactly one counter per packet, moved: {moved:?}");
    let (old, new) = (before[*moved[0] as usize], after[*moved[0] as usize]);
    let one = CounterValue { packets: old.packets + 1, bytes: old.bytes + packet.len() as u64 };
    assert_eq!(new, one, "one packet with all its bytes");
    (run, *moved[0])
}

fn check_with_socket(program: &mut Program, lab: &Lab, case: &Case) {
    let (run, counter) = judge(program, INTERFACE_SLOT, lab.ifindex, 0, &case.bytes);
    assert_eq!(counter, case.counter, "{}", case.name);
    let Some(slot) = case.slot else {
        assert_eq!((run.action, &run.out), (XDP_PASS, &case.bytes), "{}: passes as it came", case.name);
        return;
    };
    let meta: Vec<_> = run.out[..META_LEN].chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
    assert_eq!(run.action, XDP_REDIRECT, "{}", case.name);
    assert_eq!(meta, [META_MAGIC, slot, golden::serial(slot), 0], "{}: magic, slot, serial, flags", case.name);
    assert_eq!(run.out[META_LEN..], case.bytes, "{}: the packet is not touched", case.name);
}

fn corpus_with_socket(single_buffer: bool) {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let mut program = loaded(&lab, single_buffer);
    let (_umem, socket) = socket(&lab);
    program.set_socket(socket_index(INTERFACE_SLOT, 0), &socket.fd).unwrap();
    let corpus = golden::corpus();
    corpus.iter().for_each(|case| check_with_socket(&mut program, &lab, case));
    let total: u64 = program.counters(INTERFACE_SLOT).unwrap().iter().map(|value| value.packets).sum();
    assert_eq!(total, corpus.len() as u64);
}

#[test]
fn golden_corpus_has_its_verdicts() {
    corpus_with_socket(false);
}

#[test]
fn golden_corpus_has_its_verdicts_on_a_kernel_without_multi_buffer() {
    corpus_with_socket(true);
}

/// Fails open: without a socket (no worker yet) what a rule takes passes, without metadata.
#[test]
fn golden_corpus_passes_without_a_socket() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let mut program = loaded(&lab, false);
    for case in golden::corpus() {
        let (run, counter) = judge(&mut program, INTERFACE_SLOT, lab.ifindex, 0, &case.bytes);
        let expected = if case.slot.is_some() { PassNoSocket } else { case.counter };
        assert_eq!((run.action, counter), (XDP_PASS, expected), "{}", case.name);
        assert_eq!(run.out, case.bytes, "{}: passes as it came", case.name);
    }
}

#[test]
fn a_cleared_socket_and_a_queue_beyond_the_table_pass() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let mut program = loaded(&lab, false);
    let (_umem, socket) = socket(&lab);
    let packet = &golden::corpus()[0].bytes;
    let index = socket_index(INTERFACE_SLOT, 0);
    program.set_socket(index, &socket.fd).unwrap();
    // The next slot's first place: a queue beyond the table must not spill into it.
    program.set_socket(socket_index(INTERFACE_SLOT + 1, 0), &socket.fd).unwrap();
    let verdict = |program: &mut Program, queue| judge(program, INTERFACE_SLOT, lab.ifindex, queue, packet).1;
    assert_eq!(verdict(&mut program, 0), Redirected);
    assert_eq!(verdict(&mut program, 1), PassNoSocket);
    assert_eq!(verdict(&mut program, MAX_QUEUES - 1), PassNoSocket);
    assert_eq!(verdict(&mut program, MAX_QUEUES), PassNoSocket);
    program.clear_socket(index).unwrap();
    assert_eq!(verdict(&mut program, 0), PassNoSocket);
}

#[test]
fn removed_entries_no_longer_match_and_an_interface_without_configuration_passes() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let mut program = loaded(&lab, false);
    let tables = golden::tables(lab.ifindex);
    let packets: Vec<_> = golden::corpus().into_iter().filter(|case| case.slot.is_some() || case.counter == PassExcept).collect();
    for (key, len, _) in &tables.sources {
        program.remove_source(key, *len).unwrap();
    }
    for (key, _) in &tables.matches {
        program.remove_match(key).unwrap();
    }
    for case in &packets {
        assert_eq!(judge(&mut program, INTERFACE_SLOT, lab.ifindex, 0, &case.bytes).1, PassNoRule, "{}", case.name);
    }
    program.remove_ingress(lab.ifindex).unwrap();
    let (run, counter) = judge(&mut program, NO_CONFIG_SLOT, lab.ifindex, 0, &packets[0].bytes);
    assert_eq!((run.action, counter), (XDP_PASS, PassNoConfig));
    assert!(matches!(program.remove_ingress(lab.ifindex), Err(ProgramError::Map { map: "INGRESS", .. })));
}

#[test]
fn the_last_of_all_shapes_is_asked() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let mut program = loaded(&lab, false);
    let mut ingress = golden::tables(lab.ifindex).ingress;
    let first = ingress.shapes[0];
    ingress.shapes.fill(Shape { group_len: 31, ..first });
    ingress.shapes[MAX_SHAPES - 1] = first;
    for (count, expected) in
        [(MAX_SHAPES as u32 - 1, PassNoRule), (MAX_SHAPES as u32, PassNoSocket), (u32::MAX, PassNoSocket), (0, PassNoRule)]
    {
        ingress.shape_count = count;
        program.set_ingress(lab.ifindex, &ingress).unwrap();
        let packet = &golden::corpus()[0].bytes;
        assert_eq!(judge(&mut program, INTERFACE_SLOT, lab.ifindex, 0, packet).1, expected, "{count} shapes");
    }
}

/// `data_end` covers the linear part only; lengths are compared with the whole packet's.
#[test]
fn a_packet_in_several_buffers_is_judged_by_its_whole_length() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let mut program = loaded(&lab, false);
    let mut packet = golden::corpus()[0].bytes[..42].to_vec();
    packet.resize(14 + 9000, 7);
    packet[16..18].copy_from_slice(&9000_u16.to_be_bytes());
    packet[38..40].copy_from_slice(&8980_u16.to_be_bytes());
    assert_eq!(judge(&mut program, INTERFACE_SLOT, lab.ifindex, 0, &packet).1, PassNoSocket);
    packet[16..18].copy_from_slice(&9001_u16.to_be_bytes());
    assert_eq!(judge(&mut program, INTERFACE_SLOT, lab.ifindex, 0, &packet).1, PassMalformed);
}

/// The way packets really come: sent by the peer, through the driver, into the socket.
#[test]
fn a_real_packet_reaches_the_socket() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let mut program = loaded(&lab, false);
    let (_umem, socket) = socket(&lab);
    program.set_socket(socket_index(INTERFACE_SLOT, 0), &socket.fd).unwrap();
    let before = program.counters(INTERFACE_SLOT).unwrap()[Redirected as usize].packets;
    send("eb1", &golden::corpus()[0].bytes, 10);
    let after = program.counters(INTERFACE_SLOT).unwrap()[Redirected as usize].packets;
    // Nobody fills the fill ring, so the socket counts what reaches it as dropped.
    let statistics = relay::sys::xdp::statistics(&socket.fd).unwrap();
    assert_eq!((after - before, statistics.rx_dropped), (10, 10));
}

/// Sends whole packets out of an interface, as a veth's peer delivers them within the call.
fn send(interface: &str, packet: &[u8], count: usize) {
    use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType};
    use std::os::fd::AsRawFd as _;
    let fd = nix::sys::socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll).unwrap();
    let addresses = nix::ifaddrs::getifaddrs().unwrap();
    let address =
        addresses.filter(|address| address.interface_name == interface).find_map(|address| address.address?.as_link_addr().copied());
    let address: LinkAddr = address.unwrap();
    for _ in 0..count {
        assert_eq!(nix::sys::socket::sendto(fd.as_raw_fd(), packet, &address, MsgFlags::empty()).unwrap(), packet.len());
    }
    std::thread::sleep(std::time::Duration::from_millis(200));
}

#[test]
fn attaching_is_native_read_back_and_leaves_nothing_behind() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let mut program = Program::load(&LoadOptions::default()).unwrap();
    let attachment = program.attach(lab.ifindex, Mode::Native).unwrap();
    assert_eq!(attachment.mode, Mode::Native);
    assert!(attachment.link_id.is_some(), "attached by a link, which dies with its descriptor");
    assert_eq!(interface_xdp(lab.ifindex).unwrap().programs, [(Mode::Native, attachment.program_id)]);
    assert_eq!(program.links().map(|(ifindex, _)| ifindex).collect::<Vec<_>>(), [lab.ifindex]);
    assert!(matches!(program.attach(lab.ifindex, Mode::Native), Err(ProgramError::AlreadyAttached { .. })));
    program.detach(lab.ifindex).unwrap();
    assert_eq!(interface_xdp(lab.ifindex).unwrap().programs, []);
    assert!(matches!(program.detach(lab.ifindex), Err(ProgramError::NotAttached { .. })));
    program.attach(lab.ifindex, Mode::Generic).unwrap();
    assert_eq!(interface_xdp(lab.ifindex).unwrap().programs[0].0, Mode::Generic);
    drop(program);
    assert_eq!(interface_xdp(lab.ifindex).unwrap().programs, []);
}

#[test]
fn an_interface_without_native_xdp_is_said_to_have_none() {
    if !can_run() {
        return;
    }
    let _lab = Lab::new();
    let mut program = Program::load(&LoadOptions::default()).unwrap();
    let error = program.attach(1, Mode::Native).unwrap_err();
    assert!(matches!(&error, ProgramError::NoNativeXdp { interface } if interface == "lo"), "{error}");
    assert_eq!(program.attach(1, Mode::Generic).unwrap().mode, Mode::Generic);
    assert!(matches!(program.attach(4711, Mode::Native), Err(ProgramError::Query { .. })), "no such interface");
}

#[test]
fn a_foreign_program_is_named_and_left_alone() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    let mut foreign = aya::EbpfLoader::new().load(program::LAB_OBJECT).unwrap();
    let xdp: &mut Xdp = foreign.program_mut("lab_count_pass").unwrap().try_into().unwrap();
    xdp.load().unwrap();
    xdp.attach_to_if_index(lab.ifindex, XdpMode::Driver).unwrap();
    let theirs = xdp.info().unwrap().id();
    let mut program = Program::load(&LoadOptions::default()).unwrap();
    for mode in [Mode::Native, Mode::Generic] {
        let error = program.attach(lab.ifindex, mode).unwrap_err();
        let ProgramError::Foreign { interface, name, id } = &error else { panic!("{error}") };
        assert_eq!((interface.as_str(), name.as_str(), *id), ("eb0", "lab_count_pass", theirs));
    }
    assert_eq!(interface_xdp(lab.ifindex).unwrap().programs, [(Mode::Native, theirs)]);
}

/// An `xdp.frags` program goes where the MTU needs several buffers; the other is refused with the reason.
#[test]
fn jumbo_frames_need_the_multi_buffer_program() {
    if !can_run() {
        return;
    }
    let lab = Lab::new();
    ip(&["link", "set", "eb0", "mtu", "9000"]);
    ip(&["link", "set", "eb1", "mtu", "9000"]);
    Program::load(&LoadOptions::default()).unwrap().attach(lab.ifindex, Mode::Native).unwrap();
    let mut single = Program::load(&LoadOptions { single_buffer: true, ..Default::default() }).unwrap();
    let error = single.attach(lab.ifindex, Mode::Native).unwrap_err();
    assert!(error.to_string().contains("MTU"), "{error}");
}

#[test]
fn the_object_with_diagnostics_gives_the_same_verdicts() {
    if !can_run() || object().is_some() {
        return;
    }
    let lab = Lab::new();
    let mut program = Program::load(&LoadOptions { diagnostics: true, ..Default::default() }).unwrap();
    program.set_ingress(lab.ifindex, &golden::tables(lab.ifindex).ingress).unwrap();
    program.attach(lab.ifindex, Mode::Native).unwrap();
    for case in golden::corpus().iter().filter(|case| case.slot.is_none() && case.counter != PassExcept) {
        assert_eq!(judge(&mut program, INTERFACE_SLOT, lab.ifindex, 0, &case.bytes).1, case.counter, "{}", case.name);
    }
    program.flush_diagnostics();
}

/// DECISIONS 6: the parser reaches options without CAP_PERFMON. This test starts itself again with two capabilities.
#[test]
fn loads_and_attaches_with_two_capabilities() {
    if !can_run() {
        return;
    }
    if std::env::var_os("RELAY_TEST_TWO_CAPABILITIES").is_some() {
        let mut program = Program::load(&LoadOptions { object: object(), ..Default::default() }).unwrap();
        assert!(program.multi_buffer(), "the program of choice, not the fall-back");
        program.attach(nix::net::if_::if_nametoindex("eb0").unwrap(), Mode::Native).unwrap();
        return;
    }
    let _lab = Lab::new();
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-all,+bpf,+net_admin", "--inh-caps", "-all", "--ambient-caps", "-all"]);
    command.arg(std::env::current_exe().unwrap()).args(["--exact", "loads_and_attaches_with_two_capabilities"]);
    match command.env("RELAY_TEST_TWO_CAPABILITIES", "1").output() {
        Err(error) => println!("SKIPPED: setpriv: {error}"),
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
    }
}
