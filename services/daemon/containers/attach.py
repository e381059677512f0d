"""Attached clients: relayed to the shim through containerd, and back again when that was away.

The client notices nothing of a restart of containerd: output goes on at the byte where it stopped,
and input that the shim had not taken is sent again. Before a start there is nothing to attach to
yet: the client is told that it is coupled, and the start couples it before anything runs. After the
shim has gone, the rest of the output comes from the log.
"""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import aclosing
from typing import TYPE_CHECKING

import structlog

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from services.daemon.containers.input_feed import InputFeed
from services.daemon.containers.logs import LogSelection
from services.daemon.containers.record import ExecState, State
from services.daemon.containers.runtime import (
    AttachInput,
    AttachOutput,
    AttachTarget,
    Finished,
    Gap,
    Output,
    Started,
)
from services.daemon.together import first

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from services.daemon.containers.exec_store import ExecStore
    from services.daemon.containers.logs import Logs
    from services.daemon.containers.observer import Observer
    from services.daemon.containers.record import ContainerRecord, ExecRecord
    from services.daemon.containers.runtime import NewProcess, Streams
    from services.daemon.containers.sessions import Opening, Sessions
    from services.daemon.containers.store import ContainerStore

log = structlog.get_logger(__name__)

_BEFORE_THE_TASK = (State.CREATING, State.CREATED, State.STARTING)
_REDIAL_LIMIT_S = 60.0
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.5


class Attacher:
    """Couples clients with processes.

    Args:
        store, execs: who there is to attach to.
        streams: containerd's.
        logs: for output whose shim is gone.
        sessions: counts who is attached.
        observer: told of resumed sessions.
    """

    def __init__(
        self,
        *,
        store: ContainerStore,
        execs: ExecStore,
        streams: Streams,
        logs: Logs,
        sessions: Sessions,
        observer: Observer,
    ) -> None:
        self._store = store
        self._execs = execs
        self._streams = streams
        self._logs = logs
        self._sessions = sessions
        self._observer = observer

    async def container(
        self, reference: str, target: AttachTarget, inputs: AsyncIterator[AttachInput]
    ) -> AsyncGenerator[AttachOutput, None]:
        """Couple with the init process of a container.

        Args:
            reference: the container, as users call it.
            target: what is wanted; its ids are filled in here.
            inputs: from the client.

        Raises:
            NotFound: there is no such container.
            FailedPrecondition: input is wanted, and its stdin is not open.
            Unavailable: containerd was away for too long.
        """
        record = self._store.find(reference)
        if target.input and not record.config.open_stdin:
            raise FailedPrecondition(
                f"container {record.name} was not created with an open standard input: attach to "
                "its output only, or create it with open_stdin",
                resource=("container", record.id),
            )
        relay = _Relay(self._streams, _aimed(target, record.id), inputs, self._observer)
        with self._sessions.attached(record.id), self._sessions.expecting(record.id) as opening:
            relay.coupled = opening.settled
            async with relay:
                if record.state in _BEFORE_THE_TASK:
                    yield relay.announce(Started(0, record.config.tty, 0))
                    if not await self._task_made(record, opening):
                        yield Finished(relay.offset)
                        return
                try:
                    async for output in relay.run():
                        yield output
                except (NotFound, FailedPrecondition):
                    present = self._store.get(record.id)
                    if present is None or present.live:
                        raise
                    if present.state is State.CREATED:
                        raise Unavailable("the start was given up: attach again") from None
                    async for output in self._rest(present, relay):
                        yield output

    async def exec(
        self, target: AttachTarget, inputs: AsyncIterator[AttachInput]
    ) -> AsyncGenerator[AttachOutput, None]:
        """Couple with an exec session's process. Arguments and errors as :meth:`container`.

        The stream to the shim is the one by which the process is started, if that comes later.
        """
        record = self._execs.require(target.exec_id)
        if record.config.detach:
            raise FailedPrecondition("a detached exec session cannot be attached to")
        if target.input and not record.config.open_stdin:
            raise FailedPrecondition("the exec session was not created with an open standard input")
        relay = _Relay(self._streams, _aimed(target, record.container_id), inputs, self._observer)
        with (
            self._sessions.attached(record.container_id, record.id),
            self._sessions.expecting(record.id, relay.begin) as opening,
        ):
            async with relay:
                early = record.state is ExecState.CREATED
                if early:
                    # Its start may be done and not recorded yet, and a part of the output be read.
                    yield relay.announce(Started(0, record.config.tty, relay.offset))
                    await first(opening.made.wait(), self._exec_begun(record))
                try:
                    async for output in relay.run():
                        yield output
                    return
                except (NotFound, FailedPrecondition):
                    # One that waited for the start is told that it failed before we are.
                    present = await self._exec_begun(record)
                    if present.state is not ExecState.EXITED and not early:
                        raise
                if present.state is ExecState.EXITED:
                    for output in relay.end():
                        yield output
                    return
                async for output in relay.run():  # a later start went well
                    yield output

    async def _exec_begun(self, record: ExecRecord) -> ExecRecord:
        return await self._execs.until(record.id, lambda now: now.state is not ExecState.CREATED)

    async def _task_made(self, record: ContainerRecord, opening: Opening) -> bool:
        """Wait until there is a task to couple with, or was; False when there never will be."""
        started = self._store.until(
            record.id,
            lambda now: now.state in (State.RUNNING, State.PAUSED) or now.exits > record.exits,
        )
        return await first(opening.made.wait(), started) is not None

    async def _rest(
        self, record: ContainerRecord, relay: _Relay
    ) -> AsyncGenerator[AttachOutput, None]:
        """What of a finished run's output the client lacks, out of the log."""
        if not relay.announced:
            yield relay.announce(Started(0, record.config.tty, relay.offset))
        if relay.target.output and not relay.target.from_end and record.started_at_ns:
            selection = LogSelection(since_ns=record.starting_at_ns, skip_bytes=relay.offset)
            async with aclosing(self._logs.read(record.id, selection)) as batches:
                async for batch in batches:
                    for entry in batch:
                        yield relay.advance(Output(relay.offset, entry.stream, entry.data))
        yield Finished(relay.offset)


class _Relay:
    """One client's session: where its output is, and what of its input may be sent again."""

    def __init__(
        self,
        streams: Streams,
        target: AttachTarget,
        inputs: AsyncIterator[AttachInput],
        observer: Observer,
    ) -> None:
        self.target = target
        self.offset = target.offset
        self.announced = False
        self.coupled = asyncio.Event()
        """Set once the shim has answered for the first time."""
        self._from_end = target.from_end
        self._streams = streams
        self._observer = observer
        self._feed = InputFeed(inputs)
        self._begun: _Coupling | None = None
        self._over = False

    async def __aenter__(self) -> _Relay:
        self._reading = asyncio.create_task(self._feed.take_in(), name="attach-input")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        if self._begun is not None:
            await self._begun.close()

    async def begin(self, new: NewProcess) -> int:
        """Start a process over this session's stream, which ``run`` goes on with; returns its pid.

        Raises:
            TheseusError: as :meth:`Streams.attach`.
        """
        coupling, kept = self._couple(new), False
        try:
            pid = await coupling.begin()
            kept = not self._over and self._begun is None  # else nobody goes on with it
            if kept:
                self._begun = coupling
            return pid
        finally:
            if not kept:
                await coupling.close()

    def announce(self, started: Started) -> Started:
        """Note that the client is told; output goes on where ``started`` says."""
        self.announced = True
        self._from_end = False
        self.offset = started.offset
        return started

    def advance(self, output: Output) -> Output:
        """Note that the client is sent ``output``."""
        self.offset = output.offset + len(output.data)
        return output

    def end(self) -> list[AttachOutput]:
        """The last words of a session whose process left nothing behind."""
        started = [] if self.announced else [self.announce(Started(0, False, self.offset))]
        return [*started, Finished(self.offset)]

    async def run(self) -> AsyncGenerator[AttachOutput, None]:
        """Relay to the end of the output, through interruptions.

        Raises:
            NotFound, FailedPrecondition: the shim has nothing to attach to (any more).
            Unavailable: nobody could be reached for too long.
        """
        loop = asyncio.get_running_loop()
        pause_s, broken_at_s = _FIRST_PAUSE_S, 0.0
        while True:
            coupling, self._begun = self._begun or self._couple(), None
            try:
                while (output := await coupling.next()) is not None:
                    self._check_input()
                    if broken_at_s:
                        log.info("attach resumed", offset=self.offset)
                        self._observer.attach_resumed()
                    pause_s, broken_at_s = _FIRST_PAUSE_S, 0.0
                    if isinstance(output, Started):
                        self.coupled.set()
                    if (passed_on := self._note(output)) is not None:
                        yield passed_on
                    if isinstance(output, Finished) and output.end is None:
                        return
                if coupling.finished:
                    return
                raise Unavailable("the attached stream ended early")
            except Unavailable:
                broken_at_s = broken_at_s or loop.time()
                if loop.time() - broken_at_s > _REDIAL_LIMIT_S:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            finally:
                await coupling.close()

    def _couple(self, new: NewProcess | None = None) -> _Coupling:
        return _Coupling(self._streams, self._next_target(new), self._feed)

    def _next_target(self, new: NewProcess | None) -> AttachTarget:
        return dataclasses.replace(
            self.target, offset=self.offset, from_end=self._from_end, new=new
        )

    def _note(self, output: AttachOutput) -> AttachOutput | None:
        """Follow the place of the output; None for what the client is not told."""
        match output:
            case Started():
                told = self.announced
                if not told:
                    self.announce(output)
                return None if told else output
            case Output():
                return self.advance(output)
            case Gap():
                self.offset = output.to_offset
        return output

    def _check_input(self) -> None:
        if self._reading.done() and not self._reading.cancelled():
            self._reading.result()


class _Coupling:
    """One stream to the shim."""

    def __init__(self, streams: Streams, target: AttachTarget, feed: InputFeed) -> None:
        self._position: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._stream = streams.attach(target, feed.give_out(self._position))
        self._begun: AttachOutput | None = None
        self.finished = False

    async def begin(self) -> int:
        """Wait until a process that was to be started runs; returns its pid."""
        first = await anext(self._stream)
        assert isinstance(first, Started)
        self._begun = first
        return first.pid

    async def next(self) -> AttachOutput | None:
        """What comes next, from the first on; None at the end."""
        output: AttachOutput | None
        if self._begun is not None:
            output, self._begun = self._begun, None
        else:
            try:
                output = await anext(self._stream)
            except StopAsyncIteration:
                return None
        if isinstance(output, Started):
            self._position.set_result(output.input_offset)
        self.finished = self.finished or isinstance(output, Finished)
        return output

    async def close(self) -> None:
        """Give it up. Idempotent."""
        await self._stream.aclose()
        self._position.cancel()


def _aimed(target: AttachTarget, container_id: str) -> AttachTarget:
    if not target.output and not target.input:
        raise InvalidArgument("neither output nor input is wanted: set one of them")
    return dataclasses.replace(target, container_id=container_id)
