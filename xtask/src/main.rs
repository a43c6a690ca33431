//! `cargo xtask`: the project's own tool.
fn main() {}
