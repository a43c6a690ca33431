//! What a service manager is told: ready, reloading, alive, stopping (sd_notify(3)).
//!
//! One datagram each to `NOTIFY_SOCKET`; without that variable nothing is said. Must never block, and never fail the relay: a manager
//! that cannot be told finds out by its time-outs.

use nix::time::{ClockId, clock_gettime};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

/// What was said last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Nothing,
    Ready,
    Reloading,
    Stopping,
}

/// The manager, if there is one.
#[derive(Debug)]
pub struct Notify {
    to: Option<(UnixDatagram, SocketAddr)>,
    said: Said,
    period: Option<Duration>,
    next: Option<Instant>,
}

impl Notify {
    /// From the environment that systemd gives a service.
    pub fn from_environment() -> Self {
        let micros: Option<u64> = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
        let for_us = std::env::var("WATCHDOG_PID").map_or(true, |pid| pid == std::process::id().to_string());
        Self::new(manager(), micros.filter(|_| for_us).map(Duration::from_micros))
    }

    fn new(address: Option<SocketAddr>, watchdog: Option<Duration>) -> Self {
        let socket = UnixDatagram::unbound().and_then(|socket| socket.set_nonblocking(true).map(|()| socket)).ok();
        // Twice as often as asked for, as sd_watchdog_enabled(3) says.
        Self { to: socket.zip(address), said: Said::Nothing, period: watchdog.map(|limit| limit / 2), next: None }
    }

    /// Once a turn of the loop: `ready` when rules are in force and no update is under way.
    pub fn turn(&mut self, now: Instant, ready: bool) {
        if self.to.is_none() || self.said == Said::Stopping {
            return;
        }
        if ready && self.said != Said::Ready {
            self.said = Said::Ready;
            self.send("READY=1");
        }
        if let Some(period) = self.period.filter(|_| self.next.is_none_or(|next| now >= next)) {
            self.next = Some(now + period);
            self.send("WATCHDOG=1");
        }
    }

    /// The configuration is being read again; READY follows by [`Self::turn`].
    pub fn reloading(&mut self) {
        self.said = Said::Reloading;
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1000);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={now}"));
    }

    /// What `systemctl status` shows.
    pub fn status(&self, text: &str) {
        self.send(&format!("STATUS={}", text.replace('\n', " ")));
    }

    /// The relay ends.
    pub fn stopping(&mut self) {
        self.said = Said::Stopping;
        self.send("STOPPING=1");
    }

    fn send(&self, text: &str) {
        if let Some((socket, address)) = &self.to
            && let Err(error) = socket.send_to_addr(text.as_bytes(), address)
        {
            tracing::debug!(%error, "service manager");
        }
    }
}

/// Where the service manager listens, if there is one.
pub(super) fn manager() -> Option<SocketAddr> {
    std::env::var("NOTIFY_SOCKET").ok().and_then(|name| address(&name))
}

/// A path, or `@name` of the abstract namespace.
fn address(name: &str) -> Option<SocketAddr> {
    match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name).ok(),
        None => SocketAddr::from_pathname(name).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager() -> (UnixDatagram, SocketAddr) {
        let name = format!("relay-test-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        socket.set_nonblocking(true).unwrap();
        (socket, address)
    }

    #[test]
    fn a_life_as_a_service() {
        let (manager, address) = manager();
        let heard = || {
            let mut buffer = [0; 256];
            manager.recv(&mut buffer).map(|len| String::from_utf8_lossy(&buffer[..len]).into_owned()).unwrap_or_default()
        };
        let mut notify = Notify::new(Some(address), Some(Duration::from_secs(2)));
        let start = Instant::now();
        notify.turn(start, false);
        assert_eq!((heard(), heard()), ("WATCHDOG=1".into(), String::new()), "alive, not ready");
        notify.turn(start, true);
        notify.turn(start, true);
        assert_eq!((heard(), heard()), ("READY=1".into(), String::new()), "once");
        notify.reloading();
        assert!(heard().starts_with("RELOADING=1\nMONOTONIC_USEC="));
        notify.turn(start + Duration::from_secs(1), true);
        assert_eq!((heard(), heard()), ("READY=1".into(), "WATCHDOG=1".into()));
        notify.stopping();
        notify.turn(start + Duration::from_secs(9), true);
        assert_eq!((heard(), heard()), ("STOPPING=1".into(), String::new()));
    }

    #[test]
    fn without_a_manager_nothing_happens() {
        let mut notify = Notify::new(None, Some(Duration::from_secs(1)));
        notify.turn(Instant::now(), true);
        notify.stopping();
        assert!(address("/run/x").is_some());
    }
}
