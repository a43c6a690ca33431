//! What an output does to a packet, resolved to bytes: the plan of one output as worker and XDP program read it.
//!
//! Plain data in a rules segment and in BPF maps, so `repr(C)` and Pod; must never hold a pointer or a name.

/// `Edit::ttl_mode`: one less; 0 is a drop.
pub const TTL_DEC: u8 = 0;
/// `Edit::ttl_mode`: unchanged.
pub const TTL_KEEP: u8 = 1;
/// `Edit::ttl_mode`: `Edit::ttl`.
pub const TTL_SET: u8 = 2;
/// `Edit::vlan_mode`: tags as they came.
pub const VLAN_KEEP: u8 = 0;
/// `Edit::vlan_mode`: no tags.
pub const VLAN_NONE: u8 = 1;
/// `Edit::vlan_mode`: exactly one tag, `Edit::vlan`.
pub const VLAN_SET: u8 = 2;
/// `Edit::flags`: write `Edit::dst`.
pub const SET_DST: u16 = 1;
/// `Edit::flags`: write `Edit::dport`.
pub const SET_DPORT: u16 = 2;
/// `Edit::flags`: write `Edit::src`.
pub const SET_SRC: u16 = 4;
/// `Edit::flags`: write `Edit::sport`.
pub const SET_SPORT: u16 = 8;
/// `Edit::flags`: write `Edit::dscp`.
pub const SET_DSCP: u16 = 16;
/// `Edit::flags`: `Edit::dst_mac` is fixed (unicast next hop, or rewritten group); otherwise it follows from the
/// packet's own group (RFC 1112 §6.4, RFC 2464 §7).
pub const SET_DST_MAC: u16 = 32;

/// Header edits of one output. 64 bytes. Addresses in network order, IPv4 in the first 4 bytes; ports in host order.
#[repr(C)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Edit {
    /// New destination, if [`SET_DST`].
    pub dst: [u8; 16],
    /// New source, if [`SET_SRC`].
    pub src: [u8; 16],
    /// New destination MAC, if [`SET_DST_MAC`].
    pub dst_mac: [u8; 6],
    /// The egress interface's MAC; always written.
    pub src_mac: [u8; 6],
    /// New destination port, if [`SET_DPORT`].
    pub dport: u16,
    /// New source port, if [`SET_SPORT`].
    pub sport: u16,
    /// `SET_*`.
    pub flags: u16,
    /// VLAN id, if [`VLAN_SET`].
    pub vlan: u16,
    /// Largest L3 packet the egress interface sends (bytes from the IP header on); 0: unlimited.
    pub mtu: u32,
    /// `TTL_*`.
    pub ttl_mode: u8,
    /// Value, if [`TTL_SET`].
    pub ttl: u8,
    /// Value (0–63), if [`SET_DSCP`].
    pub dscp: u8,
    /// `VLAN_*`.
    pub vlan_mode: u8,
    /// 4 or 6: the family this edit is for.
    pub family: u8,
    /// Always 0.
    pub zero: [u8; 3],
}

const _: () = assert!(size_of::<Edit>() == 64);
