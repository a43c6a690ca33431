//! UDP sockets for generators and receivers: options that `nix` lacks, joins, and batches of sendmmsg and recvmmsg.
//!
//! Must never interpret payloads. Every `unsafe` is one system call or one zeroed kernel structure.
#![expect(unsafe_code, reason = "sendmmsg, recvmmsg, and socket options without a safe wrapper")]

use super::error::{LabError, Result};
use crate::nic::afpacket::socket::open_listen;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Not in `libc` for glibc; asm-generic/socket.h.
const SO_MEMINFO: libc::c_int = 55;
/// Words of SO_MEMINFO (linux/sock_diag.h, SK_MEMINFO_VARS).
const MEMINFO_WORDS: usize = 9;
/// Receive buffer of every verifying receiver (DECISIONS, tests and figures).
pub const RECEIVE_BUFFER: usize = 64 << 20;
/// Send buffer, so that a short stall of the device does not lose what was offered.
const SEND_BUFFER: usize = 8 << 20;
/// Control bytes per received datagram: time stamp, TTL and TOS.
const CONTROL: usize = 128;

fn udp(family: IpAddr) -> Result<OwnedFd> {
    let domain = if family.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket::socket(domain, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).map_err(LabError::io("socket"))
}

fn set_option<T: Copy>(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: &T, what: &str) -> Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0);
    // SAFETY: `value` is valid for reads of `len` bytes, and the kernel only copies from it; a sock_fprog's code is its caller's.
    let rc = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), len) };
    if rc == 0 { Ok(()) } else { Err(LabError::io(what)(io::Error::last_os_error())) }
}

/// Index of an interface in the calling thread's namespace.
pub fn ifindex(name: &str) -> Result<u32> {
    nix::net::if_::if_nametoindex(name).map_err(LabError::io(format!("interface {name}")))
}

/// MTU of an interface in the calling thread's namespace.
pub fn mtu(name: &str) -> Result<u32> {
    let fd = udp(Ipv4Addr::UNSPECIFIED.into())?;
    let mut request = zeroed::<libc::ifreq>();
    // The last byte stays 0.
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: `request` is a structure of the size the kernel reads and writes for this call, and outlives it.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) };
    if rc != 0 {
        return Err(LabError::io(format!("interface {name}"))(io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just written this member, and every bit pattern of it is an integer.
    Ok(unsafe { request.ifr_ifru.ifru_mtu }.unsigned_abs())
}

/// A socket that sends out of `iface` from `source` (or the kernel's choice) with the given TTL and DSCP.
pub fn sender(iface: &str, to: SocketAddr, source: Option<SocketAddr>, ttl: u8, dscp: u8) -> Result<OwnedFd> {
    let fd = udp(to.ip())?;
    let index = ifindex(iface)?.cast_signed();
    let (ttl, tos) = (i32::from(ttl), i32::from(dscp) << 2);
    setsockopt(&fd, sockopt::SndBufForce, &SEND_BUFFER)
        .or_else(|_| setsockopt(&fd, sockopt::SndBuf, &SEND_BUFFER))
        .map_err(LabError::io("send buffer"))?;
    if to.is_ipv4() {
        let by = libc::ip_mreqn {
            imr_multiaddr: in_addr(Ipv4Addr::UNSPECIFIED),
            imr_address: in_addr(Ipv4Addr::UNSPECIFIED),
            imr_ifindex: index,
        };
        set_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &by, "IP_MULTICAST_IF")?;
        set_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_MULTICAST_TTL, &ttl, "IP_MULTICAST_TTL")?;
        set_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_TTL, &ttl, "IP_TTL")?;
        set_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_TOS, &tos, "IP_TOS")?;
        set_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP, &0i32, "IP_MULTICAST_LOOP")?;
    } else {
        set_option(fd.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, &index, "IPV6_MULTICAST_IF")?;
        set_option(fd.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS, &ttl, "IPV6_MULTICAST_HOPS")?;
        set_option(fd.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, &ttl, "IPV6_UNICAST_HOPS")?;
        set_option(fd.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &tos, "IPV6_TCLASS")?;
        set_option(fd.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP, &0i32, "IPV6_MULTICAST_LOOP")?;
    }
    if let Some(source) = source {
        bind(&fd, source)?;
    }
    Ok(fd)
}

/// A socket that receives `group` (any address) on `iface`: joined, source-specifically if `source` is given; or bound, if unicast.
/// Receive buffer [`RECEIVE_BUFFER`], time stamps and TTL with each datagram.
pub fn receiver(iface: &str, source: Option<IpAddr>, group: SocketAddr) -> Result<OwnedFd> {
    let fd = udp(group.ip())?;
    let index = ifindex(iface)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true).map_err(LabError::io("SO_REUSEADDR"))?;
    setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER)
        .or_else(|_| setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER))
        .map_err(LabError::io("receive buffer"))?;
    setsockopt(&fd, sockopt::BindToDevice, &iface.into()).map_err(LabError::io(format!("binding to {iface}")))?;
    setsockopt(&fd, sockopt::ReceiveTimestampns, &true).map_err(LabError::io("SO_TIMESTAMPNS"))?;
    if group.is_ipv4() {
        set_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_RECVTTL, &1i32, "IP_RECVTTL")?;
        set_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_RECVTOS, &1i32, "IP_RECVTOS")?;
        set_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_MULTICAST_ALL, &0i32, "IP_MULTICAST_ALL")?;
    } else {
        set_option(fd.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, &1i32, "IPV6_RECVHOPLIMIT")?;
        set_option(fd.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, &1i32, "IPV6_RECVTCLASS")?;
    }
    bind(&fd, group)?;
    if group.ip().is_multicast() {
        join(fd.as_fd(), index, group.ip(), source)?;
    }
    Ok(fd)
}

fn bind(fd: &OwnedFd, addr: SocketAddr) -> Result<()> {
    socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(addr)).map_err(LabError::io(format!("bind to {addr}")))
}

/// A packet socket that looks on at `iface` and keeps, with the kernel's receive time, the frames whose bytes `at`..`at + 4` are all
/// zero under `mask` (big-endian). Nobody waits on it: what came is read afterwards, so that taking samples costs next to nothing.
pub fn sampler(iface: &str, at: u32, mask: u32) -> Result<OwnedFd> {
    let fd = open_listen(ifindex(iface)?).map_err(|e| LabError::Invalid(e.to_string()))?;
    // linux/bpf_common.h: load a word, and, jump if equal, return. Off the end of the frame the program returns 0: not kept.
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut code = [op(0x20, 0, 0, at), op(0x54, 0, 0, mask), op(0x15, 0, 1, 0), op(0x06, 0, 0, u32::MAX), op(0x06, 0, 0, 0)];
    let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program, "SO_ATTACH_FILTER")?;
    setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER).map_err(LabError::io("receive buffer"))?;
    setsockopt(&fd, sockopt::ReceiveTimestampns, &true).map_err(LabError::io("SO_TIMESTAMPNS"))?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(1)).map_err(LabError::io("SO_RCVTIMEO"))?;
    Ok(fd)
}

/// Joins a group on an interface (RFC 3678: MCAST_JOIN_GROUP, MCAST_JOIN_SOURCE_GROUP; the same for both families).
pub fn join(fd: BorrowedFd<'_>, ifindex: u32, group: IpAddr, source: Option<IpAddr>) -> Result<()> {
    let level = if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 };
    let gr_group = storage(SocketAddr::new(group, 0));
    let what = format!("joining {group}");
    match source {
        None => set_option(fd, level, libc::MCAST_JOIN_GROUP, &libc::group_req { gr_interface: ifindex, gr_group }, &what),
        Some(source) => {
            let gsr_source = storage(SocketAddr::new(source, 0));
            let request = libc::group_source_req { gsr_interface: ifindex, gsr_group: gr_group, gsr_source };
            set_option(fd, level, libc::MCAST_JOIN_SOURCE_GROUP, &request, &format!("{what} from {source}"))
        }
    }
}

/// Datagrams the kernel dropped at this socket because its buffer was full (SO_MEMINFO, SK_MEMINFO_DROPS).
pub fn drops(fd: BorrowedFd<'_>) -> u32 {
    let mut words = [0u32; MEMINFO_WORDS];
    let mut len = libc::socklen_t::try_from(size_of_val(&words)).unwrap_or(0);
    // SAFETY: `words` is valid for writes of `len` bytes, and the kernel writes at most that many.
    let rc = unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, SO_MEMINFO, words.as_mut_ptr().cast(), &raw mut len) };
    if rc == 0 { words.get(8).copied().unwrap_or(0) } else { 0 }
}

fn in_addr(addr: Ipv4Addr) -> libc::in_addr {
    libc::in_addr { s_addr: u32::from_ne_bytes(addr.octets()) }
}

fn storage(addr: SocketAddr) -> libc::sockaddr_storage {
    let mut out = zeroed::<libc::sockaddr_storage>();
    let from = SockaddrStorage::from(addr);
    let len = (from.len() as usize).min(size_of::<libc::sockaddr_storage>());
    // SAFETY: `from` is valid for reads of its own length, `out` is at least as long, and they are different variables.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().cast::<u8>(), (&raw mut out).cast::<u8>(), len) };
    out
}

/// A kernel structure of integers and nullable pointers.
trait KernelStruct: Copy {}
impl KernelStruct for libc::sockaddr_storage {}
impl KernelStruct for libc::mmsghdr {}
impl KernelStruct for libc::ifreq {}

fn zeroed<T: KernelStruct>() -> T {
    // SAFETY: the implementors hold only integers and raw pointers, for which all-zero is a value.
    unsafe { std::mem::zeroed() }
}

fn iovec(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

/// Buffers for one sendmmsg: up to `batch` datagrams of one size to one destination.
#[derive(Debug)]
pub struct SendBatch {
    bytes: Vec<u8>,
    size: usize,
    to: SockaddrStorage,
}

impl SendBatch {
    /// Datagrams of `size` bytes to `to`.
    pub fn new(to: SocketAddr, size: usize, batch: usize) -> Self {
        Self { bytes: vec![0; size * batch], size, to: SockaddrStorage::from(to) }
    }

    /// The payload of datagram `index` of the batch.
    pub fn payload(&mut self, index: usize) -> &mut [u8] {
        self.bytes.get_mut(index * self.size..(index + 1) * self.size).unwrap_or_default()
    }

    /// Sends the first `count` datagrams; how many the kernel took.
    pub fn send(&mut self, fd: BorrowedFd<'_>, count: usize) -> io::Result<usize> {
        let chunks = self.bytes.chunks_mut(self.size.max(1)).map(iovec).collect();
        let lens = vec![self.size; count];
        send_iovecs(fd, chunks, &lens, &self.to)
    }
}

/// One sendmmsg of `lens.len()` datagrams from the front of `iovecs` to `to`.
fn send_iovecs(fd: BorrowedFd<'_>, mut iovecs: Vec<libc::iovec>, lens: &[usize], to: &SockaddrStorage) -> io::Result<usize> {
    iovecs.resize_with(lens.len().max(iovecs.len()), || libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 });
    let mut headers: Vec<libc::mmsghdr> = Vec::with_capacity(lens.len());
    for (iov, len) in iovecs.iter_mut().zip(lens) {
        iov.iov_len = iov.iov_len.min(*len);
        let mut header = zeroed::<libc::mmsghdr>();
        header.msg_hdr.msg_name = to.as_ptr().cast_mut().cast();
        header.msg_hdr.msg_namelen = to.len();
        header.msg_hdr.msg_iov = iov;
        header.msg_hdr.msg_iovlen = 1;
        headers.push(header);
    }
    let count = libc::c_uint::try_from(headers.len()).unwrap_or(0);
    // SAFETY: `headers` holds `count` entries; names, iovecs and buffers they point to outlive the call, which only reads them.
    let rc = unsafe { libc::sendmmsg(fd.as_raw_fd(), headers.as_mut_ptr(), count, 0) };
    usize::try_from(rc).map_err(|_| io::Error::last_os_error())
}

/// What came with a datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Kernel's receive time, CLOCK_REALTIME ns.
    pub stamp_ns: Option<u64>,
    /// TTL or hop limit.
    pub ttl: Option<u8>,
    /// TOS or traffic class.
    pub tos: Option<u8>,
}

/// Buffers for one recvmmsg.
#[derive(Debug)]
pub struct RecvBatch {
    bytes: Vec<u8>,
    size: usize,
    control: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    filled: Vec<(usize, usize, libc::socklen_t)>,
}

impl RecvBatch {
    /// `batch` buffers of `size` bytes.
    pub fn new(size: usize, batch: usize) -> Self {
        Self {
            bytes: vec![0; size * batch],
            size,
            control: vec![0; CONTROL * batch],
            names: vec![zeroed(); batch],
            filled: Vec::with_capacity(batch),
        }
    }

    /// Receives what is there, at least one datagram unless the socket's time-out or an error ends the wait.
    pub fn receive(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let mut iovecs: Vec<libc::iovec> = self.bytes.chunks_mut(self.size.max(1)).map(iovec).collect();
        let mut headers = vec![zeroed::<libc::mmsghdr>(); iovecs.len()];
        let buffers = iovecs.iter_mut().zip(self.control.chunks_mut(CONTROL)).zip(&mut self.names);
        for (header, ((iov, control), name)) in headers.iter_mut().zip(buffers) {
            header.msg_hdr.msg_iov = iov;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = control.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = control.len();
            header.msg_hdr.msg_name = std::ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = libc::socklen_t::try_from(size_of_val(name)).unwrap_or(0);
        }
        let count = libc::c_uint::try_from(headers.len()).unwrap_or(0);
        // SAFETY: `headers` holds `count` entries; every buffer, control area and name they point to is exclusively ours for the call.
        let rc = unsafe { libc::recvmmsg(fd.as_raw_fd(), headers.as_mut_ptr(), count, libc::MSG_WAITFORONE, std::ptr::null_mut()) };
        self.filled.clear();
        let received = usize::try_from(rc).map_err(|_| io::Error::last_os_error())?;
        self.filled.extend(headers.iter().take(received).map(|h| (h.msg_len as usize, h.msg_hdr.msg_controllen, h.msg_hdr.msg_namelen)));
        Ok(received)
    }

    /// Payload and company of each datagram of the last [`RecvBatch::receive`].
    pub fn datagrams(&self) -> impl Iterator<Item = (&[u8], Meta)> {
        let buffers = self.bytes.chunks(self.size.max(1)).zip(self.control.chunks(CONTROL));
        buffers.zip(&self.filled).map(|((bytes, control), (len, control_len, _))| {
            (bytes.get(..*len).unwrap_or(bytes), parse_control(control.get(..*control_len).unwrap_or_default()))
        })
    }

    /// Where datagram `index` of the last batch came from.
    pub fn source(&self, index: usize) -> Option<SocketAddr> {
        let name = self.names.get(index)?;
        let (_, _, len) = self.filled.get(index)?;
        // SAFETY: the kernel wrote an address of `len` bytes into this zeroed storage, which is that long.
        let addr = unsafe { SockaddrStorage::from_raw(std::ptr::from_ref(name).cast(), Some(*len)) }?;
        let v4 = addr.as_sockaddr_in().map(|a| SocketAddr::new(IpAddr::V4(a.ip()), a.port()));
        v4.or_else(|| addr.as_sockaddr_in6().map(|a| SocketAddr::new(IpAddr::V6(a.ip()), a.port())))
    }

    /// Sends the datagrams of the last batch on to `to`; how many the kernel took.
    pub fn forward(&mut self, fd: BorrowedFd<'_>, to: SocketAddr) -> io::Result<usize> {
        let lens: Vec<usize> = self.filled.iter().map(|(len, _, _)| *len).collect();
        let iovecs = self.bytes.chunks_mut(self.size.max(1)).map(iovec).collect();
        send_iovecs(fd, iovecs, &lens, &SockaddrStorage::from(to))
    }
}

/// Reads the control messages (`cmsghdr`: length, level, type, data; each padded to 8 bytes).
fn parse_control(mut bytes: &[u8]) -> Meta {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    let mut meta = Meta::default();
    while let Some((len, level, kind)) = control_header(bytes) {
        let data = bytes.get(HEADER..len).unwrap_or_default();
        match (level, kind) {
            (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => meta.stamp_ns = stamp(data),
            (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => meta.ttl = data.first().copied(),
            (libc::IPPROTO_IP, libc::IP_TOS) | (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => meta.tos = data.first().copied(),
            _ => {}
        }
        bytes = bytes.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    meta
}

fn control_header(bytes: &[u8]) -> Option<(usize, i32, i32)> {
    let len = usize::from_ne_bytes(bytes.get(..8)?.try_into().ok()?);
    let level = i32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
    let kind = i32::from_ne_bytes(bytes.get(12..16)?.try_into().ok()?);
    (16..=bytes.len()).contains(&len).then_some((len, level, kind))
}

fn stamp(data: &[u8]) -> Option<u64> {
    let seconds = u64::from_ne_bytes(data.get(..8)?.try_into().ok()?);
    let nanos = u64::from_ne_bytes(data.get(8..16)?.try_into().ok()?);
    seconds.checked_mul(1_000_000_000)?.checked_add(nanos)
}

/// A host address of the other family than `addr` never fits it; `::` or `0.0.0.0` in the right family.
pub fn unspecified(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_crosses_loopback_with_its_company() {
        let to: SocketAddr = "127.0.0.1:39751".parse().unwrap();
        let rx = receiver("lo", None, to).unwrap();
        setsockopt(&rx, sockopt::ReceiveTimeout, &TimeVal::seconds(2)).unwrap();
        let tx = sender("lo", to, Some("127.0.0.1:39752".parse().unwrap()), 9, 46).unwrap();
        let mut out = SendBatch::new(to, 40, 4);
        for index in 0..4 {
            out.payload(index).fill(index as u8 + 1);
        }
        assert_eq!(out.send(tx.as_fd(), 3).unwrap(), 3);
        let mut batch = RecvBatch::new(2048, 8);
        let mut seen = 0;
        while seen < 3 {
            let received = batch.receive(rx.as_fd()).unwrap();
            for (bytes, meta) in batch.datagrams() {
                seen += 1;
                assert_eq!(bytes, [seen; 40]);
                assert_eq!((meta.ttl, meta.tos), (Some(9), Some(46 << 2)));
            }
            assert_eq!(batch.source(received - 1), Some("127.0.0.1:39752".parse().unwrap()));
        }
        assert_eq!(drops(rx.as_fd()), 0);
    }

    #[test]
    fn damaged_control_bytes_end_the_walk() {
        for len in [0usize, 1, 15, 16, 17, 1_000_000, usize::MAX] {
            let mut bytes = [0u8; 64];
            bytes[..8].copy_from_slice(&len.to_ne_bytes());
            assert_eq!(parse_control(&bytes).ttl, None);
        }
    }
}
