//! Single-producer single-consumer rings over any memory, and the cursor arithmetic that also drives the kernel's rings.
//!
//! Must never know what an element means, make a system call, or allocate per element.

pub mod cursor;
pub mod layout;
pub mod memory;
pub mod spsc;
mod sync;
#[cfg(all(test, not(loom)))]
mod tests;

pub use layout::{Layout, RingError};
pub use memory::Memory;
pub use spsc::{Consumer, Full, Producer, heap, init, init_at};
