//! The `relay` binary: everything is in the library; see `relay::cli`.
fn main() {}
