"""Publishing, subscribing with filters, and the encoding of events' messages."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from protos.containerd.events import container_pb2, task_pb2
from services.common.errors import InvalidArgument
from services.containerd.events.exchange import Exchange
from services.containerd.rpc.encoding import decode_event, encode_event
from services.containerd.rpc.events import event_field
from services.containerd.typed import TypedValue
from tests.fakes.metadata import Metadata, open_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NS = "test"
EXIT = TypedValue(
    "containerd.events.TaskExit",
    task_pb2.TaskExit(container_id="c1", id="e1", pid=7, exit_status=3).SerializeToString(),
)
CREATE = container_pb2.ContainerCreate(id="c1", image="busybox")
CREATE.runtime.name = "io.containerd.runc.v2"
CREATE.runtime.options.type_url = EXIT.type_url
CREATE.runtime.options.value = EXIT.value
CREATED = TypedValue("containerd.events.ContainerCreate", CREATE.SerializeToString())
UPDATED = TypedValue(
    "containerd.events.ContainerUpdate",
    container_pb2.ContainerUpdate(id="c1", labels={"a.b": "x"}).SerializeToString(),
)


@pytest.fixture
async def meta(tmp_path: Path) -> AsyncIterator[Metadata]:
    async with open_metadata(tmp_path) as opened:
        yield opened


@pytest.fixture
def exchange(meta: Metadata) -> Exchange:
    return Exchange(meta.db, meta.journal, event_field)


async def test_a_subscriber_gets_what_comes_after_it(exchange: Exchange) -> None:
    await exchange.publish(NS, "/before", EXIT)
    entries = exchange.subscribe([])
    first = asyncio.create_task(anext(entries))
    while not first.done():
        await exchange.publish(NS, "/tasks/exit", EXIT)
        await asyncio.wait([first], timeout=0.01)
    entry = await first
    assert (entry.namespace, entry.topic, entry.event) == (NS, "/tasks/exit", EXIT)


@pytest.mark.parametrize(
    ("wanted", "topics"),
    [
        ([], ["/tasks/exit", "/containers/create", "/containers/update", "/other"]),
        (['topic=="/tasks/exit"'], ["/tasks/exit"]),
        (['topic~="^/containers/"'], ["/containers/create", "/containers/update"]),
        (["namespace==else"], ["/other"]),
        (["event"], []),
        (["event.container_id==c1"], ["/tasks/exit"]),
        (["event.id==c1"], ["/containers/create", "/containers/update"]),
        (["event.runtime.name==io.containerd.runc.v2"], ["/containers/create"]),
        (["event.runtime.options.id==e1"], ["/containers/create"]),
        (['event.labels."a.b"==x'], ["/containers/update"]),
        (["event.pid"], []),
        (["event.nothing", 'topic=="/other"'], ["/other"]),
    ],
)
async def test_filters(
    exchange: Exchange, meta: Metadata, wanted: list[str], topics: list[str]
) -> None:
    got: list[str] = []
    ready = asyncio.Event()

    async def follow() -> None:
        also_end = [*wanted, 'topic=="/end"'] if wanted else []
        async for entry in exchange.subscribe(also_end):
            if entry.topic == "/end":
                ready.set()
                if entry.namespace == "end":
                    return
            else:
                got.append(entry.topic)

    follower = asyncio.create_task(follow())
    while not ready.is_set() and not follower.done():  # until the subscription stands
        await exchange.publish(NS, "/end", EXIT)
        await asyncio.sleep(0)
    await exchange.publish(NS, "/tasks/exit", EXIT)
    await exchange.publish(NS, "/containers/create", CREATED)
    await exchange.publish(NS, "/containers/update", UPDATED)
    await exchange.publish("else", "/other", TypedValue("unknown.Type", b"\xff"))
    await exchange.publish("end", "/end", EXIT)
    async with asyncio.timeout(5):
        await follower
    assert got == topics


async def test_a_filter_that_does_not_parse_is_refused(exchange: Exchange) -> None:
    with pytest.raises(InvalidArgument):
        await anext(exchange.subscribe(["topic="]))


@pytest.mark.parametrize("topic", ["", "/", "tasks", "//", "/a b", "/a/", "/tasks/.."])
async def test_a_malformed_topic_is_refused(exchange: Exchange, meta: Metadata, topic: str) -> None:
    with pytest.raises(InvalidArgument):
        await exchange.publish(NS, topic, EXIT)
    with pytest.raises(InvalidArgument):
        await exchange.publish("bad namespace", "/ok", EXIT)
    assert await meta.events() == []


async def test_a_forwarded_event_keeps_its_time(exchange: Exchange, meta: Metadata) -> None:
    await exchange.publish(NS, "/a", EXIT, timestamp_ns=17)
    [entry] = [entry async for entry in meta.journal.read(follow=False)]
    assert entry.timestamp_ns == 17


def test_messages_are_encoded_by_field_names() -> None:
    encoded = encode_event(
        "containerd.events.TaskCreate",
        {
            "container_id": "c",
            "rootfs": [{"type": "bind", "options": ("ro", "rbind")}],
            "io": {"stdin": "", "terminal": True},
            "pid": 3,
            "checkpoint": None,
        },
    )
    message = task_pb2.TaskCreate.FromString(encoded)
    assert message.container_id == "c"
    assert list(message.rootfs[0].options) == ["ro", "rbind"]
    assert message.io.terminal
    assert message.pid == 3


def test_times_maps_and_any_are_encoded() -> None:
    encoded = encode_event("containerd.events.TaskExit", {"id": "x", "exited_at": 1_500_000_000})
    exited_at = task_pb2.TaskExit.FromString(encoded).exited_at
    assert (exited_at.seconds, exited_at.nanos) == (1, 500_000_000)
    encoded = encode_event(
        "containerd.events.ContainerCreate", {"runtime": {"name": "r", "options": EXIT}}
    )
    options = container_pb2.ContainerCreate.FromString(encoded).runtime.options
    assert (options.type_url, options.value) == (EXIT.type_url, EXIT.value)
    encoded = encode_event("containerd.events.ContainerUpdate", {"labels": {"a": "b"}})
    assert dict(container_pb2.ContainerUpdate.FromString(encoded).labels) == {"a": "b"}


def test_what_cannot_be_decoded_is_none() -> None:
    assert decode_event(TypedValue("unknown.Type", b"")) is None
    assert decode_event(TypedValue(EXIT.type_url, b"\xff\xff")) is None
    assert event_field(TypedValue("unknown.Type", b""), ["id"]) is None
    prefixed = TypedValue("type.googleapis.com/" + EXIT.type_url, EXIT.value)
    assert event_field(prefixed, ["container_id"]) == "c1"
