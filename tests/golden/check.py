#!/usr/bin/env python3
"""Builds what must come out of the rewrite corpus a second time: with scapy, from the rules' texts and the packets alone.

Usage: check.py rewrites.txt. Exit code 0: all frames are equal byte for byte; 1: some differ; 77: scapy is missing.
Must never learn from the corpus what the answer is.
"""

import ipaddress
import re
import sys

try:
    from scapy.layers.inet import IP, UDP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw
except ImportError:
    sys.exit(77)

TAGS = (0x8100, 0x88A8)


def read(path):
    """Links by name, next hops by (egress, address), cases as lists of split lines."""
    links, hops, cases = {}, {}, []
    for line in open(path, encoding="ascii"):
        words = line.split()
        if not words or words[0] == "#":
            continue
        if words[0] == "link":
            links[words[1]] = words[2:]
        elif words[0] == "hop":
            hops[words[1], ipaddress.ip_address(words[2])] = words[3]
        elif words[0] == "case":
            cases.append({"name": words[1], "results": []})
        elif words[0] == "rule":
            cases[-1]["rule"] = line[len("rule ") :].strip()
        elif words[0] == "in":
            cases[-1]["in"] = bytes.fromhex(words[1])
        else:
            cases[-1]["results"].append(words)
    return links, hops, cases


def outputs(rule):
    """(egress, address or None, port or None, keys) of each output of a rule's line."""
    right = rule.split("->")[1].split(";")[0]
    for text in right.split(","):
        egress, *words = text.split()
        keys = dict(word.split("=") for word in words if "=" in word)
        to = [word for word in words if "=" not in word]
        address, port = None, None
        if to:
            found = re.fullmatch(r"(?:\[([0-9a-f:]+)\]|([0-9.]+))?(?::(\d+))?", to[0])
            text = found.group(1) or found.group(2)
            address = ipaddress.ip_address(text) if text else None
            port = int(found.group(3)) if found.group(3) else None
        yield egress, address, port, keys


class Packet:
    """An Ethernet frame taken apart: tags, IP header (scapy's), UDP header (scapy's), payload."""

    def __init__(self, frame):
        self.tags, at = [], 12
        while int.from_bytes(frame[at : at + 2], "big") in TAGS:
            self.tags.append(frame[at : at + 4])
            at += 4
        self.ethertype = int.from_bytes(frame[at : at + 2], "big")
        ip = frame[at + 2 :]
        self.is_ipv4 = self.ethertype == 0x0800
        header = (ip[0] & 15) * 4 if self.is_ipv4 else 40
        length = int.from_bytes(ip[2:4], "big") if self.is_ipv4 else 40 + int.from_bytes(ip[4:6], "big")
        self.bytes = ip[:length]
        self.ip = (IP if self.is_ipv4 else IPv6)(self.bytes[:header])
        self.ip.remove_payload()
        udp = UDP(self.bytes[header : header + 8])
        udp.remove_payload()
        self.udp, self.payload = udp, self.bytes[header + 8 :]

    def finished(self, keep_none):
        """The IP packet with checksums made anew; `keep_none`: an IPv4 sender's 0 stays."""
        ip, udp = self.ip.copy(), self.udp.copy()
        if self.is_ipv4:
            ip.chksum = None
        if not (keep_none and udp.chksum == 0):
            udp.chksum = None
        return bytes(ip / udp / Raw(self.payload))

    def pseudo_sum(self):
        """What a sender leaves in the checksum field for the hardware to finish."""
        addresses = b"".join(ipaddress.ip_address(addr).packed for addr in (self.ip.src, self.ip.dst))
        return words(addresses + bytes([0, 17]) + self.udp.len.to_bytes(2, "big"))


def words(data):
    """RFC 1071's sum of 16-bit words."""
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(data), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def rule_drop(packet, own):
    """The drop before any output, or None."""
    if packet.is_ipv4 and words(packet.bytes[: packet.ip.ihl * 4]) != 0xFFFF:
        return "bad_ip_checksum"
    source = ipaddress.ip_address(packet.ip.src)
    if source.is_multicast or packet.ip.src == "255.255.255.255":
        return "multicast_source"
    if packet.ip.src in own:
        return "own_source"
    right = packet.finished(keep_none=packet.is_ipv4)
    if right != packet.bytes and packet.udp.chksum != packet.pseudo_sum():
        return "bad_udp_checksum"
    return None


def group_mac(address):
    if address.version == 4:
        return bytes([1, 0, 0x5E, address.packed[1] & 0x7F]) + address.packed[2:]
    return b"\x33\x33" + address.packed[12:]


def new_ttl(old, keys):
    how = keys.get("ttl", "dec")
    return old if how == "keep" else max(old - 1, 0) if how == "dec" else int(how)


def applied(frame, links, hops, egress, address, port, keys):
    """What one output does: ("out", egress, frame) or ("drop", reason)."""
    packet = Packet(frame)
    ip, udp, (mac, own4, own6, mtu) = packet.ip, packet.udp, links[egress]
    ttl = new_ttl(ip.ttl if packet.is_ipv4 else ip.hlim, keys)
    if ttl == 0:
        return ["drop", "ttl_expired"]
    if len(packet.bytes) > int(mtu):
        return ["drop", "mtu_exceeded"]
    setattr(ip, "ttl" if packet.is_ipv4 else "hlim", ttl)
    if address:
        ip.dst = str(address)
    source = keys.get("src", "keep")
    if source != "keep":
        ip.src = (own4 if packet.is_ipv4 else own6) if source == "egress" else source.strip("[]")
    udp.dport = udp.dport if port is None else port
    udp.sport = udp.sport if keys.get("sport", "keep") == "keep" else int(keys["sport"])
    if keys.get("dscp", "keep") != "keep":
        field = "tos" if packet.is_ipv4 else "tc"
        setattr(ip, field, int(keys["dscp"]) << 2 | getattr(ip, field) & 3)
    vlan = keys.get("vlan", "keep")
    tags = packet.tags if vlan == "keep" else [] if vlan == "none" else [b"\x81\x00" + int(vlan).to_bytes(2, "big")]
    destination = ipaddress.ip_address(ip.dst)
    to = group_mac(destination) if destination.is_multicast else bytes.fromhex(hops[egress, destination])
    link = bytes(Ether(dst=to, src=bytes.fromhex(mac), type=packet.ethertype))
    return ["out", egress, (link[:12] + b"".join(tags) + link[12:] + packet.finished(keep_none=packet.is_ipv4)).hex()]


def expected(case, links, hops):
    packet = Packet(case["in"])
    reason = rule_drop(packet, links["r0"][1:3])
    if reason:
        return [["drop", "*", reason]]
    results = []
    for number, output in enumerate(outputs(case["rule"])):
        what, *rest = applied(case["in"], links, hops, *output)
        results.append([what, str(number), *rest])
    return results


def main():
    links, hops, cases = read(sys.argv[1])
    differing = 0
    for case in cases:
        wanted = expected(case, links, hops)
        if wanted != case["results"]:
            differing += 1
            print(f"{case['name']}: {case['rule']}\n  scapy:  {wanted}\n  corpus: {case['results']}")
    print(f"{len(cases)} cases, {differing} differ from what scapy builds")
    return 1 if differing or not cases else 0


sys.exit(main())
