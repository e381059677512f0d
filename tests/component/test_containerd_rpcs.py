"""Every RPC of containerd's API: all are there, and answer what upstream answers to bad input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import message_factory
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from protos.containerd.services.containers.v1 import containers_pb2
from protos.containerd.services.content.v1 import content_pb2
from protos.containerd.services.diff.v1 import diff_pb2
from protos.containerd.services.events.v1 import events_pb2
from protos.containerd.services.images.v1 import images_pb2
from protos.containerd.services.introspection.v1 import introspection_pb2
from protos.containerd.services.leases.v1 import leases_pb2
from protos.containerd.services.namespaces.v1 import namespace_pb2
from protos.containerd.services.sandbox.v1 import sandbox_pb2
from protos.containerd.services.snapshots.v1 import snapshots_pb2
from protos.containerd.services.streaming.v1 import streaming_pb2
from protos.containerd.services.tasks.v1 import tasks_pb2
from protos.containerd.services.transfer.v1 import transfer_pb2
from protos.containerd.types import event_pb2
from protos.containerd.types.sandbox_pb2 import Sandbox
from services.common.client import connect
from services.containerd.app import App
from services.containerd.rpc.served import _CONTRACTS
from tests.fakes.containerd import config, node_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from google.protobuf.descriptor import MethodDescriptor
    from google.protobuf.message import Message

CODE = grpc.StatusCode
LATE = {diff_pb2, sandbox_pb2, streaming_pb2, transfer_pb2}
UPSTREAM = {
    *("containers", "content", "diff", "events", "images", "introspection", "leases"),
    *("namespaces", "sandbox", "snapshots", "streaming", "tasks", "transfer", "version"),
}
CALL_S = 10
DIGEST = "sha256:" + "0" * 64
BAD = "name=?x"
# What upstream answers without a namespace as well.
WITHOUT_NAMESPACE = {
    "events.v1.Events/Forward",
    "events.v1.Events/Subscribe",
    "introspection.v1.Introspection/PluginInfo",
    "introspection.v1.Introspection/Plugins",
    "introspection.v1.Introspection/Server",
    "namespaces.v1.Namespaces/Create",
    "namespaces.v1.Namespaces/Delete",
    "namespaces.v1.Namespaces/Get",
    "namespaces.v1.Namespaces/List",
    "namespaces.v1.Namespaces/Update",
    "snapshots.v1.Snapshots/Cleanup",
    "version.v1.Version/Version",
}


def methods() -> list[MethodDescriptor]:
    modules = {module for module, _ in _CONTRACTS.values()} | LATE
    return sorted(
        (
            method
            for module in modules
            if module.DESCRIPTOR.package.startswith("containerd.services.")
            for service in module.DESCRIPTOR.services_by_name.values()
            for method in service.methods
        ),
        key=lambda method: method.full_name,
    )


def name(method: MethodDescriptor) -> str:
    service = method.containing_service.full_name.removeprefix("containerd.services.")
    return f"{service}/{method.name}"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def address() -> AsyncIterator[Path]:
    async with node_directory() as directory:
        chosen = config(directory)
        async with App(chosen):
            yield chosen.address


async def call(channel: grpc.aio.Channel, method: MethodDescriptor, request: Message) -> None:
    """Make a call of any kind, to its first response."""
    kind = ("stream" if method.client_streaming else "unary") + (
        "_stream" if method.server_streaming else "_unary"
    )
    make: Any = getattr(channel, kind)(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )

    async def one() -> AsyncIterator[Message]:
        yield request

    started = make(one() if method.client_streaming else request, timeout=CALL_S)
    if method.server_streaming:
        async for _ in started:
            started.cancel()
            return
    else:
        await started


async def outcome(
    channel: grpc.aio.Channel, method: MethodDescriptor, request: Message
) -> tuple[grpc.StatusCode, str]:
    try:
        await call(channel, method, request)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return CODE.OK, ""


def test_every_service_of_upstreams_is_served() -> None:
    served = {method.containing_service.full_name.split(".")[2] for method in methods()}
    assert served == UPSTREAM
    assert len(methods()) > 80


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("method", methods(), ids=name)
async def test_every_method_is_there_and_wants_a_namespace(
    address: Path, method: MethodDescriptor
) -> None:
    if name(method) == "events.v1.Events/Subscribe":
        return  # it waits for what happens
    request = message_factory.GetMessageClass(method.input_type)()
    for field, value in (("sandboxer", "shim"), ("snapshotter", "overlayfs")):
        if field in request.DESCRIPTOR.fields_by_name:
            setattr(request, field, value)
    if name(method) == "sandbox.v1.Controller/Update":
        request.sandbox.SetInParent()
    async with connect(address) as channel:
        code, words = await outcome(channel, method, request)
    assert "Method not found" not in words
    if name(method) in WITHOUT_NAMESPACE:
        assert "namespace is required" not in words
    elif not method.client_streaming:
        assert (code, words.split(":")[0]) == (CODE.FAILED_PRECONDITION, "namespace is required")


def one(module: Any, service: str, method: str) -> MethodDescriptor:
    found: MethodDescriptor = module.DESCRIPTOR.services_by_name[service].methods_by_name[method]
    return found


MASK = FieldMask(paths=["nonsense"])
Refused = tuple[Any, str, str, Any, grpc.StatusCode, str]
REFUSED: list[Refused] = [
    # Filters that do not parse, wherever there are filters.
    (
        containers_pb2,
        "Containers",
        "List",
        {"filters": [BAD]},
        CODE.INVALID_ARGUMENT,
        "does not parse",
    ),
    (
        containers_pb2,
        "Containers",
        "ListStream",
        {"filters": [BAD]},
        CODE.INVALID_ARGUMENT,
        "does not parse",
    ),
    (content_pb2, "Content", "List", {"filters": [BAD]}, CODE.INVALID_ARGUMENT, "does not parse"),
    (
        content_pb2,
        "Content",
        "ListStatuses",
        {"filters": [BAD]},
        CODE.INVALID_ARGUMENT,
        "does not parse",
    ),
    (
        events_pb2,
        "Events",
        "Subscribe",
        {"filters": [BAD]},
        CODE.INVALID_ARGUMENT,
        "does not parse",
    ),
    (images_pb2, "Images", "List", {"filters": [BAD]}, CODE.INVALID_ARGUMENT, "does not parse"),
    (introspection_pb2, "Introspection", "Plugins", {"filters": [BAD]}, CODE.INVALID_ARGUMENT, "["),
    (leases_pb2, "Leases", "List", {"filters": [BAD]}, CODE.INVALID_ARGUMENT, "does not parse"),
    (sandbox_pb2, "Store", "List", {"filters": [BAD]}, CODE.INVALID_ARGUMENT, "does not parse"),
    (
        snapshots_pb2,
        "Snapshots",
        "List",
        {"snapshotter": "overlayfs", "filters": [BAD]},
        CODE.INVALID_ARGUMENT,
        "does not parse",
    ),
    (tasks_pb2, "Tasks", "Metrics", {"filters": [BAD]}, CODE.INVALID_ARGUMENT, "does not parse"),
    # What is not there.
    (containers_pb2, "Containers", "Get", {"id": "none"}, CODE.NOT_FOUND, "none"),
    (containers_pb2, "Containers", "Delete", {"id": "none"}, CODE.NOT_FOUND, "none"),
    (
        containers_pb2,
        "Containers",
        "Update",
        {"container": containers_pb2.Container(id="none")},
        CODE.NOT_FOUND,
        "none",
    ),
    (content_pb2, "Content", "Info", {"digest": DIGEST}, CODE.NOT_FOUND, DIGEST),
    (content_pb2, "Content", "Delete", {"digest": DIGEST}, CODE.NOT_FOUND, DIGEST),
    (content_pb2, "Content", "Read", {"digest": DIGEST}, CODE.NOT_FOUND, DIGEST),
    (content_pb2, "Content", "Status", {"ref": "none"}, CODE.NOT_FOUND, "none"),
    (content_pb2, "Content", "Abort", {"ref": "none"}, CODE.NOT_FOUND, "none"),
    (images_pb2, "Images", "Get", {"name": "none"}, CODE.NOT_FOUND, "none"),
    (images_pb2, "Images", "Delete", {"name": "none"}, CODE.NOT_FOUND, "none"),
    (leases_pb2, "Leases", "Delete", {"id": "none"}, CODE.NOT_FOUND, "none"),
    (leases_pb2, "Leases", "ListResources", {"id": "none"}, CODE.NOT_FOUND, "none"),
    (namespace_pb2, "Namespaces", "Get", {"name": "none"}, CODE.OK, ""),  # as upstream: no labels
    (namespace_pb2, "Namespaces", "Delete", {"name": "none"}, CODE.NOT_FOUND, "none"),
    (sandbox_pb2, "Store", "Get", {"sandbox_id": "none"}, CODE.NOT_FOUND, "none"),
    (sandbox_pb2, "Store", "Delete", {"sandbox_id": "none"}, CODE.NOT_FOUND, "none"),
    (
        introspection_pb2,
        "Introspection",
        "PluginInfo",
        {"type": "io.containerd.none.v1", "id": "none"},
        CODE.NOT_FOUND,
        "io.containerd.none.v1.none",
    ),
    *(
        (tasks_pb2, "Tasks", method, {"container_id": "none"}, CODE.NOT_FOUND, "none")
        for method in ("Get", "Kill", "Pause", "Resume", "ListPids", "Wait", "Delete", "Create")
    ),
    *(
        (
            snapshots_pb2,
            "Snapshots",
            method,
            {"snapshotter": "overlayfs", "key": "none"},
            CODE.NOT_FOUND,
            "none",
        )
        for method in ("Stat", "Mounts", "Remove", "Usage")
    ),
    # What makes no sense.
    (content_pb2, "Content", "Info", {"digest": "none"}, CODE.INVALID_ARGUMENT, "none"),
    (content_pb2, "Content", "Write", {}, CODE.INVALID_ARGUMENT, "reference"),
    (containers_pb2, "Containers", "Create", {}, CODE.INVALID_ARGUMENT, "container id"),
    (images_pb2, "Images", "Create", {}, CODE.INVALID_ARGUMENT, "name"),
    (leases_pb2, "Leases", "Create", {"id": "a/b c"}, CODE.OK, ""),  # any id, as upstream
    (
        namespace_pb2,
        "Namespaces",
        "Create",
        {"namespace": namespace_pb2.Namespace(name="a/b")},
        CODE.INVALID_ARGUMENT,
        "a/b",
    ),
    (
        namespace_pb2,
        "Namespaces",
        "Update",
        {"namespace": namespace_pb2.Namespace(name="a"), "update_mask": MASK},
        CODE.INVALID_ARGUMENT,
        "nonsense",
    ),
    (events_pb2, "Events", "Publish", {"topic": "no-slash"}, CODE.INVALID_ARGUMENT, "no-slash"),
    (
        events_pb2,
        "Events",
        "Forward",
        {"envelope": event_pb2.Envelope(namespace="a", topic="/a")},
        CODE.INVALID_ARGUMENT,
        "timestamp",
    ),
    (
        events_pb2,
        "Events",
        "Forward",
        {
            "envelope": event_pb2.Envelope(
                namespace="a/b", topic="/a", timestamp=Timestamp(seconds=1)
            )
        },
        CODE.INVALID_ARGUMENT,
        "a/b",
    ),
    (snapshots_pb2, "Snapshots", "List", {"snapshotter": "none"}, CODE.INVALID_ARGUMENT, "none"),
    (
        sandbox_pb2,
        "Store",
        "Create",
        {"sandbox": Sandbox(sandbox_id="a/b")},
        CODE.INVALID_ARGUMENT,
        "a/b",
    ),
    (sandbox_pb2, "Controller", "Create", {}, CODE.INVALID_ARGUMENT, "sandbox controller"),
    (sandbox_pb2, "Controller", "Wait", {"sandboxer": "none"}, CODE.NOT_FOUND, "none"),
    (
        transfer_pb2,
        "Transfer",
        "Transfer",
        {"source": AnyMessage(type_url="none"), "destination": AnyMessage(type_url="none")},
        CODE.UNIMPLEMENTED,
        "none",
    ),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "row", REFUSED, ids=[f"{row[1]}.{row[2]}-{number}" for number, row in enumerate(REFUSED)]
)
async def test_bad_input_has_upstreams_code_and_words_of_what_it_was(
    address: Path, row: Refused
) -> None:
    module, service, method, fields, code, words = row
    descriptor = one(module, service, method)
    request = message_factory.GetMessageClass(descriptor.input_type)(**fields)
    async with connect(address, namespace="test") as channel:
        found, told = await outcome(channel, descriptor, request)
    assert (found, words in told) == (code, True), told
