"""How a task ended, as the bundle's file ``ended`` keeps it for ``delete``.

containerd 1.6 runs ``delete`` at the end of every task, its shim dead or not. A shim that deleted
the task in order leaves this one line, and then there is nothing to do but to repeat it::

    <pid> <exit status> <nanoseconds since the epoch>
"""

from __future__ import annotations

import os

from services.shim.ttrpc import wire

FILE = "ended"
UNKNOWN_STATUS = 255
"""containerd's own number for an exit status that nobody knows (its UnknownExitStatus)."""


class Ending:
    """The end of a task; a plain class, since dataclasses are slow to import."""

    __slots__ = ("exited_at_ns", "pid", "status")

    def __init__(self, pid: int, status: int, exited_at_ns: int) -> None:
        self.pid = pid
        self.status = status
        self.exited_at_ns = exited_at_ns

    def to_message(self) -> bytes:
        """A serialized containerd.task.v2.DeleteResponse."""
        seconds, nanos = divmod(self.exited_at_ns, 1_000_000_000)
        timestamp = wire.encode([(1, seconds), (2, nanos)])
        return wire.encode([(1, self.pid), (2, self.status), (3, timestamp)])


def write(bundle: str, ending: Ending) -> None:
    """Keep ``ending``.

    Raises:
        OSError: the bundle is gone, or the disk is full.
    """
    temporary = os.path.join(bundle, f".{FILE}.tmp")
    with open(temporary, "w", encoding="ascii") as file:
        file.write(f"{ending.pid} {ending.status} {ending.exited_at_ns}\n")
    os.rename(temporary, os.path.join(bundle, FILE))


def read(bundle: str) -> Ending | None:
    """What was kept; None when nothing was."""
    try:
        with open(os.path.join(bundle, FILE), encoding="ascii") as file:
            pid, status, exited_at_ns = map(int, file.read(128).split())
    except (OSError, ValueError):
        return None
    return Ending(pid, status, exited_at_ns)
