"""Forks the process that stays, and makes a shim of it."""

from __future__ import annotations

import os
import stat
import sys

from services.shim.ttrpc.warm import Warm, WarmProcess

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable
    from typing import NoReturn

    from services.shim.ttrpc.request import StartRequest


def launch(request: StartRequest, listener: _socket.socket, release: Callable[[], None]) -> None:
    """Leave a shim behind that serves ``listener``.

    A process that has everything imported forks it, if there is one; else such a process is left
    behind, and the shim is the first that it forks.

    Args:
        request: what the shim is told.
        listener: its socket, listening.
        release: gives up the lock of the socket's directory, which must not be inherited.
    """
    warm = Warm(os.path.dirname(str(listener.getsockname())))
    release()
    if warm.ask(request, listener):
        return
    if os.fork() == 0:
        _become_warm(request, listener.detach(), warm.listener)


def become_shim(request: StartRequest, listener: int) -> NoReturn:
    """Be the shim, to its end; never returns to the caller's code."""

    def work() -> None:
        detach(request)
        from services.shim.ttrpc.app import run

        run(request, listener)

    _do_and_exit(work)


def _become_warm(request: StartRequest, listener: int, requests: _socket.socket | None) -> NoReturn:
    """Import everything, fork the shim, and go on to fork others if there is a socket for that."""

    def work() -> None:
        detach(request)
        # Imported when containerd has its answer already.
        from services.shim import packing, spared_imports

        spared_imports.leave_out()
        packing.share_one_heap()
        from services.common import linux
        from services.shim.ttrpc.app import run

        spared_imports.let_in()
        if requests is None:
            run(request, listener)
            return
        linux.set_process_name("theseus-warm")
        warm = WarmProcess(requests, become_shim)
        warm.fork(request, listener)
        _close_log()
        # After the first shim, which somebody waits for.
        packing.pack()
        warm.run()

    _do_and_exit(work)


def _do_and_exit(work: Callable[[], None]) -> NoReturn:
    status = 1
    try:
        work()
        status = 0
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        os._exit(status)


def detach(request: StartRequest) -> None:
    """Leave containerd's session and streams: it waits for the end of its pipes."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    os.setsid()
    import signal  # with enum 5 ms, which containerd need not wait for

    for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    _close_log()
    sys.stderr = LogPipe(request.bundle)
    os.chdir("/")
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(request.oom_score_adj)
    except OSError as error:
        sys.stderr.write(f"oom_score_adj cannot be set: {error.strerror}\n")


def _close_log() -> None:
    if isinstance(sys.stderr, LogPipe):
        sys.stderr.close()
        sys.stderr = None


class LogPipe:
    """The bundle's FIFO ``log``, which containerd copies to its own log; else a file ``shim.log``.

    A containerd that is down does not read. Then the FIFO keeps what fits, which its successor
    will read, and the rest is dropped: a shim never waits for it.
    """

    encoding = "utf-8"

    def __init__(self, bundle: str) -> None:
        path = os.path.join(bundle, "log")
        try:
            is_fifo = stat.S_ISFIFO(os.stat(path).st_mode)
        except FileNotFoundError:
            is_fifo = False
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        if is_fifo:
            # For reading too: then the opening waits for nobody (fifo(7)), and nothing is lost
            # between two containerds.
            self._fd = os.open(path, os.O_RDWR | flags)
        else:
            path = os.path.join(bundle, "shim.log")
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | flags, 0o640)

    def write(self, text: str) -> int:
        """Write what fits."""
        try:
            os.write(self._fd, text.encode(errors="backslashreplace"))
        except OSError:
            pass
        return len(text)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        """It is none."""
        return False

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd
