"""``start``: leave a shim behind for a bundle, and say where it serves.

The socket is bound here and handed to a process that is forked off; containerd's calls wait in its
queue until that process is ready. So the answer need not wait for the shim's imports.

Containers of one pod share a shim: it is found by its socket, whose name stands for containerd, the
namespace, and the pod that an annotation names (else the container).

    <directory of containerd's socket>/s/theseus-<32 hex digits>    the shim
    <bundle>/address                                                where containerd 1.6 looks again
"""

from __future__ import annotations

import _socket  # socket itself takes 8 ms to import, for what is not needed here
import errno
import fcntl
import os
import sys

from services.shim.ttrpc import launcher, wire
from services.shim.ttrpc.request import (
    BOOTSTRAP,
    INPUT_MAX_BYTES,
    JSON,
    StartRequest,
    parse_request,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from services.shim.ttrpc.flags import Flags

# Upstream's, in its order.
_GROUP_ANNOTATIONS = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")
_SPEC_MAX_BYTES = 16 << 20
_SOCKET_PATH_MAX_BYTES = 107
_SHORT_DIRECTORY = "/run/theseus/s"
_BACKLOG = 128
_BOOTSTRAP_VERSION, _JSON_VERSION = 3, 2


def start(flags: Flags) -> bytes:
    """Make sure that a shim serves the bundle in the working directory; returns the answer.

    Raises:
        OSError: bundle or socket directory are not as they should be.
        ValueError: the bundle's spec, or a path, is not usable.
    """
    given = b"" if os.isatty(0) else sys.stdin.buffer.read(INPUT_MAX_BYTES)
    request = parse_request(flags, bundle=os.getcwd(), given=given, environment=os.environ)
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        # One more than containerd's own, so that the kernel takes a shim before it (as upstream).
        request.oom_score_adj = str(min(int(file.read()) + 1, 1000))
    path = socket_path(request, group_of(request.bundle) or request.id)
    with _Lock(os.path.dirname(path)) as lock:
        listener = bind(path)
        _write_address(request.bundle, f"unix://{path}")
        if listener is not None:
            launcher.launch(request, listener, lock.release)
    return answer(request.answer, f"unix://{path}")


def group_of(bundle: str) -> str:
    """The pod that the bundle's container belongs to, or empty.

    Raises:
        OSError: there is no spec.
        ValueError: it is none.
    """
    with open(os.path.join(bundle, "config.json"), "rb") as file:
        data = file.read(_SPEC_MAX_BYTES)
    # Parsed only when there is something to find: json takes 10 ms to import.
    if not any(name.encode() in data for name in _GROUP_ANNOTATIONS):
        return ""
    import json

    annotations = json.loads(data).get("annotations") or {}
    return next((annotations[name] for name in _GROUP_ANNOTATIONS if annotations.get(name)), "")


def socket_path(request: StartRequest, group: str) -> str:
    """Where the shim of a group serves; the directory is made.

    Raises:
        ValueError: containerd says no address.
    """
    if not request.address.startswith("/"):
        raise ValueError(f"-address '{request.address}' is not an absolute path")
    # blake2 of CPython's own, since hashlib loads all of OpenSSL.
    from _blake2 import blake2b

    owner = "\0".join((request.address, request.namespace, group))
    name = f"theseus-{blake2b(owner.encode(), digest_size=16).hexdigest()}"
    directory = request.socket_directory or os.path.join(os.path.dirname(request.address), "s")
    if len(os.fsencode(os.path.join(directory, name))) > _SOCKET_PATH_MAX_BYTES:
        directory = _SHORT_DIRECTORY
    os.makedirs(directory, mode=0o700, exist_ok=True)
    return os.path.join(directory, name)


def bind(path: str) -> _socket.socket | None:
    """A listening socket at ``path``; None when a shim serves there already.

    The caller holds the directory's lock: a dead shim's socket is replaced.
    """
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if _serves(path):
                listener.close()
                return None
            os.unlink(path)
            listener.bind(path)
    finally:
        os.umask(mask)
    listener.listen(_BACKLOG)
    return listener


def remove_dead(path: str) -> None:
    """Remove the socket of a shim that died; one that somebody serves is left alone."""
    if not os.path.exists(path):
        return
    with _Lock(os.path.dirname(path)):
        if not _serves(path):
            os.unlink(path)


def answer(form: str, address: str) -> bytes:
    """What containerd wants to read."""
    if form == BOOTSTRAP:
        return wire.encode([(1, _BOOTSTRAP_VERSION), (2, address.encode()), (3, b"ttrpc")])
    if form != JSON:
        return address.encode()
    import json

    return json.dumps({"version": _JSON_VERSION, "address": address, "protocol": "ttrpc"}).encode()


class _Lock:
    """Exclusive right to make sockets in a directory, until the block ends or it is released."""

    def __init__(self, directory: str) -> None:
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> _Lock:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give it up; a forked child that keeps the descriptor would hold it too."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1


def _serves(path: str) -> bool:
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        probe.connect(path)
    except OSError:
        return False
    else:
        return True
    finally:
        probe.close()


def _write_address(bundle: str, address: str) -> None:
    temporary = os.path.join(bundle, ".address.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(address)
    os.rename(temporary, os.path.join(bundle, "address"))
