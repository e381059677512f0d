"""Blobs' files: put in place and taken away. Everything here blocks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def install(data: Path, target: Path) -> None:
    """Rename a sealed file to where its blob belongs, for good."""
    if not target.parent.is_dir():
        target.parent.mkdir(mode=0o711, exist_ok=True)
        _sync_directory(target.parent.parent)
    data.rename(target)
    _sync_directory(target.parent)


def unlink(path: Path) -> int:
    """Remove a blob's file; returns how many bytes that freed."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
