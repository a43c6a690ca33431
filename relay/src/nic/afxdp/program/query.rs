//! Which XDP programs an interface has, asked over rtnetlink (`RTM_GETLINK`, `IFLA_XDP`).
//!
//! Must never change anything.

use super::{Mode, ProgramError};
use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;

/// An interface's XDP programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceXdp {
    /// The interface.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Mode and id of each program. (Offloaded programs count as native.)
    pub programs: Vec<(Mode, u32)>,
}

impl InterfaceXdp {
    /// Fails naming the first program.
    pub(super) fn refuse_foreign(&self) -> Result<(), ProgramError> {
        let Some(&(_, id)) = self.programs.first() else { return Ok(()) };
        Err(ProgramError::Foreign { interface: self.name.clone(), name: program_name(id), id })
    }
}

/// Asks the kernel.
pub fn interface_xdp(ifindex: u32) -> Result<InterfaceXdp, ProgramError> {
    let answer = get_link(ifindex).map_err(|source| ProgramError::Query { ifindex, source })?;
    let mut found = InterfaceXdp { ifindex, name: ifindex.to_string(), programs: Vec::new() };
    for attribute in answer.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name = name,
            LinkAttribute::Xdp(xdp) => found.programs = xdp.iter().filter_map(program).collect(),
            _ => {}
        }
    }
    Ok(found)
}

/// The kernel names each program once by mode; the plain `ProgId` repeats the only one.
fn program(attribute: &LinkXdp) -> Option<(Mode, u32)> {
    match attribute {
        LinkXdp::DrvProgId(id) | LinkXdp::HwProgId(id) => Some((Mode::Native, *id)),
        LinkXdp::SkbProgId(id) => Some((Mode::Generic, *id)),
        _ => None,
    }
}

/// The kernel answers before `send` returns.
fn get_link(ifindex: u32) -> io::Result<LinkMessage> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&request(ifindex), 0)?;
    let (bytes, _) = socket.recv_from_full()?;
    let unreadable = |error: netlink_packet_core::DecodeError| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes).map_err(unreadable)?.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(link),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn request(ifindex: u32) -> Vec<u8> {
    let mut link = LinkMessage::default();
    link.header.index = ifindex;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(RouteNetlinkMessage::GetLink(link)));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// A program's name. Needs CAP_SYS_ADMIN, which the supervisor lacks; the id alone will do then (`unnamed`).
pub fn program_name(id: u32) -> String {
    let known = aya::programs::loaded_programs().flatten().find(|program| program.id() == id);
    let name = known.and_then(|program| program.name_as_str().map(str::to_owned));
    name.filter(|name| !name.is_empty()).unwrap_or_else(|| "unnamed".to_owned())
}
