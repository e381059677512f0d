"""A shim's side of the keeper: what it has open is stored there under a name until it is closed.

Storing costs one packet and waits for nobody. When the keeper is gone, and has a successor, all
that is open is stored again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
from typing import TYPE_CHECKING

import structlog

from services.common.errors import Unavailable
from services.shim.keeper import FDS_MAX, PACKET_MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

log = structlog.get_logger(__name__)

_AGAIN_S = 0.2
_AGAIN_MAX_S = 5.0
_FETCH_LIMIT_S = 5.0


class Keeping:
    """Descriptors of this process that the keeper holds too.

    Args:
        path: the keeper's socket; None: there is none, and nothing is kept.
        owner: names this shim, whatever process it is.
    """

    def __init__(self, path: Path | None, owner: str) -> None:
        self._path = path
        self._owner = owner
        self._names: dict[int, str] = {}
        self._connection: socket.socket | None = None
        self._again: asyncio.TimerHandle | None = None
        self._pause_s = _AGAIN_S

    def open(self) -> None:
        """Connect, and store what is to be kept; tried again for ever."""
        self._again = None
        if self._path is None:
            return
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            connection.connect(str(self._path))
        except OSError:
            connection.close()
            self._try_again()
            return
        self._connection = connection
        self._pause_s = _AGAIN_S
        asyncio.get_running_loop().add_reader(connection.fileno(), self._ended)
        self._store(dict(self._names))

    def close(self) -> None:
        """Let go of the keeper."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        self._disconnect()

    def hold(self, fds: Iterable[int]) -> dict[int, str]:
        """Have descriptors kept; returns their names."""
        named = {fd: secrets.token_hex(6) for fd in fds}
        if self._path is None:
            return named
        self._names |= named
        self._store(named)
        return named

    def release(self, fd: int) -> None:
        """Close a descriptor, here and there: no other end must wait for one that lingers."""
        name = self._names.pop(fd, "")
        os.close(fd)
        if name:
            self._send({"op": "remove", "owner": self._owner, "names": [name]})

    def forget_all(self) -> None:
        """Have nothing kept any more."""
        self._names.clear()
        self._send({"op": "remove", "owner": self._owner})

    def pack(self) -> list[tuple[int, str]]:
        """What the next image of the shim has to know."""
        return list(self._names.items())

    def unpack(self, names: Iterable[tuple[int, str]]) -> None:
        """Take over what an earlier image had kept; before ``open``."""
        self._names = dict(names)

    async def fetch(self) -> dict[str, int]:
        """All that is kept for this shim, opened here, by name; before ``open``.

        Raises:
            Unavailable: there is no keeper, or it does not answer.
        """
        if self._path is None:
            raise Unavailable("this shim has no keeper")
        try:
            found = await asyncio.to_thread(_fetch, self._path, self._owner)
        except (OSError, ValueError, KeyError) as error:
            raise Unavailable(f"the keeper does not answer: {error}") from error
        self._names = {fd: name for name, fd in found.items()}
        return found

    def _store(self, named: Mapping[int, str]) -> None:
        entries = list(named.items())
        for start in range(0, len(entries), FDS_MAX):
            part = entries[start : start + FDS_MAX]
            names = [name for _, name in part]
            self._send(
                {"op": "store", "owner": self._owner, "names": names}, [fd for fd, _ in part]
            )

    def _send(self, message: Mapping[str, object], fds: Iterable[int] = ()) -> None:
        if self._connection is None:
            return
        try:
            socket.send_fds(self._connection, [json.dumps(message).encode()], list(fds))
        except OSError as error:  # gone; or stuck, and then it is as good as gone
            log.warning("keeper cannot be told", error=error.strerror)
            self._disconnect()
            self._try_again()

    def _ended(self) -> None:
        """The keeper says nothing unasked: this is its end."""
        log.warning("keeper is gone")
        self._disconnect()
        self._try_again()

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()
            self._connection = None

    def _try_again(self) -> None:
        if self._again is None:
            self._again = asyncio.get_running_loop().call_later(self._pause_s, self.open)
            self._pause_s = min(self._pause_s * 2, _AGAIN_MAX_S)


def _fetch(path: Path, owner: str) -> dict[str, int]:
    found: dict[str, int] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_FETCH_LIMIT_S)
        connection.connect(str(path))
        connection.send(json.dumps({"op": "fetch", "owner": owner}).encode())
        while True:
            data, fds, _, _ = socket.recv_fds(connection, PACKET_MAX_BYTES, FDS_MAX)
            for fd in fds:
                os.set_inheritable(fd, False)
            reply = json.loads(data)
            found |= dict(zip(reply["names"], fds, strict=True))
            if not reply["more"]:
                return found
