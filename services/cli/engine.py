"""The daemon as the commands see it: its services, deadlines, and patience when it restarts."""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from services.common.errors import Cancelled, DeadlineExceeded, TheseusError, Unavailable

# gRPC's own words about a lost connection are not for the user's terminal.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
from services.common.client import connect
from services.common.rpc_errors import translated

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    import grpc

    from protos.theseus.engine.v1.containers_pb2_grpc import ContainersStub, ExecsStub
    from protos.theseus.engine.v1.images_pb2_grpc import ImagesStub
    from protos.theseus.engine.v1.system_pb2_grpc import SystemStub, VolumesStub

    Request = TypeVar("Request")
    Response = TypeVar("Response")

DEADLINE_S = 60.0
"""For calls that are quick, or bounded by the engine's own limits."""

LONG_DEADLINE_S = 3600.0
"""For calls that transfer as much as there is."""

WAIT_S = 600.0
"""A wait is asked again after this long."""

PATIENCE_S = 30.0
"""How long something that can be resumed waits for an engine that went away."""

_CONNECT_S = 0.5
_UNREADY_S = 10.0
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0
# What gRPC says when it is the connection that failed, and not a tier below.
_NO_CONNECTION = "failed to connect to all addresses"
_CONNECTION_WORDS = (
    _NO_CONNECTION,
    "Socket closed",
    "Cancelling all calls",
    "Connection reset",
    "recvmsg:",
    "GOAWAY",
)


class _Unreached(Unavailable):
    """The request was not sent: there was no connection."""


class _Interrupted(Unavailable):
    """The connection broke before the answer came."""


class Engine:
    """A connection to the daemon at ``host``, ``unix:///PATH`` or a path; made when first used."""

    def __init__(self, host: str) -> None:
        self.socket = Path(host.removeprefix("unix://"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if "_channel" in self.__dict__:
            await self._channel.close()

    @cached_property
    def containers(self) -> ContainersStub:
        """Containers."""
        from protos.theseus.engine.v1.containers_pb2_grpc import ContainersStub

        return ContainersStub(self._channel)

    @cached_property
    def execs(self) -> ExecsStub:
        """Processes added to containers."""
        from protos.theseus.engine.v1.containers_pb2_grpc import ExecsStub

        return ExecsStub(self._channel)

    @cached_property
    def images(self) -> ImagesStub:
        """Images."""
        from protos.theseus.engine.v1.images_pb2_grpc import ImagesStub

        return ImagesStub(self._channel)

    @cached_property
    def system(self) -> SystemStub:
        """The engine itself."""
        from protos.theseus.engine.v1.system_pb2_grpc import SystemStub

        return SystemStub(self._channel)

    @cached_property
    def volumes(self) -> VolumesStub:
        """Volumes."""
        from protos.theseus.engine.v1.system_pb2_grpc import VolumesStub

        return VolumesStub(self._channel)

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        deadline_s: float = DEADLINE_S,
        resumes: bool = False,
    ) -> Response:
        """One call; one that ``resumes`` something waits for an engine that went away.

        Raises:
            TheseusError: what the engine said, or that it cannot be reached.
        """

        async def attempt() -> Response:
            return await method(request, timeout=deadline_s)

        return await self.insist(
            attempt, repeatable=resumes, connect_s=PATIENCE_S if resumes else _CONNECT_S
        )

    async def insist(
        self,
        attempt: Callable[[], Awaitable[Response]],
        *,
        repeatable: bool,
        connect_s: float = _CONNECT_S,
    ) -> Response:
        """Make an attempt at a call until the engine has heard it.

        Args:
            attempt: makes the call.
            repeatable: whether one that broke off may be made again, whatever came of it.
            connect_s: how long the engine may be away at first.

        Raises:
            TheseusError: what the engine said, or that it cannot be reached.
        """
        unreached, unready = Patience(connect_s), Patience(_UNREADY_S)
        while True:
            try:
                with self.failures():
                    return await attempt()
            except (_Interrupted, Cancelled) as error:
                if not repeatable:
                    raise  # it may have been done: only the caller knows whether to ask again
                unreached = Patience()  # it was there, and will be again
                await unreached.pause(error)
            except _Unreached as error:
                await unreached.pause(error)
            except Unavailable as error:
                # The daemon answers that a tier below is away, and that nothing was done.
                await unready.pause(error)

    async def wait(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request
    ) -> Response:
        """A call whose answer may take for ever, asked again when the engine restarts."""
        patience = Patience()
        while True:
            try:
                return await self.call(method, request, deadline_s=WAIT_S)
            except DeadlineExceeded:
                patience = Patience()
            except (Unavailable, Cancelled) as error:
                await patience.pause(error)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turn what goes wrong with a call inside the block into our errors.

        Raises:
            TheseusError: what the engine said, or that it cannot be reached.
        """
        try:
            with translated():
                yield
        except Unavailable as error:
            if any(words in error.message for words in _CONNECTION_WORDS):
                lost = _Unreached if _NO_CONNECTION in error.message else _Interrupted
                raise lost(self._unreachable(error.message)) from None
            raise
        except DeadlineExceeded as error:
            if error.message == "Deadline Exceeded":  # gRPC's words, not the engine's
                raise DeadlineExceeded(
                    f"the engine at {self.socket} did not answer in time"
                ) from None
            raise

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return connect(self.socket)

    def _unreachable(self, words: str) -> str:
        if "Permission denied" in words:
            return (
                f"permission to use the engine's socket {self.socket} was denied: "
                f"be root, or a member of the group that owns it"
            )
        return (
            f"cannot reach the engine at {self.socket}: "
            f"start it with 'theseus up', or name another socket with --host"
        )


class Patience:
    """Pauses between attempts to reach an engine that went away, within a time limit."""

    def __init__(self, limit_s: float = PATIENCE_S) -> None:
        self._limit_s = limit_s
        self._since: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    async def pause(self, error: TheseusError) -> None:
        """Wait before the next attempt; raises ``error`` once the time is up."""
        now = asyncio.get_running_loop().time()
        self._since = now if self._since is None else self._since
        if now - self._since >= self._limit_s:
            raise error
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)

    def reset(self) -> None:
        """The engine answered: the next failure is a new one."""
        self._since, self._pause_s = None, _FIRST_PAUSE_S
