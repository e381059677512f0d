"""Named volumes: directories of the host that outlive containers.

    <root>/<name>/_data       what containers see
    <root>/.removed-<random>  on its way out

A directory is made before its row, and a row deleted before its directory; :meth:`restore` removes
directories that have no row. Who uses a volume is the caller's knowledge: removal asks for it
inside its own transaction, so that a container recorded at the same time is seen.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import time
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import structlog

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.common.frozen import frozen
from services.daemon.metadata import volumes as rows
from services.daemon.volumes import copy_up
from services.daemon.volumes.mounts import (
    MountType,
    resolve_bind,
    resolve_tmpfs,
    resolve_volume,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from services.common.database import Database
    from services.daemon.volumes.mounts import Mount, ResolvedMount

log = structlog.get_logger(__name__)

DRIVER = "local"
ANONYMOUS_LABEL = "com.docker.volume.anonymous"
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_REMOVED_PREFIX = ".removed-"
_NAME_MAX = 255  # of a directory entry


@frozen
class Volume:
    """One volume; ``mountpoint`` is its directory on the host."""

    name: str
    mountpoint: Path
    labels: Mapping[str, str]
    anonymous: bool
    created_at_ns: int
    driver: str = DRIVER


class VolumeInUse(FailedPrecondition):
    """Containers still use the volume."""


class VolumeStore:
    """The volumes of one engine, below ``root``."""

    def __init__(self, db: Database, root: Path) -> None:
        self._db = db
        self._root = root
        # One per name, gone when nobody holds it or waits for it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def create(
        self, name: str = "", *, labels: Mapping[str, str] | None = None, driver: str = ""
    ) -> Volume:
        """Make a volume; one that exists is returned as it is.

        Args:
            name: empty makes an anonymous one with a random name.
            labels: of a new volume.
            driver: empty, or ``local``.

        Raises:
            InvalidArgument: a bad name.
            NotFound: another driver.
        """
        if driver not in ("", DRIVER):
            raise NotFound(f'plugin "{driver}" not found', resource=("volume driver", driver))
        anonymous = not name
        name = name or secrets.token_hex(32)
        validate_name(name)
        tags = dict(labels or {})
        if anonymous:
            tags[ANONYMOUS_LABEL] = ""
        async with self._lock(name):
            existing = await self._db.read(partial(rows.get, name=name))
            if existing is not None:
                return self._volume(existing)
            await asyncio.to_thread(self._make_directory, name)
            row = rows.VolumeRow(name, DRIVER, tags, {}, anonymous, False, time.time_ns())
            await self._db.write(partial(rows.insert, row=row))
        log.info("volume created", volume=name, anonymous=anonymous)
        return self._volume(row)

    async def get(self, name: str) -> Volume:
        """One volume.

        Raises:
            NotFound: there is none of this name.
        """
        row = self._db.look(partial(rows.get, name=name))
        if row is None:
            raise _not_found("get", name)
        return self._volume(row)

    async def list_all(self) -> list[Volume]:
        """All volumes by name."""
        return [self._volume(row) for row in await self._db.read(rows.list_all)]

    async def remove(
        self,
        name: str,
        *,
        users: Callable[[sqlite3.Connection, str], Sequence[str]],
        force: bool = False,
    ) -> None:
        """Remove a volume and all that is in it.

        Args:
            name: of the volume.
            users: tells, from inside the transaction, the ids of the containers that use it.
            force: do nothing when there is no such volume.

        Raises:
            NotFound: there is none of this name.
            VolumeInUse: a container uses it.
        """

        def forget(tx: sqlite3.Connection) -> bool:
            if rows.get(tx, name) is None:
                return False
            used_by = users(tx, name)
            if used_by:
                raise VolumeInUse(
                    f"remove {name}: volume is in use - [{', '.join(used_by)}]",
                    resource=("volume", name),
                )
            rows.delete(tx, name)
            return True

        async with self._lock(name):
            if not await self._db.write(forget):
                if force:
                    return
                raise _not_found("remove", name)
            await asyncio.to_thread(self._remove_directory, name)
        log.info("volume removed", volume=name)

    async def resolve(self, mount: Mount) -> ResolvedMount:
        """Turn a mount that was validated into one that can be made, creating what it needs.

        A volume that does not exist is created, an anonymous one each time.

        Raises:
            InvalidArgument: a bad volume name, or a bind source that does not exist.
        """
        if mount.type is MountType.BIND:
            return await asyncio.to_thread(resolve_bind, mount)
        if mount.type is MountType.TMPFS:
            return resolve_tmpfs(mount)
        volume = await self.create(mount.source)
        return resolve_volume(mount, name=volume.name, mountpoint=volume.mountpoint)

    async def copy_up(self, name: str, *, root: Path, path: str) -> None:
        """Fill an empty volume with the directory ``path`` of an image whose root is ``root``.

        A volume that has content is left alone; a copy that was interrupted is begun anew.

        Raises:
            NotFound: there is no such volume.
            Internal: the copy failed.
        """
        async with self._lock(name):
            row = await self._db.read(partial(rows.get, name=name))
            if row is None:
                raise _not_found("get", name)
            data = self._data(name)
            if row.copying:
                await asyncio.to_thread(copy_up.empty, data)
            elif await asyncio.to_thread(_has_entries, data):
                return
            await self._db.write(partial(rows.set_copying, name=name, copying=True))
            await asyncio.to_thread(copy_up.copy_tree, root, path, data)
            await self._db.write(partial(rows.set_copying, name=name, copying=False))

    async def restore(self) -> None:
        """Bring directories in line with the rows. Call once, before anything else."""
        known = {row.name for row in await self._db.read(rows.list_all)}
        for name in known:
            if not self._data(name).exists():
                log.warning("volume had lost its directory", volume=name)
                await asyncio.to_thread(self._make_directory, name)
        leftovers = await asyncio.to_thread(self._leftovers, known)
        for path in leftovers:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
            log.info("leftover volume removed", path=str(path))

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _volume(self, row: rows.VolumeRow) -> Volume:
        return Volume(
            row.name, self._data(row.name), row.labels, row.anonymous, row.created_at_ns, row.driver
        )

    def _data(self, name: str) -> Path:
        return self._root / name / "_data"

    def _make_directory(self, name: str) -> None:
        self._root.mkdir(mode=0o711, parents=True, exist_ok=True)
        (self._root / name).mkdir(mode=0o711, exist_ok=True)
        self._data(name).mkdir(mode=0o755, exist_ok=True)
        _sync_directory(self._root / name)
        _sync_directory(self._root)

    def _remove_directory(self, name: str) -> None:
        # Renamed first: a volume of the same name may be created while the content goes.
        removed = self._root / f"{_REMOVED_PREFIX}{secrets.token_hex(8)}"
        try:
            (self._root / name).rename(removed)
        except FileNotFoundError:
            return
        shutil.rmtree(removed, ignore_errors=True)

    def _leftovers(self, known: set[str]) -> list[Path]:
        if not self._root.exists():
            return []
        return [path for path in self._root.iterdir() if path.name not in known]


def validate_name(name: str) -> None:
    """Check a volume's name.

    Raises:
        InvalidArgument: too short, too long, or with other characters than are allowed.
    """
    if len(name) == 1:
        raise InvalidArgument(
            "volume name is too short, names should be at least two alphanumeric characters",
            field="name",
        )
    if not _NAME.fullmatch(name) or len(name) > _NAME_MAX:
        raise InvalidArgument(
            f'"{name}" includes invalid characters for a local volume name, only '
            '"[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory, '
            "use absolute path",
            field="name",
        )


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _has_entries(directory: Path) -> bool:
    return any(directory.iterdir())


def _not_found(verb: str, name: str) -> NotFound:
    return NotFound(f"{verb} {name}: no such volume", resource=("volume", name))
