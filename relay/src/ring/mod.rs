//! Single-producer single-consumer rings over any memory, and the cursor arithmetic that also drives the kernel's rings.
//!
//! Must never know what an element means, make a system call, or allocate per element.
pub mod cursor;
