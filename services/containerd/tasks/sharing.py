"""Which process serves a task's shim: one of its own, or one that serves others already.

Containers of one group share a process: those of a pod, by the annotations that containerd's own
shims group by, and where it is configured so any containers of a namespace, up to a number. Each
still is a shim of its own here: it has its bundle, registers, dies and is replaced by itself.

One task at a time looks for a process of its group, so that two find the same. A process is joined
only while another task that it serves is there to stay; and who joins it counts as served by it
from before it is asked, so that it is not sent away meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from services.common.errors import FailedPrecondition, Unavailable
from services.containerd.keyed_lock import KeyedLock
from services.containerd.tasks.known import Standing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from services.containerd.tasks.factory import ShimLauncher
    from services.containerd.tasks.known import KnownShim
    from services.containerd.tasks.processes import ProcessId
    from services.containerd.tasks.shim import ShimAddress, ShimRequest

    Meet = Callable[[KnownShim, ShimAddress], None]
    FindWay = Callable[[KnownShim, str], None]

log = structlog.get_logger(__name__)

_AGAIN_S = 0.02
_JOIN_LIMIT_S = 15.0
_JOINABLE = frozenset(
    {
        Standing.STARTING,
        Standing.REACHABLE,
        Standing.REGISTERED,
        Standing.EXPECTED,
        Standing.REPLACING,
    }
)


class Sharing:
    """Starts shims, or has those that run serve one more.

    Args:
        everyone: all shims that are known.
        find_way: learns where a shim serves, or would.
        meet: learns which process serves a shim.
        most: how many containers without a group one process serves.
    """

    def __init__(
        self,
        everyone: Callable[[], Iterable[KnownShim]],
        *,
        find_way: FindWay,
        meet: Meet,
        most: int = 1,
    ) -> None:
        self._everyone = everyone
        self._find_way = find_way
        self._meet = meet
        self._most = most
        self._turns: KeyedLock[tuple[str, str]] = KeyedLock()

    async def start(
        self, launcher: ShimLauncher, known: KnownShim, request: ShimRequest
    ) -> ShimAddress:
        """Have a process serve ``known``; it is met when this returns.

        Raises:
            ShimStartFailed, DeadlineExceeded: as ``ShimLauncher.start_shim``.
            Unavailable: the process that it joined does not answer.
        """
        async with self._turn(known):
            address = await self._join(known, request)
            if address is None:
                address = await launcher.start_shim(request)
            self._meet(known, address)
        return address

    def company(self, known: KnownShim) -> list[KnownShim]:
        """The others that the process of a shim serves, or is about to."""
        if known.process is None:
            return []
        return [
            other
            for other in self._everyone()
            if other is not known and known.process in (other.process, other.joining)
        ]

    @asynccontextmanager
    async def _turn(self, known: KnownShim) -> AsyncIterator[None]:
        if not known.group and self._most == 1:
            yield
            return
        async with self._turns.hold((known.namespace, known.group)):
            yield

    async def _join(self, known: KnownShim, request: ShimRequest) -> ShimAddress | None:
        """Join a process of the group; None where there is none."""
        refused: set[ProcessId] = set()
        while (host := self._find(known, refused)) is not None:
            process = known.joining = host.process
            assert process is not None
            try:
                return await self._ask(known, host.address, process, request)
            except FailedPrecondition as error:
                log.info("shim takes nothing in", container=known.id, reason=error.message)
                refused.add(process)
            finally:
                known.joining = None
        return None

    async def _ask(
        self, known: KnownShim, address: str, process: ProcessId, request: ShimRequest
    ) -> ShimAddress:
        """Ask for as long as the process lives: it may be executing another version of itself."""
        deadline = time.monotonic() + _JOIN_LIMIT_S
        # Over its own connection: that of another task is closed when this is removed.
        self._find_way(known, address)
        assert known.shim is not None
        while True:
            try:
                return await known.shim.host(request)
            except Unavailable as error:
                if not process.alive():
                    raise FailedPrecondition(f"its process has ended: {error.message}") from error
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_AGAIN_S)

    def _find(self, known: KnownShim, refused: set[ProcessId]) -> KnownShim | None:
        """A shim whose process has room for one more of this group."""
        if not known.group and self._most == 1:
            return None
        served: dict[ProcessId, list[KnownShim]] = {}
        for other in self._everyone():
            same = (other.namespace, other.group) == (known.namespace, known.group)
            same = same and not other.binary  # such find their groups themselves
            process = other.joining or other.process
            if other is not known and same and process is not None and process not in refused:
                served.setdefault(process, []).append(other)
        for process, shims in served.items():
            hosts = [s for s in shims if s.process == process and s.standing in _JOINABLE]
            room = bool(known.group) or len(shims) < self._most
            if hosts and room and process.alive():
                return hosts[0]
        return None


async def leave(known: KnownShim, *, now: bool, limit_s: float) -> bool:
    """Have a process that serves others too serve ``known`` no longer.

    Returns:
        False if it does not answer in time, while it lives.
    """
    try:
        async with asyncio.timeout(limit_s):
            while known.process is not None and known.process.alive() and known.shim is not None:
                try:
                    await known.shim.leave(now=now)
                except Unavailable:
                    await asyncio.sleep(_AGAIN_S)
                except FailedPrecondition:  # a container that containerd does not know of
                    now = True
                else:
                    return True
    except TimeoutError:
        return False
    return True
