"""Has shims execute the version of the program that new shims are started with.

The call that asks for it breaks when it happens, and is asked again until the new version answers,
or the old one that was rolled back. A shim that does neither is killed: containerd then starts a
successor for it, as for every shim that dies.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from services.common.errors import DeadlineExceeded, TheseusError, Unavailable
from services.common.frozen import frozen
from services.containerd.tasks.processes import ProcessHandle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from services.containerd.tasks.known import KnownShim
    from services.containerd.tasks.processes import ProcessId
    from services.containerd.tasks.shim import Reexecuted
    from services.containerd.tasks.shims import ShimManager

log = structlog.get_logger(__name__)

_AT_ONCE = 2
_AGAIN_S = 0.05
_KILL_S = 5.0


@frozen
class Upgraded:
    """What became of one shim; ``error`` is empty when it was upgraded."""

    container_id: str
    version_before: str = ""
    version: str = ""
    generation: int = 0
    downtime_us: int = 0
    error: str = ""


class ShimUpgrades:
    """Upgrades shims.

    Args:
        shims: the register.
        program: how to run ``theseus-shim``; an absolute path first.
        limit_s: how long one shim may take.
    """

    def __init__(
        self, shims: ShimManager, program: Sequence[str], *, limit_s: float = 120.0
    ) -> None:
        self._shims = shims
        self._program = tuple(program)
        self._limit_s = limit_s

    async def upgrade(
        self, namespace: str, container_ids: Sequence[str]
    ) -> AsyncIterator[Upgraded]:
        """Upgrade the shims of these containers, or of all if there are none; yields each.

        A process that serves several of them is executed anew once.

        Raises:
            TaskNotFound: one of them has no task; nothing is done.
        """
        if container_ids:
            wanted = [self._shims.get(namespace, container_id) for container_id in container_ids]
        else:
            wanted = [k for k in self._shims.all(namespace) if k.dismissed is None]
        turns = asyncio.Semaphore(_AT_ONCE)
        first: dict[ProcessId | None, asyncio.Future[Upgraded]] = {}
        tasks: list[asyncio.Future[Upgraded]] = []
        for known in wanted:
            leader = first.get(known.process) if known.process is not None else None
            if leader is not None:
                tasks.append(asyncio.ensure_future(_with(leader, known)))
            else:
                tasks.append(asyncio.ensure_future(self._in_turn(known, turns)))
                first[known.process] = tasks[-1]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _in_turn(self, known: KnownShim, turns: asyncio.Semaphore) -> Upgraded:
        async with turns:
            before = ""
            try:
                async with asyncio.timeout(self._limit_s):
                    info = await (await known.ready()).info()
                    before = info.version
                    done = await self._reexecute(known, info.generation + 1)
            except TheseusError as error:
                return Upgraded(known.id, before, error=error.message)
            except TimeoutError:
                return Upgraded(known.id, before, error=await self._give_up(known))
            log.info(
                "shim upgraded",
                namespace=known.namespace,
                container=known.id,
                before=before,
                version=done.version,
            )
            return Upgraded(known.id, before, done.version, done.generation, done.downtime_us)

    async def _reexecute(self, known: KnownShim, generation: int) -> Reexecuted:
        process = known.process
        while True:
            shim = await known.ready()
            if known.process != process:  # it died over it, and its successor counts anew
                process, generation = known.process, (await shim.info()).generation + 1
            try:
                return await shim.reexec(self._program, generation)
            except (Unavailable, DeadlineExceeded) as error:
                log.debug("upgrade is asked again", container=known.id, reason=error.message)
            await known.change(timeout_s=_AGAIN_S)

    async def _give_up(self, known: KnownShim) -> str:
        """Kill a shim that does not answer any more, if it still is the process we know."""
        began = time.monotonic()
        handle = ProcessHandle.open(known.process) if known.process is not None else None
        if handle is not None:
            with handle:
                await handle.kill(timeout_s=_KILL_S)
        log.error("shim does not come up", container=known.id, waited_s=time.monotonic() - began)
        return f"it did not answer within {self._limit_s:.0f} s, was killed, and is replaced"


async def _with(leader: asyncio.Future[Upgraded], known: KnownShim) -> Upgraded:
    """What becomes of a shim whose process is that of another."""
    return replace(await asyncio.shield(leader), container_id=known.id)
