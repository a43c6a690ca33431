//! Thin, safe faces of the system calls that `nix` lacks: mappings, shared words, pidfds, exec by descriptor.
//!
//! Must never hold policy. Every `unsafe` here is one system call, one mapping or one word in a mapping.

pub mod fuse;
pub mod listener;
pub mod mapping;
pub mod memo;
pub mod process;
pub mod shared;
pub mod xdp;

pub use mapping::Mapping;
pub use shared::{SharedArray, SharedWord, SharedWord64};
