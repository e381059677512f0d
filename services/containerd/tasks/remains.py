"""What a dead shim leaves in its bundle: events that it could not deliver, and its own notes.

``spool/<seq>`` holds one event each, state.json the containers that the shim had, with their
processes and the runtime. Both are read only once the shim's process is gone, so nobody else writes
there. A pid without a start time is believed where that process is in the container's cgroup.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from services.common import linux
from services.common.errors import NotFound
from services.common.frozen import frozen
from services.containerd.tasks.processes import ProcessId
from services.containerd.tasks.shim import ProcessExit, ProcessState, Stdio, TaskStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.containerd.tasks.bundle import Bundle
    from services.containerd.tasks.journal import ShimEvent

log = structlog.get_logger(__name__)

_RUNTIME_TIMEOUT_S = 20.0
_OUTPUT_MAX = 4000


@frozen
class RemainingProcess:
    """A process that a shim knew. ``exit`` is set if it saw it end; ``pid`` is 0 before a start."""

    exec_id: str
    pid: int
    start_time: int
    exit: ProcessExit | None = None

    def identity(self) -> ProcessId | None:
        """The process, where it can be told from others."""
        return ProcessId(self.pid, self.start_time) if self.pid and self.start_time else None


@frozen
class Remains:
    """Content of state.json. ``runtime`` is empty where there was no container.

    Without processes there is no task any more: the runtime alone may still know the container.
    """

    processes: Mapping[str, RemainingProcess]
    runtime: tuple[str, ...] = ()


def read_spool(bundle: Bundle, decode: Callable[[bytes], ShimEvent | None]) -> list[ShimEvent]:
    """The events of the spool in order; a file that cannot be read is passed over. Blocks."""
    directory = bundle.path / "spool"
    events = []
    if directory.is_dir():
        for path in directory.iterdir():
            if not path.name.isdigit():  # a draft that was never finished
                continue
            try:
                event = decode(path.read_bytes())
            except FileNotFoundError:  # acknowledged meanwhile: it is in the journal
                continue
            if event is None or event.seq != int(path.name):
                log.error("event in a spool is unreadable", path=str(path))
            else:
                events.append(event)
    return sorted(events, key=lambda event: event.seq)


def read_remains(bundle: Bundle) -> Remains | None:
    """What state.json says; None where it is not there or makes no sense. Blocks."""
    try:
        data = bundle.read_json("state.json")
    except NotFound:
        return None
    try:
        for container in data.get("containers") or ():
            if container["id"] == bundle.id:
                runtime = (str(container["runtime"]), "--root", str(container["runtime_root"]))
                if _is_deleted(container):
                    return Remains({}, runtime)
                cgroups = _cgroups_of(bundle)
                processes = [_process(entry, cgroups) for entry in container["processes"]]
                return Remains({process.exec_id: process for process in processes}, runtime)
    except (KeyError, TypeError, ValueError, AttributeError):
        log.error("state of a shim is unreadable", path=str(bundle.path / "state.json"))
        return None
    return Remains({})


def recorded_state(bundle: Bundle, process: ProcessId | None) -> ProcessState | None:
    """State of init as its shim, which lives, has it on record; None where that cannot be had.

    The shim writes it before it tells anybody. Blocks.

    Args:
        bundle: the shim's.
        process: the shim; nothing is believed of one that has ended.
    """
    if process is None or not process.alive():
        return None
    try:
        containers = bundle.read_json("state.json")["containers"]
        (processes,) = (each["processes"] for each in containers if each["id"] == bundle.id)
        (init,) = (each for each in processes if not each["exec_id"])
        stdio = Stdio(init["stdin"], init["stdout"], init["stderr"], init["terminal"])
        status = TaskStatus[init["status"].upper()]
        if status is not TaskStatus.STOPPED:
            return ProcessState(bundle.id, int(init["pid"]), status, stdio)
        return ProcessState(
            bundle.id,
            int(init["pid"]),
            status,
            stdio,
            exit_status=int(init["exit_status"]),
            exited_at_ns=int(init["exited_at_ns"]),
        )
    except (NotFound, KeyError, TypeError, ValueError, AttributeError):
        return None  # it has no container yet, or its exit status is lost: it is asked


async def delete_container(remains: Remains, container_id: str) -> None:
    """Have the runtime kill what is left of a container and remove its cgroup. Never raises."""
    if remains.runtime:
        await _run((*remains.runtime, "delete", "--force", container_id), container_id)


async def thaw_container(remains: Remains, container_id: str) -> None:
    """Have the runtime thaw a container: frozen by cgroup v1, it does not die. Never raises."""
    if remains.runtime:
        await _run((*remains.runtime, "resume", container_id), container_id)


async def _run(argv: tuple[str, ...], container_id: str) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        log.error("runtime cannot be run", runtime=argv[0], reason=error.strerror)
        return
    try:
        async with asyncio.timeout(_RUNTIME_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        log.error("runtime does not end", argv=argv, container=container_id)
        return
    if process.returncode:
        text = output[-_OUTPUT_MAX:].decode(errors="replace").strip()
        log.warning("runtime failed", argv=argv, container=container_id, output=text)


def _is_deleted(container: Mapping[str, Any]) -> bool:
    return any(not p["exec_id"] and p.get("status") == "deleted" for p in container["processes"])


def _process(entry: dict[str, Any], cgroups: tuple[str, ...]) -> RemainingProcess:
    pid = int(entry["pid"])
    end = None
    if entry["exit_status"] is not None:
        end = ProcessExit(int(entry["exit_status"]), int(entry["exited_at_ns"]), pid)
    start_time = int(entry.get("start_time") or 0) or _start_time_inside(pid, cgroups)
    return RemainingProcess(str(entry["exec_id"]), pid, start_time, end)


def _cgroups_of(bundle: Bundle) -> tuple[str, ...]:
    """How the path of the container's cgroup ends: as the spec says, or the runtime's default."""
    try:
        path = (bundle.read_json("config.json").get("linux") or {}).get("cgroupsPath") or ""
    except NotFound:
        path = ""
    return (f"/{bundle.id}", str(path)) if path.startswith("/") else (f"/{bundle.id}",)


def _start_time_inside(pid: int, cgroups: tuple[str, ...]) -> int:
    """Start time of a process that is in the container's cgroup; 0 if it is not, or has ended."""
    start_time = linux.process_start_time(pid) if pid > 0 else None
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    inside = any(line.split(":", 2)[2].endswith(cgroups) for line in lines)
    return start_time or 0 if inside else 0
