"""Making the kernel forget flows of UDP, which would outlive a change of published ports.

A translated flow keeps its destination for as long as packets come: a client that goes on sending
to a published port would never reach the container that took it over, nor one that came after its
first packet. TCP needs nothing: its connections end by themselves.

The messages are ctnetlink's (linux/netfilter/nfnetlink_conntrack.h), numbers in network order.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import structlog

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

log = structlog.get_logger(__name__)

_NETLINK_NETFILTER = 12
_CT_GET = 0x0101  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET
_CT_DELETE = 0x0102
_NLM_F_REQUEST = 0x1
_NLM_F_ACK = 0x4
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_CTA_TUPLE_ORIG = 1
_CTA_TUPLE_REPLY = 2
_CTA_TUPLE_IP = 1
_CTA_TUPLE_PROTO = 2
_NLA_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")
_FAMILY = struct.pack("=BBH", socket.AF_INET, 0, 0)


@frozen
class _Tuple:
    source: IPv4Address
    destination: IPv4Address
    protocol: int
    destination_port: int


def forget_udp(*, address: IPv4Address | None = None, ports: Collection[int] = ()) -> None:
    """Delete flows of UDP that lead to ``address``, or to ``ports`` of this host. Blocks.

    Does nothing where the kernel lacks ctnetlink.
    """
    if address is None and not ports:
        return
    try:
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
        ) as netlink:
            netlink.settimeout(10)
            stale = [
                original
                for original, there, back in _flows(netlink)
                if there.protocol == socket.IPPROTO_UDP
                and (
                    back.source == address
                    or (there.destination_port in ports and _is_local(there.destination))
                )
            ]
            for original in stale:
                _delete(netlink, original)
    except OSError as error:
        log.warning("stale flows of udp may remain", error=str(error))


def _flows(netlink: socket.socket) -> Iterator[tuple[bytes, _Tuple, _Tuple]]:
    """Every IPv4 flow: its original tuple as an attribute, and both tuples read."""
    netlink.send(_message(_CT_GET, _NLM_F_REQUEST | _NLM_F_DUMP, b""))
    while True:
        for kind, payload in _messages(netlink.recv(1 << 20)):
            if kind == _NLMSG_DONE:
                return
            _raise_error(kind, payload)
            attributes = dict(_attributes(payload[len(_FAMILY) :]))
            original, reply = attributes.get(_CTA_TUPLE_ORIG), attributes.get(_CTA_TUPLE_REPLY)
            if original and reply:
                yield original, _tuple(original), _tuple(reply)


def _delete(netlink: socket.socket, original: bytes) -> None:
    attribute = struct.pack("=HH", len(original) + 4, _CTA_TUPLE_ORIG | 0x8000) + original
    netlink.send(_message(_CT_DELETE, _NLM_F_REQUEST | _NLM_F_ACK, attribute))
    for kind, payload in _messages(netlink.recv(1 << 16)):
        try:
            _raise_error(kind, payload)
        except FileNotFoundError:  # it ended meanwhile
            continue


def _message(kind: int, flags: int, attributes: bytes) -> bytes:
    body = _FAMILY + attributes
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, position)
        yield kind, data[position + _HEADER.size : position + length]
        position += (length + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, position)
        yield kind & _NLA_TYPE_MASK, data[position + 4 : position + length]
        position += (length + 3) & ~3


def _tuple(data: bytes) -> _Tuple:
    parts = dict(_attributes(data))
    addresses = dict(_attributes(parts[_CTA_TUPLE_IP]))
    protocol = dict(_attributes(parts[_CTA_TUPLE_PROTO]))
    port = protocol.get(3, b"\0\0")  # CTA_PROTO_DST_PORT, which ICMP lacks
    return _Tuple(
        source=IPv4Address(addresses[1]),
        destination=IPv4Address(addresses[2]),
        protocol=protocol[1][0],
        destination_port=int.from_bytes(port[:2], "big"),
    )


def _raise_error(kind: int, payload: bytes) -> None:
    if kind == _NLMSG_ERROR:
        number = -struct.unpack_from("=i", payload)[0]
        if number:
            raise OSError(number, os.strerror(number), "ctnetlink")


def _is_local(address: IPv4Address) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probing:
        try:
            probing.bind((str(address), 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True
