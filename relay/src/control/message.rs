//! What client and supervisor say to each other, and the JSON that `--json` prints (INTERFACE.md).
//!
//! Plain data: must never hold behaviour. Keys are a contract; add, never rename.

use crate::plan::latency::Buckets;
pub use crate::plan::latency::octaves;
pub use crate::plan::status::FrameStats;
pub use crate::plan::tap::Point;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of this protocol; a server refuses another major.
pub const PROTOCOL_VERSION: u32 = 1;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Add one rule (text form).
    RuleAdd {
        /// The line.
        rule: String,
    },
    /// Delete one rule.
    RuleDel {
        /// Its id.
        id: String,
    },
    /// List the rules.
    RuleList,
    /// Health.
    Status,
    /// Counters.
    Stats,
    /// Shared-memory channels.
    Channels,
    /// Make the running set equal to these lines.
    Apply {
        /// The lines of the new set.
        rules: Vec<String>,
        /// Only say what would change.
        dry_run: bool,
    },
    /// Write the running set to a file (the supervisor's `--config` where `None`).
    RuleSave {
        /// Absolute path.
        file: Option<String>,
    },
    /// Capture packets, or go on with it: must come again within [`CAPTURE_LEASE`]. The first answer brings the workers' tap
    /// rings as descriptors (read-only, in the order of `workers`); packets are shown from the second request on, so that the
    /// client has opened the rings by then.
    Capture {
        /// What the first answer gave; `None` the first time.
        lease: Option<u64>,
        /// Only this rule.
        rule: Option<String>,
        /// Where to look.
        points: Vec<Point>,
        /// Bytes of each packet.
        snaplen: u32,
        /// The epoch of the names that the client has.
        epoch: Option<u64>,
        /// Meanwhile a worker carries the rules that would be on the kernel path, where the path is the relay's own choice.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        by_worker: bool,
    },
    /// Ends a capture before its lease runs out.
    CaptureEnd {
        /// Which.
        lease: u64,
    },
    /// Stop as on SIGTERM.
    Shutdown,
}

/// A capture that is not renewed ends after so long.
pub const CAPTURE_LEASE: std::time::Duration = std::time::Duration::from_secs(3);

/// What the supervisor answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", content = "body", rename_all = "snake_case")]
pub enum Response {
    /// Done; the id of the rule concerned, or what changed, in words.
    Done(String),
    /// Answer to [`Request::RuleList`].
    Rules(Vec<RuleInfo>),
    /// Answer to [`Request::Status`].
    Status(Box<Status>),
    /// Answer to [`Request::Stats`].
    Stats(Box<Stats>),
    /// Answer to [`Request::Channels`].
    Channels(Box<Channels>),
    /// Answer to [`Request::Apply`].
    Changes(Changes),
    /// Answer to [`Request::Capture`].
    Capture(Box<Capture>),
    /// Refused: nothing was changed.
    Error(ErrorBody),
}

/// What [`Request::Apply`] changes, or would change, as rule lines in canonical text. A changed rule is removed and added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// Rules that come.
    pub added: Vec<String>,
    /// Rules that go.
    pub removed: Vec<String>,
    /// Rules that stay as they are.
    pub unchanged: u64,
}

/// `{"error":{…}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// Exit code of the command (INTERFACE.md).
    pub code: u8,
    /// One line.
    pub message: String,
    /// The field at fault, or empty.
    pub field: String,
    /// The remedy, or empty.
    pub hint: String,
}

/// A rule as it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleInfo {
    /// Name.
    pub id: String,
    /// Canonical text.
    pub rule: String,
    /// `kernel`, `xsk`, `packet` or `pending`.
    pub path: String,
    /// `tx`, `coalesce`, `uring`, `plain` or empty.
    pub engine: String,
    /// Why this path.
    pub reason: String,
    /// Whether the relay's join stands.
    pub joined: bool,
    /// How long ago the ingress interface last heard a membership query (IGMP or MLD, by the rule's family); none yet.
    #[serde(default)]
    pub query_age_ms: Option<u64>,
    /// What outputs wait for, in words: `output N: why`.
    #[serde(default)]
    pub pending: Vec<String>,
    /// Packets of the rule expire by TTL while others go out: another relay may send them back.
    #[serde(default)]
    pub loop_suspected: bool,
}

/// `relay status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The relay's version.
    pub version: String,
    /// The supervisor process.
    pub supervisor: SupervisorInfo,
    /// Interfaces of the rules.
    pub interfaces: Vec<InterfaceInfo>,
    /// Workers.
    pub workers: Vec<WorkerInfo>,
    /// Rules in force.
    pub rules: u64,
    /// Epoch of the rule snapshot.
    pub epoch: u64,
}

/// The supervisor in [`Status`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SupervisorInfo {
    /// Process id.
    pub pid: u32,
    /// Since start.
    pub uptime_ms: u64,
    /// Effective capabilities by name.
    pub capabilities: Vec<String>,
    /// Process id of the keeper, 0 without `--linger`.
    #[serde(default)]
    pub keeper: u32,
    /// Descriptors in the service manager's store, 0 without one.
    #[serde(default)]
    pub stored: usize,
}

/// An interface in [`Status`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct InterfaceInfo {
    /// Name.
    pub name: String,
    /// `af_xdp_zero_copy af_xdp_copy af_xdp_generic af_packet af_packet_plain`, or `none` while it is missing.
    pub backend: String,
    /// Why this rung.
    pub reason: String,
    /// Driver name.
    pub driver: String,
    /// Queues served.
    pub queues: u32,
    /// Whether rules take packets here.
    pub ingress: bool,
    /// Whether rules send here.
    pub egress: bool,
    /// What sending said last: `up`, `down` or `gone`.
    pub sending: String,
    /// Packets the kernel refused for good; by output they are `send_failed` and `output_down` in `relay stats`.
    pub refused: u64,
    /// Wake-ups that failed with an error that is neither benign nor a state of the interface.
    pub kick_errors: u64,
    /// `up down no_carrier missing`.
    #[serde(default)]
    pub link: String,
    /// Its MTU in bytes.
    #[serde(default)]
    pub mtu: u32,
}

/// A worker in [`Status`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerInfo {
    /// Number.
    pub id: u32,
    /// Process id; 0 between two processes.
    pub pid: u32,
    /// `boot run halt fail degraded`.
    pub state: String,
    /// CPU it is pinned to, or -1.
    pub cpu: i32,
    /// Replacements so far.
    pub restarts: u64,
    /// How the last one ended, in words; empty for none.
    pub last_exit: String,
    /// Age of the last heartbeat.
    pub heartbeat_age_ms: u64,
    /// `fused` or `split`.
    pub pipeline: String,
    /// `spin`, `adaptive` or `poll`.
    pub wait: String,
    /// Uid it runs as.
    pub uid: u32,
    /// Its spare, with `--spare`.
    #[serde(default)]
    pub spare: Option<SpareInfo>,
}

/// The spare of a worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpareInfo {
    /// Process id; 0 if there is none now.
    pub pid: u32,
    /// `none boot ready`. There is one from the worker's first packets on.
    pub state: String,
    /// Times that one has stood in.
    pub promotions: u64,
    /// Spares that died before.
    pub deaths: u64,
}

/// `relay stats`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Per interface.
    pub interfaces: Vec<InterfaceStats>,
    /// Per rule.
    pub rules: Vec<RuleStats>,
    /// Where the frames are, all workers together.
    pub frames: FrameStats,
    /// How long packets were in each worker.
    #[serde(default)]
    pub latency: Vec<WorkerLatency>,
}

/// How long packets were in a worker: from the receive ring to the kernel's hands, once for each output. Percentiles are ends of
/// buckets, which are no wider than an eighth of what they hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerLatency {
    /// Number of the worker.
    pub worker: u32,
    /// Packets measured.
    pub packets: u64,
    /// Sum of their times.
    pub sum_ns: u64,
    /// Half of them took no longer; 0 without packets.
    pub p50_ns: u64,
    /// 99 %.
    pub p99_ns: u64,
    /// 99.9 %.
    pub p999_ns: u64,
    /// Buckets that hold any: where each ends (none: nowhere), and how many packets.
    pub buckets: Buckets,
}

/// An interface's counters. `rx_packets == Σ rules' rx_packets of this ingress (deleted rules under `retired`) + Σ drops`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStats {
    /// Name.
    pub name: String,
    /// Packets taken from the interface for the relay (redirected, or accepted by the packet path).
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Packets XDP left to the kernel (0 where no XDP runs).
    pub passed: u64,
    /// `passed` by reason.
    pub passed_by: BTreeMap<String, u64>,
    /// Packets lost before a rule could take them, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Packets counted by rules of this ingress that have been deleted since.
    pub retired: u64,
    /// Packets sent out of this interface.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
}

/// A rule's counters. Per output: `tx_packets + Σ drops == rx_packets − Σ rule drops`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleStats {
    /// Name.
    pub id: String,
    /// Packets the rule took.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Packets dropped for all outputs, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Per output.
    pub outputs: Vec<OutputStats>,
}

/// An output's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputStats {
    /// Position in the rule, from 0.
    pub index: u32,
    /// Interface.
    pub egress: String,
    /// Destination `ADDR:PORT` as rewritten, or `keep`.
    pub to: String,
    /// Packets handed to the kernel, or on the way there, and not refused by it.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Packets this output did not get, by reason.
    pub drops: BTreeMap<String, u64>,
}

/// What a capture needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capture {
    /// Names the capture in later requests.
    pub lease: u64,
    /// Epoch of the names below.
    pub epoch: u64,
    /// Numbers of the workers, in the order of the descriptors.
    pub workers: Vec<u32>,
    /// Interfaces by port number.
    pub ports: Vec<CapturePort>,
    /// The rules, if the client's names are of another epoch.
    pub rules: Option<Vec<CaptureRule>>,
    /// Rules whose packets no worker sees, since the XDP program sends them itself: the first [`UNSEEN_NAMED`] of them.
    pub unseen: Vec<String>,
    /// How many of them there are.
    pub unseen_count: u64,
    /// Some of them are on their way to a worker.
    #[serde(default)]
    pub moving: bool,
}

/// An interface as records name it, by its place in the list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturePort {
    /// Name.
    pub name: String,
    /// Whether rules take packets here.
    pub ingress: bool,
    /// Whether rules send here.
    pub egress: bool,
}

/// Rules named in [`Capture::unseen`] at most.
pub const UNSEEN_NAMED: usize = 8;

/// A rule as its records name it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureRule {
    /// Slot in the rules segment.
    pub slot: u32,
    /// Epoch at which it was installed.
    pub serial: u32,
    /// Name.
    pub id: String,
    /// Its outputs, in order: interface and destination.
    pub outputs: Vec<String>,
}

/// `relay channels`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channels {
    /// One for each channel and worker.
    pub channels: Vec<ChannelInfo>,
    /// The memory that they lie in, with everything else that workers share with the supervisor.
    pub segments: Vec<SegmentInfo>,
}

/// A channel in [`Channels`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelInfo {
    /// `control`, `status`, `rules`, `return`, or `egress IFACE`.
    pub name: String,
    /// `control status rules return egress`.
    pub kind: String,
    /// Number of the worker.
    pub worker: u32,
    /// Bytes of the channel, or of the segment that is one.
    pub memory_bytes: u64,
    /// Slots.
    pub capacity: u64,
    /// Messages sent and not received.
    pub depth: u64,
    /// Most of them at any look of the supervisor (at least 20 a second).
    pub high_water: u64,
    /// Messages sent.
    pub sent: u64,
    /// Messages received.
    pub received: u64,
    /// Messages that found no room.
    pub dropped: u64,
    /// Messages overwritten before the reader came.
    pub overruns: u64,
}

/// A segment in [`Channels`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentInfo {
    /// Name in /proc/PID/maps.
    pub name: String,
    /// Number of the worker; none: all of them.
    pub worker: Option<u32>,
    /// Bytes of address space; what is touched takes memory.
    pub memory_bytes: u64,
}
