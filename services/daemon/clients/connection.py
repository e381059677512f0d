"""The connection to containerd, and the words for its absence."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import empty_pb2

from protos.containerd.services.version.v1 import version_pb2_grpc
from services.common.background import Background
from services.common.client import connect
from services.common.errors import Cancelled, DeadlineExceeded, Unavailable
from services.common.rpc_errors import translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TIMEOUT_S = 30.0
"""For calls that are quick, but may have to wait for a shim that is registering again."""

_PROBE_TIMEOUT_S = 2.0
_RETRY_AFTER_S = 1.0
# What gRPC itself says when there is no connection, or it broke; containerd has other words.
_TRANSPORT_WORDS = (
    "failed to connect",
    "Socket closed",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "recvmsg",
    "sendmsg",
    "GOAWAY",
    "Cancelling all calls",
    "CANCELLED",
    "No such file or directory",
    "connections to all backends failing",
)


async def end_call(call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
    """End a call whose requests were written one by one, whatever state it is in."""
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.done_writing()
    call.cancel()


class Connection:
    """One channel to containerd in one namespace; closed by :meth:`close`."""

    def __init__(self, socket: Path, namespace: str) -> None:
        self.socket = socket
        self.namespace = namespace
        self.channel = connect(socket, namespace=namespace)
        self._background = Background()

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Turn what goes wrong with calls in the block into our errors, in words for users."""
        try:
            with translated():
                yield
        except (Unavailable, Cancelled) as error:
            # CANCELLED from the peer: it was told to stop, and did not wait for this call.
            words = any(word in error.message for word in _TRANSPORT_WORDS)
            if words or isinstance(error, Cancelled):
                raise Unavailable(
                    f"containerd at {self.socket} cannot be reached: it is not running, or is "
                    "being restarted; try again, or start it",
                    retry_after_s=_RETRY_AFTER_S,
                ) from error
            raise
        except DeadlineExceeded as error:
            if error.message == "Deadline Exceeded":
                raise DeadlineExceeded(
                    f"containerd at {self.socket} did not answer in time"
                ) from error
            raise

    async def version(self) -> str:
        """containerd's version; empty when it does not answer."""
        stub = version_pb2_grpc.VersionStub(self.channel)
        try:
            with self.calls():
                answer = await stub.Version(empty_pb2.Empty(), timeout=_PROBE_TIMEOUT_S)
        except (Unavailable, DeadlineExceeded):
            return ""
        return answer.version

    def when_lost(self, forget: Callable[[], None]) -> None:
        """Call ``forget`` when the connection ends: the next may be to another version.

        Calls do not tell: gRPC makes those again that had no answer yet, even a stream.
        """
        self._background.start(self._watch(forget), name="connection to containerd")

    async def _watch(self, forget: Callable[[], None]) -> None:
        ready = grpc.ChannelConnectivity.READY
        while self.channel.get_state() is ready:
            await self.channel.wait_for_state_change(ready)
        forget()

    async def close(self) -> None:
        """Close the channel."""
        await self._background.stop()
        await self.channel.close()
