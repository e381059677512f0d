"""What a dead shim leaves in its bundle: events that it could not deliver, and its own notes.

``spool/<seq>`` holds one event each, state.json the processes that the shim knew and the runtime
that it used. Both are read only once the shim's process is gone, so nobody else writes there.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from services.common.errors import NotFound
from services.containerd.tasks.processes import ProcessId
from services.containerd.tasks.shim import ProcessExit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.containerd.tasks.bundle import Bundle
    from services.containerd.tasks.journal import ShimEvent

log = structlog.get_logger(__name__)

_RUNTIME_TIMEOUT_S = 20.0
_OUTPUT_MAX = 4000


@dataclass(frozen=True, slots=True)
class RemainingProcess:
    """A process that a shim knew. ``exit`` is set if it saw it end; ``pid`` is 0 before a start."""

    exec_id: str
    pid: int
    start_time: int
    exit: ProcessExit | None = None
    lost: str = ""

    def identity(self) -> ProcessId | None:
        """The process, where it can be told from others."""
        return ProcessId(self.pid, self.start_time) if self.pid and self.start_time else None


@dataclass(frozen=True, slots=True)
class Remains:
    """Content of state.json. ``runtime`` is empty where there was no container."""

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
            event = decode(path.read_bytes())
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
        processes = [_process(entry) for entry in data.get("processes") or ()]
        runtime = data.get("runtime") or {}
        argv = (str(runtime["binary"]), "--root", str(runtime["root"])) if runtime else ()
    except (KeyError, TypeError, ValueError, AttributeError):
        log.error("state of a shim is unreadable", path=str(bundle.path / "state.json"))
        return None
    return Remains({process.exec_id: process for process in processes}, argv)


async def delete_container(remains: Remains, container_id: str) -> None:
    """Have the runtime kill what is left of a container and remove its cgroup. Never raises."""
    if not remains.runtime:
        return
    argv = (*remains.runtime, "delete", "--force", container_id)
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        log.error("runtime cannot clean up", runtime=argv[0], reason=error.strerror)
        return
    try:
        async with asyncio.timeout(_RUNTIME_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        log.error("runtime does not end", runtime=argv[0], container=container_id)
        return
    if process.returncode:
        text = output[-_OUTPUT_MAX:].decode(errors="replace").strip()
        log.warning("runtime could not clean up", container=container_id, output=text)


def _process(entry: dict[str, Any]) -> RemainingProcess:
    pid = int(entry.get("pid") or 0)
    end = None
    if entry.get("exit_status") is not None:
        end = ProcessExit(int(entry["exit_status"]), int(entry.get("exited_at_ns") or 0), pid)
    return RemainingProcess(
        exec_id=str(entry.get("exec_id") or ""),
        pid=pid,
        start_time=int(entry.get("start_time") or 0),
        exit=end,
        lost=str(entry.get("lost") or ""),
    )
