"""The containers of one shim, by id: how they come, where they are found, when the shim may end.

Calls that change something run to their end even when their caller gives up: a half-created
container would be nobody's. The caller, or its successor, asks for the state.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from services.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from services.common.mounts import Mount
from services.shim.bundle import Bundle
from services.shim.container import Container, Surroundings
from services.shim.runtimes.catalogue import make_runtime
from services.shim.runtimes.runtime import RuntimeOptions
from services.shim.stdio.uris import Stdio

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from services.shim.handover import Outgoing
    from services.shim.process import Process

log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """What Create asks for.

    Attributes:
        id: of the container.
        bundle: its directory.
        rootfs: mounts of its root file system; empty: it is in the bundle already.
        stdio: streams of init.
        options: runtime options; empty fields mean the shim's defaults.
        checkpoint: directory to restore from, or empty.
    """

    id: str
    bundle: Path
    rootfs: tuple[Mount, ...]
    stdio: Stdio
    options: RuntimeOptions
    checkpoint: str = ""


class Tasks:
    """All containers of a shim.

    Args:
        surroundings: what they share.
        home: the shim's own bundle, for its state file.
        default_runtime: for options that name none.
        runtime_state: directory below which runtimes keep their state, by binary and namespace.
        runtime_timeout_s: limit of one runtime call.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        *,
        home: Bundle,
        default_runtime: str,
        runtime_state: Path,
        runtime_timeout_s: float,
    ) -> None:
        self._around = surroundings
        self._home = home
        self._default_runtime = default_runtime
        self._runtime_state = runtime_state
        self._runtime_timeout_s = runtime_timeout_s
        self._containers: dict[str, Container] = {}
        self._creating: set[str] = set()
        self._running: set[asyncio.Task[Any]] = set()
        self.epoch = 0
        self.emptied = asyncio.Event()
        self._was_emptied = False
        self.shutdown = asyncio.Event()
        self.shutdown_now = asyncio.Event()

    def __len__(self) -> int:
        return len(self._containers) + len(self._creating)

    def container(self, container_id: str) -> Container:
        """A container by its id.

        Raises:
            NotFound: it was not created, or is deleted.
        """
        try:
            return self._containers[container_id]
        except KeyError:
            raise NotFound(
                f"container '{container_id}' is not created", resource=("task", container_id)
            ) from None

    def all(self) -> list[Container]:
        """Every container that exists."""
        return list(self._containers.values())

    async def create(self, request: CreateRequest) -> Container:
        """Create a container.

        Raises:
            AlreadyExists: the id is taken.
            FailedPrecondition: see :meth:`Container.create`.
        """
        if request.checkpoint:
            raise FailedPrecondition(
                "a container cannot be restored from a checkpoint by this version of the shim"
            )
        if not request.id or not request.bundle.is_absolute():
            raise InvalidArgument("a container needs an id and an absolute bundle directory")
        if request.id in self._containers or request.id in self._creating:
            raise AlreadyExists(
                f"container '{request.id}' is created already", resource=("task", request.id)
            )
        return await self._to_the_end(self._create(request))

    async def start(self, container: Container, process: Process) -> None:
        """See :meth:`Container.start`."""
        await self._to_the_end(container.start(process))

    async def pause(self, container: Container) -> None:
        """See :meth:`Container.pause`."""
        await self._to_the_end(container.pause())

    async def resume(self, container: Container) -> None:
        """See :meth:`Container.resume`."""
        await self._to_the_end(container.resume())

    async def delete(self, container: Container, process: Process) -> None:
        """Delete a process; with init goes the container."""
        await self._to_the_end(self._delete(container, process))

    def complete(self, options: RuntimeOptions) -> RuntimeOptions:
        """Options with the shim's defaults for what they leave open."""
        binary = options.binary or self._default_runtime
        root = options.root
        if root == Path():
            root = self._runtime_state / Path(binary).name
        return replace(options, binary=binary, root=root / self._around.namespace)

    def request_shutdown(self, *, now: bool) -> None:
        """End the shim once it is empty; does nothing while there are containers, as upstream."""
        if len(self):
            return
        self.shutdown.set()
        if now:
            self.shutdown_now.set()

    def save(self) -> None:
        """Write the state file."""
        state = {
            "epoch": self.epoch,
            "containers": [container.state() for container in self._containers.values()],
        }
        try:
            self._home.write("state.json", state)
        except OSError as error:
            log.warning("state file cannot be written", error=error.strerror)

    def pack(self, out: Outgoing) -> dict[str, Any]:
        """What the next image of the shim goes on with; while quiet and paused."""
        return {
            "containers": [container.pack(out) for container in self._containers.values()],
            "epoch": self.epoch,
            "shutdown": self.shutdown.is_set(),
            "emptied": self._was_emptied,
        }

    def unpack(self, saved: Mapping[str, Any]) -> None:
        """Take over from an earlier image; ``go_on`` begins to copy output."""
        self.epoch = max(self.epoch, saved["epoch"])
        for entry in saved["containers"]:
            options = entry["options"] | {"root": Path(entry["options"]["root"])}
            container = self._make(
                entry["id"],
                Bundle(Path(entry["bundle"])),
                RuntimeOptions(**options),
                stdio=Stdio(),
                rootfs=[
                    Mount(**mount | {"options": tuple(mount["options"])})
                    for mount in entry["rootfs"]
                ],
            )
            container.unpack(entry)
            self._containers[container.id] = container
        if saved["shutdown"]:
            self.shutdown.set()
        if saved["emptied"]:
            self._note_emptied()

    async def quiet(self) -> None:
        """Wait until nothing is under way and what was read has reached its place.

        Between the return and the next await nothing is read, spawned or reaped.

        Raises:
            TimeoutError: a disk is too slow.
        """
        while True:
            await self.finish()
            for container in self.all():
                await container.pause_io()
            if not self._under_way():
                return

    def go_on(self) -> None:
        """Go on with the output, after ``quiet`` or ``unpack``."""
        for container in self._containers.values():
            container.resume_io()

    async def finish(self) -> None:
        """Wait for the calls that are under way, and for what exits have set off."""
        while tasks := self._under_way():
            await asyncio.wait(tasks)

    def _under_way(self) -> set[asyncio.Task[Any]]:
        work = [container.work for container in self.all()]
        return self._running.union(self._around.reaper.under_way(), *work)

    async def _create(self, request: CreateRequest) -> Container:
        options = self.complete(request.options)
        container = self._make(
            request.id,
            Bundle(request.bundle),
            options,
            stdio=request.stdio,
            rootfs=request.rootfs,
        )
        self._creating.add(request.id)
        try:
            options.root.mkdir(parents=True, exist_ok=True, mode=0o711)
            await container.create()
            self._containers[request.id] = container
        finally:
            self._creating.discard(request.id)
        self.save()
        return container

    def _make(
        self,
        container_id: str,
        bundle: Bundle,
        options: RuntimeOptions,
        *,
        stdio: Stdio,
        rootfs: Sequence[Mount],
    ) -> Container:
        return Container(
            container_id,
            bundle=bundle,
            runtime=make_runtime(
                container_id,
                options,
                log_file=bundle.runtime_log,
                reaper=self._around.reaper,
                timeout_s=self._runtime_timeout_s,
            ),
            options=options,
            stdio=stdio,
            rootfs=rootfs,
            surroundings=self._around,
            changed=self.save,
        )

    async def _delete(self, container: Container, process: Process) -> None:
        await container.delete(process)
        if process is container.init:
            self._containers.pop(container.id, None)
            self.save()
            if not len(self):
                self._note_emptied()

    def _note_emptied(self) -> None:
        self._was_emptied = True
        self.emptied.set()

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        # A caller that gave up does not fetch the failure.
        if not task.cancelled():
            task.exception()
