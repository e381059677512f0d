"""Layers made in memory, and what a directory looks like after one was unpacked into it."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.containerd.diff.apply import LayerApplier
from services.containerd.diff.limits import DEFAULT_LIMITS, Limits
from services.containerd.diff.reader import Entry, TarReader
from services.containerd.diff.stream import LayerStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a layer to be."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: float = 1_500_000_000
    link: str = ""
    device: tuple[int, int] = (0, 0)
    pax: Mapping[str, str] = field(default_factory=dict)


def folder(name: str, mode: int = 0o755, **more: object) -> Member:
    return Member(name, type=tarfile.DIRTYPE, mode=mode, **more)  # type: ignore[arg-type]


def symlink(name: str, target: str) -> Member:
    return Member(name, type=tarfile.SYMTYPE, link=target, mode=0o777)


def hardlink(name: str, target: str) -> Member:
    return Member(name, type=tarfile.LNKTYPE, link=target)


def layer(members: Iterable[Member], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type = member.type
            info.mode = member.mode
            info.uid, info.gid = member.uid, member.gid
            info.mtime = member.mtime
            info.linkname = member.link
            info.devmajor, info.devminor = member.device
            info.size = len(member.data)
            info.pax_headers = dict(member.pax)
            tar.addfile(info, io.BytesIO(member.data))
    return buffer.getvalue()


def read(data: bytes, limits: Limits = DEFAULT_LIMITS) -> list[Entry]:
    """The entries of a layer, which may be compressed."""
    with LayerStream(io.BytesIO(data), limits) as stream:
        entries = list(TarReader(stream, limits))
        stream.drain()
    return entries


def unpack(
    data: bytes,
    root: Path,
    *,
    overlay: bool = False,
    lower: Iterable[Path] = (),
    detached: bool = False,
) -> str:
    """Unpack a layer as the worker does, without one; returns the diff id."""
    umask = os.umask(0)
    try:
        with (
            LayerStream(io.BytesIO(data), DEFAULT_LIMITS) as stream,
            LayerApplier(root, overlay=overlay, lower=list(lower), detached=detached) as applier,
        ):
            applier.apply(TarReader(stream, DEFAULT_LIMITS))
            stream.drain()
        return stream.digest
    finally:
        os.umask(umask)


def looks(root: Path, *, times: bool = True) -> dict[str, tuple[object, ...]]:
    """Everything that is to be seen of the tree below a directory, itself left out."""
    seen: dict[str, tuple[object, ...]] = {}
    inodes: dict[int, str] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        name = os.fsencode(path.relative_to(root)).hex()
        content = ""
        if stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        is_directory = stat.S_ISDIR(status.st_mode)
        seen[name] = (
            path.relative_to(root),
            oct(status.st_mode),
            status.st_uid,
            status.st_gid,
            0 if is_directory else status.st_size,
            status.st_mtime_ns if times else 0,
            status.st_rdev,
            content,
            "" if is_directory else inodes.setdefault(status.st_ino, name),
            {
                attribute: os.getxattr(path, attribute, follow_symlinks=False)
                for attribute in os.listxattr(path, follow_symlinks=False)
            },
        )
    return seen
