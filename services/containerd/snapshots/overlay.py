"""Snapshots on overlayfs: a directory for each, stacked by the kernel when they are mounted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.mounts import Mount
from services.containerd.snapshots.directories import DirectorySnapshotter
from services.containerd.snapshots.idmap import mount_options
from services.containerd.snapshots.snapshotter import REBASE, REMAP_IDS, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.containerd.metadata.snapshots import SnapshotRow

_PARAMETERS = Path("/sys/module/overlay/parameters")
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # linux/proc_ns.h, PROC_USER_INIT_INO


class OverlaySnapshotter(DirectorySnapshotter):
    """The snapshotter ``overlayfs``."""

    name = "overlayfs"
    capabilities = (REBASE, REMAP_IDS)

    _options: tuple[str, ...] = ()

    async def begin(self) -> set[int]:
        """See :class:`DirectorySnapshotter`."""
        self._options = await asyncio.to_thread(_overlay_options)
        return await super().begin()

    def _fill(self, directory: Path, kind: Kind, parent: Path | None) -> None:
        """Nothing to do: the kernel shows the parents' files."""

    async def _mounts(self, row: SnapshotRow, ancestors: Sequence[int]) -> list[Mount]:
        if not ancestors:
            mode = "ro" if row.kind == Kind.VIEW else "rw"
            # Nothing of others to be mapped: what is here is made by whom the labels name.
            return [Mount("bind", str(self.files(row.id)), options=(mode, "rbind"))]
        mapped = mount_options(row.labels)
        if row.kind == Kind.VIEW and len(ancestors) == 1:
            options = (*mapped, "ro", "rbind")
            return [Mount("bind", str(self.files(ancestors[0])), options=options)]
        directories = []
        if row.kind == Kind.ACTIVE:
            directories.append(f"workdir={self.root / str(row.id) / 'work'}")
            directories.append(f"upperdir={self.files(row.id)}")
        directories.append("lowerdir=" + ":".join(str(self.files(i)) for i in ancestors))
        return [Mount("overlay", "overlay", options=(*mapped, *directories, *self._options))]


def _overlay_options() -> tuple[str, ...]:
    """What every overlay needs besides its directories on this machine.

    ``index=off``, because lower directories are shared between mounts. ``metacopy=off`` where the
    machine has it on, and with it what it brings along: an upper directory has to be a layer by
    itself, and one that refers to the data of those below is none. Inside a user namespace only
    ``user.`` attributes can be written, hence ``userxattr``.
    """
    namespace = Path("/proc/self/ns/user").stat().st_ino
    options = [] if namespace == _INITIAL_USER_NAMESPACE else ["userxattr"]
    if (_PARAMETERS / "index").exists():
        options.append("index=off")
    if _is_on("metacopy"):
        options.append("metacopy=off")
    if _is_on("redirect_dir"):
        options.append("redirect_dir=off")
    return tuple(options)


def _is_on(parameter: str) -> bool:
    try:
        return (_PARAMETERS / parameter).read_text().strip() == "Y"
    except FileNotFoundError:
        return False
