"""Device nodes for containers: named ones, directories of them, or all of the host's."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.common.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from services.daemon.spec.request import Device

# The runtime makes these, or mounts over them; a host's console or terminal is nobody's business.
_SKIPPED_DIRECTORIES = frozenset({"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"})
_SKIPPED_NAMES = frozenset({"console"})


def host_devices(root: Path = Path("/dev")) -> list[dict[str, Any]]:
    """Every device node of the host, as ``linux.devices``: for privileged containers. Blocks."""
    return [_describe(str(path), status) for path, status in _walk(root)]


def requested(devices: Iterable[Device]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """``linux.devices`` and the rules of the device controller for what was asked for. Blocks.

    Raises:
        InvalidArgument: no such device, a path that is none, or other permissions than ``rwm``.
    """
    nodes: list[dict[str, Any]] = []
    rules: list[dict[str, Any]] = []
    for device in devices:
        if not device.permissions or set(device.permissions) - set("rwm"):
            raise InvalidArgument(
                f"invalid device mode: {device.permissions}, it consists of the letters r, w and m",
                field="devices",
            )
        found = _expand(device)
        nodes += found
        rules += [
            {
                "allow": True,
                "type": node["type"],
                "major": node["major"],
                "minor": node["minor"],
                "access": device.permissions,
            }
            for node in found
        ]
    return nodes, rules


def _expand(device: Device) -> list[dict[str, Any]]:
    inside = device.container_path or device.host_path
    try:
        path = Path(device.host_path).resolve(strict=True)
        status = path.stat()
    except OSError as error:
        raise InvalidArgument(
            f'error gathering device information while adding custom device "{device.host_path}": '
            f"{(error.strerror or '').lower()}",
            field="devices",
        ) from error
    if _is_device(status):
        return [_describe(inside, status)]
    found = []
    if stat.S_ISDIR(status.st_mode):
        found = [
            _describe(f"{inside}/{node.relative_to(path)}", node_status)
            for node, node_status in _walk(path)
        ]
    if not found:
        raise InvalidArgument(
            f'error gathering device information while adding custom device "{device.host_path}": '
            "not a device node",
            field="devices",
        )
    return found


def _walk(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for directory, names, files in os.walk(root):
        names[:] = sorted(set(names) - _SKIPPED_DIRECTORIES)
        for name in sorted(set(files) - _SKIPPED_NAMES):
            path = Path(directory, name)
            try:
                status = path.lstat()
            except FileNotFoundError:  # unplugged meanwhile
                continue
            if _is_device(status):
                yield path, status


def _is_device(status: os.stat_result) -> bool:
    # 0:0 is overlayfs' whiteout, not a device
    return (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)) and status.st_rdev != 0


def _describe(inside: str, status: os.stat_result) -> dict[str, Any]:
    return {
        "path": inside,
        "type": "c" if stat.S_ISCHR(status.st_mode) else "b",
        "major": os.major(status.st_rdev),
        "minor": os.minor(status.st_rdev),
        "fileMode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
    }
