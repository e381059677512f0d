"""Keeps a shim registered with containerd, for ever, and delivers the events of its spool.

The stream is opened as soon as the shim serves, and again whenever it breaks: by ttrpc on the
socket beside containerd's, or by gRPC on the socket itself where containerd is of an older version,
which has no register there. A watch on the sockets' directory wakes a waiting shim the moment that
one appears there, a growing pause does where a watch cannot (an address in use by a process that is
going away). Where many shims run each waits for a turn, at random, when it has lost its
registration and when a socket appears: all together would keep the processors from containerd's
first answers. There is a watch only while there is no registration: most shims never need one.
"""

from __future__ import annotations

import asyncio
import random
import socket
from enum import Enum
from typing import TYPE_CHECKING, Any

import structlog
from google.protobuf.message import DecodeError

from protos.theseus.shim.v1 import registry_pb2
from services.common.client import connect
from services.common.errors import TheseusError, Unavailable, Unimplemented
from services.common.peer import Peer
from services.common.peer_streams import GrpcStream
from services.shim.clients.appearance import Appearance
from services.shim.clients.events import pack, timestamp

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from services.common.message_stream import MessageStream
    from services.shim.metrics import ShimMetrics
    from services.shim.spool import Spool

log = structlog.get_logger(__name__)

PROTOCOL = 1
_METHOD = "theseus.shim.v1.Registry/Register"
_BACKOFF_FIRST_S = 0.01
_BACKOFF_LAST_S = 1.0
_ATTEMPTS = 5
"""Quick ones, once a socket has appeared."""
_WELCOME_LIMIT_S = 10.0
_CONNECT_LIMIT_S = 1.0
_TURN_S = 0.001
"""About the processor time that a registration takes on both sides, shared by two processors."""
_TURNS_LAST_S = 2.0


class _Found(Enum):
    """What an attempt to register met with."""

    NOBODY = "nobody listens"
    REFUSAL = "somebody listens, who did not say Welcome"
    WELCOME = "a registration, which has ended"


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
        crowd: directory with a socket of each shim: they do not come back in the same moment.
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
        crowd: Path | None = None,
    ) -> None:
        self.epoch = epoch
        self._crowd = crowd
        self.registered = False
        self._address = address
        self._peer = Peer(address.with_name(f"{address.name}.ttrpc"))
        self._appearance = Appearance(address)
        self._hello = hello
        self._spool = spool
        self._metrics = metrics
        self._epoch_seen = epoch_seen

    async def run(self) -> None:
        """Stay registered until cancelled."""
        pause_s, attempts = _BACKOFF_FIRST_S, 1
        try:
            while True:
                found = await self._register()
                if found is _Found.WELCOME:
                    pause_s, attempts = _BACKOFF_FIRST_S, 1
                    await asyncio.sleep(self._turn_s())  # others have just lost theirs, too
                self._appearance.open()
                limit_s = pause_s
                if found is _Found.NOBODY and not attempts and self._appearance.watching:
                    limit_s = _BACKOFF_LAST_S
                else:  # it may have come before there was a watch, or does not listen yet
                    pause_s, attempts = min(pause_s * 2, _BACKOFF_LAST_S), max(attempts - 1, 0)
                if await self._appearance.wait(limit_s):
                    pause_s, attempts = _BACKOFF_FIRST_S, _ATTEMPTS
                    await asyncio.sleep(self._turn_s())
        finally:
            self._appearance.close()

    def _turn_s(self) -> float:
        """How long to wait for a turn: at random, and the longer the more shims there are."""
        try:
            number = sum(1 for _ in self._crowd.iterdir()) if self._crowd is not None else 0
        except OSError:
            number = 0
        return random.uniform(0, min(number * _TURN_S, _TURNS_LAST_S))

    async def _register(self) -> _Found:
        """One registration, to its end."""
        try:
            stream = await self._peer.stream(_METHOD)
            return await self._go_through(stream)
        except (Unavailable, Unimplemented):  # nobody listens there, or has a register
            return await self._register_with_older()

    async def _register_with_older(self) -> _Found:
        if not await self._is_there():
            return _Found.NOBODY
        channel = connect(self._address)
        try:
            method: Any = channel.stream_stream(f"/{_METHOD}")  # no serializers: bytes both ways
            return await self._go_through(GrpcStream(method()))
        except Unimplemented:
            log.warning("containerd has no register of shims", address=str(self._address))
            return _Found.REFUSAL
        finally:
            await channel.close()

    async def _is_there(self) -> bool:
        """Whether somebody listens: gRPC holds on to a Hello until one does, and it gets old."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                async with asyncio.timeout(_CONNECT_LIMIT_S):
                    await asyncio.get_running_loop().sock_connect(probe, str(self._address))
            except (OSError, TimeoutError):
                return False
        return True

    async def _go_through(self, stream: MessageStream) -> _Found:
        """A registration on a stream that has just begun."""
        welcomed = False
        try:
            welcome = await self._welcome(stream)
            welcomed = True
            self._accept(welcome)
            await self._deliver(stream)
        except Unimplemented:
            raise
        except _Refused as refused:
            log.warning("registration refused", reason=str(refused))
        except TheseusError as error:
            log.info("registration ended", error=error.message, welcomed=welcomed)
        finally:
            self.registered = False
            stream.close()
        return _Found.WELCOME if welcomed else _Found.REFUSAL

    async def _welcome(self, stream: MessageStream) -> registry_pb2.Welcome:
        try:
            async with asyncio.timeout(_WELCOME_LIMIT_S):
                hello = registry_pb2.RegisterRequest(hello=self._hello())
                await stream.send(hello.SerializeToString())
                answer = await stream.receive()
        except TimeoutError:
            raise _Refused(f"containerd said nothing within {_WELCOME_LIMIT_S:g} s") from None
        if answer is None:
            raise _Refused("containerd ended the stream without a welcome")
        response = _response(answer)
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

    async def _deliver(self, stream: MessageStream) -> None:
        both = [asyncio.create_task(self._receive(stream)), asyncio.create_task(self._send(stream))]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        for task in done:
            task.result()

    async def _receive(self, stream: MessageStream) -> None:
        while (answer := await stream.receive()) is not None:
            response = _response(answer)
            if response.WhichOneof("message") == "ack":
                self._spool.acknowledge(response.ack.seq)

    async def _send(self, stream: MessageStream) -> None:
        sent = self._spool.acked_seq
        while True:
            spooled = await self._spool.next(sent)
            request = registry_pb2.RegisterRequest(
                event=registry_pb2.Event(
                    seq=spooled.seq,
                    timestamp=timestamp(spooled.timestamp_ns),
                    topic=spooled.event.topic,
                    event=pack(spooled.event),
                )
            )
            await stream.send(request.SerializeToString())
            sent = spooled.seq


def _response(message: bytes) -> registry_pb2.RegisterResponse:
    try:
        return registry_pb2.RegisterResponse.FromString(message)
    except DecodeError as error:
        raise _Refused("containerd said what cannot be decoded") from error
