"""One container: its init process, and what is done to the whole of it.

Every change goes the same way: ask the table, run the runtime, move on, write the state, emit the
event. Exec processes are the business of ``execs.py``, how processes end that of ``exits.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from services.common.errors import FailedPrecondition, NotFound, TheseusError, Unimplemented
from services.common.frozen import plain
from services.shim import bundle as bundles
from services.shim import cgroups, checkpoint, events, launch
from services.shim.events import Event
from services.shim.execs import Execs
from services.shim.exits import Exits
from services.shim.process import Action, Process, Status
from services.shim.rootfs import RootFs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from services.common.mounts import Mount
    from services.shim.bundle import Bundle
    from services.shim.checkpoint import CheckpointImage
    from services.shim.handover import Outgoing
    from services.shim.runtimes.runtime import CheckpointRequest, Runtime, RuntimeOptions
    from services.shim.stdio.uris import Stdio
    from services.shim.surroundings import Surroundings

log = structlog.get_logger(__name__)

_EXIT_LIMIT_S = 30.0


class Container:
    """A container that was created and not yet deleted. Made by :func:`create_container`."""

    def __init__(
        self,
        container_id: str,
        *,
        bundle: Bundle,
        runtime: Runtime,
        options: RuntimeOptions,
        stdio: Stdio,
        rootfs: Sequence[Mount],
        surroundings: Surroundings,
        changed: Callable[[], None],
        image: CheckpointImage | None = None,
    ) -> None:
        self.id = container_id
        self.bundle = bundle
        self.runtime = runtime
        self.options = options
        self.init = Process(container_id, "", stdio, release=surroundings.keeping.release)
        self.execs = Execs(self, surroundings, changed)
        self.rootfs = RootFs(bundle.rootfs, rootfs)
        self.cgroup: cgroups.Cgroup | None = None
        self._around = surroundings
        self._changed = changed
        self._image = image  # what start restores it from, until then
        self.exits = Exits(self, surroundings, changed)

    def process(self, exec_id: str) -> Process:
        """Init (empty ``exec_id``) or an exec process.

        Raises:
            NotFound: there is no such process.
        """
        return self.execs.find(exec_id) if exec_id else self.init

    @property
    def processes(self) -> list[Process]:
        """Init, and the exec processes that were not deleted."""
        return [self.init, *self.execs]

    def status(self, process: Process) -> Status:
        """State of a process: one that runs in a frozen container is frozen."""
        if self.init.status is Status.PAUSED and process.status is Status.RUNNING:
            return Status.PAUSED
        return Status.STOPPED if process.status is Status.DELETED else process.status

    async def create(self, *, alone: bool) -> None:
        """Mount, open the streams, run ``create``; on a failure all is undone.

        Of a container that is restored there is no process before ``start``.

        Args:
            alone: its shim has no other container.

        Raises:
            FailedPrecondition: bundle, mounts, streams or runtime are not as they should be.
            InvalidArgument: a stream's URI, or the command (see the runtime).
        """
        around = self._around
        began = time.monotonic()
        if self._image is not None:
            self._need_checkpoints()
        async with AsyncExitStack() as undo:
            # In a shim with others, what needs no root file system is done beside the mount.
            mounted = self.rootfs.mount(alone=alone)
            undo.push_async_callback(self.rootfs.take_down, mounted)
            spec = self.bundle.read_spec()
            self.exits.own_pid_namespace = bundles.has_own_pid_namespace(spec)
            self.exits.has_hooks = bundles.has_hooks(spec)
            self.init.io = await around.open_io(self.id, self.init.stdio)
            undo.push_async_callback(self.init.io.close, drain=False)
            self.init.io.change_owner(self.options.io_uid, self.options.io_gid)
            if self._image is None and hasattr(self.runtime, "prepare"):
                self.runtime.prepare(self.bundle.path, spec)
            await mounted
            if self._image is not None:
                self._image = await asyncio.to_thread(checkpoint.keep, self._image, self.bundle)
                self._emit(events.TASK_CREATE, self._create_fields(0))
            else:
                with around.reaper.window() as window:
                    undo.push_async_callback(self._undo_create)
                    pid, master = await launch.create_init(self.runtime, self.bundle, self.init.io)
                    self._take_init(pid, master)
                    self._emit(events.TASK_CREATE, self._create_fields(pid))
                    around.reaper.watch(pid, self.exits.watcher(self.init), window)
            undo.pop_all()
        around.metrics.create_seconds.observe(time.monotonic() - began)

    async def start(self, process: Process) -> None:
        """Start init, or run an exec process.

        Raises:
            FailedPrecondition: it was started, or init has ended.
        """
        async with process.lock:
            process.check(Action.START)
            if process is self.init:
                await self._start_init()
            else:
                await self.execs.start(process)

    async def kill(self, process: Process, signum: int, *, all_processes: bool) -> None:
        """Signal a process, or everything in the container.

        Raises:
            NotFound: it has ended.
        """
        process.check(Action.KILL)
        if process is self.init and all_processes:
            await self.runtime.kill(signum, all_processes=True)
            return
        process.send_signal(signum)
        if process is not self.init:
            return
        if signum == signal.SIGKILL and self.init.status is Status.PAUSED:
            # A frozen v1 cgroup keeps even this signal waiting; what is killed need not be frozen.
            with contextlib.suppress(TheseusError):
                await self.runtime.resume()

    async def pause(self) -> None:
        """Freeze the container."""
        async with self.init.lock:
            self.init.check(Action.PAUSE)
            await self.runtime.pause()
            self.init.apply(Action.PAUSE)
            self._changed()
            self._emit(events.TASK_PAUSED, {"container_id": self.id})

    async def resume(self) -> None:
        """Let a frozen container go on."""
        async with self.init.lock:
            self.init.check(Action.RESUME)
            await self.runtime.resume()
            self.init.apply(Action.RESUME)
            self._changed()
            self._emit(events.TASK_RESUMED, {"container_id": self.id})

    async def checkpoint(self, request: CheckpointRequest, work: Path | None) -> None:
        """Save the container's state; criu works in ``work``, or inside the bundle.

        Raises:
            FailedPrecondition: it does not run, or runtime, criu or kernel cannot; it goes on.
            Unimplemented: the runtime has no checkpoints.
        """
        async with self.init.lock:
            self.init.check(Action.CHECKPOINT)
            self._need_checkpoints()
            with checkpoint.work_directory(self.bundle, work) as directory:
                await self.runtime.checkpoint(replace(request, work=directory))
            self._emit(
                events.TASK_CHECKPOINTED,
                {"container_id": self.id, "checkpoint": str(request.image)},
            )

    async def update(self, resources: Mapping[str, Any]) -> None:
        """Change the limits to ``resources``, the OCI spec's object."""
        async with self.init.lock:
            self.init.check(Action.UPDATE)
            name = "resources.json"
            self.bundle.write(name, resources)
            try:
                await self.runtime.update(self.bundle.path / name)
            finally:
                (self.bundle.path / name).unlink(missing_ok=True)

    def pids(self) -> list[int]:
        """Everything that runs in the container; init's pid until it is deleted."""
        if self.init.status is Status.STOPPED:
            return [self.init.pid]
        if self.cgroup is not None and self.cgroup.own:
            found = self.cgroup.processes()
            if found:
                return found
        return [p.pid for p in self.processes if p.pid and p.exit is None]

    async def delete(self, process: Process) -> None:
        """Delete a process that has ended, or that was never started.

        Raises:
            FailedPrecondition: it runs.
        """
        async with process.lock:
            process.check(Action.DELETE)
            waits = process is self.init and process.status is Status.CREATED and process.pid
            if waits:
                with contextlib.suppress(NotFound):
                    process.send_signal(signal.SIGKILL)
        if waits:
            async with asyncio.timeout(_EXIT_LIMIT_S):
                await process.wait()
        async with process.lock:
            process.check(Action.DELETE)
            if process is self.init:
                await self.exits.finish_cleanup()
            await process.close_io(drain=process.exit is not None)
            process.deleted()
        if process is not self.init:
            self.execs.drop(process)
            return
        for other in self.execs:
            await other.close_io(drain=False)
        record = process.exit
        if record is not None and record.lost:
            return  # the event has no way to say so
        self._emit(
            events.TASK_DELETE,
            {
                "container_id": self.id,
                "pid": process.pid,
                "exit_status": record.status if record else 0,
                "exited_at_ns": record.exited_at_ns if record else 0,
            },
        )

    async def clean_up(self, *, force: bool) -> None:
        """Have the runtime forget the container, and unmount its root file system."""
        await self.runtime.delete(force=force)
        await self.rootfs.unmount()

    def state(self) -> dict[str, object]:
        """What a successor of this process has to know; goes into ``state.json``."""
        return {
            "id": self.id,
            "bundle": str(self.bundle.path),
            "runtime": self.options.binary,
            "runtime_root": str(self.options.root),
            "options": plain(self.options) | {"root": str(self.options.root)},
            "rootfs": self.rootfs.state(),
            "own_pid_namespace": self.exits.own_pid_namespace,
            "has_hooks": self.exits.has_hooks,
            "cgroup": self.cgroup.pack() if self.cgroup is not None else None,
            "oom_kills": self.exits.oom_kills,
            "image": self._image.state() if self._image is not None else None,
            "processes": [process.state() for process in self.processes],
            "specs": self.execs.specs(),
        }

    async def pause_io(self) -> None:
        """Take no output any more, and let what was taken get to its place."""
        for process in self.processes:
            if process.io is not None:
                await process.io.pause()

    def resume_io(self) -> None:
        """Go on with the output."""
        for process in self.processes:
            if process.io is not None:
                process.io.resume()

    def pack(self, out: Outgoing) -> dict[str, Any]:
        """What the next image of the shim goes on with; while its output is paused."""
        streams = {
            process.exec_id: process.io.pack(out)
            for process in self.processes
            if process.io is not None
        }
        pidfds = {process.exec_id: out.fd(process.pidfd) for process in self.processes}
        return {**self.state(), "io": streams, "pidfds": pidfds}

    def unpack(self, saved: Mapping[str, Any]) -> None:
        """Become what ``saved`` describes, its output paused; ``pack`` or ``state`` made it."""
        self.exits.own_pid_namespace = saved["own_pid_namespace"]
        self.exits.has_hooks = saved.get("has_hooks", True)  # an earlier version does not say
        self.exits.oom_kills = saved["oom_kills"]
        if saved.get("image") is not None:  # an earlier version has none
            self._image = checkpoint.CheckpointImage.unpack(saved["image"])
        if saved["cgroup"] is not None:
            self.cgroup = cgroups.Cgroup.unpack(saved["cgroup"])
        for entry in saved["processes"]:
            process = Process.unpack(
                self.id,
                entry,
                pidfd=saved["pidfds"].get(entry["exec_id"], -1),
                release=self._around.keeping.release,
            )
            if process.exec_id:
                self.execs.take(process, saved["specs"].get(process.exec_id))
            else:
                self.init = process
                self.exits.init_is_gone = process.exit is not None
            if (streams := saved["io"].get(process.exec_id)) is not None:
                process.io = self._around.new_io(process.stdio)
                process.io.unpack(streams, self._around.reaper)
            if process.pid and process.exit is None:
                self._around.watch_again(process, self.exits.watcher(process))

    def _need_checkpoints(self) -> None:
        """Raise if the runtime is a plug-in that knows nothing of them."""
        if not hasattr(self.runtime, "checkpoint") or not hasattr(self.runtime, "restore"):
            raise Unimplemented(f"runtime '{self.runtime.name}' has no checkpoints")

    async def _restore(self, image: CheckpointImage) -> None:
        if self.init.io is None:
            raise FailedPrecondition(
                f"container '{self.id}' lost its streams with its shim before it was restored: "
                "delete it, and create it again"
            )
        with self._around.reaper.window() as window:
            try:
                pid, master = await launch.restore_init(
                    self.runtime, self.bundle, self.init.io, image
                )
            except BaseException:
                await self._undo_create()
                raise
            self._image = None
            self._take_init(pid, master)
            self._started()
            self._around.reaper.watch(pid, self.exits.watcher(self.init), window)

    def _take_init(self, pid: int, master: int) -> None:
        assert self.init.io is not None
        self.init.created(pid)
        with contextlib.suppress(OSError):
            self.cgroup = cgroups.of_process(pid)
        self.exits.oom_kills = self.cgroup.oom_kills() if self.cgroup else 0
        self.init.io.start(master)
        self._around.hold(self.init)

    def _create_fields(self, pid: int) -> dict[str, object]:
        return {
            "container_id": self.id,
            "bundle": str(self.bundle.path),
            "rootfs": self.rootfs.state(),
            **plain(self.init.stdio),
            "pid": pid,
        }

    async def _start_init(self) -> None:
        began = time.monotonic()
        if self._image is not None:
            await self._restore(self._image)
        else:
            await launch.start_init(self.runtime, has_hooks=self.exits.has_hooks)
            self._started()
        self._around.metrics.start_seconds.observe(time.monotonic() - began)

    def _started(self) -> None:
        self.init.apply(Action.START)
        self._changed()
        self._emit(events.TASK_START, {"container_id": self.id, "pid": self.init.pid})

    async def _undo_create(self) -> None:
        """Have the runtime forget what it made; a failure must not hide the one that it follows."""
        try:
            await self.runtime.delete(force=True)
        except (TheseusError, OSError) as error:
            log.error("undoing a create failed", container_id=self.id, error=str(error))

    def _emit(self, topic: str, fields: Mapping[str, object]) -> None:
        self._around.events.emit(Event(topic, fields))
