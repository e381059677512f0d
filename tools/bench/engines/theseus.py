"""Theseus as its users see it: the daemon's API, with a containerd of its own below."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from google.protobuf import duration_pb2

from protos.theseus.engine.v1 import (
    containers_pb2,
    containers_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)
from tools.bench.engines.containerd import METRICS, theseus_containerd, theseus_tier
from tools.bench.engines.containerd_api import channel_to
from tools.bench.engines.engine import CALL_S, ECHO, SAID, BenchError, Client, Plan
from tools.bench.engines.server import Server
from tools.bench.figures import Role, Subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc

    from tools.bench.pictures import Pictures

API = "the daemon's"
_STOP_S = 10
_RUNNING = containers_pb2.CONTAINER_STATE_RUNNING


async def version(socket: Path) -> str:
    """What the daemon says it is, over a connection of its own."""
    async with channel_to(socket) as channel:
        stub = system_pb2_grpc.SystemStub(channel)
        return (await stub.Version(system_pb2.VersionRequest(), timeout=CALL_S)).version


class Theseus:
    """All tiers."""

    subject: ClassVar = Subject("Theseus", Role.OURS)
    api: ClassVar = API
    networks: ClassVar[tuple[str, ...]] = ("none", "bridge")

    def __init__(self, place: Path, pictures: Pictures) -> None:
        self.place = place
        self._image = pictures.reference(pictures.busybox_name)
        state = place / "state"
        containerd = theseus_containerd(place, place / "root" / "containerd", state / "containerd")
        self.servers: tuple[Server, ...] = (containerd, _daemon(place, containerd.address))
        self._channel: grpc.aio.Channel | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        """A channel that is kept."""
        if self._channel is None:
            self._channel = channel_to(self.servers[-1].address)
        return self._channel

    @property
    def _containers(self) -> containers_pb2_grpc.ContainersStub:
        return containers_pb2_grpc.ContainersStub(self.channel)

    async def start(self) -> None:
        """Start both tiers."""
        for server in self.servers:
            await server.start()

    async def close(self) -> None:
        """End them, last first."""
        await self.forget()
        for server in reversed(self.servers):
            await server.stop()

    async def forget(self) -> None:
        """Close the channel; the next call makes a new one."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def pull(self, reference: str) -> None:
        """See Engine."""
        request = images_pb2.PullImageRequest(reference=reference)
        image = False
        pull = images_pb2_grpc.ImagesStub(self.channel).Pull
        async for progress in pull(request, timeout=CALL_S):
            image = image or progress.HasField("image")
        if not image:
            raise BenchError(f"pull of {reference} ended without an image")

    async def remove_image(self, reference: str) -> None:
        """See Engine."""
        request = images_pb2.RemoveImageRequest(image=reference)
        await images_pb2_grpc.ImagesStub(self.channel).Remove(request, timeout=CALL_S)

    async def run(self, plan: Plan) -> int:
        """See Engine."""
        container = await self.create(plan)
        request = containers_pb2.WaitContainerRequest(
            container=container, condition=containers_pb2.WaitContainerRequest.CONDITION_NEXT_EXIT
        )
        waiting = self._containers.Wait(request, timeout=CALL_S)
        await self.begin(container)
        code = _code((await waiting).exit)
        await self.remove(container)
        return code

    async def record(self, plan: Plan) -> str:
        """See Engine."""
        return await self.create(plan)

    async def discard(self, container: str) -> None:
        """See Engine."""
        await self.remove(container)

    async def create(self, plan: Plan) -> str:
        """See Engine."""
        config = containers_pb2.ContainerConfig(
            image=plan.picture or self._image,
            command=plan.command,
            network_mode=plan.network,
            runtime=plan.runtime,
            mounts=[
                containers_pb2.Mount(
                    type=containers_pb2.Mount.TYPE_BIND,
                    source=source,
                    target=target,
                    read_only=True,
                )
                for source, target in (plan.binds or {}).items()
            ],
        )
        request = containers_pb2.CreateContainerRequest(config=config)
        return (await self._containers.Create(request, timeout=CALL_S)).id

    async def begin(self, container: str) -> None:
        """See Engine."""
        request = containers_pb2.StartContainerRequest(container=container)
        await self._containers.Start(request, timeout=CALL_S)

    async def wait(self, container: str) -> int:
        """See Engine."""
        request = containers_pb2.WaitContainerRequest(container=container)
        return _code((await self._containers.Wait(request, timeout=CALL_S)).exit)

    async def execute(self, container: str) -> int:
        """See Engine."""
        execs = containers_pb2_grpc.ExecsStub(self.channel)
        request = containers_pb2.CreateExecRequest(container=container, command=ECHO)
        said, ended = b"", None
        async for message in execs.Run(containers_pb2.RunExecRequest(exec=request), timeout=CALL_S):
            said += message.output.data
            if message.HasField("exit"):
                ended = message.exit
        if said != SAID or ended is None:
            raise BenchError(f"exec said {said!r} and ended with {ended}")
        return _code(ended)

    async def stop(self, container: str) -> int:
        """See Engine."""
        limit = duration_pb2.Duration(seconds=_STOP_S)
        request = containers_pb2.StopContainerRequest(container=container, timeout=limit)
        await self._containers.Stop(request, timeout=CALL_S)
        return _code((await self._get(container)).exit)

    async def remove(self, container: str) -> None:
        """See Engine."""
        request = containers_pb2.RemoveContainerRequest(container=container)
        await self._containers.Remove(request, timeout=CALL_S)

    async def destroy(self, container: str) -> None:
        """See Engine."""
        request = containers_pb2.RemoveContainerRequest(container=container, force=True)
        await self._containers.Remove(request, timeout=CALL_S)

    async def count(self) -> int:
        """See Engine."""
        return len(await self._list())

    async def running(self) -> int:
        """See Engine."""
        return sum(container.state == _RUNNING for container in await self._list())

    async def inspect(self, container: str) -> None:
        """See Engine."""
        found = await self._get(container)
        if found.id != container:
            raise BenchError(f"asked for {container}, got {found.id}")

    async def log_path(self, container: str) -> Path:
        """See Engine."""
        return Path((await self._get(container)).log_path)

    async def version(self) -> str:
        """See Engine."""
        return await version(self.servers[-1].address)

    def client(self) -> Client | None:
        """See Engine. The program that was installed, if one was."""
        program = Path(sys.executable).with_name("theseus")
        plain = [str(program)] if program.exists() else [sys.executable, "-m", "services.cli"]
        host = f"unix://{self.servers[-1].address}"
        return Client("theseus", plain, [*plain, "--host", host, "ps"])

    def tier(self, pid: int, argv: Sequence[str]) -> str:
        """See Engine."""
        return "daemon" if "services.daemon" in argv else theseus_tier(pid, argv)

    async def _list(self) -> Sequence[containers_pb2.Container]:
        request = containers_pb2.ListContainersRequest(all=True)
        return (await self._containers.List(request, timeout=CALL_S)).containers

    async def _get(self, container: str) -> containers_pb2.Container:
        request = containers_pb2.GetContainerRequest(container=container)
        return (await self._containers.Get(request, timeout=CALL_S)).container


def _daemon(place: Path, containerd: Path) -> Server:
    root, state = place / "root" / "daemon", place / "state" / "daemon"
    return Server(
        "daemon",
        [
            *(sys.executable, "-m", "services.daemon"),
            *("--root", str(root), "--state", str(state), "--containerd", str(containerd)),
            *("--metrics-address", f"unix:{state / METRICS}"),
        ],
        address=state / "daemon.sock",
        answers=version,
        log=place / "daemon.log",
    )


def _code(status: containers_pb2.ExitStatus) -> int:
    if status.lost:
        raise BenchError(f"the exit status is lost: {status.error}")
    return status.code
