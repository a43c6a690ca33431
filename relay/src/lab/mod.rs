//! The laboratory: namespaces with veth pairs, traffic generators, verifying receivers, baseline relays, demo and path bench.
//!
//! Used by `relay send`, `relay recv`, `relay demo`, `relay bench path` and by the `tests` crate. It sees the relay only from
//! outside, as a process and as packets: it must never import the data path, and never touch an interface it did not create
//! (`send` and `recv` excepted, which use the interface they are given).

pub mod arms;
pub mod bench;
pub mod capture_file;
pub mod clock;
pub mod demo;
pub mod error;
pub mod generator;
pub mod manager;
pub mod netns;
pub mod pace;
pub mod packet;
pub mod payload;
pub mod peers;
pub mod process;
pub mod progress;
pub mod receivers;
pub mod recv;
pub mod replay;
pub mod ringbench;
pub mod send;
pub mod socket;
pub mod sockets_relay;
pub mod tally;
pub mod topology;
mod userns;
pub mod xdp;
#[cfg(feature = "peers")]
pub mod xsk;
#[cfg(feature = "peers")]
pub mod xsk_loop;

pub use error::LabError;
pub use netns::Namespace;
pub use process::RelayProcess;
pub use topology::{Lab, LabSpec, enable_gro};
