//! Every interleaving of the ring room's source, as shipped: the files are included by path, only `ring/sync.rs` switches to loom.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p relay-loom --release` (without the cfg this crate is empty).
//! Must never hold a copy of what it tests.
#![cfg(loom)]

#[path = "../../../relay/src/ring/mod.rs"]
pub mod ring;

#[cfg(test)]
mod models;
