"""Events: what one costs with few and with many of them behind it."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from google.protobuf import any_pb2

from protos.containerd.events import container_pb2
from protos.theseus.journal.v1 import journal_pb2, journal_pb2_grpc
from tools.bench.case import Case
from tools.bench.engines.containerd import DebianContainerd, TheseusContainerd
from tools.bench.engines.containerd_api import channel_to
from tools.bench.engines.engine import CALL_S, BenchError, Plan
from tools.bench.figures import Quantity
from tools.bench.fleet import CLIENTS, concurrently
from tools.bench.rounds import Stopwatch, Trial, interleave

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tools.bench.bench import Bench

AXIS = "events before it"
_NEWEST = 10
_ARRIVAL_S = 10.0
_READY_S = 0.05
"""After so long a silence a probe is published again: the first one was too early."""


def journal_quantity(what: str, at: int) -> Quantity:
    """What is called in the report how."""
    return Quantity("journal", what, at=at, axis=AXIS)


async def _measure(bench: Bench) -> None:
    # Fresh ones: what else the bench does makes events too.
    engines = []
    try:
        for kind in (TheseusContainerd, DebianContainerd):
            engine = kind(bench.place(f"journal-{kind.__name__.lower()}"), bench.pictures)
            engines.append(engine)
            with bench.forgiving(kind.subject, "start"):
                await engine.start()
        published = 0
        for size in bench.scale.events:
            trials = []
            for engine in engines:
                await concurrently(CLIENTS, range(published, size), partial(_fill, engine))
                once = partial(_once, engine, size)
                trials.append(Trial(engine.subject, once, f"{size} events"))
            published = size
            await interleave(bench, trials, bench.scale.rounds)
    finally:
        for engine in engines:
            await engine.close()


async def _fill(engine: TheseusContainerd | DebianContainerd, number: int) -> None:
    await engine.calls.publish("/bench/filler", _event(f"filler-{number}"))


async def _once(engine: TheseusContainerd | DebianContainerd, size: int, watch: Stopwatch) -> None:
    await _delivery(engine, size, watch)
    with watch(journal_quantity("a record made and deleted", size)):
        await engine.calls.delete_record(await engine.calls.record(Plan()))
    if isinstance(engine, TheseusContainerd):
        await _newest(engine.servers[0].address, size, watch)


async def _delivery(
    engine: TheseusContainerd | DebianContainerd, size: int, watch: Stopwatch
) -> None:
    topic = f"/bench/{uuid.uuid4().hex}"
    arrived: asyncio.Queue[str] = asyncio.Queue()

    async def listen() -> None:
        async for envelope in engine.calls.subscribe(topic):
            event = container_pb2.ContainerDelete.FromString(envelope.event.value)
            arrived.put_nowait(event.id)

    async def receive(name: str, limit_s: float) -> None:
        async with asyncio.timeout(limit_s):
            while await arrived.get() != name:
                pass

    listener = asyncio.ensure_future(listen())
    try:
        await _subscribed(engine, topic, receive)
        began = time.perf_counter()
        await engine.calls.publish(topic, _event("timed"))
        await receive("timed", _ARRIVAL_S)
        quantity = journal_quantity("an event from its publisher to a subscriber", size)
        watch.found[quantity] = time.perf_counter() - began
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)


async def _subscribed(
    engine: TheseusContainerd | DebianContainerd,
    topic: str,
    receive: Callable[[str, float], Awaitable[None]],
) -> None:
    """Returns when a subscription stands: nothing but an event that arrives says so."""
    give_up_at = time.monotonic() + _ARRIVAL_S
    while time.monotonic() < give_up_at:
        await engine.calls.publish(topic, _event("probe"))
        with suppress(TimeoutError):
            await receive("probe", _READY_S)
            return
    raise BenchError("no event reaches a subscriber")


async def _newest(socket: Path, size: int, watch: Stopwatch) -> None:
    """Read the last entries of Theseus' journal."""
    async with channel_to(socket) as channel:
        read = journal_pb2_grpc.JournalStub(channel).Read
        everything = journal_pb2.ReadRequest(no_follow=True, from_end=True)
        end = [answer.next_seq async for answer in read(everything, timeout=CALL_S)][-1]
        request = journal_pb2.ReadRequest(no_follow=True)
        setattr(request, "from", end - _NEWEST)  # a word of Python
        with watch(journal_quantity(f"the {_NEWEST} newest events read from the journal", size)):
            answers = [answer async for answer in read(request, timeout=CALL_S)]
    if sum(answer.HasField("entry") for answer in answers) != _NEWEST:
        raise BenchError(f"the journal gave {len(answers)} answers for {_NEWEST} entries")


def _event(name: str) -> any_pb2.Any:
    value = container_pb2.ContainerDelete(id=name).SerializeToString()
    return any_pb2.Any(type_url="containerd.events.ContainerDelete", value=value)


JOURNAL = Case(
    "journal",
    "Events",
    "Theseus keeps events in a journal, on the disk before anybody is told of them; containerd "
    "forgets those that nobody listens to, and writes none down.",
    _measure,
)
