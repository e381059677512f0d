"""What a reader must know of the machine, and the versions of everything."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

_DEBIAN = ("docker.io", "containerd", "podman", "conmon", "netavark", "runc", "crun")
_PYTHON = ("grpcio", "protobuf", "uvloop", "aiohttp")


@dataclass(frozen=True, slots=True)
class Host:
    """The machine and what is on it.

    Attributes:
        load: runnable processes, averaged over a minute, before the run.
    """

    began_at: str
    kernel: str
    processor: str
    cores: int
    memory_gib: float
    load: float
    cgroups: str
    versions: dict[str, str]


def described() -> Host:
    """This machine, now."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Host(
        began_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        kernel=platform.release().partition("-")[0],
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=pages / (1 << 30),
        load=os.getloadavg()[0],
        cgroups="v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1",
        versions={
            "Python": platform.python_version(),
            **{name: metadata.version(name) for name in _PYTHON},
            **_debian(),
        },
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _debian() -> dict[str, str]:
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Version}\\n", *_DEBIAN],
        capture_output=True,
        text=True,
        check=False,
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
