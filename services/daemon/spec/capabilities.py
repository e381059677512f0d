"""Capabilities: their names, the default set, and what adding and dropping makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_KNOWN = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
PERFMON BPF CHECKPOINT_RESTORE
"""
_USUAL = """
CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE
SYS_CHROOT KILL AUDIT_WRITE
"""

# in the order of linux/capability.h: a name's place is its number
NAMES = tuple(f"CAP_{name}" for name in _KNOWN.split())
DEFAULTS = tuple(f"CAP_{name}" for name in _USUAL.split())

_ALL = "ALL"


def names_of_mask(mask: int) -> tuple[str, ...]:
    """Names of the bits of a capability set; bits that are unknown here are left out."""
    return tuple(name for number, name in enumerate(NAMES) if mask >> number & 1)


def granted(
    *, add: Collection[str], drop: Collection[str], privileged: bool, available: Collection[str]
) -> tuple[str, ...]:
    """The capabilities of a container.

    Args:
        add: names with or without ``CAP_``, in any case, or ``ALL``.
        drop: likewise.
        privileged: everything that is available.
        available: what this process can hand on. A default that is not among it is left out; one
            that was asked for by name is an error.

    Raises:
        InvalidArgument: an unknown name, or one that is not available.
    """
    added = _normalize(add, available)
    dropped = set(_normalize(drop, NAMES))
    if privileged:
        return tuple(available)
    if _ALL in added:
        return tuple(name for name in available if name not in dropped)
    defaults: Iterable[str] = () if _ALL in dropped else DEFAULTS
    kept = [name for name in defaults if name in available and name not in dropped]
    return tuple(dict.fromkeys([*kept, *added]))


def _normalize(names: Collection[str], available: Collection[str]) -> list[str]:
    normalized = []
    for given in names:
        name = given.upper()
        if name == _ALL:
            normalized.append(name)
            continue
        name = name if name.startswith("CAP_") else f"CAP_{name}"
        if name not in NAMES:
            raise InvalidArgument(f'unknown capability: "{name}"', field="cap_add")
        if name not in available:
            raise InvalidArgument(
                "capability not supported by your kernel or not available in the current "
                f'environment: "{name}"',
                field="cap_add",
            )
        normalized.append(name)
    return normalized
