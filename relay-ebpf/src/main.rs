//! The XDP program (placeholder until the program room lands).
fn main() {}
