"""containerd's tasks with the real factory, keeper, shims and runtimes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from prometheus_client import CollectorRegistry

from protos.containerd.services.tasks.v1 import tasks_pb2 as pb
from protos.containerd.types.runc.options import oci_pb2
from services.common.metrics import ServerMetrics
from services.common.mounts import Mount
from services.common.rpc_errors import from_rpc_error
from services.containerd.clients.shim import dial_shim
from services.containerd.containers.store import Container
from services.containerd.events.exchange import Exchange
from services.containerd.rpc.events import event_field
from services.containerd.rpc.mounts import to_mounts
from services.containerd.rpc.shim_events import ShimEvents
from services.containerd.rpc.shim_socket import ShimSocket
from services.containerd.tasks.bundle import unmount_beneath
from services.containerd.tasks.factory import FactoryClient
from services.containerd.tasks.fd_keeper import DescriptorKeeper
from services.containerd.typed import TypedValue
from tests.fakes.task_node import NS, SPEC, TaskNode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AsyncExitStack

_END_LIMIT_S = 20
PROGRAM = (sys.executable, "-m", "services.shim")


def make_rootfs(path: Path) -> Path:
    (path / "bin").mkdir(parents=True)
    for name in ("proc", "dev", "sys", "tmp"):
        (path / name).mkdir()
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox-static is a prerequisite of the suite"
    shutil.copy(busybox, path / "bin" / "busybox")
    for name in ("sh", "sleep", "cat", "echo"):
        (path / "bin" / name).symlink_to("busybox")
    return path


def make_spec(
    container_id: str,
    *args: str,
    annotations: Mapping[str, str] | None = None,
    mapped_to: int = 0,
) -> bytes:
    """A spec; with ``mapped_to``, of a user namespace whose root is that id outside."""
    kinds = ["pid", "mount", "ipc", "uts", "network", *(["user"] if mapped_to else [])]
    ids = [{"containerID": 0, "hostID": mapped_to, "size": 65536}]
    mappings = {"uidMappings": ids, "gidMappings": ids} if mapped_to else {}
    return json.dumps(
        {
            "ociVersion": "1.0.2",
            "annotations": dict(annotations or {}),
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": args,
                "env": ["PATH=/bin"],
                "cwd": "/",
            },
            "root": {"path": "rootfs"},
            "hostname": "task",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            ],
            "linux": {
                "namespaces": [{"type": kind} for kind in kinds],
                "cgroupsPath": f"/theseus-tasks/{container_id}",
                **mappings,
            },
        }
    ).encode()


class RealTaskNode(TaskNode):
    """A node whose shims are real.

    Args:
        root: its directory.
        replacing: shims that die are replaced, with what a keeper holds.
        containers_per_shim: as of ``ShimManager``.
    """

    def __init__(
        self, root: Path, *, replacing: bool = False, containers_per_shim: int = 1
    ) -> None:
        super().__init__(root, containers_per_shim=containers_per_shim)
        self.replacing = replacing
        self.rootfs = make_rootfs(root / "rootfs")
        self.launcher: FactoryClient

    async def start(self, *, serve: bool = True) -> None:
        keeper = DescriptorKeeper(PROGRAM, self.state / "k.sock") if self.replacing else None
        self.launcher = self.factory = FactoryClient(
            PROGRAM,
            socket=self.state / "f.sock",
            registry=self.socket,
            log_level="debug",
            keeper=keeper.path if keeper is not None else None,
            places=self.state / "w",
            waiting=1,
            dial=dial_shim,
        )
        await super().start(serve=serve)
        if keeper is not None:
            await self._stack.enter_async_context(keeper)
        await self._stack.enter_async_context(self.launcher)

    async def _serve(self, stack: AsyncExitStack) -> None:
        """Shims register as with the program: over ttrpc."""
        exchange = Exchange(self.metadata.db, self.metadata.journal, event_field)
        served = ShimSocket(
            self.socket,
            shims=self.shims,
            events=ShimEvents(self.shims, exchange),
            metrics=ServerMetrics(CollectorRegistry()),
        )
        await stack.enter_async_context(served)
        await super()._serve(stack)

    async def create(
        self,
        container_id: str,
        *args: str,
        runtime: str = "runc",
        annotations: Mapping[str, str] | None = None,
        rootfs: Sequence[Mount] = (),
        mapped_to: int = 0,
        **fields: Any,
    ) -> int:
        """Make a container and its task; returns init's pid."""
        mounts = rootfs or [Mount("bind", str(self.rootfs), options=("rbind", "rw"))]
        spec = make_spec(container_id, *args, annotations=annotations, mapped_to=mapped_to)
        await self.metadata.containers.create(
            NS,
            Container(
                id=container_id,
                runtime_name="io.containerd.runc.v2",
                spec=TypedValue(SPEC.type_url, spec),
            ),
        )
        options = oci_pb2.Options(binary_name=runtime)
        request = pb.CreateTaskRequest(
            container_id=container_id,
            rootfs=to_mounts(mounts),
            options=AnyMessage(
                type_url=options.DESCRIPTOR.full_name, value=options.SerializeToString()
            ),
            **fields,
        )
        async with self.client() as client:
            return (await client.tasks.Create(request, timeout=30)).pid

    async def call(self, method: str, container_id: str, **fields: Any) -> Any:
        kinds = {
            "Start": pb.StartRequest,
            "Wait": pb.WaitRequest,
            "Delete": pb.DeleteTaskRequest,
            "Get": pb.GetRequest,
            "Kill": pb.KillRequest,
            "Pause": pb.PauseTaskRequest,
            "ListPids": pb.ListPidsRequest,
            "Exec": pb.ExecProcessRequest,
        }
        async with self.client() as client:
            request = kinds[method](container_id=container_id, **fields)
            try:
                return await getattr(client.tasks, method)(request, timeout=30)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None

    def shim_pid(self, container_id: str) -> int:
        process = self.bundles.find(NS, container_id).process()
        assert process is not None
        return process.pid

    async def assert_clean(self) -> None:
        async with asyncio.timeout(10):
            await self.shims_removed()
        assert list((self.state / "tasks" / NS).iterdir()) == []
        assert list((self.state / "s").iterdir()) == []
        assert str(self.state) not in Path("/proc/self/mountinfo").read_text()
        left = [path for path in Path("/sys/fs/cgroup").glob("*/theseus-tasks/*") if path.is_dir()]
        assert left == []
        assert list((self.state / "runtime").glob("*/*/*")) == []

    async def close(self) -> None:
        for known in self.shims.all(NS):
            if known.dismissed is not None:
                continue
            if known.process is not None and known.process.alive():
                for process in await known.shim.pids() if known.shim else ():
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                async with asyncio.timeout(_END_LIMIT_S):
                    await self.tasks.wait(NS, known.id)
            await self.tasks.delete(NS, known.id)
        async with asyncio.timeout(_END_LIMIT_S):
            await self.shims_removed()
        await self.stop()
        unmount_beneath(self.state)
        for path in Path("/sys/fs/cgroup").glob("*/theseus-tasks"):
            path.rmdir()
