"""What clients ask of tasks: the methods behind ``containerd.services.tasks.v1.Tasks``.

A task is a container's processes; its shim holds the truth about them, and is asked every time.
Creation is undone as a whole when a step fails or the caller goes away; deletion, once the shim has
deleted the container, is finished whatever happens to the caller or to containerd.

A call that finds the shim away waits for it within the caller's deadline. ``wait`` is asked again
by itself for as long as it takes, over restarts of the shim.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import field
from typing import TYPE_CHECKING, TypeVar

import structlog

from services.common import linux
from services.common.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    TheseusError,
    Unavailable,
)
from services.common.frozen import frozen
from services.containerd.identifiers import checked_identifier
from services.containerd.tasks.journal import TOPIC_DELETE
from services.containerd.tasks.known import Standing
from services.containerd.tasks.remains import recorded_state
from services.containerd.tasks.shim import (
    CreateTask,
    ProcessExit,
    ProcessState,
    Stdio,
    TaskNotFound,
    TaskStatus,
)
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from services.common.message_stream import MessageStream
    from services.common.mounts import Mount
    from services.containerd.containers.store import Container, ContainerStore
    from services.containerd.tasks.factory import ShimLauncher
    from services.containerd.tasks.foreign import ForeignRuntimes
    from services.containerd.tasks.journal import TaskJournal
    from services.containerd.tasks.known import KnownShim
    from services.containerd.tasks.metrics import TaskMetrics
    from services.containerd.tasks.shim import ProcessInfo, Shim
    from services.containerd.tasks.shims import ShimManager
    from services.containerd.typed import TypedValue

log = structlog.get_logger(__name__)

T = TypeVar("T")

_ASKED_AT_ONCE = 64
_STATE_S = 2.0  # as upstream's io.containerd.timeout.task.state
_ASK_AGAIN_S = 15.0
_WAIT_AGAIN_S = 0.05
_WAIT_AGAIN_MAX_S = 1.0


@frozen
class TaskRequest:
    """What a client gives for a new task. ``runtime`` overrides the container's, if not empty."""

    rootfs: tuple[Mount, ...] = ()
    stdio: Stdio = field(default_factory=Stdio)
    checkpoint: str = ""
    options: TypedValue | None = None
    runtime: str = ""


class TaskManager:
    """Tasks of all namespaces.

    Args:
        containers: the records that tasks are made of.
        shims: the register.
        launchers: who starts our shims, by runtime name.
        foreign: finds and starts shims that others wrote.
        journal: for what is said in a dead shim's name.
        metrics: counts.
        moving: called when a runtime is about to make a process.
    """

    def __init__(
        self,
        *,
        containers: ContainerStore,
        shims: ShimManager,
        launchers: Mapping[str, ShimLauncher],
        journal: TaskJournal,
        metrics: TaskMetrics,
        foreign: ForeignRuntimes,
        moving: Callable[[], None] = lambda: None,
    ) -> None:
        self._containers = containers
        self._shims = shims
        self._launchers = launchers
        self._foreign = foreign
        self._journal = journal
        self._metrics = metrics
        self._moving = moving

    async def create(self, namespace: str, container_id: str, request: TaskRequest) -> int:
        """Make a container's task: bundle, shim, mounts, init; returns init's pid.

        Raises:
            NotFound: no such container, or nobody here knows its runtime.
            InvalidArgument: the runtime's name or the spec is of no use.
            AlreadyExists: it has a task.
        """
        self._moving()
        container = await self._containers.get(namespace, container_id)
        launcher, binary = self.launcher(request.runtime or container.runtime_name)
        if container.spec is None:
            raise InvalidArgument(f"container '{container_id}' has no spec", field="spec")
        async with AsyncExitStack() as undo:
            spec = container.spec.value
            known = await self._shims.begin(
                namespace, container_id, spec, binary, sandbox=container.sandbox
            )
            undo.push_async_callback(self._undo_create, known)
            new = _create_request(known, container, request)
            pid = await self._make(launcher, known, new)
            if binary:
                init = pid, linux.process_start_time(pid) or 0
                await uninterrupted(asyncio.to_thread(known.bundle.complete, init=init))
            undo.pop_all()
        self._shims.began(known)
        return pid

    async def delete(self, namespace: str, container_id: str) -> ProcessExit:
        """Delete a task that has stopped, or never started; returns how init ended.

        Its shim goes after that, by itself (see :meth:`ShimManager.dismiss`).

        Raises:
            NotFound: no such container, or it has no task.
            FailedPrecondition: it runs.
            DataLoss: it is deleted; nobody can know how init ended.
        """
        await self._containers.require(namespace, container_id)
        known = self._shims.get(namespace, container_id)
        if known.dismissed is not None:
            raise _no_task(known)
        if known.standing is Standing.REMOVING:  # by another call, or an earlier one that failed
            if await uninterrupted(self._shims.remove(known)) and "" in known.exits:
                return known.exits[""]
            raise _no_task(known)
        lost: DataLoss | None = None
        end: ProcessExit | None = None
        try:
            end = await self._delete_init(known)
        except DataLoss as error:
            lost = error
        if end is not None and known.standing is Standing.GONE:
            message = self._journal.codec.encode_delete(container_id, end)
            await self._journal.say_for(namespace, known.instance_id, [(TOPIC_DELETE, message)])
        note = {} if end is None else {"exit_status": end.exit_status}
        await uninterrupted(self._shims.dismiss(known, note, told=end is not None))
        if end is None:
            raise lost or _no_task(known)
        return end

    async def delete_process(self, namespace: str, container_id: str, exec_id: str) -> ProcessExit:
        """Delete an exec that has ended or never started; returns how it ended."""
        if not exec_id:
            raise InvalidArgument("exec id must not be empty", field="exec_id")
        return await self._ask(namespace, container_id, lambda shim: shim.delete(exec_id))

    async def start(self, namespace: str, container_id: str, exec_id: str = "") -> int:
        """Start a process; returns its pid."""
        if exec_id:
            self._moving()
        return await self._ask(namespace, container_id, lambda shim: shim.start(exec_id))

    async def get(self, namespace: str, container_id: str, exec_id: str = "") -> ProcessState:
        """State of a process."""
        return await self._ask(namespace, container_id, lambda shim: shim.state(exec_id))

    async def states(self, namespace: str) -> list[ProcessState]:
        """State of every task's init; UNKNOWN for one whose shim does not answer in time.

        For a shim that has not come back yet, after a start of containerd, its record answers.
        """
        shims = self._shims.all(namespace)
        away = [known for known in shims if known.standing is Standing.EXPECTED]
        recorded = await asyncio.to_thread(_recorded_states, away) if away else {}

        async def state_of(known: KnownShim) -> ProcessState | None:
            return recorded.get(known.id) or await self._state_of(known)

        states = await self._ask_all(shims, state_of)
        return [state for state in states if state is not None]

    async def kill(
        self, namespace: str, container_id: str, exec_id: str, signal: int, *, every: bool = False
    ) -> None:
        """Send a signal to a process, or to all of the container."""
        await self._ask(
            namespace, container_id, lambda shim: shim.kill(exec_id, signal, every=every)
        )

    async def exec(
        self, namespace: str, container_id: str, exec_id: str, stdio: Stdio, spec: TypedValue | None
    ) -> None:
        """Add a process."""
        checked_identifier(exec_id, what="exec id", field="exec_id")
        if spec is None:
            raise InvalidArgument(f"exec '{exec_id}' has no spec", field="spec")
        self._moving()
        await self._ask(namespace, container_id, lambda shim: shim.exec(exec_id, stdio, spec))

    async def resize(
        self, namespace: str, container_id: str, exec_id: str, width: int, height: int
    ) -> None:
        """Set the size of a terminal."""
        await self._ask(namespace, container_id, lambda shim: shim.resize(exec_id, width, height))

    async def close_io(
        self, namespace: str, container_id: str, exec_id: str, *, stdin: bool
    ) -> None:
        """Close a process' standard input, if ``stdin``."""
        if stdin:
            await self._ask(namespace, container_id, lambda shim: shim.close_io(exec_id))
        else:
            await self._ask(namespace, container_id, lambda shim: shim.state(exec_id))

    async def pause(self, namespace: str, container_id: str) -> None:
        """Freeze a container."""
        await self._ask(namespace, container_id, lambda shim: shim.pause())

    async def resume(self, namespace: str, container_id: str) -> None:
        """Let a frozen container go on."""
        await self._ask(namespace, container_id, lambda shim: shim.resume())

    async def pids(self, namespace: str, container_id: str) -> list[ProcessInfo]:
        """Every process of a container."""
        return await self._ask(namespace, container_id, lambda shim: shim.pids())

    async def checkpoint(
        self, namespace: str, container_id: str, path: str, options: TypedValue | None
    ) -> None:
        """Save a container's state below ``path``."""
        await self._ask(namespace, container_id, lambda shim: shim.checkpoint(path, options))

    async def update(
        self,
        namespace: str,
        container_id: str,
        resources: TypedValue | None,
        annotations: Mapping[str, str],
    ) -> None:
        """Change a container's resource limits."""
        await self._ask(namespace, container_id, lambda shim: shim.update(resources, annotations))

    async def metrics(
        self, namespace: str, wanted: Callable[[str], bool]
    ) -> list[tuple[str, int, TypedValue]]:
        """(id, time in ns, figures) of the tasks whose id is ``wanted`` and that have any."""
        shims = [known for known in self._shims.all(namespace) if wanted(known.id)]
        found = await self._ask_all(shims, self._stats_of)
        return [entry for entry in found if entry is not None]

    async def wait(self, namespace: str, container_id: str, exec_id: str = "") -> ProcessExit:
        """Return once a process has ended; outlives restarts of its shim.

        Raises:
            NotFound: there is no such task or exec.
            DataLoss: it has ended and nobody can know how.
        """
        await self._containers.require(namespace, container_id)
        known = self._shims.get(namespace, container_id)
        pause_s = _WAIT_AGAIN_S
        before = known.exits.get(exec_id)
        while True:
            try:
                ended = await (await known.ready()).wait(exec_id)
            except (Unavailable, DeadlineExceeded, Cancelled) as error:
                log.debug("wait is asked again", container=container_id, reason=error.message)
            except NotFound:
                # It may have ended and been deleted while the question was on its way again.
                end = known.exits.get(exec_id)
                if end is None or end is before:
                    raise
                return end
            else:
                if not exec_id:  # its event may be still on the way
                    known.forget_state()
                return ended
            await known.change(timeout_s=pause_s)
            pause_s = min(pause_s * 2, _WAIT_AGAIN_MAX_S)

    async def attach(self, namespace: str, container_id: str, first: bytes) -> MessageStream:
        """Begin a ``Streams.Attach`` of a task's shim with its first message, serialized."""
        return await _attached(await self._shims.get(namespace, container_id).ready(), first)

    async def run_exec(
        self, namespace: str, container_id: str, exec_id: str, first: bytes
    ) -> tuple[MessageStream, bytes | None]:
        """As :meth:`attach`, where ``first`` adds a process and starts it.

        Returns:
            The stream, and the shim's first message: the process runs.
        """
        checked_identifier(exec_id, what="exec id", field="exec_id")
        self._moving()

        async def run(shim: Shim) -> tuple[MessageStream, bytes | None]:
            stream = await _attached(shim, first)
            try:
                return stream, await stream.receive()
            except BaseException:
                stream.close()
                raise

        return await self._ask(namespace, container_id, run)

    async def _make(self, launcher: ShimLauncher, known: KnownShim, new: CreateTask) -> int:
        """Have a shim, and the container by it; it may be asked for both before it has answered."""
        while True:
            with self._metrics.start_seconds.time():
                await self._shims.start(launcher, known, new.options, ahead=True)
            assert known.shim is not None, "a shim that was met can be called"
            self._moving()
            try:
                return await known.shim.create(new)
            except Unavailable:
                if known.line is None or await known.line.serves():
                    raise
                log.info("waiting shim is gone", container=known.id)
                known.line = None

    async def _undo_create(self, known: KnownShim) -> None:
        await uninterrupted(self._remove_uncreated(known))

    async def _remove_uncreated(self, known: KnownShim) -> None:
        try:
            if known.shim is not None:
                # It may have come as far as a container, which nobody will ever ask for.
                async with asyncio.timeout(_STATE_S):
                    await known.shim.delete("")
        except (TheseusError, TimeoutError):
            log.debug("undone task had nothing to delete", container=known.id)
        try:
            await self._shims.remove(known)
        except Exception:
            # The first failure is the one to tell; the removal goes on with the next start.
            log.exception("creation of a task is not undone", container=known.id)

    async def _delete_init(self, known: KnownShim) -> ProcessExit | None:
        """Have the shim delete init; None where it has no container."""
        while True:
            shim = await known.ready()
            try:
                return await shim.delete("")
            except Unavailable as error:
                log.debug("delete is asked again", container=known.id, reason=error.message)
            except NotFound:  # it was deleted before, by a call that nobody heard the end of
                return known.exits.get("")
            await known.change(timeout_s=_WAIT_AGAIN_S)

    async def _ask(
        self, namespace: str, container_id: str, question: Callable[[Shim], Awaitable[T]]
    ) -> T:
        """Ask a task's shim, once it is there; again if it goes away over the question.

        Whatever comes of it, the state of init is looked at anew: the answer is here before the
        event.
        """
        await self._containers.require(namespace, container_id)
        known = self._shims.get(namespace, container_id)
        deadline = time.monotonic() + _ASK_AGAIN_S
        while True:
            shim = await known.ready()
            try:
                return await question(shim)
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise
                log.debug("question is asked again", container=known.id, reason=error.message)
            finally:
                known.forget_state()
            await known.change(timeout_s=_WAIT_AGAIN_S)

    async def _ask_all(
        self, shims: Sequence[KnownShim], question: Callable[[KnownShim], Awaitable[T]]
    ) -> list[T]:
        turns = asyncio.Semaphore(_ASKED_AT_ONCE)

        async def ask(known: KnownShim) -> T:
            async with turns:
                return await question(known)

        return list(await asyncio.gather(*(ask(known) for known in shims)))

    async def _state_of(self, known: KnownShim) -> ProcessState | None:
        try:
            async with asyncio.timeout(_STATE_S):
                return await known.state()
        except NotFound:
            return None
        except (TimeoutError, TheseusError):
            log.warning("state of a task is not known now", container=known.id)
            return ProcessState(known.id, 0, TaskStatus.UNKNOWN)

    async def _stats_of(self, known: KnownShim) -> tuple[str, int, TypedValue] | None:
        collected_at_ns = time.time_ns()
        try:
            async with asyncio.timeout(_STATE_S):
                return known.id, collected_at_ns, await (await known.ready()).stats()
        except NotFound:
            return None
        except (TimeoutError, TheseusError) as error:
            log.warning("figures of a task are not known now", container=known.id, error=str(error))
            return None

    def launcher(self, runtime: str) -> tuple[ShimLauncher, str]:
        """Who starts shims for a runtime, and the program of those that others wrote."""
        if not runtime:
            raise InvalidArgument("the container names no runtime", field="runtime")
        launcher = self._launchers.get(runtime)
        if launcher is not None:
            return launcher, ""
        foreign = self._foreign.launcher(runtime)
        return foreign, foreign.binary


def _create_request(known: KnownShim, container: Container, request: TaskRequest) -> CreateTask:
    options = request.options
    if options is None or not options.value:
        options = container.runtime_options
    return CreateTask(
        bundle=str(known.bundle.path),
        rootfs=request.rootfs,
        stdio=request.stdio,
        checkpoint=request.checkpoint,
        options=options,
    )


async def _attached(shim: Shim, first: bytes) -> MessageStream:
    stream = await shim.attach()
    try:
        await stream.send(first)
    except BaseException:
        stream.close()
        raise
    return stream


def _recorded_states(shims: Sequence[KnownShim]) -> dict[str, ProcessState]:
    found = {known.id: recorded_state(known.bundle, known.process) for known in shims}
    return {container_id: state for container_id, state in found.items() if state is not None}


def _no_task(known: KnownShim) -> TaskNotFound:
    return TaskNotFound(
        f"task '{known.id}' not found in namespace '{known.namespace}'", resource=("task", known.id)
    )
