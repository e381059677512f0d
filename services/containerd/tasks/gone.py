"""What is left of a task whose shim is dead: an epitaph on disk, and a shim that answers from it.

A process whose end is known has its true exit status here. One whose end nobody can know has the
reason in words: its state is ``UNKNOWN``, and ``wait`` and ``delete`` raise ``DataLoss`` with them.
No number stands in for what is not known.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, NoReturn

from services.common.errors import DataLoss, FailedPrecondition, NotFound
from services.common.frozen import frozen
from services.containerd.tasks.shim import (
    ProcessExit,
    ProcessInfo,
    ProcessState,
    ShimInfo,
    TaskStatus,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.common.message_stream import MessageStream
    from services.containerd.tasks.shim import (
        CreateTask,
        ProgramInfo,
        Reexecuted,
        ShimAddress,
        ShimRequest,
        Stdio,
    )
    from services.containerd.typed import TypedValue


class ExitStatusLost(DataLoss):
    """A process ended and nobody can know how."""


@frozen
class LastWords:
    """How one process ended: ``exit``, or ``lost``, the reason why that is not known."""

    pid: int
    exit: ProcessExit | None = None
    lost: str = ""


@frozen
class Epitaph:
    """What containerd knows of a task without a shim. ``processes`` are by exec id."""

    id: str
    reason: str
    processes: Mapping[str, LastWords] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it is written to gone.json."""
        return {
            "reason": self.reason,
            "processes": {
                exec_id: {
                    "pid": words.pid,
                    "lost": words.lost,
                    "exit_status": None if words.exit is None else words.exit.exit_status,
                    "exited_at_ns": None if words.exit is None else words.exit.exited_at_ns,
                }
                for exec_id, words in self.processes.items()
            },
        }

    @classmethod
    def from_json(cls, container_id: str, data: dict[str, Any]) -> Epitaph:
        """As it was written to gone.json."""
        processes = {}
        for exec_id, words in data["processes"].items():
            pid = int(words["pid"])
            end = None
            if words["exit_status"] is not None:
                end = ProcessExit(int(words["exit_status"]), int(words["exited_at_ns"]), pid)
            processes[exec_id] = LastWords(pid, end, words["lost"])
        return cls(container_id, data["reason"], processes)


class GoneShim:
    """Implements ``Shim`` for a task whose shim is dead: answers what it can, refuses the rest."""

    def __init__(self, epitaph: Epitaph) -> None:
        self.epitaph = epitaph

    async def create(self, request: CreateTask) -> int:
        """As ``Shim.create``; refused."""
        self._refuse()

    async def start(self, exec_id: str) -> int:
        """As ``Shim.start``; refused."""
        self._refuse()

    async def kill(self, exec_id: str, signal: int, *, every: bool = False) -> None:
        """As ``Shim.kill``; there is nobody left."""
        self._words(exec_id)
        raise NotFound("process already finished")

    async def exec(self, exec_id: str, stdio: Stdio, spec: TypedValue) -> None:
        """As ``Shim.exec``; refused."""
        self._refuse()

    async def wait(self, exec_id: str) -> ProcessExit:
        """As ``Shim.wait``; answers at once."""
        words = self._words(exec_id)
        if words.exit is None:
            raise ExitStatusLost(
                f"{_subject(self.epitaph.id, exec_id)} has ended and its exit status is lost: "
                f"{words.lost}"
            )
        return words.exit

    async def delete(self, exec_id: str) -> ProcessExit:
        """As ``Shim.delete``; of init, the bundle is the caller's to remove."""
        return await self.wait(exec_id)

    async def state(self, exec_id: str) -> ProcessState:
        """As ``Shim.state``."""
        words = self._words(exec_id)
        identity = exec_id or self.epitaph.id
        if words.exit is None:
            return ProcessState(identity, words.pid, TaskStatus.UNKNOWN)
        return ProcessState(
            identity,
            words.pid,
            TaskStatus.STOPPED,
            exit_status=words.exit.exit_status,
            exited_at_ns=words.exit.exited_at_ns,
        )

    async def pids(self) -> list[ProcessInfo]:
        """As ``Shim.pids``: none runs."""
        return []

    async def pause(self) -> None:
        """As ``Shim.pause``; refused."""
        self._refuse()

    async def resume(self) -> None:
        """As ``Shim.resume``; refused."""
        self._refuse()

    async def resize(self, exec_id: str, width: int, height: int) -> None:
        """As ``Shim.resize``; refused."""
        self._refuse()

    async def close_io(self, exec_id: str) -> None:
        """As ``Shim.close_io``: it is closed."""
        self._words(exec_id)

    async def update(self, resources: TypedValue | None, annotations: Mapping[str, str]) -> None:
        """As ``Shim.update``; refused."""
        self._refuse()

    async def stats(self) -> TypedValue:
        """As ``Shim.stats``; the cgroup is gone."""
        raise NotFound(f"task '{self.epitaph.id}' has no cgroup any more: {self.epitaph.reason}")

    async def checkpoint(self, path: str, options: TypedValue | None) -> None:
        """As ``Shim.checkpoint``; refused."""
        self._refuse()

    async def connect(self) -> ShimInfo:
        """As ``Shim.connect``; refused."""
        self._refuse()

    async def shutdown(self, *, now: bool = False) -> None:
        """As ``Shim.shutdown``; it is done."""

    async def host(self, request: ShimRequest) -> ShimAddress:
        """As ``Shim.host``; refused."""
        self._refuse()

    async def leave(self, *, now: bool = False) -> None:
        """As ``Shim.leave``; it is done."""

    async def info(self) -> ProgramInfo:
        """As ``Shim.info``; refused."""
        self._refuse()

    async def reexec(self, program: Sequence[str], generation: int) -> Reexecuted:
        """As ``Shim.reexec``; refused."""
        self._refuse()

    async def metrics(self) -> bytes:
        """As ``Shim.metrics``: nothing is measured."""
        return b""

    async def attach(self) -> MessageStream:
        """As ``Shim.attach``; refused: what was not logged went with the shim."""
        self._refuse()

    async def close(self) -> None:
        """As ``Shim.close``."""

    def _words(self, exec_id: str) -> LastWords:
        words = self.epitaph.processes.get(exec_id)
        if words is None:
            raise NotFound(f"{_subject(self.epitaph.id, exec_id)} does not exist")
        return words

    def _refuse(self) -> NoReturn:
        raise FailedPrecondition(
            f"task '{self.epitaph.id}' has stopped: {self.epitaph.reason}; delete it to go on"
        )


def _subject(container_id: str, exec_id: str) -> str:
    return f"process '{exec_id}' of task '{container_id}'" if exec_id else f"task '{container_id}'"
