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
from services.shim.runtimes.invocation import ENVIRONMENT
from services.shim.runtimes.runc import find_program
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
    ending = _recorded(task.get("home", directory), container_id)
    if task:
        try:
            killed = _end(task, container_id)
            ending = ending or killed
        except (TheseusError, OSError, subprocess.SubprocessError, ValueError) as error:
            _warn(f"container {namespace}/{container_id} cannot be deleted: {error}")
    try:
        mounts.unmount(bundle.rootfs)
    except (TheseusError, OSError) as error:
        _warn(f"{bundle.rootfs} cannot be unmounted: {error}")
    return ending or Ending(0, UNKNOWN_STATUS, time.time_ns())


def _recorded(home: str, container_id: str) -> Ending | None:
    """The end that the shim saw: from its state file, or from an event that it had not sent yet."""
    bundle = Bundle(Path(home))
    for container in bundle.read("state.json").get("containers", ()):
        for process in container["processes"]:
            is_init = container["id"] == container_id and not process["exec_id"]
            if is_init and process["exit_status"] is not None:
                return Ending(process["pid"], process["exit_status"], process["exited_at_ns"])
    for fields in _spooled_exits(bundle.spool):
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


def _end(task: dict[str, Any], container_id: str) -> Ending | None:
    """Have the runtime delete the container; its end, if that was what ended it."""
    program, root = find_program(task["runtime"]), task["runtime_root"]
    pidfd, pid = _open_running(program, root, container_id)
    try:
        deleted = _runtime(program, root, "delete", "--force", container_id)
        if deleted.returncode:
            _warn(f"{task['runtime']} delete: {deleted.stderr.strip()}")
        if pidfd < 0 or not select.select([pidfd], [], [], _END_LIMIT_S)[0]:
            return None
        status = linux.pidfd_exit_status(pidfd)
        if status is None:
            return Ending(pid, _SIGKILLED, time.time_ns())
        code = os.waitstatus_to_exitcode(status)
        return Ending(pid, code if code >= 0 else 128 - code, time.time_ns())
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _open_running(program: str, root: str, container_id: str) -> tuple[int, int]:
    """A pidfd of the container's init and its pid; -1 when it does not run."""
    answer = _runtime(program, root, "state", container_id)
    if answer.returncode:
        return -1, 0
    state = json.loads(answer.stdout)
    if state["status"] == "stopped" or state["pid"] <= 0:
        return -1, 0
    try:
        return os.pidfd_open(state["pid"]), state["pid"]
    except ProcessLookupError:
        return -1, 0


def _runtime(program: str, root: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, "--root", root, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=ENVIRONMENT,
        timeout=_RUNTIME_LIMIT_S,
        check=False,
    )


def _warn(text: str) -> None:
    sys.stderr.write(f"{text}\n")
