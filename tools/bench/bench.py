"""What a case has at hand: running engines, pictures in a registry, and where figures go."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from tools.bench.engines import CONTAINERDS, DAEMONS
from tools.bench.engines.bare import Bare
from tools.bench.figures import Figures, Subject

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from tools.bench.engines.engine import Engine
    from tools.bench.pictures import Pictures
    from tools.bench.scale import Scale
    from tools.bench.stage import Stage


_WORDS = 600


@dataclass(slots=True)
class Outcome:
    """Whether a block went well."""

    well: bool = True


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that could not be measured, and why."""

    subject: Subject
    what: str
    reason: str


def in_words(error: BaseException) -> str:
    """An error in one line; of several that came together, the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"[:_WORDS]
    return " ".join(f"{type(error).__name__}: {error}".split())[:_WORDS]


@dataclass(slots=True)
class Bench:
    """A run of the bench. ``async with`` ends the engines that it started.

    Attributes:
        say: tells the user what goes on.
        case: the case that is being measured.
    """

    scale: Scale
    stage: Stage
    pictures: Pictures
    say: Callable[[str], None]
    figures: Figures = field(default_factory=Figures)
    failures: list[Failure] = field(default_factory=list)
    case: str = ""
    _engines: dict[str, Engine | None] = field(default_factory=dict)
    _bare: Bare | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Bench:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @contextmanager
    def forgiving(self, subject: Subject, what: str = "") -> Iterator[Outcome]:
        """Turn what goes wrong in a block into a line of the report."""
        outcome = Outcome()
        try:
            yield outcome
        except Exception as error:
            outcome.well = False
            words = in_words(error)
            self.failures.append(Failure(subject, f"{self.case} {what}".strip(), words))
            self.say(f"  {subject.name}: {words}")

    async def containerds(self) -> list[Engine]:
        """What serves containerd's API here: ours, and Debian's."""
        return [engine for kind in CONTAINERDS if (engine := await self._running(kind))]

    async def daemons(self) -> list[Engine]:
        """What serves a user's API here: ours, dockerd, podman."""
        return [engine for kind in DAEMONS if (engine := await self._running(kind))]

    def bare(self) -> Bare:
        """The bare runtimes, with a bundle on a disk of its own."""
        if self._bare is None:
            self._bare = Bare(self.stage.place("bare"), self.pictures.busybox)
        return self._bare

    async def engines(self) -> Sequence[Engine]:
        """All of them."""
        return [*await self.containerds(), *await self.daemons()]

    def place(self, name: str) -> Path:
        """A directory on the stage, with a disk of its own."""
        return self.stage.place(name)

    @asynccontextmanager
    async def started(self, kind: type[Engine]) -> AsyncIterator[Engine]:
        """An engine that has the picture of busybox, and ends with the block."""
        began = time.perf_counter()
        engine = kind(self.stage.place(kind.__name__.lower()), self.pictures)
        try:
            await engine.start()
            await engine.pull(self.pictures.reference(self.pictures.busybox_name))
            self.say(f"  {kind.subject.name} is up ({time.perf_counter() - began:.1f} s)")
            yield engine
        finally:
            await engine.close()

    async def _running(self, kind: type[Engine]) -> Engine | None:
        key = kind.__name__
        if key not in self._engines:
            self._engines[key] = None
            with self.forgiving(kind.subject, "start"):
                self._engines[key] = await self._stack.enter_async_context(self.started(kind))
        return self._engines[key]
