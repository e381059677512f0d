"""An exec from its creation to its end as one piece of work: output first, then how it ended.

The same session as the one that :mod:`services.daemon.containers.exec` makes step by step: whoever
loses the stream attaches to it, and waits for it, by its id.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument
from services.daemon.containers.outliving import OutlivingWork
from services.daemon.containers.record import ExitStatus
from services.daemon.containers.runtime import AttachTarget, Finished, Forgotten, Gap, Output

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from services.common.background import Background
    from services.daemon.containers.attach import Attacher
    from services.daemon.containers.exec import Execs
    from services.daemon.containers.record import ExecConfig, ExecId
    from services.daemon.containers.runtime import AttachInput, AttachOutput, ProcessEnd

    Told = ExecId | Output | Gap | ExitStatus


class ExecRuns:
    """Runs execs.

    Args:
        execs: makes, starts and waits for them.
        attacher: brings their output.
        background: owns what follows the end of a process.
    """

    def __init__(self, execs: Execs, attacher: Attacher, background: Background) -> None:
        self._execs = execs
        self._attacher = attacher
        self._ends = background
        self._starts = OutlivingWork()

    async def run(self, reference: str, config: ExecConfig) -> AsyncGenerator[Told, None]:
        """Tell the session's id, its output from the first byte on, and how it ended.

        A start that has begun goes on when the caller goes away, and so does the process.

        Raises:
            InvalidArgument: it wants input, or nobody to read its output; or as
                :meth:`Execs.create` and :meth:`Execs.start`.
        """
        if config.open_stdin or config.detach:
            raise InvalidArgument(
                "an exec that is run in one call has no standard input and is not detached: "
                "create, attach and start it",
                field="exec",
            )
        exec_id = await self._execs.create(reference, config)
        self._execs.attached(exec_id)
        session = self._attacher.exec(AttachTarget("", exec_id, exit=True), _no_input())
        end: ProcessEnd | None = None
        try:
            # Its first step announces it: from there on the start couples it.
            await anext(session)
            # Whoever has not heard of the id may call again: it is sent before anything starts.
            yield exec_id
            starting = asyncio.create_task(
                self._starts.run(self._execs.start(exec_id), name="exec-start")
            )
            try:
                while (output := await _next(session, starting)) is not None:
                    if isinstance(output, Output | Gap):
                        yield output
                    elif isinstance(output, Finished):
                        end = output.end
                        break
                if end is None:
                    await starting  # it may have failed, which ends a session too
            finally:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
            # The journal has it, or the shim's spool: it is recorded when it comes from there.
            yield (
                ExitStatus(end.exit_code, end.exited_at_ns)
                if end is not None
                else await self._execs.wait(exec_id)
            )
        finally:
            if end is not None and self._execs.read_to_the_end(exec_id):
                self._ends.start(self._see_off(exec_id, session), name="exec-end")
            else:
                await session.aclose()

    async def _see_off(self, exec_id: ExecId, session: AsyncGenerator[AttachOutput, None]) -> None:
        """Have a process deleted that has ended and was read."""
        async with aclosing(session):
            async for output in session:
                if isinstance(output, Forgotten):
                    self._execs.deleted(exec_id)

    async def close(self, timeout_s: float) -> None:
        """Let starts that have begun come to their end, for a while."""
        await self._starts.close(timeout_s)


async def _next(
    outputs: AsyncGenerator[AttachOutput, None], starting: asyncio.Task[int]
) -> AttachOutput | None:
    """The next of ``outputs``, None after the last; raises as a start that fails meanwhile."""
    if starting.done():
        starting.result()
        return await anext(outputs, None)
    coming = asyncio.ensure_future(anext(outputs, None))
    try:
        await asyncio.wait({coming, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
        return await coming
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


async def _no_input() -> AsyncGenerator[AttachInput, None]:
    return
    yield
