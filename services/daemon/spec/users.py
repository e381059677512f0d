"""Who a container's process runs as: ``user[:group]`` by name or number, looked up in its root.

The rules are those of moby and runc: digits are always a number, a number needs no entry, a name
does; the first matching line counts; supplementary groups come from ``/etc/group`` unless a group
is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument
from services.common.frozen import frozen
from services.daemon.spec.layers import LayeredRoot
from services.daemon.spec.request import ResolvedUser

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_ID_MAX = 2**31 - 1
_FILE_SIZE_MAX = 16 * 1024 * 1024


@frozen
class _PasswdEntry:
    name: str
    uid: int
    gid: int
    home: str


@frozen
class _GroupEntry:
    name: str
    gid: int
    members: tuple[str, ...]


def resolve_user(layers: Sequence[Path], user: str) -> ResolvedUser:
    """Turn ``user[:group]`` into numbers. Blocks: reads up to two files, call it in a thread.

    Args:
        layers: directories that make up the root file system, topmost first: the mounted root
            alone, or, while it is not mounted, an overlay's upper directory and its lower ones
            (:func:`services.daemon.spec.layers.layers_of_mount` takes them from containerd's
            mounts). The topmost ``/etc/passwd`` counts, with whiteouts as overlayfs has them.
        user: names or numbers; empty means root.

    Raises:
        InvalidArgument: a name without an entry, or a number out of range.
    """
    root = LayeredRoot(layers)
    user_name, _, group_name = user.partition(":")
    user_number = _number(user_name)
    group_number = _number(group_name)
    entry = _find_user(root, user_name, user_number)
    uid = entry.uid if entry else (user_number or 0)
    gid = entry.gid if entry else 0
    additional: tuple[int, ...] = ()
    if group_name:
        gid = _find_group(root, group_name, group_number)
    elif entry is not None:
        additional = tuple(group.gid for group in _groups(root) if entry.name in group.members)
    return ResolvedUser(
        uid=uid,
        gid=gid,
        additional_gids=tuple(dict.fromkeys(number for number in additional if number != gid)),
        home=entry.home if entry and entry.home else "/",
    )


def _find_user(root: LayeredRoot, name: str, number: int | None) -> _PasswdEntry | None:
    wanted = 0 if not name else number
    for entry in _users(root):
        if entry.uid == wanted if wanted is not None else entry.name == name:
            return entry
    if wanted is None:
        raise InvalidArgument(
            f"unable to find user {name}: no matching entries in passwd file", field="user"
        )
    return None


def _find_group(root: LayeredRoot, name: str, number: int | None) -> int:
    if number is not None:
        return number
    for group in _groups(root):
        if group.name == name:
            return group.gid
    raise InvalidArgument(
        f"unable to find group {name}: no matching entries in group file", field="user"
    )


def _number(text: str) -> int | None:
    if not (text.isascii() and text.removeprefix("-").isdigit()):
        return None
    number = int(text)
    if not 0 <= number <= _ID_MAX:
        raise InvalidArgument(f"uids and gids must be in range 0-{_ID_MAX}", field="user")
    return number


def _users(root: LayeredRoot) -> Iterator[_PasswdEntry]:
    for fields in _lines(root, "/etc/passwd"):
        numbers = _numbers(fields[2:4])
        if numbers is not None and len(numbers) == 2:
            home = fields[5] if len(fields) > 5 else ""
            yield _PasswdEntry(fields[0], numbers[0], numbers[1], home)


def _groups(root: LayeredRoot) -> Iterator[_GroupEntry]:
    for fields in _lines(root, "/etc/group"):
        numbers = _numbers(fields[2:3])
        if numbers:
            members = fields[3].split(",") if len(fields) > 3 else []
            yield _GroupEntry(fields[0], numbers[0], tuple(members))


def _lines(root: LayeredRoot, path: str) -> Iterator[list[str]]:
    data = root.read(path, size_max=_FILE_SIZE_MAX) or b""
    for line in data.decode(errors="surrogateescape").splitlines():
        text = line.strip()
        if text and not text.startswith("#"):
            yield text.split(":")


def _numbers(fields: Sequence[str]) -> list[int] | None:
    if not all(field.isascii() and field.isdigit() for field in fields):
        return None
    return [int(field) for field in fields]
