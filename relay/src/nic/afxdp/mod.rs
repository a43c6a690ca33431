//! AF_XDP ports (Documentation/networking/af_xdp.rst): the supervisor creates and binds sockets, a worker adopts them.
//!
//! Nothing of a port's state lives in a process: all indices stand in the rings, so whoever maps them goes on where the
//! last owner stopped. Must never know the data path.

pub mod create;
pub mod ledger;
pub mod port;
pub mod program;
pub mod rings;
mod sending;

pub use create::{PortError, PortSocket, SocketSpec};
pub use port::{Mapped, XskReceive, XskTransmit, map};
