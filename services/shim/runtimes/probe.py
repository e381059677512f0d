"""Which runtimes can be used here, and why others cannot: ``theseus-shim probe``.

Quick and without side effects: the program is asked for its version, and what is known to stop a
program is looked for. crun refuses every container on a host whose cgroups are hybrid (v1
controllers, and a v2 hierarchy at ``/sys/fs/cgroup/unified``) as soon as one controller lives in
the v2 part ("cgroups in hybrid mode not supported").
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.errors import TheseusError
from services.shim.runtimes.invocation import ENVIRONMENT
from services.shim.runtimes.runc import find_program

if TYPE_CHECKING:
    from collections.abc import Sequence

KNOWN_RUNTIMES = ("runc", "crun")
_TIMEOUT_S = 5.0
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What was found about one runtime.

    Attributes:
        name: as it was asked for.
        path: of the program; empty when there is none.
        version: first line of ``--version``.
        usable: whether containers can be expected to run.
        reason: why not.
    """

    name: str
    path: str = ""
    version: str = ""
    usable: bool = False
    reason: str = ""


def probe(names: Sequence[str] = KNOWN_RUNTIMES, *, cgroups: Path = _CGROUPS) -> list[ProbeResult]:
    """Look at each runtime in turn. Blocks for as long as they take to print their version."""
    return [_probe_one(name, cgroups) for name in names]


def hybrid_controllers(cgroups: Path = _CGROUPS) -> list[str]:
    """Controllers of the v2 hierarchy on a host that also has v1 controllers; else empty."""
    if (cgroups / "cgroup.controllers").exists():
        return []
    try:
        return (cgroups / "unified" / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def _probe_one(name: str, cgroups: Path) -> ProbeResult:
    try:
        path = find_program(name)
    except TheseusError as error:
        return ProbeResult(name, reason=error.message)
    try:
        answer = subprocess.run(
            [path, "--version"],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except OSError as error:
        return ProbeResult(name, path, reason=f"{path} cannot be started: {error.strerror}")
    except subprocess.TimeoutExpired:
        return ProbeResult(name, path, reason=f"{path} --version did not end in {_TIMEOUT_S:.0f} s")
    version = answer.stdout.decode(errors="replace").partition("\n")[0].strip()
    if answer.returncode != 0 or not version:
        return ProbeResult(
            name, path, reason=f"{path} --version exited with {answer.returncode} and no version"
        )
    reason = _known_obstacle(version, cgroups)
    return ProbeResult(name, path, version, usable=not reason, reason=reason)


def _known_obstacle(version: str, cgroups: Path) -> str:
    controllers = hybrid_controllers(cgroups)
    if not version.startswith("crun ") or not controllers:
        return ""
    return (
        f"crun refuses a hybrid cgroup host with {', '.join(controllers)} in the unified "
        f"hierarchy: unmount {cgroups / 'unified'}, or move the controllers to v1"
    )
