"""Keeps a shim registered with containerd, for ever, and delivers the events of its spool.

The stream is opened as soon as the shim serves, and again whenever it breaks. Whether containerd is
there again is found out with a plain connect, which costs nothing, before gRPC is bothered; a watch
on the socket's directory wakes a waiting shim the moment that a socket appears there, a growing
pause does where a watch cannot (an address in use by a process that is going away). There is a
watch only while there is no registration: most shims never need one.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from protos.theseus.shim.v1 import registry_pb2, registry_pb2_grpc
from services.common.client import connect
from services.shim.clients.appearance import Appearance
from services.shim.clients.events import pack, timestamp

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from services.shim.metrics import ShimMetrics
    from services.shim.spool import Spool

    _Call = grpc.aio.StreamStreamCall[registry_pb2.RegisterRequest, registry_pb2.RegisterResponse]

log = structlog.get_logger(__name__)

PROTOCOL = 1
_BACKOFF_FIRST_S = 0.01
_BACKOFF_LAST_S = 1.0
_WELCOME_LIMIT_S = 10.0
_CONNECT_LIMIT_S = 1.0


class _Refused(Exception):
    """The stream stands, and this shim does not want it, or is not wanted."""


class RegistryClient:
    """The registration of one shim.

    Args:
        address: containerd's socket.
        hello: makes the Hello of this moment.
        spool: what to deliver.
        metrics: counts registrations.
        epoch: highest epoch seen by an earlier process of this shim.
        epoch_seen: called when a higher one was seen, to keep it.
        make_channel: connects to a socket.
    """

    def __init__(
        self,
        address: Path,
        *,
        hello: Callable[[], registry_pb2.Hello],
        spool: Spool,
        metrics: ShimMetrics,
        epoch: int,
        epoch_seen: Callable[[int], None],
        make_channel: Callable[[Path], Any] = connect,
    ) -> None:
        self.epoch = epoch
        self.registered = False
        self._address = address
        self._appearance = Appearance(address)
        self._hello = hello
        self._spool = spool
        self._metrics = metrics
        self._epoch_seen = epoch_seen
        self._make_channel = make_channel

    async def run(self) -> None:
        """Stay registered until cancelled."""
        backoff_s = _BACKOFF_FIRST_S
        try:
            while True:
                if await self._is_there():
                    welcomed = await self._register()
                    backoff_s = _BACKOFF_FIRST_S if welcomed else backoff_s
                # What appeared before there was a watch is found after the first, short pause.
                self._appearance.open()
                await self._appearance.wait(backoff_s)
                backoff_s = min(backoff_s * 2, _BACKOFF_LAST_S)
        finally:
            self._appearance.close()

    async def _is_there(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                async with asyncio.timeout(_CONNECT_LIMIT_S):
                    await asyncio.get_running_loop().sock_connect(probe, str(self._address))
            except (OSError, TimeoutError):
                return False
        return True

    async def _register(self) -> bool:
        """One registration, to its end; returns whether it was ever welcomed."""
        welcomed = False
        channel = self._make_channel(self._address)
        try:
            call = registry_pb2_grpc.RegistryStub(channel).Register()
            welcome = await self._welcome(call)
            welcomed = True
            self._accept(welcome)
            await self._deliver(call)
        except _Refused as refused:
            log.warning("registration refused", reason=str(refused))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, OSError) as error:
            log.info("registration ended", error=_in_words(error), welcomed=welcomed)
        finally:
            self.registered = False
            await channel.close()
        return welcomed

    async def _welcome(self, call: _Call) -> registry_pb2.Welcome:
        async with asyncio.timeout(_WELCOME_LIMIT_S):
            await call.write(registry_pb2.RegisterRequest(hello=self._hello()))
            response = await call.read()
        if not isinstance(response, registry_pb2.RegisterResponse):  # EOF
            raise _Refused("containerd ended the stream without a welcome")
        if response.WhichOneof("message") != "welcome":
            raise _Refused("containerd's first message is not a welcome")
        return response.welcome

    def _accept(self, welcome: registry_pb2.Welcome) -> None:
        if welcome.epoch < self.epoch:
            self._metrics.refused_epochs.inc()
            raise _Refused(
                f"containerd {welcome.containerd_id} has epoch {welcome.epoch}, and this shim has "
                f"seen {self.epoch}: another containerd took over"
            )
        if welcome.protocol != PROTOCOL:
            raise _Refused(f"containerd chose protocol version {welcome.protocol}")
        if welcome.epoch > self.epoch:
            self.epoch = welcome.epoch
            self._epoch_seen(welcome.epoch)
        self._spool.acknowledge(welcome.last_acked_seq)
        self._metrics.registrations.inc()
        self.registered = True
        self._appearance.close()
        log.info("registered", containerd_id=welcome.containerd_id, epoch=welcome.epoch)

    async def _deliver(self, call: _Call) -> None:
        both = [asyncio.create_task(self._receive(call)), asyncio.create_task(self._send(call))]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        for task in done:
            task.result()

    async def _receive(self, call: _Call) -> None:
        while isinstance(response := await call.read(), registry_pb2.RegisterResponse):
            if response.WhichOneof("message") == "ack":
                self._spool.acknowledge(response.ack.seq)

    async def _send(self, call: _Call) -> None:
        sent = self._spool.acked_seq
        while True:
            spooled = await self._spool.next(sent)
            await call.write(
                registry_pb2.RegisterRequest(
                    event=registry_pb2.Event(
                        seq=spooled.seq,
                        timestamp=timestamp(spooled.timestamp_ns),
                        topic=spooled.event.topic,
                        event=pack(spooled.event),
                    )
                )
            )
            sent = spooled.seq


def _in_words(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
