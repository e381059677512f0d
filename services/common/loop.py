"""The event loop of the tiers that serve many calls: libuv's, with programs started by Python.

uvloop starts programs by a fork of its own: a copy of a process that has gRPC's threads runs
Python's fork handlers, and the program inherits whatever is not marked close-on-exec, and each of
its pipes twice. A program that goes on in the background would then hold the pipe whose end says
that it is ready. ``subprocess`` executes out of a vfork and closes what is not the program's.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from asyncio.base_subprocess import BaseSubprocessTransport
from typing import TYPE_CHECKING, Any

import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


def run(main: Coroutine[Any, Any, None]) -> None:
    """As ``asyncio.run``, on a loop of this kind."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main)


class Loop(uvloop.Loop):
    """libuv's loop; ``asyncio.create_subprocess_exec`` does on it what it does on asyncio's."""

    async def subprocess_exec(  # type: ignore[override]
        self, protocol_factory: Callable[[], Any], program: Any, *args: Any, **options: Any
    ) -> tuple[asyncio.SubprocessTransport, Any]:
        """As asyncio's, for the options that ``asyncio.create_subprocess_exec`` gives."""
        protocol = protocol_factory()
        connected = self.create_future()
        transport = _Program(
            self, protocol, (program, *args), False, bufsize=0, waiter=connected, **options
        )
        try:
            await connected
        except BaseException:
            transport.close()
            await transport._wait()
            raise
        return transport, protocol


class _Program(BaseSubprocessTransport):
    """A program that was started, and its pipes; a pidfd tells of its end."""

    _loop: Loop
    _proc: subprocess.Popen[bytes]

    def _start(  # type: ignore[override]
        self, args: Any, shell: bool, stdin: Any, stdout: Any, stderr: Any, **options: Any
    ) -> None:
        self._proc = subprocess.Popen(
            args, shell=shell, stdin=stdin, stdout=stdout, stderr=stderr, **options
        )
        pidfd = os.pidfd_open(self._proc.pid)  # nobody else waits for it: it is there
        self._loop.add_reader(pidfd, self._ended, pidfd)

    def get_pipe_transport(self, fd: int) -> Any:
        """As asyncio's."""
        transport: Any = super().get_pipe_transport(fd)
        return _Input(transport) if fd == 0 and transport is not None else transport

    def _ended(self, pidfd: int) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        # What its pipes hold is read before anybody is told.
        self._loop.call_soon(self._process_exited, self._proc.wait())


class _Input:
    """The transport of a program's input: after its end, what is written is dropped.

    uvloop's refuses it with RuntimeError, which ``communicate`` does not expect.
    """

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
