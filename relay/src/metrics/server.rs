//! The endpoint of `--metrics`: one thread of the supervisor's process that holds no capability and asks the control socket like
//! any other client.
//!
//! HTTP/1.0 as scrapers need it: GET and HEAD of `/metrics`, one connection at a time, everything bounded in bytes and time (a
//! server crate would add threads per connection and no limits). Must never touch the supervisor's state or the data path.

use crate::control::client::{Client, ClientError};
use crate::control::message::{Request, Response};
use crate::supervisor::capabilities::{self, Set};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest request, headers included.
const MAX_REQUEST: usize = 8 * 1024;
/// For a request to come in and its answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes between two looks at the clock.
const CHUNK: usize = 64 * 1024;
/// After an error of accept (no descriptors left).
const PAUSE: Duration = Duration::from_millis(100);

/// Opens the endpoint and serves it from a thread of its own for as long as the process lives. `socket` is the control socket, to
/// which nobody need listen yet.
pub fn start(address: SocketAddr, socket: &Path) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let bound = listener.local_addr()?;
    let socket = socket.to_owned();
    // Signals are the supervisor's: a thread that does not block them would die of the first SIGTERM.
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), Some(&mut before))?;
    let thread = std::thread::Builder::new().name("metrics".into()).spawn(move || serve(&listener, &socket));
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    thread.map(|_detached| bound)
}

fn serve(listener: &TcpListener, socket: &Path) {
    if let Err(error) = capabilities::empty_bounding() {
        tracing::debug!(%error, "metrics: bounding set kept");
    }
    if let Err(error) = capabilities::clear_ambient().and_then(|()| capabilities::retain(Set::EMPTY)) {
        tracing::error!(%error, "metrics: capabilities cannot be given up, so nothing is served");
        return;
    }
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(error) = answer(stream, socket) {
                    tracing::debug!(%error, "metrics");
                }
            }
            Err(error) => {
                tracing::debug!(%error, "metrics: accept");
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// Reads one request and answers it.
fn answer(mut stream: TcpStream, socket: &Path) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    let request = read_head(&mut stream, until)?;
    let (status, kind, body) = reply(&request, || page(socket));
    let head = format!("HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    write_until(&mut stream, head.as_bytes(), until)?;
    if request.starts_with("HEAD ") { Ok(()) } else { write_until(&mut stream, body.as_bytes(), until + PATIENCE) }
}

const TEXT: &str = "text/plain; charset=utf-8";

/// Status line, content type and body.
fn reply(request: &str, page: impl FnOnce() -> Result<String, ClientError>) -> (&'static str, &'static str, String) {
    let mut words = request.split_whitespace();
    match (words.next(), words.next().map(|path| path.split('?').next().unwrap_or_default())) {
        (Some("GET" | "HEAD"), Some("/metrics" | "/")) => match page() {
            Ok(page) => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", page),
            Err(error) => ("503 Service Unavailable", TEXT, format!("{error}\n")),
        },
        (Some("GET" | "HEAD"), Some(_)) => ("404 Not Found", TEXT, "the metrics are at /metrics\n".into()),
        (Some(_), Some(_)) => ("405 Method Not Allowed", TEXT, "GET /metrics\n".into()),
        _ => ("400 Bad Request", TEXT, "GET /metrics\n".into()),
    }
}

/// Everything up to the empty line.
fn read_head(stream: &mut TcpStream, until: Instant) -> io::Result<String> {
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        stream.set_read_timeout(Some(left(until)?))?;
        let len = stream.read(&mut chunk)?;
        if len == 0 || head.len() + len > MAX_REQUEST {
            break;
        }
        head.extend_from_slice(chunk.get(..len).unwrap_or_default());
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

fn write_until(stream: &mut TcpStream, bytes: &[u8], until: Instant) -> io::Result<()> {
    for chunk in bytes.chunks(CHUNK) {
        stream.set_write_timeout(Some(left(until)?))?;
        stream.write_all(chunk)?;
    }
    Ok(())
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Asks the daemon that this thread is part of.
fn page(socket: &Path) -> Result<String, ClientError> {
    let mut client = Client::connect(socket)?;
    let answers = (client.request(&Request::Status)?, client.request(&Request::Stats)?, client.request(&Request::RuleList)?);
    let (Response::Status(status), Response::Stats(stats), Response::Rules(rules)) = answers else {
        return Err(ClientError::Closed { path: socket.into() });
    };
    Ok(super::render(&status, &stats, &rules))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_by_method_and_path() {
        let status = |request: &str| reply(request, || Ok("page".into())).0;
        assert_eq!(status("GET /metrics HTTP/1.1\r\n\r\n"), "200 OK");
        assert_eq!(status("HEAD /metrics?x=1 HTTP/1.1\r\n\r\n"), "200 OK");
        assert_eq!(status("GET /other HTTP/1.1\r\n\r\n"), "404 Not Found");
        assert_eq!(status("POST /metrics HTTP/1.1\r\n\r\n"), "405 Method Not Allowed");
        assert_eq!(status(""), "400 Bad Request");
        let gone = reply("GET / HTTP/1.0\r\n\r\n", || Err(ClientError::Closed { path: "/x".into() }));
        assert_eq!(gone.0, "503 Service Unavailable");
    }
}
