"""Forwards the events of the spool to containerd's ttrpc event service, for ever.

containerd may be down, and back much later: an event stays in the spool until it was taken, each in
its turn. A socket that appears is found at once (see ``clients/appearance.py``), otherwise a
growing pause lies between two attempts. A repeated event is possible, a lost one is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from protos.containerd.services.ttrpc.events.v1 import events_pb2
from protos.containerd.types import event_pb2
from services.common.ttrpc import status
from services.common.ttrpc.client import CallFailed, TtrpcClient
from services.shim.clients.appearance import Appearance
from services.shim.clients.events import pack, timestamp

if TYPE_CHECKING:
    from pathlib import Path

    from services.shim.spool import Spool, SpooledEvent

log = structlog.get_logger(__name__)

SERVICE = "containerd.services.events.ttrpc.v1.Events"
_BACKOFF_FIRST_S = 0.01
_BACKOFF_LAST_S = 1.0
_CALL_LIMIT_S = 5.0
# Whatever containerd comes: asking again would get the same answer, and block all that follow.
_HOPELESS = frozenset({status.INVALID_ARGUMENT, status.UNIMPLEMENTED})


class EventForwarder:
    """Delivers one shim's spool.

    Args:
        address: containerd's ttrpc socket.
        namespace: goes with each event.
        spool: what to deliver.
    """

    def __init__(self, address: Path, *, namespace: str, spool: Spool) -> None:
        self._address = address
        self._namespace = namespace
        self._spool = spool
        self._backoff_s = _BACKOFF_FIRST_S

    async def run(self) -> None:
        """Deliver until cancelled."""
        with Appearance(self._address) as appearance:
            while True:
                try:
                    async with await TtrpcClient.connect(self._address) as client:
                        await self._deliver(client)
                except (OSError, TimeoutError, CallFailed) as error:
                    log.info(
                        "events wait for containerd", error=str(error), waiting=len(self._spool)
                    )
                await appearance.wait(self._backoff_s)
                self._backoff_s = min(self._backoff_s * 2, _BACKOFF_LAST_S)

    async def _deliver(self, client: TtrpcClient) -> None:
        while True:
            spooled = await self._spool.next(self._spool.acked_seq)
            try:
                await client.call(
                    SERVICE, "Forward", self._request(spooled), timeout_s=_CALL_LIMIT_S
                )
            except CallFailed as error:
                if error.code not in _HOPELESS:
                    raise
                log.error("event refused", topic=spooled.event.topic, error=str(error))
            self._spool.acknowledge(spooled.seq)
            self._backoff_s = _BACKOFF_FIRST_S

    def _request(self, spooled: SpooledEvent) -> bytes:
        envelope = event_pb2.Envelope(
            timestamp=timestamp(spooled.timestamp_ns),
            namespace=self._namespace,
            topic=spooled.event.topic,
            event=pack(spooled.event),
        )
        return events_pb2.ForwardRequest(envelope=envelope).SerializeToString()
