//! Makes the packet sockets. Runs in the supervisor, which has CAP_NET_RAW and CAP_NET_ADMIN; workers inherit the result.
//!
//! A receiving socket is created with protocol 0 and set up completely before it is bound to its interface with
//! ETH_P_ALL, so it never holds a packet of another interface or one the filter refuses. A sending socket keeps
//! protocol 0 and receives nothing. Both are blocking sockets: io_uring fails requests on O_NONBLOCK files instead of
//! waiting for them; who must not wait says MSG_DONTWAIT. Must never join a group nor set promiscuous mode.
//!
//! Options: packet(7), linux/if_packet.h, socket(7).
#![expect(unsafe_code, reason = "socket options and addresses that nix has no names for")]

use super::{fanout, filter};
use nix::errno::Errno;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Bytes of a receiving socket's queue.
pub const RECEIVE_QUEUE_LEN: libc::c_int = 64 << 20;
/// Bytes a sending socket may have standing with its device.
pub const SEND_QUEUE_LEN: libc::c_int = 4 << 20;

/// How the sockets of one fan-out group share the packets of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FanoutMode {
    /// By the flow hash: a flow stays with one worker.
    Hash,
    /// By the receive queue.
    Queue,
    /// By the CPU the packet came in on.
    Cpu,
    /// One after the other: a flow is spread and may be reordered.
    RoundRobin,
    /// By a table: a flow's bucket → the socket, numbered in the order of joining.
    Table([u8; fanout::BUCKETS]),
}

/// Membership in a fan-out group (PACKET_FANOUT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fanout {
    /// Number of the group, one per interface in a network namespace.
    pub group: u16,
    /// How it shares.
    pub mode: FanoutMode,
}

impl Fanout {
    const fn raw(self) -> u32 {
        let mode = match self.mode {
            FanoutMode::Hash => libc::PACKET_FANOUT_HASH,
            FanoutMode::Queue => libc::PACKET_FANOUT_QM,
            FanoutMode::Cpu => libc::PACKET_FANOUT_CPU,
            FanoutMode::RoundRobin => libc::PACKET_FANOUT_LB,
            FanoutMode::Table(_) => libc::PACKET_FANOUT_CBPF,
        };
        self.group as u32 | mode << 16
    }
}

/// Why a packet socket can't be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call} on the packet socket of ifindex {ifindex}: {errno}{}", remedy(*errno))]
pub struct SocketError {
    /// The call, or the option, that failed.
    pub call: &'static str,
    /// The interface.
    pub ifindex: u32,
    /// What the kernel said.
    pub errno: Errno,
}

const fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM | Errno::EACCES => ": CAP_NET_RAW and CAP_NET_ADMIN are needed",
        Errno::ENODEV | Errno::ENXIO => ": the interface is gone",
        Errno::ENETDOWN => ": bring the interface up",
        _ => "",
    }
}

/// A socket that receives what the interface gets (never what it sends), filtered for the rules' `unicast` addresses and
/// all multicast, with PACKET_AUXDATA and PACKET_VNET_HDR as [`super::UringReceive`] reads them.
pub fn open_receive(ifindex: u32, unicast: &[IpAddr], fanout: Option<Fanout>) -> Result<OwnedFd, SocketError> {
    let at = |call| move |errno| SocketError { call, ifindex, errno };
    let fd = create().map_err(at("socket"))?;
    set_filter(&fd, unicast).map_err(at("SO_ATTACH_FILTER"))?;
    set_option(&fd, libc::SOL_PACKET, libc::PACKET_AUXDATA, &1).map_err(at("PACKET_AUXDATA"))?;
    set_option(&fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1).map_err(at("PACKET_VNET_HDR"))?;
    set_option(&fd, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1).map_err(at("PACKET_IGNORE_OUTGOING"))?;
    set_queue(&fd, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, &RECEIVE_QUEUE_LEN).map_err(at("SO_RCVBUFFORCE"))?;
    bind(&fd, ifindex, libc::ETH_P_ALL as u16).map_err(at("bind"))?;
    if let Some(fanout) = fanout {
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_FANOUT, &fanout.raw()).map_err(at("PACKET_FANOUT"))?;
        if let FanoutMode::Table(table) = &fanout.mode {
            attach(&fd, libc::SOL_PACKET, libc::PACKET_FANOUT_DATA, fanout::program(table)).map_err(at("PACKET_FANOUT_DATA"))?;
        }
    }
    Ok(fd)
}

/// A socket that looks on: everything the interface receives and XDP leaves to the kernel, tags in PACKET_AUXDATA. For
/// `relay doctor` and `relay why`, never for the data path. Needs CAP_NET_RAW.
pub fn open_listen(ifindex: u32) -> Result<OwnedFd, SocketError> {
    let at = |call| move |errno| SocketError { call, ifindex, errno };
    let fd = create().map_err(at("socket"))?;
    set_option(&fd, libc::SOL_PACKET, libc::PACKET_AUXDATA, &1).map_err(at("PACKET_AUXDATA"))?;
    set_option(&fd, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1).map_err(at("PACKET_IGNORE_OUTGOING"))?;
    bind(&fd, ifindex, libc::ETH_P_ALL as u16).map_err(at("bind"))?;
    Ok(fd)
}

/// A socket that sends to the interface, past its queueing discipline where the kernel lets it.
pub fn open_send(ifindex: u32) -> Result<OwnedFd, SocketError> {
    let at = |call| move |errno| SocketError { call, ifindex, errno };
    let fd = create().map_err(at("socket"))?;
    match set_option(&fd, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, &1) {
        Ok(()) | Err(Errno::ENOPROTOOPT) => {}
        Err(errno) => return Err(at("PACKET_QDISC_BYPASS")(errno)),
    }
    set_queue(&fd, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, &SEND_QUEUE_LEN).map_err(at("SO_SNDBUFFORCE"))?;
    bind(&fd, ifindex, 0).map_err(at("bind"))?;
    Ok(fd)
}

/// A socket that sends as [`open_send`] does, and takes UDP super-frames (PACKET_VNET_HDR). A device without the feature refuses
/// them with ENOBUFS: past the queueing discipline nobody segments for it.
pub fn open_coalesce(ifindex: u32) -> Result<OwnedFd, SocketError> {
    let fd = open_send(ifindex)?;
    let failed = |errno| SocketError { call: "PACKET_VNET_HDR", ifindex, errno };
    set_option(&fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1).map_err(failed)?;
    Ok(fd)
}

/// Puts another filter in place of the socket's, at once and without a gap.
pub fn set_filter(fd: &impl AsFd, unicast: &[IpAddr]) -> Result<(), Errno> {
    attach(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, filter::program(unicast))
}

fn attach(fd: &impl AsFd, level: libc::c_int, name: libc::c_int, mut code: Vec<libc::sock_filter>) -> Result<(), Errno> {
    let len = u16::try_from(code.len()).map_err(|_| Errno::E2BIG)?;
    let program = libc::sock_fprog { len, filter: code.as_mut_ptr() };
    set_option(fd, level, name, &program)
}

/// Packets the kernel dropped at this socket because its queue was full, since the last call (reading resets it).
pub(super) fn take_drops(fd: &impl AsFd) -> Result<u32, Errno> {
    let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    let to = (&raw mut stats).cast();
    // SAFETY: the kernel writes at most `len` bytes, the size of `stats`, which lives through the call.
    let result = unsafe { libc::getsockopt(fd.as_fd().as_raw_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS, to, &raw mut len) };
    Errno::result(result).map(|_| stats.tp_drops)
}

fn create() -> Result<OwnedFd, Errno> {
    // SAFETY: no pointer is passed.
    let fd = Errno::result(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was just made and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bind(fd: &OwnedFd, ifindex: u32, protocol: u16) -> Result<(), Errno> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: i32::try_from(ifindex).map_err(|_| Errno::ENODEV)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes, the size of `address`, which lives through the call.
    Errno::result(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) }).map(drop)
}

/// The size of a queue; in a user namespace, where nobody may force it, as much of it as the host allows (net.core.rmem_max).
fn set_queue(fd: &impl AsFd, forced: libc::c_int, asked: libc::c_int, len: &libc::c_int) -> Result<(), Errno> {
    match set_option(fd, libc::SOL_SOCKET, forced, len) {
        Err(Errno::EPERM) => set_option(fd, libc::SOL_SOCKET, asked, len),
        other => other,
    }
}

/// Sets an option whose value is `T` as the kernel declares it.
fn set_option<T>(fd: &impl AsFd, level: libc::c_int, name: libc::c_int, value: &T) -> Result<(), Errno> {
    let len = size_of::<T>() as libc::socklen_t;
    let from = (&raw const *value).cast();
    // SAFETY: the kernel reads at most `len` bytes, the size of `value`; a sock_fprog's instructions are its caller's and alive.
    Errno::result(unsafe { libc::setsockopt(fd.as_fd().as_raw_fd(), level, name, from, len) }).map(drop)
}
