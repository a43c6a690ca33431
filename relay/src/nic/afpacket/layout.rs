//! Where the parts of a received message lie in its frame, and how they become a [`Packet`].
//!
//! One layout for both engines, so that the packet's first byte lies at [`HEADROOM`] as it does on AF_XDP:
//! ```text
//! 206 io_uring_recvmsg_out (16)   written by io_uring only
//! 222 control data (40)           cmsghdr + struct tpacket_auxdata (linux/if_packet.h)
//! 262 struct virtio_net_hdr (10)  PACKET_VNET_HDR: tells super-frames from packets
//! 272 Ethernet header …           at most FRAME_CAPACITY bytes
//! ```
//! A tag that the kernel took off is put back: 12 bytes of addresses move 4 down, into the control data (which is read by then).
//! Must never make a system call.

use crate::frame::{FRAME_CAPACITY, FRAME_SIZE, Frame, HEADROOM, Umem};
use crate::nic::{Fragment, Hint, Packet};
use arrayvec::ArrayVec;
use bytemuck::{Pod, Zeroable};

/// Bytes of control data: one PACKET_AUXDATA message.
pub(super) const CONTROL_LEN: u32 = size_of::<Control>() as u32;
/// Bytes of `struct virtio_net_hdr` (linux/virtio_net.h) that the kernel puts before the packet.
pub(super) const VNET_LEN: u32 = 10;
/// Where the payload of the message (virtio header, then the packet) begins in the frame.
pub(super) const PAYLOAD_AT: u32 = HEADROOM - VNET_LEN;
/// Bytes of payload a frame takes.
pub(super) const PAYLOAD_LEN: u32 = FRAME_CAPACITY + VNET_LEN;
/// Where the control data begins in the frame.
pub(super) const CONTROL_AT: u32 = PAYLOAD_AT - CONTROL_LEN;
/// Where io_uring's own header, and with it the provided buffer, begins in the frame.
pub(super) const BUFFER_AT: u32 = CONTROL_AT - OUT_LEN;
/// Bytes of the provided buffer.
pub(super) const BUFFER_LEN: u32 = FRAME_SIZE - BUFFER_AT;
const OUT_LEN: u32 = size_of::<RecvOut>() as u32;
const _: () = assert!(PAYLOAD_AT + PAYLOAD_LEN == FRAME_SIZE && BUFFER_AT + BUFFER_LEN == FRAME_SIZE);

/// Destination and source address.
const ADDRESSES_LEN: u32 = 12;
/// A VLAN tag: TPID, TCI.
const TAG_LEN: u32 = 4;
/// Least Ethernet packet.
const ETHERNET_LEN: u32 = 14;
const TPID_8021Q: u16 = 0x8100;
// linux/if_packet.h
const TP_STATUS_CSUMNOTREADY: u32 = 1 << 3;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;
const TP_STATUS_VLAN_TPID_VALID: u32 = 1 << 6;

/// `struct io_uring_recvmsg_out` (linux/io_uring.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct RecvOut {
    name_len: u32,
    control_len: u32,
    payload_len: u32,
    flags: u32,
}

/// `struct cmsghdr` and `struct tpacket_auxdata`, padded as CMSG_SPACE does.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct Control {
    cmsg_len: usize,
    cmsg_level: i32,
    cmsg_type: i32,
    status: u32,
    len: u32,
    snap_len: u32,
    mac: u16,
    net: u16,
    vlan_tci: u16,
    vlan_tpid: u16,
    padding: u32,
}

/// Bytes of [`Control`] that carry information.
const AUXDATA_END: u32 = CONTROL_LEN - 4;

/// A message as the kernel left it in a frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message {
    /// Bytes of control data written.
    pub(super) control_len: u32,
    /// Bytes of payload (virtio header and packet) the message has.
    pub(super) payload_len: u32,
    /// `msg_flags`.
    pub(super) flags: u32,
}

/// Reads io_uring's header at the beginning of the provided buffer; `written` is the completion's result.
pub(super) fn uring_message(umem: &Umem, frame: &Frame, written: u32) -> Message {
    let out: RecvOut = bytemuck::try_pod_read_unaligned(umem.bytes(frame, BUFFER_AT, OUT_LEN)).unwrap_or_default();
    let room = written.saturating_sub(OUT_LEN + CONTROL_LEN);
    let truncated = if out.payload_len > room { libc::MSG_TRUNC as u32 } else { 0 };
    Message { control_len: out.control_len, payload_len: out.payload_len.min(room), flags: out.flags | truncated }
}

/// Makes a packet of the message in `frame`; gives the frame back where the packet is larger than a frame, a super-frame
/// (several packets the kernel had merged: sending it as one would be wrong), or no Ethernet packet at all.
pub(super) fn packet(umem: &Umem, mut frame: Frame, message: Message) -> Result<Packet, Frame> {
    let truncated = message.flags & libc::MSG_TRUNC as u32 != 0;
    let len = message.payload_len.saturating_sub(VNET_LEN);
    if truncated || !(ETHERNET_LEN..=FRAME_CAPACITY).contains(&len) || is_super_frame(umem, &frame) {
        return Err(frame);
    }
    let control = control(umem, &frame, message);
    let hint = Hint { rule: None, partial: control.status & TP_STATUS_CSUMNOTREADY != 0 };
    let added = restore_tag(umem, &mut frame, &control);
    let mut fragments = ArrayVec::new();
    fragments.push(Fragment { frame, offset: HEADROOM - added, len: len + added });
    Ok(Packet { fragments, hint })
}

/// `gso_type`, the second byte of the virtio header, is 0 (VIRTIO_NET_HDR_GSO_NONE) for a packet that is one packet.
fn is_super_frame(umem: &Umem, frame: &Frame) -> bool {
    umem.bytes(frame, PAYLOAD_AT + 1, 1) != [0]
}

/// The auxiliary data, or zeros where there is none.
fn control(umem: &Umem, frame: &Frame, message: Message) -> Control {
    if message.control_len < AUXDATA_END {
        return Control::default();
    }
    let control: Control = bytemuck::try_pod_read_unaligned(umem.bytes(frame, CONTROL_AT, CONTROL_LEN)).unwrap_or_default();
    let ours = control.cmsg_level == libc::SOL_PACKET && control.cmsg_type == libc::PACKET_AUXDATA;
    if ours { control } else { Control::default() }
}

/// Puts the tag back that the kernel took off, and returns how many bytes that added before the packet.
fn restore_tag(umem: &Umem, frame: &mut Frame, control: &Control) -> u32 {
    if control.status & TP_STATUS_VLAN_VALID == 0 {
        return 0;
    }
    let has_tpid = control.status & TP_STATUS_VLAN_TPID_VALID != 0;
    let tpid = if has_tpid { control.vlan_tpid } else { TPID_8021Q };
    let head = umem.bytes_mut(frame, HEADROOM - TAG_LEN, ADDRESSES_LEN + TAG_LEN);
    head.copy_within(TAG_LEN as usize.., 0);
    if let Some(tag) = head.last_chunk_mut::<{ TAG_LEN as usize }>() {
        let ([a, b], [c, d]) = (tpid.to_be_bytes(), control.vlan_tci.to_be_bytes());
        *tag = [a, b, c, d];
    }
    TAG_LEN
}
