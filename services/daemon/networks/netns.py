"""Network namespaces held by a mount: made, entered and deleted without a process that stays.

The service process never changes its own namespace: ``unshare`` and ``nsenter`` are children.
"""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING

from services.common.linux import MNT_DETACH, umount
from services.daemon.networks.command import run

if TYPE_CHECKING:
    from pathlib import Path

_LOOPBACK_UP = "link set lo up\n"


async def create_netns(path: Path) -> None:
    """Make a network namespace, its loopback up, and mount it on ``path``.

    A namespace that is there already is left as it is.

    Raises:
        Internal: the kernel refused.
    """
    await configure(path, "")


async def configure(path: Path, commands: str) -> None:
    """Run ``ip`` commands, one a line, in the namespace at ``path``; it is made when absent.

    Raises:
        Internal: the kernel refused one of them; those before it were done.
    """
    # The child of unshare(1) mounts the new namespace on the file before `ip` starts.
    entered = ["nsenter"] if await asyncio.to_thread(_prepare, path) else ["unshare"]
    await run([*entered, f"--net={path}", "ip", "-batch", "-"], text=_LOOPBACK_UP + commands)


async def delete_netns(path: Path) -> None:
    """Unmount and remove what is at ``path``; does nothing when there is nothing.

    The kernel destroys the namespace with its links when nobody is in it any more.
    """
    await asyncio.to_thread(_delete, path)


def exists(path: Path) -> bool:
    """Whether a namespace is mounted at ``path``; a file alone is none (after a reboot)."""
    # Path.is_mount() says no to whatever is not a directory.
    return os.path.ismount(path)


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
