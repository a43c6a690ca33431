//! The words both sides of the kernel boundary speak: map names, key and value layouts, counters.
//!
//! Shared by `relay-ebpf` (no_std, BPF target) and `relay` (user space). It must never use std, allocate, or hold
//! logic: a type here is bytes with a documented shape. Every struct is `repr(C)` without padding, asserted below.
#![no_std]

pub mod edit;
pub mod kernel;
pub mod lab;

/// Interfaces one relay serves (slots of per-interface counters).
pub const MAX_INTERFACES: u32 = 64;
/// Slots of `COUNTERS`: one per interface, and [`NO_CONFIG_SLOT`].
pub const COUNTER_SLOTS: u32 = MAX_INTERFACES + 1;
/// Slot of `COUNTERS` that counts packets of interfaces without a configuration.
pub const NO_CONFIG_SLOT: u32 = MAX_INTERFACES;
/// Receive queues per interface that can have a socket; `XSKS` index = `slot * MAX_QUEUES + queue`.
pub const MAX_QUEUES: u32 = 64;
/// Shapes (distinct combinations of family, tag mode, group length, port mode) one ingress may use.
pub const MAX_SHAPES: usize = 16;
/// Entries of the exact-match table.
pub const MAX_MATCHES: u32 = 32_768;
/// Entries of the source prefix table.
pub const MAX_SOURCES: u32 = 65_536;

/// `MatchKey::tag` of a packet without a tag, or with a priority tag (VLAN id 0) only.
pub const TAG_NONE: u32 = 0;
/// `Shape::tag_mode`: the key holds the packet's tags (`outer | inner << 16`, 0 = untagged).
pub const TAG_EXACT: u8 = 0;
/// `Shape::tag_mode`: the key's tag is 0, whatever the packet has.
pub const TAG_ANY: u8 = 1;
/// `Shape::port_mode`: the key holds the destination port.
pub const PORT_EXACT: u8 = 0;
/// `Shape::port_mode`: the key's port is 0.
pub const PORT_ANY: u8 = 1;
/// A `slot` that names no rule: pass.
pub const NO_SLOT: u32 = u32::MAX;
/// Flag in `RedirectMeta::flags`: the UDP checksum holds only the pseudo-header sum (CHECKSUM_PARTIAL).
pub const META_PARTIAL: u32 = 1;

/// One probe of the match table. Shape: `family, tag_mode, group_len, port_mode`, 4 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape {
    /// 4 or 6.
    pub family: u8,
    /// [`TAG_EXACT`] or [`TAG_ANY`].
    pub tag_mode: u8,
    /// Prefix length of the destination, 0–32 or 0–128.
    pub group_len: u8,
    /// [`PORT_EXACT`] or [`PORT_ANY`].
    pub port_mode: u8,
}

/// Own addresses of one family that [`IngressConfig`] holds.
pub const MAX_OWN: usize = 4;

/// Value of map `INGRESS` (hash, key: ifindex u32). 160 bytes. Absent: every packet passes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IngressConfig {
    /// Slot of the interface in `COUNTERS` and `XSKS`, below [`MAX_INTERFACES`].
    pub slot: u32,
    /// Shapes in use, in order of precedence.
    pub shape_count: u32,
    /// Probed in order; the first hit decides.
    pub shapes: [Shape; MAX_SHAPES],
    /// 1: rules of this interface may have plans (`RULE_PLANS`).
    pub kernel: u32,
    /// Always 0.
    pub zero: u32,
    /// The interface's own IPv4 addresses, network order; 0: none. A packet from one of them is a loop. Kernel path only.
    pub own4: [u32; MAX_OWN],
    /// The same for IPv6; all 0: none.
    pub own6: [[u32; 4]; MAX_OWN],
}

/// Key of map `MATCHES` (hash). 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MatchKey {
    /// Ingress interface.
    pub ifindex: u32,
    /// `outer | inner << 16` VLAN ids, [`TAG_NONE`] without tags or where the shape ignores them.
    pub tag: u32,
    /// Destination masked to the shape's length, network order, IPv4 in the first 4 bytes, rest 0.
    pub addr: [u8; 16],
    /// Destination port, host order; 0 where the shape ignores it.
    pub port: u16,
    /// Always 0.
    pub zero: u16,
    /// The shape, so that entries of different shapes never collide.
    pub shape: Shape,
}

/// Value of map `MATCHES`. 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatchEntry {
    /// Rule slot for any source not found in `source_set`; [`NO_SLOT`]: go on with the next shape.
    pub slot: u32,
    /// Epoch at which that slot's rule was installed.
    pub serial: u32,
    /// Set number for the lookup in `SOURCES`; 0: no source matters.
    pub source_set: u32,
    /// Always 0.
    pub zero: u32,
}

/// Bits of a whole [`SourceKey`]: the prefix length of a lookup. A prefix of `n` address bits is stored with `32 + n`.
pub const SOURCE_KEY_BITS: u32 = 160;

/// Key data of map `SOURCES` (LPM trie; prefix length counts these 160 bits). 20 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SourceKey {
    /// Set number, network order (so that the trie compares it first), from [`MatchEntry::source_set`].
    pub set: [u8; 4],
    /// Source, network order, IPv4 in the first 4 bytes, rest 0.
    pub addr: [u8; 16],
}

/// Value of map `SOURCES`. 8 bytes. `slot` = [`NO_SLOT`]: `except`, pass without a further lookup.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceVerdict {
    /// Rule slot or [`NO_SLOT`].
    pub slot: u32,
    /// Epoch at which that slot's rule was installed.
    pub serial: u32,
}

/// What XDP puts before the packet (`bpf_xdp_adjust_meta`) on a redirect. 16 bytes, directly before the packet's first byte.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RedirectMeta {
    /// Always [`META_MAGIC`]; user space treats anything else as "no hint".
    pub magic: u32,
    /// Rule slot.
    pub slot: u32,
    /// Epoch at which that slot's rule was installed.
    pub serial: u32,
    /// Reserved for [`META_PARTIAL`]; 0.
    pub flags: u32,
}

/// First word of [`RedirectMeta`].
pub const META_MAGIC: u32 = 0x5245_4c41;

/// Counter of map `COUNTERS` (per-CPU array, index `slot * XdpCounter::COUNT + counter`). 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CounterValue {
    /// Packets.
    pub packets: u64,
    /// Bytes, of the whole packet with its Ethernet header, fragments included.
    pub bytes: u64,
}

macro_rules! xdp_counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),+ $(,)?) => {
        /// Every verdict of the XDP program, one counter each. Exactly one of them counts each packet.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum XdpCounter { $($(#[$doc])* $variant),+ }

        impl XdpCounter {
            /// All counters, in index order.
            pub const ALL: &'static [XdpCounter] = &[$(XdpCounter::$variant),+];
            /// Number of counters per interface.
            pub const COUNT: u32 = Self::ALL.len() as u32;
            /// The name in JSON, metrics and tables.
            pub const fn name(self) -> &'static str {
                match self { $(XdpCounter::$variant => $name),+ }
            }
        }
    };
}

xdp_counters! {
    /// Handed to a socket.
    Redirected = "redirected",
    /// Taken by the kernel path: sent, or dropped by a reason of its rule or outputs.
    Kernel = "kernel",
    /// No rule matches: the kernel stack's packet.
    PassNoRule = "no_rule",
    /// A rule's `except` names the source.
    PassExcept = "except",
    /// A rule matches but no socket stands in the slot (no worker yet, or a queue without a socket).
    PassNoSocket = "no_socket",
    /// Neither IPv4 nor IPv6 (ARP, LLDP, …).
    PassNotIp = "not_ip",
    /// IGMP: the kernel answers queries.
    PassIgmp = "igmp",
    /// ICMPv6, MLD among it.
    PassIcmpv6 = "icmpv6",
    /// ICMP.
    PassIcmp = "icmp",
    /// PIM.
    PassPim = "pim",
    /// Another transport than UDP.
    PassNotUdp = "not_udp",
    /// A fragment, first or later: never guessed at.
    PassFragment = "fragment",
    /// IPv6 extension header before UDP.
    PassExtension = "extension_header",
    /// More than two VLAN tags.
    PassTagDepth = "tag_depth",
    /// Shorter than its headers say, or lengths that contradict each other.
    PassMalformed = "malformed",
    /// The packet came in by an interface without a configuration.
    PassNoConfig = "no_config",
}

const _: () = {
    assert!(size_of::<Shape>() == 4);
    assert!(size_of::<IngressConfig>() == 160);
    assert!(size_of::<MatchKey>() == 32);
    assert!(size_of::<MatchEntry>() == 16);
    assert!(size_of::<SourceKey>() == 20);
    assert!(size_of::<SourceVerdict>() == 8);
    assert!(size_of::<RedirectMeta>() == 16);
    assert!(size_of::<CounterValue>() == 16);
};

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya::Pod is an unsafe marker; the types are defined here, so only here can it be given")]
mod pod {
    use super::*;
    macro_rules! pod {
        ($($t:ty),+) => {$(
            // SAFETY: repr(C), Copy, no padding (size asserted above), every bit pattern valid, no references.
            unsafe impl aya::Pod for $t {}
        )+};
    }
    pod!(IngressConfig, MatchKey, MatchEntry, SourceKey, SourceVerdict, RedirectMeta, CounterValue, lab::Template, lab::Pace, lab::Silence);
    pod!(kernel::KernelPlan, kernel::KernelOutput, kernel::PlanDevice, kernel::DropKey);
}
