//! The classic BPF program that deals the packets of a fan-out group out to its sockets by a table (PACKET_FANOUT_CBPF).
//!
//! A flow's bucket is a hash of source, destination and ports (of the last 32 bits of an IPv6 address), so a flow stays with
//! one socket; which bucket is whose the caller says (`worker/partition.rs`). What is no IP, or cut short, goes to the first
//! socket. Pure: builds instructions, attaches nothing.

use super::filter::{jump_if_equal, op};
use libc::sock_filter;

/// Buckets of a table.
pub const BUCKETS: usize = 64;

/// Offsets from the network header (linux/filter.h, SKF_NET_OFF): tags and link layers don't matter.
const NET: u32 = (-0x10_0000_i32).cast_unsigned();
/// Odd and well spread (2^32 divided by the golden ratio).
const MULTIPLIER: u32 = 0x9e37_79b1;

// linux/bpf_common.h, as combined here.
const LOAD_BYTE: u16 = 0x30;
const LOAD_WORD: u16 = 0x20;
const LOAD_WORD_AT_X: u16 = 0x40;
const X_IS_HEADER_LEN: u16 = 0xb1;
const STORE: u16 = 0x02;
const X_IS_STORED: u16 = 0x61;
const TAX: u16 = 0x07;
const MULTIPLY: u16 = 0x24;
const SHIFT_RIGHT: u16 = 0x74;
const XOR_X: u16 = 0xac;
const JUMP: u16 = 0x05;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

/// The program for a table: bucket → socket, numbered in the order in which they joined.
pub(super) fn program(table: &[u8; BUCKETS]) -> Vec<sock_filter> {
    let four = hash(&[op(X_IS_HEADER_LEN, NET), op(LOAD_WORD_AT_X, NET)], 12, 16);
    let six = hash(&[op(LOAD_WORD, NET + 40)], 20, 36);
    let mut code = vec![op(LOAD_BYTE, NET), op(SHIFT_RIGHT, 4)];
    code.push(jump_if_equal(4, 0, four.len() as u8 + 1));
    code.extend(&four);
    code.push(op(JUMP, six.len() as u32 + 2));
    code.push(jump_if_equal(6, 1, 0));
    code.push(op(RETURN, 0));
    code.extend(&six);
    // The high bits of the product are the well mixed ones; 6 of them are the bucket.
    code.extend([op(TAX, 0), op(SHIFT_RIGHT, 15), op(XOR_X, 0), op(MULTIPLY, MULTIPLIER), op(SHIFT_RIGHT, 26)]);
    code.extend(tree(table, 0));
    code
}

/// A = a hash of the word that `ports` loads and the words at these offsets of the network header.
fn hash(ports: &[sock_filter], source: u32, destination: u32) -> Vec<sock_filter> {
    let mut code = ports.to_vec();
    code.extend([op(STORE, 0), op(LOAD_WORD, NET + source), op(MULTIPLY, MULTIPLIER), op(TAX, 0)]);
    code.extend([op(LOAD_WORD, NET + destination), op(XOR_X, 0), op(MULTIPLY, MULTIPLIER)]);
    code.extend([op(X_IS_STORED, 0), op(XOR_X, 0), op(MULTIPLY, MULTIPLIER)]);
    code
}

/// Looks the bucket in A up by halves: a jump reaches 255 instructions, and half a table takes at most 63.
fn tree(table: &[u8], first: u32) -> Vec<sock_filter> {
    let Some(worker) = table.first() else { return Vec::new() };
    if table.iter().all(|other| other == worker) {
        return vec![op(RETURN, u32::from(*worker))];
    }
    let (low, high) = table.split_at(table.len() / 2);
    let middle = first + low.len() as u32;
    let low = tree(low, first);
    let at_least = sock_filter { code: JUMP_IF_AT_LEAST, jt: low.len() as u8, jf: 0, k: middle };
    [vec![at_least], low, tree(high, middle)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the program's last part returns for a bucket, by the rules of the instruction set.
    fn look_up(code: &[sock_filter], bucket: u32) -> u32 {
        let mut at = 0;
        loop {
            let step = code[at];
            match step.code {
                RETURN => return step.k,
                JUMP_IF_AT_LEAST => at += 1 + usize::from(if bucket >= step.k { step.jt } else { step.jf }),
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn the_tree_is_the_table() {
        for workers in 1..9 {
            let table: [u8; BUCKETS] = std::array::from_fn(|bucket| (bucket * 37 % workers) as u8);
            let code = tree(&table, 0);
            assert!(code.len() < 255);
            assert!((0..BUCKETS).all(|bucket| look_up(&code, bucket as u32) == u32::from(table[bucket])), "{workers}");
            assert!(program(&table).len() < 4096);
        }
    }
}
