//! What `relay run` was asked to do, parsed and checked. Plain data.

use crate::nic::afpacket::Engines;
use crate::rule::Rule;
use crate::worker::partition::Scheme;
use std::path::PathBuf;
use std::time::Duration;

/// `--backend`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// Best rung of the ladder (DECISIONS §13).
    #[default]
    Auto,
    /// XDP devmap broadcast only.
    Kernel,
    /// AF_XDP only.
    Xsk,
    /// AF_PACKET only.
    Packet,
}

/// `--xdp-mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpMode {
    /// Native, else the packet path.
    #[default]
    Auto,
    /// Native or an error.
    Native,
    /// Generic, only when asked for.
    Generic,
}

/// `--zero-copy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroCopyChoice {
    /// Where the driver can.
    #[default]
    Auto,
    /// Or an error.
    On,
    /// Copy mode.
    Off,
}

/// `--pipeline`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PipelineChoice {
    /// Fused unless three CPUs or more are allowed.
    #[default]
    Auto,
    /// One thread.
    Fused,
    /// Two threads.
    Split,
}

/// `--wait`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WaitChoice {
    /// Never sleep.
    Spin,
    /// Spin for a while, then sleep.
    #[default]
    Adaptive,
    /// Sleep whenever idle.
    Poll,
}

/// Everything `relay run` needs.
#[derive(Clone, Debug)]
pub struct Options {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// Rules of `--rule`.
    pub rules: Vec<Rule>,
    /// `--backend`.
    pub backend: BackendChoice,
    /// `--xdp-mode`.
    pub xdp_mode: XdpMode,
    /// `--zero-copy`.
    pub zero_copy: ZeroCopyChoice,
    /// `--pipeline`.
    pub pipeline: PipelineChoice,
    /// `--workers`.
    pub workers: u32,
    /// `--cpus`; `None`: the inherited affinity.
    pub cpus: Option<Vec<usize>>,
    /// `--partition`.
    pub partition: Scheme,
    /// `--io-uring`: whether the packet path may use it.
    pub io_uring: Engines,
    /// `--wait`.
    pub wait: WaitChoice,
    /// `--spare`: a process for each worker that stands in for it.
    pub spare: bool,
    /// `--linger`.
    pub linger: Duration,
    /// `--keep-kernel-path`: its rules forward on without a supervisor, and without an end.
    pub keep_kernel_path: bool,
    /// `--takeover`.
    pub takeover: bool,
    /// `--socket`.
    pub socket: PathBuf,
    /// `--frames` per worker.
    pub frames: u32,
    /// `--heartbeat`.
    pub heartbeat: Duration,
    /// `--worker-user`.
    pub worker_user: Option<String>,
    /// `--strict`: a fall-back that was not asked for is exit 4.
    pub strict: bool,
}
