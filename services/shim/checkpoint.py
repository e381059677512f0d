"""Checkpoints of a container: where its image lies, and where criu works meanwhile.

A container that is restored has no process before Start: Create only keeps the image. That is
done by hard links where it lies on the bundle's file system, since who passed it may remove it as
soon as Create has been answered.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from services.shim.bundle import Bundle

_KEPT = "checkpoint"
_WORK = "criu-work"


@frozen
class CheckpointImage:
    """A container's saved state, to be restored.

    Attributes:
        path: directory of the image.
        work: criu's, for its log; None: one in the bundle.
    """

    path: Path
    work: Path | None = None

    def state(self) -> dict[str, str]:
        """As it is kept in ``state.json``."""
        return {"path": str(self.path), "work": str(self.work or "")}

    @classmethod
    def unpack(cls, saved: Mapping[str, Any]) -> Self:
        """What ``state`` made."""
        return cls(Path(saved["path"]), Path(saved["work"]) if saved["work"] else None)


def keep(image: CheckpointImage, bundle: Bundle) -> CheckpointImage:
    """Have an image stay until it is restored, whatever its owner does with it. Blocks.

    Raises:
        InvalidArgument: its path is not absolute.
        FailedPrecondition: there is no such directory, or it is empty.
    """
    if not image.path.is_absolute():
        raise InvalidArgument(
            f"checkpoint '{image.path}' is not an absolute path", field="checkpoint"
        )
    try:
        names = os.listdir(image.path)  # noqa: PTH208 - tells a file from a directory by its error
    except OSError as error:
        raise FailedPrecondition(
            f"checkpoint {image.path} cannot be read: {error.strerror}"
        ) from error
    if not names:
        raise FailedPrecondition(f"checkpoint {image.path} is empty: there is nothing to restore")
    kept = bundle.path / _KEPT
    try:
        shutil.copytree(image.path, kept, copy_function=os.link, symlinks=True)
    except (OSError, shutil.Error):  # another file system: it is used where it is
        shutil.rmtree(kept, ignore_errors=True)
        return image
    return CheckpointImage(kept, image.work)


@contextlib.contextmanager
def work_directory(bundle: Bundle, chosen: Path | None) -> Iterator[Path]:
    """A directory for criu to work in: the one that was asked for stays, another goes at the end.

    Raises:
        FailedPrecondition: it cannot be made.
    """
    path = chosen or bundle.path / _WORK
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FailedPrecondition(f"criu cannot work in {path}: {error.strerror}") from error
    try:
        yield path
    finally:
        if chosen is None:
            shutil.rmtree(path, ignore_errors=True)
