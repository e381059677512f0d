"""Sandbox records: creation, masks, filters, validation, by upstream's rules."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.common.database import Database
from services.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.rpc.sandboxes import from_pb, to_pb
from services.containerd.sandboxes.local import LocalSandboxStore
from services.containerd.sandboxes.store import Sandbox
from services.containerd.typed import TypedValue
from tests.fakes.metadata import Metadata, open_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NS = "test"
SANDBOX = Sandbox(
    id="pod-1",
    runtime_name="io.containerd.runc.v2",
    runtime_options=TypedValue("containerd.runc.v1.Options", b"\x0a\x01x"),
    spec=TypedValue("spec", b"{}"),
    labels={"a": "1", "b": "2"},
    extensions={"ext": TypedValue("some.Type", b"\x00\xff")},
    sandboxer="shim",
)
OTHER = replace(
    SANDBOX,
    runtime_options=None,
    spec=TypedValue("spec", b"[]"),
    labels={"a": "9", "c": "3"},
    extensions={"other": TypedValue("t", b"1")},
    sandboxer="ignored",
)


@pytest.fixture
async def meta(tmp_path: Path) -> AsyncIterator[Metadata]:
    async with open_metadata(tmp_path) as opened:
        yield opened


@pytest.fixture
def store(meta: Metadata) -> LocalSandboxStore:
    return LocalSandboxStore(meta.db)


async def test_what_was_created_is_what_get_and_the_wire_say(store: LocalSandboxStore) -> None:
    created = await store.create(NS, SANDBOX)
    assert created.created_at_ns == created.updated_at_ns > 0
    assert await store.get(NS, "pod-1") == created
    assert from_pb(to_pb(created)) == created
    assert replace(created, created_at_ns=0, updated_at_ns=0) == SANDBOX


async def test_ids_are_taken_once_in_each_namespace(store: LocalSandboxStore) -> None:
    await store.create(NS, SANDBOX)
    with pytest.raises(AlreadyExists, match="pod-1"):
        await store.create(NS, SANDBOX)
    await store.create("other", SANDBOX)
    await store.delete(NS, "pod-1")
    for call in (store.get(NS, "pod-1"), store.delete(NS, "pod-1"), store.update(NS, SANDBOX)):
        with pytest.raises(NotFound, match="pod-1"):
            await call
    assert [sandbox.id for sandbox in await store.find("other")] == ["pod-1"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (replace(SANDBOX, id=""), "must not be empty"),
        (replace(SANDBOX, id="a/b"), "malformed"),
        (replace(SANDBOX, labels={"k": "v" * 5000}), "label"),
        (replace(SANDBOX, extensions={"": TypedValue("t", b"")}), "without a name"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    store: LocalSandboxStore, wrong: Sandbox, words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        await store.create(NS, wrong)
    assert await store.find(NS) == []


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([], replace(OTHER, sandboxer="shim")),
        (["labels"], replace(SANDBOX, labels=OTHER.labels)),
        (["labels.a"], replace(SANDBOX, labels={"a": "9", "b": "2"})),
        (["spec", "runtime"], replace(SANDBOX, spec=OTHER.spec, runtime_options=None)),
        (["extensions"], replace(SANDBOX, extensions=OTHER.extensions)),
        (
            ["extensions.other"],
            replace(SANDBOX, extensions={**SANDBOX.extensions, **OTHER.extensions}),
        ),
        (["extensions.ext"], replace(SANDBOX, extensions={})),
    ],
)
async def test_an_update_changes_what_its_mask_names(
    store: LocalSandboxStore, fields: list[str], expected: Sandbox
) -> None:
    created = await store.create(NS, SANDBOX)
    updated = await store.update(NS, OTHER, fields)
    assert updated.created_at_ns == created.created_at_ns
    assert updated.updated_at_ns > created.updated_at_ns
    assert replace(updated, created_at_ns=0, updated_at_ns=0) == expected
    assert await store.get(NS, "pod-1") == updated


async def test_what_may_not_change_is_refused(store: LocalSandboxStore) -> None:
    created = await store.create(NS, SANDBOX)
    with pytest.raises(InvalidArgument, match=r"runtime\.name"):
        await store.update(NS, replace(SANDBOX, runtime_name="other"))
    with pytest.raises(InvalidArgument, match=r"'sandboxer' .* cannot be changed"):
        await store.update(NS, SANDBOX, ["labels", "sandboxer"])
    assert await store.get(NS, "pod-1") == created


async def test_filters_choose(store: LocalSandboxStore) -> None:
    for name, label in (("b", "x"), ("a", "y"), ("c", "y")):
        await store.create(NS, Sandbox(name, labels={"k": label}))

    async def ids(*filters: str) -> list[str]:
        return [sandbox.id for sandbox in await store.find(NS, filters)]

    assert await ids() == ["a", "b", "c"]
    assert await ids("labels.k==y") == ["a", "c"]
    assert await ids("labels.k==y,id!=a", "id==b") == ["b", "c"]
    with pytest.raises(InvalidArgument, match="does not parse"):
        await ids("id=?a")


async def test_a_namespace_with_a_sandbox_stays(meta: Metadata, store: LocalSandboxStore) -> None:
    await store.create(NS, SANDBOX)
    with pytest.raises(FailedPrecondition, match="still has sandboxes"):
        await meta.namespaces.delete(NS)
    await store.delete(NS, "pod-1")
    await meta.namespaces.delete(NS)


async def test_an_older_database_gets_the_table(tmp_path: Path) -> None:
    old = Database(tmp_path / "meta.db")
    old.open(MIGRATIONS[:2])
    await old.write(lambda tx: tx.execute("INSERT INTO namespaces (name) VALUES ('kept')").close())
    old.close()
    async with open_metadata(tmp_path) as meta:
        store = LocalSandboxStore(meta.db)
        await store.create(NS, SANDBOX)
        names = [namespace.name for namespace in await meta.namespaces.find()]
        assert names == ["kept", NS]
