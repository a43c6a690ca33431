//! One rtnetlink socket for questions and one for news.
//!
//! Questions are answered within the call (the kernel answers before `send` returns; a time-out bounds the wait all the
//! same). News never block. Must never interpret more than the message it carries: facts are `interfaces` and `next_hop`.

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST};
use netlink_packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

/// Largest datagram the kernel builds for a dump is 32 KiB.
const BUFFER_LEN: usize = 64 * 1024;
/// Seconds to wait for an answer that the kernel has already prepared.
const ANSWER_SECONDS: i64 = 2;
/// A dump that a change interrupted is asked for again this often.
const DUMP_ATTEMPTS: usize = 8;
/// Datagrams of news taken by one `drain`, so that a storm can't hold the loop.
const DRAIN_DATAGRAMS: usize = 256;
/// Bytes of news the kernel may hold for us (it doubles them); beyond that it says so and we resync.
const NEWS_BUFFER: usize = 1024 * 1024;

/// Why a question to the kernel has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("netlink {call}: {source}")]
    Socket {
        /// The system call.
        call: &'static str,
        /// Its error.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("netlink {what}: {source}")]
    Refused {
        /// The request.
        what: &'static str,
        /// Its error.
        source: io::Error,
    },
    /// The answer is not netlink.
    #[error("netlink {what}: unreadable answer: {reason}")]
    Unreadable {
        /// The request.
        what: &'static str,
        /// What was wrong with it.
        reason: String,
    },
    /// Interfaces, addresses or neighbours change faster than they can be listed.
    #[error("netlink {what}: the list changed during each of {DUMP_ATTEMPTS} attempts")]
    Unstable {
        /// The request.
        what: &'static str,
    },
}

impl Error {
    fn socket(call: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Socket { call, source }
    }

    /// The kernel's errno, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Socket { source, .. } | Self::Refused { source, .. } => source.raw_os_error(),
            Self::Unreadable { .. } | Self::Unstable { .. } => None,
        }
    }
}

/// What a datagram held for a request.
#[derive(Debug, Default)]
struct Progress {
    done: bool,
    interrupted: bool,
}

/// The socket for questions.
#[derive(Debug)]
pub(super) struct Requests {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Requests {
    pub(super) fn open() -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(Error::socket("socket"))?;
        socket.bind_auto().map_err(Error::socket("bind"))?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(Error::socket("connect"))?;
        let limit = TimeVal::new(ANSWER_SECONDS, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit).map_err(|e| Error::socket("setsockopt")(e.into()))?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(BUFFER_LEN) })
    }

    /// Everything of one kind.
    pub(super) fn dump(&mut self, what: &'static str, request: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            let (messages, interrupted) = self.exchange(what, request.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if !interrupted {
                return Ok(messages);
            }
        }
        Err(Error::Unstable { what })
    }

    /// One question with one answer (`flags` 0), or one change (`flags` NLM_F_CREATE and the like).
    pub(super) fn ask(&mut self, what: &'static str, request: RouteNetlinkMessage, flags: u16) -> Result<Vec<RouteNetlinkMessage>, Error> {
        self.exchange(what, request, NLM_F_REQUEST | NLM_F_ACK | flags).map(|(messages, _)| messages)
    }

    fn exchange(
        &mut self,
        what: &'static str,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(Vec<RouteNetlinkMessage>, bool), Error> {
        self.send(request, flags)?;
        let (mut answers, mut interrupted) = (Vec::new(), false);
        loop {
            self.buffer.clear();
            let len = self.socket.recv(&mut self.buffer, libc::MSG_TRUNC).map_err(Error::socket("recv"))?;
            if len > self.buffer.len() {
                return Err(Error::Unreadable { what, reason: format!("{len} bytes in one datagram") });
            }
            let progress = self.read_answers(what, &mut answers)?;
            interrupted |= progress.interrupted;
            if progress.done {
                return Ok((answers, interrupted));
            }
        }
    }

    fn send(&mut self, request: RouteNetlinkMessage, flags: u16) -> Result<(), Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop).map_err(Error::socket("send"))
    }

    /// Answers to an earlier request that timed out are skipped by their sequence number.
    fn read_answers(&self, what: &'static str, answers: &mut Vec<RouteNetlinkMessage>) -> Result<Progress, Error> {
        let mut progress = Progress::default();
        for message in Messages(&self.buffer) {
            let message = match message {
                Ok(message) => message,
                Err(reason) => {
                    tracing::warn!(what, reason, "one netlink answer left out");
                    continue;
                }
            };
            if message.header.sequence_number != self.sequence {
                continue;
            }
            progress.interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
            match message.payload {
                NetlinkPayload::Done(_) => progress.done = true,
                NetlinkPayload::Error(error) if error.code.is_none() => progress.done = true,
                NetlinkPayload::Error(error) => return Err(Error::Refused { what, source: error.to_io() }),
                NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                _ => {}
            }
        }
        Ok(progress)
    }
}

/// The messages of a datagram. One that can't be decoded is an error of its own; one whose length lies ends the walk.
struct Messages<'a>(&'a [u8]);

/// `struct nlmsghdr`.
const HEADER_LEN: usize = 16;

impl Iterator for Messages<'_> {
    type Item = Result<NetlinkMessage<RouteNetlinkMessage>, String>;

    fn next(&mut self) -> Option<Self::Item> {
        let len = u32::from_ne_bytes(*self.0.first_chunk()?) as usize;
        if len < HEADER_LEN || len > self.0.len() {
            let error = format!("a message of {len} bytes with {} left", self.0.len());
            self.0 = &[];
            return Some(Err(error));
        }
        let (message, _) = self.0.split_at_checked(len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(NetlinkMessage::deserialize(message).map_err(|error| error.to_string()))
    }
}

/// News from the kernel. They say what to look at again; the state is in a fresh snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// An interface is new, renamed, up, down, or otherwise changed.
    Link {
        /// Index.
        ifindex: u32,
        /// Name now.
        name: String,
        /// Administratively up.
        up: bool,
        /// Has carrier.
        carrier: bool,
    },
    /// An interface is gone.
    LinkGone {
        /// Index.
        ifindex: u32,
        /// Its last name.
        name: String,
    },
    /// An address came or went.
    Address {
        /// Of which interface.
        ifindex: u32,
        /// The address.
        address: IpAddr,
        /// Whether it went.
        gone: bool,
    },
    /// A neighbour's state or link-layer address changed.
    Neighbour {
        /// On which interface.
        ifindex: u32,
        /// The neighbour.
        address: IpAddr,
    },
    /// A route changed.
    Route,
    /// News were lost: take a fresh snapshot of everything.
    Resync,
}

/// The socket for news.
#[derive(Debug)]
pub struct Watch {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Watch {
    /// Subscribes to links, addresses, neighbours and routes of the namespace the thread is in.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(Error::socket("socket"))?;
        // Larger than the limit for the unprivileged; without the capability the default must do.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &NEWS_BUFFER);
        socket.set_non_blocking(true).map_err(Error::socket("fcntl"))?;
        socket.bind_auto().map_err(Error::socket("bind"))?;
        for group in [
            libc::RTNLGRP_LINK,
            libc::RTNLGRP_NEIGH,
            libc::RTNLGRP_IPV4_IFADDR,
            libc::RTNLGRP_IPV4_ROUTE,
            libc::RTNLGRP_IPV6_IFADDR,
            libc::RTNLGRP_IPV6_ROUTE,
        ] {
            socket.add_membership(group).map_err(Error::socket("add_membership"))?;
        }
        Ok(Self { socket, buffer: Vec::with_capacity(BUFFER_LEN) })
    }

    /// Readable when there is news.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Takes what is there, at most 256 datagrams; never blocks. Level-triggered polling shows the rest.
    pub fn drain(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..DRAIN_DATAGRAMS {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_TRUNC) {
                Ok(len) if len > self.buffer.len() => events.push(Event::Resync),
                Ok(_) => events.extend(Messages(&self.buffer).filter_map(event)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // ENOBUFS: the kernel dropped news. Anything else: equally unknown what was missed.
                Err(error) => {
                    tracing::debug!(%error, "netlink news lost");
                    events.push(Event::Resync);
                    break;
                }
            }
        }
        events
    }
}

/// An undecodable message may have been anything.
fn event(message: Result<NetlinkMessage<RouteNetlinkMessage>, String>) -> Option<Event> {
    let Ok(message) = message else { return Some(Event::Resync) };
    let NetlinkPayload::InnerMessage(inner) = message.payload else { return None };
    match inner {
        RouteNetlinkMessage::NewLink(link) => {
            let flags = link.header.flags;
            let (up, carrier) = (flags.contains(LinkFlags::Up), flags.contains(LinkFlags::LowerUp));
            Some(Event::Link { ifindex: link.header.index, name: link_name(&link)?, up, carrier })
        }
        RouteNetlinkMessage::DelLink(link) => Some(Event::LinkGone { ifindex: link.header.index, name: link_name(&link)? }),
        RouteNetlinkMessage::NewAddress(address) => address_event(address.header.index, &address.attributes, false),
        RouteNetlinkMessage::DelAddress(address) => address_event(address.header.index, &address.attributes, true),
        RouteNetlinkMessage::NewNeighbour(neighbour) | RouteNetlinkMessage::DelNeighbour(neighbour) => {
            Some(Event::Neighbour { ifindex: neighbour.header.ifindex, address: neighbour_address(&neighbour)? })
        }
        RouteNetlinkMessage::NewRoute(_) | RouteNetlinkMessage::DelRoute(_) => Some(Event::Route),
        _ => None,
    }
}

pub(super) fn link_name(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

fn address_event(ifindex: u32, attributes: &[AddressAttribute], gone: bool) -> Option<Event> {
    Some(Event::Address { ifindex, address: local_address(attributes)?, gone })
}

/// IFA_LOCAL where it is given (it differs from IFA_ADDRESS on point-to-point links), else IFA_ADDRESS.
pub(super) fn local_address(attributes: &[AddressAttribute]) -> Option<IpAddr> {
    let local = attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

pub(super) fn neighbour_address(neighbour: &NeighbourMessage) -> Option<IpAddr> {
    neighbour.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::netns::{in_netns, ip};
    use super::*;
    use netlink_packet_route::link::LinkMessage;

    #[test]
    fn a_datagram_whose_length_lies_ends_the_walk() {
        let mut bytes = vec![0; 20];
        bytes[0] = 200;
        assert!(matches!(Messages(&bytes).collect::<Vec<_>>()[..], [Err(_)]));
        bytes[0] = 3;
        assert!(matches!(Messages(&bytes).collect::<Vec<_>>()[..], [Err(_)]));
        assert!(Messages(&[1, 2]).next().is_none());
    }

    #[test]
    fn news_tell_of_links_and_addresses() {
        in_netns(|| {
            let mut watch = Watch::open().unwrap();
            assert!(watch.drain().is_empty());
            ip("link add op-a type veth peer name op-b");
            ip("link set op-a up");
            ip("link set op-b up");
            ip("addr add 10.1.1.1/24 dev op-a");
            let ifindex = nix::net::if_::if_nametoindex("op-a").unwrap();
            let events = watch.drain();
            assert!(events.contains(&Event::Link { ifindex, name: "op-a".into(), up: true, carrier: true }), "{events:?}");
            assert!(events.contains(&Event::Address { ifindex, address: "10.1.1.1".parse().unwrap(), gone: false }), "{events:?}");
            assert!(events.contains(&Event::Route) && !events.contains(&Event::Resync), "{events:?}");
            ip("link del op-a");
            let events = watch.drain();
            assert!(events.contains(&Event::LinkGone { ifindex, name: "op-a".into() }), "{events:?}");
        });
    }

    #[test]
    fn lost_news_are_a_resync() {
        in_netns(|| {
            let mut watch = Watch::open().unwrap();
            setsockopt(&watch.socket, sockopt::RcvBuf, &0).unwrap();
            for _ in 0..4 {
                ip("link set lo up");
                ip("link set lo down");
            }
            assert!(watch.drain().contains(&Event::Resync));
        });
    }

    #[test]
    fn a_refused_question_says_which() {
        in_netns(|| {
            let mut requests = Requests::open().unwrap();
            let mut link = LinkMessage::default();
            link.header.index = 4711;
            let error = requests.ask("RTM_GETLINK", RouteNetlinkMessage::GetLink(link), 0).unwrap_err();
            assert_eq!(error.errno(), Some(libc::ENODEV));
            assert!(error.to_string().starts_with("netlink RTM_GETLINK: "), "{error}");
        });
    }
}
