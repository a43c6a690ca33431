//! `relay run`: the options of the supervisor, checked as far as that needs no privilege, then its loop.

use super::failure::Failure;
use super::values::{self, CpuList};
use super::{Context, OK, Outcome, rules};
use crate::nic::afpacket::Engines;
use crate::supervisor::RunError;
use crate::supervisor::options::{BackendChoice, Options, PipelineChoice, WaitChoice, XdpMode, ZeroCopyChoice};
use crate::supervisor::storing::{self, Given};
use crate::worker::partition::Scheme;
use crate::{metrics, supervisor};
use clap::Args;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

const BACKENDS: &[(&str, BackendChoice)] =
    &[("auto", BackendChoice::Auto), ("kernel", BackendChoice::Kernel), ("xsk", BackendChoice::Xsk), ("packet", BackendChoice::Packet)];
const XDP_MODES: &[(&str, XdpMode)] = &[("auto", XdpMode::Auto), ("native", XdpMode::Native), ("generic", XdpMode::Generic)];
const ZERO_COPY: &[(&str, ZeroCopyChoice)] = &[("auto", ZeroCopyChoice::Auto), ("on", ZeroCopyChoice::On), ("off", ZeroCopyChoice::Off)];
const PIPELINES: &[(&str, PipelineChoice)] =
    &[("auto", PipelineChoice::Auto), ("fused", PipelineChoice::Fused), ("split", PipelineChoice::Split)];
const WAITS: &[(&str, WaitChoice)] = &[("spin", WaitChoice::Spin), ("adaptive", WaitChoice::Adaptive), ("poll", WaitChoice::Poll)];
const IO_URING: &[(&str, Engines)] = &[("auto", Engines::Best), ("off", Engines::PlainOnly)];
const PARTITIONS: &[(&str, Scheme)] =
    &[("flow-hash", Scheme::FlowHash), ("consistent", Scheme::Consistent), ("range", Scheme::Range), ("round-robin", Scheme::RoundRobin)];

/// Arguments of `relay run`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Rules from a TOML file (read again on SIGHUP)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A rule, as one line (repeatable)
    #[arg(long = "rule", value_name = "RULE")]
    rules: Vec<String>,
    /// Path for packets; auto: the best that each interface offers
    #[arg(long, value_parser = values::choice(BACKENDS), default_value = "auto")]
    backend: BackendChoice,
    /// How XDP attaches; auto: native, else the packet path (generic only when asked for)
    #[arg(long, value_parser = values::choice(XDP_MODES), default_value = "auto")]
    xdp_mode: XdpMode,
    /// Zero copy where the driver can, or insisted on, or never
    #[arg(long, value_parser = values::choice(ZERO_COPY), default_value = "auto")]
    zero_copy: ZeroCopyChoice,
    /// One thread for receiving and sending, or two; auto: one, unless three CPUs or more are allowed
    #[arg(long, value_parser = values::choice(PIPELINES), default_value = "auto")]
    pipeline: PipelineChoice,
    /// Worker processes; each serves one queue of every interface
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(relay_common::MAX_QUEUES)))]
    workers: u32,
    /// CPUs for the workers, such as 0,2-3 [default: the inherited affinity]
    #[arg(long, value_name = "LIST", value_parser = values::cpu_list)]
    cpus: Option<CpuList>,
    /// How flows are dealt out to several workers
    #[arg(long, value_parser = values::choice(PARTITIONS), default_value = "flow-hash")]
    partition: Scheme,
    /// Engine of the packet path; off: recvmmsg and sendmmsg
    #[arg(long, value_parser = values::choice(IO_URING), default_value = "auto")]
    io_uring: Engines,
    /// What a worker does when idle
    #[arg(long, value_parser = values::choice(WAITS), default_value = "adaptive")]
    wait: WaitChoice,
    /// Keep a second process for each worker, which stands in for it by itself: a shorter silence when one dies, for its memory
    #[arg(long)]
    spare: bool,
    /// How long everything forwards on without a supervisor, and can be taken over; 0: not at all
    #[arg(long, value_name = "DURATION", default_value = "0", value_parser = values::duration)]
    linger: Duration,
    /// Let rules of the kernel path forward on without a supervisor for as long as it takes, until --takeover or `relay stop`
    #[arg(long)]
    keep_kernel_path: bool,
    /// Go on in the place of the relay with the same --socket, dead or alive, without losing a packet; an ordinary start if there is
    /// none. It must have --linger or --keep-kernel-path, or a service manager that keeps its descriptors
    #[arg(long)]
    takeover: bool,
    /// Serve metrics in the Prometheus text format at this address; a port alone is on the loopback (9464)
    #[arg(long, value_name = "ADDR", value_parser = values::listen_address)]
    metrics: Option<SocketAddr>,
    /// Frames of packet memory per worker, 2 KiB each, a power of two
    #[arg(long, value_name = "N", default_value = "32768", value_parser = values::frames)]
    frames: u32,
    /// How often a worker shows that it lives
    #[arg(long, value_name = "DURATION", default_value = "100ms", value_parser = values::period)]
    heartbeat: Duration,
    /// User the workers run as [default: relay-worker, else uid 65534]
    #[arg(long, value_name = "USER")]
    worker_user: Option<String>,
    /// Make a fall-back that was not asked for an error (exit code 4)
    #[arg(long)]
    strict: bool,
}

/// Checks the arguments and runs the supervisor until it is told to stop.
pub(super) fn run(args: RunArgs, given: Given, context: &Context) -> Outcome {
    let metrics = args.metrics;
    let options = options(args, context)?;
    let mut store = storing::open(&options, given);
    let inheritance = if options.takeover { supervisor::takeover::begin(&options, store.as_mut()).map_err(failure)? } else { None };
    match metrics.map(|address| serve_metrics(address, context)) {
        // Too late to refuse: nobody else supervises any more.
        Some(Err(error)) if inheritance.is_some() => tracing::error!(error = %error.message, "no metrics"),
        Some(Err(error)) => return Err(error),
        Some(Ok(())) | None => {}
    }
    supervisor::run(options, inheritance, store).map_err(failure)?;
    Ok(OK)
}

/// A supervisor's error, as a command's.
pub(super) fn failure(error: RunError) -> Failure {
    let (field, hint) = (error.field().to_string(), error.hint().to_string());
    Failure::new(error.exit_code(), error.to_string()).field(field).hint(hint)
}

/// Before the supervisor, so that an address that is taken changes nothing; until the relay runs, scrapes get 503.
fn serve_metrics(address: SocketAddr, context: &Context) -> Result<(), Failure> {
    let bound = metrics::server::start(address, &context.global.socket).map_err(|error| {
        Failure::bad_input(format!("{address}: {error}"))
            .field("--metrics")
            .hint("name a free address of this host, such as 127.0.0.1:9464")
    })?;
    tracing::info!(address = %bound, "metrics");
    if !bound.ip().is_loopback() {
        tracing::warn!(address = %bound, "metrics are readable from the network");
    }
    Ok(())
}

fn options(args: RunArgs, context: &Context) -> Result<Options, Failure> {
    let cpus = args.cpus.map(|CpuList(cpus)| cpus);
    check_cpus(cpus.as_deref().unwrap_or_default())?;
    let rules = rules::given(&args.rules)?;
    // Whether a bad file matters to a successor, the take-over finds out.
    if !args.takeover {
        rules::check_together(args.config.as_deref(), &rules)?;
    }
    Ok(Options {
        config: args.config,
        rules,
        backend: args.backend,
        xdp_mode: args.xdp_mode,
        zero_copy: args.zero_copy,
        pipeline: args.pipeline,
        workers: args.workers,
        cpus,
        partition: args.partition,
        io_uring: args.io_uring,
        wait: args.wait,
        spare: args.spare,
        linger: args.linger,
        keep_kernel_path: args.keep_kernel_path,
        takeover: args.takeover,
        socket: context.global.socket.clone(),
        frames: args.frames,
        heartbeat: args.heartbeat,
        worker_user: args.worker_user,
        strict: args.strict,
    })
}

/// A worker could not be pinned to a CPU that this process may not use.
fn check_cpus(asked: &[usize]) -> Result<(), Failure> {
    if asked.is_empty() {
        return Ok(());
    }
    let allowed = sched_getaffinity(Pid::from_raw(0)).map_err(|error| Failure::new(1, format!("sched_getaffinity: {error}")))?;
    match asked.iter().find(|cpu| !allowed.is_set(**cpu).unwrap_or(false)) {
        None => Ok(()),
        Some(cpu) => Err(Failure::bad_input(format!("CPU {cpu} is not allowed here"))
            .field("--cpus")
            .hint(format!("allowed are {}", list_of(&allowed)))),
    }
}

/// `0-3,8` of a set.
fn list_of(set: &CpuSet) -> String {
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect();
    let runs = cpus.chunk_by(|before, after| before + 1 == *after);
    let words = runs.filter_map(|run| match (run.first()?, run.last()?) {
        (first, last) if first == last => Some(first.to_string()),
        (first, last) => Some(format!("{first}-{last}")),
    });
    words.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_reads_as_the_list_that_makes_it() {
        let mut set = CpuSet::new();
        for cpu in [0, 1, 2, 5, 7, 8] {
            set.set(cpu).expect("in range");
        }
        assert_eq!(list_of(&set), "0-2,5,7-8");
        assert_eq!(values::cpu_list(&list_of(&set)).map(|list| list.0), Ok(vec![0, 1, 2, 5, 7, 8]));
    }
}
