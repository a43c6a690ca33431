//! What can go wrong between the program and its interface. The message is the remedy.

use super::Mode;
use nix::errno::Errno;

/// Why the program isn't loaded, attached or told.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The object does not load: its maps could not be made, or it is damaged.
    #[error("the BPF object does not load: {0} (needs CAP_BPF and CAP_NET_ADMIN)")]
    Object(#[source] Box<aya::EbpfError>),
    /// The verifier, or the lack of a capability.
    #[error("the kernel refuses program `{program}`: {reason}")]
    Load {
        /// The program.
        program: &'static str,
        /// The errno, and the verifier's last words where it has any.
        reason: String,
    },
    /// The object lacks something the loader needs.
    #[error("the BPF object has no {kind} `{name}`: rebuild it with `cargo xtask build-ebpf`")]
    Missing {
        /// Map or program.
        kind: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// A map call failed.
    #[error("map {map}: {operation}: {source}")]
    Map {
        /// The map.
        map: &'static str,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: aya::maps::MapError,
    },
    /// aya-log's map is missing.
    #[error("diagnostics: {0}")]
    Diagnostics(String),
    /// The driver has no XDP.
    #[error("interface {interface} has no native XDP: use `--path packet`, or generic XDP with `--xdp-mode generic`")]
    NoNativeXdp {
        /// The interface.
        interface: String,
    },
    /// Somebody else's program is there.
    #[error("interface {interface} already has XDP program {name} (id {id}): detach it first, e.g. `ip link set {interface} xdp off`")]
    Foreign {
        /// The interface.
        interface: String,
        /// The program's name, `unnamed` where it has none or may not be asked for (CAP_SYS_ADMIN).
        name: String,
        /// The program's id.
        id: u32,
    },
    /// This program is there already.
    #[error("interface {interface} has this program attached already")]
    AlreadyAttached {
        /// The interface.
        interface: String,
    },
    /// Attaching failed otherwise.
    #[error("interface {interface}: attaching in {mode} mode: {}", attach_reason(.errno))]
    Attach {
        /// The interface.
        interface: String,
        /// The mode asked for.
        mode: Mode,
        /// What the kernel said.
        errno: Errno,
    },
    /// The kernel accepted the link but reports something else on the interface.
    #[error("interface {interface}: asked for {wanted} XDP with program {program}, the kernel reports {found}")]
    NotAsAsked {
        /// The interface.
        interface: String,
        /// The mode asked for.
        wanted: Mode,
        /// Our program's id.
        program: u32,
        /// What it reports.
        found: String,
    },
    /// Nothing to detach.
    #[error("interface {ifindex} has no program of this relay")]
    NotAttached {
        /// The interface.
        ifindex: u32,
    },
    /// The kernel could not be asked.
    #[error("interface {ifindex}: asking the kernel for its XDP program: {source}")]
    Query {
        /// The interface.
        ifindex: u32,
        /// What it said.
        source: std::io::Error,
    },
}

impl ProgramError {
    /// Keeps the errno and the verifier's last line: the whole log may have thousands.
    pub(super) fn load(program: &'static str, error: aya::programs::ProgramError) -> Self {
        let reason = match &error {
            aya::programs::ProgramError::LoadError { io_error, verifier_log } => match last_words(&verifier_log.to_string()) {
                Some(words) => format!("{io_error}; verifier: {words}"),
                None => format!("{io_error} (needs CAP_BPF and CAP_NET_ADMIN)"),
            },
            other => other.to_string(),
        };
        Self::Load { program, reason }
    }
}

/// The last line that isn't the verifier's statistics.
fn last_words(log: &str) -> Option<String> {
    let is_statistics = |line: &&str| ["processed ", "verification time", "stack depth"].iter().any(|start| line.starts_with(start));
    log.lines().map(str::trim).rfind(|line| !line.is_empty() && !is_statistics(line)).map(str::to_owned)
}

fn attach_reason(errno: &Errno) -> String {
    let remedy = match errno {
        Errno::ERANGE => "; the MTU is too large for XDP on this driver",
        Errno::EPERM => "; needs CAP_NET_ADMIN and CAP_BPF",
        Errno::ENODEV => "; the interface is gone",
        Errno::EINVAL => "; the driver or the kernel (before 5.9) has no XDP links",
        Errno::ENOMEM | Errno::ENOSPC => "; the driver lacks queues for XDP: use fewer channels (`ethtool -L`)",
        _ => "",
    };
    format!("{}{remedy}", errno.desc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_are_the_reason() {
        let log = "0: r1 = 0\nR1 invalid mem access 'scalar'\nprocessed 9 insns (limit 1000000)\n";
        assert_eq!(last_words(log).as_deref(), Some("R1 invalid mem access 'scalar'"));
        assert_eq!(last_words(""), None);
    }

    #[test]
    fn errors_are_one_line_with_a_remedy() {
        let errors = [
            ProgramError::NoNativeXdp { interface: "eth9".into() },
            ProgramError::Foreign { interface: "eth9".into(), name: "x".into(), id: 7 },
            ProgramError::Attach { interface: "eth9".into(), mode: Mode::Native, errno: Errno::ERANGE },
        ];
        for error in errors {
            let text = error.to_string();
            assert!(text.contains("eth9") && !text.contains('\n'), "{text}");
        }
    }
}
