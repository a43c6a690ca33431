//! For whom coalescing pays: by output, with what the last packets have shown. Pure.
//!
//! A super-frame of fewer than about 3 packets costs more than sending them one by one (LIMITS.md), so an output whose runs are
//! shorter is sent directly for a while, then tried again. Where the device refuses super-frames, nothing is coalesced for a
//! while. Time is counted in packets. Must never decide about order: the egress turn keeps it.

use super::runs::MAX_SEGMENTS;
use crate::nic::Admission;

/// Outputs that are told apart; others share an entry and are judged together or anew.
const ENTRIES: usize = 1024;
/// Packets after which an output is judged.
const TRIAL: u32 = 128;
/// Packets that go directly after a trial that did not pay.
const DIRECT: u32 = 16_384;
/// A trial pays with so many packets a super-frame, times 2 (2.5).
const BREAK_EVEN_TWICE: u32 = 5;
/// Refused super-frames in a row, their packets going through one by one, that say that the device does not take any.
const MAX_REFUSALS: u32 = 3;
/// Packets until a device that refused is tried again.
const OFF: u32 = 1 << 20;

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    label: u32,
    /// Packets that still go directly.
    direct: u32,
    packets: u32,
    frames: u32,
    window: u32,
    in_window: u32,
}

/// See the file's header.
#[derive(Debug)]
pub(super) struct Adaptive {
    entries: Box<[Entry]>,
    window: u32,
    refusals: u32,
    off: u32,
}

impl Adaptive {
    pub(super) fn new() -> Self {
        Self { entries: vec![Entry::default(); ENTRIES].into(), window: 1, refusals: 0, off: 0 }
    }

    fn entry(&mut self, label: u32) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(label as usize % ENTRIES)?;
        if entry.label != label {
            *entry = Entry { label, ..Entry::default() };
        }
        Some(entry)
    }

    /// A new window begins: each output may put one super-frame's packets into it.
    pub(super) const fn begin_window(&mut self) {
        self.window = self.window.wrapping_add(1);
    }

    /// What becomes of the next packet of an output.
    pub(super) fn admit(&mut self, label: u32) -> Admission {
        let (window, off) = (self.window, self.off);
        self.off = off.saturating_sub(1);
        let Some(entry) = self.entry(label).filter(|_| off == 0) else { return Admission::Direct };
        if entry.window != window {
            (entry.window, entry.in_window) = (window, 0);
        }
        if entry.direct > 0 {
            entry.direct -= 1;
            return Admission::Direct;
        }
        if entry.in_window as usize >= MAX_SEGMENTS {
            return Admission::Wait;
        }
        entry.in_window += 1;
        Admission::Take
    }

    /// A super-frame, or a packet alone, of an output has gone.
    pub(super) fn sent(&mut self, label: u32, packets: u32) {
        if packets > 1 {
            self.refusals = 0;
        }
        let Some(entry) = self.entry(label) else { return };
        entry.packets += packets;
        entry.frames += 1;
        if entry.packets >= TRIAL {
            let pays = entry.packets * 2 >= entry.frames * BREAK_EVEN_TWICE;
            entry.direct = if pays { 0 } else { DIRECT };
            (entry.packets, entry.frames) = (0, 0);
        }
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
    fn an_output_of_short_runs_goes_directly_and_is_tried_again() {
        let mut adaptive = Adaptive::new();
        assert_eq!(adaptive.admit(7), Admission::Take);
        (0..TRIAL).for_each(|_| adaptive.sent(7, 1));
        (0..DIRECT).for_each(|_| assert_eq!(adaptive.admit(7), Admission::Direct));
        assert_eq!((adaptive.admit(7), adaptive.admit(8)), (Admission::Take, Admission::Take));
        (0..TRIAL).for_each(|_| adaptive.sent(7, 3));
        assert_eq!(adaptive.admit(7), Admission::Take, "three a run pay");
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
        adaptive.sent(7, 9);
        (1..MAX_REFUSALS).for_each(|_| adaptive.refused());
        assert!(!adaptive.is_off());
        adaptive.refused();
        assert!(adaptive.is_off());
        (0..OFF).for_each(|_| assert_eq!(adaptive.admit(7), Admission::Direct));
        assert_eq!((adaptive.is_off(), adaptive.admit(7)), (false, Admission::Take));
    }
}
