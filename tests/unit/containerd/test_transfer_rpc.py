"""Transfers over a socket, with the streams that clients open beside them."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.any_pb2 import Any

from protos.containerd.services.streaming.v1 import streaming_pb2, streaming_pb2_grpc
from protos.containerd.services.transfer.v1 import transfer_pb2 as pb
from protos.containerd.services.transfer.v1 import transfer_pb2_grpc
from protos.containerd.types import platform_pb2
from protos.containerd.types.transfer import (
    imagestore_pb2,
    importexport_pb2,
    progress_pb2,
    registry_pb2,
)
from protos.containerd.types.transfer.streaming_pb2 import Data, WindowUpdate
from tests.fakes.images import Blobs, build_image
from tests.fakes.registry import FakeRegistry
from tests.fakes.transfer_node import TransferNode, open_transfer_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from google.protobuf.message import Message

NS = (("containerd-namespace", "a"),)
AMD64 = platform_pb2.Platform(os="linux", architecture="amd64")


def packed(message: Message) -> Any:
    return Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


@dataclass
class ClientStream:
    """The client's side of a stream; ``read`` gives None at its end."""

    call: grpc.aio.StreamStreamCall[Any, Any]

    async def read(self) -> Any | None:
        message = await self.call.read()
        return message if isinstance(message, Any) else None

    async def must_read(self) -> bytes:
        message = await self.read()
        assert message is not None
        return message.value

    async def write(self, message: Message) -> None:
        await self.call.write(packed(message))

    def cancel(self) -> None:
        self.call.cancel()


@dataclass
class Client:
    node: TransferNode
    transfers: transfer_pb2_grpc.TransferStub
    streaming: streaming_pb2_grpc.StreamingStub

    async def open(self, stream_id: str) -> ClientStream:
        """Open a stream, as clients do, and wait until it is known."""
        stream = ClientStream(self.streaming.Stream(metadata=NS))
        await stream.call.write(packed(streaming_pb2.StreamInit(id=stream_id)))
        first = await stream.read()
        assert first is not None
        assert first.type_url == "google.protobuf.Empty"
        return stream

    async def transfer(self, source: Message, destination: Message, progress: str = "") -> None:
        await self.transfers.Transfer(
            pb.TransferRequest(
                source=packed(source),
                destination=packed(destination),
                options=pb.TransferOptions(progress_stream=progress),
            ),
            metadata=NS,
        )


@asynccontextmanager
async def connected(node: TransferNode) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(await node.serve()) as channel:
        yield Client(
            node,
            transfer_pb2_grpc.TransferStub(channel),
            streaming_pb2_grpc.StreamingStub(channel),
        )


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with open_transfer_node(tmp_path) as node, connected(node) as client:
        yield client


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as registry:
        yield registry


def serve(registry: FakeRegistry) -> tuple[str, Blobs]:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}, {"b": bytes(200_000)}])
    return registry.serve("lib/x", "1", image.manifest, blobs), blobs


async def code_of(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), caught.value.details() or ""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the other side of a socket sets no event here
            await asyncio.sleep(0.005)


async def test_pull_with_progress_and_unpacking(client: Client, registry: FakeRegistry) -> None:
    name, blobs = serve(registry)
    stream = await client.open("progress-1")
    store = imagestore_pb2.ImageStore(
        name=name,
        platforms=[AMD64],
        unpacks=[imagestore_pb2.UnpackConfiguration(platform=AMD64, snapshotter="memory")],
    )
    await client.transfer(registry_pb2.OCIRegistry(reference=name), store, "progress-1")
    events = []
    while (message := await stream.read()) is not None:
        assert message.type_url == "containerd.types.transfer.Progress"
        events.append(progress_pb2.Progress.FromString(message.value))
    assert events[0].event == f"Resolving from OCI Registry ({name})"
    assert events[-1].event == f"Completed pull from OCI Registry ({name})"
    complete = [event for event in events if event.event == "complete"]
    assert {event.desc.digest for event in complete} == set(blobs.data)
    assert all(event.progress == event.total == event.desc.size for event in complete)
    assert await client.node.digests() == set(blobs.data)
    assert len(client.node.snapshotter.names()) == 2
    await until(lambda: len(client.node.streams) == 0)


async def test_credentials_come_over_the_auth_stream(
    client: Client, registry: FakeRegistry
) -> None:
    name, _ = serve(registry)
    registry.auth, registry.anonymous_tokens = "bearer", False
    stream = await client.open("creds")

    async def answer() -> list[registry_pb2.AuthRequest]:
        asked = []
        while (message := await stream.read()) is not None:
            asked.append(registry_pb2.AuthRequest.FromString(message.value))
            await stream.write(
                registry_pb2.AuthResponse(
                    authType=registry_pb2.AuthType.CREDENTIALS, username="user", secret="pass"
                )
            )
        return asked

    answering = asyncio.create_task(answer())
    source = registry_pb2.OCIRegistry(
        reference=name, resolver=registry_pb2.RegistryResolver(auth_stream="creds")
    )
    await client.transfer(source, imagestore_pb2.ImageStore(name=name))
    assert [(asked.host, asked.reference) for asked in await answering] == [
        (registry.address, name)
    ]


async def test_a_client_may_name_a_directory_of_hosts(
    client: Client, registry: FakeRegistry, tmp_path: Path
) -> None:
    blobs = Blobs()
    registry.serve("lib/x", "1", build_image(blobs, [{"a": b"1"}]).manifest, blobs)
    directory = tmp_path / "hosts" / "r.example"
    directory.mkdir(parents=True)
    (directory / "hosts.toml").write_text(f'[host."http://{registry.address}"]\n')
    source = registry_pb2.OCIRegistry(
        reference="r.example/lib/x:1",
        resolver=registry_pb2.RegistryResolver(host_dir=str(tmp_path / "hosts")),
    )
    await client.transfer(source, imagestore_pb2.ImageStore(name="r.example/lib/x:1"))
    assert registry.requests("GET", "/blobs/")


async def test_failures_have_codes_and_words(client: Client, registry: FakeRegistry) -> None:
    store = imagestore_pb2.ImageStore(name="x")
    missing = registry_pb2.OCIRegistry(reference=f"{registry.address}/no:1")
    code, words = await code_of(client.transfer(missing, store))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "no" in words
    code, words = await code_of(client.transfer(registry_pb2.OCIRegistry(reference="A"), store))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "lower case" in words
    code, _ = await code_of(client.transfer(missing, store, "no such stream"))
    assert code is grpc.StatusCode.NOT_FOUND
    configured = registry_pb2.OCIRegistry(
        reference=f"{registry.address}/x:1",
        resolver=registry_pb2.RegistryResolver(host_dir="hosts.d"),
    )
    code, words = await code_of(client.transfer(configured, store))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "absolute" in words
    code, words = await code_of(client.transfer(store, importexport_pb2.ImageImportStream()))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "containerd.types.transfer.ImageStore" in words


async def received(stream: ClientStream) -> bytes:
    """Take bytes as clients do: in small windows, until the server ends them."""
    data, window = b"", 0
    while True:
        if window < 65536:
            await stream.write(WindowUpdate(update=65536))
            window += 65536
        message = await stream.read()
        if message is None:
            return data
        part = Data.FromString(message.value).data
        assert len(part) <= 32 << 10
        window -= len(part)
        assert window >= 0
        data += part


async def exported(client: Client, name: str, **options: Any) -> bytes:
    """Export images."""
    receiving = asyncio.create_task(received(await client.open("export")))
    await client.transfer(
        imagestore_pb2.ImageStore(name=name, **options),
        importexport_pb2.ImageExportStream(stream="export"),
    )
    return await receiving


async def sent(client: Client, data: bytes, store: imagestore_pb2.ImageStore) -> None:
    """Send an archive as clients do: as much as was granted, in small pieces."""
    stream = await client.open("import")

    async def send() -> None:
        granted, position = 0, 0
        while position < len(data):
            while granted <= 0:
                granted += WindowUpdate.FromString(await stream.must_read()).update
            part = data[position : position + min(granted, 32 << 10)]
            await stream.write(Data(data=part))
            position += len(part)
            granted -= len(part)
        await stream.call.done_writing()

    sending = asyncio.create_task(send())
    await client.transfer(importexport_pb2.ImageImportStream(stream="import"), store)
    await sending


async def test_export_and_import_carry_an_image_to_another_node(
    client: Client, registry: FakeRegistry, tmp_path: Path
) -> None:
    name, blobs = serve(registry)
    await client.transfer(
        registry_pb2.OCIRegistry(reference=name), imagestore_pb2.ImageStore(name=name)
    )
    data = await exported(client, name)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert {"oci-layout", "index.json", "manifest.json"} < set(archive.getnames())
    (tmp_path / "other").mkdir()
    async with open_transfer_node(tmp_path / "other") as other, connected(other) as second:
        prefix = imagestore_pb2.ImageReference(name=name.rpartition(":")[0], is_prefix=True)
        await sent(second, data, imagestore_pb2.ImageStore(extra_references=[prefix]))
        assert (await other.meta.images.get("a", name)).name == name
        assert set(blobs.data) <= await other.digests()
        await until(lambda: len(other.streams) == 0)


async def test_several_images_are_exported_by_name_and_by_prefix(
    client: Client, registry: FakeRegistry
) -> None:
    blobs = Blobs()
    names = []
    for number, repository in enumerate(("team/a", "team/b", "teams/c")):
        image = build_image(blobs, [{"f": bytes([number])}])
        names.append(registry.serve(repository, "1", image.manifest, blobs))
        await client.transfer(
            registry_pb2.OCIRegistry(reference=names[-1]),
            imagestore_pb2.ImageStore(name=names[-1]),
        )
    team = imagestore_pb2.ImageReference(name=f"{registry.address}/team/", is_prefix=True)
    data = await exported(client, names[0], extra_references=[team])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        listed = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        index = json.load(archive.extractfile("index.json"))  # type: ignore[arg-type]
    assert sorted(tag for image in listed for tag in image["RepoTags"]) == sorted(names[:2])
    assert len(index["manifests"]) == 2
    nothing = imagestore_pb2.ImageReference(name="r.example", is_prefix=True)
    code, words = await code_of(exported(client, "", extra_references=[nothing]))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "begins with 'r.example'" in words


async def test_an_import_to_an_export_is_sent_back(client: Client) -> None:
    data = bytes(range(256)) * 20_000
    inbound, outbound = await client.open("in"), await client.open("out")
    transfer = asyncio.create_task(
        client.transfer(
            importexport_pb2.ImageImportStream(stream="in"),
            importexport_pb2.ImageExportStream(stream="out"),
        )
    )
    receiving = asyncio.create_task(received(outbound))

    async def send() -> None:
        granted, position = 0, 0
        while position < len(data):
            while granted <= 0:
                granted += WindowUpdate.FromString(await inbound.must_read()).update
            await inbound.write(Data(data=data[position : position + (32 << 10)]))
            position += 32 << 10
            granted -= 32 << 10
        await inbound.call.done_writing()

    async with asyncio.timeout(10):
        await asyncio.gather(send(), transfer)
        assert await receiving == data
    await until(lambda: len(client.node.streams) == 0)


async def test_an_import_whose_client_goes_away_fails_and_leaves_no_ingest(
    client: Client,
) -> None:
    stream = await client.open("import")
    task = asyncio.create_task(
        client.transfer(
            importexport_pb2.ImageImportStream(stream="import"),
            imagestore_pb2.ImageStore(name="x"),
        )
    )
    header = tarfile.TarInfo("blob")
    header.size = 1 << 20
    await stream.read()
    await stream.write(Data(data=header.tobuf() + bytes(1000)))
    await until(lambda: stream.call.done() or len(client.node.content._writers) > 0)
    stream.cancel()
    code, _ = await code_of(task)
    # Which of the two depends on what is seen first: the end of the bytes, or that of the call.
    assert code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DATA_LOSS)
    assert await client.node.content.statuses("a") == []
    assert len(client.node.streams) == 0


async def test_an_export_whose_client_goes_away_fails(
    client: Client, registry: FakeRegistry
) -> None:
    name, _ = serve(registry)
    await client.transfer(
        registry_pb2.OCIRegistry(reference=name), imagestore_pb2.ImageStore(name=name)
    )
    stream = await client.open("export")
    task = asyncio.create_task(
        client.transfer(
            imagestore_pb2.ImageStore(name=name),
            importexport_pb2.ImageExportStream(stream="export"),
        )
    )
    await stream.write(WindowUpdate(update=100))
    await stream.read()
    stream.cancel()
    code, _ = await code_of(task)
    assert code is grpc.StatusCode.CANCELLED
    assert await client.node.meta.leases.find("a") == []


async def test_a_pull_outlives_its_progress_stream(client: Client, registry: FakeRegistry) -> None:
    name, blobs = serve(registry)
    registry.gate = asyncio.Event()
    stream = await client.open("progress")
    task = asyncio.create_task(
        client.transfer(
            registry_pb2.OCIRegistry(reference=name),
            imagestore_pb2.ImageStore(name=name),
            "progress",
        )
    )
    await stream.read()
    stream.cancel()
    registry.gate.set()
    await task
    assert await client.node.digests() == set(blobs.data)


async def test_push_and_tag(client: Client, registry: FakeRegistry) -> None:
    name, blobs = serve(registry)
    source = imagestore_pb2.ImageStore(name=name)
    await client.transfer(registry_pb2.OCIRegistry(reference=name), source)
    await client.transfer(source, imagestore_pb2.ImageStore(name="r.example/y:1"))
    assert (await client.node.meta.images.get("a", "r.example/y:1")).target.digest in blobs.data
    target = f"{registry.address}/new/y:2"
    await client.transfer(source, registry_pb2.OCIRegistry(reference=target))
    assert ("new/y", "2") in registry.manifests


async def test_a_stream_begins_with_its_id_and_has_it_alone(client: Client) -> None:
    await client.open("one")
    call = client.streaming.Stream(metadata=NS)
    await call.write(packed(streaming_pb2.StreamInit(id="one")))
    code, _ = await code_of(call.read())
    assert code is grpc.StatusCode.ALREADY_EXISTS
    call = client.streaming.Stream(metadata=NS)
    await call.write(packed(Data(data=b"x")))
    code, words = await code_of(call.read())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "StreamInit" in words
    call = client.streaming.Stream(metadata=NS)
    await call.done_writing()
    code, _ = await code_of(call.read())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
