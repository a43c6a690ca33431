//! Layouts of the lab object: the programs of benchmarks and tests, never of a relay.

/// Bytes a generated packet may have.
pub const TEMPLATE_LEN: usize = 2048;
/// Sockets (queues) of `LAB_XSKS` and entries of `LAB_DEVICES`.
pub const LAB_SLOTS: u32 = 64;

/// Value of map `LAB_TEMPLATE` (array, one entry): what `lab_generate` writes into every packet. 2080 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Template {
    /// Bytes of the packet, at most [`TEMPLATE_LEN`]. Must be the length of the test run's input.
    pub len: u32,
    /// Where the sequence number (u64, big-endian, from `LAB_SEQUENCE` of this CPU) is written; 0: nowhere. Even.
    pub sequence_offset: u32,
    /// Where the checksum that covers sequence number and time stands; 0: leave it as the template has it.
    pub checksum_offset: u32,
    /// That checksum for sequence number 0 and time 0, host order.
    pub checksum: u32,
    /// Where the time of sending (u64, big-endian, ns: CLOCK_MONOTONIC and [`Pace::clock_ns`]) is written; 0: nowhere. Even.
    pub stamp_offset: u32,
    /// Flows that the packets (untagged IPv4 without options) are of by turns; 0 or 1: one.
    pub flows: u32,
    /// In what they differ: [`VARY_SOURCE_PORT`] or [`VARY_GROUP`].
    pub vary: u32,
    /// Always 0.
    pub zero: u32,
    /// The packet, with sequence number 0 and time 0.
    pub bytes: [u8; TEMPLATE_LEN],
}

const _: () = assert!(size_of::<Template>() == 2080);

/// [`Template::vary`]: flow n has the template's source port + n.
pub const VARY_SOURCE_PORT: u32 = 0;
/// [`Template::vary`]: flow n has the template's destination address + n, and its group's MAC address.
pub const VARY_GROUP: u32 = 1;
/// From one packet's flow to the next's: a prime, so that all have their turn, in an order that no cache can guess.
pub const FLOW_STEP: u32 = 7919;

/// Value of map `LAB_PACE` (array, one entry): when `lab_generate` sends. Times are CLOCK_MONOTONIC, ns. 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// Between two packets; 0: no pace, every packet of the test run is sent.
    pub interval_ns: u64,
    /// When the next packet is due; written by the program.
    pub next_ns: u64,
    /// From then on nothing is sent; 0 with an interval: nothing is sent at all.
    pub until_ns: u64,
    /// What a stamp adds to CLOCK_MONOTONIC.
    pub clock_ns: u64,
}

const _: () = assert!(size_of::<Pace>() == 32);

/// A time without a packet, in map `LAB_SILENCES` (array): the first element has when the last packet came and how many follow. Times
/// are CLOCK_MONOTONIC, ns. 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Silence {
    /// When it began; of the first element, when the last packet came, 0: none has.
    pub begin_ns: u64,
    /// How long it was; of the first element, how many there have been.
    pub len_ns: u64,
}

const _: () = assert!(size_of::<Silence>() == 16);

/// Elements of `LAB_SILENCES`; what comes when it is full is counted only.
pub const SILENCES: u32 = 4096;
/// What is shorter is none, ns.
pub const SILENCE_NS: u64 = 500_000;

/// A paced generator that fell behind by more than this leaves out what it missed: no burst afterwards.
pub const CATCH_UP_NS: u64 = 1_000_000;
