//! Which frames a packet port holds: one byte a frame in the work segment.
//!
//! An io_uring dies with its worker, and no ring tells which buffers it had; a successor takes back every frame that is
//! marked here and stands in no ring. Two maps, one for receiving and one for sending ports, each written by the thread that hands frames to or takes them from such a port.
//! Must never be consulted on the packet's way.

use crate::sys::SharedArray;

/// The map of one worker.
#[derive(Clone, Debug)]
pub struct HeldMap(SharedArray<u8>);

impl HeldMap {
    /// The map over these bytes, one for each frame.
    pub const fn new(bytes: SharedArray<u8>) -> Self {
        Self(bytes)
    }

    /// The port holds the frame.
    #[inline]
    pub fn set(&self, frame: u32) {
        self.0.set(frame as usize, 1);
    }

    /// The frame is somewhere else again.
    #[inline]
    pub fn clear(&self, frame: u32) {
        self.0.set(frame as usize, 0);
    }

    /// All frames marked.
    pub fn frames(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.0.len()).filter(|frame| self.0.get(*frame) != 0).map(|frame| frame as u32)
    }
}
