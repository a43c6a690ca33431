//! Packets: an edit, then a frame. The target is `relay_tests::fuzz::packet`; must never hold anything of its own.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = relay_tests::fuzz::packet(data);
});
