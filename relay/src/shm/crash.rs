//! The crash matrix: a writer or a reader is killed with SIGKILL at random moments, again and again, and its successor goes on.
//!
//! The element at index i *is* i, so loss, repetition and tearing show at once. 50 kills a role; RELAY_CRASH_ROUNDS asks for more.
//! The children are this test binary again, told by the environment to play `crash_child`.
use super::channel::duplicate;
use super::discovery::{CONTROL, Place, STATUS, WORKER_ID, parse_place, take_fd};
use super::*;
use crate::ring::{Consumer, Layout, Producer, Received, init_at};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const ROLE: &str = "RELAY_TEST_CRASH_ROLE";
const CAPACITY: u32 = 64;
const READERS: u32 = 8;
const GATED_MESSAGES: u64 = 20_000;

fn rounds() -> u64 {
    std::env::var("RELAY_CRASH_ROUNDS").ok().and_then(|count| count.parse().ok()).unwrap_or(50)
}

/// Writes as much as fits, at most `limit`; the element at index i is i.
fn produce(producer: &mut Producer<u64>, limit: u32) {
    let count = producer.free().min(limit);
    for offset in 0..count {
        producer.write(offset, u64::from(producer.position().wrapping_add(offset)));
    }
    producer.publish(count);
}

/// Reads and checks as much as there is, at most `limit`; says how much.
fn consume(consumer: &mut Consumer<u64>, limit: u32) -> u32 {
    let count = consumer.available().min(limit);
    for offset in 0..count {
        assert_eq!(consumer.read(offset), u64::from(consumer.position().wrapping_add(offset)), "lost, repeated or torn");
    }
    consumer.release(count);
    count
}

/// Not a test of its own: what a child of the tests below does until it is killed, or thirty seconds have passed.
#[test]
fn crash_child() {
    let Some(role) = std::env::var_os(ROLE) else { return };
    let Ok(Place::Fd(number)) = parse_place(CONTROL, std::env::var_os(CONTROL)) else { panic!("no descriptor") };
    let fd = take_fd(CONTROL, number).unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    match role.to_str().unwrap() {
        "producer" => {
            let mut producer = Producer::attach(Arc::new(Segment::join(fd, Access::ReadWrite).unwrap()), 0).unwrap();
            while Instant::now() < end {
                (1..=33).for_each(|batch| produce(&mut producer, batch));
                std::thread::yield_now();
            }
        }
        "consumer" => {
            let mut consumer = Consumer::attach(Arc::new(Segment::join(fd, Access::ReadWrite).unwrap()), 0).unwrap();
            while Instant::now() < end {
                (1..=33).for_each(|batch| _ = consume(&mut consumer, batch));
                std::thread::yield_now();
            }
        }
        "writer" => {
            let mut writer = Writer::<[u64; 3]>::adopt(fd).unwrap();
            while Instant::now() < end {
                (0..50).for_each(|_| writer.send(&[writer.sent() + 1; 3]).unwrap());
                std::thread::sleep(Duration::from_micros(20)); // laps the reader now and then, not always
            }
        }
        "reader" => {
            let Ok(Place::Fd(gate)) = parse_place(STATUS, std::env::var_os(STATUS)) else { panic!("no gate") };
            let number = std::env::var(WORKER_ID).unwrap().parse().unwrap();
            let mut reader = Reader::<[u64; 3]>::open_gated(fd, take_fd(STATUS, gate).unwrap(), READERS, number).unwrap();
            let mut expected = 1;
            while expected <= GATED_MESSAGES {
                assert!(Instant::now() < end, "silent after {expected}");
                match reader.receive() {
                    Received::Message(message) => {
                        assert_eq!(message, [expected; 3], "torn, lost or repeated");
                        expected += 1;
                    }
                    Received::Empty => std::thread::yield_now(),
                    Received::Overrun(lost) => panic!("gated, and lost {lost}"),
                }
            }
        }
        other => panic!("unknown role {other}"),
    }
}

/// Starts a child in `role` on `fd`, lets `meanwhile` run until the child did something and 0–4 ms more, kills it.
fn round(role: &str, fd: &OwnedFd, seed: u64, mut progress: impl FnMut() -> bool) {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "shm::crash::crash_child", "--nocapture"]).stdout(Stdio::null());
    let mut child = command.env(ROLE, role).env(CONTROL, format!("fd:{}", fd.as_raw_fd())).spawn().unwrap();
    let started = Instant::now();
    while !progress() {
        assert!(started.elapsed() < Duration::from_secs(20), "the {role} does nothing");
        assert!(child.try_wait().unwrap().is_none(), "the {role} left by itself");
        std::thread::yield_now();
    }
    let kill_at = Instant::now() + Duration::from_micros(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & 0xfff);
    while Instant::now() < kill_at {
        progress();
    }
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9), "the {role} left by itself");
}

fn new_ring() -> (Arc<Segment>, OwnedFd) {
    let segment = Segment::create("relay-crash", Layout::<u64>::bytes(CAPACITY)).unwrap();
    init_at::<u64>(&segment, 0, CAPACITY, u32::MAX - 1000).unwrap();
    let fd = duplicate(segment.as_fd()).unwrap();
    (Arc::new(segment), fd)
}

fn nothing_left_behind() {
    for folder in ["/dev/shm", "/dev/mqueue", "/tmp"] {
        let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let left: Vec<_> = names.filter(|name| name.to_string_lossy().contains("relay-crash")).collect();
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
}

#[test]
fn req_002_8_killed_producers_lose_and_repeat_nothing() {
    let (segment, fd) = new_ring();
    let mut consumer = Consumer::attach(segment, 0).unwrap();
    for seed in 0..rounds() {
        let mut total = 0_u64;
        round("producer", &fd, seed, || {
            total += u64::from(consume(&mut consumer, 7 + seed as u32 % 40));
            total > u64::from(CAPACITY) * 2
        });
    }
    assert_eq!(consumer.invalid_peer(), 0);
    nothing_left_behind();
}

#[test]
fn req_002_8_killed_consumers_lose_and_repeat_nothing() {
    let (segment, fd) = new_ring();
    let mut producer = Producer::attach(segment, 0).unwrap();
    for seed in 0..rounds() {
        let start = producer.position();
        round("consumer", &fd, seed, || {
            produce(&mut producer, 7 + seed as u32 % 40);
            producer.position().wrapping_sub(start) > CAPACITY * 2
        });
    }
    assert_eq!(producer.invalid_peer(), 0);
    nothing_left_behind();
}

#[test]
fn req_000_1_killed_writers_leave_the_channel_to_a_successor() {
    let writer = Writer::<[u64; 3]>::create("relay-crash", CAPACITY).unwrap();
    let fd = duplicate(writer.as_fd()).unwrap();
    let mut reader = Reader::<[u64; 3]>::open(duplicate(writer.as_fd()).unwrap()).unwrap();
    drop(writer);
    let mut expected = 1;
    for seed in 0..rounds() {
        let mut received = 0;
        round("writer", &fd, seed, || {
            match reader.receive() {
                Received::Message(message) => {
                    assert_eq!(message, [expected; 3], "lost uncounted, repeated or torn");
                    expected += 1;
                    received += 1;
                }
                Received::Overrun(lost) => expected += lost,
                Received::Empty => {}
            }
            received > 200
        });
    }
    assert_eq!(reader.header().epoch(), rounds() + 1);
    nothing_left_behind();
}

#[test]
fn req_000_2_eight_gated_reader_processes_see_every_message_whole() {
    let mut writer = Writer::<[u64; 3]>::create_gated("relay-crash", CAPACITY, READERS).unwrap();
    let fds = [duplicate(writer.as_fd()).unwrap(), duplicate(writer.gate_fd().unwrap()).unwrap()];
    fds.iter().for_each(|fd| _ = fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap());
    (0..READERS).for_each(|reader| writer.admit(reader));
    let start = |reader: u32| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "shm::crash::crash_child", "--nocapture"]).stdout(Stdio::null()).env(ROLE, "reader");
        command.env(CONTROL, format!("fd:{}", fds[0].as_raw_fd())).env(STATUS, format!("fd:{}", fds[1].as_raw_fd()));
        command.env(WORKER_ID, reader.to_string()).spawn().unwrap()
    };
    let mut children: Vec<_> = (0..READERS).map(start).collect();
    let started = Instant::now();
    for number in 1..=GATED_MESSAGES {
        while let Err(behind) = writer.send(&[number; 3]) {
            let late = started.elapsed() > Duration::from_secs(25);
            if late {
                children.iter_mut().for_each(|child| _ = child.kill());
            }
            assert!(!late, "at {number}: {behind}");
            std::thread::yield_now();
        }
    }
    assert!(children.iter_mut().all(|child| child.wait().unwrap().success()));
}
