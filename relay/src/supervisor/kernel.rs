//! The system calls of the supervisor that neither `std` nor `nix` offers: multicast joins, socket filters, ethtool
//! requests, capability sets.
//!
//! Must never hold policy or state: every function is one call with its arguments checked by their types.
#![expect(unsafe_code, reason = "setsockopt, ioctl, capget, capset and prctl")]

use std::io;
use std::mem::size_of;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct sockaddr_storage` holding a `sockaddr_in` or a `sockaddr_in6`.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Storage {
    family: u16,
    port: u16,
    /// IPv4: the address in bytes 0–3. IPv6: flow label 0–3, the address 4–19, scope 20–23.
    body: [u8; 124],
}

/// `struct group_req` (linux/in.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct GroupRequest {
    interface: u32,
    padding: u32,
    group: Storage,
}

/// `struct group_source_req` (linux/in.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct GroupSourceRequest {
    interface: u32,
    padding: u32,
    group: Storage,
    source: Storage,
}

const _: () = assert!(size_of::<Storage>() == size_of::<libc::sockaddr_storage>());
const _: () = assert!(size_of::<GroupRequest>() == size_of::<libc::group_req>());
const _: () = assert!(size_of::<GroupSourceRequest>() == size_of::<libc::group_source_req>());

impl Storage {
    fn new(address: IpAddr) -> Self {
        let mut body = [0; 124];
        let (family, octets, at) = match address {
            IpAddr::V4(v4) => (libc::AF_INET, v4.octets().to_vec(), 0),
            IpAddr::V6(v6) => (libc::AF_INET6, v6.octets().to_vec(), 4),
        };
        for (to, from) in body.iter_mut().skip(at).zip(octets) {
            *to = from;
        }
        Self { family: family as u16, port: 0, body }
    }
}

/// `value` as the option `name` of `level`.
fn set_option<T: Copy>(socket: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel only reads `len` bytes at `value`, which is borrowed for the call.
    let rc = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), len) };
    check(rc)
}

fn check(rc: i32) -> io::Result<()> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn level(address: IpAddr) -> i32 {
    if address.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

/// Whether a membership begins or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Membership {
    Join,
    Leave,
}

/// Any-source membership (RFC 3678 §5.1.1) of `group` on the interface.
pub(super) fn any_source(socket: BorrowedFd<'_>, what: Membership, ifindex: u32, group: IpAddr) -> io::Result<()> {
    let name = if what == Membership::Join { libc::MCAST_JOIN_GROUP } else { libc::MCAST_LEAVE_GROUP };
    set_option(socket, level(group), name, &GroupRequest { interface: ifindex, padding: 0, group: Storage::new(group) })
}

/// Source-specific membership (RFC 3678 §5.1.2).
pub(super) fn one_source(socket: BorrowedFd<'_>, what: Membership, ifindex: u32, group: IpAddr, source: IpAddr) -> io::Result<()> {
    let name = if what == Membership::Join { libc::MCAST_JOIN_SOURCE_GROUP } else { libc::MCAST_LEAVE_SOURCE_GROUP };
    let request = GroupSourceRequest { interface: ifindex, padding: 0, group: Storage::new(group), source: Storage::new(source) };
    set_option(socket, level(group), name, &request)
}

/// Attaches the filter `ret 0`: the socket exists for the kernel and takes no packet.
pub(super) fn refuse_all(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut ret_0 = [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 }];
    let program = libc::sock_fprog { len: 1, filter: ret_0.as_mut_ptr() };
    set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// A raw socket of this protocol that does not block.
fn raw_socket(family: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, protocol) };
    check(fd)?;
    // SAFETY: the call has just made this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A socket that gets IGMP membership queries (type 0x11, RFC 2236 §2.1) and nothing else.
pub(super) fn igmp_queries() -> io::Result<OwnedFd> {
    let socket = raw_socket(libc::AF_INET, libc::IPPROTO_IGMP)?;
    let line = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut lines = [
        line(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, 0, 0, 0),
        line(libc::BPF_LD | libc::BPF_B | libc::BPF_IND, 0, 0, 0),
        line(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, 0x11),
        line(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        line(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    let program = libc::sock_fprog { len: lines.len() as u16, filter: lines.as_mut_ptr() };
    set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
    Ok(socket)
}

/// A socket that gets MLD queries (ICMPv6 type 130, RFC 3810 §5.1) and nothing else.
pub(super) fn mld_queries() -> io::Result<OwnedFd> {
    /// `ICMP6_FILTER` (RFC 3542 §3.2): a bit set refuses a type.
    const ICMP6_FILTER: i32 = 1;
    let socket = raw_socket(libc::AF_INET6, libc::IPPROTO_ICMPV6)?;
    let mut refused = [u32::MAX; 8];
    refused[130 / 32] &= !(1 << (130 % 32));
    set_option(socket.as_fd(), libc::IPPROTO_ICMPV6, ICMP6_FILTER, &refused)?;
    Ok(socket)
}

/// `SIOCETHTOOL` (linux/sockios.h).
const SIOCETHTOOL: libc::c_ulong = 0x8946;

/// `struct ethtool_drvinfo` (linux/ethtool.h).
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct DriverInfo {
    command: u32,
    /// Driver name, NUL-terminated.
    pub(super) driver: [u8; 32],
    rest: [u8; 160],
}

/// `struct ethtool_channels` (linux/ethtool.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Channels {
    command: u32,
    max: [u32; 4],
    /// Queues in use that only receive.
    pub(super) rx: u32,
    /// Queues in use that only send.
    pub(super) tx: u32,
    other: u32,
    /// Queues in use that do both.
    pub(super) combined: u32,
}

const _: () = assert!(size_of::<DriverInfo>() == 196);
const _: () = assert!(size_of::<Channels>() == 36);

/// `struct ethtool_value` (linux/ethtool.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct Value {
    command: u32,
    data: u32,
}

/// An ethtool request is a C structure that starts with its command and is overwritten by the answer.
trait EthtoolRequest: Copy {}
impl EthtoolRequest for DriverInfo {}
impl EthtoolRequest for Channels {}
impl EthtoolRequest for Value {}

fn ethtool<T: EthtoolRequest>(socket: BorrowedFd<'_>, interface: &str, request: &mut T) -> io::Result<()> {
    let mut name: [libc::c_char; libc::IFNAMSIZ] = [0; libc::IFNAMSIZ];
    if interface.len() >= name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (to, from) in name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    let data = std::ptr::from_mut(request).cast();
    let mut header = libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: data } };
    // SAFETY: all requests of this file have the size and layout the kernel writes for their command.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut header) })
}

/// `ETHTOOL_GDRVINFO`.
pub(super) fn driver_info(socket: BorrowedFd<'_>, interface: &str) -> io::Result<DriverInfo> {
    let mut request = DriverInfo { command: 0x03, driver: [0; 32], rest: [0; 160] };
    ethtool(socket, interface, &mut request)?;
    Ok(request)
}

/// A question whose answer is one number, such as `ETHTOOL_GFLAGS`.
pub(super) fn ethtool_value(socket: BorrowedFd<'_>, interface: &str, command: u32) -> io::Result<u32> {
    let mut request = Value { command, data: 0 };
    ethtool(socket, interface, &mut request)?;
    Ok(request.data)
}

/// `ETHTOOL_GCHANNELS`.
pub(super) fn channels(socket: BorrowedFd<'_>, interface: &str) -> io::Result<Channels> {
    let mut request = Channels { command: 0x3c, ..Channels::default() };
    ethtool(socket, interface, &mut request)?;
    Ok(request)
}

/// `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h).
const CAPABILITY_VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// Half a capability set: capabilities 0–31 or 32–63.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CapabilityData {
    pub(super) effective: u32,
    pub(super) permitted: u32,
    pub(super) inheritable: u32,
}

/// The calling thread's capability sets, low half first.
pub(super) fn capget() -> io::Result<[CapabilityData; 2]> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    let mut data = [CapabilityData::default(); 2];
    // SAFETY: version 3 makes the kernel write exactly two elements of `data`.
    let rc = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    check(rc as i32).map(|()| data)
}

/// Sets the calling thread's capability sets, low half first.
pub(super) fn capset(data: &[CapabilityData; 2]) -> io::Result<()> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    // SAFETY: version 3 makes the kernel read exactly two elements of `data`.
    let rc = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    check(rc as i32)
}

/// A `prctl` whose arguments are numbers only. Returns what it returned.
pub(super) fn prctl(option: i32, argument: u64, second: u64) -> io::Result<i32> {
    const NUMBERS_ONLY: [i32; 3] = [libc::PR_CAPBSET_READ, libc::PR_CAPBSET_DROP, libc::PR_CAP_AMBIENT];
    if !NUMBERS_ONLY.contains(&option) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: the three options above take no pointer.
    let rc = unsafe { libc::prctl(option, argument, second, 0u64, 0u64) };
    check(rc).map(|()| rc)
}
