//! Counters and health in the Prometheus text format, version 0.0.4.
//!
//! Made from what `relay status`, `relay stats` and `relay rule list` answer, so that all four agree. One drop reason is one label
//! value. A counter that never moved is left out where it has a `reason` (10,000 rules have 200,000 of them). Written here and not
//! by prometheus-client, which writes OpenMetrics only: promtool and older scrapers take its counters as untyped. Pure but for
//! [`server`]; must never touch a kernel object or the data path. Names and labels are a contract: docs/metrics.md.

pub mod server;

use crate::control::message::{
    FrameStats, InterfaceStats, OutputStats, RuleInfo, RuleStats, SpareInfo, Stats, Status, WorkerInfo, WorkerLatency, octaves,
};
use std::collections::BTreeMap;
use std::fmt::Write;

/// A page of families.
#[derive(Debug, Default)]
struct Page(String);

/// Label names with their values.
type Labels<'a> = [(&'a str, &'a str)];

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &Labels<'_>, value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (at, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"{}\"", if at == 0 { '{' } else { ',' }, escaped(text));
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// A family of one counter for each item.
    fn counters<T>(&mut self, name: &str, help: &str, items: &[T], each: impl Fn(&T, &mut dyn FnMut(&Labels<'_>, u64))) {
        self.family(name, "counter", help);
        for item in items {
            each(item, &mut |labels, value| self.sample(name, labels, value));
        }
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }
}

/// Backslash, quote and line break, as the format wants them.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The page of one scrape.
pub fn render(status: &Status, stats: &Stats, rules: &[RuleInfo]) -> String {
    let mut page = Page::default();
    daemon(&mut page, status);
    workers(&mut page, status);
    latency(&mut page, &stats.latency);
    interfaces(&mut page, status, &stats.interfaces);
    rule_facts(&mut page, rules);
    rule_counters(&mut page, &stats.rules);
    outputs(&mut page, &stats.rules);
    frames(&mut page, &stats.frames);
    page.0
}

fn daemon(page: &mut Page, status: &Status) {
    page.family("relay_build_info", "gauge", "Always 1; the version is the label.");
    page.sample("relay_build_info", &[("version", &status.version)], 1);
    page.gauge("relay_uptime_seconds", "Since the supervisor started.", status.supervisor.uptime_ms as f64 / 1000.0);
    page.gauge("relay_rules", "Rules in force.", status.rules);
    page.gauge("relay_epoch", "Epoch of the rule snapshot; grows with every change.", status.epoch);
}

fn workers(page: &mut Page, status: &Status) {
    page.family("relay_worker_running", "gauge", "1 while the worker forwards, else 0; the state is a label.");
    for worker in &status.workers {
        let labels = [("worker", worker.id.to_string()), ("state", worker.state.clone())];
        page.sample("relay_worker_running", &labels.each_ref().map(|(k, v)| (*k, v.as_str())), u8::from(worker.state == "run"));
    }
    page.counters("relay_worker_restarts_total", "Replacements of this worker.", &status.workers, |worker, emit| {
        emit(&[("worker", &worker.id.to_string())], worker.restarts);
    });
    spares(page, &status.workers);
    page.family("relay_worker_heartbeat_age_seconds", "gauge", "Since the worker last showed that it lives.");
    for worker in &status.workers {
        page.sample("relay_worker_heartbeat_age_seconds", &[("worker", &worker.id.to_string())], worker.heartbeat_age_ms as f64 / 1000.0);
    }
}

/// Only where there are any.
fn spares(page: &mut Page, workers: &[WorkerInfo]) {
    let spares: Vec<(String, &SpareInfo)> = workers.iter().filter_map(|one| Some((one.id.to_string(), one.spare.as_ref()?))).collect();
    if spares.is_empty() {
        return;
    }
    page.family("relay_spare_ready", "gauge", "1 while the worker has a spare that has everything.");
    for (worker, spare) in &spares {
        page.sample("relay_spare_ready", &[("worker", worker)], u8::from(spare.state == "ready"));
    }
    page.counters("relay_spare_promotions_total", "Times that a spare has stood in for the worker.", &spares, |(worker, spare), emit| {
        emit(&[("worker", worker)], spare.promotions);
    });
    page.counters("relay_spare_deaths_total", "Spares that died before they stood in.", &spares, |(worker, spare), emit| {
        emit(&[("worker", worker)], spare.deaths);
    });
}

/// Every power of two is an `le`, also those below the first packet: a histogram's buckets must be the same in every scrape.
fn latency(page: &mut Page, workers: &[WorkerLatency]) {
    const NAME: &str = "relay_worker_latency_seconds";
    page.family(NAME, "histogram", "How long packets were in the worker, from the receive ring to the kernel's hands.");
    for one in workers {
        let worker = one.worker.to_string();
        let up_to = |limit: u64| {
            let below = one.buckets.iter().filter(|(end, _)| end.is_some_and(|end| end <= limit));
            below.fold(0u64, |sum, (_, count)| sum.saturating_add(*count))
        };
        for end in octaves() {
            page.sample(&format!("{NAME}_bucket"), &[("worker", &worker), ("le", &seconds(end))], up_to(end));
        }
        page.sample(&format!("{NAME}_bucket"), &[("worker", &worker), ("le", "+Inf")], one.packets);
        page.sample(&format!("{NAME}_sum"), &[("worker", &worker)], seconds(one.sum_ns));
        page.sample(&format!("{NAME}_count"), &[("worker", &worker)], one.packets);
    }
}

fn seconds(ns: u64) -> String {
    (ns as f64 / 1e9).to_string()
}

/// Name, help, and which counter of an interface.
type Total = (&'static str, &'static str, fn(&InterfaceStats) -> u64);
/// The same for counters by reason.
type Reasons = (&'static str, &'static str, fn(&InterfaceStats) -> &BTreeMap<String, u64>);

fn interfaces(page: &mut Page, status: &Status, stats: &[InterfaceStats]) {
    page.family("relay_interface_info", "gauge", "Always 1; how the interface is driven is in the labels.");
    for info in &status.interfaces {
        page.sample("relay_interface_info", &[("interface", &info.name), ("backend", &info.backend), ("driver", &info.driver)], 1);
    }
    let plain: [Total; 4] = [
        ("relay_interface_rx_packets_total", "Packets taken from the interface for the relay.", |one| one.rx_packets),
        ("relay_interface_rx_bytes_total", "Their bytes, from the Ethernet header on.", |one| one.rx_bytes),
        ("relay_interface_tx_packets_total", "Packets sent out of the interface.", |one| one.tx_packets),
        ("relay_interface_tx_bytes_total", "Their bytes, from the Ethernet header on.", |one| one.tx_bytes),
    ];
    for (name, help, value) in plain {
        page.counters(name, help, stats, |one, emit| emit(&[("interface", &one.name)], value(one)));
    }
    let by_reason: [Reasons; 2] = [
        ("relay_interface_dropped_packets_total", "Packets lost before a rule could take them, by reason.", |one| &one.drops),
        ("relay_interface_passed_packets_total", "Packets XDP left to the kernel, by reason.", |one| &one.passed_by),
    ];
    for (name, help, reasons) in by_reason {
        page.counters(name, help, stats, |one, emit| {
            for (reason, count) in reasons(one) {
                emit(&[("interface", &one.name), ("reason", reason)], *count);
            }
        });
    }
}

fn rule_facts(page: &mut Page, rules: &[RuleInfo]) {
    page.family("relay_rule_info", "gauge", "Always 1; the rule's path and engine are in the labels.");
    for rule in rules {
        page.sample("relay_rule_info", &[("rule", &rule.id), ("path", &rule.path), ("engine", &rule.engine)], 1);
    }
    page.family("relay_rule_joined", "gauge", "1 while the relay's own membership of the rule's group stands, else 0.");
    for rule in rules {
        page.sample("relay_rule_joined", &[("rule", &rule.id)], u8::from(rule.joined));
    }
}

fn rule_counters(page: &mut Page, rules: &[RuleStats]) {
    page.counters("relay_rule_rx_packets_total", "Packets the rule took.", rules, |rule, emit| {
        emit(&[("rule", &rule.id)], rule.rx_packets)
    });
    page.counters("relay_rule_rx_bytes_total", "Their bytes, from the Ethernet header on.", rules, |rule, emit| {
        emit(&[("rule", &rule.id)], rule.rx_bytes);
    });
    page.counters("relay_rule_dropped_packets_total", "Packets of the rule that reached no output, by reason.", rules, |rule, emit| {
        for (reason, count) in &rule.drops {
            emit(&[("rule", &rule.id), ("reason", reason)], *count);
        }
    });
}

fn outputs(page: &mut Page, rules: &[RuleStats]) {
    let each = |rule: &RuleStats, value: fn(&OutputStats) -> u64, emit: &mut dyn FnMut(&Labels<'_>, u64)| {
        for output in &rule.outputs {
            let index = output.index.to_string();
            emit(&[("rule", &rule.id), ("output", &index), ("egress", &output.egress), ("to", &output.to)], value(output));
        }
    };
    page.counters("relay_output_tx_packets_total", "Packets sent for the output.", rules, |rule, emit| {
        each(rule, |one| one.tx_packets, emit)
    });
    page.counters("relay_output_tx_bytes_total", "Their bytes, from the Ethernet header on.", rules, |rule, emit| {
        each(rule, |one| one.tx_bytes, emit);
    });
    page.counters("relay_output_dropped_packets_total", "Packets the output did not get, by reason.", rules, |rule, emit| {
        for output in &rule.outputs {
            let index = output.index.to_string();
            for (reason, count) in &output.drops {
                let labels =
                    [("rule", rule.id.as_str()), ("output", &index), ("egress", &output.egress), ("to", &output.to), ("reason", reason)];
                emit(&labels, *count);
            }
        }
    });
}

fn frames(page: &mut Page, frames: &FrameStats) {
    page.family("relay_frames", "gauge", "Frames of packet memory by place; the places add up to all there are.");
    let places = frames.places();
    for (place, count) in places {
        page.sample("relay_frames", &[("place", place)], count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::message::WorkerInfo;

    #[test]
    fn a_histogram_is_cumulative_and_ends_with_its_count() {
        let buckets = vec![(Some(288), 3), (Some(512), 2), (Some(640), 1), (None, 4)];
        let one = WorkerLatency { worker: 1, packets: 10, sum_ns: 2_500_000_000, buckets, ..WorkerLatency::default() };
        let mut page = Page::default();
        latency(&mut page, &[one]);
        for line in [
            "_bucket{worker=\"1\",le=\"0.000000256\"} 0",
            "_bucket{worker=\"1\",le=\"0.000000512\"} 5",
            "_bucket{worker=\"1\",le=\"0.000001024\"} 6",
            "_bucket{worker=\"1\",le=\"1.073741824\"} 6",
            "_bucket{worker=\"1\",le=\"+Inf\"} 10",
            "_sum{worker=\"1\"} 2.5",
            "_count{worker=\"1\"} 10",
        ] {
            assert!(page.0.contains(&format!("\nrelay_worker_latency_seconds{line}\n")), "{line}: {}", page.0);
        }
    }

    #[test]
    fn a_page_has_every_family_once_and_samples_under_it() {
        let drops = BTreeMap::from([("no_frame".to_owned(), 3)]);
        let output = OutputStats { index: 0, egress: "eth1".into(), to: "keep".into(), tx_packets: 7, tx_bytes: 700, drops };
        let stats = Stats {
            interfaces: vec![InterfaceStats { name: "eth0".into(), rx_packets: 10, ..InterfaceStats::default() }],
            rules: vec![RuleStats { id: "a\"b\\".into(), rx_packets: 10, outputs: vec![output], ..RuleStats::default() }],
            ..Stats::default()
        };
        let status = Status { workers: vec![WorkerInfo { state: "run".into(), ..WorkerInfo::default() }], ..Status::default() };
        let page = render(&status, &stats, &[]);
        let types: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let names: std::collections::BTreeSet<&str> = types.iter().filter_map(|line| line.split(' ').next()).collect();
        assert_eq!(names.len(), types.len());
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap();
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name);
            assert!(names.contains(family), "{line}");
        }
        assert!(page.contains("relay_rule_rx_packets_total{rule=\"a\\\"b\\\\\"} 10\n"), "{page}");
        let dropped =
            "relay_output_dropped_packets_total{rule=\"a\\\"b\\\\\",output=\"0\",egress=\"eth1\",to=\"keep\",reason=\"no_frame\"} 3\n";
        assert!(page.contains(dropped), "{page}");
        assert!(page.contains("relay_worker_running{worker=\"0\",state=\"run\"} 1\n"), "{page}");
    }
}
