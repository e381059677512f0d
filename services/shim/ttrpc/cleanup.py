"""``delete`` for a task whose shim died: end what is left of it, and find out how it ended.

The dead shim's state file and spool know of an end that it saw. A container that still runs is
killed here, and its exit status taken from the kernel where that keeps one (Linux 6.15). What
nobody knows is reported as containerd's own "unknown", never as a status that somebody could take
for the container's.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from services.common import linux, mounts
from services.common.errors import TheseusError
from services.shim import events
from services.shim.bundle import Bundle
from services.shim.runtimes import failures
from services.shim.runtimes.programs import ENVIRONMENT, find_program
from services.shim.runtimes.runtime import UnknownToRuntime
from services.shim.ttrpc import bootstrap
from services.shim.ttrpc.ending import UNKNOWN_STATUS, Ending
from services.shim.ttrpc.task import TASK_FILE

_RUNTIME_LIMIT_S = 30.0
_END_LIMIT_S = 10.0
_SIGKILLED = 128 + 9


def clean_up(directory: str, *, container_id: str, namespace: str) -> Ending:
    """Remove all that is left of a task; what cannot be removed is told on standard error.

    Args:
        directory: its bundle.
        container_id: its id.
        namespace: containerd's namespace, for the message.
    """
    bundle = Bundle(Path(directory))
    task = bundle.read(TASK_FILE)
    ending = None
    if task:
        home = Bundle(Path(task["home"]))
        init = _init_process(home, container_id)
        ending = _recorded(home, init, container_id)
        try:
            killed = _end(bundle, task, init, container_id)
            ending = ending or killed
        except (TheseusError, OSError, subprocess.SubprocessError) as error:
            _warn(f"container {namespace}/{container_id} cannot be deleted: {error}")
    try:
        mounts.unmount(bundle.rootfs)
    except (TheseusError, OSError) as error:
        _warn(f"{bundle.rootfs} cannot be unmounted: {error}")
    _remove_socket(bundle.path)
    return ending or Ending(0, UNKNOWN_STATUS, time.time_ns())


def _init_process(home: Bundle, container_id: str) -> dict[str, Any]:
    """What the shim's state file says of the container's init; empty when nothing."""
    for container in home.read("state.json").get("containers", ()):
        for process in container["processes"]:
            if container["id"] == container_id and not process["exec_id"]:
                return dict(process)
    return {}


def _recorded(home: Bundle, init: dict[str, Any], container_id: str) -> Ending | None:
    """The end that the shim saw: from its state file, or from an event that it had not sent yet."""
    if init.get("exit_status") is not None:
        return Ending(init["pid"], init["exit_status"], init["exited_at_ns"])
    for fields in _spooled_exits(home.spool):
        if fields["container_id"] == container_id and fields["id"] == container_id:
            return Ending(fields["pid"], fields["exit_status"], fields["exited_at_ns"])
    return None


def _spooled_exits(spool: Path) -> list[dict[str, Any]]:
    exits = []
    for path in sorted(spool.iterdir()) if spool.is_dir() else ():
        if path.name.isdigit():
            event = json.loads(path.read_bytes())
            if event["topic"] == events.TASK_EXIT:
                exits.append(event["fields"])
    return exits


def _end(
    bundle: Bundle, task: dict[str, Any], init: dict[str, Any], container_id: str
) -> Ending | None:
    """Have the runtime delete the container; its end, if that was what ended it."""
    pidfd = _open_running(init)
    try:
        _delete(bundle, task, container_id)
        if pidfd < 0 or not select.select([pidfd], [], [], _END_LIMIT_S)[0]:
            return None
        status = linux.pidfd_exit_status(pidfd)
        if status is None:
            return Ending(init["pid"], _SIGKILLED, time.time_ns())
        code = os.waitstatus_to_exitcode(status)
        return Ending(init["pid"], code if code >= 0 else 128 - code, time.time_ns())
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _open_running(init: dict[str, Any]) -> int:
    """A pidfd of the container's init; -1 when it does not run, or another has its pid now."""
    if not init.get("pid"):
        return -1
    try:
        pidfd = os.pidfd_open(init["pid"])
    except ProcessLookupError:
        return -1
    if linux.process_start_time(init["pid"]) == init["start_time"]:
        return pidfd
    os.close(pidfd)
    return -1


def _delete(bundle: Bundle, task: dict[str, Any], container_id: str) -> None:
    program, log = find_program(task["runtime"]), bundle.runtime_log
    offset = log.stat().st_size if log.exists() else 0
    arguments = ["--root", task["runtime_root"], "--log", str(log), "--log-format", "json"]
    done = subprocess.run(
        [program, *arguments, "delete", "--force", container_id],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env=ENVIRONMENT,
        timeout=_RUNTIME_LIMIT_S,
        check=False,
    )
    said = failures.read_log(log, offset) or failures.bounded(done.stderr)
    if done.returncode and not isinstance(failures.classify(said, said), UnknownToRuntime):
        _warn(f"{task['runtime']} cannot delete container {container_id}: {said}")


def _remove_socket(bundle: Path) -> None:
    try:
        bootstrap.remove_dead((bundle / "address").read_text().removeprefix("unix://"))
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            _warn(f"the socket of the dead shim cannot be removed: {error}")


def _warn(text: str) -> None:
    sys.stderr.write(f"{text}\n")
