//! What two sides share through memory without locks: the SPSC ring, the broadcast of one writer to many readers, the sleep
//! flag, and the cursor arithmetic that also drives the kernel's rings.
//!
//! Must never know what an element means, make a system call, or allocate per element.

pub mod broadcast;
pub mod cursor;
pub mod gate;
#[cfg(all(test, not(loom)))]
pub(crate) mod hostile;
pub mod layout;
pub mod memory;
#[cfg(all(test, not(loom)))]
mod properties;
pub mod sleep;
pub mod spsc;
pub(crate) mod sync;
#[cfg(all(test, not(loom)))]
mod tests;

pub use broadcast::{Behind, Publisher, Received, Subscriber};
pub use gate::{Gate, GateLine};
pub use layout::{Layout, RingError};
pub use memory::{Memory, Words};
pub use sleep::SleepFlag;
pub use spsc::{Consumer, Full, Producer, heap, init, init_at};
