//! A network namespace for one test: it lives as long as the thread that made it, so nothing can be left behind.
//!
//! Must never be built into the product.

use nix::sched::{CloneFlags, unshare};
use std::process::Command;

/// Runs `test` on a thread in a new, empty network namespace. A panic of the test is a panic of the caller.
pub(super) fn in_netns(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => test(),
        Err(error) => println!("SKIPPED: no network namespace: {error}"),
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// `ip ARGS` in the thread's namespace.
pub(super) fn ip(args: &str) {
    let output = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A file of the thread's own /proc/net.
pub(super) fn proc_net(file: &str) -> String {
    std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap()
}
