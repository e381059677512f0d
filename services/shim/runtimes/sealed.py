"""Programs of runtimes in sealed memory, where they need not protect themselves first.

A container must not write to the program that made it (CVE-2019-5736). So runc and crun bind-mount
their file read-only, take that mount away again, and execute themselves a second time out of it:
crun for each of its commands, runc in each ``create`` and ``exec``. A program that runs from a
memfd with all seals (memfd_create(2)) is one that nobody can write to, and they leave all that out:
4 ms of processor time for a container with crun, and no turn at the kernel's lock on mounts.

A copy lies in huge pages, as far as it fills them: each process of runc then has a few entries in
its page tables made for it, and not some hundred for which it traps into the kernel.

The factory makes the copies, anew when a file has been replaced, and its shims inherit their
descriptors, so there is one of each. A shim that finds its copy to be an old one, or has none since
it was not forked, or has executed itself anew, executes the file.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.common import linux
from services.common.frozen import frozen
from services.shim.runtimes.programs import identity

if TYPE_CHECKING:
    from collections.abc import Iterable

log = structlog.get_logger(__name__)

PROGRAMS = ("runc", "crun")
"""Those that look for seals."""

_NAME = "runc_cloned:/proc/self/exe"  # as they call their own copies: who lists processes knows it
_MFD_EXEC = 0x10  # linux/memfd.h, since Linux 6.3
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_ELF = b"\x7fELF"
_SIZE_MAX_BYTES = 64 << 20
_HUGE_PAGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


@frozen
class _Copy:
    """Of the file that had that identity, in a descriptor of this process."""

    identity: tuple[int, int, int, int]
    fd: int


_copies: dict[str, _Copy] = {}


def keep(paths: Iterable[str]) -> None:
    """Copy programs for this process and those that it forks. Blocks for some milliseconds."""
    for path in paths:
        try:
            copy = _seal(path)
        except OSError as error:
            log.info("runtime is executed from its file", path=path, error=error.strerror)
            continue
        if copy is not None:
            _copies[path] = copy


def renew() -> None:
    """Copy anew what has been replaced since; a look at each file otherwise."""
    for path, copy in list(_copies.items()):
        if executable(path) == path:
            del _copies[path]
            os.close(copy.fd)
            keep([path])


def executable(path: str) -> str:
    """What to execute in the place of a program: its copy, or the program itself."""
    copy = _copies.get(path)
    if copy is None:
        return path
    try:
        found = os.stat(path)  # noqa: PTH116 - called for each command of a runtime
    except OSError:  # whoever executes it will say so
        return path
    return f"/proc/self/fd/{copy.fd}" if identity(found) == copy.identity else path


def _seal(path: str) -> _Copy | None:
    """A sealed copy; None of what is not worth one.

    Raises:
        OSError: the file cannot be read, or memory may not be executed here.
    """
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        before = os.fstat(source)
        if os.pread(source, len(_ELF), 0) != _ELF or before.st_size > _SIZE_MAX_BYTES:
            return None
        fd = _new_memory()
        try:
            while os.sendfile(fd, source, None, before.st_size):
                pass
            if identity(os.fstat(source)) != identity(before):
                raise OSError(errno.EBUSY, "it was written to while it was read")
            os.fchmod(fd, 0o500)
            _collapse(fd, before.st_size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return _Copy(identity(before), fd)
    finally:
        os.close(source)


def _collapse(fd: int, size: int) -> None:
    """Have it kept in huge pages, where the kernel has them; not once it is sealed."""
    try:
        huge = int(_HUGE_PAGE.read_text())
        # There is nothing of it in the last one, or little: that would be memory for nothing.
        length = size // huge * huge
        if not length:
            return
        place = linux.mmap(0, length + huge, linux.PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1)
        try:
            start = -place % huge + place
            linux.mmap(start, length, mmap.PROT_READ, mmap.MAP_SHARED | linux.MAP_FIXED, fd)
            linux.madvise(start, length, linux.MADV_COLLAPSE)
        finally:
            linux.munmap(place, length + huge)
    except OSError as error:  # a kernel older than 6.1, or no memory in one piece
        log.debug("runtime is not in huge pages", error=error.strerror)


def _new_memory() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(_NAME, flags | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(_NAME, flags)  # an older kernel: all memory may be executed
