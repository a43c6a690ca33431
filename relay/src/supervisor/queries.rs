//! When each interface last heard a membership query: without a querier, a snooping switch forgets members or floods.
//!
//! Raw sockets that see IGMP and MLD queries beside the kernel, which answers them. Must never answer one itself, and never
//! read anything else.

use super::kernel;
use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use std::collections::BTreeMap;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

/// Queries taken by one `drain`, so that a storm of them can't hold the loop.
const DRAIN: usize = 64;

/// The sockets, and what they heard.
#[derive(Debug)]
pub struct Queries {
    igmp: OwnedFd,
    mld: Option<OwnedFd>,
    /// By interface, IPv4 or not.
    heard: BTreeMap<(u32, bool), Instant>,
}

impl Queries {
    /// Opens the sockets in the thread's network namespace. Needs CAP_NET_RAW.
    pub fn open() -> io::Result<Self> {
        let igmp = kernel::igmp_queries()?;
        setsockopt(&igmp, sockopt::Ipv4PacketInfo, &true)?;
        // A kernel without IPv6 has no MLD.
        let mld = kernel::mld_queries().ok().filter(|socket| setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true).is_ok());
        Ok(Self { igmp, mld, heard: BTreeMap::new() })
    }

    /// Readable when a query has come.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.igmp.as_fd()).chain(self.mld.as_ref().map(AsFd::as_fd))
    }

    /// Takes what has come; never blocks.
    pub fn drain(&mut self, now: Instant) {
        for (socket, ipv4) in [(Some(&self.igmp), true), (self.mld.as_ref(), false)] {
            let from = socket.into_iter().flat_map(|socket| std::iter::from_fn(|| interface(socket)).take(DRAIN));
            self.heard.extend(from.map(|ifindex| ((ifindex, ipv4), now)));
        }
    }

    /// When an interface last heard a query of this family.
    pub fn last(&self, ifindex: u32, ipv4: bool) -> Option<Instant> {
        self.heard.get(&(ifindex, ipv4)).copied()
    }
}

/// The interface that the next query came by.
fn interface(socket: &OwnedFd) -> Option<u32> {
    let mut control = cmsg_space!(libc::in6_pktinfo);
    let mut bytes = [0; 64];
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut buffers, Some(&mut control), MsgFlags::MSG_DONTWAIT).ok()?;
    let ifindex = message.cmsgs().ok()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => u32::try_from(info.ipi_ifindex).ok(),
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(info.ipi6_ifindex),
        _ => None,
    });
    // One without its interface is nobody's.
    Some(ifindex.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::super::netns::{in_netns, ip};
    use super::*;

    /// The bridge is the querier of its ports' other ends.
    #[test]
    fn queries_are_heard_by_interface() {
        in_netns(|| {
            ip("link add op-br type bridge mcast_snooping 1 mcast_querier 1 mcast_startup_query_interval 10 mcast_startup_query_count 9");
            ip("link add op-a type veth peer name op-b");
            ip("link set op-b master op-br");
            let a = nix::net::if_::if_nametoindex("op-a").unwrap();
            let mut queries = Queries::open().unwrap();
            assert_eq!(queries.last(a, true), None);
            ["op-br", "op-a", "op-b"].iter().for_each(|name| ip(&format!("link set {name} up")));
            let begin = Instant::now();
            while queries.last(a, true).is_none() {
                assert!(begin.elapsed().as_secs() < 10, "{queries:?}");
                std::thread::sleep(std::time::Duration::from_millis(20));
                queries.drain(Instant::now());
            }
        });
    }
}
