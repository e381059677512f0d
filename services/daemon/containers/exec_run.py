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
from services.daemon.containers.runtime import AttachTarget, Gap, Output

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from services.daemon.containers.attach import Attacher
    from services.daemon.containers.exec import Execs
    from services.daemon.containers.record import ExecConfig, ExecId, ExitStatus
    from services.daemon.containers.runtime import AttachInput, AttachOutput

    Told = ExecId | Output | Gap | ExitStatus


class ExecRuns:
    """Runs execs.

    Args:
        execs: makes, starts and waits for them.
        attacher: brings their output.
    """

    def __init__(self, execs: Execs, attacher: Attacher) -> None:
        self._execs = execs
        self._attacher = attacher
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
        session = self._attacher.exec(AttachTarget("", exec_id), _no_input())
        async with aclosing(session) as outputs:
            # Its first step announces it: from there on the start couples it.
            await anext(outputs)
            starting = asyncio.create_task(
                self._starts.run(self._execs.start(exec_id), name="exec-start")
            )
            try:
                yield exec_id
                while (output := await _next(outputs, starting)) is not None:
                    if isinstance(output, Output | Gap):
                        yield output
                await starting
            finally:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
        yield await self._execs.wait(exec_id)

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
