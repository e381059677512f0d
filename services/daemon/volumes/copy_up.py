"""Filling an empty volume with what the image has at the place where it is mounted."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING

from services.common.errors import Internal
from services.common.linux import openat2

if TYPE_CHECKING:
    from pathlib import Path

_COPY_TIMEOUT_S = 600


def copy_tree(root: Path, path: str, destination: Path) -> bool:
    """Copy the directory ``path``, resolved inside ``root``, into the directory ``destination``.

    Owners, modes, times, extended attributes and hard links are kept, those of the directory
    itself included. Blocks.

    Returns:
        False when there is no directory at ``path``.

    Raises:
        Internal: the copy failed; what was copied so far stays.
    """
    with ExitStack() as stack:
        root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, root_fd)
        try:
            source_fd = openat2(path, os.O_PATH, dir_fd=root_fd)
        except OSError:  # a path that the image does not have, or has in another form
            return False
        stack.callback(os.close, source_fd)
        if not stat.S_ISDIR(os.fstat(source_fd).st_mode):
            return False
        _copy(source_fd, destination)
    return True


def empty(directory: Path) -> None:
    """Remove everything in ``directory``, but not itself. Blocks."""
    for entry in list(directory.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _copy(source_fd: int, destination: Path) -> None:
    # The descriptor is inherited, so no path of the image is resolved a second time.
    source = f"/proc/self/fd/{source_fd}/."
    done = subprocess.run(
        ["cp", "--archive", "--reflink=auto", "--", source, str(destination)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(source_fd,),
        timeout=_COPY_TIMEOUT_S,
        check=False,
        text=True,
        errors="replace",
    )
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise Internal(f"copying image content into {destination} failed: {tail[0]}")
