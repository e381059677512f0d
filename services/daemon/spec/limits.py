"""Checks of what users ask for, in the words that they know, before anything is created."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.daemon.spec.host import HostFacts
    from services.daemon.spec.request import Resources

_MEMORY_MIN_BYTES = 6 * 1024 * 1024
_NANO_CPUS_MIN = 10_000_000
_CPU_SHARES_MAX = 262_144  # kernel/sched/sched.h, MAX_SHARES


def validate_resources(resources: Resources, host: HostFacts) -> None:
    """Check limits against the machine.

    Raises:
        InvalidArgument: a limit that cannot be had.
    """
    if resources.memory_bytes and resources.memory_bytes < _MEMORY_MIN_BYTES:
        raise InvalidArgument("Minimum memory limit allowed is 6MB", field="resources.memory_bytes")
    lowest = _NANO_CPUS_MIN if resources.nano_cpus else 0
    if not lowest <= resources.nano_cpus <= host.cpus * 1_000_000_000:
        raise InvalidArgument(
            f"range of CPUs is from 0.01 to {host.cpus}.00, as there are only {host.cpus} CPUs "
            "available",
            field="resources.nano_cpus",
        )
    if not 0 <= resources.cpu_shares <= _CPU_SHARES_MAX:
        raise InvalidArgument(
            f"invalid CPU shares ({resources.cpu_shares}): value must be between 2 and "
            f"{_CPU_SHARES_MAX}",
            field="resources.cpu_shares",
        )
    if resources.pids_limit < -1:
        raise InvalidArgument(
            f"invalid PIDs limit ({resources.pids_limit}): value must be positive, or 0 for none",
            field="resources.pids_limit",
        )


def validate_env(env: Iterable[str]) -> None:
    """Check NAME=VALUE and NAME entries.

    Raises:
        InvalidArgument: an entry without a name, or with a NUL in it.
    """
    for entry in env:
        if not entry.partition("=")[0] or "\0" in entry:
            raise InvalidArgument(f"invalid environment variable: {entry!s}", field="env")


def validate_working_dir(path: str) -> None:
    """Check a working directory; empty is fine.

    Raises:
        InvalidArgument: not absolute.
    """
    if path and not path.startswith("/"):
        raise InvalidArgument(
            f"the working directory '{path}' is invalid, it needs to be an absolute path",
            field="working_dir",
        )
