"""A whole containerd over its socket, with a plain gRPC client: what it records and tells."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.containerd.events import task_pb2
from protos.containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from protos.containerd.services.events.v1 import events_pb2, events_pb2_grpc
from protos.containerd.services.images.v1 import images_pb2, images_pb2_grpc
from protos.containerd.services.introspection.v1 import introspection_pb2, introspection_pb2_grpc
from protos.containerd.services.leases.v1 import leases_pb2, leases_pb2_grpc
from protos.containerd.services.namespaces.v1 import namespace_pb2, namespace_pb2_grpc
from protos.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from protos.containerd.services.version.v1 import version_pb2_grpc
from protos.containerd.types import descriptor_pb2, event_pb2
from protos.containerd.types import introspection_pb2 as types_pb2
from protos.theseus.journal.v1 import journal_pb2, journal_pb2_grpc
from services.common import VERSION
from services.common.client import connect
from services.containerd.app import App
from tests.fakes.containerd import config, node_directory, running_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

T = 10.0
SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"


@pytest.fixture
async def directory() -> AsyncIterator[Path]:
    async with node_directory() as made:
        yield made


@pytest.fixture
async def channel(directory: Path) -> AsyncIterator[grpc.aio.Channel]:
    async with running_app(directory) as opened:
        yield opened


def container(name: str, **changes: object) -> containers_pb2.Container:
    made = containers_pb2.Container(id=name, image="busybox", **changes)  # type: ignore[arg-type]
    made.runtime.name = "io.containerd.runc.v2"
    made.spec.type_url, made.spec.value = SPEC, b"{}"
    return made


def image(name: str, digest: str, **labels: str) -> images_pb2.Image:
    target = descriptor_pb2.Descriptor(media_type="t", digest=digest, size=1)
    return images_pb2.Image(name=name, target=target, labels=labels)


async def write(channel: grpc.aio.Channel, data: bytes, **options: object) -> str:
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    commit = content_pb2.WriteContentRequest(
        action=content_pb2.WriteAction.COMMIT,
        ref=f"ref-{digest}",
        total=len(data),
        expected=digest,
        data=data,
        labels=options.get("labels", {}),  # type: ignore[arg-type]
    )
    calls = content_pb2_grpc.ContentStub(channel).Write(
        iter([commit]), timeout=T, metadata=options.get("metadata")
    )
    async for _ in calls:
        pass
    return digest


@asynccontextmanager
async def refused(code: grpc.StatusCode) -> AsyncIterator[list[grpc.aio.AioRpcError]]:
    """The block must fail with that code; the list has the error afterwards."""
    errors: list[grpc.aio.AioRpcError] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield errors
    assert caught.value.code() is code, caught.value.details()
    errors.append(caught.value)


async def test_version_health_and_reflection(channel: grpc.aio.Channel) -> None:
    version = await version_pb2_grpc.VersionStub(channel).Version(Empty(), timeout=T)
    assert version.version == VERSION
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "containerd.services.images.v1.Images", "theseus.shim.v1.Streams"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=T)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    async for listed in stub.ServerReflectionInfo(iter([asked]), timeout=T):
        names = {service.name for service in listed.list_services_response.service}
    for noun in ("containers", "content", "diff", "events", "images", "introspection", "leases"):
        assert any(name.startswith(f"containerd.services.{noun}.v1.") for name in names), noun
    assert {"theseus.shim.v1.Registry", "theseus.journal.v1.Journal"} <= names


async def test_a_request_needs_a_namespace_that_can_be_one(directory: Path) -> None:
    async with running_app(directory), connect(config(directory).address) as channel:
        stub = images_pb2_grpc.ImagesStub(channel)
        async with refused(grpc.StatusCode.FAILED_PRECONDITION):
            await stub.List(images_pb2.ListImagesRequest(), timeout=T)
        for namespace in ("../up", "a b", "x" * 77):
            async with refused(grpc.StatusCode.INVALID_ARGUMENT):
                await stub.List(
                    images_pb2.ListImagesRequest(),
                    timeout=T,
                    metadata=[("containerd-namespace", namespace)],
                )


async def test_namespaces(channel: grpc.aio.Channel) -> None:
    stub = namespace_pb2_grpc.NamespacesStub(channel)
    made = namespace_pb2.Namespace(name="dev", labels={"a": "1"})
    await stub.Create(namespace_pb2.CreateNamespaceRequest(namespace=made), timeout=T)
    async with refused(grpc.StatusCode.ALREADY_EXISTS):
        await stub.Create(namespace_pb2.CreateNamespaceRequest(namespace=made), timeout=T)
    made.labels["b"] = "2"
    await stub.Update(
        namespace_pb2.UpdateNamespaceRequest(
            namespace=made, update_mask=FieldMask(paths=["labels.b"])
        ),
        timeout=T,
    )
    got = await stub.Get(namespace_pb2.GetNamespaceRequest(name="dev"), timeout=T)
    assert dict(got.namespace.labels) == {"a": "1", "b": "2"}
    images = images_pb2_grpc.ImagesStub(channel)
    await images.Create(
        images_pb2.CreateImageRequest(image=image("x", "sha256:" + "a" * 64)), timeout=T
    )
    listed = await stub.List(namespace_pb2.ListNamespacesRequest(), timeout=T)
    assert [namespace.name for namespace in listed.namespaces] == ["dev", "test"]
    async with refused(grpc.StatusCode.FAILED_PRECONDITION) as errors:
        await stub.Delete(namespace_pb2.DeleteNamespaceRequest(name="test"), timeout=T)
    assert "still has images" in (errors[0].details() or "")
    await stub.Delete(namespace_pb2.DeleteNamespaceRequest(name="dev"), timeout=T)
    async with refused(grpc.StatusCode.NOT_FOUND):
        await stub.Delete(namespace_pb2.DeleteNamespaceRequest(name="dev"), timeout=T)


async def test_containers(channel: grpc.aio.Channel) -> None:
    stub = containers_pb2_grpc.ContainersStub(channel)
    made = container("c1", labels={"a": "1"}, snapshotter="overlayfs", snapshot_key="k")
    made.extensions["e"].type_url, made.extensions["e"].value = "some.Type", b"\xff"
    created = await stub.Create(containers_pb2.CreateContainerRequest(container=made), timeout=T)
    assert created.container.created_at.seconds > 0
    got = await stub.Get(containers_pb2.GetContainerRequest(id="c1"), timeout=T)
    assert got.container == created.container
    got.container.ClearField("created_at")
    got.container.ClearField("updated_at")
    assert got.container == made
    made.labels["a"] = "2"
    made.image = "ignored"
    updated = await stub.Update(
        containers_pb2.UpdateContainerRequest(
            container=made, update_mask=FieldMask(paths=["labels.a"])
        ),
        timeout=T,
    )
    assert (updated.container.labels["a"], updated.container.image) == ("2", "busybox")
    async with refused(grpc.StatusCode.INVALID_ARGUMENT) as errors:
        await stub.Update(
            containers_pb2.UpdateContainerRequest(
                container=made, update_mask=FieldMask(paths=["runtime"])
            ),
            timeout=T,
        )
    assert violated_field(errors[0]) == "update_mask"
    async with refused(grpc.StatusCode.INVALID_ARGUMENT):
        await stub.List(containers_pb2.ListContainersRequest(filters=["id="]), timeout=T)
    await stub.Delete(containers_pb2.DeleteContainerRequest(id="c1"), timeout=T)
    async with refused(grpc.StatusCode.NOT_FOUND):
        await stub.Get(containers_pb2.GetContainerRequest(id="c1"), timeout=T)


async def test_lists_may_be_long_and_are_filtered(channel: grpc.aio.Channel) -> None:
    stub = containers_pb2_grpc.ContainersStub(channel)

    async def create(number: int) -> None:
        made = container(f"c{number}", labels={"odd": str(number % 2)})
        made.spec.value = b" " * 2000
        await stub.Create(containers_pb2.CreateContainerRequest(container=made), timeout=T)

    await asyncio.gather(*(create(number) for number in range(300)))
    wanted = containers_pb2.ListContainersRequest(filters=["labels.odd==1"])
    listed = await stub.List(wanted, timeout=T)
    assert len(listed.containers) == 150
    streamed = [message.container async for message in stub.ListStream(wanted, timeout=T)]
    assert streamed == list(listed.containers)


async def test_images_and_what_a_synchronous_delete_takes_along(
    channel: grpc.aio.Channel, directory: Path
) -> None:
    layer = await write(channel, b"layer")
    manifest = await write(channel, b"manifest", labels={"containerd.io/gc.ref.content.l.0": layer})
    images = images_pb2_grpc.ImagesStub(channel)
    content = content_pb2_grpc.ContentStub(channel)
    created = await images.Create(
        images_pb2.CreateImageRequest(image=image("x", manifest, a="1")), timeout=T
    )
    assert created.image.target.digest == manifest
    new = image("x", manifest, a="2")
    updated = await images.Update(
        images_pb2.UpdateImageRequest(image=new, update_mask=FieldMask(paths=["labels"])),
        timeout=T,
    )
    assert updated.image.labels["a"] == "2"
    assert updated.image.created_at == created.image.created_at
    listed = await images.List(images_pb2.ListImagesRequest(filters=["labels.a==2"]), timeout=T)
    assert [found.name for found in listed.images] == ["x"]
    await content.Info(content_pb2.InfoRequest(digest=layer), timeout=T)
    await images.Delete(images_pb2.DeleteImageRequest(name="x", sync=True), timeout=T)
    for digest in (layer, manifest):
        async with refused(grpc.StatusCode.NOT_FOUND):
            await content.Info(content_pb2.InfoRequest(digest=digest), timeout=T)
    blobs = directory / "root" / "content" / "blobs"
    assert [path for path in blobs.rglob("*") if path.is_file()] == []


async def test_what_is_made_under_a_requests_lease_joins_it(channel: grpc.aio.Channel) -> None:
    leases = leases_pb2_grpc.LeasesStub(channel)
    made = await leases.Create(leases_pb2.CreateRequest(id="l", labels={"a": "1"}), timeout=T)
    assert made.lease.created_at.seconds > 0
    under = [("containerd-lease", "l")]
    digest = await write(channel, b"leased", metadata=under)
    snapshots = snapshots_pb2_grpc.SnapshotsStub(channel)
    await snapshots.Prepare(
        snapshots_pb2.PrepareSnapshotRequest(snapshotter="overlayfs", key="k"),
        timeout=T,
        metadata=under,
    )
    asked = leases_pb2.ListResourcesRequest(id="l")
    resources = (await leases.ListResources(asked, timeout=T)).resources
    assert {(r.type, r.id) for r in resources} == {
        ("content", digest),
        ("snapshots/overlayfs", "k"),
    }
    async with refused(grpc.StatusCode.NOT_FOUND):
        await write(channel, b"too late", metadata=[("containerd-lease", "none")])
    await leases.Delete(leases_pb2.DeleteRequest(id="l", sync=True), timeout=T)
    async with refused(grpc.StatusCode.NOT_FOUND):
        await content_pb2_grpc.ContentStub(channel).Info(
            content_pb2.InfoRequest(digest=digest), timeout=T
        )
    async with refused(grpc.StatusCode.NOT_FOUND):
        await snapshots.Stat(
            snapshots_pb2.StatSnapshotRequest(snapshotter="overlayfs", key="k"), timeout=T
        )


async def test_resources_of_a_lease(channel: grpc.aio.Channel) -> None:
    leases = leases_pb2_grpc.LeasesStub(channel)
    await leases.Create(leases_pb2.CreateRequest(id="l"), timeout=T)
    resource = leases_pb2.Resource(id="x", type="images")
    await leases.AddResource(leases_pb2.AddResourceRequest(id="l", resource=resource), timeout=T)
    asked = leases_pb2.ListResourcesRequest(id="l")
    assert list((await leases.ListResources(asked, timeout=T)).resources) == [resource]
    await leases.DeleteResource(
        leases_pb2.DeleteResourceRequest(id="l", resource=resource), timeout=T
    )
    assert list((await leases.ListResources(asked, timeout=T)).resources) == []
    async with refused(grpc.StatusCode.UNIMPLEMENTED):
        await leases.AddResource(
            leases_pb2.AddResourceRequest(
                id="l", resource=leases_pb2.Resource(id="x", type="sandboxes")
            ),
            timeout=T,
        )
    listed = await leases.List(leases_pb2.ListRequest(filters=["id==l"]), timeout=T)
    assert [lease.id for lease in listed.leases] == ["l"]


def exit_event() -> event_pb2.Envelope:
    envelope = event_pb2.Envelope(namespace="test", topic="/tasks/exit")
    envelope.timestamp.seconds = 5
    envelope.event.type_url = "containerd.events.TaskExit"
    envelope.event.value = task_pb2.TaskExit(container_id="c", id="c").SerializeToString()
    return envelope


async def test_subscribers_and_the_journal_tell_the_same_in_the_same_order(
    channel: grpc.aio.Channel,
) -> None:
    events = events_pb2_grpc.EventsStub(channel)
    journal = journal_pb2_grpc.JournalStub(channel)
    following = journal.Read(journal_pb2.ReadRequest(from_end=True), timeout=T)
    first = await following.read()
    assert not first.HasField("entry")
    subscription = events.Subscribe(events_pb2.SubscribeRequest(), timeout=T)
    received = asyncio.create_task(subscription.read())
    while not received.done():  # until the subscription stands
        await events.Publish(
            events_pb2.PublishRequest(topic="/ready", event=exit_event().event), timeout=T
        )
        await asyncio.wait([received], timeout=0.02)
    await events.Forward(events_pb2.ForwardRequest(envelope=exit_event()), timeout=T)
    await write(channel, b"blob")
    told = []
    while not told or told[-1] != "/content/create":
        told.append((await subscription.read()).topic)
    assert [topic for topic in told if topic != "/ready"] == ["/tasks/exit", "/content/create"]
    entries = []
    while not entries or entries[-1].topic != "/content/create":
        entries.append((await following.read()).entry)
    assert [entry.seq for entry in entries] == list(range(first.next_seq, entries[-1].seq + 1))
    assert [e.topic for e in entries if e.topic != "/ready"] == ["/tasks/exit", "/content/create"]
    forwarded = next(entry for entry in entries if entry.topic == "/tasks/exit")
    assert (forwarded.timestamp.seconds, forwarded.event.type_url) == (
        5,
        "containerd.events.TaskExit",
    )
    subscription.cancel()
    following.cancel()


async def test_publishing_refuses_what_is_malformed(channel: grpc.aio.Channel) -> None:
    events = events_pb2_grpc.EventsStub(channel)
    async with refused(grpc.StatusCode.INVALID_ARGUMENT):
        await events.Publish(events_pb2.PublishRequest(topic="no slash"), timeout=T)
    envelope = exit_event()
    envelope.ClearField("timestamp")
    async with refused(grpc.StatusCode.INVALID_ARGUMENT):
        await events.Forward(events_pb2.ForwardRequest(envelope=envelope), timeout=T)
    async with refused(grpc.StatusCode.INVALID_ARGUMENT):
        await events.Subscribe(events_pb2.SubscribeRequest(filters=["topic="]), timeout=T).read()


async def test_the_journal_says_what_it_no_longer_has(directory: Path) -> None:
    async with running_app(directory):
        pass
    async with running_app(directory) as channel:
        for number in range(5):
            await write(channel, f"blob {number}".encode())
    async with running_app(directory, journal_events=2) as channel:
        journal = journal_pb2_grpc.JournalStub(channel)
        async with refused(grpc.StatusCode.OUT_OF_RANGE) as errors:
            while True:  # the start of containerd truncates behind its serving
                read = journal.Read(journal_pb2.ReadRequest(**{"from": 1}, no_follow=True))
                async for _ in read:
                    pass
        assert ("theseus-first-seq", "4") in list(errors[0].trailing_metadata() or ())
        read = journal.Read(journal_pb2.ReadRequest(no_follow=True), timeout=T)
        assert [response.entry.seq async for response in read] == [4, 5]
        async with refused(grpc.StatusCode.OUT_OF_RANGE):
            await journal.Read(journal_pb2.ReadRequest(**{"from": 9}), timeout=T).read()


async def test_introspection(channel: grpc.aio.Channel) -> None:
    stub = introspection_pb2_grpc.IntrospectionStub(channel)
    asked = introspection_pb2.PluginsRequest(
        filters=["type==io.containerd.snapshotter.v1, id==overlayfs".replace(" ", "")]
    )
    [plugin] = (await stub.Plugins(asked, timeout=T)).plugins
    assert plugin.platforms[0].os == "linux"
    assert not plugin.HasField("init_err")
    server = await stub.Server(Empty(), timeout=T)
    assert len(server.uuid) == 36
    question = introspection_pb2.PluginInfoRequest(type="io.containerd.runtime.v2", id="task")
    question.options.value = types_pb2.RuntimeRequest(
        runtime_path="io.containerd.runc.v2"
    ).SerializeToString()
    told = await stub.PluginInfo(question, timeout=T)
    info = types_pb2.RuntimeInfo.FromString(told.extra.value)
    assert (told.extra.type_url, info.name) == (
        "containerd.types.RuntimeInfo",
        "io.containerd.runc.v2",
    )
    question.id = "none"
    async with refused(grpc.StatusCode.NOT_FOUND):
        await stub.PluginInfo(question, timeout=T)
    question.type, question.id = "io.containerd.gc.v1", "scheduler"
    async with refused(grpc.StatusCode.UNIMPLEMENTED):
        await stub.PluginInfo(question, timeout=T)


async def test_the_uuid_and_all_records_outlive_a_restart(directory: Path) -> None:
    async with running_app(directory) as channel:
        stub = introspection_pb2_grpc.IntrospectionStub(channel)
        before = (await stub.Server(Empty(), timeout=T)).uuid
        containers = containers_pb2_grpc.ContainersStub(channel)
        await containers.Create(
            containers_pb2.CreateContainerRequest(container=container("c")), timeout=T
        )
    async with running_app(directory) as channel:
        stub = introspection_pb2_grpc.IntrospectionStub(channel)
        assert (await stub.Server(Empty(), timeout=T)).uuid == before
        containers = containers_pb2_grpc.ContainersStub(channel)
        await containers.Get(containers_pb2.GetContainerRequest(id="c"), timeout=T)


async def test_a_stop_sends_readers_of_events_away_with_a_code_to_retry(directory: Path) -> None:
    app = App(config(directory))
    async with app, connect(config(directory).address, namespace="test") as channel:
        journal = journal_pb2_grpc.JournalStub(channel)
        following = journal.Read(journal_pb2.ReadRequest(from_end=True), timeout=T)
        await following.read()
        began = asyncio.get_running_loop().time()
        await app.__aexit__(None, None, None)
        assert asyncio.get_running_loop().time() - began < 3
        async with refused(grpc.StatusCode.UNAVAILABLE):
            await following.read()
    assert not config(directory).address.exists()


async def test_the_metrics_page_has_calls_records_and_shims(directory: Path) -> None:
    address = f"unix:{directory}/m.sock"
    async with running_app(directory, metrics_address=address) as channel:
        await write(channel, b"12345")
        reader, writer = await asyncio.open_unix_connection(f"{directory}/m.sock")
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        page = (await asyncio.wait_for(reader.read(), T)).decode()
        writer.close()
    for line in (
        "theseus_containerd_content_bytes 5.0",
        "theseus_containerd_epoch 1.0",
        'theseus_containerd_objects{kind="blobs"} 1.0',
        "# TYPE theseus_containerd_shims gauge",
        'grpc_service="containerd.services.content.v1.Content"',
    ):
        assert line in page, line
    described = [line for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(described) == len(set(described))


def violated_field(error: grpc.aio.AioRpcError) -> str:
    """The field that an error's details blame."""
    for detail in _details(error):
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request):  # type: ignore[attr-defined]
            return request.field_violations[0].field
    return ""


def _details(error: grpc.aio.AioRpcError) -> Iterator[object]:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            yield from status_pb2.Status.FromString(value).details  # type: ignore[arg-type]
