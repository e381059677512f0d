"""Network namespaces held by a mount: made, entered and deleted without a process that stays.

A namespace belongs to a thread. What has to be done inside of one is done by a thread that is made
for it, enters and ends with it: never by one of a pool, and the thread that runs the event loop
stays where it is.
"""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING

from services.common.errors import Internal
from services.common.linux import CLONE_NEWNET, MNT_DETACH, MS_BIND, mount, setns, umount, unshare
from services.daemon.networks.command import to_end
from services.daemon.networks.rtnetlink import Rtnetlink

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


async def inside(path: Path, work: Callable[[], None]) -> None:
    """Call ``work`` in a thread that is in the namespace at ``path``, which is made when absent.

    Its loopback is up. The thread is waited for even when the caller is cancelled.

    Raises:
        Internal: the kernel refused; and whatever ``work`` raises.
    """
    done: Future[None] = Future()

    def enter() -> None:
        try:
            _enter(path)
            with Rtnetlink() as kernel:
                kernel.set_up("lo")
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    Thread(target=enter, name="netns").start()
    await to_end(asyncio.wrap_future(done))


async def delete_netns(path: Path) -> None:
    """Unmount and remove what is at ``path``; does nothing when there is nothing.

    The kernel destroys the namespace with its links when nobody is in it any more.
    """
    await asyncio.to_thread(_delete, path)


def exists(path: Path) -> bool:
    """Whether a namespace is mounted at ``path``; a file alone is none (after a reboot)."""
    # Path.is_mount() says no to whatever is not a directory.
    return os.path.ismount(path)


def _enter(path: Path) -> None:
    """Have this thread, which belongs to nobody else, enter the namespace at ``path``."""
    try:
        if _prepare(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(descriptor, CLONE_NEWNET)
            finally:
                os.close(descriptor)
        else:
            # A crash in between leaves a file without a namespace, as a reboot does.
            unshare(CLONE_NEWNET)
            mount("/proc/thread-self/ns/net", path, flags=MS_BIND)
    except OSError as error:
        raise Internal(f"cannot make network namespace {path}: {error.strerror}") from error


def _prepare(path: Path) -> bool:
    if exists(path):
        return True
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    path.touch(mode=0o444)
    return False


def _delete(path: Path) -> None:
    while True:
        try:
            umount(path, MNT_DETACH)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EINVAL:  # not a mount point (any more)
                raise
            path.unlink(missing_ok=True)
            return
