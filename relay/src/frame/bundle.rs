//! A bundle: one packet for several outputs of a port, and beside it the header that each of them wants.
//!
//! ```text
//! headers' frame: BundleHead (32 bytes) │ label u32, header (42 or 62 bytes), 0–4 bytes of padding │ label, header │ …
//! packet's frame: the packet as it came
//! ```
//! Two descriptors in one of our rings: the headers with [`BUNDLE`](super::BUNDLE) and [`CONTINUES`](super::CONTINUES), then the
//! packet. Each frame has one owner, the descriptor; what would be a copy of the packet for each output is a header of its own.
//! Must never be trusted: it is read from memory that outlives the process that wrote it.

use super::FRAME_SIZE;
use bytemuck::{Pod, Zeroable};

/// What all headers of a bundle have in common. 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct BundleHead {
    /// Which outputs of the rule have a header here, by bit.
    pub outputs: u64,
    /// Slot and serial of the rule, and the epoch of the rules: two packets of one flow with the same of these and `outputs` have
    /// the same headers, but for lengths, checksums and identification.
    pub rule: [u32; 3],
    /// Headers.
    pub count: u32,
    /// Bytes of each.
    pub header_len: u32,
    /// Always 0.
    pub zero: u32,
}

const HEAD_LEN: usize = size_of::<BundleHead>();
const LABEL_LEN: usize = 4;
/// Outputs that a bundle can have: as many as headers of IPv6 (62 bytes) go into a frame.
pub const MAX_BUNDLED: usize = (FRAME_SIZE as usize - HEAD_LEN) / stride(62);

/// Bytes from one header to the next.
const fn stride(header_len: usize) -> usize {
    (LABEL_LEN + header_len).next_multiple_of(8)
}

/// Bytes of a bundle's headers.
#[inline]
pub const fn bundle_len(count: usize, header_len: usize) -> usize {
    HEAD_LEN + count * stride(header_len)
}

/// Writes `head`. `bytes`: [`bundle_len`] of them.
#[inline]
pub fn write_head(bytes: &mut [u8], head: &BundleHead) {
    if let Some(to) = bytes.first_chunk_mut::<HEAD_LEN>() {
        *to = bytemuck::cast(*head);
    }
}

/// Labels header `number`, and returns its bytes to be written; `None`: it does not fit.
#[inline]
pub fn place(bytes: &mut [u8], number: usize, header_len: usize, label: u32) -> Option<&mut [u8]> {
    let at = bundle_len(number, header_len);
    let (to, header) = bytes.get_mut(at..at + LABEL_LEN + header_len)?.split_first_chunk_mut::<LABEL_LEN>()?;
    *to = label.to_ne_bytes();
    Some(header)
}

/// The bytes of header `number`, to be changed; `None`: it is not in `bytes`.
#[inline]
pub fn header_mut(bytes: &mut [u8], number: usize, header_len: usize) -> Option<&mut [u8]> {
    let at = bundle_len(number, header_len) + LABEL_LEN;
    bytes.get_mut(at..at + header_len)
}

/// The headers of a bundle, found to lie in their bytes.
#[derive(Clone, Copy, Debug)]
pub struct Bundle<'a> {
    head: BundleHead,
    bytes: &'a [u8],
}

impl<'a> Bundle<'a> {
    /// Reads what stands in `bytes`; `None`: no bundle.
    #[inline]
    pub fn read(bytes: &'a [u8]) -> Option<Self> {
        let head: BundleHead = bytemuck::cast(*bytes.first_chunk::<HEAD_LEN>()?);
        let (count, header_len) = (head.count as usize, head.header_len as usize);
        let fits = matches!(header_len, 42 | 62) && (1..=MAX_BUNDLED).contains(&count) && bundle_len(count, header_len) <= bytes.len();
        fits.then_some(Self { head, bytes })
    }

    /// What the headers have in common.
    pub const fn head(&self) -> &BundleHead {
        &self.head
    }

    /// Label and bytes of header `number`.
    #[inline]
    pub fn header(&self, number: usize) -> Option<(u32, &'a [u8])> {
        let at = bundle_len(number, self.head.header_len as usize);
        let bytes = self.bytes.get(at..at + LABEL_LEN + self.head.header_len as usize).filter(|_| number < self.head.count as usize)?;
        bytes.split_first_chunk::<LABEL_LEN>().map(|(label, header)| (u32::from_ne_bytes(*label), header))
    }

    /// The labels, in order.
    pub fn labels(&self) -> impl Iterator<Item = u32> + use<'a> {
        let this = *self;
        (0..this.head.count as usize).filter_map(move |number| this.header(number).map(|(label, _)| label))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(count: usize, header_len: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; bundle_len(count, header_len)];
        let head = BundleHead { outputs: 5, rule: [1, 2, 3], count: count as u32, header_len: header_len as u32, zero: 0 };
        write_head(&mut bytes, &head);
        for number in 0..count {
            place(&mut bytes, number, header_len, 100 + number as u32).unwrap().fill(number as u8);
        }
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        for (count, header_len) in [(1, 42), (16, 42), (MAX_BUNDLED, 62)] {
            let bytes = written(count, header_len);
            assert!(bytes.len() <= FRAME_SIZE as usize);
            let bundle = Bundle::read(&bytes).unwrap();
            assert_eq!((bundle.head().outputs, bundle.head().rule), (5, [1, 2, 3]));
            assert!(bundle.labels().eq(100..100 + count as u32));
            for number in 0..count {
                assert_eq!(bundle.header(number), Some((100 + number as u32, &vec![number as u8; header_len][..])));
            }
            assert_eq!(bundle.header(count), None);
        }
        assert!(place(&mut [0; 64], 0, 42, 1).is_none());
    }

    #[test]
    fn what_is_no_bundle_is_refused() {
        let change = |at: usize, value: u32| {
            let mut bytes = written(4, 42);
            bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
            Bundle::read(&bytes).is_none()
        };
        assert!(change(20, 0) && change(20, 5) && change(20, u32::MAX) && change(24, 0) && change(24, 62) && change(24, u32::MAX));
        assert!(Bundle::read(&written(4, 42)[..223]).is_none() && Bundle::read(&[]).is_none());
    }
}
