//! Descriptors out of an AF_XDP ring. The target is `relay_tests::fuzz::segments::descriptors`; must never hold anything of its own.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = relay_tests::fuzz::segments::descriptors(data);
});
