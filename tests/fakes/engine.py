"""A daemon over a pretended containerd, in this process or in one that kills itself at a step."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

from protos.theseus.engine.v1 import containers_pb2 as pb
from protos.theseus.engine.v1 import (
    containers_pb2_grpc,
    images_pb2_grpc,
    system_pb2_grpc,
)
from services.common.client import connect
from services.daemon.app import App
from services.daemon.config import Config
from tests.fakes.network import FakeNetwork
from tests.fakes.node import FakeNode

_RUNTIME = "#!/bin/sh\necho runc version 1.1.5\n"
_TIMEOUT_S = 20


def config(directory):
    """A daemon's configuration below ``directory``."""
    program = directory / "runc"
    if not program.exists():
        program.write_text(_RUNTIME)
        program.chmod(0o755)
    return Config(
        root=directory / "root",
        state=directory / "s",
        address=directory / "s" / "d.sock",
        containerd=directory / "c.sock",
        namespace="theseus",
        metrics_address=f"unix:{directory}/m.sock",
        bridge_name="fake0",
        bridge_subnet="10.77.0.1/16",
        default_runtime="runc",
        runtimes={"runc": str(program), "absent": "/nonexistent/runtime"},
        return_grace_s=0.5,
        lock_timeout_s=10,
    )


class Engine:
    """A directory with a node and, when it runs, a daemon; and stubs to call it."""

    def __init__(self, directory):
        self.directory = directory
        self.config = config(directory)
        self.node = FakeNode(self.config.containerd, directory / "snapshots")
        self.network = FakeNetwork(directory / "network")
        self.app = None
        self._channel = None

    async def start(self):
        self.app = App(self.config, network=self.network)
        await self.app.__aenter__()
        self._channel = connect(self.config.address)
        self._stubs()

    async def stop(self):
        if self.app is not None:
            await self._channel.close()
            await self.app.__aexit__(None, None, None)
            self.app = None

    async def restart(self):
        await self.stop()
        await self.start()

    async def killed_at(self, step, request):
        """Run a daemon that kills itself at ``step``, and have it do ``request``.

        ``request`` is called with this engine once the daemon serves.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.fakes.engine",
            str(self.directory),
            step,
            cwd=Path(__file__).parents[2],
        )
        ended = asyncio.create_task(process.wait())
        await self.until(lambda: self.config.address.exists() or ended.done())
        self._channel = connect(self.config.address)
        self._stubs()
        working = asyncio.create_task(request(self))
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                code = await ended
        finally:
            if not ended.done():
                process.kill()
                await process.wait()
            working.cancel()
            await asyncio.gather(working, ended, return_exceptions=True)
            await self._channel.close()
            self.config.address.unlink(missing_ok=True)
        assert code == -signal.SIGKILL, f"the daemon ended with {code} before it came to {step}"

    def _stubs(self):
        self.containers = containers_pb2_grpc.ContainersStub(self._channel)
        self.execs = containers_pb2_grpc.ExecsStub(self._channel)
        self.images = images_pb2_grpc.ImagesStub(self._channel)
        self.system = system_pb2_grpc.SystemStub(self._channel)
        self.volumes = system_pb2_grpc.VolumesStub(self._channel)

    async def create(self, name="", **fields):
        """A container; returns its id."""
        chosen = pb.ContainerConfig(image="busybox", **fields)
        answer = await self.containers.Create(
            pb.CreateContainerRequest(name=name, config=chosen), timeout=_TIMEOUT_S
        )
        return answer.id

    async def begin(self, container):
        await self.containers.Start(
            pb.StartContainerRequest(container=container), timeout=_TIMEOUT_S
        )

    async def run(self, name="", **fields):
        identity = await self.create(name, **fields)
        await self.begin(identity)
        return identity

    async def get(self, container):
        answer = await self.containers.Get(
            pb.GetContainerRequest(container=container), timeout=_TIMEOUT_S
        )
        return answer.container

    async def wait(self, container, condition=pb.WaitContainerRequest.CONDITION_UNSPECIFIED):
        answer = await self.containers.Wait(
            pb.WaitContainerRequest(container=container, condition=condition), timeout=_TIMEOUT_S
        )
        return answer.exit

    async def remove(self, container, **fields):
        await self.containers.Remove(
            pb.RemoveContainerRequest(container=container, **fields), timeout=_TIMEOUT_S
        )

    async def list_all(self, *, stopped=True):
        answer = await self.containers.List(
            pb.ListContainersRequest(all=stopped), timeout=_TIMEOUT_S
        )
        return list(answer.containers)

    async def until(self, condition):
        """Wait for something that only becomes visible by itself."""
        async with asyncio.timeout(_TIMEOUT_S):
            while not condition():  # noqa: ASYNC110 - nothing tells when
                await asyncio.sleep(0.01)

    def left(self):
        """What is there of containers: in containerd, on the network, on the disk."""
        world = self.node.world
        return {
            "records": sorted(world.containers),
            "snapshots": sorted(world.snapshots),
            "tasks": sorted(world.tasks),
            "network": self.network.attached(),
            "files": sorted(p.name for p in (self.config.root / "containers").glob("*")),
            "volumes": sorted(p.name for p in (self.config.root / "volumes").glob("*")),
        }


NOTHING = {key: [] for key in ("records", "snapshots", "tasks", "network", "files", "volumes")}


@asynccontextmanager
async def engine():
    """An engine whose node and daemon run, with a busybox."""
    # Short, since sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="thd") as name:
        made = Engine(Path(name))
        async with made.node:
            made.node.world.add_image()
            await made.start()
            try:
                yield made
            finally:
                await made.stop()


async def _serve(directory, step):
    def trace(reached):
        if reached == step:
            os.kill(os.getpid(), signal.SIGKILL)

    network = FakeNetwork(directory / "network")
    async with App(config(directory), network=network, trace=trace):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2]))
