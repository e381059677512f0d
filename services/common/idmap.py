"""Mounts that show other owners: what a file system keeps as 0 is a user namespace's root.

A mapping is written as containerd's labels and mount options have it: lines of
``<in the namespace>:<on the host>:<count>``, separated by commas. Everything blocks, and asks for
the privileges of the initial user namespace.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from services.common import linux
from services.common.errors import InvalidArgument
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ID_END = 1 << 32
_MAX_LINES = 340  # user_namespaces(7)


@frozen
class IdMap:
    """Ids inside of a user namespace and outside, as they are written; both or none are empty."""

    uids: str = ""
    gids: str = ""

    def __bool__(self) -> bool:
        return bool(self.uids or self.gids)

    @property
    def root(self) -> tuple[int, int]:
        """The host's uid and gid of the namespace's root.

        Raises:
            InvalidArgument: it has none.
        """
        return _root(self.uids), _root(self.gids)

    def check(self) -> None:
        """Raise ``InvalidArgument`` unless both mappings parse."""
        _lines(self.uids)
        _lines(self.gids)

    @contextlib.contextmanager
    def namespace(self) -> Iterator[int]:
        """A descriptor of a user namespace that maps like this.

        Raises:
            InvalidArgument: a mapping is missing or malformed.
        """
        fd = linux.user_namespace(_kernel_text(self.uids), _kernel_text(self.gids))
        try:
            yield fd
        finally:
            os.close(fd)


def attach(source: str | Path, target: str | Path, namespace: int, *, attributes: int = 0) -> None:
    """Show ``source``, a directory, at ``target`` with its owners mapped."""
    tree = linux.clone_tree(source)
    try:
        linux.idmap_mount(tree, namespace, attributes=attributes)
        linux.move_mount(tree, target)
    finally:
        os.close(tree)


def _root(mapping: str) -> int:
    for inside, outside, count in _lines(mapping):
        if inside == 0 and count > 0:
            return outside
    raise InvalidArgument(f"{mapping!r} maps no root of a user namespace", field="labels")


def _kernel_text(mapping: str) -> str:
    return "".join(f"{inside} {outside} {count}\n" for inside, outside, count in _lines(mapping))


def _lines(mapping: str) -> list[tuple[int, int, int]]:
    found = []
    for line in mapping.split(","):
        numbers = line.split(":")
        if len(numbers) != 3 or not all(n.isascii() and n.isdigit() for n in numbers):
            raise InvalidArgument(
                f"{line[:80]!r} maps no ids: want <in the namespace>:<on the host>:<count>",
                field="labels",
            )
        inside, outside, count = map(int, numbers)
        if count == 0 or max(inside, outside) + count > _ID_END:
            raise InvalidArgument(f"{line[:80]!r} maps ids that do not exist", field="labels")
        found.append((inside, outside, count))
    if len(found) > _MAX_LINES:
        raise InvalidArgument(
            f"a mapping has {len(found)} lines, more than {_MAX_LINES}", field="labels"
        )
    return found
