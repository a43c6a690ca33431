//! A dead worker whose memory is damaged: its journals and its pool hold anything. Nothing may panic, hang, or leave the memory.
//!
//! What is sent after that may be wrong, and frames may be missing: that is for the ledger to show. Deterministic, as
//! `ring/hostile.rs`; a life takes longer than a ring's, so that there are a hundred times fewer by default.

use super::*;
use crate::ring::hostile::{Random, inputs};

/// Words of a journal that say how much of what there is; what they speak of stands behind them.
const HEAD: usize = 256;

/// Overwrites up to four halves of words within `len` bytes at `at`.
fn damage(random: &mut Random, world: &World, (at, len): (usize, usize)) {
    for _ in 0..=random.next() % 4 {
        let offset = at + (random.next() as usize % (len / 4)) * 4;
        let (value, word) = (random.value() as u32, SharedArray::<u32>::new(&world.work, offset, 1).unwrap());
        // Half of them one bit beside what was right.
        word.set(0, if random.next() & 1 == 0 { value } else { word.get(0) ^ 1 << (value % 32) });
    }
}

/// Where the damage goes: mostly where the counts are.
fn place(random: &mut Random, world: &World) -> (usize, usize) {
    let layout = &world.layout;
    match random.next() % 8 {
        0..=2 => (layout.ingress_journal, HEAD),
        3 => (layout.ingress_journal, 16 * 1024),
        4 | 5 => (layout.egress_journal, HEAD),
        _ => (layout.pool, Pool::bytes(FRAMES) & !3),
    }
}

#[test]
fn a_damaged_journal_is_finished_or_left_alone() {
    let mut random = Random(0x5eed_9876_5432_1abc);
    let worlds =
        [World::new(single(), [true; PORTS], arrivals()), World::new(four([1, 2, 3, 1]), [true; PORTS], arrivals()), bundling([1; 4])];
    let fresh: Vec<Snapshot> = worlds.iter().map(World::save).collect();
    let (mut armed, mut damaged) = (0, 0);
    for _ in 0..inputs() / 100 {
        let which = random.next() as usize % worlds.len();
        let (world, schedule) = (&worlds[which], [FUSED, LATE, SPLIT][random.next() as usize % 3]);
        world.restore(&fresh[which]);
        if world.live(Some(random.next() % 400), schedule) {
            continue;
        }
        let at = place(&mut random, world);
        damage(&mut random, world, at);
        damaged += 1;
        let table = world.table();
        let mut worker = world.start();
        armed += u64::from(worker.ingress.journal.armed().packet_count > 0);
        for _ in 0..8 {
            world.wires[0].borrow_mut().deliver(&world.umem, WAVE);
            worker.ingress.turn(&table, true);
            worker.egress.turn();
        }
    }
    assert!(damaged > inputs() / 200 && armed > damaged / 2, "of {} {damaged} met a dead worker, {armed} one with a batch", inputs() / 100);
}
