"""The keeper: holds duplicates of what shims have open, so that a shim may die.

A container's pipes, its terminal, and the pidfd by which its end is known go with the process that
has them open. The keeper has them open too, each under a name, until the shim takes it back or its
task is deleted. A successor of a shim that died fetches them.

One for each containerd; the factory starts it, and starts it again when it dies (shims then notice
that their connection broke, and store anew). It ends once it holds nothing and nobody is connected,
or when its socket is no longer there. It imports next to nothing: it is small, and there is little
in it that could fail.

Protocol: SOCK_SEQPACKET, one JSON object each, descriptors beside it (unix(7), SCM_RIGHTS):

    {"op": "store", "owner": O, "names": [N, ...]} and as many descriptors     no reply
    {"op": "remove", "owner": O, "names": [N, ...]}; no names: all             no reply
    {"op": "fetch", "owner": O}     replies {"names": [...], "more": bool} and descriptors
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.shim import shim_cgroup

if TYPE_CHECKING:
    from collections.abc import Callable

PACKET_MAX_BYTES = 65536
FDS_MAX = 100
"""Most descriptors in one packet; the kernel's limit is 253."""

_BACKLOG = 4096
_FIRST_S = 10.0
"""Time for who started it to connect."""
_IDLE_S = 0.3
_LOOK_S = 30.0
_SEND_LIMIT_S = 5.0


def run_in_background(path: Path) -> int:
    """Start a keeper that goes on alone, unless there is one; returns this process' exit status.

    Returns once there is one that can be connected to.
    """
    ready, tell = os.pipe()
    if os.fork():
        os.close(tell)
        return 0 if os.read(ready, 1) == b"k" else 1
    os.close(ready)
    os.setsid()
    status = 1
    try:
        status = _run(path, lambda: _detach(tell))
    except OSError as error:
        sys.stderr.write(f"keeper: {error.strerror}: {error.filename or path}\n")
    finally:
        os._exit(status)


def _run(path: Path, serving: Callable[[], None]) -> int:
    # Held to the end: two keepers of one name would each hold half.
    lock = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        serving()
        return 0
    home = shim_cgroup.Home()
    home.enter()
    try:
        Keeper(path).run(serving)
    finally:
        home.leave()
    return 0


def _detach(tell: int) -> None:
    """Say that there is a keeper, and let go of the terminal and the pipes of who started it."""
    Path("/proc/self/comm").write_text(shim_cgroup.KEEPER_NAME)
    os.write(tell, b"k")
    os.close(tell)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)


class Keeper:
    """Serves on ``path`` until it is of no use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, dict[str, int]] = {}
        self._selector = selectors.DefaultSelector()
        self._connections: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._inode = 0
        self._ending = False

    def run(self, serving: Callable[[], None] = lambda: None) -> None:
        """Serve to the end; ``serving`` is called once there is a socket to connect to.

        Raises:
            OSError: the socket cannot be bound.
        """
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        signal.signal(signal.SIGTERM, self._terminate)
        self._listen()
        serving()
        try:
            self._serve()
        finally:
            if self._is_ours():
                self._path.unlink(missing_ok=True)

    def _listen(self) -> None:
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        self._listener.bind(str(new))
        new.chmod(0o600)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._inode = new.stat().st_ino
        new.rename(self._path)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _serve(self) -> None:
        idle_since = time.monotonic() + _FIRST_S
        while not self._ending:
            events = self._selector.select(_IDLE_S if not self._connections else _LOOK_S)
            for key, _ in events:
                key.data()
            if events or self._connections:
                idle_since = time.monotonic()
                if not events and not self._is_ours() and not self._held:
                    return
            elif not self._may_be_wanted(idle_s=time.monotonic() - idle_since):
                return

    def _may_be_wanted(self, *, idle_s: float) -> bool:
        """Whether anybody may come; without its socket not even who started it."""
        return self._is_ours() and (bool(self._held) or idle_s < _IDLE_S)

    def _is_ours(self) -> bool:
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # gone again, or out of descriptors
            connection, _ = self._listener.accept()
            # Only this end must not wait for the other: a reply has its own limit.
            connection.settimeout(_SEND_LIMIT_S)
            self._connections.add(connection)
            self._selector.register(
                connection, selectors.EVENT_READ, lambda: self._receive(connection)
            )

    def _receive(self, connection: socket.socket) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(connection, PACKET_MAX_BYTES, FDS_MAX)
        except OSError:
            data, fds = b"", []
        if not data:
            self._drop(connection)
            return
        for fd in fds:
            os.set_inheritable(fd, False)
        try:
            self._handle(connection, json.loads(data), fds)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            sys.stderr.write(f"keeper: request dropped: {type(error).__name__}: {error}\n")
            self._drop(connection)
        finally:
            for fd in fds:
                os.close(fd)

    def _handle(self, connection: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
        owner = str(request["owner"])
        if request["op"] == "store":
            for name in request["names"]:
                self._forget(owner, [name])
                self._held.setdefault(owner, {})[name] = fds.pop(0)
        elif request["op"] == "remove":
            self._forget(owner, request.get("names") or list(self._held.get(owner, ())))
        elif request["op"] == "fetch":
            self._give(connection, list(self._held.get(owner, {}).items()))
        else:
            raise ValueError(request["op"])

    def _give(self, connection: socket.socket, held: list[tuple[str, int]]) -> None:
        while True:
            part, held = held[:FDS_MAX], held[FDS_MAX:]
            reply = {"names": [name for name, _ in part], "more": bool(held)}
            socket.send_fds(connection, [json.dumps(reply).encode()], [fd for _, fd in part])
            if not held:
                return

    def _forget(self, owner: str, names: list[str]) -> None:
        held = self._held.get(owner, {})
        for name in names:
            if (fd := held.pop(name, -1)) >= 0:
                os.close(fd)
        if not held:
            self._held.pop(owner, None)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._connections.discard(connection)
        connection.close()

    def _terminate(self, signum: int, frame: object) -> None:
        self._ending = True
