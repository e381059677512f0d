"""Many idle containers of one engine."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from tools.bench.engines.engine import IDLE, BenchError, Plan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from tools.bench.engines.engine import Engine

T = TypeVar("T")

CLIENTS = 8


class Fleet:
    """Idle containers; they are destroyed at the end of :func:`fleet`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.containers: list[str] = []
        self._others = 0

    async def look(self) -> None:
        """Count what runs already: something that failed may have left it."""
        self._others = await self._engine.running()

    async def grow(self, size: int, *, clients: int = CLIENTS, network: str = "none") -> None:
        """Start containers until there are ``size``, ``clients`` at a time."""
        plan = Plan(command=IDLE, network=network)

        async def start(_: int) -> None:
            container = await self._engine.create(plan)
            self.containers.append(container)
            await self._engine.begin(container)

        await concurrently(clients, range(len(self.containers), size), start)

    async def check(self) -> None:
        """All run.

        Raises:
            BenchError: some do not.
        """
        running = await self._engine.running() - self._others
        if running != len(self.containers):
            raise BenchError(f"{running} of {len(self.containers)} containers are running")

    async def destroy(self) -> None:
        """Destroy them all."""
        found, self.containers = self.containers, []
        await concurrently(CLIENTS, found, self._engine.destroy)


@asynccontextmanager
async def fleet(engine: Engine, size: int = 0) -> AsyncIterator[Fleet]:
    """A fleet of ``size`` that is there inside the block."""
    ships = Fleet(engine)
    await ships.look()
    try:
        await ships.grow(size)
        yield ships
    except BaseException:
        with suppress(Exception):  # what went wrong first is what counts
            await ships.destroy()
        raise
    await ships.destroy()


async def concurrently(
    clients: int, things: Iterable[T], do: Callable[[T], Awaitable[object]]
) -> None:
    """Do it for each thing, so many at a time; the first failure ends all."""
    queue = iter(things)

    async def client() -> None:
        for thing in queue:
            await do(thing)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
