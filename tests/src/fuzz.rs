//! What stands between bytes of strangers and the relay, as functions of bytes: packet, rule text, config file, control message;
//! `segments`: what other processes of the relay's own can write.
//!
//! `tests/tests/fuzz.rs` gives them damaged seeds on every run, the crate in `fuzz/` gives them to libFuzzer. Each says whether the
//! input was taken; a panic is a finding. Must never start, open or send anything.

pub mod segments;

use crate::raw;
use relay::control::framing::{self, MAX_REQUEST_LEN, MAX_RESPONSE_LEN, Reassembly, Step};
use relay::control::message::{Request, Response};
use relay::datapath::edit::Edit;
use relay::datapath::rewrite::{Checked, inspect, rewrite};
use relay::rule::compile::{CompileInput, Compiled, compile};
use relay::rule::{Rule, RuleSet};
use relay::wire::{Headers, parse};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of the edit before the packet in an input of [`packet`].
pub const EDIT_LEN: usize = size_of::<Edit>();

/// An [`Edit`] as it lies in memory, then a packet: parsed, checked, rewritten. What comes out is right by its own headers.
#[must_use]
pub fn packet(data: &[u8]) -> bool {
    let Some((edit, packet)) = data.split_at_checked(EDIT_LEN) else { return false };
    let edit: Edit = bytemuck::pod_read_unaligned(edit);
    let edit = Edit { dscp: edit.dscp & 63, ..edit };
    let Ok(headers) = parse(packet, packet.len()) else { return false };
    assert!(usize::from(headers.l3_offset) + headers.l3_len as usize <= packet.len());
    let checked = inspect(&headers, &[packet]);
    let (head, tail) = packet.split_at(usize::from(headers.l4_offset) + 8);
    assert_eq!(checked, inspect(&headers, &[head, &tail[..tail.len() / 2], &tail[tail.len() / 2..]]), "pieces make a difference");
    checked.is_ok_and(|checked| rewritten(packet, &headers, checked, &edit))
}

fn rewritten(packet: &[u8], headers: &Headers, checked: Checked, edit: &Edit) -> bool {
    let room = usize::from(edit.zero[0] & 7);
    let mut frame = [vec![0x55; room], packet.to_vec(), vec![0x55; 16]].concat();
    let (before, mut offset, mut len) = (frame.clone(), room as u32, packet.len() as u32);
    if rewrite(&mut frame, &mut offset, &mut len, headers, checked, edit).is_err() {
        assert!(frame == before && (offset, len) == (room as u32, packet.len() as u32), "an error has written something");
        return false;
    }
    let new = &frame[offset as usize..][..len as usize];
    let after = parse(new, new.len());
    assert!(after.is_ok(), "what was rewritten is no packet any more: {after:?}");
    let after = after.unwrap_or_default();
    assert!(frame[room + packet.len()..] == before[room + packet.len()..], "written behind the packet");
    assert!(frame[..offset as usize].iter().all(|byte| offset > room as u32 || *byte == 0x55), "written before the packet");
    let payload = |bytes: &[u8], headers: &Headers| bytes[usize::from(headers.l4_offset) + 8..].to_vec();
    assert!(payload(new, &after) == payload(packet, headers), "the payload is another");
    assert!((after.family, after.udp_len) == (headers.family, headers.udp_len));
    assert_sums(new, &after, headers.udp_checksum == 0);
    true
}

/// Checksums, by another adder than the product's. `none`: it has no UDP checksum.
pub(crate) fn assert_sums(packet: &[u8], headers: &Headers, none: bool) {
    let (l3, l4) = (usize::from(headers.l3_offset), usize::from(headers.l4_offset));
    let udp = &packet[l4..l4 + usize::from(headers.udp_len)];
    assert!(headers.family == 6 || raw::sum(&packet[l3..l4], 0) == 0xffff, "IPv4 header checksum");
    let addresses = if headers.family == 6 { l3 + 8..l3 + 40 } else { l3 + 12..l3 + 20 };
    let pseudo = raw::sum(&[&packet[addresses], &[0, 17], &udp[4..6]].concat(), 0);
    assert!((headers.udp_checksum == 0) == none, "a checksum came or went");
    assert!(none || raw::sum(udp, pseudo) == 0xffff, "UDP checksum");
}

/// Rules, one a line: what is taken reads back from its canonical line, what is refused is refused in one line.
#[must_use]
pub fn rule_text(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let mut rules = Vec::new();
    for line in text.lines() {
        match line.parse::<Rule>() {
            Ok(rule) => {
                let again = rule.to_string().parse::<Rule>();
                assert!(again.as_ref() == Ok(&rule), "{rule:?} is written as `{rule}`, which is {again:?}");
                rules.push(rule);
            }
            Err(error) => assert_one_line(&error.to_string()),
        }
    }
    let taken = !rules.is_empty();
    in_a_set(rules);
    taken
}

/// Together they are a set that compiles, or an error that says why not.
fn in_a_set(rules: Vec<Rule>) {
    let set = match RuleSet::new(rules) {
        Ok(set) => set,
        Err(error) => return assert_one_line(&error.to_string()),
    };
    let inputs: Vec<CompileInput<'_>> =
        (0..).zip(set.rules()).map(|(slot, rule)| CompileInput { ifindex: 1, slot, serial: 1, matching: &rule.matching }).collect();
    if let Err(error) = compile(&inputs, &Compiled::default()) {
        assert_one_line(&error.to_string());
    }
}

/// A config file: what is taken is written and read back the same.
#[must_use]
pub fn config(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    match relay::config::parse("relay.toml", &text) {
        Ok(rules) => {
            let written = relay::config::write(&rules);
            let again = relay::config::parse("relay.toml", &written);
            assert!(again.as_ref() == Ok(&rules), "written as\n{written}\nwhich reads {again:?}");
            !rules.is_empty()
        }
        Err(error) => {
            assert_one_line(&error.to_string());
            false
        }
    }
}

/// One byte for the size of the pieces it comes in, then what a client sends: put together, read, and written again.
#[must_use]
pub fn control(data: &[u8]) -> bool {
    let Some((piece, bytes)) = data.split_first() else { return false };
    let mut reassembly = Reassembly::new(MAX_REQUEST_LEN);
    let (mut came, mut taken) = (0, false);
    for part in bytes.chunks(usize::from(*piece).max(1)) {
        let mut rest = part;
        while !rest.is_empty() {
            let before = rest.len();
            let step = reassembly.step(&mut rest);
            came += before - rest.len();
            match step {
                Ok(Step::More) => {}
                Ok(Step::Whole(document)) => {
                    taken |= document_is::<Request>(&document, MAX_REQUEST_LEN) | document_is::<Response>(&document, MAX_RESPONSE_LEN);
                }
                Ok(Step::Bad(error)) => {
                    assert_one_line(&error.to_string());
                    return taken;
                }
                Ok(Step::Closed) | Err(_) => return taken,
            }
            assert!(reassembly.held_len() <= 2 * came + 64, "{came} bytes came, {} are held", reassembly.held_len());
        }
    }
    taken
}

fn document_is<T: Serialize + DeserializeOwned + PartialEq>(document: &[u8], limit: u32) -> bool {
    let Ok(message) = framing::decode::<T>(document) else { return false };
    let Ok(bytes) = framing::encode(&message, limit) else { return false };
    let again = framing::decode::<T>(&bytes[framing::HEADER_LEN..]);
    assert!(again.is_ok_and(|again| again == message), "a message does not survive being sent");
    true
}

fn assert_one_line(message: &str) {
    assert!(!message.is_empty() && !message.contains('\n'), "an error of more than one line: {message:?}");
}
