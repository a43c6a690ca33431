//! Bytes of packets between frames: the header that is saved, the copy for an output, the header that is put back.
//!
//! Must never decide anything about a packet.

use super::journal::{SAVED_LEN, SavedHeader};
use crate::frame::{FRAME_SIZE, Frame, HEADROOM, MAX_FRAGMENTS, Umem};
use crate::nic::{Fragment, Packet};
use arrayvec::ArrayVec;

/// Bytes of a cache line.
const LINE: u32 = 64;
/// Places that copies start at.
const PLACES: u32 = 16;

/// A packet's pieces.
pub(super) type Fragments = ArrayVec<Fragment, MAX_FRAGMENTS>;

/// The first bytes of a packet, zero-padded.
pub(super) fn header_of(umem: &Umem, packet: &Packet) -> SavedHeader {
    let mut saved = [0; SAVED_LEN];
    if let Some(first) = packet.fragments.first() {
        let bytes = umem.bytes(&first.frame, first.offset, first.len.min(SAVED_LEN as u32));
        // Nearly always; of a known length it is a copy without a call.
        if let Some(whole) = bytes.first_chunk::<SAVED_LEN>() {
            return *whole;
        }
        if let Some(to) = saved.get_mut(..bytes.len()) {
            to.copy_from_slice(bytes);
        }
    }
    saved
}

/// Where a copy of `len` bytes starts in its frame. Frames are half a page apart, so what stands at the same place in all of them
/// shares two sets of a cache: the copies of one batch for 16 outputs threw one another out. Short ones start at 16 places by turns,
/// the same whenever the frame is asked (a replay relies on it).
#[inline]
pub(super) const fn place_of_copy(frame: &Frame, len: u32) -> u32 {
    let is_short = HEADROOM + PLACES * LINE + len <= FRAME_SIZE;
    if is_short { HEADROOM + frame.index() / 2 % PLACES * LINE } else { HEADROOM }
}

/// Where the headers of a bundle, `len` bytes, start in their frame: as above, at as many places as there are.
#[inline]
pub(super) const fn place_of_headers(frame: &Frame, len: u32) -> u32 {
    frame.index() / 2 % (FRAME_SIZE.saturating_sub(len) / LINE + 1) * LINE
}

/// Writes the original header back (replay of a packet that no ring has got).
#[inline]
pub(super) fn restore(umem: &Umem, fragments: &mut Fragments, head: &[u8]) {
    if let Some(first) = fragments.first_mut() {
        umem.bytes_mut(&mut first.frame, first.offset, head.len() as u32).copy_from_slice(head);
    }
}

/// Copies a fragment to its place in `to`, its first bytes from `head`. A frame that is both takes a pool that somebody has damaged:
/// its bytes stay what they are.
#[inline]
pub(super) fn copy(umem: &Umem, from: &Fragment, head: &[u8], to: &mut Frame, at: u32) {
    if from.frame.index() == to.index() {
        return;
    }
    let target = umem.bytes_mut(to, at, from.len);
    let source = umem.bytes(&from.frame, from.offset, from.len);
    let len = target.len().min(source.len());
    if let (Some(target), Some(source)) = (target.get_mut(head.len()..len), source.get(head.len()..len)) {
        target.copy_from_slice(source);
    }
    if let Some(target) = target.get_mut(..head.len()) {
        target.copy_from_slice(head);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::FRAME_CAPACITY;

    #[test]
    fn a_copy_fits_its_frame_wherever_it_starts() {
        let fd = nix::sys::memfd::memfd_create(c"copy-test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, 64 * i64::from(FRAME_SIZE)).unwrap();
        let umem = Umem::new(crate::sys::Mapping::new(&fd, 0, 64 * FRAME_SIZE as usize, true, false).unwrap());
        let mut places = std::collections::BTreeSet::new();
        for index in 0..64 {
            let frame = umem.claim_index(index).unwrap();
            for len in [60, 106, 752, 753, FRAME_CAPACITY] {
                let at = place_of_copy(&frame, len);
                assert!(at >= HEADROOM && at + len <= FRAME_SIZE && at == place_of_copy(&frame, len), "{len} bytes at {at}");
            }
            places.insert((index % 2, place_of_copy(&frame, 106)));
            frame.into_index();
        }
        assert_eq!(places.len(), 32, "all places of both halves of a page");
    }
}
