"""containerd's task API in its messages, whatever they travel by: gRPC or ttrpc.

Only conversion: the rules are those of ``container.py`` and ``tasks.py``. Nothing here imports
gRPC, so that a shim which speaks ttrpc does without it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import any_pb2, empty_pb2, timestamp_pb2
from google.protobuf.message import DecodeError

from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.runc.options import oci_pb2
from protos.containerd.types.task import task_pb2
from services.common import VERSION
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.common.mounts import Mount
from services.shim.checkpoint import CheckpointImage
from services.shim.process import Action, ExitRecord, Process, Status
from services.shim.rpc.stats import cgroup_metrics
from services.shim.runtimes.runtime import CheckpointRequest, RuntimeOptions
from services.shim.stdio.uris import Stdio
from services.shim.tasks import CreateRequest

if TYPE_CHECKING:
    from services.shim.container import Container
    from services.shim.tasks import Tasks

_OPTIONS_TYPE = "containerd.runc.v1.Options"
_CHECKPOINT_OPTIONS_TYPE = "containerd.runc.v1.CheckpointOptions"
_DETAILS_TYPE = "containerd.runc.v1.ProcessDetails"
_STATUSES = {
    Status.CREATED: task_pb2.CREATED,
    Status.RUNNING: task_pb2.RUNNING,
    Status.PAUSED: task_pb2.PAUSED,
    Status.STOPPED: task_pb2.STOPPED,
    Status.DELETED: task_pb2.STOPPED,
}


class TaskApi:
    """The task API of one shim: a method per call, named as there.

    ``context`` is what gRPC hands to a servicer; no method looks at it.
    """

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    async def State(
        self, request: shim_pb2.StateRequest, context: object = None
    ) -> shim_pb2.StateResponse:
        """State of a process; an exited one answers until it is deleted."""
        container, process = self._find(request.id, request.exec_id)
        record = process.exit
        return shim_pb2.StateResponse(
            id=process.id,
            bundle=str(container.bundle.path),
            pid=process.pid,
            status=task_pb2.UNKNOWN
            if record and record.lost
            else _STATUSES[container.status(process)],
            stdin=process.stdio.stdin,
            stdout=process.stdio.stdout,
            stderr=process.stdio.stderr,
            terminal=process.stdio.terminal,
            exit_status=record.status if record else 0,
            exited_at=exit_time(record),
            exec_id=process.exec_id,
        )

    async def Create(
        self, request: shim_pb2.CreateTaskRequest, context: object = None
    ) -> shim_pb2.CreateTaskResponse:
        """Create a container; its init waits for Start."""
        container = await self._tasks.create(create_request(request))
        return shim_pb2.CreateTaskResponse(pid=container.init.pid)

    async def Start(
        self, request: shim_pb2.StartRequest, context: object = None
    ) -> shim_pb2.StartResponse:
        """Start init or an exec process."""
        container, process = self._find(request.id, request.exec_id)
        await self._tasks.start(container, process)
        return shim_pb2.StartResponse(pid=process.pid)

    async def Delete(
        self, request: shim_pb2.DeleteRequest, context: object = None
    ) -> shim_pb2.DeleteResponse:
        """Delete a process that has ended; with init goes the container."""
        container, process = self._find(request.id, request.exec_id)
        await self._tasks.delete(container, process)
        process.check_known()
        record = process.exit
        return shim_pb2.DeleteResponse(
            pid=process.pid,
            exit_status=record.status if record else 0,
            exited_at=exit_time(record),
        )

    async def Pids(
        self, request: shim_pb2.PidsRequest, context: object = None
    ) -> shim_pb2.PidsResponse:
        """Everything that runs in the container."""
        container = self._tasks.container(request.id)
        exec_ids = {p.pid: p.exec_id for p in container.execs if p.pid}
        return shim_pb2.PidsResponse(
            processes=[_process_info(pid, exec_ids.get(pid)) for pid in container.pids()]
        )

    async def Pause(
        self, request: shim_pb2.PauseRequest, context: object = None
    ) -> empty_pb2.Empty:
        """Freeze the container."""
        await self._tasks.pause(self._tasks.container(request.id))
        return empty_pb2.Empty()

    async def Resume(
        self, request: shim_pb2.ResumeRequest, context: object = None
    ) -> empty_pb2.Empty:
        """Let a frozen container go on."""
        await self._tasks.resume(self._tasks.container(request.id))
        return empty_pb2.Empty()

    async def Kill(self, request: shim_pb2.KillRequest, context: object = None) -> empty_pb2.Empty:
        """Signal a process, or all."""
        container, process = self._find(request.id, request.exec_id)
        await container.kill(process, request.signal, all_processes=request.all)
        return empty_pb2.Empty()

    async def Exec(
        self, request: shim_pb2.ExecProcessRequest, context: object = None
    ) -> empty_pb2.Empty:
        """Add a process, which Start runs."""
        container = self._tasks.container(request.id)
        spec = json_object(request.spec.value, field="spec")
        container.execs.add(request.exec_id, spec, _stdio(request))
        return empty_pb2.Empty()

    async def ResizePty(
        self, request: shim_pb2.ResizePtyRequest, context: object = None
    ) -> empty_pb2.Empty:
        """Set the size of a process' terminal."""
        _, process = self._find(request.id, request.exec_id)
        process.check(Action.RESIZE)
        if not process.stdio.terminal:
            raise FailedPrecondition(f"process '{process.id}' has no terminal to resize")
        if process.io is not None:
            process.io.resize(width=request.width, height=request.height)
        return empty_pb2.Empty()

    async def CloseIO(
        self, request: shim_pb2.CloseIORequest, context: object = None
    ) -> empty_pb2.Empty:
        """Hold standard input open no longer."""
        _, process = self._find(request.id, request.exec_id)
        if process.io is not None:
            process.io.end_input()
        return empty_pb2.Empty()

    async def Checkpoint(
        self, request: shim_pb2.CheckpointTaskRequest, context: object = None
    ) -> empty_pb2.Empty:
        """Save the state of a container; where runtime, criu or kernel cannot, it says why."""
        container = self._tasks.container(request.id)
        options = _checkpoint_options(request.options)
        work = _absolute(options.work_path, "work_path")
        image = _absolute(request.path or options.image_path, "path")
        if image is None:
            raise InvalidArgument("a checkpoint needs a directory", field="path")
        await self._tasks.checkpoint(
            container,
            CheckpointRequest(
                image=image,
                work=work or image,
                leave_running=not options.exit,
                open_tcp=options.open_tcp,
                external_unix_sockets=options.external_unix_sockets,
                terminal=options.terminal,
                file_locks=options.file_locks,
                empty_namespaces=tuple(options.empty_namespaces),
                cgroups_mode=options.cgroups_mode,
                parent=_absolute(options.parent_path, "parent_path"),
            ),
            work,
        )
        return empty_pb2.Empty()

    async def Update(
        self, request: shim_pb2.UpdateTaskRequest, context: object = None
    ) -> empty_pb2.Empty:
        """Change the limits of a container."""
        container = self._tasks.container(request.id)
        await container.update(json_object(request.resources.value, field="resources"))
        return empty_pb2.Empty()

    async def Wait(
        self, request: shim_pb2.WaitRequest, context: object = None
    ) -> shim_pb2.WaitResponse:
        """Wait for the end of a process."""
        _, process = self._find(request.id, request.exec_id)
        record = await process.wait()
        return shim_pb2.WaitResponse(exit_status=record.status, exited_at=exit_time(record))

    async def Stats(
        self, request: shim_pb2.StatsRequest, context: object = None
    ) -> shim_pb2.StatsResponse:
        """Figures of the container's cgroup."""
        container = self._tasks.container(request.id)
        if container.cgroup is None or container.init.exit is not None:
            raise NotFound(f"container '{container.id}' has no cgroup (any more)")
        return shim_pb2.StatsResponse(stats=cgroup_metrics(container.cgroup))

    async def Connect(
        self, request: shim_pb2.ConnectRequest, context: object = None
    ) -> shim_pb2.ConnectResponse:
        """Who the shim is; answers for a container that does not exist, too, as upstream."""
        found = [c.init.pid for c in self._tasks.all() if c.id == request.id]
        return shim_pb2.ConnectResponse(
            shim_pid=os.getpid(), task_pid=found[0] if found else 0, version=VERSION
        )

    async def Shutdown(
        self, request: shim_pb2.ShutdownRequest, context: object = None
    ) -> empty_pb2.Empty:
        """End the shim once it has no containers."""
        self._tasks.request_shutdown(now=request.now)
        return empty_pb2.Empty()

    def _find(self, container_id: str, exec_id: str) -> tuple[Container, Process]:
        container = self._tasks.container(container_id)
        return container, container.process(exec_id)


def create_request(request: shim_pb2.CreateTaskRequest) -> CreateRequest:
    """What Create asks for, in our words.

    Raises:
        InvalidArgument: the runtime options are of an unknown type, or garbage.
    """
    options = _options(request.options)
    return CreateRequest(
        id=request.id,
        bundle=Path(request.bundle),
        rootfs=tuple(
            Mount(mount.type, mount.source, mount.target, tuple(mount.options))
            for mount in request.rootfs
        ),
        stdio=_stdio(request),
        options=_runtime_options(options),
        image=_image(request.checkpoint, options),
    )


def _stdio(request: shim_pb2.CreateTaskRequest | shim_pb2.ExecProcessRequest) -> Stdio:
    return Stdio(request.stdin, request.stdout, request.stderr, request.terminal)


def _image(path: str, options: oci_pb2.Options) -> CheckpointImage | None:
    path = path or options.criu_image_path
    if not path:
        return None
    return CheckpointImage(Path(path), _absolute(options.criu_work_path, "criu_work_path"))


def _absolute(path: str, field: str) -> Path | None:
    if not path:
        return None
    if not path.startswith("/"):
        raise InvalidArgument(f"{field} '{path}' is not an absolute path", field=field)
    return Path(path)


def _checkpoint_options(packed: any_pb2.Any) -> oci_pb2.CheckpointOptions:
    options = oci_pb2.CheckpointOptions()
    name = packed.type_url.rpartition("/")[2]
    if name not in ("", _CHECKPOINT_OPTIONS_TYPE):
        raise InvalidArgument(
            f"options of a checkpoint are a {name}, not a {_CHECKPOINT_OPTIONS_TYPE}",
            field="options",
        )
    try:
        options.ParseFromString(packed.value)
    except DecodeError as error:
        raise InvalidArgument("options of a checkpoint cannot be decoded", field="options") from (
            error
        )
    return options


def _options(packed: any_pb2.Any) -> oci_pb2.Options:
    options = oci_pb2.Options()
    # containerd's type URLs have no prefix; a client may send one all the same.
    name = packed.type_url.rpartition("/")[2]
    if name not in ("", _OPTIONS_TYPE):
        raise InvalidArgument(
            f"runtime options are a {name}, not a {_OPTIONS_TYPE}", field="options"
        )
    try:
        options.ParseFromString(packed.value)
    except DecodeError as error:
        raise InvalidArgument("runtime options cannot be decoded", field="options") from error
    return options


def _runtime_options(options: oci_pb2.Options) -> RuntimeOptions:
    return RuntimeOptions(
        binary=options.binary_name,
        root=Path(options.root),
        systemd_cgroup=options.systemd_cgroup,
        no_pivot_root=options.no_pivot_root,
        no_new_keyring=options.no_new_keyring,
        io_uid=options.io_uid,
        io_gid=options.io_gid,
    )


def _process_info(pid: int, exec_id: str | None) -> task_pb2.ProcessInfo:
    if not exec_id:
        return task_pb2.ProcessInfo(pid=pid)
    details = oci_pb2.ProcessDetails(exec_id=exec_id)
    return task_pb2.ProcessInfo(
        pid=pid, info=any_pb2.Any(type_url=_DETAILS_TYPE, value=details.SerializeToString())
    )


def exit_time(record: ExitRecord | None) -> timestamp_pb2.Timestamp | None:
    """When a process ended, on the wire."""
    if record is None:
        return None
    seconds, nanos = divmod(record.exited_at_ns, 1_000_000_000)
    return timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)


def json_object(data: bytes, *, field: str) -> dict[str, Any]:
    """A JSON object out of a request's Any.

    Raises:
        InvalidArgument: it is not one.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InvalidArgument(f"{field} is not valid JSON: {error}", field=field) from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"{field} is not a JSON object", field=field)
    return value
