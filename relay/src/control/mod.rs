//! The control socket: messages, framing, server, client.
//!
//! Must never reach into the data path; the supervisor's loop drives the server and is never blocked by it.

pub mod client;
pub mod framing;
pub mod message;
pub mod path;
pub mod server;
