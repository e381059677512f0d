"""Mounts as users ask for them, checked, and turned into what the OCI runtime mounts."""

from __future__ import annotations

import posixpath
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PROPAGATIONS = ("private", "rprivate", "shared", "rshared", "slave", "rslave")

MOUNTINFO = Path("/proc/self/mountinfo")

_DEFAULT_PROPAGATION = "rprivate"
_NO_COPY = "nocopy"
# Taken and without effect: SELinux relabelling where there is none, and hints of other systems.
_IGNORED = frozenset({"z", "Z", "rw", "consistent", "cached", "delegated", "default"})
_TMPFS_DEFAULTS = ("noexec", "nosuid", "nodev")
_TMPFS_VALUES = re.compile(
    r"size=\d+[kmgKMG%]?|mode=[0-7]{1,5}|uid=\d+|gid=\d+|nr_inodes=\d+[kmgKMG]?|"
    r"nr_blocks=\d+[kmgKMG]?|mpol=[a-z0-9:,=-]+|huge=[a-z_]+"
)
_FLAG_OPPOSITES = {
    "noexec": "exec",
    "nosuid": "suid",
    "nodev": "dev",
    "noatime": "atime",
    "norelatime": "relatime",
    "nodiratime": "diratime",
    "async": "sync",
    "rw": "ro",
}
_OPPOSITES = _FLAG_OPPOSITES | {value: key for key, value in _FLAG_OPPOSITES.items()}


class MountType(Enum):
    """Where a mount's content comes from."""

    BIND = "bind"
    VOLUME = "volume"
    TMPFS = "tmpfs"


@frozen
class Mount:
    """One mount as asked for.

    Attributes:
        source: absolute path (bind), name or empty for an anonymous one (volume), empty (tmpfs).
        target: absolute path in the container.
        options: propagation, ``nocopy`` (volume), ``bind`` to leave out submounts (bind), or
            options of tmpfs.
        create_source: make the directory of a bind when it is missing.
    """

    type: MountType
    source: str
    target: str
    read_only: bool = False
    options: tuple[str, ...] = ()
    create_source: bool = False


@frozen
class ResolvedMount:
    """One mount whose source exists, with all that the runtime needs.

    Attributes:
        source: path on the host, or ``tmpfs``.
        options: of the mount, without ``ro``.
        volume: name of the volume behind it, or empty.
        copy_up: an empty volume is to be filled with what the image has at ``target``.
    """

    type: MountType
    source: str
    target: str
    read_only: bool = False
    options: tuple[str, ...] = ()
    volume: str = ""
    copy_up: bool = False

    @property
    def is_bind(self) -> bool:
        """Whether the runtime makes a bind mount of it."""
        return self.type is not MountType.TMPFS


def validate_mounts(mounts: Iterable[Mount]) -> None:
    """Check mounts of one container, without looking at the file system.

    Raises:
        InvalidArgument: a bad type, path or option, or a target that is named twice.
    """
    targets: set[str] = set()
    for mount in mounts:
        _validate(mount)
        target = clean_target(mount.target)
        if target in targets:
            raise InvalidArgument(f"Duplicate mount point: {target}", field="mounts")
        targets.add(target)


def clean_target(target: str) -> str:
    """The target without doubled slashes, dots and a trailing slash."""
    return "/" + posixpath.normpath(target).lstrip("/")


def resolve_bind(mount: Mount) -> ResolvedMount:
    """Make sure that a bind mount's source is there. Blocks.

    Raises:
        InvalidArgument: the source does not exist and is not to be created, or its propagation is
            less than what the options need.
    """
    source = Path(mount.source)
    if mount.create_source and not source.exists():
        source.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        raise _bad(mount, f"bind source path does not exist: {mount.source}")
    propagation = _propagation(mount.options)
    check_propagation(source, propagation)
    recursion = "bind" if "bind" in mount.options else "rbind"
    return ResolvedMount(
        type=MountType.BIND,
        source=mount.source,
        target=clean_target(mount.target),
        read_only=mount.read_only or "ro" in mount.options,
        options=(recursion, propagation),
    )


def resolve_tmpfs(mount: Mount) -> ResolvedMount:
    """A fresh file system in memory; options given replace the opposite defaults."""
    options = [*_TMPFS_DEFAULTS]
    for option in mount.options:
        if option in ("ro", "rw"):
            continue
        opposite = _OPPOSITES.get(option)
        key = option.partition("=")[0]
        options = [kept for kept in options if kept not in (option, opposite)]
        if "=" in option:
            options = [kept for kept in options if not kept.startswith(f"{key}=")]
        options.append(option)
    return ResolvedMount(
        type=MountType.TMPFS,
        source="tmpfs",
        target=clean_target(mount.target),
        read_only=mount.read_only or "ro" in mount.options,
        options=tuple(options),
    )


def resolve_volume(mount: Mount, *, name: str, mountpoint: Path) -> ResolvedMount:
    """A volume that exists, as a bind of its directory."""
    return ResolvedMount(
        type=MountType.VOLUME,
        source=str(mountpoint),
        target=clean_target(mount.target),
        read_only=mount.read_only or "ro" in mount.options,
        options=("rbind", _propagation(mount.options)),
        volume=name,
        copy_up=_NO_COPY not in mount.options,
    )


def check_propagation(source: Path, propagation: str, *, mountinfo: Path = MOUNTINFO) -> None:
    """Check that what a container is to see, or to show, gets through the host's own mount.

    Raises:
        InvalidArgument: the mount above ``source`` is private, or a slave where it must be shared.
    """
    needed = {"shared": ("shared:",), "slave": ("shared:", "master:")}.get(
        propagation.removeprefix("r")
    )
    if needed is None:
        return
    point, fields = _mount_above(source.resolve(), mountinfo)
    if not any(field.startswith(needed) for field in fields):
        wanted = "shared" if len(needed) == 1 else "shared or slave"
        raise InvalidArgument(
            f"path {source} is mounted on {point} but it is not a {wanted} mount", field="mounts"
        )


def _validate(mount: Mount) -> None:
    if not mount.target:
        raise _bad(mount, "field Target must not be empty")
    if not mount.target.startswith("/"):
        raise _bad(mount, f"invalid mount path: '{mount.target}' mount path must be absolute")
    if clean_target(mount.target) == "/":
        raise _bad(mount, "invalid specification: destination can't be '/'")
    if "\0" in mount.target + mount.source:
        raise _bad(mount, "a path has a NUL character in it")
    if mount.type is MountType.BIND:
        if not mount.source:
            raise _bad(mount, "field Source must not be empty")
        if not mount.source.startswith("/"):
            raise _bad(mount, f"invalid mount path: '{mount.source}' mount path must be absolute")
    elif mount.type is MountType.TMPFS and mount.source:
        raise _bad(mount, "field Source must not be specified")
    _validate_options(mount)


def _validate_options(mount: Mount) -> None:
    for option in mount.options:
        if mount.type is MountType.TMPFS:
            known = option in _OPPOSITES or _TMPFS_VALUES.fullmatch(option) is not None
        else:
            known = option in PROPAGATIONS or option in _IGNORED or option == "ro"
            known = known or option == (_NO_COPY if mount.type is MountType.VOLUME else "bind")
            known = known or option == "rbind"
        if not known:
            raise _bad(mount, f"invalid mode: {option}")
    if sum(option in PROPAGATIONS for option in mount.options) > 1:
        raise _bad(mount, f"invalid mode: {','.join(mount.options)}")


def _propagation(options: Sequence[str]) -> str:
    return next((word for word in options if word in PROPAGATIONS), _DEFAULT_PROPAGATION)


def _mount_above(path: Path, mountinfo: Path) -> tuple[str, list[str]]:
    """The last mount point over ``path``, and its optional fields (proc(5), mountinfo)."""
    best: tuple[str, list[str]] = ("/", [])
    for line in mountinfo.read_text().splitlines():
        fields = line.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, fields[6 : fields.index("-")])
    return best


def _bad(mount: Mount, reason: str) -> InvalidArgument:
    return InvalidArgument(
        f'invalid mount config for type "{mount.type.value}": {reason}', field="mounts"
    )
