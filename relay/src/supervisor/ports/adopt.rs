//! Ports that another supervisor opened: what is kept of them, and how they are taken over.
//!
//! Must never make or bind a socket.

use super::{Port, PortSockets, Ports, Way, ring_sizes};
use crate::keeper::{Entry, Role, Table};
use crate::nic::afxdp::ledger::PortLedger;
use crate::supervisor::error::RunError;
use crate::supervisor::handover::Handover;
use crate::supervisor::interfaces::Interface;
use crate::supervisor::options::Options;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};

/// The rungs by name.
const BACKENDS: [&str; 5] = ["af_xdp_copy", "af_xdp_zero_copy", "af_xdp_generic", "af_packet", "none"];

/// A port, as a successor has to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptPort {
    /// Interface name.
    pub name: String,
    /// The interface when the port was made.
    pub ifindex: u32,
    /// AF_XDP, or AF_PACKET.
    pub xsk: bool,
    /// Name of the rung.
    pub backend: String,
    /// Why this rung.
    pub reason: String,
    /// Rules take packets here.
    pub ingress: bool,
    /// Rules send here.
    pub egress: bool,
    /// Rules send super-frames here.
    pub coalesce: bool,
    /// The program is on the interface.
    pub attached: bool,
    /// It can receive and send.
    pub live: bool,
    /// Its interface is gone, and the workers have its frames still.
    pub retired: bool,
    /// It has no sockets since there are no workers.
    pub workerless: bool,
    /// What sockets that are gone had dropped.
    pub past_drops: [u64; 2],
}

impl KeptPort {
    /// Whether its interface is the one it was. The rings of one that is gone can't be looked into any more.
    pub fn is_unchanged(&self, known: &BTreeMap<String, Interface>) -> bool {
        !self.retired && (!self.live || known.get(&self.name).is_some_and(|facts| facts.ifindex == self.ifindex))
    }

    fn adopt(
        &self,
        table: &mut Table,
        (number, workers): (usize, usize),
        known: &BTreeMap<String, Interface>,
        frames: u32,
    ) -> Result<Port, RunError> {
        let backend = BACKENDS.into_iter().find(|name| *name == self.backend);
        let backend = backend.ok_or_else(|| RunError::failure(format!("{} is no backend of this program", self.backend)))?;
        let mut sockets = Vec::new();
        for worker in 0..if self.live && !self.workerless { workers } else { 0 } {
            let key = format!("{number}/{worker}");
            let receive = table.take(Role::Receive, &key).map_err(RunError::failure)?;
            let ledger = if self.xsk { Some(PortLedger::open(&receive, ring_sizes(frames)).map_err(RunError::failure)?) } else { None };
            sockets.push(PortSockets {
                receive,
                send: table.take(Role::Send, &key).ok(),
                coalesce: table.take(Role::Coalesce, &key).ok(),
                ledger,
            });
        }
        let facts = known.get(&self.name).filter(|facts| facts.ifindex == self.ifindex).cloned();
        Ok(Port {
            name: self.name.clone(),
            way: if self.xsk { Way::Xsk } else { Way::Packet },
            facts: facts.unwrap_or_else(|| Interface { ifindex: self.ifindex, name: self.name.clone(), ..Interface::default() }),
            backend,
            reason: self.reason.clone(),
            ingress: self.ingress,
            egress: self.egress,
            coalesce: self.coalesce,
            sockets,
            attached: self.attached,
            retired: false,
            workerless: self.workerless,
            past_drops: self.past_drops,
        })
    }
}

impl Ports {
    /// The ports of a table.
    pub fn adopt(options: &Options, table: &mut Table, handover: &Handover, known: &BTreeMap<String, Interface>) -> Result<Self, RunError> {
        let workers = handover.workers.len();
        let ports = handover.ports.iter().enumerate();
        let list = ports.map(|(number, port)| port.adopt(table, (number, workers), known, options.frames)).collect::<Result<_, _>>()?;
        Ok(Self { list, sizes: Some(ring_sizes(options.frames)), refused: BTreeMap::new(), burials: handover.burials })
    }

    /// What the keeper is to hold.
    pub fn keep<'a>(&'a self, entries: &mut Vec<(Entry, BorrowedFd<'a>)>) {
        for (number, port) in self.list.iter().enumerate() {
            for (worker, sockets) in port.sockets.iter().enumerate() {
                let sockets = [
                    (Role::Receive, Some(&sockets.receive)),
                    (Role::Send, sockets.send.as_ref()),
                    (Role::Coalesce, sockets.coalesce.as_ref()),
                ];
                let there = sockets.into_iter().filter_map(|(role, fd)| Some((role, fd?.as_fd())));
                entries.extend(there.map(|(role, fd)| (Entry::new(role, format!("{number}/{worker}")), fd)));
            }
        }
    }

    /// What a successor has to know: the ports, and how often some were let go of.
    pub fn describe(&self) -> (Vec<KeptPort>, u32) {
        let describe = |port: &Port| KeptPort {
            name: port.name.clone(),
            ifindex: port.facts.ifindex,
            xsk: port.way == Way::Xsk,
            backend: port.backend.into(),
            reason: port.reason.clone(),
            ingress: port.ingress,
            egress: port.egress,
            coalesce: port.coalesce,
            attached: port.attached,
            live: port.is_live(),
            retired: port.retired,
            workerless: port.workerless,
            past_drops: port.past_drops,
        };
        (self.list.iter().map(describe).collect(), self.burials)
    }
}
