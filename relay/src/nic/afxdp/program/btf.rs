//! One question to a BTF blob: at which byte of a structure does a member stand? (Documentation/bpf/btf.rst.)
//!
//! Pure: bytes in, a number out; anything odd is `None`. Must never index what it has not checked.

/// `struct btf_header`: magic u16, version u8, flags u8, then u32s: header length, type offset and length, string offset and length.
const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;

struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

/// A type's first 12 bytes: name, vlen (bits 0–15) and kind (24–28) and flag (31), and what follows it.
struct Type<'a> {
    name: u32,
    kind: u32,
    is_flagged: bool,
    body: &'a [u8],
}

/// Bytes from the beginning of `struct structure` to `member`, if it is a direct member of whole bytes.
pub(super) fn member_offset(blob: &[u8], structure: &str, member: &str) -> Option<u32> {
    let btf = Btf::new(blob)?;
    let mut rest = btf.types;
    while !rest.is_empty() {
        let (found, after) = split(rest)?;
        if found.kind == KIND_STRUCT && btf.is_named(found.name, structure) {
            return btf.offset_in(&found, member);
        }
        rest = after;
    }
    None
}

impl<'a> Btf<'a> {
    fn new(blob: &'a [u8]) -> Option<Self> {
        let magic = u16::from_ne_bytes(blob.get(..2)?.try_into().ok()?);
        let section = |at: usize| {
            let begin = word(blob, 4)?.checked_add(word(blob, at)?)? as usize;
            blob.get(begin..begin.checked_add(word(blob, at + 4)? as usize)?)
        };
        (magic == MAGIC).then_some(Self { types: section(8)?, strings: section(16)? })
    }

    fn is_named(&self, name: u32, wanted: &str) -> bool {
        let text = self.strings.get(name as usize..).unwrap_or_default();
        text.strip_prefix(wanted.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    /// `struct btf_member`: name, type, offset in bits (with the kind flag: the low 24 of it, above them a bit field's size).
    fn offset_in(&self, found: &Type<'_>, member: &str) -> Option<u32> {
        let members = found.body.as_chunks::<12>().0;
        let bits = members.iter().find(|entry| word(*entry, 0).is_some_and(|name| self.is_named(name, member)))?;
        let bits = word(bits, 8)?;
        let bits = if found.is_flagged { bits & 0x00ff_ffff } else { bits };
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// The first type and what stands behind it.
fn split(types: &[u8]) -> Option<(Type<'_>, &[u8])> {
    let (name, info) = (word(types, 0)?, word(types, 4)?);
    let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
    let len = match kind {
        // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
        2 | 7..=12 | 16 | 18 => 0,
        // INT, VAR, DECL_TAG
        1 | 14 | 17 => 4,
        // ARRAY
        3 => 12,
        // STRUCT, UNION, DATASEC, ENUM64
        4 | 5 | 15 | 19 => count * 12,
        // ENUM, FUNC_PROTO
        6 | 13 => count * 8,
        _ => return None,
    };
    let (body, after) = types.get(12..)?.split_at_checked(len)?;
    Some((Type { name, kind, is_flagged: info >> 31 == 1, body }, after))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An INT, a struct `b` and a struct `a` with members `x` (bit 0) and `y` (bit 64).
    fn sample(flag: u32, offset: u32) -> Vec<u8> {
        let strings = b"\0a\0b\0x\0y\0";
        let mut types: Vec<u32> = vec![0, 1 << 24, 4, 32];
        types.extend([3, KIND_STRUCT << 24 | 1, 4, 7, 1, 32]);
        types.extend([1, flag << 31 | KIND_STRUCT << 24 | 2, 16, 5, 1, 0, 7, 1, offset]);
        let types: Vec<u8> = types.into_iter().flat_map(u32::to_ne_bytes).collect();
        let header = [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
        let mut blob = MAGIC.to_ne_bytes().to_vec();
        blob.extend([1, 0]);
        blob.extend(header.into_iter().flat_map(u32::to_ne_bytes));
        blob.extend(types);
        blob.extend(strings);
        blob
    }

    #[test]
    fn a_member_is_found_in_its_structure_alone() {
        assert_eq!(member_offset(&sample(0, 64), "a", "y"), Some(8));
        assert_eq!(member_offset(&sample(0, 64), "a", "x"), Some(0));
        assert_eq!(member_offset(&sample(0, 64), "b", "y"), Some(4));
        assert_eq!(member_offset(&sample(1, 3 << 24 | 64), "a", "y"), Some(8));
        assert_eq!(member_offset(&sample(0, 65), "a", "y"), None, "not a whole byte");
        assert_eq!(member_offset(&sample(0, 64), "c", "y"), None);
        assert_eq!(member_offset(&sample(0, 64), "a", "z"), None);
    }

    #[test]
    fn the_running_kernel_says_where_a_device_has_its_index() {
        let Ok(blob) = std::fs::read("/sys/kernel/btf/vmlinux") else {
            println!("SKIPPED: this kernel has no BTF");
            return;
        };
        let at = member_offset(&blob, "net_device", "ifindex").unwrap();
        assert!(at > 0 && at.is_multiple_of(4), "{at}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut blob in Just(sample(0, 64)), at in 0_usize..140, byte: u8, len in 0_usize..140) {
            if let Some(place) = blob.get_mut(at) { *place = byte; }
            blob.truncate(len.max(20));
            let _ = member_offset(&blob, "a", "y");
        }
    }
}
