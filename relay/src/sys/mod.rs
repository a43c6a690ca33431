//! Thin, safe faces of the system calls that `nix` lacks: mappings, memfds, pidfds, exec by descriptor.
//!
//! Must never hold policy. Every `unsafe` here is one system call or one mapping.

pub mod mapping;

pub use mapping::Mapping;
