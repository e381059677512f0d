"""Small disks: a file, a file system in it, mounted through a loop device."""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def small_disk(directory: Path, *mkfs: str, size_bytes: int, name: str = "disk") -> Iterator[Path]:
    """A new file system, mounted below ``directory`` while the context lasts."""
    image, place = directory / "disk.img", directory / name
    with image.open("wb") as file:
        file.truncate(size_bytes)
    place.mkdir()
    subprocess.run([*mkfs, str(image)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        image.unlink()


def fill(file: Path) -> None:
    """Write a file until the disk has not a byte left."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while os.write(fd, bytes(size)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    finally:
        os.close(fd)
