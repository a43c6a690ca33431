//! Memberships: which groups the kernel reports by IGMP and MLD on our behalf, and which ports it does not answer with
//! ICMP "port unreachable".
//!
//! AF_XDP and AF_PACKET join nothing, so kernel UDP sockets keep the memberships alive. Must never receive a packet: a
//! member socket is bound to no port, so nothing is delivered to it; a holder has a filter that refuses everything.

use super::kernel::{self, Membership};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Groups a socket may be a member of: the default of `net.ipv4.igmp_max_memberships`.
const GROUPS_PER_SOCKET: usize = 20;
/// Sources of one group on one socket: the default of `net.ipv4.igmp_max_msf`.
const SOURCES_PER_GROUP: usize = 10;

/// One membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Join {
    /// The ingress interface.
    pub ifindex: u32,
    /// A multicast address.
    pub group: IpAddr,
    /// `None`: any source, (\*,G).
    pub source: Option<IpAddr>,
}

/// A pooled socket. Any-source and source-specific members never share one: the kernel refuses to change a group's mode.
#[derive(Debug)]
struct Member {
    socket: OwnedFd,
    ipv4: bool,
    any_source: bool,
    /// Sources (0 for any-source) of each group; the key is what the kernel counts as one membership.
    groups: BTreeMap<(u32, IpAddr), usize>,
    /// The kernel's limits turned out to be smaller than ours.
    full: bool,
}

impl Member {
    fn open(join: &Join) -> io::Result<Self> {
        let ipv4 = join.group.is_ipv4();
        let family = if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        // The kernel raises 0 to its minimum.
        setsockopt(&socket, sockopt::RcvBuf, &0)?;
        Ok(Self { socket, ipv4, any_source: join.source.is_none(), groups: BTreeMap::new(), full: false })
    }

    fn has_room(&self, join: &Join) -> bool {
        if self.full || self.ipv4 != join.group.is_ipv4() || self.any_source != join.source.is_none() {
            return false;
        }
        match self.groups.get(&(join.ifindex, join.group)) {
            Some(sources) => *sources < SOURCES_PER_GROUP,
            None => self.groups.len() < GROUPS_PER_SOCKET,
        }
    }

    fn call(&self, what: Membership, join: &Join) -> io::Result<()> {
        match join.source {
            None => kernel::any_source(self.socket.as_fd(), what, join.ifindex, join.group),
            Some(source) => kernel::one_source(self.socket.as_fd(), what, join.ifindex, join.group, source),
        }
    }

    fn join(&mut self, join: &Join) -> io::Result<()> {
        self.call(Membership::Join, join)?;
        *self.groups.entry((join.ifindex, join.group)).or_default() += 1;
        Ok(())
    }

    /// An interface that is gone took the membership with it, but not its place in the socket's list; so always ask.
    /// For a source it answers ENODEV and keeps the place: then leave the group, whose other sources are as dead.
    fn leave(&mut self, join: &Join) {
        let mut left = self.call(Membership::Leave, join);
        if matches!(&left, Err(error) if error.raw_os_error() == Some(libc::ENODEV)) {
            left = self.call(Membership::Leave, &Join { source: None, ..*join });
        }
        if let Err(error) = left {
            tracing::debug!(?join, %error, "leave");
        }
        let key = (join.ifindex, join.group);
        if let Some(sources) = self.groups.get_mut(&key) {
            *sources -= 1;
            if *sources == 0 {
                self.groups.remove(&key);
            }
        }
    }
}

/// The memberships that stand.
#[derive(Debug, Default)]
pub struct Joins {
    members: BTreeMap<u32, Member>,
    standing: BTreeMap<Join, u32>,
    next: u32,
    /// What the kernel refused at the last call, and at the one before.
    refused: [BTreeSet<Join>; 2],
}

impl Joins {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the standing memberships equal `wanted`, leaves first. Returns those the kernel refused; the next call
    /// tries them again.
    pub fn set(&mut self, wanted: &BTreeSet<Join>) -> Vec<(Join, io::Error)> {
        let gone: Vec<Join> = self.standing.keys().filter(|join| !wanted.contains(join)).copied().collect();
        for join in &gone {
            self.leave(join);
        }
        self.members.retain(|_, member| !member.groups.is_empty());
        let refused = self.join_all(wanted.iter().copied());
        let [last, _] = std::mem::take(&mut self.refused);
        self.refused = [refused.iter().map(|(join, _)| *join).collect(), last];
        refused
    }

    /// Whether this one was refused before the last call of [`Joins::set`] as well, so that it was told already.
    pub fn asked_before(&self, join: &Join) -> bool {
        self.refused[1].contains(join)
    }

    /// Whether the kernel holds this membership for us.
    pub fn joined(&self, join: &Join) -> bool {
        self.standing.contains_key(join)
    }

    /// Standing memberships.
    pub fn count(&self) -> usize {
        self.standing.len()
    }

    /// Joins everything of one interface again: for an interface that was re-created under the same index, or
    /// whose kernel state is in doubt. Returns what the kernel refused.
    pub fn rejoin(&mut self, ifindex: u32) -> Vec<(Join, io::Error)> {
        let here: Vec<Join> = self.standing.keys().filter(|join| join.ifindex == ifindex).copied().collect();
        for join in &here {
            self.leave(join);
        }
        self.join_all(here.into_iter())
    }

    /// The sockets, by number.
    pub fn sockets(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.members.iter().map(|(number, member)| (*number, member.socket.as_fd()))
    }

    /// Sockets in use.
    pub fn socket_count(&self) -> usize {
        self.members.len()
    }

    fn join_all(&mut self, wanted: impl Iterator<Item = Join>) -> Vec<(Join, io::Error)> {
        let mut refused = Vec::new();
        for join in wanted {
            if !self.joined(&join)
                && let Err(error) = self.join(&join)
            {
                refused.push((join, error));
            }
        }
        refused
    }

    /// On the first socket with room, else on a new one. A socket that is full earlier than we think (smaller sysctls)
    /// is marked, and a fresh one decides.
    fn join(&mut self, join: &Join) -> io::Result<()> {
        if let Some((key, member)) = self.members.iter_mut().find(|(_, member)| member.has_room(join)) {
            match member.join(join) {
                Ok(()) => {
                    self.standing.insert(*join, *key);
                    return Ok(());
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => member.full = true,
                Err(error) => return Err(error),
            }
        }
        let mut member = Member::open(join)?;
        member.join(join)?;
        let key = self.next;
        self.next += 1;
        self.members.insert(key, member);
        self.standing.insert(*join, key);
        Ok(())
    }

    fn leave(&mut self, join: &Join) {
        if let Some(key) = self.standing.remove(join)
            && let Some(member) = self.members.get_mut(&key)
        {
            member.leave(join);
            member.full = false;
        }
    }
}

/// Bound, unread UDP sockets for unicast ingress on the packet path (DECISIONS §11): the kernel sees a receiver and sends
/// no ICMP. What arrives counts as `InErrors` of the namespace, never as a full buffer.
#[derive(Debug, Default)]
pub struct Holders {
    sockets: BTreeMap<SocketAddr, OwnedFd>,
}

impl Holders {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the held ports equal `wanted`. Returns those that can't be held. `AddrInUse` is benign: somebody else
    /// receives there, so the kernel sends no ICMP either.
    pub fn set(&mut self, wanted: &BTreeSet<SocketAddr>) -> Vec<(SocketAddr, io::Error)> {
        self.sockets.retain(|address, _| wanted.contains(address));
        let mut refused = Vec::new();
        for address in wanted {
            if self.sockets.contains_key(address) {
                continue;
            }
            match hold(*address) {
                Ok(socket) => {
                    self.sockets.insert(*address, socket);
                }
                Err(error) => refused.push((*address, error)),
            }
        }
        refused
    }

    /// Takes a socket over that holds a port already.
    pub fn adopt(&mut self, address: SocketAddr, socket: OwnedFd) {
        self.sockets.insert(address, socket);
    }

    /// The sockets, by what they hold.
    pub fn sockets(&self) -> impl Iterator<Item = (SocketAddr, BorrowedFd<'_>)> {
        self.sockets.iter().map(|(address, socket)| (*address, socket.as_fd()))
    }

    /// Whether this port is held by us.
    pub fn held(&self, address: &SocketAddr) -> bool {
        self.sockets.contains_key(address)
    }
}

/// The filter comes before the port, so that nothing is ever queued.
fn hold(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    kernel::refuse_all(socket.as_fd())?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::super::netns::{in_netns, ip, proc_net};
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
    use std::time::{Duration, Instant};

    fn asm(ifindex: u32, group: Ipv4Addr) -> Join {
        Join { ifindex, group: group.into(), source: None }
    }

    fn ssm(ifindex: u32, group: &str, source: &str) -> Join {
        Join { ifindex, group: group.parse().unwrap(), source: Some(source.parse().unwrap()) }
    }

    /// A veth end that is up; its index.
    fn veth(name: &str) -> u32 {
        ip(&format!("link add {name} type veth peer name {name}-peer"));
        ip(&format!("link set {name} up"));
        ip(&format!("link set {name}-peer up"));
        nix::net::if_::if_nametoindex(name).unwrap()
    }

    fn none(refused: &[(Join, io::Error)]) {
        assert!(refused.is_empty(), "refused: {refused:?}");
    }

    /// How the kernel writes an IPv4 group in /proc/net/igmp: little-endian hex.
    fn hex(group: Ipv4Addr) -> String {
        format!("{:08X}", u32::from_le_bytes(group.octets()))
    }

    fn igmp_has(group: Ipv4Addr) -> bool {
        proc_net("igmp").contains(&hex(group))
    }

    #[test]
    fn set_joins_and_leaves_by_difference() {
        in_netns(|| {
            let v0 = veth("op-v0");
            let [a, b, c] = [1, 2, 3].map(|n| Ipv4Addr::new(239, 7, 7, n));
            let mut joins = Joins::new();
            none(&joins.set(&BTreeSet::from([asm(v0, a), asm(v0, b)])));
            assert!(igmp_has(a) && igmp_has(b) && !igmp_has(c));
            none(&joins.set(&BTreeSet::from([asm(v0, b), asm(v0, c)])));
            assert!(!igmp_has(a) && igmp_has(b) && igmp_has(c));
            assert!(!joins.joined(&asm(v0, a)) && joins.joined(&asm(v0, c)));
            none(&joins.set(&BTreeSet::new()));
            assert!(!igmp_has(b) && !igmp_has(c));
            assert_eq!(joins.socket_count(), 0);
        });
    }

    #[test]
    fn six_thousand_groups_with_default_sysctls_within_five_seconds() {
        in_netns(|| {
            let v0 = veth("op-v0");
            let wanted: BTreeSet<Join> = (0..6000u32).map(|n| asm(v0, Ipv4Addr::from(0xef01_0000 + n))).collect();
            let mut joins = Joins::new();
            let start = Instant::now();
            none(&joins.set(&wanted));
            let took = start.elapsed();
            println!("6000 joins in {took:?} on {} sockets", joins.socket_count());
            assert_eq!(joins.socket_count(), 300);
            assert_eq!(proc_net("igmp").matches("01EF ").count(), 6000);
            assert!(took < Duration::from_secs(5), "{took:?}");
        });
    }

    #[test]
    fn sources_beyond_the_limit_of_a_socket_go_to_another() {
        in_netns(|| {
            let v0 = veth("op-v0");
            let wanted: BTreeSet<Join> = (1..=25).map(|n| ssm(v0, "232.1.1.1", &format!("10.0.0.{n}"))).collect();
            let mut joins = Joins::new();
            none(&joins.set(&wanted));
            assert_eq!(joins.socket_count(), 3);
            assert_eq!(proc_net("mcfilter").matches("0xe8010101").count(), 25);
            let fewer: BTreeSet<Join> = wanted.into_iter().skip(20).collect();
            none(&joins.set(&fewer));
            assert_eq!(proc_net("mcfilter").matches("0xe8010101").count(), 5);
            assert_eq!(joins.socket_count(), 1);
        });
    }

    #[test]
    fn any_source_and_source_specific_of_one_group_stand_side_by_side() {
        in_netns(|| {
            let v0 = veth("op-v0");
            let group = Ipv4Addr::new(239, 7, 7, 7);
            let mut joins = Joins::new();
            none(&joins.set(&BTreeSet::from([asm(v0, group), ssm(v0, "239.7.7.7", "10.0.0.1")])));
            assert_eq!(joins.socket_count(), 2);
        });
    }

    #[test]
    fn ipv6_groups_are_joined_by_mld() {
        in_netns(|| {
            let v0 = veth("op-v0");
            let group = |n: u16| IpAddr::from(Ipv6Addr::new(0xff3e, 0, 0, 0, 0, 0, 0x77, n));
            let mut wanted: BTreeSet<Join> = (0..45).map(|n| Join { ifindex: v0, group: group(n), source: None }).collect();
            wanted.insert(Join { ifindex: v0, group: group(99), source: Some("2001:db8::1".parse().unwrap()) });
            let mut joins = Joins::new();
            none(&joins.set(&wanted));
            assert_eq!(proc_net("igmp6").matches("ff3e0000000000000000000000770").count(), 46);
            assert!(proc_net("mcfilter6").contains("20010db8000000000000000000000001"));
        });
    }

    #[test]
    fn one_bad_membership_does_not_stop_the_others() {
        in_netns(|| {
            let v0 = veth("op-v0");
            let (good, no_interface, unicast) =
                (asm(v0, Ipv4Addr::new(239, 7, 7, 7)), asm(4711, Ipv4Addr::new(239, 7, 7, 7)), asm(v0, Ipv4Addr::new(10, 0, 0, 1)));
            let mut joins = Joins::new();
            let refused = joins.set(&BTreeSet::from([good, no_interface, unicast]));
            let codes: Vec<_> = refused.iter().map(|(join, error)| (*join, error.raw_os_error())).collect();
            assert_eq!(codes, [(unicast, Some(libc::EINVAL)), (no_interface, Some(libc::ENODEV))]);
            assert!(joins.joined(&good) && !joins.joined(&unicast));
        });
    }

    /// A re-created interface has lost its memberships, although the sockets still list them.
    #[test]
    fn rejoin_restores_a_recreated_interface() {
        in_netns(|| {
            let v0 = veth("op-v0");
            // Joined before the other: /proc/net/mcfilter lists an interface only if its youngest group has sources.
            let group = Ipv4Addr::new(231, 7, 7, 7);
            let mut joins = Joins::new();
            none(&joins.set(&BTreeSet::from([asm(v0, group), ssm(v0, "232.1.1.1", "10.0.0.1")])));
            ip("link del op-v0");
            ip(&format!("link add op-v0 index {v0} type veth peer name op-v0-peer"));
            ip("link set op-v0 up");
            assert!(!igmp_has(group));
            none(&joins.rejoin(v0));
            assert!(igmp_has(group));
            assert_eq!(proc_net("mcfilter").matches("0xe8010101").count(), 1);
        });
    }

    #[test]
    fn leaving_a_vanished_interface_frees_its_places() {
        in_netns(|| {
            let (v0, v1) = (veth("op-v0"), veth("op-v1"));
            let any = |ifindex| (0..20u32).map(move |n| asm(ifindex, Ipv4Addr::from(0xef01_0000 + n)));
            let one = |ifindex| (0..20).map(move |n| ssm(ifindex, &format!("232.1.1.{n}"), "10.0.0.1"));
            let on = |ifindex| any(ifindex).chain(one(ifindex)).collect::<BTreeSet<Join>>();
            let mut joins = Joins::new();
            none(&joins.set(&on(v0)));
            ip("link del op-v0");
            // One stays behind on each socket, so that the sockets do.
            let stay: BTreeSet<Join> = [asm(v0, Ipv4Addr::new(239, 1, 0, 3)), ssm(v0, "232.1.1.3", "10.0.0.1")].into();
            none(&joins.set(&stay));
            let places: BTreeSet<Join> = stay.iter().copied().chain(any(v1).take(19)).chain(one(v1).take(19)).collect();
            none(&joins.set(&places));
            assert_eq!((joins.count(), joins.socket_count()), (40, 2));
        });
    }

    #[test]
    fn smaller_sysctls_only_cost_sockets() {
        in_netns(|| {
            let v0 = veth("op-v0");
            if std::fs::write("/proc/sys/net/ipv4/igmp_max_memberships", "3").is_err() {
                println!("SKIPPED: /proc/sys is read-only");
                return;
            }
            let wanted = (0..10u32).map(|n| asm(v0, Ipv4Addr::from(0xef01_0000 + n))).collect();
            let mut joins = Joins::new();
            none(&joins.set(&wanted));
            assert_eq!(joins.socket_count(), 4);
        });
    }

    /// Whether a client of `port` is refused by ICMP within `tries` sends. The error of one send is told by a later one.
    fn refused(port: u16, tries: u32) -> bool {
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(("127.0.0.1", port)).unwrap();
        (0..tries).any(|_| {
            std::thread::sleep(Duration::from_millis(5));
            client.send(b"hello").is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        })
    }

    #[test]
    fn a_held_port_is_not_answered_with_icmp_and_queues_nothing() {
        in_netns(|| {
            ip("link set lo up");
            assert!(refused(7000, 400));
            let port: SocketAddr = "127.0.0.1:7000".parse().unwrap();
            let mut holders = Holders::new();
            assert!(holders.set(&BTreeSet::from([port])).is_empty());
            assert!(holders.held(&port));
            assert!(!refused(7000, 20));
            let snmp = proc_net("udp");
            let line = snmp.lines().find(|line| line.contains(":1B58")).unwrap();
            assert!(line.contains("00000000:00000000"), "nothing stands in the queue: {line}");
            assert!(holders.set(&BTreeSet::new()).is_empty());
            assert!(refused(7000, 400));
        });
    }

    #[test]
    fn a_port_somebody_else_has_is_reported() {
        in_netns(|| {
            ip("link set lo up");
            let _owner = UdpSocket::bind("127.0.0.1:7000").unwrap();
            let refused = Holders::new().set(&BTreeSet::from(["127.0.0.1:7000".parse().unwrap()]));
            assert_eq!(refused[0].1.kind(), io::ErrorKind::AddrInUse);
        });
    }
}
