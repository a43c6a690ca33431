//! Many producers, without a multi-producer queue: each has a channel of its own (which is also the cheapest, 000.8).
//!
//! [`Aggregator`] reads many channels in turn (the supervisor over its workers' status); [`Shards`] spreads over many by key
//! (an ingress over egress stages). Library API, for users of the crate:
//!
//! ```
//! use relay::ring::Received;
//! use relay::shm::patterns::{Aggregator, Shards};
//! use relay::shm::{ChannelError, Reader, Writer, channel::duplicate};
//! use std::os::fd::AsFd;
//!
//! // One channel for each producer; whoever reads them all maps them read-only.
//! let writers = [Writer::<u64>::create("a", 64)?, Writer::create("b", 64)?];
//! let readers = writers.iter().map(|writer| Reader::<u64>::open(duplicate(writer.as_fd())?)).collect::<Result<Vec<_>, ChannelError>>()?;
//! let mut aggregator = Aggregator::new(readers);
//! let mut shards = Shards::new(writers.into()).expect("two of them");
//! for key in 0..10_u64 {
//!     shards.send(key, &key).expect("not gated");
//! }
//! let mut sum = 0;
//! while aggregator.round(4, |_channel, found| if let Received::Message(key) = found { sum += key }) > 0 {}
//! assert_eq!(sum, 45);
//! # Ok::<(), ChannelError>(())
//! ```
//! Must never let one busy channel starve the others, nor reorder one key's messages.

use super::channel::{Reader, Writer};
use crate::ring::{Behind, Received};
use bytemuck::Pod;

/// Reads one channel for each producer, fairly.
#[derive(Debug, Default)]
pub struct Aggregator<T: Pod> {
    readers: Vec<Reader<T>>,
}

impl<T: Pod> Aggregator<T> {
    /// Reads `readers`, which are numbered in this order.
    pub const fn new(readers: Vec<Reader<T>>) -> Self {
        Self { readers }
    }

    /// The readers, by number.
    pub const fn readers(&mut self) -> &mut Vec<Reader<T>> {
        &mut self.readers
    }

    /// One round: at most `quota` messages or overruns of each channel, given to `take` with the channel's number.
    /// Says how many there were.
    pub fn round(&mut self, quota: usize, mut take: impl FnMut(usize, Received<T>)) -> usize {
        let mut count = 0;
        for (number, reader) in self.readers.iter_mut().enumerate() {
            for _ in 0..quota {
                match reader.receive() {
                    Received::Empty => break,
                    found => take(number, found),
                }
                count += 1;
            }
        }
        count
    }
}

/// Writes one of several channels, chosen by a hash of the key: one key, one channel, in order.
#[derive(Debug)]
pub struct Shards<T: Pod> {
    writers: Vec<Writer<T>>,
}

impl<T: Pod> Shards<T> {
    /// Writes to `writers`; `None` if there are none.
    pub fn new(writers: Vec<Writer<T>>) -> Option<Self> {
        (!writers.is_empty()).then_some(Self { writers })
    }

    /// The channel of a key's hash.
    pub fn shard(&self, hash: u64) -> usize {
        (hash % self.writers.len() as u64) as usize
    }

    /// Sends to the channel of the key's hash.
    pub fn send(&mut self, hash: u64, message: &T) -> Result<(), Behind> {
        let shard = self.shard(hash);
        self.writers.get_mut(shard).map_or(Ok(()), |writer| writer.send(message))
    }
}
