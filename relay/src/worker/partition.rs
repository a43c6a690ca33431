//! The four partitioners: which worker takes which flow, and which queues. Pure.
//!
//! | scheme | worker of a key | n → n+1 workers |
//! |---|---|---|
//! | flow hash | hash scaled to n (high half of hash × n, not hash % n) | about half the keys move |
//! | consistent | next of 160 points a worker on a circle | about 1/(n+1) of the keys move |
//! | range | contiguous interval of the key space | about half the keys move, each to the next worker |
//! | round robin | in turn, whatever the key | no key has a place; for work without order only |
//!
//! The relay uses them for queues → workers, where DECISIONS §1 leaves every scheme the identity, and for PACKET_FANOUT
//! (`supervisor/ports.rs`): flow-hash and round-robin are the kernel's own, consistent and range a [`table`] of buckets.
//! A flow's order survives a change of workers only if it is drained before it is moved: see [`Router`].
//! Must never depend on the process: the same key has the same worker in every run and on every machine.

use super::error::Error;
use std::net::IpAddr;
use std::ops::Range;

/// Points of each worker on the circle of [`Scheme::Consistent`].
pub const VIRTUAL_NODES: u32 = 160;

/// What `--partition` chooses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scheme {
    /// Hash of the flow.
    #[default]
    FlowHash,
    /// Consistent hashing.
    Consistent,
    /// Contiguous ranges.
    Range,
    /// In turn.
    RoundRobin,
}

/// A flow, as a receiver tells flows apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Sender.
    pub source: IpAddr,
    /// Destination.
    pub group: IpAddr,
    /// UDP destination port.
    pub port: u16,
}

impl Flow {
    /// A stable, well mixed 64-bit hash: FNV-1a over the bytes, finished by [`mix`].
    pub fn hash(&self) -> u64 {
        let bytes = |address: IpAddr| match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let all = bytes(self.source).into_iter().chain(bytes(self.group)).chain(self.port.to_be_bytes());
        mix(all.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)))
    }
}

/// The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit.
pub const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A scheme for a number of workers.
#[derive(Clone, Debug)]
pub struct Partitioner {
    scheme: Scheme,
    worker_count: u32,
    /// Points on the circle, sorted; empty unless consistent.
    circle: Vec<(u64, u32)>,
    turn: u32,
}

impl Partitioner {
    /// For `worker_count` workers, at least one.
    pub fn new(scheme: Scheme, worker_count: u32) -> Result<Self, Error> {
        if worker_count == 0 {
            return Err(Error::PartitionError("no workers to partition over"));
        }
        let points = if scheme == Scheme::Consistent { worker_count } else { 0 };
        let node = |worker: u32, node: u32| (mix(mix(u64::from(worker) + 1) ^ u64::from(node) << 32), worker);
        let mut circle: Vec<_> = (0..points).flat_map(|worker| (0..VIRTUAL_NODES).map(move |number| node(worker, number))).collect();
        circle.sort_unstable();
        Ok(Self { scheme, worker_count, circle, turn: 0 })
    }

    /// Worker of a key (a flow's hash; for ranges, any ordered key spread over 64 bits).
    pub fn worker(&mut self, key: u64) -> u32 {
        match self.scheme {
            // The high half of key × n: as uniform as a remainder, without a division, and monotone in the key.
            Scheme::Range => scale(key, self.worker_count),
            Scheme::FlowHash => scale(mix(key), self.worker_count),
            Scheme::Consistent => {
                let next = self.circle.partition_point(|(point, _)| *point < key);
                self.circle.get(next).or(self.circle.first()).map_or(0, |(_, worker)| *worker)
            }
            Scheme::RoundRobin => {
                let worker = self.turn;
                self.turn = (self.turn + 1) % self.worker_count;
                worker
            }
        }
    }

    /// Number of workers.
    pub const fn worker_count(&self) -> u32 {
        self.worker_count
    }

    /// Whether a key has a place of its own.
    pub const fn is_stable(&self) -> bool {
        !matches!(self.scheme, Scheme::RoundRobin)
    }
}

const fn scale(key: u64, count: u32) -> u32 {
    ((key as u128 * count as u128) >> 64) as u32
}

/// Queues of each worker: `queue_count` queues dealt out as the scheme says; every queue has exactly one worker.
pub fn queues(scheme: Scheme, worker_count: u32, queue_count: u32) -> Result<Vec<Vec<u32>>, Error> {
    let mut partitioner = Partitioner::new(scheme, worker_count)?;
    let mut dealt = vec![Vec::new(); worker_count as usize];
    for queue in 0..queue_count {
        let worker = match scheme {
            Scheme::Range => (u64::from(queue) * u64::from(worker_count) / u64::from(queue_count.max(1))) as u32,
            _ => partitioner.worker(mix(u64::from(queue) + 1)),
        };
        if let Some(queues) = dealt.get_mut(worker as usize) {
            queues.push(queue);
        }
    }
    Ok(dealt)
}

/// Workers of a small table's buckets: what the kernel's fan-out looks up for a flow. A worker may get no bucket of a table
/// that is small beside the number of workers. Round robin keeps no flow anywhere, so it has no table.
pub fn table<const BUCKETS: usize>(scheme: Scheme, worker_count: u32) -> Result<[u8; BUCKETS], Error> {
    let mut partitioner = Partitioner::new(scheme, worker_count)?;
    if !partitioner.is_stable() || worker_count > 256 {
        return Err(Error::PartitionError("a table needs at most 256 workers and a scheme that keeps flows together"));
    }
    let width = (1_u128 << 64) / BUCKETS.max(1) as u128;
    Ok(std::array::from_fn(|bucket| {
        let key = (bucket as u128 * width) as u64;
        let key = if scheme == Scheme::Consistent { mix(key.wrapping_add(1)) } else { key };
        // Contiguous buckets of a hash are as good as hashed ones, and evener.
        if scheme == Scheme::FlowHash { scale(key, worker_count) as u8 } else { partitioner.worker(key) as u8 }
    }))
}

/// Keys of a worker under [`Scheme::Range`]; `None` as the end means "to the last key".
pub fn interval(worker: u32, worker_count: u32) -> Range<u128> {
    let edge = |number: u32| (u128::from(number) << 64).div_ceil(u128::from(worker_count.max(1)));
    edge(worker)..edge(worker + 1)
}

/// Where a message of a flow goes during a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To this worker.
    To(u32),
    /// Its old worker is not drained yet: leave it where it is, and come again.
    Hold,
}

/// Routes flows, and changes the number of workers without reordering any of them.
///
/// A flow that moves is held until its old worker has said that it is drained; flows that stay are never held.
#[derive(Clone, Debug)]
pub struct Router {
    current: Partitioner,
    next: Option<Partitioner>,
    drained: Vec<bool>,
}

impl Router {
    /// Starts with `current`; a scheme without order (round robin) cannot promise what this type promises.
    pub fn new(current: Partitioner) -> Result<Self, Error> {
        let stable = current.is_stable();
        let router = Self { current, next: None, drained: Vec::new() };
        if stable { Ok(router) } else { Err(Error::PartitionError("round-robin keeps no order: use flow-hash, consistent or range")) }
    }

    /// Begins a change; refused while one is under way.
    pub fn begin(&mut self, next: Partitioner) -> Result<(), Error> {
        if self.next.is_some() || !next.is_stable() {
            return Err(Error::PartitionError("a change is under way, or the new scheme keeps no order"));
        }
        self.drained = vec![false; self.current.worker_count() as usize];
        self.next = Some(next);
        Ok(())
    }

    /// Where a message of the flow with this hash goes now.
    pub fn route(&mut self, key: u64) -> Route {
        let old = self.current.worker(key);
        let Some(next) = &mut self.next else { return Route::To(old) };
        let new = next.worker(key);
        let free = new == old || self.drained.get(old as usize).copied().unwrap_or(true);
        if free { Route::To(new) } else { Route::Hold }
    }

    /// `worker` has processed everything it was given before the change began. Says whether the change is complete.
    pub fn drained(&mut self, worker: u32) -> bool {
        if let Some(drained) = self.drained.get_mut(worker as usize) {
            *drained = true;
        }
        if self.drained.iter().all(|drained| *drained)
            && let Some(next) = self.next.take()
        {
            self.current = next;
        }
        self.next.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{HashMap, VecDeque};
    use std::net::Ipv4Addr;

    fn flows(count: u32) -> impl Iterator<Item = u64> {
        (0..count).map(|index| {
            let source = Ipv4Addr::from(0x0a00_0001 + index % 7).into();
            let group = Ipv4Addr::from(0xef01_0000 + index / 7).into();
            Flow { source, group, port: 5000 + (index % 3) as u16 }.hash()
        })
    }

    fn loads(scheme: Scheme, workers: u32, keys: impl Iterator<Item = u64>) -> Vec<f64> {
        let mut partitioner = Partitioner::new(scheme, workers).unwrap();
        let mut loads = vec![0.0; workers as usize];
        keys.for_each(|key| loads[partitioner.worker(key) as usize] += 1.0);
        loads
    }

    fn max_over_mean(loads: &[f64]) -> f64 {
        loads.iter().copied().fold(0.0, f64::max) / (loads.iter().sum::<f64>() / loads.len() as f64)
    }

    #[test]
    fn req_003_4_hash_and_circle_spread_ten_thousand_flows_evenly() {
        for workers in [2, 3, 4, 8] {
            let hashed = loads(Scheme::FlowHash, workers, flows(10_000));
            let mean = 10_000.0 / f64::from(workers);
            let chi_squared: f64 = hashed.iter().map(|load| (load - mean).powi(2) / mean).sum();
            // 99.9 % quantile of chi² with up to 7 degrees of freedom is 24.3.
            assert!(chi_squared < 24.3 && max_over_mean(&hashed) <= 1.1, "{workers}: {hashed:?} chi² {chi_squared}");
            let circle = loads(Scheme::Consistent, workers, flows(10_000));
            assert!(max_over_mean(&circle) <= 1.25, "{workers}: {circle:?}");
        }
    }

    #[test]
    fn req_003_4_one_more_worker_moves_few_keys_on_the_circle_and_half_by_hash() {
        for workers in 1..12 {
            let moved = |scheme| {
                let (mut before, mut after) = (Partitioner::new(scheme, workers).unwrap(), Partitioner::new(scheme, workers + 1).unwrap());
                flows(10_000).filter(|key| before.worker(*key) != after.worker(*key)).count() as f64 / 10_000.0
            };
            let fair = 1.0 / f64::from(workers + 1);
            assert!(moved(Scheme::Consistent) <= 1.3 * fair, "{workers}: {} of fair {fair}", moved(Scheme::Consistent));
            for scheme in [Scheme::FlowHash, Scheme::Range] {
                assert!((0.45..0.55).contains(&moved(scheme)), "{scheme:?}, {workers}: {}", moved(scheme));
            }
        }
    }

    #[test]
    fn a_worker_added_to_the_circle_takes_keys_and_moves_none_between_others() {
        let (mut before, mut after) = (Partitioner::new(Scheme::Consistent, 5).unwrap(), Partitioner::new(Scheme::Consistent, 6).unwrap());
        for key in flows(10_000) {
            let (old, new) = (before.worker(key), after.worker(key));
            assert!(new == old || new == 5);
        }
    }

    /// Computed independently (Python).
    #[test]
    fn the_hash_is_the_same_in_every_build() {
        let flow = Flow { source: "10.0.0.1".parse().unwrap(), group: "239.1.1.1".parse().unwrap(), port: 5000 };
        assert_eq!((flow.hash(), mix(1)), (0x8aba_89a2_692a_189d, 0x5692_161d_100b_05e5));
    }

    proptest! {
        #[test]
        fn req_003_4_ranges_are_contiguous_and_cover_every_key_once(workers in 1..40_u32, key: u64) {
            let mut partitioner = Partitioner::new(Scheme::Range, workers).unwrap();
            let owners: Vec<u32> = (0..workers).filter(|worker| interval(*worker, workers).contains(&u128::from(key))).collect();
            prop_assert_eq!(owners, [partitioner.worker(key)]);
            prop_assert!((1..workers).all(|worker| interval(worker - 1, workers).end == interval(worker, workers).start));
            prop_assert_eq!((interval(0, workers).start, interval(workers - 1, workers).end), (0, 1 << 64));
        }

        #[test]
        fn req_003_4_round_robin_differs_by_at_most_one(workers in 1..40_u32, count in 0..500_usize) {
            let loads = loads(Scheme::RoundRobin, workers, std::iter::repeat_n(7, count));
            let (min, max) = loads.iter().fold((f64::MAX, 0.0_f64), |(min, max), load| (min.min(*load), max.max(*load)));
            prop_assert!(max - min <= 1.0);
        }

        #[test]
        fn req_003_4_a_table_is_its_scheme(workers in 1..9_u32) {
            let of = |scheme| table::<64>(scheme, workers).unwrap();
            for scheme in [Scheme::FlowHash, Scheme::Consistent, Scheme::Range] {
                let loads: Vec<usize> = (0..workers).map(|worker| of(scheme).iter().filter(|of| u32::from(**of) == worker).count()).collect();
                prop_assert_eq!(loads.iter().sum::<usize>(), 64);
                prop_assert!(loads.iter().all(|load| *load > 0), "{:?}: {:?}", scheme, loads);
            }
            prop_assert!(of(Scheme::Range).is_sorted());
            let more = table::<64>(Scheme::Consistent, workers + 1).unwrap();
            let moved = of(Scheme::Consistent).into_iter().zip(more).filter(|(old, new)| old != new).collect::<Vec<_>>();
            prop_assert!(moved.iter().all(|(_, new)| u32::from(*new) == workers), "buckets move to the new worker alone");
            prop_assert!(table::<64>(Scheme::RoundRobin, workers).is_err());
        }

        #[test]
        fn every_queue_has_exactly_one_worker(workers in 1..20_u32, queue_count in 0..100_u32) {
            for scheme in [Scheme::FlowHash, Scheme::Consistent, Scheme::Range, Scheme::RoundRobin] {
                let mut all: Vec<u32> = queues(scheme, workers, queue_count).unwrap().into_iter().flatten().collect();
                all.sort_unstable();
                prop_assert_eq!(all, (0..queue_count).collect::<Vec<_>>());
            }
            let equal = queues(Scheme::Range, workers, workers).unwrap();
            prop_assert!(equal.iter().enumerate().all(|(worker, queues)| queues == &[worker as u32]), "DECISIONS §1: worker w owns queue w");
        }

        /// 003.12: order, as a property.
        #[test]
        fn req_003_5_a_flow_keeps_its_order_over_changes_of_workers(
            changes in proptest::collection::vec((1..6_u32, any::<bool>()), 1..6), steps in proptest::collection::vec(0..64_u64, 1..400)
        ) {
            let mut router = Router::new(Partitioner::new(Scheme::FlowHash, 3).unwrap()).unwrap();
            let mut queues: Vec<VecDeque<(u64, u64)>> = vec![VecDeque::new(); 6];
            let (mut sent, mut seen, mut held) = (HashMap::new(), HashMap::new(), VecDeque::new());
            let mut old_count = 3;
            let mut changes = changes.into_iter();
            for (step, flow) in steps.iter().enumerate() {
                if step % 40 == 0 && let Some((count, consistent)) = changes.next() {
                    let scheme = if consistent { Scheme::Consistent } else { Scheme::FlowHash };
                    if router.begin(Partitioner::new(scheme, count).unwrap()).is_ok() {
                        // Drain lazily: each old worker says so when its queue was seen empty below.
                        let marks: Vec<u32> = (0..old_count).collect();
                        for worker in marks.into_iter().rev() {
                            // In between, more arrives: routed before this worker is drained.
                            let number = sent.entry(*flow).or_insert(0_u64);
                            held.push_back((*flow, *number));
                            *number += 1;
                            deliver(&mut router, &mut queues, &mut held);
                            queues[worker as usize].drain(..).for_each(|(flow, number)| check(&mut seen, flow, number));
                            router.drained(worker);
                        }
                        old_count = count;
                    }
                }
                let number = sent.entry(*flow).or_insert(0);
                held.push_back((*flow, *number));
                *number += 1;
                deliver(&mut router, &mut queues, &mut held);
                let busiest = step % 6;
                if let Some((flow, number)) = queues[busiest].pop_front() { check(&mut seen, flow, number) }
            }
            deliver(&mut router, &mut queues, &mut held);
            queues.iter_mut().flat_map(|queue| queue.drain(..)).for_each(|(flow, number)| check(&mut seen, flow, number));
            prop_assert!(held.is_empty());
            prop_assert_eq!(seen, sent);
        }
    }

    fn check(seen: &mut HashMap<u64, u64>, flow: u64, number: u64) {
        let next = seen.entry(flow).or_insert(0);
        assert_eq!(*next, number, "flow {flow} out of order");
        *next += 1;
    }

    /// Hands on what may go; a flow with something held stays behind it.
    fn deliver(router: &mut Router, queues: &mut [VecDeque<(u64, u64)>], held: &mut VecDeque<(u64, u64)>) {
        for _ in 0..held.len() {
            let Some((flow, number)) = held.pop_front() else { return };
            match router.route(mix(flow)) {
                Route::To(worker) => queues[worker as usize].push_back((flow, number)),
                Route::Hold => held.push_back((flow, number)),
            }
        }
    }
}
