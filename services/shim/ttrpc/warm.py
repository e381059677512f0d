"""The warm process: it has everything imported that a shim needs, and forks one for each ``start``.

Importing takes 100 ms and more, a fork a few. The first ``start`` leaves this process behind; it
ends when nobody has asked for a while, and the next ``start`` leaves another one. It is
single-threaded, holds nothing beyond a request, and no shim needs it.

    <directory of the shims' sockets>/warm-<32 hex digits>

stands for this version of the code, and for the namespaces and cgroups that it runs in. A request
is one packet, with the shim's listening socket as a descriptor; the answer is one byte.
"""

from __future__ import annotations

import _socket  # as in bootstrap.py
import errno
import os
import sys

from services.common import VERSION
from services.shim.ttrpc.request import StartRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IDLE_LIMIT_S = 60.0
_REQUEST_MAX_BYTES = 64 << 10
_REQUEST_LIMIT_S = 1.0
_ANSWER_LIMIT_S = 10.0
_BACKLOG = 128
_DONE = b"1"
_FD_BYTES = 4
_NAMESPACES = ("mnt", "pid", "net", "user", "ipc", "uts", "cgroup")


class Warm:
    """Either a connection to the warm process, or the socket that one is to serve."""

    __slots__ = ("connection", "listener", "path")

    def __init__(self, directory: str) -> None:
        """Find out which; the caller holds the directory's lock, so that there will be one."""
        self.path = path_in(directory)
        self.listener: _socket.socket | None = None
        self.connection: _socket.socket | None = _packets()
        try:
            self.connection.connect(self.path)
        except OSError:
            self.connection.close()
            self.connection = None
            self.listener = _listen(self.path)

    def ask(self, request: StartRequest, listener: _socket.socket) -> bool:
        """Have it fork a shim; returns whether it did."""
        if self.connection is None:
            return False
        self.connection.settimeout(_ANSWER_LIMIT_S)
        rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _pack_fd(listener.fileno()))
        try:
            self.connection.sendmsg([request.to_bytes()], [rights])
            return self.connection.recv(1) == _DONE
        except OSError:  # it just ended
            return False
        finally:
            self.connection.close()


def path_in(directory: str) -> str:
    """Where the warm process for this code and these surroundings serves."""
    from _blake2 import blake2b

    code = os.stat(__file__)
    facts = [VERSION, sys.executable, __file__, str(code.st_mtime_ns), str(code.st_ino)]
    facts += [os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES]
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        facts.append(file.read())
    digest = blake2b("\0".join(facts).encode(), digest_size=16).hexdigest()
    return os.path.join(directory, f"warm-{digest}")


class WarmProcess:
    """Serves requests until nobody asks any more.

    Args:
        listener: the socket, listening.
        become: makes this process, just forked, the shim of a request; does not return.
        idle_limit_s: time without a request after which to end.
    """

    def __init__(
        self,
        listener: _socket.socket,
        become: Callable[[StartRequest, int], None],
        *,
        idle_limit_s: float = IDLE_LIMIT_S,
    ) -> None:
        self._listener = listener
        self._become = become
        self._idle_limit_s = idle_limit_s
        self._path = str(listener.getsockname())
        self._inode = os.stat(self._path).st_ino
        import signal

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children

    def run(self) -> None:
        """Serve; the caller has imported what shims need."""
        import select

        self._listener.setblocking(False)
        while select.select([self._listener], [], [], self._idle_limit_s)[0]:
            self._accept()
        self._unlink()
        # Who connected before that is still served.
        while select.select([self._listener], [], [], 0)[0]:
            self._accept()
        self._listener.close()

    def fork(self, request: StartRequest, listener: int, *others: _socket.socket) -> None:
        """Fork a shim, which gets ``listener`` and none of ``others``; it is closed here."""
        if os.fork() == 0:
            for mine in (self._listener, *others):
                mine.close()
            self._become(request, listener)
            os._exit(1)
        os.close(listener)

    def _accept(self) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]  # what accept() calls
        except OSError:
            return
        connection = _socket.socket(fileno=fd)
        try:
            connection.settimeout(_REQUEST_LIMIT_S)
            self._serve(connection)
        except (OSError, ValueError):
            pass  # it asks another way
        finally:
            connection.close()

    def _serve(self, connection: _socket.socket) -> None:
        data, rights, _, _ = connection.recvmsg(
            _REQUEST_MAX_BYTES, _socket.CMSG_SPACE(_FD_BYTES), _socket.MSG_CMSG_CLOEXEC
        )
        fds = [_unpack_fd(value) for _, _, value in rights if len(value) == _FD_BYTES]
        if len(fds) != 1:
            return
        try:
            request = StartRequest.from_bytes(data)
        except ValueError:
            os.close(fds[0])
            raise
        self.fork(request, fds[0], connection)
        connection.send(_DONE)

    def _unlink(self) -> None:
        try:
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass


def _listen(path: str) -> _socket.socket | None:
    """A listening socket in the place of one that nobody serves; None if that cannot be."""
    listener = _packets()
    mask = os.umask(0o177)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            os.unlink(path)
            listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        return None
    finally:
        os.umask(mask)
    return listener


def _packets() -> _socket.socket:
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)


def _pack_fd(fd: int) -> bytes:
    return fd.to_bytes(_FD_BYTES, sys.byteorder)


def _unpack_fd(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)
