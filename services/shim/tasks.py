"""The containers of one shim, by id: how they come, where they are found, when the shim may end.

Calls that change something run to their end even when their caller gives up: a half-created
container would be nobody's. The caller, or its successor, asks for the state.

A container that is deleted may still be known to the runtime for a moment. Until it is not it
stays in the state file, as deleted: whoever finds it there, should this process die, has only the
runtime to tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from services.common.errors import AlreadyExists, InvalidArgument, NotFound, TheseusError
from services.common.frozen import frozen
from services.common.mounts import Mount
from services.shim.bundle import Bundle
from services.shim.container import Container
from services.shim.process import Status
from services.shim.runtimes.catalogue import make_runtime
from services.shim.runtimes.runtime import RuntimeOptions
from services.shim.stdio.uris import Stdio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from services.shim.checkpoint import CheckpointImage
    from services.shim.handover import Outgoing
    from services.shim.home import Home
    from services.shim.process import Process
    from services.shim.reaper import Reaper
    from services.shim.runtimes.runtime import CheckpointRequest

log = structlog.get_logger(__name__)

_DEATH_LIMIT_S = 10.0

T = TypeVar("T")


@frozen
class CreateRequest:
    """What Create asks for.

    Attributes:
        id: of the container.
        bundle: its directory.
        rootfs: mounts of its root file system; empty: it is in the bundle already.
        stdio: streams of init.
        options: runtime options; empty fields mean the shim's defaults.
        image: what it is restored from at its start; None: it begins anew.
    """

    id: str
    bundle: Path
    rootfs: tuple[Mount, ...]
    stdio: Stdio
    options: RuntimeOptions
    image: CheckpointImage | None = None


@frozen
class Defaults:
    """What holds for containers that ask for nothing else.

    Attributes:
        namespace: containerd's.
        runtime: for options that name none.
        runtime_state: directory below which runtimes keep their state, by binary and namespace.
        runtime_timeout_s: limit of one runtime call.
    """

    namespace: str
    runtime: str
    runtime_state: Path
    runtime_timeout_s: float


@frozen
class _Leaving:
    """A deleted container that the runtime still has to forget."""

    container: Container
    home: Home
    forgetting: asyncio.Task[None]


class Tasks:
    """All containers of a shim.

    Args:
        reaper: of this process.
        find_home: where a container of some id is, or would be, at home.
        defaults: what holds for them.

    Attributes:
        created: how many were.
    """

    def __init__(
        self,
        *,
        reaper: Reaper,
        find_home: Callable[[str], Home],
        defaults: Callable[[], Defaults],
    ) -> None:
        self._reaper = reaper
        self._find_home = find_home
        self._defaults = defaults
        self._containers: dict[str, Container] = {}
        self._homes: dict[str, Home] = {}
        self._creating: dict[str, asyncio.Event] = {}
        self._leaving: dict[str, _Leaving] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self.emptied = asyncio.Event()
        self._was_emptied = False
        self.created = 0
        self.shutdown = asyncio.Event()
        self.shutdown_now = asyncio.Event()

    def __len__(self) -> int:
        return len(self._containers) + len(self._creating)

    @property
    def unfinished(self) -> bool:
        """Whether there is a container, or one that the runtime has not forgotten."""
        return bool(self._containers or self._creating or self._leaving)

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

    def at(self, home: Home) -> list[Container]:
        """Every container that exists and has this home."""
        return [c for c in self._containers.values() if self._homes[c.id] is home]

    async def create(self, request: CreateRequest) -> Container:
        """Create a container.

        Raises:
            AlreadyExists: the id is taken.
            FailedPrecondition: see :meth:`Container.create`.
        """
        if not request.id or not request.bundle.is_absolute():
            raise InvalidArgument("a container needs an id and an absolute bundle directory")
        if request.id in self._containers or request.id in self._creating:
            raise AlreadyExists(
                f"container '{request.id}' is created already", resource=("task", request.id)
            )
        self._creating[request.id] = asyncio.Event()
        return await self.to_the_end(self._create(request))

    async def start(self, container: Container, process: Process) -> None:
        """See :meth:`Container.start`."""
        await self.to_the_end(container.start(process))

    async def run_exec(
        self, container: Container, exec_id: str, spec: Mapping[str, Any], stdio: Stdio
    ) -> Process:
        """See :meth:`Execs.run`."""
        return await self.to_the_end(container.execs.run(exec_id, spec, stdio))

    async def pause(self, container: Container) -> None:
        """See :meth:`Container.pause`."""
        await self.to_the_end(container.pause())

    async def checkpoint(
        self, container: Container, request: CheckpointRequest, work: Path | None
    ) -> None:
        """See :meth:`Container.checkpoint`."""
        await self.to_the_end(container.checkpoint(request, work))

    async def resume(self, container: Container) -> None:
        """See :meth:`Container.resume`."""
        await self.to_the_end(container.resume())

    async def delete(self, container: Container, process: Process) -> None:
        """Delete a process; with init goes the container."""
        await self.to_the_end(self._delete(container, process))

    def complete(self, options: RuntimeOptions) -> RuntimeOptions:
        """Options with the shim's defaults for what they leave open."""
        defaults = self._defaults()
        binary = options.binary or defaults.runtime
        root = options.root
        if root == Path():
            root = defaults.runtime_state / Path(binary).name
        return replace(options, binary=binary, root=root / defaults.namespace)

    def request_shutdown(self, *, now: bool) -> None:
        """End the shim once it is empty; does nothing while there are containers, as upstream."""
        if len(self):
            return
        self.shutdown.set()
        if now:
            self.shutdown_now.set()

    def save(self, home: Home) -> None:
        """Write a home's state file."""
        leaving = [left.container for left in self._leaving.values() if left.home is home]
        home.save([*self.at(home), *leaving])

    def pack(self, out: Outgoing) -> dict[str, Any]:
        """What the next image of the shim goes on with; while quiet and paused."""
        return {
            "containers": [container.pack(out) for container in self._containers.values()],
            "shutdown": self.shutdown.is_set(),
            "emptied": self._was_emptied,
        }

    def unpack(self, saved: Mapping[str, Any]) -> list[Container]:
        """Take over from an earlier image, or a shim that died; all output is paused.

        Returns:
            The containers that came; ``resume_io`` of each begins to copy output.
        """
        taken = []
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
            taken.append(container)
        if saved["shutdown"]:
            self.shutdown.set()
        if saved["emptied"]:
            self._note_emptied()
        return taken

    async def destroy(self, container_id: str) -> None:
        """Kill and delete a container that nobody wants any more, if there is one.

        Raises:
            TimeoutError: it does not die.
            TheseusError: the runtime does not delete it.
        """
        while (made := self._creating.get(container_id)) is not None:
            await made.wait()
        container = self._containers.get(container_id)
        if container is None:
            return
        if container.init.exit is None and container.init.status is not Status.CREATED:
            with contextlib.suppress(NotFound):  # it ends by itself
                await container.kill(container.init, signal.SIGKILL, all_processes=False)
            async with asyncio.timeout(_DEATH_LIMIT_S):
                await container.init.wait()
        await self.delete(container, container.init)

    async def forgotten(self, container_id: str) -> None:
        """Wait until the runtime has forgotten a deleted container, or refuses to."""
        if container_id in self._leaving:
            await asyncio.wait([self._leaving[container_id].forgetting])

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

    async def to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` to its end even if the caller gives up; it counts as under way."""
        return await asyncio.shield(self._run(work))

    def _run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self) -> None:
        """Wait for the calls that are under way, and for what exits have set off."""
        while tasks := self._under_way():
            await asyncio.wait(tasks)

    def _under_way(self) -> set[asyncio.Task[Any]]:
        work = [container.exits.work for container in self.all()]
        return self._running.union(self._reaper.under_way(), *work)

    async def _create(self, request: CreateRequest) -> Container:
        options = self.complete(request.options)
        made = self._creating[request.id]
        try:
            await self.forgotten(request.id)
            container = self._make(
                request.id,
                Bundle(request.bundle),
                options,
                stdio=request.stdio,
                rootfs=request.rootfs,
                image=request.image,
            )
            options.root.mkdir(parents=True, exist_ok=True, mode=0o711)
            await container.create(alone=len(self) == 1)
            self._containers[request.id] = container
            self.created += 1
        finally:
            del self._creating[request.id]
            made.set()
            if request.id not in self._containers:
                self._homes.pop(request.id, None)
        self.save(self._homes[request.id])
        return container

    def _make(
        self,
        container_id: str,
        bundle: Bundle,
        options: RuntimeOptions,
        *,
        stdio: Stdio,
        rootfs: Sequence[Mount],
        image: CheckpointImage | None = None,
    ) -> Container:
        home = self._homes[container_id] = self._find_home(container_id)
        return Container(
            container_id,
            bundle=bundle,
            runtime=make_runtime(
                container_id,
                options,
                log_file=bundle.runtime_log,
                reaper=self._reaper,
                timeout_s=self._defaults().runtime_timeout_s,
            ),
            options=options,
            stdio=stdio,
            rootfs=rootfs,
            surroundings=home.around,
            changed=partial(self.save, home),
            image=image,
        )

    async def _delete(self, container: Container, process: Process) -> None:
        await container.delete(process)
        if process is not container.init:
            return
        del self._containers[container.id]
        home = self._homes.pop(container.id)
        if not container.exits.is_forgotten:
            forgetting = self._run(self._see_forgotten(container, home))
            self._leaving[container.id] = _Leaving(container, home, forgetting)
        self.save(home)
        await container.rootfs.ended()  # beside the way of the event to the journal
        if not len(self):
            self._note_emptied()

    async def _see_forgotten(self, container: Container, home: Home) -> None:
        try:
            await container.exits.forgotten()
        except TheseusError as error:  # it stays on record, and containerd tries once more
            log.error("runtime does not delete", container_id=container.id, reason=error.message)
            return
        del self._leaving[container.id]
        self.save(home)

    def _note_emptied(self) -> None:
        self._was_emptied = True
        self.emptied.set()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        # A caller that gave up does not fetch the failure.
        if not task.cancelled():
            task.exception()
