"""The FIFO at which init of runc and crun waits for ``start``: opened here, without the program.

Both make ``exec.fifo`` beside what they know of a container, and take it for created as long as the
FIFO is there. Init of runc waits until somebody reads from it, and writes a byte; init of crun
waits to read one (runc 1.0 to 1.5: libcontainer's ``Container.exec``; crun 1.8 to 1.29: libcrun's
``libcrun_status_write_exec_fifo``). ``start`` does the other half of that, removes the FIFO, and
runs the hooks ``poststart``. Without hooks a program of 5 to 15 ms of processor time does the work
of three calls of the kernel, which are made here instead.

    <state of the container>/exec.fifo     it waits
                             status        crun made it
                             state.json    runc made it

Whatever is not as it is known to be is left to the program, which does it or says what is wrong.
The FIFO is removed last: one that dies before that leaves a container that runs, and that the
program takes for created, as the program itself would.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from services.shim.futures import finish

if TYPE_CHECKING:
    from pathlib import Path

PROGRAMS = ("runc", "crun")
"""Those whose FIFO it is; a program of another name may do more in ``start``."""

_NAME = "exec.fifo"
_STATUS_OF_CRUN = "status"
_STATE_OF_RUNC = "state.json"
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_WORD_S = 1.0
_WORD_MAX_BYTES = 16


async def let_go(state: Path) -> bool:
    """Let the init go on that waits at the FIFO in a container's state directory.

    Returns:
        False: nobody waits there, as far as can be told.
    """
    fifo = state / _NAME
    try:
        if _is_there(state / _STATUS_OF_CRUN):
            _write(fifo)
        elif _is_there(state / _STATE_OF_RUNC):
            await _read(fifo)
        else:
            return False
    except (OSError, TimeoutError):
        return False
    fifo.unlink(missing_ok=True)
    return True


def _is_there(path: Path) -> bool:
    return path.exists()


def _write(fifo: Path) -> None:
    """Give init the byte that it waits for; ENXIO: it does not."""
    fd = os.open(fifo, os.O_WRONLY | _FLAGS)
    try:
        os.write(fd, b"\0")
    finally:
        os.close(fd)


async def _read(fifo: Path) -> None:
    """Have init open the FIFO, and see that it did.

    Raises:
        OSError: there is none, or init died over it.
        TimeoutError: init has ended, or has gone on before.
    """
    loop = asyncio.get_running_loop()
    fd = os.open(fifo, os.O_RDONLY | _FLAGS)
    has_come: asyncio.Future[None] = loop.create_future()
    try:
        loop.add_reader(fd, finish, has_come, None)
        async with asyncio.timeout(_WORD_S):
            await has_come
        if not os.read(fd, _WORD_MAX_BYTES):
            raise BrokenPipeError
    finally:
        loop.remove_reader(fd)
        os.close(fd)
