"""The few messages of rtnetlink(7) that an endpoint takes, sent without a program in between.

A socket belongs to the network namespace in which it was opened, whatever the thread does later.
Each request is acknowledged before the next; the kernel answers at once or not at all.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Self

from services.common.errors import Internal

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv4Interface

_TIMEOUT_S = 30.0
_ANSWER_MAX = 16384

# linux/netlink.h
_HEADER = struct.Struct("=IHHII")
_ERROR, _REQUEST, _ACK, _EXCL, _CREATE = 2, 0x1, 0x4, 0x200, 0x400
_NESTED = 0x8000
# linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/veth.h
_NEWLINK, _NEWADDR, _NEWROUTE = 16, 20, 24
_LINK = struct.Struct("=BxHiII")
_ADDR = struct.Struct("=BBBBi")
_ROUTE = struct.Struct("=BBBBBBBBI")
_IFF_UP = 0x1
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER = 1, 3, 4, 10
_IFLA_LINKINFO, _IFLA_NET_NS_PID, _IFLA_AF_SPEC = 18, 19, 26
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 1, 2, 4, 5
_VETH_INFO_PEER = 1
_INET6_ADDR_GEN_MODE, _GEN_MODE_NONE = 8, 1
_BRPORT_MODE = 4  # hairpin
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
_RTA_GATEWAY = 5
_TABLE_MAIN, _PROTOCOL_BOOT, _UNICAST = 254, 3, 1


class Rtnetlink:
    """A conversation with the kernel about the links of one network namespace. Blocks.

    Everything raises Internal, with the kernel's reason, when the kernel refuses.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def add_veth(self, name: str, *, mac: str, mtu: int, peer: str, peer_pid: int) -> None:
        """Make a pair of links: one here, its peer in the namespace of the process ``peer_pid``."""
        size = struct.pack("=I", mtu)
        other = _LINK.pack(0, 0, 0, 0, 0) + _attributes(
            (_IFLA_IFNAME, _text(peer)),
            (_IFLA_MTU, size),
            (_IFLA_NET_NS_PID, struct.pack("=I", peer_pid)),
        )
        info = _attributes(
            (_INFO_KIND, _text("veth")),
            (_INFO_DATA | _NESTED, _attributes((_VETH_INFO_PEER, other))),
        )
        body = _LINK.pack(0, 0, 0, 0, 0) + _attributes(
            (_IFLA_IFNAME, _text(name)),
            (_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", ""))),
            (_IFLA_MTU, size),
            (_IFLA_LINKINFO | _NESTED, info),
        )
        self._ask(_NEWLINK, body, flags=_CREATE | _EXCL, what=f"add link {name}")

    def set_up(self, name: str, *, master: int = 0, plain: bool = False) -> None:
        """Take a link into use.

        Args:
            name: of the link.
            master: index of the bridge that it is put into; 0: none.
            plain: no IPv6 addresses come by themselves.
        """
        attributes = [(_IFLA_IFNAME, _text(name))]
        if plain:  # by a message before: in one, the link is up, and has its address, first
            mode = _attributes((_INET6_ADDR_GEN_MODE, bytes([_GEN_MODE_NONE])))
            family = _attributes((socket.AF_INET6 | _NESTED, mode))
            quiet = _attributes(*attributes, (_IFLA_AF_SPEC | _NESTED, family))
            what = f"turn IPv6 addresses of link {name} off"
            self._ask(_NEWLINK, _LINK.pack(0, 0, 0, 0, 0) + quiet, what=what)
        if master:
            attributes.append((_IFLA_MASTER, struct.pack("=I", master)))
        body = _LINK.pack(0, 0, 0, _IFF_UP, _IFF_UP) + _attributes(*attributes)
        self._ask(_NEWLINK, body, what=f"set link {name} up")

    def set_hairpin(self, name: str) -> None:
        """Let frames leave a bridge by the link that they came from."""
        info = _attributes(
            (_INFO_SLAVE_KIND, _text("bridge")),
            (_INFO_SLAVE_DATA | _NESTED, _attributes((_BRPORT_MODE, b"\1"))),
        )
        body = _LINK.pack(0, 0, 0, 0, 0) + _attributes(
            (_IFLA_IFNAME, _text(name)), (_IFLA_LINKINFO | _NESTED, info)
        )
        self._ask(_NEWLINK, body, what=f"set hairpin mode of link {name}")

    def add_address(self, index: int, address: IPv4Interface) -> None:
        """Give the link of an index an address, with the broadcast address of its network."""
        body = _ADDR.pack(socket.AF_INET, address.network.prefixlen, 0, 0, index) + _attributes(
            (_IFA_LOCAL, address.ip.packed),
            (_IFA_ADDRESS, address.ip.packed),
            (_IFA_BROADCAST, address.network.broadcast_address.packed),
        )
        self._ask(_NEWADDR, body, flags=_CREATE | _EXCL, what=f"add address {address}")

    def add_default_route(self, gateway: IPv4Address) -> None:
        """Send what is for nobody near to ``gateway``."""
        body = _ROUTE.pack(
            socket.AF_INET, 0, 0, 0, _TABLE_MAIN, _PROTOCOL_BOOT, 0, _UNICAST, 0
        ) + _attributes((_RTA_GATEWAY, gateway.packed))
        self._ask(_NEWROUTE, body, flags=_CREATE | _EXCL, what=f"add route by {gateway}")

    def _ask(self, kind: int, body: bytes, *, what: str, flags: int = 0) -> None:
        self._sequence += 1
        header = _HEADER.pack(
            _HEADER.size + len(body), kind, _REQUEST | _ACK | flags, self._sequence, 0
        )
        try:
            self._socket.send(header + body)
            answer = self._socket.recv(_ANSWER_MAX)
        except OSError as error:  # a timeout, too
            raise Internal(f"cannot {what}: no answer from the kernel: {error}") from error
        _, answered, _, sequence, _ = _HEADER.unpack_from(answer)
        if answered != _ERROR or sequence != self._sequence:
            raise Internal(f"cannot {what}: the kernel answered something else")
        (code,) = struct.unpack_from("=i", answer, _HEADER.size)
        if code:
            raise Internal(f"cannot {what}: {os.strerror(-code)}")


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


def _attributes(*pairs: tuple[int, bytes]) -> bytes:
    packed = b""
    for kind, value in pairs:
        piece = struct.pack("=HH", 4 + len(value), kind) + value
        packed += piece + b"\0" * (-len(piece) % 4)
    return packed
