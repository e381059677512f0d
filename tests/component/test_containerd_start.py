"""A start on a root with much in it, after a kill: all of it is looked at, and it serves soon."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from typing import TYPE_CHECKING

import pytest

from protos.containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from services.common.database import Database
from services.containerd.metadata.schema import MIGRATIONS
from tests.fakes.containerd import config, node_directory, running_app

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root

CONTAINERS, BLOBS = 200, 2000
LIMIT_S = 5.0  # most of it for a machine with other work; what is quadratic takes longer still


def fill(root: Path) -> None:
    """Make the records and files of containers and blobs, as a containerd that was killed has."""
    db = Database(root / "meta.db")
    db.open(MIGRATIONS)
    db.close()
    blobs = root / "content/blobs/sha256"
    blobs.mkdir(parents=True)
    records = sqlite3.connect(root / "meta.db")
    with records:
        above = ""
        for number in range(BLOBS):
            data = b"%d" % number
            name = hashlib.sha256(data).hexdigest()
            (blobs / name).write_bytes(data)
            labels = {"containerd.io/gc.ref.content.0": above} if above else {}
            if number == BLOBS - 1:
                labels["containerd.io/gc.root"] = "yes"
            above = f"sha256:{name}"
            records.execute("INSERT INTO blobs VALUES (?, ?)", (above, len(data)))
            records.execute(
                "INSERT INTO content VALUES ('test', ?, ?, 1, 1)", (above, json.dumps(labels))
            )
        for number in range(CONTAINERS):
            (root / f"snapshots/overlayfs/{number + 1}/fs").mkdir(parents=True)
            records.execute(
                "INSERT INTO snapshots (id, snapshotter, namespace, key, kind, created_at_ns,"
                " updated_at_ns) VALUES (?, 'overlayfs', 'test', ?, 2, 1, 1)",
                (number + 1, f"c{number}"),
            )
            records.execute(
                "INSERT INTO containers (namespace, id, image, runtime_name, runtime_options_type,"
                " runtime_options, spec_type, spec, snapshotter, snapshot_key, created_at_ns,"
                " updated_at_ns) VALUES ('test', ?, '', 'io.containerd.runc.v2', '', x'', 't', ?,"
                " 'overlayfs', ?, 1, 1)",
                (f"c{number}", bytes(8000), f"c{number}"),
            )
        records.execute("INSERT OR REPLACE INTO meta VALUES ('running', '1')")
    records.close()


async def test_a_start_with_much_to_look_at() -> None:
    async with node_directory() as directory:
        root = config(directory).root
        root.mkdir()
        fill(root)
        lost = next((root / "content/blobs/sha256").iterdir())
        lost.unlink()
        began = time.monotonic()
        async with running_app(directory) as channel:
            containers = containers_pb2_grpc.ContainersStub(channel)
            listed = await containers.List(containers_pb2.ListContainersRequest())
            assert time.monotonic() - began < LIMIT_S
            assert len(listed.containers) == CONTAINERS
            content = content_pb2_grpc.ContentStub(channel)
            found = [
                info.digest
                async for answer in content.List(content_pb2.ListContentRequest())
                for info in answer.info
            ]
            assert len(found) == BLOBS - 1
            assert f"sha256:{lost.name}" not in found
