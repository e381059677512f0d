"""PyPI's `containerd` client against a socket: a program of its own, since its stubs are others.

    PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python python pypi_client.py SOCKET CHAIN_ID

It was generated from upstream's contracts by an old compiler, and knows nothing of ours. Today's
protobuf runs it in pure Python only, and takes its maps for what they are on the wire: repeated
entries of key and value. Prints one JSON object of what it found.
"""

import hashlib
import json
import sys
import threading

import grpc
from containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from containerd.services.content.v1 import content_pb2, content_pb2_grpc
from containerd.services.diff.v1 import diff_pb2, diff_pb2_grpc
from containerd.services.events.v1 import events_pb2, events_pb2_grpc, unwrap
from containerd.services.images.v1 import images_pb2, images_pb2_grpc
from containerd.services.introspection.v1 import introspection_pb2, introspection_pb2_grpc
from containerd.services.leases.v1 import leases_pb2, leases_pb2_grpc
from containerd.services.namespaces.v1 import namespace_pb2, namespace_pb2_grpc
from containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from containerd.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from containerd.services.version.v1 import version_pb2_grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty

NAMESPACE = "pypi"
METADATA = (("containerd-namespace", NAMESPACE),)
CALL = {"metadata": METADATA, "timeout": 20}
WORDS = b"some words"
SPEC = {
    "ociVersion": "1.0.2",
    "process": {
        "user": {"uid": 0, "gid": 0},
        "args": ["sh", "-c", "exit 7"],
        "env": ["PATH=/bin"],
        "cwd": "/",
    },
    "root": {"path": "rootfs"},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
    "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]},
}


def main(socket, chain_id):
    with grpc.insecure_channel(f"unix://{socket}") as channel:
        found = {
            "version": version_pb2_grpc.VersionStub(channel).Version(Empty(), **CALL).version,
            "plugins": plugins(channel),
            "namespaces": namespaces(channel),
            "leases": leases(channel),
            "content": content(channel),
            "images": images(channel),
            **run(channel, chain_id),
        }
    sys.stdout.write(json.dumps(found))


def plugins(channel):
    stub = introspection_pb2_grpc.IntrospectionStub(channel)
    request = introspection_pb2.PluginsRequest(filters=["type==io.containerd.snapshotter.v1"])
    return [plugin.id for plugin in stub.Plugins(request, **CALL).plugins]


def namespaces(channel):
    stub = namespace_pb2_grpc.NamespacesStub(channel)
    new = namespace_pb2.Namespace(name="other")
    new.labels.add(key="x", value="y")
    stub.Create(namespace_pb2.CreateNamespaceRequest(namespace=new), **CALL)
    changed = namespace_pb2.Namespace(name="other")
    changed.labels.add(key="x", value="z")
    update = namespace_pb2.UpdateNamespaceRequest(namespace=changed)
    update.update_mask.paths.append("labels.x")
    stub.Update(update, **CALL)
    listed = stub.List(namespace_pb2.ListNamespacesRequest(), **CALL).namespaces
    stub.Delete(namespace_pb2.DeleteNamespaceRequest(name="other"), **CALL)
    return {n.name: {label.key: label.value for label in n.labels} for n in listed}


def leases(channel):
    stub = leases_pb2_grpc.LeasesStub(channel)
    made = stub.Create(leases_pb2.CreateRequest(id="lease"), **CALL).lease
    stub.AddResource(
        leases_pb2.AddResourceRequest(
            id=made.id, resource=leases_pb2.Resource(id="key", type="snapshots/overlayfs")
        ),
        **CALL,
    )
    held = stub.ListResources(leases_pb2.ListResourcesRequest(id=made.id), **CALL).resources
    stub.Delete(leases_pb2.DeleteRequest(id=made.id, sync=True), **CALL)
    return [(resource.id, resource.type) for resource in held]


def content(channel):
    stub = content_pb2_grpc.ContentStub(channel)
    digest = f"sha256:{hashlib.sha256(WORDS).hexdigest()}"
    writes = [
        content_pb2.WriteContentRequest(action=content_pb2.WRITE, ref="words", data=WORDS),
        content_pb2.WriteContentRequest(
            action=content_pb2.COMMIT, ref="words", total=len(WORDS), expected=digest
        ),
    ]
    *_, last = stub.Write(iter(writes), **CALL)
    read = stub.Read(content_pb2.ReadContentRequest(digest=digest, offset=5), **CALL)
    text = b"".join(part.data for part in read).decode()
    return {"digest": last.digest == digest, "offset": last.offset, "text": text}


def images(channel):
    stub = images_pb2_grpc.ImagesStub(channel)
    try:
        stub.Get(images_pb2.GetImageRequest(name="none"), **CALL)
    except grpc.RpcError as error:
        missing = error.code().name
    return {
        "missing": missing,
        "names": [i.name for i in stub.List(images_pb2.ListImagesRequest(), **CALL).images],
    }


def run(channel, chain_id):
    """A container from its snapshot to its end, and the events of it."""
    subscription = events_pb2_grpc.EventsStub(channel).Subscribe(
        events_pb2.SubscribeRequest(filters=[f"namespace=={NAMESPACE}"]), timeout=20
    )
    told, listens = [], threading.Event()
    reader = threading.Thread(target=follow, args=(subscription, told, listens))
    snapshots = snapshots_pb2_grpc.SnapshotsStub(channel)
    containers = containers_pb2_grpc.ContainersStub(channel)
    tasks = tasks_pb2_grpc.TasksStub(channel)
    prepare = snapshots_pb2.PrepareSnapshotRequest(
        snapshotter="overlayfs", key="c", parent=chain_id
    )
    reader.start()
    namespace = namespace_pb2.UpdateNamespaceRequest(
        namespace=namespace_pb2.Namespace(name=NAMESPACE)
    )
    while not listens.wait(0.05):  # nothing but an event tells that it listens
        namespace_pb2_grpc.NamespacesStub(channel).Update(namespace, **CALL)
    mounts = snapshots.Prepare(prepare, **CALL).mounts
    record = containers_pb2.Container(
        id="c",
        snapshotter="overlayfs",
        snapshot_key="c",
        runtime=containers_pb2.Container.Runtime(name="io.containerd.runc.v2"),
        spec=Any(
            type_url="types.containerd.io/opencontainers/runtime-spec/1/Spec",
            value=json.dumps(SPEC).encode(),
        ),
    )
    containers.Create(containers_pb2.CreateContainerRequest(container=record), **CALL)
    made = tasks.Create(tasks_pb2.CreateTaskRequest(container_id="c", rootfs=mounts), **CALL)
    started = tasks.Start(tasks_pb2.StartRequest(container_id="c"), **CALL)
    waited = tasks.Wait(tasks_pb2.WaitRequest(container_id="c"), **CALL)
    deleted = tasks.Delete(tasks_pb2.DeleteTaskRequest(container_id="c"), **CALL)
    changed = diff_pb2_grpc.DiffStub(channel).Diff(
        diff_pb2.DiffRequest(left=mounts, right=mounts), **CALL
    )
    containers.Delete(containers_pb2.DeleteContainerRequest(id="c"), **CALL)
    snapshots.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter="overlayfs", key="c"), **CALL)
    reader.join(20)
    return {
        "pids": made.pid == started.pid > 0,
        "status": [waited.exit_status, deleted.exit_status],
        "diff": changed.diff.media_type,
        "events": told,
    }


def follow(subscription, told, listens):
    for envelope in subscription:
        listens.set()
        if envelope.topic == "/namespaces/update":
            continue
        told.append((envelope.topic, type(unwrap(envelope)).__name__))
        if envelope.topic == "/snapshot/remove":
            subscription.cancel()
            return


main(*sys.argv[1:])
