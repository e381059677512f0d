"""What a shim that died has left: its own notes, its spool, and what the keeper holds for it.

All of it together makes the document that a re-executed shim is handed over, so taking over is the
same from there on. What was inside the process is lost: output that was read and not yet in the
log or with a reader. A meter, which the keeper holds too, says how much that was.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import structlog

from services.common import linux
from services.common.errors import FailedPrecondition, Unavailable
from services.shim import events
from services.shim.handover import named, renamed
from services.shim.process import Status
from services.shim.stdio import meter
from services.shim.stdio.meter import Meter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.shim.bundle import Bundle
    from services.shim.keeping import Keeping

    Lost = Callable[[str, int], None]

log = structlog.get_logger(__name__)


async def read_legacy(bundle: Bundle, keeping: Keeping, lost: Lost) -> dict[str, Any]:
    """The document for ``Tasks.unpack``.

    Args:
        bundle: of the shim.
        keeping: holds what is fetched from the keeper, from now on.
        lost: called with a stream and the bytes of it that are lost.

    Raises:
        FailedPrecondition: there is nothing that could be taken over.
    """
    state = bundle.read("state.json")
    try:
        held = await keeping.fetch()
    except Unavailable as error:
        log.error("containers go on without streams", reason=error.message)
        held = {}
    try:
        exits = _exits(bundle)
        containers = [
            _container(entry, held, exits, lost)
            for entry in state.get("containers") or ()
            if not _is_deleted(entry)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FailedPrecondition(f"{bundle.path}/state.json makes no sense: {error!r}") from error
    if not containers:
        raise FailedPrecondition(f"the shim of {bundle.path} has left no container to take over")
    used = named([container["io"] for container in containers])
    for fd in set(held.values()) - used.union(*(c["pidfds"].values() for c in containers)):
        keeping.release(fd)  # its process was told to have ended
    return {
        "containers": containers,
        "epoch": state.get("epoch", 0),
        "shutdown": False,
        "emptied": False,
    }


def _is_deleted(entry: Mapping[str, Any]) -> bool:
    """Whether only the runtime is left to be told of a container's end: containerd does that."""
    return any(not p["exec_id"] and p["status"] == Status.DELETED for p in entry["processes"])


def _container(
    entry: dict[str, Any],
    held: Mapping[str, int],
    exits: Mapping[tuple[str, str], dict[str, Any]],
    lost: Lost,
) -> dict[str, Any]:
    io: dict[str, Any] = {}
    pidfds: dict[str, int] = {}
    for process in entry["processes"]:
        exec_id = process["exec_id"]
        if process["exit"] is None and (told := exits.get((entry["id"], exec_id))) is not None:
            process |= {"exit": told, "status": "stopped"}
        if not process["pid"] or process["kept"] is None:
            continue
        kept = renamed(process["kept"], held)
        if process["exit"] is None:
            process["orphan"] = True
            pidfds[exec_id] = kept["pidfd"] if kept["pidfd"] >= 0 else _open_pidfd(process)
        if kept["io"]["meter"] >= 0:
            io[exec_id] = _streams(kept["io"], lost, f"{entry['id']}/{exec_id}")
    return {**entry, "io": io, "pidfds": pidfds}


def _open_pidfd(process: Mapping[str, Any]) -> int:
    """A pidfd of a process that still runs, or -1."""
    try:
        pidfd = os.pidfd_open(process["pid"])
    except ProcessLookupError:
        return -1
    # Compared once the descriptor is open: what it holds is then what was meant.
    if linux.process_start_time(process["pid"]) == process["start_time"]:
        return pidfd
    os.close(pidfd)
    return -1


def _streams(saved: dict[str, Any], lost: Lost, name: str) -> dict[str, Any]:
    """Bring what was written down at the start of the streams up to date."""
    numbers = Meter(saved["meter"])
    try:
        if saved["input"] is not None:
            saved["input"]["taken"] = numbers[meter.TAKEN]
        for number, sink in enumerate(saved["sinks"]):
            streams = [s for s, owner in saved["sink_of"].items() if owner == number]
            for stream, count in _bring_up(sink, streams, numbers).items():
                if count > 0:
                    lost(stream, count)
                    log.warning(
                        "output inside the dead shim is lost",
                        process=name,
                        stream=stream,
                        at_most_bytes=count,
                    )
    finally:
        numbers.close()
    return saved


def _bring_up(sink: dict[str, Any], streams: list[str], numbers: Meter) -> dict[str, int]:
    """Continue a sink where its meter says that it was; returns what is lost, by stream."""
    read = {stream: numbers[meter.READ[stream]] for stream in streams}
    file = sink if sink["kind"] == "log" else sink.get("log")
    if sink["kind"] == "output":
        sink |= {"stream_ends": read, "end": sum(read.values())}
        sink["read_until"] = sink["end"]
    if file is None:
        unread = sum(read.values()) - numbers[meter.HANDED] if sink["kind"] == "output" else 0
        return {streams[0]: unread}
    gone = {stream: count - numbers[meter.WRITTEN[stream]] for stream, count in read.items()}
    for stream, count in read.items():
        file["index"][stream]["written"] = count
        numbers[meter.WRITTEN[stream]] = count
    return gone


def _exits(bundle: Bundle) -> dict[tuple[str, str], dict[str, Any]]:
    """Exit records of the spool, by container and exec id: told to nobody yet, perhaps."""
    found = {}
    for path in sorted(bundle.spool.iterdir()) if bundle.spool.is_dir() else ():
        if not path.name.isdigit():
            continue
        event = json.loads(path.read_bytes())
        if event["topic"] != events.TASK_EXIT:
            continue
        fields = event["fields"]
        exec_id = "" if fields["id"] == fields["container_id"] else fields["id"]
        found[fields["container_id"], exec_id] = {
            "status": fields["exit_status"],
            "exited_at_ns": fields["exited_at_ns"],
            "signal": fields["signal"],
            "oom_killed": fields["oom_killed"],
            "usage": fields["usage"],
            "lost": "",
        }
    return found
