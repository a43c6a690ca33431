//! The control socket: messages, server, client.
pub mod message;
