//! What the two BPF objects share: bounds-checked packet access, the parser, the panic handler.
//!
//! Built by `cargo xtask build-ebpf` for the BPF target only; on any other target this crate is empty, so that
//! `cargo check --workspace` needs no BPF toolchain. It must never hold a map: those belong to the objects.
#![cfg_attr(target_arch = "bpf", no_std)]

#[cfg(target_arch = "bpf")]
pub mod packet;
#[cfg(target_arch = "bpf")]
pub mod parse;
#[cfg(target_arch = "bpf")]
pub mod rewrite;
#[cfg(target_arch = "bpf")]
pub mod sum;

/// Loops: the verifier refuses a program from which this can be reached, so no program that loads can panic.
/// (`unreachable_unchecked` would be undefined behaviour, and the verifier would not see it.)
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
