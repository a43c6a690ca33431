//! Whether coalescing pays: for the whole interface, with what the last packets have shown. Pure.
//!
//! A super-frame of fewer than about 3 packets costs more than sending them one by one (LIMITS.md), so an interface whose runs are
//! shorter sends directly for a while, then tries again. Where the device refuses super-frames, nothing is coalesced for a while.
//! Time is counted in packets. The losing design judged each output by itself: the packets of outputs with one interface stand in
//! its ring by turns, so one output that went directly cut the runs of all others to one packet, for good (1:16 was at 1.7 times
//! the baseline instead of 8). Must never decide about order: the egress turn keeps it.

use super::runs::MAX_SEGMENTS;
use crate::nic::Admission;

/// Outputs that are told apart within a window; others share an entry, and then may end the window early or late.
const ENTRIES: usize = 1024;
/// Packets after which the interface is judged, at the end of a window.
const TRIAL: u32 = 128;
/// Packets that go directly after a trial that did not pay.
const DIRECT: u32 = 16_384;
/// A trial pays with so many packets a super-frame, times 2 (2.5).
const BREAK_EVEN_TWICE: u32 = 5;
/// Refused super-frames in a row, their packets going through one by one, that say that the device does not take any.
const MAX_REFUSALS: u32 = 3;
/// Packets until a device that refused is tried again.
const OFF: u32 = 1 << 20;

/// What a window has of an output.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    label: u32,
    window: u32,
    packets: u32,
}

/// See the file's header.
#[derive(Debug)]
pub(super) struct Adaptive {
    entries: Box<[Entry]>,
    window: u32,
    /// Packets of the trial, and the super-frames they went in.
    packets: u32,
    frames: u32,
    /// Packets that still go directly.
    direct: u32,
    refusals: u32,
    off: u32,
}

impl Adaptive {
    pub(super) fn new() -> Self {
        Self { entries: vec![Entry::default(); ENTRIES].into(), window: 1, packets: 0, frames: 0, direct: 0, refusals: 0, off: 0 }
    }

    /// A new window begins: each output may put one super-frame's packets into it. What the windows before it have shown is judged
    /// here, and not within one: its long runs go first, and its packets alone would be judged by themselves.
    pub(super) const fn begin_window(&mut self) {
        self.window = self.window.wrapping_add(1);
        if self.packets >= TRIAL {
            let pays = self.packets * 2 >= self.frames * BREAK_EVEN_TWICE;
            self.direct = if pays { 0 } else { DIRECT };
            (self.packets, self.frames) = (0, 0);
        }
    }

    /// Whether super-frames pay, as far as is known.
    pub(super) const fn pays(&self) -> bool {
        self.off == 0 && self.direct == 0
    }

    /// What becomes of the next packet of an output.
    #[inline]
    pub(super) fn admit(&mut self, label: u32) -> Admission {
        if !self.pays() {
            self.off = self.off.saturating_sub(1);
            self.direct = self.direct.saturating_sub(1);
            return Admission::Direct;
        }
        self.take(label)
    }

    /// What becomes of the next packet of an output, or of the outputs of a bundle, where it can go no other way.
    #[inline]
    pub(super) fn take(&mut self, label: u32) -> Admission {
        let Some(entry) = self.entries.get_mut(label as usize % ENTRIES) else { return Admission::Direct };
        if (entry.label, entry.window) != (label, self.window) {
            *entry = Entry { label, window: self.window, packets: 0 };
        }
        if entry.packets as usize >= MAX_SEGMENTS {
            return Admission::Wait;
        }
        entry.packets += 1;
        Admission::Take
    }

    /// A super-frame, or a packet alone, has gone.
    pub(super) const fn sent(&mut self, packets: u32) {
        if packets > 1 {
            self.refusals = 0;
        }
        self.packets += packets;
        self.frames += 1;
    }

    /// A super-frame was refused whose packets went one by one.
    pub(super) const fn refused(&mut self) {
        self.refusals += 1;
        if self.refusals >= MAX_REFUSALS {
            (self.refusals, self.off) = (0, OFF);
        }
    }

    /// Whether the device is taken to refuse super-frames.
    pub(super) const fn is_off(&self) -> bool {
        self.off > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_of_short_runs_goes_directly_and_is_tried_again() {
        let mut adaptive = Adaptive::new();
        assert_eq!(adaptive.admit(7), Admission::Take);
        (0..TRIAL).for_each(|_| adaptive.sent(1));
        assert_eq!(adaptive.admit(7), Admission::Take, "the window is not at its end");
        adaptive.begin_window();
        (0..DIRECT).for_each(|n| assert_eq!(adaptive.admit(n % 16), Admission::Direct, "all outputs together"));
        assert_eq!((adaptive.admit(7), adaptive.admit(8)), (Admission::Take, Admission::Take));
        [64, 64, 64].into_iter().chain([1; 64]).for_each(|packets| adaptive.sent(packets));
        adaptive.begin_window();
        assert_eq!(adaptive.admit(7), Admission::Take, "256 packets in 67 super-frames pay");
    }

    #[test]
    fn a_window_takes_one_super_frame_an_output() {
        let mut adaptive = Adaptive::new();
        (0..MAX_SEGMENTS).for_each(|_| assert_eq!(adaptive.admit(7), Admission::Take));
        assert_eq!((adaptive.admit(7), adaptive.admit(8)), (Admission::Wait, Admission::Take));
        adaptive.begin_window();
        assert_eq!(adaptive.admit(7), Admission::Take);
    }

    #[test]
    fn a_device_that_refuses_is_left_alone_for_a_while() {
        let mut adaptive = Adaptive::new();
        (1..MAX_REFUSALS).for_each(|_| adaptive.refused());
        adaptive.sent(9);
        (1..MAX_REFUSALS).for_each(|_| adaptive.refused());
        assert!(!adaptive.is_off());
        adaptive.refused();
        assert!(adaptive.is_off());
        (0..OFF).for_each(|_| assert_eq!(adaptive.admit(7), Admission::Direct));
        assert_eq!((adaptive.is_off(), adaptive.admit(7)), (false, Admission::Take));
    }
}
