"""Executes another version of the shim in place, and takes over from the one before.

    old image   self-check of the new program · gate closed · all work under way ended · output
                paused · state into a memfd · execve(2)
    new image   state read, objects rebuilt, nothing read or reaped yet · the listening socket
                served again · commit · children reaped, output goes on

The process stays the same to the kernel: pid, start time, children, being a subreaper, ignored
signals. Children that end in between are zombies until the new image reaps them. The listening
socket is the same, too: who connects meanwhile waits in its queue.

Up to the commit a failure of the new image, or its silence, is answered by executing the old
program with the same state; that is its guard's work (:func:`take_over`). A new image that dies
before it has a guard leaves a dead shim, which containerd has a successor for.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import structlog

from services.common import VERSION, linux, tracing
from services.common.errors import FailedPrecondition, InvalidArgument, Unavailable
from services.common.frozen import frozen
from services.shim import handover
from services.shim.runtimes import invocation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from services.shim.reaper import Reaper
    from services.shim.rpc.gate import Gate
    from services.shim.tasks import Tasks

log = structlog.get_logger(__name__)

_MODULE = (sys.executable, "-m", "services.shim")
OWN_PROGRAM = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r}); "
    "from services.shim.__main__ import main; main()",
)
"""How to run the code that runs now, wherever it lies and from whatever directory."""

_CHECK_LIMIT_S = 20.0
_QUIET_LIMIT_S = 60.0
_WORDS_MAX = 500


@frozen
class Attempt:
    """The last re-execution of this process.

    Attributes:
        generation: its number; 0: there was none.
        failure: why it was rolled back, or empty.
        downtime_us: time for which nothing was read.
    """

    generation: int = 0
    failure: str = ""
    downtime_us: int = 0


class Reexecution:
    """Re-executes this process on request.

    Args:
        gate: holds calls back meanwhile.
        tasks: whose work has to end first.
        reaper: runs the self-check.
        attempt: the one that made this image.
        pack: makes the document, with the given basis, once all is quiet.
        needs: the format that this would have now.
    """

    def __init__(
        self,
        *,
        gate: Gate,
        tasks: Tasks,
        reaper: Reaper,
        attempt: Attempt,
        pack: Callable[[handover.Outgoing], dict[str, Any]],
        needs: Callable[[], int],
    ) -> None:
        self.attempt = attempt
        self._gate = gate
        self._tasks = tasks
        self._reaper = reaper
        self._pack = pack
        self._format = needs
        self._lock = asyncio.Lock()

    async def request(self, program: Sequence[str], generation: int) -> Attempt:
        """Re-execute, or say how it went if that generation is reached.

        Raises:
            InvalidArgument: the generation is not the next one.
            FailedPrecondition: the program is no good, or was rolled back.
            Unavailable: work under way does not end.
        """
        async with self._lock:
            if generation == self.attempt.generation and generation:
                if self.attempt.failure:
                    raise FailedPrecondition(self.attempt.failure)
                return self.attempt
            if generation != self.attempt.generation + 1:
                raise InvalidArgument(
                    f"generation {self.attempt.generation + 1} is the next one, not {generation}",
                    field="generation",
                )
            program = tuple(program) or OWN_PROGRAM
            if program == _MODULE:  # out of a source tree, where no directory is "installed"
                program = OWN_PROGRAM
            await self._check(program)
            try:
                await self._quieten()
                self._execute(program)
            finally:  # it did not happen
                self._tasks.go_on()
                self._gate.open()

    async def _check(self, program: Sequence[str]) -> None:
        """Have the new program say that it could take over."""
        outcome = await invocation.run(
            self._reaper,
            [*program, "reexec", "--check"],
            stdio=None,
            timeout_s=_CHECK_LIMIT_S,
        )
        try:
            if not outcome.succeeded:
                raise ValueError(outcome.in_words())
            said = json.loads(outcome.output)
            understood = said.get("formats") or [said["format"]]
            if (needed := self._format()) not in understood:
                raise ValueError(
                    f"version {said['version']} understands handovers of format {understood}, "
                    f"this shim's is {needed}"
                )
        except (ValueError, KeyError, TypeError) as error:
            tail = " ".join(outcome.output.split())[-_WORDS_MAX:]
            raise FailedPrecondition(
                f"{program[0]} fails its self-check ({error}): {tail or 'it said nothing'}"
            ) from error
        log.info("program passes its self-check", program=program, version=said["version"])

    async def _quieten(self) -> None:
        try:
            async with asyncio.timeout(_QUIET_LIMIT_S):
                await self._gate.close()
                await self._tasks.quiet()
        except TimeoutError as error:
            raise Unavailable(
                f"work of the shim has not ended within {_QUIET_LIMIT_S:.0f} s: try again later"
            ) from error

    def _execute(self, program: Sequence[str]) -> NoReturn:
        out = handover.Outgoing()
        document = {
            **self._pack(out),
            "fds": out.fds,
            "program": OWN_PROGRAM,
            "version": VERSION,
            "generation": self.attempt.generation + 1,
            "paused_at_ns": time.monotonic_ns(),
        }
        log.info("shim executes its successor", program=program, fds=len(out.fds))
        state = handover.write(document)
        try:
            execute(program, state, out.fds)
        except OSError as error:
            os.close(state)
            raise FailedPrecondition(
                f"{program[0]} cannot be executed: {error.strerror}"
            ) from error


def execute(
    program: Sequence[str], state: int, fds: Sequence[int], *, failure: str = ""
) -> NoReturn:
    """Replace this process' image; its descriptors in ``fds`` and ``state`` stay open.

    Args:
        program: absolute path, and arguments before the subcommand.
        state: the memfd.
        fds: what it names.
        failure: why a newer version is rolled back by this.

    Raises:
        OSError: it cannot be executed, and all is as before.
    """
    arguments = [*program, "reexec", "--state", str(state)]
    if failure:
        arguments += ["--failure", failure]
    tracing.flush()
    handover.keep_over_exec(fds, keep=True)
    try:
        os.execv(program[0], arguments)
    finally:
        handover.keep_over_exec(fds, keep=False)


def check() -> str:
    """What ``reexec --check`` prints, once all that a shim needs can be imported."""
    import services.shim.factory  # noqa: F401 - the import is the check

    return json.dumps({"version": VERSION, "format": handover.FORMAT, "formats": handover.FORMATS})


class Successor:
    """The guard of a new image: until ``commit`` the old program is executed if anything fails.

    Attributes:
        document: what was handed over.
        attempt: the one that made this image; its downtime is set by ``commit``.
    """

    def __init__(self, state: int, failure: str) -> None:
        self.document = handover.read(state)
        self.attempt = Attempt(self.document["generation"], failure)
        self._state = state
        self._failure = failure
        self._lock = threading.Lock()
        self._committed = False  # guarded by _lock
        handover.keep_over_exec([state, *self.document["fds"]], keep=False)
        self._limit_s = float(self.document["config"]["come_up_limit_s"])
        self._timer = threading.Timer(self._limit_s, self._late)
        self._timer.daemon = True
        self._timer.start()

    def listener(self) -> socket.socket | None:
        """The listening socket; None where the image before could not find it."""
        fd = self.document["listener"]
        return socket.socket(fileno=fd) if fd >= 0 else None

    def commit(self) -> None:
        """This image serves: there is no way back."""
        with self._lock:
            self._committed = True
            self._timer.cancel()
        os.close(self._state)
        downtime_us = (time.monotonic_ns() - self.document["paused_at_ns"]) // 1000
        self.attempt = Attempt(self.attempt.generation, self._failure, downtime_us)

    def roll_back(self, reason: str) -> None:
        """Execute the old program, unless this image serves, or is the old program already."""
        with self._lock:
            if self._committed or self._failure:
                return
            os.set_inheritable(self._state, True)
            failure = f"version {VERSION} did not come up and was rolled back: {reason}"
            log.error("shim is rolled back", reason=reason)
            # If even that fails, the process ends, and containerd has a successor for it.
            execute(self.document["program"], self._state, self.document["fds"], failure=failure)

    def _late(self) -> None:
        self.roll_back(f"it did not serve within {self._limit_s:g} s")


def take_over(state: int, failure: str, run: Callable[[Successor], Awaitable[None]]) -> None:
    """Be the successor that ``state`` is for; ``run`` serves to the shim's end."""
    linux.set_process_name("theseus-shim")
    successor = Successor(state, failure)
    try:
        asyncio.run(_await(run(successor)))
    except Exception as error:
        log.error("shim failed", exc_info=error)
        successor.roll_back(f"{type(error).__name__}: {error}")
        raise


async def _await(work: Awaitable[None]) -> None:
    await work
