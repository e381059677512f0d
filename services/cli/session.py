"""A session: this process' standard streams coupled with those of a process in a container.

Output is one sequence of bytes, and so is input. When the engine goes away the session attaches
again at the byte where it was, so that each byte is written, and taken, once.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli import terminal
from services.cli.engine import LONG_DEADLINE_S, Patience
from services.cli.failure import warn
from services.cli.input import Input
from services.cli.output import OutputWriter
from services.common.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from services.cli.engine import Engine

    Attach = grpc.aio.StreamStreamMultiCallable[pb.AttachRequest, pb.AttachResponse]

_OVER = -1


class Session:
    """Couples the streams until the process' output is complete.

    Args:
        attach: the method of the containers or execs service.
        start: whom to attach to; its offset is the first byte wanted.
        interactive: whether our standard input goes to the process.
        resumes: whether the engine has told of the process before: it is waited for from the first
            attempt on.
    """

    def __init__(
        self,
        engine: Engine,
        attach: Attach,
        start: pb.AttachStart,
        *,
        interactive: bool,
        resumes: bool = False,
    ) -> None:
        self.detached = asyncio.Event()
        self._engine = engine
        self._attach = attach
        self._start = start
        self._output = OutputWriter(start.offset)
        self._changed = asyncio.Event()
        self._input = Input(self._changed.set) if interactive else None
        self._running = False
        self._size = (0, 0)
        self._relaying: asyncio.Task[None] | None = None
        self._attached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if resumes:
            self._attached.set_result(None)

    async def attach(self) -> None:
        """Begin; returns when the engine has coupled us, so that no output can be missed.

        Raises:
            TheseusError: the engine cannot be reached, or refused.
        """
        self._relaying = asyncio.create_task(self._relay(), name="session")
        await asyncio.wait([self._attached, self._relaying], return_when="FIRST_COMPLETED")
        if not self._attached.done():
            await self._relaying  # it failed

    def started(self, *, detachable: bool = False) -> None:
        """The process runs: it may have input and a size from now on."""
        if self._input is not None and not self._running:
            keys = terminal.DetachFilter(self.detached.set) if detachable else bytes
            self._input.read_from(0, keys)
        self._running = True
        self._changed.set()

    def resize(self) -> None:
        """Tell the process the size that our terminal has now."""
        self._size = terminal.size()
        self._changed.set()

    async def written(self) -> None:
        """Returns when all output was written, as far as it can still be had.

        Raises:
            TheseusError: the engine went away for good, or refused.
        """
        assert self._relaying is not None, "not attached"
        try:
            await self._relaying
        except (NotFound, FailedPrecondition) as error:
            # The container was removed while the engine was away from us.
            warn(f"the last of the output may be missing: {error.message}")

    async def close(self) -> None:
        """Let go of the process, which goes on."""
        if self._relaying is not None:
            self._relaying.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._relaying

    async def _relay(self) -> None:
        patience = Patience()
        while True:
            try:
                with self._engine.failures():
                    if await self._relay_once(patience):
                        return
                error: Unavailable | Cancelled = Unavailable("the engine ended the session early")
            except DeadlineExceeded:
                continue
            except (Unavailable, Cancelled) as failure:
                if not self._attached.done():
                    raise  # it was never there: no restart to wait for
                error = failure
            await patience.pause(error)

    async def _relay_once(self, patience: Patience) -> bool:
        input_offset: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        over = asyncio.Event()
        call = self._attach(self._requests(input_offset, over), timeout=LONG_DEADLINE_S)
        try:
            async for response in call:
                patience.reset()
                match response.WhichOneof("message"):
                    case "started":
                        self._begin(response.started)
                        input_offset.set_result(response.started.input_offset)
                    case "output":
                        await self._output.write(response.output)
                    case "gap":
                        self._output.skip(response.gap)
                    case "finished":
                        return True
            return False
        finally:
            call.cancel()
            # gRPC forgets whoever makes its requests; let that one end by itself.
            if not input_offset.done():
                input_offset.set_result(_OVER)
            over.set()
            self._changed.set()

    def _begin(self, started: pb.AttachStarted) -> None:
        if self._start.from_end:
            # From now on the place is known: a second attach begins there.
            self._start.from_end = False
            self._output.offset = started.offset
        if self._attached.done():
            if self._input is not None:
                self._input.check(started.input_offset)
            return
        if self._input is not None:
            self._input.begin(started.input_offset)
        self._attached.set_result(None)

    async def _requests(
        self, input_offset: asyncio.Future[int], over: asyncio.Event
    ) -> AsyncIterator[pb.AttachRequest]:
        start = pb.AttachStart()
        start.CopyFrom(self._start)
        start.offset = self._output.offset
        yield pb.AttachRequest(start=start)
        position = await input_offset
        sent_size, closed = (0, 0), False
        while position != _OVER and not over.is_set():
            self._changed.clear()
            if not self._running:
                await self._changed.wait()
            elif self._size != sent_size:
                sent_size = self._size
                width, height = sent_size
                yield pb.AttachRequest(resize=pb.AttachResize(width=width, height=height))
            elif self._input is not None and (piece := self._input.piece(position)):
                yield pb.AttachRequest(input=pb.AttachInput(offset=position, data=piece))
                position += len(piece)
            elif self._input is not None and self._input.ended and not closed:
                closed = True
                yield pb.AttachRequest(close_input=pb.AttachCloseInput())
            else:
                await self._changed.wait()
