"""What a crash left in the content directories, and its removal. Everything here blocks.

Rows and files fall apart in four ways, by the crash order that ``local.py`` states:

    a blob's file without a row       a commit ended between rename and rows, or a delete after them
    an ingest directory without one   an opening ended before its row, or an abort after it
    an ingest's row without data      a commit ended after the rename: begin again
    a blob's row without a file       no crash of ours: somebody removed the file, so say so
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@frozen
class Leftovers:
    """What files and rows do not have in common.

    Attributes:
        files: blobs' files without a row.
        directories: ingests' directories without a row.
        lost_blobs: digests of blobs whose file is gone.
        empty_ingests: namespace and ref of ingests whose data is gone.
    """

    files: tuple[Path, ...]
    directories: tuple[Path, ...]
    lost_blobs: tuple[str, ...]
    empty_ingests: tuple[tuple[str, str], ...]

    def __bool__(self) -> bool:
        return bool(self.files or self.directories or self.lost_blobs or self.empty_ingests)

    def remove_files(self) -> None:
        """Remove what has no row, and what had one that was dropped."""
        for path in self.files:
            path.unlink(missing_ok=True)
        for path in self.directories:
            shutil.rmtree(path, ignore_errors=True)

    def summary(self) -> dict[str, object]:
        """Counts for a log line, and the blobs that are missed."""
        return {
            "orphan_blobs": len(self.files),
            "orphan_ingests": len(self.directories),
            "empty_ingests": len(self.empty_ingests),
            "lost_blobs": list(self.lost_blobs),
        }


def find_leftovers(
    blob_root: Path,
    ingest_root: Path,
    *,
    blobs: Iterable[str],
    ingests: Iterable[tuple[str, str, str]],
) -> Leftovers:
    """Compare the directories with the rows.

    Args:
        blob_root: where the blobs are.
        ingest_root: where the ingests are.
        blobs: digests of the rows of blobs.
        ingests: namespace, ref and id of the rows of ingests.
    """
    expected = {blob_root.joinpath(*digest.split(":", 1)): digest for digest in blobs}
    present = {path for algorithm in _entries(blob_root) for path in _entries(algorithm)}
    with_data, empty = set(), []
    for namespace, ref, ingest_id in ingests:
        if (ingest_root / ingest_id / "data").exists():
            with_data.add(ingest_root / ingest_id)
        else:
            empty.append((namespace, ref))
    return Leftovers(
        files=tuple(sorted(present - expected.keys())),
        directories=tuple(path for path in _entries(ingest_root) if path not in with_data),
        lost_blobs=tuple(digest for path, digest in expected.items() if path not in present),
        empty_ingests=tuple(empty),
    )


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
