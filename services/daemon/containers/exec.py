"""Exec sessions: further processes in a running container."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

import structlog

from services.common.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    TheseusError,
    Unavailable,
)
from services.daemon.containers import exec_store
from services.daemon.containers.record import (
    ContainerRecord,
    ExecConfig,
    ExecId,
    ExecRecord,
    ExecState,
    ExitStatus,
    State,
)
from services.daemon.containers.rootfs import root_layers
from services.daemon.containers.runtime import AttachTarget, NewProcess, Started, Stdio
from services.daemon.containers.start import COMMAND_CODES, STREAM_URI
from services.daemon.spec.limits import validate_env, validate_working_dir
from services.daemon.spec.process import ExecRequest, exec_process
from services.daemon.spec.users import resolve_user

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from services.common.background import Background
    from services.daemon.containers.below import Below
    from services.daemon.containers.runtime import AttachInput, Streams
    from services.daemon.containers.sessions import Sessions
    from services.daemon.spec.host import HostFacts
    from services.daemon.spec.request import ResolvedUser

log = structlog.get_logger(__name__)

_CANNOT_RUN = 126
_START_LIMIT_S = 60.0
_FORGET_AFTER_S = 30.0
_ATTACHED_LIMIT_S = 3600.0
_PASSING = (Unavailable, DeadlineExceeded)


class Execs:
    """Exec sessions of all containers.

    Args:
        below: what containers are made of.
        host: facts of this machine.
        streams: containerd's, by which processes are started.
        sessions: attached clients, who read the output before the process is forgotten.
        background: owns what is done after the end of a session.
        clock_ns: the time.
    """

    def __init__(
        self,
        below: Below,
        *,
        host: HostFacts,
        streams: Streams,
        sessions: Sessions,
        background: Background,
        clock_ns: Callable[[], int],
    ) -> None:
        self._below = below
        self._host = host
        self._streams = streams
        self._sessions = sessions
        self._background = background
        self._clock_ns = clock_ns
        self._attached: set[str] = set()
        self._by_steps: set[str] = set()

    async def create(self, reference: str, config: ExecConfig) -> ExecId:
        """Prepare a process in a running container.

        Raises:
            NotFound: there is no such container.
            FailedPrecondition: it does not run.
            InvalidArgument: no command, or a bad variable or directory.
        """
        container = self._running(self._below.store.find(reference))
        if not config.command or not config.command[0]:
            raise InvalidArgument("no exec command specified", field="command")
        if any("\0" in word for word in config.command):
            raise InvalidArgument("an argument has a NUL character in it", field="command")
        validate_env(config.env)
        validate_working_dir(config.working_dir)
        record = ExecRecord(
            id=ExecId(secrets.token_hex(32)),
            container_id=container.id,
            run=container.runs,
            config=config,
        )
        await self._below.execs.put(record)
        return record.id

    async def start(self, exec_id: str) -> int:
        """Start the process; returns its pid. One that was started is left alone.

        Raises:
            NotFound: there is no such session.
            InvalidArgument: with the reason COMMAND_NOT_FOUND or COMMAND_NOT_EXECUTABLE.
            FailedPrecondition: the container does not run.
        """
        record = self._below.execs.require(exec_id)
        if record.state is not ExecState.CREATED:
            return record.pid
        container = self._running(self._below.store.require(record.container_id))
        if container.runs != record.run:
            raise FailedPrecondition(
                f"exec session {exec_id} belongs to an earlier run of container {container.name}"
            )
        with self._below.observer.timed("exec"):
            try:
                pid = await self._run(container, record)
            except TheseusError as error:
                if not isinstance(error, _PASSING):
                    await self._failed(record, error)
                raise
        started = await self._below.execs.change(record.id, lambda now: _running(now, pid))
        if started.state is ExecState.EXITED:
            self.ended(started)
        return pid

    async def wait(self, exec_id: str) -> ExitStatus:
        """How the process ended, once it has.

        Raises:
            NotFound: there is no such session, or its container has gone on without it.
        """
        record = await self._below.execs.until(exec_id, lambda now: now.state is ExecState.EXITED)
        assert record.exit is not None
        return record.exit

    def attached(self, exec_id: str) -> None:
        """Note that a client attaches: its output then goes when it has been read."""
        self._attached.add(exec_id)

    def read_to_the_end(self, exec_id: ExecId) -> bool:
        """Whether nobody else reads the output, once a session has all of it."""
        return self._sessions.count(exec_id) == 1

    def deleted(self, exec_id: ExecId) -> None:
        """Note that a session had a process deleted, all of which it had received."""
        self._below.execs.note_deleted(exec_id)

    def ended(self, record: ExecRecord) -> None:
        """Have containerd forget a process that has ended, once nobody reads its output."""
        if record.pid or record.deleted or record.state is not ExecState.EXITED:
            return
        self._by_steps.discard(record.id)
        self._background.start(self._forget(record), name=f"exec-forget-{record.id[:12]}")

    def resume(self) -> None:
        """After a start of the daemon: look after the sessions that had ended before."""
        for container in self._below.store.list_all():
            for record in self._below.execs.of(container.id):
                self.ended(record)

    async def _run(self, container: ContainerRecord, record: ExecRecord) -> int:
        init = await self._below.init_processes.of(container)
        user = await self._user(container, record.config.user)
        process = exec_process(init, self._request(container, record.config, user))
        if record.config.tty and record.config.width and record.config.height:
            process["consoleSize"] = {
                "width": record.config.width,
                "height": record.config.height,
            }
        return await self._begin(
            container.id, record.id, NewProcess(process, _stdio(record.config))
        )

    async def _begin(self, container_id: str, exec_id: str, new: NewProcess) -> int:
        """Make and start a process, over the stream of a session that waits for it if one does."""
        if exec_id in self._by_steps:
            return await self._begin_by_steps(container_id, exec_id, new)
        begin = self._sessions.begin(exec_id) or partial(self._begin_alone, container_id, exec_id)
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                pid = await begin(new)
        except TimeoutError:
            raise DeadlineExceeded(
                f"exec {exec_id} was not started within {_START_LIMIT_S:g} s"
            ) from None
        except NotFound as error:
            if error.resource != ("exec", exec_id):
                raise
            # Once it is made there, an attach would wait for its start.
            self._by_steps.add(exec_id)
            return await self._begin_by_steps(container_id, exec_id, new)
        self._sessions.made(exec_id)
        return pid

    async def _begin_alone(self, container_id: str, exec_id: str, new: NewProcess) -> int:
        target = AttachTarget(container_id, exec_id, output=False, new=new)
        async with aclosing(self._streams.attach(target, _no_input())) as outputs:
            started = await anext(outputs)
        assert isinstance(started, Started)
        return started.pid

    async def _begin_by_steps(self, container_id: str, exec_id: str, new: NewProcess) -> int:
        """As a shim of an older version has it."""
        try:
            await self._below.tasks.exec(
                container_id, exec_id, process=new.process, stdio=new.stdio
            )
        except AlreadyExists:  # an answer was lost, and the call made again
            log.debug("exec was there already", exec_id=exec_id)
        self._sessions.made(exec_id)
        return await self._below.tasks.start(container_id, exec_id)

    async def _user(self, container: ContainerRecord, user: str) -> ResolvedUser | None:
        if not user:
            return None
        mounts = await self._below.snapshots.mounts(container.id)
        return await asyncio.to_thread(lambda: resolve_user(root_layers(mounts), user))

    def _request(
        self, container: ContainerRecord, config: ExecConfig, user: ResolvedUser | None
    ) -> ExecRequest:
        configured = (*container.config.env, *container.image.config.env)
        return ExecRequest(
            args=config.command,
            env=config.env,
            working_dir=config.working_dir,
            user=user,
            home_configured=any(entry.startswith("HOME=") for entry in configured),
            tty=config.tty,
            privileged_capabilities=self._host.capabilities if config.privileged else None,
        )

    async def _failed(self, record: ExecRecord, error: TheseusError) -> None:
        code = COMMAND_CODES.get(error.reason, _CANNOT_RUN)
        status = ExitStatus(code, self._clock_ns(), error=error.message)
        failed = await self._below.execs.change(record.id, lambda now: exec_store.end(now, status))
        self.ended(failed)

    async def _forget(self, record: ExecRecord) -> None:
        if not record.config.detach and record.exit is not None and not record.exit.error:
            if record.id not in self._attached:
                await asyncio.sleep(_FORGET_AFTER_S)
            await self._sessions.finish(record.id, timeout_s=_ATTACHED_LIMIT_S)
        self._attached.discard(record.id)
        container = self._below.store.get(record.container_id)
        if container is None or not container.live or container.runs != record.run:
            return  # the whole task goes, or has gone
        if self._below.execs.is_deleted(record.id):
            return  # its last reader saw to that
        try:
            await self._below.tasks.delete(record.container_id, record.id)
            self._below.execs.note_deleted(record.id)
        except TheseusError as error:
            log.info("exec not forgotten", exec_id=record.id, error=error.message)

    def _running(self, container: ContainerRecord) -> ContainerRecord:
        if container.state is State.PAUSED:
            raise FailedPrecondition(
                f"Container {container.name} is paused, unpause the container before exec",
                resource=("container", container.id),
            )
        if container.state is not State.RUNNING:
            raise FailedPrecondition(
                f"Container {container.id} is not running", resource=("container", container.id)
            )
        return container


def _running(record: ExecRecord, pid: int) -> ExecRecord | None:
    if record.state is not ExecState.CREATED:
        return None
    return dataclasses.replace(record, state=ExecState.RUNNING, pid=pid)


async def _no_input() -> AsyncGenerator[AttachInput, None]:
    return
    yield


def _stdio(config: ExecConfig) -> Stdio:
    output = "" if config.detach else STREAM_URI
    return Stdio(
        stdin=STREAM_URI if config.open_stdin and not config.detach else "",
        stdout=output,
        stderr="" if config.tty else output,
        terminal=config.tty,
    )
