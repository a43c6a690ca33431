//! Facts about interfaces: index, address, MTU, state, queues, driver.
//!
//! From netlink and ethtool only: /sys shows another namespace's interfaces after setns. Must never change anything.

use super::kernel;
use super::netlink::{Error, Requests, link_name, local_address};
use netlink_packet_route::address::{AddressFlags, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::{RouteNetlinkMessage, address::AddressAttribute};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsFd;

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Length of its network's prefix.
    pub prefix_len: u8,
    /// Whether packets may be sent from it: not tentative, not failed in duplicate detection, not deprecated.
    pub usable: bool,
}

/// One interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// Ethernet address; `None` where there is none (tun).
    pub mac: Option<[u8; 6]>,
    /// MTU in bytes, without the Ethernet header.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Has carrier.
    pub carrier: bool,
    /// Loopback.
    pub loopback: bool,
    /// Takes part in multicast (`ip link set … multicast on`); without it the kernel sends no IGMP there.
    pub multicast: bool,
    /// Takes every multicast frame, or every frame, whatever its MAC filter says.
    pub unfiltered: bool,
    /// IPv4 and IPv6 addresses in the kernel's order (primary first).
    pub addresses: Vec<Address>,
    /// RX queues in use.
    pub rx_queues: u32,
    /// TX queues in use.
    pub tx_queues: u32,
    /// Driver as ethtool names it; `None` where it has no name.
    pub driver: Option<String>,
    /// Kind of a virtual interface (veth, bridge, vlan, tun…); `None` for hardware and loopback.
    pub kind: Option<String>,
    /// Index of the bridge, bond or VRF it belongs to.
    pub master: Option<u32>,
    /// Index of the interface it sits on (vlan, macvlan); of the peer in the same namespace (veth).
    pub lower: Option<u32>,
    /// Id of the XDP program attached to it, ours or another's.
    pub xdp_program: Option<u32>,
}

impl Interface {
    /// First IPv4 address that can be sent from.
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        self.usable().find_map(|address| match address {
            IpAddr::V4(v4) => Some(v4),
            IpAddr::V6(_) => None,
        })
    }

    /// First IPv6 address that can be sent from: a routable one, else the link-local one.
    pub fn ipv6(&self) -> Option<Ipv6Addr> {
        let all = || {
            self.usable().filter_map(|address| match address {
                IpAddr::V6(v6) => Some(v6),
                IpAddr::V4(_) => None,
            })
        };
        all().find(|address| !address.is_unicast_link_local()).or_else(|| all().next())
    }

    /// Whether `address` is one of its own.
    pub fn owns(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|own| own.address == address)
    }

    fn usable(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().filter(|address| address.usable).map(|address| address.address)
    }
}

/// Asks the kernel about the interfaces of the network namespace it was opened in.
#[derive(Debug)]
pub struct Interfaces {
    pub(super) requests: Requests,
    /// Any socket serves for ethtool.
    ethtool: UdpSocket,
}

impl Interfaces {
    /// Opens the sockets.
    pub fn open() -> Result<Self, Error> {
        let ethtool = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(|source| Error::Socket { call: "bind", source })?;
        Ok(Self { requests: Requests::open()?, ethtool })
    }

    /// All interfaces by name.
    pub fn snapshot(&mut self) -> Result<BTreeMap<String, Interface>, Error> {
        let links = self.requests.dump("RTM_GETLINK", RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        let mut by_index: BTreeMap<u32, Interface> =
            links.iter().filter_map(interface).map(|interface| (interface.ifindex, interface)).collect();
        for message in self.requests.dump("RTM_GETADDR", RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
            let RouteNetlinkMessage::NewAddress(message) = message else { continue };
            if let (Some(interface), Some(address)) = (by_index.get_mut(&message.header.index), address(&message)) {
                interface.addresses.push(address);
            }
        }
        for interface in by_index.values_mut() {
            self.ask_driver(interface);
        }
        Ok(by_index.into_values().map(|interface| (interface.name.clone(), interface)).collect())
    }

    /// `ETHTOOL_GFLAGS` (linux/ethtool.h): `ETH_FLAG_*` bits of the interface's offloads.
    pub fn offloads(&self, interface: &str) -> std::io::Result<u32> {
        kernel::ethtool_value(self.ethtool.as_fd(), interface, 0x25)
    }

    /// Netlink counts the queues that exist, ethtool those in use. Drivers without ethtool keep netlink's count.
    fn ask_driver(&self, interface: &mut Interface) {
        let socket = self.ethtool.as_fd();
        if let Ok(channels) = kernel::channels(socket, &interface.name) {
            let in_use = |own: u32, exist: u32| if own + channels.combined > 0 { own + channels.combined } else { exist };
            interface.rx_queues = in_use(channels.rx, interface.rx_queues);
            interface.tx_queues = in_use(channels.tx, interface.tx_queues);
        }
        interface.driver = kernel::driver_info(socket, &interface.name).ok().and_then(|info| text(&info.driver));
    }
}

/// Bytes up to the first NUL.
fn text(bytes: &[u8]) -> Option<String> {
    let name: Vec<u8> = bytes.iter().copied().take_while(|byte| *byte != 0).collect();
    String::from_utf8(name).ok().filter(|name| !name.is_empty())
}

fn interface(message: &RouteNetlinkMessage) -> Option<Interface> {
    let RouteNetlinkMessage::NewLink(link) = message else { return None };
    let flags = link.header.flags;
    let mut interface = Interface {
        ifindex: link.header.index,
        name: link_name(link)?,
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        loopback: flags.contains(LinkFlags::Loopback),
        multicast: flags.contains(LinkFlags::Multicast),
        unfiltered: flags.intersects(LinkFlags::Promisc | LinkFlags::Allmulti),
        rx_queues: 1,
        tx_queues: 1,
        ..Interface::default()
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Address(bytes) if !interface.loopback => interface.mac = <[u8; 6]>::try_from(&bytes[..]).ok(),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::NumRxQueues(count) => interface.rx_queues = *count,
            LinkAttribute::NumTxQueues(count) => interface.tx_queues = *count,
            LinkAttribute::Controller(index) => interface.master = Some(*index),
            LinkAttribute::Link(index) => interface.lower = Some(*index),
            LinkAttribute::LinkInfo(infos) => interface.kind = infos.iter().find_map(kind),
            LinkAttribute::Xdp(xdp) => interface.xdp_program = xdp.iter().find_map(program),
            _ => {}
        }
    }
    Some(interface)
}

fn kind(info: &LinkInfo) -> Option<String> {
    match info {
        LinkInfo::Kind(InfoKind::Other(name)) => Some(name.clone()),
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    }
}

fn program(attribute: &netlink_packet_route::link::LinkXdp) -> Option<u32> {
    match attribute {
        netlink_packet_route::link::LinkXdp::ProgId(id) => Some(*id).filter(|id| *id != 0),
        _ => None,
    }
}

fn address(message: &AddressMessage) -> Option<Address> {
    const UNUSABLE: AddressFlags = AddressFlags::Tentative.union(AddressFlags::Dadfailed).union(AddressFlags::Deprecated);
    let wide = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    let narrow = || AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let flags = wide.unwrap_or_else(narrow);
    let usable = !flags.intersects(UNUSABLE);
    Some(Address { address: local_address(&message.attributes)?, prefix_len: message.header.prefix_len, usable })
}

#[cfg(test)]
mod tests {
    use super::super::netns::{in_netns, ip};
    use super::*;

    #[test]
    fn snapshot_tells_what_ip_link_set() {
        in_netns(|| {
            ip("link add op-a numrxqueues 4 numtxqueues 4 mtu 9000 address 02:00:00:00:00:0a type veth peer name op-b");
            ip("link set op-a up");
            ip("link set op-b up");
            ip("addr add 10.1.1.1/24 dev op-a");
            ip("addr add 10.1.1.2/24 dev op-a");
            ip("addr add 2001:db8::1/64 dev op-a nodad");
            let mut interfaces = Interfaces::open().unwrap();
            let all = interfaces.snapshot().unwrap();
            let a = &all["op-a"];
            assert_eq!((a.mac, a.mtu, a.up, a.carrier), (Some([2, 0, 0, 0, 0, 10]), 9000, true, true));
            assert_eq!((a.driver.as_deref(), a.kind.as_deref()), (Some("veth"), Some("veth")));
            assert_eq!((a.ipv4(), a.ipv6()), (Some(Ipv4Addr::new(10, 1, 1, 1)), Some("2001:db8::1".parse().unwrap())));
            assert!(a.owns("10.1.1.2".parse().unwrap()) && !a.owns("10.1.1.3".parse().unwrap()));
            let first = Address { address: "10.1.1.1".parse().unwrap(), prefix_len: 24, usable: true };
            assert!(a.addresses.contains(&first), "{:?}", a.addresses);
            assert_eq!(a.lower, Some(all["op-b"].ifindex));
            assert!(all["lo"].loopback && !all["lo"].up && all["lo"].mac.is_none());
        });
    }

    #[test]
    fn queues_are_those_in_use() {
        in_netns(|| {
            // The kernel starts a peer with one queue in use unless the first end asks for several.
            ip("link add op-a numrxqueues 2 numtxqueues 2 type veth peer name op-b numrxqueues 4 numtxqueues 4");
            let mut interfaces = Interfaces::open().unwrap();
            let queues = |interfaces: &mut Interfaces| {
                let b = interfaces.snapshot().unwrap().remove("op-b").unwrap();
                (b.rx_queues, b.tx_queues)
            };
            assert_eq!(queues(&mut interfaces), (4, 4));
            match std::process::Command::new("ethtool").args(["-L", "op-b", "rx", "3", "tx", "2"]).status() {
                Ok(status) if status.success() => assert_eq!(queues(&mut interfaces), (3, 2)),
                other => println!("SKIPPED: ethtool -L: {other:?}"),
            }
        });
    }

    #[test]
    fn kinds_and_masters() {
        in_netns(|| {
            ip("link add op-br type bridge");
            ip("link add op-a type veth peer name op-b");
            ip("link set op-a master op-br");
            let all = Interfaces::open().unwrap().snapshot().unwrap();
            assert_eq!(all["op-br"].kind.as_deref(), Some("bridge"));
            assert_eq!(all["op-a"].master, Some(all["op-br"].ifindex));
            assert!(!all["op-a"].up && !all["op-a"].carrier);
        });
    }

    #[test]
    fn a_tentative_address_is_not_sent_from() {
        in_netns(|| {
            ip("link add op-a type veth peer name op-b");
            ip("addr add 2001:db8::1/64 dev op-a");
            let all = Interfaces::open().unwrap().snapshot().unwrap();
            let a = &all["op-a"];
            assert!(a.owns("2001:db8::1".parse().unwrap()));
            assert_eq!(a.ipv6(), None, "the link is down, so duplicate detection can't have ended: {:?}", a.addresses);
        });
    }

    #[test]
    fn two_hundred_interfaces_are_all_listed() {
        in_netns(|| {
            for n in 0..100 {
                ip(&format!("link add op-{n} type veth peer name op-{n}p"));
            }
            assert_eq!(Interfaces::open().unwrap().snapshot().unwrap().len(), 201);
        });
    }
}
