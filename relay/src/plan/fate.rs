//! What can become of a packet in user space. One reason = one variant = one counter = one label.
//!
//! Pure data: must never count by itself.

macro_rules! reasons {
    ($(#[$top:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $label:literal),+ $(,)? }) => {
        $(#[$top])*
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$doc])* $variant),+ }

        impl $name {
            /// All reasons, in index order.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];
            /// Number of reasons.
            pub const COUNT: usize = Self::ALL.len();
            /// The name in JSON, metrics and tables.
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => $label),+ }
            }
            /// Position in a counter array.
            pub const fn index(self) -> usize {
                self as usize
            }
        }
    };
}

reasons! {
    /// Why a received packet reached no output at all. Counted per ingress interface, and per rule where one is known.
    DropReason {
        /// Shorter than its headers say, or lengths that contradict each other.
        Malformed = "malformed",
        /// The rule XDP named has been deleted meanwhile (a leftover in the ring), or the packet is not that rule's.
        RuleGone = "rule_gone",
        /// The source address is a multicast or broadcast address.
        MulticastSource = "multicast_source",
        /// The source is the relay's own address on that segment: a loop.
        OwnSource = "own_source",
        /// The IPv4 header checksum is wrong.
        BadIpChecksum = "bad_ip_checksum",
        /// The UDP checksum is wrong, and not merely unfinished; or zero over IPv6.
        BadUdpChecksum = "bad_udp_checksum",
        /// More pieces than a packet may have, or larger than its buffer.
        TooBig = "too_big",
        /// A descriptor outside the UMEM.
        InvalidDescriptor = "invalid_descriptor",
        /// Killed two workers in a row; skipped.
        Poison = "poison",
        /// The kernel found the RX ring full.
        RxRingFull = "rx_ring_full",
        /// The kernel found no free frame (fill ring empty, or no buffer posted), or the packet did not fit its frame.
        FillEmpty = "fill_empty",
        /// No rule takes it (packet path only: XDP would have passed it).
        NoRule = "no_rule",
    }
}

reasons! {
    /// Why one output did not get a packet. Counted per output.
    OutputDropReason {
        /// TTL or hop limit 0 after `dec`, or 0 on arrival.
        TtlExpired = "ttl_expired",
        /// No free frame for this output's copy.
        NoFrame = "no_frame",
        /// The egress ring is full: the output is slower than the input.
        EgressFull = "egress_full",
        /// The next hop's link-layer address is not known yet.
        NoNeighbor = "no_neighbor",
        /// The egress interface is missing, down, or has no usable address yet.
        OutputDown = "output_down",
        /// Larger than the egress interface's MTU.
        MtuExceeded = "mtu_exceeded",
        /// Above the output's `rate=`.
        RateLimited = "rate_limited",
        /// No room in the frame for another tag.
        NoHeadroom = "no_headroom",
        /// The kernel refused the packet for good.
        SendFailed = "send_failed",
    }
}
