"""Against a real registry on the loopback, and archives against skopeo."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from services.common.errors import NotFound, Unauthenticated
from services.containerd.content.descriptor import Descriptor, Platform
from services.containerd.images.archive import ArchiveReader
from services.containerd.images.archive_writer import ExportOptions
from services.containerd.images.manifest import parse_index
from services.containerd.images.platform import runnable_on
from services.containerd.images.reference import parse_reference
from services.containerd.remotes.remote import Credentials, RegistryAccess
from services.containerd.remotes.upload import CHUNK_BYTES
from services.containerd.transfer.destination import Destination, Unpacking
from services.containerd.transfer.progress import report_nothing
from tests.fakes.images import Blobs, build_image, build_index
from tests.fakes.transfer_node import HOST, TransferNode, open_transfer_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_MISSING = [name for name in ("docker-registry", "skopeo") if shutil.which(name) is None]

pytestmark = pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}")

_CONFIG = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
_AUTH = """
auth: {{htpasswd: {{realm: test, path: {path}}}}}
"""
# "pass", by bcrypt with the lowest cost
_USER = "user:$2y$04$abcdefghijklmnopqrstuufznL8bkzdtHwLhca4To/v9Lo9bA7fR6"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def running_registry(directory: Path, *, auth: bool = False) -> AsyncIterator[str]:
    """A registry with its data below ``directory``; gives its address."""
    directory.mkdir()
    port = _free_port()
    config = _CONFIG.format(root=directory / "data", port=port)
    if auth:
        (directory / "htpasswd").write_text(_USER + "\n")
        config += _AUTH.format(path=directory / "htpasswd")
    (directory / "config.yml").write_text(config)
    process = await asyncio.create_subprocess_exec(
        "docker-registry", "serve", str(directory / "config.yml"), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(20):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except ConnectionRefusedError:
                    assert process.returncode is None, "the registry ended"
                    await asyncio.sleep(0.05)
                else:
                    writer.close()
                    await writer.wait_closed()
                    break
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def skopeo(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        "skopeo", "--insecure-policy", *arguments, stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0, arguments


async def store(node: TransferNode, blobs: Blobs, target: Descriptor, name: str) -> None:
    """Put an image that is in memory into a node."""
    for digest, data in blobs.data.items():
        async with await node.content.writer("a", digest, expected=digest) as writer:
            await writer.write(data)
            await writer.commit()
    await node.transfers.tag("a", await _record(node, target), Destination(name=name))


async def _record(node: TransferNode, target: Descriptor) -> str:
    from services.containerd.images.store import Image

    await node.meta.images.put("a", Image("temporary", target))
    return "temporary"


def pieces(path: Path) -> AsyncIterator[bytes]:
    async def read() -> AsyncIterator[bytes]:
        yield path.read_bytes()

    return read()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[TransferNode]:
    async with open_transfer_node(tmp_path) as node:
        yield node


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    async with running_registry(tmp_path / "registry") as address:
        yield address


async def test_push_and_pull(node: TransferNode, address: str) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": os.urandom(3 << 20)}, {"b": b"2"}], platform=HOST)
    other = build_image(blobs, [{"c": b"3"}], platform=Platform("linux", "s390x"))
    index = build_index(blobs, [image.manifest, other.manifest])
    await store(node, blobs, index, "x")
    name = f"{address}/some/where:1"
    remote = node.registries.open(parse_reference(name), RegistryAccess())
    with pytest.raises(NotFound):
        await remote.resolve()
    await node.transfers.push("a", "x", remote, report_nothing)
    assert (await remote.resolve()).digest == index.digest
    destination = Destination(name=name, platforms=(HOST,), unpackings=(Unpacking(),))
    [pulled] = await node.transfers.pull("b", remote, destination, report_nothing)
    assert pulled.target.digest == index.digest
    assert len(node.snapshotter.names("b")) == 2
    assert other.layers[0].digest not in await node.digests("b")
    by_digest = node.registries.open(
        parse_reference(f"{address}/some/where@{image.manifest.digest}"), RegistryAccess()
    )
    assert (await by_digest.resolve()).media_type == image.manifest.media_type


async def test_a_large_blob_goes_in_chunks(node: TransferNode, address: str) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": os.urandom(CHUNK_BYTES + 1_000_000)}], platform=HOST)
    [layer] = image.layers
    assert layer.size_bytes > CHUNK_BYTES
    await store(node, blobs, image.manifest, "x")
    remote = node.registries.open(parse_reference(f"{address}/large:1"), RegistryAccess())
    await node.transfers.push("a", "x", remote, report_nothing)
    async with await node.content.writer("b", "check") as writer:
        await remote.fetch(layer, writer)
        assert writer.digest == layer.digest


async def test_a_broken_off_blob_is_continued_by_range(node: TransferNode, address: str) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": os.urandom(3 << 20)}], platform=HOST)
    await store(node, blobs, image.manifest, "x")
    name = f"{address}/x:1"
    remote = node.registries.open(parse_reference(name), RegistryAccess())
    await node.transfers.push("a", "x", remote, report_nothing)
    layer = image.layers[0]
    for info in await node.content.find("a"):
        await node.content.delete("a", info.digest)
    async with await node.content.writer("b", f"layer-{layer.digest}") as writer:
        await writer.write(blobs.data[layer.digest][:1_000_000])
    await node.transfers.pull("b", remote, Destination(name=name), report_nothing)
    assert await node.content.read("b", layer.digest, max_bytes=1 << 30) == blobs.data[layer.digest]


async def test_basic_authorization(node: TransferNode, tmp_path: Path) -> None:
    async def credentials(_host: str) -> Credentials:
        return Credentials("user", "pass")

    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}], platform=HOST)
    await store(node, blobs, image.manifest, "x")
    async with running_registry(tmp_path / "closed", auth=True) as address:
        reference = parse_reference(f"{address}/x:1")
        nobody = node.registries.open(reference, RegistryAccess())
        with pytest.raises(Unauthenticated):
            await node.transfers.push("a", "x", nobody, report_nothing)
        somebody = node.registries.open(reference, RegistryAccess(credentials))
        await node.transfers.push("a", "x", somebody, report_nothing)
        assert (await somebody.resolve()).digest == image.manifest.digest


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
async def test_archives_of_skopeo_are_loaded(
    kind: str, node: TransferNode, address: str, tmp_path: Path
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}, {"b": b"2"}], platform=HOST)
    await store(node, blobs, image.manifest, "x")
    remote = node.registries.open(parse_reference(f"{address}/x:1"), RegistryAccess())
    await node.transfers.push("a", "x", remote, report_nothing)
    archive = tmp_path / "x.tar"
    await skopeo(
        "copy", "--src-tls-verify=false", f"docker://{address}/x:1", f"{kind}:{archive}:x:1"
    )
    index = await ArchiveReader(node.content).load("c", pieces(archive))
    [entry] = parse_index(await node.content.read("c", index.digest), index.media_type)
    assert entry.annotations["org.opencontainers.image.ref.name"] in ("1", "x:1")
    [loaded] = await node.transfers.load(
        "c",
        pieces(archive),
        Destination(name="loaded", unpackings=(Unpacking(),)),
        report_nothing,
    )
    assert loaded.name == "loaded"
    assert len(node.snapshotter.names("c")) == 2


async def test_exports_are_read_by_skopeo(node: TransferNode, tmp_path: Path) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}, {"b": b"2"}], platform=HOST)
    await store(node, blobs, image.manifest, "docker.io/library/x:1")
    archive = tmp_path / "x.tar"
    options = ExportOptions(runnable_on(HOST))
    with archive.open("wb") as file:
        async for piece in node.transfers.export(
            "a", "docker.io/library/x:1", (), options, report_nothing
        ):
            file.write(piece)
    for source in (f"oci-archive:{archive}", f"docker-archive:{archive}"):
        await skopeo("copy", source, f"dir:{tmp_path / source.partition(':')[0]}")
