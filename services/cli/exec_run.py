"""An exec in one call: its output and how it ended, for one without input and terminal.

When the engine goes away meanwhile, the process goes on, and so do we: by the session's id, at the
byte where we were. Before the id was told nothing has been started, and the call is made again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli.engine import LONG_DEADLINE_S
from services.cli.failure import warn
from services.cli.output import OutputWriter
from services.cli.session import Session
from services.common.errors import Cancelled, DeadlineExceeded, Unavailable

if TYPE_CHECKING:
    from services.cli.engine import Engine


class ExecRun:
    """Runs a process in a container: :class:`Coupled`, whose output is complete with its end."""

    def __init__(self, engine: Engine, request: pb.CreateExecRequest) -> None:
        self.detached = asyncio.Event()  # never: there are no keys
        self._engine = engine
        self._request = pb.RunExecRequest(exec=request)
        self._exec_id = ""
        self._output = OutputWriter()

    def started(self, *, detachable: bool = False) -> None:
        """See :class:`Coupled`. There is no input to begin with."""

    def resize(self) -> None:
        """See :class:`Coupled`. There is no terminal."""

    async def written(self) -> None:
        """See :class:`Coupled`. What comes before the end is written before it is told."""

    async def exit(self) -> pb.ExitStatus:
        """Run it once; returns how it ended, when all of its output was written.

        Raises:
            TheseusError: it could not be started, or the engine went away for good.
        """
        ended = await self._engine.insist(self._in_one_call, repeatable=True)
        return ended if ended is not None else await self._resumed()

    async def _in_one_call(self) -> pb.ExitStatus | None:
        """One call; None when it broke off after the id was told."""
        call = self._engine.execs.Run(self._request, timeout=LONG_DEADLINE_S)
        try:
            with self._engine.failures():
                async for response in call:
                    match response.WhichOneof("message"):
                        case "exec_id":
                            self._exec_id = response.exec_id
                        case "output":
                            await self._output.write(response.output)
                        case "gap":
                            self._output.skip(response.gap)
                        case "exit":
                            return response.exit
            if not self._exec_id:
                raise Unavailable("the engine ended the session early")
        except (Unavailable, Cancelled, DeadlineExceeded):
            if not self._exec_id:
                raise
        finally:
            call.cancel()
        return None

    async def _resumed(self) -> pb.ExitStatus:
        """Go on with a process that has an id, and runs, or has ended, or was not started yet."""
        engine, exec_id = self._engine, self._exec_id
        start = pb.AttachStart(exec_id=exec_id, output=True, offset=self._output.offset)
        session = Session(engine, engine.execs.Attach, start, interactive=False, resumes=True)
        try:
            await session.attach()
            # One that was started is left alone.
            await engine.call(
                engine.execs.Start, pb.StartExecRequest(exec_id=exec_id), resumes=True
            )
            status = await exec_exit(engine, exec_id)
            await session.written()
        finally:
            await session.close()
        if status.error and not status.lost:
            warn(status.error)  # it could not be started, which was to be told when we were away
        return status


async def exec_exit(engine: Engine, exec_id: str) -> pb.ExitStatus:
    """How a session's process ended, once it has."""
    return (await engine.wait(engine.execs.Wait, pb.WaitExecRequest(exec_id=exec_id))).exit
