"""Small files, read and written whole, by nothing but the kernel's calls.

A file object of Python's asks the kernel four things about its file, and has a buffer of 8 KiB; a
shim reads and writes two dozen small files in its life. Paths are text: to make and take apart
those of pathlib takes as long again.
"""

from __future__ import annotations

import os

_READ_BYTES = 65536


def read(path: str, limit: int = 64 << 20) -> bytes:
    """A file's content, of a longer one the first ``limit`` bytes.

    Raises:
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = b""
        # To its end: the files of proc(5) come in pieces.
        while more := os.read(fd, min(_READ_BYTES, limit - len(content))):
            content += more
    finally:
        os.close(fd)
    return content


def replace(path: str, temporary: str, content: bytes) -> None:
    """Write a file that appears whole, in place of the one that is there.

    Args:
        path: of the file.
        temporary: where it is written, in the same file system; what is there is overwritten.
        content: of the file.

    Raises:
        OSError: it cannot be written; the one that is there stays.
    """
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
    finally:
        os.close(fd)
    os.rename(temporary, path)  # noqa: PTH104
