//! `relay status`: health, backends and why, workers.

use super::output::{self, Mood, Output, count, duration, lines, number, text};
use super::{Context, OK, Outcome, unexpected};
use crate::control::message::{InterfaceInfo, Request, Response, SpareInfo, Status, WorkerInfo};

/// Asks and prints.
pub(super) fn run(context: &Context) -> Outcome {
    match context.ask(&Request::Status)? {
        Response::Status(status) => context.output.facts(&status, |output| page(&status, output)).map(|()| OK),
        other => Err(unexpected(&other)),
    }
}

fn page(status: &Status, output: &Output) -> String {
    let supervisor = &status.supervisor;
    let (up, rules) = (duration(supervisor.uptime_ms), count(status.rules, "rule"));
    let mut page = format!("relay {}  pid {}  up {up}  {rules}  epoch {}\n", status.version, supervisor.pid, status.epoch);
    page += &format!(
        "capabilities: {}\n\n",
        if supervisor.capabilities.is_empty() { "none".into() } else { supervisor.capabilities.join(" ") }
    );
    if supervisor.keeper != 0 {
        page += &format!("keeper: pid {}\n\n", supervisor.keeper);
    }
    if supervisor.stored != 0 {
        page += &format!("service manager keeps: {}\n\n", count(supervisor.stored as u64, "descriptor"));
    }
    page + &interfaces(&status.interfaces, output) + "\n" + &workers(&status.workers, output)
}

fn interfaces(interfaces: &[InterfaceInfo], output: &Output) -> String {
    if interfaces.is_empty() {
        return "no interfaces, because there are no rules\n".into();
    }
    let mut table = output::table(&["INTERFACE", "ROLE", "BACKEND", "QUEUES", "DRIVER", "REASON"]);
    for interface in interfaces {
        let mood = if interface.backend == "none" { Mood::Bad } else { Mood::Good };
        let backend = output.state(&interface.backend, mood);
        let (queues, reason) = (number(interface.queues), text(&interface.reason));
        table.add_row([text(&interface.name), text(role(interface)), backend, queues, text(&interface.driver), reason]);
    }
    lines(&mut table) + &troubles(interfaces)
}

/// One line for each interface that would not send.
fn troubles(interfaces: &[InterfaceInfo]) -> String {
    let line = |interface: &InterfaceInfo| {
        let InterfaceInfo { name, sending, refused, kick_errors, .. } = interface;
        let is_well = matches!(sending.as_str(), "" | "up") && *refused == 0 && *kick_errors == 0;
        (!is_well).then(|| format!("{name}: sending is {sending}, {refused} refused, {kick_errors} wake-up errors\n"))
    };
    interfaces.iter().filter_map(line).collect()
}

fn role(interface: &InterfaceInfo) -> &'static str {
    match (interface.ingress, interface.egress) {
        (true, true) => "in, out",
        (true, false) => "in",
        (false, true) => "out",
        (false, false) => "",
    }
}

fn workers(workers: &[WorkerInfo], output: &Output) -> String {
    let mut table = output::table(&["WORKER", "STATE", "PID", "UID", "CPU", "LOOP", "BEAT", "RESTARTS"]);
    for worker in workers {
        table.add_row([
            number(worker.id),
            output.state(&worker.state, mood(&worker.state)),
            number(worker.pid),
            number(worker.uid),
            if worker.cpu < 0 { text("any") } else { number(worker.cpu) },
            text(format!("{} {}", worker.pipeline, worker.wait).trim()),
            text(&duration(worker.heartbeat_age_ms)),
            text(&restarts(worker)),
        ]);
    }
    lines(&mut table) + &workers.iter().filter_map(spare).collect::<String>()
}

/// What stands ready for a worker, and how often that was used.
fn spare(worker: &WorkerInfo) -> Option<String> {
    let SpareInfo { pid, state, promotions, deaths } = worker.spare.as_ref()?;
    let present = if *pid == 0 { "no spare yet".into() } else { format!("spare {pid} {state}") };
    let deaths = if *deaths == 0 { String::new() } else { format!(", {deaths} died") };
    Some(format!("worker {}: {present}, stood in {promotions} times{deaths}\n", worker.id))
}

/// `0`, or `2, last: killed by SIGSEGV`.
fn restarts(worker: &WorkerInfo) -> String {
    let last = if worker.last_exit.is_empty() { String::new() } else { format!(", last: {}", worker.last_exit) };
    format!("{}{last}", worker.restarts)
}

fn mood(state: &str) -> Mood {
    match state {
        "run" => Mood::Good,
        "boot" | "halt" => Mood::Warning,
        _ => Mood::Bad,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::message::SupervisorInfo;

    #[test]
    fn a_page_fits_80_columns() {
        let status = Status {
            version: "0.1.0".into(),
            supervisor: SupervisorInfo {
                pid: 12_345,
                uptime_ms: 3_723_000,
                capabilities: vec!["cap_bpf".into(), "cap_net_admin".into()],
                keeper: 0,
                stored: 0,
            },
            interfaces: vec![InterfaceInfo {
                name: "eth0".into(),
                backend: "af_xdp_copy".into(),
                reason: "native XDP".into(),
                driver: "veth".into(),
                queues: 1,
                ingress: true,
                ..InterfaceInfo::default()
            }],
            workers: vec![WorkerInfo {
                pid: 12_346,
                state: "run".into(),
                cpu: 1,
                heartbeat_age_ms: 12,
                pipeline: "fused".into(),
                wait: "adaptive".into(),
                uid: 65_534,
                ..WorkerInfo::default()
            }],
            rules: 1,
            epoch: 7,
        };
        let page = page(&status, &Output::new(false));
        assert_eq!(
            page,
            "relay 0.1.0  pid 12345  up 1 h 2 min  1 rule  epoch 7\n\
             capabilities: cap_bpf cap_net_admin\n\
             \n\
             INTERFACE  ROLE  BACKEND      QUEUES  DRIVER  REASON\n\
             eth0       in    af_xdp_copy       1  veth    native XDP\n\
             \n\
             WORKER  STATE  PID    UID    CPU  LOOP            BEAT   RESTARTS\n\
             \u{20}    0  run    12346  65534    1  fused adaptive  12 ms  0\n"
        );
        assert!(page.lines().all(|line| line.len() <= 80));
        let sick = InterfaceInfo { name: "eth1".into(), sending: "down".into(), refused: 7, ..InterfaceInfo::default() };
        assert_eq!(troubles(&[sick, InterfaceInfo::default()]), "eth1: sending is down, 7 refused, 0 wake-up errors\n");
    }
}
