//! How long packets were in a worker: a histogram in its status segment, and what can be said from it.
//!
//! ```text
//! word 0 sum of all times, ns · 1 packets below 256 ns · 2.. eight to a power of two up to 2^30 ns · the last: longer than that
//! ```
//! So a bucket is no wider than an eighth of what it holds, and all of them together are 1.4 KB. One writer: the egress thread. Pure;
//! must never trust a count: a worker may write what it likes, so sums stop at the largest number.

/// The first bucket ends at this power of two, ns.
const MIN_LOG: u32 = 8;
/// The last but one ends at this one.
const MAX_LOG: u32 = 30;
/// Buckets to a power of two, as a power of two.
const STEPS_LOG: u32 = 3;
const BUCKETS: usize = 2 + ((MAX_LOG - MIN_LOG) << STEPS_LOG) as usize;
/// Words of a histogram.
pub const WORDS: usize = 1 + BUCKETS;
/// The word of the sum.
pub const SUM: usize = 0;

/// The word that counts packets which took so long.
#[inline]
pub const fn word_of(ns: u64) -> usize {
    if ns >> MIN_LOG == 0 {
        return 1;
    }
    let log = ns.ilog2();
    if log >= MAX_LOG {
        return WORDS - 1;
    }
    let step = (ns >> (log - STEPS_LOG)) & ((1 << STEPS_LOG) - 1);
    2 + ((log - MIN_LOG) << STEPS_LOG) as usize + step as usize
}

/// Where the bucket of a word ends, ns; `None`: nowhere.
const fn end_of(word: usize) -> Option<u64> {
    match word {
        0 | 1 => Some(1 << MIN_LOG),
        _ if word >= WORDS - 1 => None,
        _ => {
            let (log, step) = (MIN_LOG + ((word as u32 - 2) >> STEPS_LOG), (word as u64 - 2) & ((1 << STEPS_LOG) - 1));
            Some(((1 << STEPS_LOG) + step + 1) << (log - STEPS_LOG))
        }
    }
}

/// Ends of coarser buckets, ns: powers of two.
pub fn octaves() -> impl Iterator<Item = u64> {
    (MIN_LOG..=MAX_LOG).map(|log| 1 << log)
}

/// Buckets with packets in them: where each ends (`None`: nowhere), and how many.
pub type Buckets = Vec<(Option<u64>, u64)>;

/// What stands in a histogram's words.
pub fn buckets(words: &[u64]) -> Buckets {
    words.iter().enumerate().skip(1).filter(|(_, count)| **count > 0).map(|(word, count)| (end_of(word), *count)).collect()
}

/// Packets in all buckets.
pub fn total(buckets: &[(Option<u64>, u64)]) -> u64 {
    buckets.iter().fold(0, |sum, (_, count)| sum.saturating_add(*count))
}

/// What came to a histogram since an earlier look at it.
pub fn since(now: &[(Option<u64>, u64)], before: &[(Option<u64>, u64)]) -> Buckets {
    let earlier = |end| before.iter().find(|(other, _)| *other == end).map_or(0, |(_, count)| *count);
    now.iter().map(|(end, count)| (*end, count.saturating_sub(earlier(*end)))).collect()
}

/// So long, ns, or up to an eighth less, was the longest time of this share of the packets; `None` without packets. Times beyond the
/// last bucket's beginning count as that.
pub fn quantile(buckets: &[(Option<u64>, u64)], share: f64) -> Option<u64> {
    let total = total(buckets);
    let rank = ((share * total as f64).ceil() as u64).clamp(1, total.max(1));
    let mut sum = 0u64;
    let found = buckets.iter().find(|(_, count)| {
        sum = sum.saturating_add(*count);
        sum >= rank
    });
    found.map(|(end, _)| end.unwrap_or(1 << MAX_LOG))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_has_one_bucket_no_wider_than_an_eighth() {
        for ns in (0..5_000).chain((8..31).flat_map(|log| [(1 << log) - 1, 1 << log, (1 << log) + 1, 3 << log])).chain([u64::MAX]) {
            let word = word_of(ns);
            assert!((1..WORDS).contains(&word), "{ns}");
            let begin = if word == 1 { 0 } else { end_of(word - 1).unwrap() };
            assert!(ns >= begin && end_of(word).is_none_or(|end| ns < end), "{ns}: {begin} to {:?}", end_of(word));
            assert!(word == 1 || end_of(word).is_none_or(|end| (end - begin) * 8 <= begin), "{ns}");
        }
        assert_eq!((word_of(0), word_of(u64::MAX), end_of(WORDS - 2)), (1, WORDS - 1, Some(1 << 30)));
        let ends: Vec<u64> = (1..WORDS).filter_map(end_of).collect();
        assert!(ends.is_sorted() && octaves().all(|octave| ends.contains(&octave)));
    }

    #[test]
    fn quantiles_are_the_ends_of_their_buckets() {
        let mut words = vec![0; WORDS];
        for (ns, count) in [(1_000, 900), (10_000, 90), (5_000_000, 9), (u64::MAX, 1)] {
            words[word_of(ns)] += count;
        }
        let buckets = buckets(&words);
        let at = |share| quantile(&buckets, share).unwrap();
        assert_eq!((buckets.len(), total(&buckets)), (4, 1_000));
        assert_eq!((at(0.0), at(0.5), at(0.9), at(0.99), at(0.999), at(1.0)), (1_024, 1_024, 1_024, 10_240, 5_242_880, 1 << 30));
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(quantile(&[(Some(256), u64::MAX), (None, u64::MAX)], 1.0), Some(256), "what a hostile worker writes overflows nothing");
        let later = super::buckets(&words.iter().map(|count| count * 2).collect::<Vec<_>>());
        assert_eq!((since(&later, &buckets), since(&buckets, &later).iter().map(|(_, count)| count).sum::<u64>()), (buckets.clone(), 0));
    }
}
