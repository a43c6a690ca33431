//! Stages that look at the host: kernel, capabilities, memory lock, CPUs, clock.

use super::{Finding, Scene, read, sysctl};
use crate::nic::afxdp::program::{LoadOptions, Program};
use crate::supervisor::capabilities::{Capability, Set};
use crate::sys::xdp;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{Pid, geteuid};

/// Bytes of a frame.
const FRAME_BYTES: u64 = 2048;
/// Entries of the tables of a program that is only tried.
const TRIAL_ENTRIES: u32 = 64;

/// All of them.
pub(super) fn stages(scene: &Scene) -> Vec<Finding> {
    let memory = u64::from(scene.question.frames) * FRAME_BYTES * u64::from(scene.question.workers.max(1));
    vec![
        kernel(scene.capabilities),
        af_xdp(scene.capabilities),
        io_uring(),
        capabilities(scene.capabilities, geteuid().is_root()),
        memlock(scene.capabilities, memory, getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft)),
        cpus(),
        clock(read("/sys/devices/system/clocksource/clocksource0/current_clocksource")),
    ]
}

/// Loads the program, attaches it nowhere, and lets it go.
fn kernel(have: Set) -> Finding {
    const STAGE: &str = "kernel";
    let lacking = Set::of(&[Capability::Bpf, Capability::NetAdmin, Capability::Perfmon]).without(have);
    if !lacking.is_empty() {
        return Finding::skip(STAGE, format!("loading an XDP program needs {}", lacking.names().join(", ")), "run it as root");
    }
    let options = LoadOptions { matches: TRIAL_ENTRIES, sources: TRIAL_ENTRIES, ..LoadOptions::default() };
    match Program::load(&options) {
        Ok(program) if program.multi_buffer() => Finding::ok(STAGE, "loads the XDP program, packets in several buffers included"),
        Ok(_) => Finding::warn(
            STAGE,
            "refuses XDP programs for packets in several buffers, so drivers limit the MTU",
            "use a kernel from 5.18 on, or an MTU of at most 1500",
        ),
        Err(error) => Finding::fail(
            STAGE,
            format!("does not load the XDP program: {error}"),
            "use a kernel with CONFIG_BPF_SYSCALL, or `relay run --backend packet`",
        ),
    }
}

fn af_xdp(have: Set) -> Finding {
    const STAGE: &str = "af-xdp";
    match xdp::socket() {
        Ok(_) => Finding::ok(STAGE, "AF_XDP sockets can be made"),
        Err(Errno::EPERM) if !have.contains(Capability::NetRaw) => {
            Finding::skip(STAGE, "making an AF_XDP socket needs CAP_NET_RAW", "run it as root")
        }
        Err(errno) => Finding::fail(
            STAGE,
            format!("no AF_XDP socket: {errno}"),
            "use a kernel with CONFIG_XDP_SOCKETS, or `relay run --backend packet`",
        ),
    }
}

/// Makes a ring of four entries and lets it go.
fn io_uring() -> Finding {
    const STAGE: &str = "io-uring";
    let plain = "the packet path falls back to plain system calls (af_packet_plain)";
    match io_uring::IoUring::new(4) {
        Ok(_) => Finding::ok(STAGE, "io_uring is there for the packet path"),
        Err(error) => match sysctl("kernel/io_uring_disabled") {
            Some(level) if level > 0 => Finding::warn(
                STAGE,
                format!("io_uring is forbidden (kernel.io_uring_disabled = {level}): {plain}"),
                "sysctl -w kernel.io_uring_disabled=0",
            ),
            _ => Finding::warn(STAGE, format!("no io_uring ({error}): {plain}"), "use a kernel with CONFIG_IO_URING"),
        },
    }
}

fn capabilities(have: Set, root: bool) -> Finding {
    const STAGE: &str = "capabilities";
    let needed = Set::SUPERVISOR.union(Set::SET_UP);
    let lacking = needed.without(have);
    let names = |separator| lacking.names().join(separator);
    if lacking.is_empty() {
        return Finding::ok(STAGE, format!("all that `relay run` needs are here: {}", needed.names().join(" ")));
    }
    let reason = format!("`relay run` lacks {}", lacking.names().join(", "));
    if root {
        Finding::fail(STAGE, reason, format!("let the container or unit keep them, e.g. `--cap-add {}`", names(" --cap-add ")))
    } else {
        Finding::warn(
            STAGE,
            format!("{reason} as this user"),
            "start `relay run` as root; its workers run as an ordinary user all the same",
        )
    }
}

fn memlock(have: Set, needed: u64, soft: u64) -> Finding {
    const STAGE: &str = "memlock";
    let kib = needed / 1024;
    if have.contains(Capability::IpcLock) {
        return Finding::ok(STAGE, "no limit applies (CAP_IPC_LOCK)");
    }
    if soft >= needed {
        return Finding::ok(STAGE, format!("packet memory of {kib} KiB is within the limit"));
    }
    Finding::fail(
        STAGE,
        format!("packet memory needs {kib} KiB locked, the limit is {} KiB", soft / 1024),
        "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity), run with CAP_IPC_LOCK, or take fewer frames (--frames N)",
    )
}

fn cpus() -> Finding {
    const STAGE: &str = "cpus";
    let allowed =
        sched_getaffinity(Pid::from_raw(0)).map_or(0, |set| (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu) == Ok(true)).count());
    let present =
        std::fs::read_to_string("/proc/cpuinfo").map_or(0, |text| text.lines().filter(|line| line.starts_with("processor")).count());
    match allowed {
        1 => Finding::warn(
            STAGE,
            "one CPU is allowed: worker, supervisor and the interface's interrupts share it",
            format!("allow two or more of the {present} CPUs, e.g. `taskset -c 0-1 relay run …` (systemd: CPUAffinity=)"),
        ),
        2 => Finding::ok(STAGE, "2 CPUs are allowed: one worker in one thread"),
        more => Finding::ok(STAGE, format!("{more} CPUs are allowed")),
    }
}

fn clock(source: Option<String>) -> Finding {
    const STAGE: &str = "clock";
    match source.as_deref() {
        None => Finding::skip(STAGE, "the kernel does not say which clock it uses", ""),
        Some(slow @ ("hpet" | "acpi_pm" | "jiffies" | "refined-jiffies")) => Finding::warn(
            STAGE,
            format!("the clock is {slow}: each reading costs a microsecond or more, and every latency figure with it"),
            "boot with tsc=reliable, or choose one of /sys/devices/system/clocksource/clocksource0/available_clocksource",
        ),
        Some(source) => Finding::ok(STAGE, format!("the clock is {source}, read without a system call")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn slow_clocks_are_named() {
        assert_eq!(clock(Some("tsc".into())).verdict, Verdict::Ok);
        assert_eq!(clock(None).verdict, Verdict::Skip);
        let slow = clock(Some("hpet".into()));
        assert!(slow.verdict == Verdict::Warn && slow.reason.contains("hpet") && slow.remedy.contains("tsc=reliable"));
    }

    #[test]
    fn locked_memory_counts_frames_and_workers() {
        assert_eq!(memlock(Set::EMPTY, 32 << 20, 8 << 20).verdict, Verdict::Fail);
        assert_eq!(memlock(Set::EMPTY, 32 << 20, 32 << 20).verdict, Verdict::Ok);
        assert_eq!(memlock(Set::of(&[Capability::IpcLock]), 32 << 20, 0).verdict, Verdict::Ok);
    }

    #[test]
    fn an_ordinary_user_is_told_without_alarm() {
        assert_eq!(capabilities(Set::EMPTY, false).verdict, Verdict::Warn);
        let fail = capabilities(Set::SUPERVISOR, true);
        assert!(fail.verdict == Verdict::Fail && fail.remedy.contains("--cap-add CAP_PERFMON"), "{fail:?}");
    }
}
