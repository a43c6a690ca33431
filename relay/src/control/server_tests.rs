//! The control socket with friendly and hostile clients, in one process and one thread: the server is turned between their acts.

use super::super::client::{Client, ClientError};
use super::super::message::RuleInfo;
use super::*;
use nix::sys::socket::{ControlMessage, sendmsg};
use std::fs;
use std::io::{IoSlice, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::thread;
use tempfile::TempDir;

struct Fixture {
    server: Server,
    path: PathBuf,
    _directory: TempDir,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("run/relay.sock");
    Fixture { server: Server::bind(&path).expect("binds"), path, _directory: directory }
}

/// Answers `RuleDel` with its id and defers everything else.
fn echo(_: ClientToken, request: Request) -> Option<Response> {
    if let Request::RuleDel { id } = request { Some(Response::Done(id)) } else { None }
}

impl Fixture {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).expect("connects");
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a time-out");
        stream
    }

    /// Turns until nothing is ready, at `now`.
    fn turn_at(&mut self, now: Instant) {
        for _ in 0..200 {
            self.server.turn(now, &mut echo);
        }
    }

    fn turn(&mut self) {
        self.turn_at(Instant::now());
    }
}

fn message(request: &Request) -> Vec<u8> {
    framing::encode(request, MAX_REQUEST_LEN).expect("encodes")
}

fn receive(stream: &mut UnixStream) -> Response {
    let mut reassembly = Reassembly::new(MAX_RESPONSE_LEN);
    loop {
        match reassembly.step(stream).expect("a response in time") {
            Step::More => {}
            Step::Whole(document) => return framing::decode(&document).expect("a response"),
            other => panic!("no response: {other:?}"),
        }
    }
}

fn receive_error(stream: &mut UnixStream) -> ErrorBody {
    match receive(stream) {
        Response::Error(body) => body,
        other => panic!("not an error: {other:?}"),
    }
}

/// End of file or a reset: the server has let go.
fn assert_closed(stream: &mut UnixStream) {
    match stream.read(&mut [0; 1]) {
        Ok(0) => {}
        Ok(_) => panic!("bytes instead of the end"),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "still open"),
    }
}

/// A client that is served normally: the proof that the hostile one cost nothing.
fn assert_serves(fixture: &mut Fixture) {
    let mut stream = fixture.connect();
    stream.write_all(&message(&Request::RuleDel { id: "ok".into() })).expect("writes");
    fixture.turn();
    assert_eq!(receive(&mut stream), Response::Done("ok".into()));
}

#[test]
fn one_connection_asks_again_and_again() {
    let mut f = fixture();
    let mut stream = f.connect();
    let both = [message(&Request::RuleDel { id: "a".into() }), message(&Request::RuleDel { id: "b".into() })].concat();
    stream.write_all(&both).expect("writes");
    f.turn();
    assert_eq!(receive(&mut stream), Response::Done("a".into()));
    assert_eq!(receive(&mut stream), Response::Done("b".into()));
}

#[test]
fn the_descriptor_is_readable_exactly_while_there_is_work() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let readable = |server: &Server| {
        let mut fds = [PollFd::new(server.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).expect("polls") == 1
    };
    let mut f = fixture();
    assert!(!readable(&f.server));
    let mut stream = f.connect();
    assert!(readable(&f.server));
    f.turn();
    assert!(!readable(&f.server));
    stream.write_all(&message(&Request::Status)).expect("writes");
    stream.write_all(&message(&Request::Status)).expect("writes");
    assert!(readable(&f.server));
    f.turn();
    assert!(!readable(&f.server), "a client that waits for its answer must not wake the loop");
    assert_eq!(f.server.connections.len(), 1, "its second request stays in the socket meanwhile");
}

#[test]
fn an_answer_may_come_later() {
    let mut f = fixture();
    let mut stream = f.connect();
    stream.write_all(&message(&Request::Status)).expect("writes");
    let mut token = None;
    for _ in 0..3 {
        f.server.turn(Instant::now(), &mut |client, _| {
            token = Some(client);
            None
        });
    }
    let token = token.expect("the request came");
    assert!(f.server.next_deadline().is_none());
    assert!(f.server.reply(token, &Response::Done("later".into())));
    assert_eq!(receive(&mut stream), Response::Done("later".into()));
    assert!(!f.server.reply(token, &Response::Done("twice".into())), "it no longer waits");
    drop(stream);
    f.turn();
    assert!(!f.server.reply(token, &Response::Done("gone".into())));
}

#[test]
fn a_client_that_hangs_up_while_it_waits_is_forgotten() {
    let mut f = fixture();
    let mut stream = f.connect();
    stream.write_all(&message(&Request::Status)).expect("writes");
    f.turn();
    assert_eq!(f.server.connections.len(), 1);
    drop(stream);
    f.turn();
    assert!(f.server.connections.is_empty());
}

#[test]
fn truncated_requests_are_dropped() {
    let mut f = fixture();
    let whole = message(&Request::RuleDel { id: "x".into() });
    for cut in 0..whole.len() {
        let mut stream = f.connect();
        stream.write_all(whole.get(..cut).expect("a prefix")).expect("writes");
        f.turn();
        drop(stream);
        f.turn();
        assert!(f.server.connections.is_empty(), "cut at {cut}");
    }
    assert_serves(&mut f);
}

#[test]
fn what_is_no_message_gets_a_typed_error_and_the_end() {
    let mut f = fixture();
    let garbage = [&[9, 0, 0, 0, 1][..], b"{\"request\""].concat();
    let nested = [&200_000u32.to_le_bytes()[..], &[1], &vec![b'['; 200_000]].concat();
    let cases: [(&[u8], &str); 6] = [
        (&[0, 0, 0, 0x40, 1], "over the limit"),
        (&[0, 0, 0, 0, 1], "without a document"),
        (&[5, 0, 0, 0, 2, b'h'], "version 2"),
        (b"GET / HTTP/1.1\r\n\r\n", "version 47"),
        (&garbage, "not understood"),
        (&nested, "not understood"),
    ];
    for (bytes, says) in cases {
        let mut stream = f.connect();
        stream.write_all(bytes).expect("writes");
        f.turn();
        let body = receive_error(&mut stream);
        assert!(body.code == 2 && body.message.contains(says), "{says}: {body:?}");
        assert_closed(&mut stream);
    }
    assert_serves(&mut f);
}

#[test]
fn an_unknown_request_or_key_is_an_error_not_a_guess() {
    let mut f = fixture();
    for text in [r#"{"request":"format_disk"}"#, r#"{"request":"rule_del","id":"a","force":true}"#, r#"{"request":"rule_del"}"#, "7"] {
        let mut stream = f.connect();
        stream.write_all(&[&(text.len() as u32).to_le_bytes()[..], &[1], text.as_bytes()].concat()).expect("writes");
        f.turn();
        assert_eq!(receive_error(&mut stream).code, 2, "{text}");
    }
}

#[test]
fn a_slow_loris_is_dropped_though_it_goes_on_dripping() {
    let mut f = fixture();
    let start = Instant::now();
    let mut stream = f.connect();
    let bytes = message(&Request::RuleDel { id: "x".repeat(100) });
    for (second, byte) in bytes.iter().take(5).enumerate() {
        stream.write_all(&[*byte]).expect("writes");
        f.turn_at(start + Duration::from_secs(second as u64));
        assert_eq!(f.server.connections.len(), 1, "second {second}");
    }
    assert_eq!(f.server.next_deadline(), Some(start + REQUEST_PATIENCE), "counted from the first byte");
    f.turn_at(start + REQUEST_PATIENCE);
    assert!(f.server.connections.is_empty());
    assert_closed(&mut stream);
}

#[test]
fn silence_between_requests_ends_after_a_minute() {
    let mut f = fixture();
    let start = Instant::now();
    let _stream = f.connect();
    f.turn_at(start);
    f.turn_at(start + REQUEST_PATIENCE * 2);
    assert_eq!(f.server.connections.len(), 1);
    f.turn_at(start + IDLE_PATIENCE);
    assert!(f.server.connections.is_empty());
}

#[test]
fn the_client_after_the_last_place_is_told_so() {
    let mut f = fixture();
    let held: Vec<UnixStream> = (0..MAX_CONNECTIONS)
        .map(|_| {
            let stream = f.connect();
            f.turn();
            stream
        })
        .collect();
    let mut late = f.connect();
    f.turn();
    assert!(receive_error(&mut late).message.contains("64 clients"));
    assert_closed(&mut late);
    drop(held);
    f.turn();
    assert_serves(&mut f);
}

#[test]
fn half_sent_requests_share_one_budget() {
    let mut f = fixture();
    let half = [&MAX_REQUEST_LEN.to_le_bytes()[..], &[1], &vec![b' '; MAX_REQUEST_LEN as usize - 1]].concat();
    let fitting = MAX_REQUEST_MEMORY / MAX_REQUEST_LEN as usize;
    let mut streams: Vec<UnixStream> = (0..8).map(|_| f.connect()).collect();
    f.turn();
    thread::scope(|scope| {
        for stream in &mut streams {
            scope.spawn(|| {
                let _ = stream.write_all(&half); // the refused ones see a broken pipe
            });
        }
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until && f.server.connections.len() > fitting {
            f.server.turn(Instant::now(), &mut echo);
        }
        for _ in 0..2000 {
            f.server.turn(Instant::now(), &mut echo);
            assert!(f.server.request_memory() <= MAX_REQUEST_MEMORY, "{}", f.server.request_memory());
        }
        f.turn_at(Instant::now() + IDLE_PATIENCE); // lets the writers go
    });
    let told = streams.iter_mut().filter_map(|stream| {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes); // a reset after the refusal, if there was more to be read
        bytes.windows(9).any(|part| part == b"half-sent").then_some(())
    });
    let refused = told.count();
    assert!(refused >= 8 - fitting, "{refused} were told");
    assert_serves(&mut f);
}

#[test]
fn a_reader_that_does_not_read_is_dropped_and_delays_nobody() {
    let mut f = fixture();
    let start = Instant::now();
    let mut slow = f.connect();
    slow.write_all(&message(&Request::RuleList)).expect("writes");
    let rule = RuleInfo {
        id: "x".repeat(1 << 20),
        rule: String::new(),
        path: String::new(),
        engine: String::new(),
        reason: String::new(),
        joined: false,
        ..RuleInfo::default()
    };
    let rules = Response::Rules(vec![rule; 3]);
    for _ in 0..10 {
        f.server.turn(start, &mut |_, _| Some(rules.clone()));
    }
    assert!(f.server.response_memory() > 0, "the socket took 3 MiB at once");
    assert_serves(&mut f);
    f.turn_at(start + RESPONSE_PATIENCE);
    assert_eq!(f.server.response_memory(), 0);
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest);
    assert!(rest.len() < 3 << 20);
}

#[test]
fn responses_nobody_reads_share_one_budget() {
    let mut f = fixture();
    let big = Response::Done("x".repeat(40 << 20));
    let mut streams: Vec<UnixStream> = (0..2).map(|_| f.connect()).collect();
    for stream in &mut streams {
        stream.write_all(&message(&Request::Status)).expect("writes");
    }
    for _ in 0..3 {
        f.server.turn(Instant::now(), &mut |_, _| Some(big.clone()));
    }
    assert!(f.server.response_memory() <= MAX_RESPONSE_MEMORY, "{}", f.server.response_memory());
    let told = streams.iter_mut().map(|stream| {
        stream.set_nonblocking(true).expect("non-blocking");
        let mut bytes = vec![0; 200];
        let got = stream.read(&mut bytes).unwrap_or(0);
        bytes.get(..got).is_some_and(|bytes| bytes.windows(11).any(|part| part == b"nobody read"))
    });
    assert_eq!(told.filter(|told| *told).count(), 1);
}

#[test]
fn attached_descriptors_are_released() {
    let mut f = fixture();
    let stream = f.connect();
    f.turn();
    let (mut reading, writing) = std::io::pipe().expect("a pipe");
    let writing = OwnedFd::from(writing);
    let bytes = message(&Request::Status);
    let attached = [writing.as_raw_fd(); 32];
    let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&bytes)], &[ControlMessage::ScmRights(&attached)], MsgFlags::empty(), None);
    assert_eq!(sent, Ok(bytes.len()));
    drop(writing);
    f.turn();
    assert_eq!(f.server.connections.len(), 1, "the request itself is served");
    // The pipe's last write end was in the message: end of file says that this process does not hold it.
    assert_eq!(reading.read(&mut [0; 1]).expect("reads"), 0);
}

#[test]
fn only_root_and_the_daemons_user_come_in() {
    assert!(is_permitted(0, 1000) && is_permitted(1000, 1000) && is_permitted(0, 0));
    assert!(!is_permitted(1001, 1000) && !is_permitted(65534, 0));
}

#[test]
fn a_living_socket_is_in_use_and_a_dead_one_is_replaced() {
    let f = fixture();
    let own = std::process::id() as i32;
    assert!(matches!(Server::bind(&f.path), Err(BindError::InUse { pid, .. }) if pid == own));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("stale.sock");
    drop(UnixListener::bind(&path).expect("binds"));
    assert!(path.exists(), "a dead socket");
    let server = Server::bind(&path).expect("replaces it");
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_stopped_daemon_with_a_full_backlog_is_alive() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("full.sock");
    let _listener = UnixListener::bind(&path).expect("binds");
    let mut held = Vec::new();
    while let Ok(stream) = super::super::path::connect(&path, Duration::from_millis(1)) {
        held.push(stream);
        assert!(held.len() < 100_000);
    }
    assert!(matches!(Server::bind(&path), Err(BindError::InUse { pid: 0, .. })));
}

#[test]
fn nothing_but_a_dead_socket_is_replaced() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name);
    fs::write(at("file"), "precious").expect("writes");
    symlink(at("nowhere"), at("link")).expect("links");
    drop(UnixListener::bind(at("dead")).expect("binds"));
    symlink(at("dead"), at("link-to-dead")).expect("links");
    assert!(matches!(Server::bind(&at("file")), Err(BindError::NotASocket { .. })));
    assert!(matches!(Server::bind(directory.path()), Err(BindError::NotASocket { .. })));
    assert!(matches!(Server::bind(&at("link")), Err(BindError::Symlink { .. })));
    assert!(matches!(Server::bind(&at("link-to-dead")), Err(BindError::Symlink { .. })));
    assert!(matches!(Server::bind(&at(&"x".repeat(120))), Err(BindError::TooLong { .. })));
    assert!(matches!(Server::bind(&at("a/b/c.sock")), Err(BindError::Call { call: "mkdir", .. })));
    assert_eq!(fs::read_to_string(at("file")).expect("reads"), "precious");
    assert!(fs::symlink_metadata(at("dead")).expect("still there").file_type().is_socket());
}

#[test]
fn the_socket_is_0600_whatever_the_umask() {
    let f = fixture();
    let mode = fs::metadata(&f.path).expect("exists").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[test]
fn only_our_own_socket_file_is_removed() {
    let f = fixture();
    fs::remove_file(&f.path).expect("removes");
    let _other = UnixListener::bind(&f.path).expect("binds");
    let path = f.path.clone();
    drop(f.server);
    assert!(path.exists(), "somebody else's socket");
}

#[test]
fn two_relays_cannot_both_replace_one_dead_socket() {
    for _ in 0..20 {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("stale.sock");
        drop(UnixListener::bind(&path).expect("binds"));
        let servers: Vec<_> = thread::scope(|scope| {
            let all: Vec<_> = (0..4).map(|_| scope.spawn(|| Server::bind(&path))).collect();
            all.into_iter().map(|one| one.join().expect("joins")).collect()
        });
        assert_eq!(servers.iter().filter(|server| server.is_ok()).count(), 1);
    }
}

/// Looking and replacing are one act: the race itself is too rare to be waited for.
#[test]
fn the_path_is_taken_only_with_the_directorys_lock() {
    use nix::fcntl::{Flock, FlockArg};
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("stale.sock");
    drop(UnixListener::bind(&path).expect("binds"));
    let file = fs::File::open(directory.path()).expect("opens");
    let lock = Flock::lock(file, FlockArg::LockExclusive).expect("locks");
    assert!(matches!(Server::bind(&path), Err(BindError::Locked { .. })));
    drop(lock);
    assert!(Server::bind(&path).is_ok());
}

#[test]
fn the_client_asks_and_hears() {
    let mut f = fixture();
    let path = f.path.clone();
    let asking = thread::spawn(move || {
        let mut client = Client::connect(&path)?;
        let first = client.request(&Request::RuleDel { id: "a".into() })?;
        let second = client.request(&Request::RuleDel { id: "y".repeat(900_000) })?;
        let third = client.request(&Request::RuleDel { id: "z".repeat(9_000_000) });
        Ok::<_, ClientError>((first, second, third))
    });
    while !asking.is_finished() {
        f.server.turn(Instant::now(), &mut echo);
        thread::sleep(Duration::from_millis(1));
    }
    let (first, second, third) = asking.join().expect("joins").expect("answers");
    assert_eq!(first, Response::Done("a".into()));
    assert!(matches!(second, Response::Done(id) if id.len() == 900_000));
    assert!(matches!(third, Err(ClientError::Frame { .. })), "over the limit: refused before it is sent");
}

#[test]
fn the_clients_errors_have_their_exit_codes() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name);
    drop(UnixListener::bind(at("dead")).expect("binds"));
    let code = |path: PathBuf| Client::connect(&path).expect_err("nobody is there").exit_code();
    assert_eq!(code(at("absent")), 3);
    assert_eq!(code(at("absent/deeper")), 3);
    assert_eq!(code(at("dead")), 3);
    assert_eq!(code(at(&"x".repeat(120))), 2);
}

#[test]
fn a_daemon_that_closes_or_babbles_is_an_error_of_the_client() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for (name, bytes) in [("closes", &b""[..]), ("huge", &[0, 0, 0, 0xf0, 1][..]), ("babbles", b"SSH-2.0-OpenSSH")] {
        let path = directory.path().join(name);
        let listener = UnixListener::bind(&path).expect("binds");
        let daemon = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accepts");
            stream.write_all(bytes).expect("writes");
        });
        let answer = Client::connect(&path).and_then(|mut client| client.request(&Request::Status));
        daemon.join().expect("joins");
        assert!(matches!(answer, Err(ClientError::Closed { .. } | ClientError::Frame { .. })), "{name}: {answer:?}");
    }
}
