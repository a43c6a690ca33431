//! Where a unicast output goes: the kernel's route to it and its neighbour's link-layer address.
//!
//! Must never guess: without a route there is no answer, without a resolved neighbour no address; `resolve` asks the
//! kernel to find it, and the news (`Event::Neighbour`) tell when it did.

use super::interfaces::Interfaces;
use super::netlink::Error;
use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use std::net::IpAddr;

/// The first hop towards a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Interface to send from.
    pub ifindex: u32,
    /// Whom to send to: the gateway, or the destination itself where it is on the link.
    pub gateway: IpAddr,
    /// Source address the kernel would use.
    pub source: Option<IpAddr>,
    /// Its link-layer address; `None`: not resolved (yet).
    pub mac: Option<[u8; 6]>,
}

/// Errno of a destination without a route.
const NO_ROUTE: [i32; 4] = [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL];

impl Interfaces {
    /// The next hop towards `destination`, on `egress` if given. `None`: no route, or a route to this host itself.
    pub fn next_hop(&mut self, destination: IpAddr, egress: Option<u32>) -> Result<Option<NextHop>, Error> {
        let Some(mut hop) = self.route(destination, egress)? else { return Ok(None) };
        hop.mac = self.neighbour(hop.ifindex, hop.gateway)?;
        Ok(Some(hop))
    }

    /// Asks the kernel to resolve a next hop: it sends ARP or a neighbour solicitation and tells by [`super::netlink::Event`].
    /// Harmless where it is resolved already. Needs CAP_NET_ADMIN.
    pub fn resolve(&mut self, ifindex: u32, gateway: IpAddr) -> Result<(), Error> {
        let mut message = neighbour_message(ifindex, gateway);
        message.header.flags = NeighbourFlags::Use;
        self.requests.ask("RTM_NEWNEIGH", RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE).map(drop)
    }

    fn route(&mut self, destination: IpAddr, egress: Option<u32>) -> Result<Option<NextHop>, Error> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(destination);
        message.header.destination_prefix_length = if destination.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Destination(destination.into()));
        message.attributes.extend(egress.map(RouteAttribute::Oif));
        match self.requests.ask("RTM_GETROUTE", RouteNetlinkMessage::GetRoute(message), 0) {
            Ok(answers) => Ok(answers.iter().find_map(|answer| hop(answer, destination))),
            Err(error) if error.errno().is_some_and(|errno| NO_ROUTE.contains(&errno)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn neighbour(&mut self, ifindex: u32, address: IpAddr) -> Result<Option<[u8; 6]>, Error> {
        let message = neighbour_message(ifindex, address);
        match self.requests.ask("RTM_GETNEIGH", RouteNetlinkMessage::GetNeighbour(message), 0) {
            Ok(answers) => Ok(answers.iter().find_map(mac)),
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn neighbour_message(ifindex: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = ifindex;
    let address = match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    };
    message.attributes.push(NeighbourAttribute::Destination(address));
    message
}

/// Only unicast routes lead anywhere: local, unreachable, prohibit and blackhole routes are no hop.
fn hop(answer: &RouteNetlinkMessage, destination: IpAddr) -> Option<NextHop> {
    let RouteNetlinkMessage::NewRoute(route) = answer else { return None };
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut ifindex, mut gateway, mut source) = (None, destination, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(address) => gateway = ip(address)?,
            // An IPv4 route through an IPv6 gateway (RFC 5549).
            RouteAttribute::Via(RouteVia::Inet6(v6)) => gateway = (*v6).into(),
            RouteAttribute::Via(RouteVia::Inet(v4)) => gateway = (*v4).into(),
            RouteAttribute::PrefSource(address) => source = ip(address),
            _ => {}
        }
    }
    Some(NextHop { ifindex: ifindex?, gateway, source, mac: None })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// The states in which the kernel itself would send to this address (NUD_VALID).
fn mac(answer: &RouteNetlinkMessage) -> Option<[u8; 6]> {
    use NeighbourState::{Delay, Permanent, Probe, Reachable, Stale};
    let RouteNetlinkMessage::NewNeighbour(neighbour) = answer else { return None };
    if !matches!(neighbour.header.state, Reachable | Stale | Delay | Probe | Permanent) {
        return None;
    }
    neighbour.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => <[u8; 6]>::try_from(&bytes[..]).ok(),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::netlink::{Event, Watch};
    use super::super::netns::{in_netns, ip};
    use super::*;
    use std::time::{Duration, Instant};

    fn link() -> (Interfaces, u32) {
        ip("link add op-a type veth peer name op-b address 02:00:00:00:00:0b");
        ip("link set op-a up");
        ip("link set op-b up");
        ip("addr add 10.1.1.1/24 dev op-a");
        ip("addr add 2001:db8::1/64 dev op-a nodad");
        (Interfaces::open().unwrap(), nix::net::if_::if_nametoindex("op-a").unwrap())
    }

    #[test]
    fn next_hop_is_what_ip_route_says() {
        in_netns(|| {
            let (mut interfaces, a) = link();
            let far: IpAddr = "192.0.2.7".parse().unwrap();
            assert_eq!(interfaces.next_hop(far, None).unwrap(), None, "no route yet");
            ip("route add default via 10.1.1.254");
            ip("neigh add 10.1.1.254 lladdr 02:00:00:00:00:fe dev op-a nud permanent");
            let hop = interfaces.next_hop(far, None).unwrap().unwrap();
            let want = NextHop {
                ifindex: a,
                gateway: "10.1.1.254".parse().unwrap(),
                source: Some("10.1.1.1".parse().unwrap()),
                mac: Some([2, 0, 0, 0, 0, 0xfe]),
            };
            assert_eq!(hop, want);
            let near: IpAddr = "10.1.1.9".parse().unwrap();
            let hop = interfaces.next_hop(near, Some(a)).unwrap().unwrap();
            assert_eq!((hop.gateway, hop.mac), (near, None));
        });
    }

    #[test]
    fn ipv6_and_rfc_5549_gateways() {
        in_netns(|| {
            let (mut interfaces, _) = link();
            ip("-6 route add default via fe80::1 dev op-a");
            ip("neigh add fe80::1 lladdr 02:00:00:00:00:61 dev op-a nud permanent");
            ip("route add 198.51.100.0/24 via inet6 fe80::1 dev op-a");
            for destination in ["2001:db8:9::1", "198.51.100.1"] {
                let hop = interfaces.next_hop(destination.parse().unwrap(), None).unwrap().unwrap();
                assert_eq!((hop.gateway, hop.mac), ("fe80::1".parse().unwrap(), Some([2, 0, 0, 0, 0, 0x61])), "{destination}");
            }
        });
    }

    #[test]
    fn routes_that_lead_nowhere_are_no_hop() {
        in_netns(|| {
            let (mut interfaces, _) = link();
            for kind in ["unreachable", "prohibit", "blackhole"] {
                ip(&format!("route replace {kind} 203.0.113.0/24"));
                assert_eq!(interfaces.next_hop("203.0.113.1".parse().unwrap(), None).unwrap(), None, "{kind}");
            }
            assert_eq!(interfaces.next_hop("10.1.1.1".parse().unwrap(), None).unwrap(), None, "this host");
        });
    }

    /// The other end is in a namespace of its own, so that it answers ARP.
    #[test]
    fn resolve_makes_the_kernel_ask_and_the_news_tell() {
        in_netns(|| {
            let (mut interfaces, a) = link();
            // Moved to its own namespace, the peer answers with its own stack.
            let (ready, wait) = std::sync::mpsc::channel();
            let (done, end) = std::sync::mpsc::channel::<()>();
            let peer = std::thread::spawn(move || {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                ready.send(nix::unistd::gettid()).unwrap();
                end.recv().ok();
                ip("link set op-b up");
                ip("addr add 10.1.1.9/24 dev op-b");
                end.recv().ok();
            });
            let tid = wait.recv().unwrap();
            ip(&format!("link set op-b netns {tid}"));
            done.send(()).unwrap();
            let mut watch = Watch::open().unwrap();
            let near: IpAddr = "10.1.1.9".parse().unwrap();
            let start = Instant::now();
            let mut told = false;
            while interfaces.next_hop(near, Some(a)).unwrap().is_none_or(|hop| hop.mac.is_none()) {
                assert!(start.elapsed() < Duration::from_secs(5), "not resolved");
                interfaces.resolve(a, near).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                told |= watch.drain().contains(&Event::Neighbour { ifindex: a, address: near });
            }
            assert_eq!(interfaces.next_hop(near, Some(a)).unwrap().unwrap().mac, Some([2, 0, 0, 0, 0, 0x0b]));
            told |= watch.drain().contains(&Event::Neighbour { ifindex: a, address: near });
            assert!(told);
            done.send(()).ok();
            peer.join().unwrap();
        });
    }
}
