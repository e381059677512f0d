"""What the containers of one home share."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from services.common.frozen import frozen
from services.shim.handover import Skeleton, renamed
from services.shim.keeping import Keeping
from services.shim.stdio.process_io import ProcessIo, open_io

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.common.background import Background
    from services.shim.events import EventSink
    from services.shim.measures import Measures
    from services.shim.process import Process
    from services.shim.reaper import Exit, Reaper
    from services.shim.stdio.uris import Stdio


@frozen
class Surroundings:
    """What a container shares with the others of its home.

    Attributes:
        namespace: containerd's.
        reaper: waits for processes.
        events: where they are told.
        metrics: what is counted.
        background: owns what goes on by itself.
        keeping: holds descriptors for a successor.
        forgets_behind: Delete answers before the runtime has deleted a container: who takes the
            home away waits for that, and finishes it if this process dies.
    """

    namespace: str
    reaper: Reaper
    events: EventSink
    metrics: Measures
    background: Background
    keeping: Keeping = field(default_factory=lambda: Keeping(None, ""))
    forgets_behind: bool = False

    async def open_io(self, container_id: str, stdio: Stdio) -> ProcessIo:
        """The streams of a new process, as ``stdio`` asks for them; raises as ``open_io``."""
        return await open_io(
            stdio,
            container_id=container_id,
            namespace=self.namespace,
            reaper=self.reaper,
            metrics=self.metrics,
            background=self.background,
            release=self.keeping.release,
        )

    def new_io(self, stdio: Stdio) -> ProcessIo:
        """Streams that take over from those of an earlier image."""
        return ProcessIo(stdio, self.metrics, self.background, self.keeping.release)

    def hold(self, process: Process) -> None:
        """Have the keeper hold what a successor needs of a process, should this shim die."""
        assert process.io is not None
        out = Skeleton()
        packed = {"pidfd": out.fd(process.pidfd), "io": process.io.pack(out)}
        process.kept = renamed(packed, self.keeping.hold(out.fds))

    def watch_again(self, process: Process, ended: Callable[[Exit], None]) -> None:
        """Have ``ended`` called at the end of a process that an earlier image watched."""
        if process.orphan:
            self.reaper.adopt_orphan(process.pid, process.pidfd, ended)
        else:
            self.reaper.adopt(process.pid, ended)
