//! `relay`: multicast UDP in at one interface, out of others, rewritten as each output asks.
//!
//! Rooms in reading order; who may import whom is in ARCHITECTURE.md and checked by `cargo xtask tidy`.

pub mod cli;
pub mod config;
pub mod control;
pub mod datapath;
pub mod doctor;
pub mod frame;
pub mod keeper;
pub mod lab;
pub mod metrics;
pub mod nic;
pub mod plan;
pub mod ring;
pub mod rule;
pub mod shm;
pub mod supervisor;
pub mod sys;
pub mod wire;
pub mod worker;
