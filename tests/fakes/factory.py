"""Fakes of the shim factory: one that makes fake shims in the test's process, and a program.

Run as a program (``factory --socket PATH``) it speaks the factory's protocol and forks children
that reply without being shims. The request's id says what happens: ``refused``, ``dies`` (before it
replies), ``garbage``, ``hangs``, ``kills-factory`` (once); anything else succeeds, and with an id
that begins with ``again`` the child waits for another request after that, ``stays`` goes on.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.common.errors import TheseusError
    from services.containerd.tasks.shim import ShimAddress, ShimRequest
    from tests.fakes.shim import FakeShim


@dataclass
class FakeFactory:
    """Implements ``ShimLauncher`` with fake shims.

    Attributes:
        registry: containerd's socket.
        shims: the newest shim of each container, by its id.
        started: every shim.
        failure: raised instead of starting one.
        registering: whether new shims register.
        prepare: attributes (name, value) that new shims get.
        lines: what the lines of the next shims say of a request: that it was never answered
            (False; there is no shim then), or why it was refused; none: there is no line.
    """

    registry: Path
    shims: dict[str, FakeShim] = field(default_factory=dict)
    started: list[FakeShim] = field(default_factory=list)
    failure: Exception | None = None
    registering: bool = True
    prepare: list[tuple[str, object]] = field(default_factory=list)
    lines: list[bool | TheseusError] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def start_shim(self, request: ShimRequest, *, timeout_s: float = 30.0) -> ShimAddress:
        from services.containerd.tasks.processes import ProcessId
        from services.containerd.tasks.shim import ShimAddress
        from tests.fakes.shim import FakeShim

        if self.failure is not None:
            raise self.failure
        address = f"unix://{request.socket}"
        if self.lines:
            line: Any = _Line(self.lines.pop(0))
            return ShimAddress(ProcessId(1 << 22, 1), address, "fake", line)
        shim = FakeShim(
            namespace=request.namespace,
            id=request.id,
            bundle=request.bundle,
            socket=request.socket,
            registry=self.registry,
            instance_id=request.instance_id,
        )
        shim.registering = self.registering
        if request.adopt:
            shim.succeed(self.shims[request.id])
        for name, value in self.prepare:
            setattr(shim, name, value)
        self.shims[request.id] = shim
        self.started.append(shim)
        self._news.set()
        await shim.start()
        return ShimAddress(ProcessId(shim.pid, shim.start_time), address, "fake")

    async def started_shim(self, container_id: str) -> FakeShim:
        """The shim of a container, once there is one."""
        while container_id not in self.shims:
            self._news.clear()
            await self._news.wait()
        return self.shims[container_id]

    async def cleanup(self) -> None:
        for shim in self.started:
            await shim.cleanup()


class _Line:
    """The line to a process that did not become a shim."""

    way = None

    def __init__(self, outcome: bool | TheseusError) -> None:
        self._outcome = outcome

    async def serves(self) -> bool:
        if isinstance(self._outcome, bool):
            return self._outcome
        raise self._outcome


def main() -> None:
    path = Path(sys.argv[sys.argv.index("--socket") + 1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(64)
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable and not sys.stdin.buffer.raw.read(1):  # type: ignore[attr-defined]
            return
        if listener in readable:
            _answer(listener.accept()[0], path)


def _answer(connection: socket.socket, path: Path) -> None:
    request = json.loads(connection.recv(65536))
    if "wait_in" in request:
        if os.fork():
            connection.close()
            return
        _wait(connection)
        os._exit(0)
    killed = path.with_name("killed")
    if request["id"] == "kills-factory" and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if os.fork():
        connection.close()
        return
    _child(connection, request)
    if request["id"].startswith("again"):
        _wait(connection)
    os._exit(0)


def _wait(connection: socket.socket) -> None:
    """Wait to be a shim, again and again as long as the requests ask for that."""
    while True:
        waiting = {"waiting": os.getpid(), "start_time": 7, "version": '{"waited": "yes"}'}
        connection.send(json.dumps(waiting).encode())
        data = connection.recv(65536)
        if not data:
            return
        request = json.loads(data)
        _child(connection, request | {"waited": "yes"})
        if request["id"] == "stays":
            connection.recv(1)
        if not request["id"].startswith("again"):
            return


def _child(connection: socket.socket, request: dict[str, str]) -> None:
    match request["id"]:
        case "refused":
            connection.send(json.dumps({"error": "the bundle is on fire"}).encode())
        case "dies" | "dies-once" if request["id"] == "dies" or "waited" in request:
            (Path(request["bundle"]) / "shim.log").write_text("first\nit broke: reasons\n")
        case "garbage":
            connection.send(b"[]")
        case "hangs":
            # Until the one who waits for the reply has gone.
            select.select([connection], [], [])
        case _:
            reply = {
                "pid": os.getpid(),
                "start_time": 7,
                "address": f"unix://{request['socket']}",
                "version": json.dumps(request, sort_keys=True),
            }
            connection.send(json.dumps(reply).encode())


if __name__ == "__main__":
    main()
