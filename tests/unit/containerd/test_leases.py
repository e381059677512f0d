"""Leases: their life, their resources, and the lease that work runs under."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from services.common.errors import AlreadyExists, InvalidArgument, NotFound, Unimplemented
from services.containerd.leases.lease import (
    EXPIRE_LABEL,
    Resource,
    add_resource,
    current_lease,
    snapshots_type,
)
from tests.fakes.metadata import Metadata, open_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NS = "test"
DIGEST = "sha256:" + "a" * 64


@pytest.fixture
async def meta(tmp_path: Path) -> AsyncIterator[Metadata]:
    async with open_metadata(tmp_path) as opened:
        yield opened


async def test_life_of_a_lease(meta: Metadata) -> None:
    lease = await meta.leases.create(NS, "mine", {"a": "1"})
    assert lease.created_at_ns > 0
    assert await meta.leases.find(NS) == [lease]
    with pytest.raises(AlreadyExists):
        await meta.leases.create(NS, "mine")
    await meta.leases.delete(NS, "mine")
    assert meta.mutations.deletions
    with pytest.raises(NotFound, match="lease 'mine' does not exist"):
        await meta.leases.delete(NS, "mine")


async def test_without_an_id_each_gets_its_own(meta: Metadata) -> None:
    assert (await meta.leases.create(NS)).id != (await meta.leases.create(NS)).id


async def test_find_filters(meta: Metadata) -> None:
    await meta.leases.create(NS, "a", {"k": "v"})
    await meta.leases.create(NS, "b")
    assert [lease.id for lease in await meta.leases.find(NS, ["labels.k==v"])] == ["a"]
    assert [lease.id for lease in await meta.leases.find(NS, ["id==b"])] == ["b"]
    assert await meta.leases.find("other") == []


async def test_resources_are_added_and_removed(meta: Metadata) -> None:
    await meta.leases.create(NS, "l")
    resources = [
        Resource("content", DIGEST),
        Resource("images", "x"),
        Resource("ingests", "ref"),
        Resource(snapshots_type("overlayfs"), "key"),
    ]
    for resource in (*resources, resources[0]):
        await meta.leases.add(NS, "l", resource)
    assert await meta.leases.resources(NS, "l") == resources
    for _ in range(2):
        await meta.leases.remove(NS, "l", resources[1])
    assert resources[1] not in await meta.leases.resources(NS, "l")
    await meta.leases.delete(NS, "l")
    await meta.leases.create(NS, "l")
    assert await meta.leases.resources(NS, "l") == []


@pytest.mark.parametrize(
    ("resource", "error"),
    [
        (Resource("content", "no digest"), InvalidArgument),
        (Resource("content/x", DIGEST), InvalidArgument),
        (Resource("snapshots", "key"), InvalidArgument),
        (Resource("snapshots/", "key"), InvalidArgument),
        (Resource("snapshots/a/b", "key"), InvalidArgument),
        (Resource("containers", "x"), Unimplemented),
    ],
)
async def test_resources_of_other_kinds_are_refused(
    meta: Metadata, resource: Resource, error: type[Exception]
) -> None:
    await meta.leases.create(NS, "l")
    with pytest.raises(error):
        await meta.leases.add(NS, "l", resource)
    with pytest.raises(error):
        await meta.leases.remove(NS, "l", resource)


async def test_resources_need_their_lease(meta: Metadata) -> None:
    for call in (
        meta.leases.add(NS, "none", Resource("images", "x")),
        meta.leases.remove(NS, "none", Resource("images", "x")),
        meta.leases.resources(NS, "none"),
        meta.db.write(lambda tx: add_resource(tx, NS, "none", "images", "x")),
    ):
        with pytest.raises(NotFound):
            await call
    await meta.db.write(lambda tx: add_resource(tx, NS, "", "images", "x"))


async def test_work_that_holds_a_lease_runs_under_it(meta: Metadata) -> None:
    async with meta.leases.hold(NS, expires_s=60) as lease:
        assert current_lease.get() == lease.id
        assert await asyncio.create_task(_current()) == lease.id
        [recorded] = await meta.leases.find(NS)
        assert EXPIRE_LABEL in recorded.labels
        async with meta.leases.hold(NS) as inner:
            assert inner.id == lease.id
        assert await meta.leases.find(NS) == [recorded]
    assert current_lease.get() == ""
    assert await meta.leases.find(NS) == []


async def test_a_lease_that_is_held_ends_with_a_failure_too(meta: Metadata) -> None:
    with pytest.raises(ZeroDivisionError):
        async with meta.leases.hold(NS):
            raise ZeroDivisionError
    assert await meta.leases.find(NS) == []
    async with meta.leases.hold(NS) as lease:
        await meta.leases.delete(NS, lease.id)  # someone else's doing


async def _current() -> str:
    return current_lease.get()


async def test_what_a_killed_process_held_is_dropped_by_the_next(tmp_path: Path) -> None:
    async with open_metadata(tmp_path) as meta:
        await meta.leases.begin(1)
        await meta.leases.create("a", "of a client", {EXPIRE_LABEL: "2999-01-01T00:00:00Z"})
        async with meta.leases.hold("a") as held:
            [recorded] = await meta.leases.find("a", [f"id=={held.id}"])
        await meta.leases.create("b", "held", recorded.labels)  # as if it had not ended
        await meta.leases.begin(1)
        assert len(await meta.leases.find("b")) == 1
    async with open_metadata(tmp_path) as meta:
        await meta.leases.begin(2)
        assert [lease.id for lease in await meta.leases.find("a")] == ["of a client"]
        assert await meta.leases.find("b") == []
