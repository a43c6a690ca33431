//! Edits of a status segment. The target is `relay_tests::fuzz::segments::status`; must never hold anything of its own.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = relay_tests::fuzz::segments::status(data);
});
