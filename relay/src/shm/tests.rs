//! Channels: one writer, lapped and gated readers, pairs, byte messages, discovery, hostile environments.
use super::channel::duplicate;
use super::discovery::{CONTROL, Environment, Place, STATUS, WORKER_ID, parse_place, take_fd, variables};
use super::*;
use crate::ring::{Received, SleepFlag, Words};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
use std::sync::Arc;
use std::time::Duration;

fn reader_of(writer: &Writer<u64>) -> Reader<u64> {
    Reader::open(duplicate(writer.as_fd()).unwrap()).unwrap()
}

fn drain(reader: &mut Reader<u64>) -> Vec<u64> {
    std::iter::from_fn(|| if let Received::Message(value) = reader.receive() { Some(value) } else { None }).collect()
}

#[test]
fn req_000_1_second_writer_is_refused_until_the_first_is_gone() {
    let first = Writer::<u64>::create("one", 8).unwrap();
    let (again, later) = (duplicate(first.as_fd()).unwrap(), duplicate(first.as_fd()).unwrap());
    assert_eq!(Writer::<u64>::adopt(again).unwrap_err(), ChannelError::AlreadyOwned(std::process::id()));
    assert_eq!(first.header().epoch(), 1);
    drop(first);
    let second = Writer::<u64>::adopt(later).unwrap();
    assert_eq!(second.header().epoch(), 2);
}

/// A writer that the kernel has called dead may hold its lock for some milliseconds more.
#[test]
fn req_000_1_a_successor_takes_the_lock_when_it_is_free() {
    let first = Writer::<u64>::create("one", 8).unwrap();
    let [fd, held, still, later] = [(); 4].map(|()| duplicate(first.as_fd()).unwrap());
    let mut second = Claim::<u64>::open(fd).unwrap().succeed().unwrap();
    assert_eq!(second.header().epoch(), 2);
    second.hold();
    drop(Writer::<u64>::adopt(held).unwrap_err());
    drop(first);
    second.hold();
    assert!(matches!(Writer::<u64>::adopt(still), Err(ChannelError::AlreadyOwned(_))), "the successor's");
    drop(second);
    assert!(Writer::<u64>::adopt(later).is_ok());
}

#[test]
fn req_000_1_a_successor_goes_on_with_the_numbers() {
    let mut first = Writer::<u64>::create("one", 8).unwrap();
    let (mut reader, fd) = (reader_of(&first), duplicate(first.as_fd()).unwrap());
    (0..3).for_each(|value| first.send(&value).unwrap());
    drop(first);
    let mut second = Writer::<u64>::adopt(fd).unwrap();
    (3..5).for_each(|value| second.send(&value).unwrap());
    assert_eq!(drain(&mut reader), [0, 1, 2, 3, 4]);
    assert_eq!(second.sent(), 5);
}

#[test]
fn req_000_2_every_reader_counts_exactly_what_it_missed() {
    let mut writer = Writer::<u64>::create("lap", 8).unwrap();
    let (mut slow, mut quick) = (reader_of(&writer), reader_of(&writer));
    let mut seen = 0;
    for value in 1..=100 {
        writer.send(&value).unwrap();
        seen += drain(&mut quick).len();
    }
    assert_eq!((seen, quick.stats().overruns), (100, 0));
    let Received::Overrun(lost) = slow.receive() else { panic!("not lapped") };
    let rest = drain(&mut slow);
    assert_eq!(rest.first(), Some(&(lost + 1)), "goes on right after what was lost");
    assert_eq!(lost + rest.len() as u64, 100);
    let stats = slow.stats();
    assert_eq!((stats.sent, stats.received, stats.overruns, stats.depth), (100, rest.len() as u64, lost, 0));
    assert_eq!(slow.latest(), Some(100));
}

#[test]
fn req_000_2_a_gate_loses_nothing_and_names_the_slow_reader() {
    let mut writer = Writer::<u64>::create_gated("gate", 4, 3).unwrap();
    let open = |writer: &Writer<u64>, reader| {
        Reader::<u64>::open_gated(duplicate(writer.as_fd()).unwrap(), duplicate(writer.gate_fd().unwrap()).unwrap(), 3, reader).unwrap()
    };
    (0..10).for_each(|value| writer.send(&value).unwrap()); // nobody admitted: nobody to wait for
    writer.admit(0);
    writer.admit(2);
    let (mut zero, mut two) = (open(&writer, 0), open(&writer, 2));
    (10..14).for_each(|value| writer.send(&value).unwrap());
    assert_eq!(writer.send(&14).unwrap_err().messages, 4);
    assert_eq!(drain(&mut zero), [10, 11, 12, 13]);
    let behind = writer.send(&14).unwrap_err();
    assert_eq!((behind.reader, behind.messages), (2, 4));
    writer.count_dropped();
    assert_eq!(two.receive(), Received::Message(10));
    writer.send(&14).unwrap();
    drop(two); // its process died: the successor reads on where it stopped
    let mut two = open(&writer, 2);
    assert_eq!(drain(&mut two), [11, 12, 13, 14]);
    writer.evict(2);
    writer.evict(0);
    (0..20).for_each(|value| writer.send(&value).unwrap());
    let stats = two.stats();
    assert_eq!((stats.full, stats.dropped), (2, 1));
}

#[test]
fn req_000_3_a_pair_speaks_both_ways() {
    let mut parent = Parent::<u64, u32>::create("pair", 8).unwrap();
    parent.control.send(&7).unwrap(); // before the child exists
    let (control, status) = parent.child_fds();
    let mut child = Child::<u64, u32>::attach(duplicate(control).unwrap(), duplicate(status).unwrap()).unwrap();
    assert_eq!(child.control.receive(), Received::Message(7));
    child.status.send(&9).unwrap();
    assert_eq!(parent.status.receive(), Received::Message(9));
}

#[test]
fn req_000_9_aggregator_and_shards_keep_each_producers_order() {
    let writers: Vec<Writer<u64>> = (0..3).map(|_| Writer::create("shard", 64).unwrap()).collect();
    let mut aggregator = patterns::Aggregator::new(writers.iter().map(reader_of).collect());
    let mut shards = patterns::Shards::new(writers).unwrap();
    for value in 0..30_u64 {
        shards.send(value % 5, &value).unwrap();
    }
    let mut seen = vec![Vec::new(); 3];
    while aggregator.round(4, |number, found| {
        if let Received::Message(value) = found {
            seen[number].push(value)
        }
    }) > 0
    {}
    assert_eq!(seen.iter().map(Vec::len).sum::<usize>(), 30);
    for (number, values) in seen.iter().enumerate() {
        assert!(values.is_sorted() && values.iter().all(|value| shards.shard(value % 5) == number), "{values:?}");
    }
    assert!(patterns::Shards::<u64>::new(Vec::new()).is_none());
}

#[test]
fn req_000_10_another_type_is_a_layout_mismatch() {
    let writer = Writer::<u64>::create("typed", 8).unwrap();
    let fd = || duplicate(writer.as_fd()).unwrap();
    assert!(Reader::<i64>::open(fd()).unwrap_err().is_layout_mismatch(), "same size, other type");
    assert!(Reader::<u32>::open(fd()).unwrap_err().is_layout_mismatch());
    assert!(Writer::<[u64; 2]>::adopt(fd()).unwrap_err().is_layout_mismatch());
    assert!(matches!(Writer::<u64>::create("typed", 12), Err(ChannelError::Ring(_))));
}

#[test]
fn req_000_10_bytes_of_any_length_arrive_whole() {
    let mut writer = ByteWriter::create("bytes", 64).unwrap();
    let mut reader = ByteReader::open(duplicate(writer.as_fd()).unwrap()).unwrap();
    let mut buffer = Vec::new();
    for len in [0, 1, 95, 96, 97, 192, 3000, 32 * 96] {
        let message: Vec<u8> = (0..len).map(|index| index as u8).collect();
        writer.send(&message).unwrap();
        assert_eq!(reader.receive(&mut buffer), bytes::ReceivedBytes::Message);
        assert_eq!(buffer, message);
    }
    assert_eq!(writer.send(&[0; 32 * 96 + 1]), Err(bytes::SendError::TooLong { len: 3073, max: 3072 }));
    for number in 0..200_u8 {
        writer.send(&[number; 150]).unwrap();
    }
    let mut whole = 0;
    while reader.receive(&mut buffer) == bytes::ReceivedBytes::Message {
        assert!(buffer.len() == 150 && buffer.iter().all(|byte| *byte == buffer[0]));
        whole += 1;
    }
    assert_eq!((whole + reader.lost(), reader.malformed()), (200, 0));
    assert!(reader.lost() > 0 && whole > 10);
}

#[test]
fn req_000_5_the_environment_is_judged_variable_by_variable() {
    let place = |value: &str| parse_place(CONTROL, Some(value.into()));
    assert_eq!(place("fd:7"), Ok(Place::Fd(7)));
    assert_eq!(place("/run/x"), Ok(Place::Path("/run/x".into())));
    for bad in ["", "7", "fd:", "fd:x", "fd:-1", "fd:+7", "fd: 7", "fd:2", "fd:99999999999", "relative"] {
        let error = place(bad).unwrap_err().to_string();
        assert!(error.starts_with("RELAY_CONTROL_CHANNEL: ") && !error.contains('\n'), "{bad}: {error}");
    }
    assert!(parse_place(STATUS, None).unwrap_err().to_string().starts_with("RELAY_STATUS_CHANNEL: not set"));
    assert!(take_fd(CONTROL, 1_000_000).unwrap_err().to_string().starts_with("RELAY_CONTROL_CHANNEL: the descriptor is not open"));
    let lookup = |name: &str| match name {
        WORKER_ID => Some("three".into()),
        _ => None,
    };
    assert!(Environment::read(lookup).unwrap_err().to_string().starts_with("RELAY_WORKER_ID: not a worker number"));
    let lookup = |name: &str| if name == WORKER_ID { Some("3".into()) } else { Some("fd:1000000".into()) };
    assert!(Environment::read(lookup).unwrap_err().to_string().contains("is the same descriptor"));
}

#[test]
fn req_000_5_a_child_finds_its_channels_and_refuses_what_is_not_one() {
    let parent = Parent::<u64, u64>::create("env", 8).unwrap();
    let (control, status) = parent.child_fds();
    let inherited = [duplicate(control).unwrap(), duplicate(status).unwrap()];
    let variables = variables(3, &inherited[0], &inherited[1]);
    let lookup = |name: &str| variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| value.into());
    let numbers = inherited.map(IntoRawFd::into_raw_fd);
    let environment = Environment::read(lookup).unwrap();
    assert_eq!((environment.worker_id, environment.control.as_raw_fd()), (3, numbers[0]));
    environment.attach::<u64, u64>().unwrap();

    let blank = Segment::create("blank", 8192).unwrap();
    let fd = || duplicate(blank.as_fd()).unwrap();
    let error = Child::<u64, u64>::attach(fd(), fd()).unwrap_err();
    assert_eq!(error, ChannelError::Header(HeaderError::Magic(0)).of(CONTROL));
    assert!(error.to_string().starts_with("RELAY_CONTROL_CHANNEL: segment has magic 0x0"), "{error}");
}

#[test]
fn req_000_6_the_descriptor_is_handed_out_and_is_read_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("status.sock");
    let mut writer = Writer::<u64>::create("shared", 8).unwrap();
    let share = share::Share::bind(&path).unwrap();
    let fd = std::thread::scope(|scope| {
        let asking = scope.spawn(|| share::fetch(&path, false).unwrap());
        assert!(share.serve_one(&writer).unwrap());
        asking.join().unwrap()
    });
    assert!(Segment::join(duplicate(fd.as_fd()).unwrap(), Access::ReadWrite).is_err(), "opened read-only");
    let mut reader = Reader::<u64>::open(fd).unwrap();
    writer.send(&5).unwrap();
    assert_eq!(reader.receive(), Received::Message(5));
}

#[test]
fn req_000_11_memory_is_what_the_segment_has() {
    let writer = Writer::<u64>::create("relay-smaps", 4096).unwrap();
    let mut reader = reader_of(&writer);
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines().skip_while(|line| !line.contains("memfd:relay-smaps"));
    let size = lines.find_map(|line| line.strip_prefix("Size:")).unwrap().trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap();
    assert_eq!(reader.stats().memory_bytes, size * 1024);
}

#[test]
fn req_001_5_no_wake_up_is_lost_and_none_is_sent_to_the_awake() {
    const COUNT: u64 = 20_000;
    let (mut producer, mut consumer) = crate::ring::heap::<u64>(64).unwrap();
    let memory: Arc<dyn crate::ring::Memory> = Arc::new(crate::ring::memory::Heap::new(128));
    let word = || Words::new(memory.clone(), 0, 1).unwrap();
    let (mut sleeper, mut waker) = (SleepFlag::sleeper(word()), SleepFlag::waker(word()));
    let bell = Bell::new().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for value in 0..COUNT {
                while producer.push(value).is_err() {
                    std::thread::yield_now();
                }
                if waker.must_ring() {
                    bell.ring().unwrap();
                }
                if value % 1000 == 0 {
                    std::thread::sleep(Duration::from_millis(1)); // let it fall asleep
                }
            }
        });
        let mut next = 0;
        while next < COUNT {
            while let Some(value) = consumer.pop() {
                assert_eq!(value, next);
                next += 1;
            }
            if next < COUNT {
                let woken = std::cell::Cell::new(true);
                sleeper.sleep_unless(|| consumer.available() > 0, || woken.set(bell.wait(Duration::from_secs(10)).unwrap()));
                assert!(woken.get(), "slept ten seconds at {next}: a lost wake-up");
            }
        }
    });
    assert!(!waker.must_ring(), "the sleeper is awake");
}
